"""Adapters as files: what goes out loads in stock PEFT, what comes in is looked at first."""

import copy
import errno
import json
import zipfile

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from bapo.adapter_files import export_zip, import_adapter
from bapo.adapters import CARD, CONFIG, WEIGHTS, AdapterStore
from bapo.errors import BapoError
from tests.tiny import make_adapter


@pytest.fixture
def store(llama_base, settings):
    store = AdapterStore(settings.adapters, llama_base.name, llama_base.fingerprint)
    make_adapter(llama_base, store, "P2A", "bapo", seed=3)
    return store


@pytest.fixture
def folder(store, tmp_path):
    """A copy of the adapter's folder, to be spoilt."""
    import shutil

    return shutil.copytree(store.named("P2A-bapo").folder, tmp_path / "spoilt")


def test_an_exported_adapter_is_loaded_by_stock_peft_and_taken_in_again(store, llama_base, tmp_path):
    adapter = store.named("P2A-bapo")
    export_zip(adapter, tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "out")
    model = PeftModel.from_pretrained(copy.deepcopy(llama_base.model), tmp_path / "out" / "P2A-bapo")
    ids = torch.tensor([[5, 6, 7]])
    ours = PeftModel.from_pretrained(copy.deepcopy(llama_base.model), adapter.folder)
    assert torch.equal(model(ids).logits, ours(ids).logits)

    again = import_adapter(tmp_path / "a.zip", store, llama_base.folder, "mine", "dpo")
    assert again.sha256 == adapter.sha256
    assert (again.name, again.card.preference, again.card.method) == ("mine-dpo", "mine", "dpo")
    with pytest.raises(BapoError, match="There is an adapter mine-dpo already"):
        import_adapter(tmp_path / "a.zip", store, llama_base.folder, "mine", "dpo")
    assert not list(store.folder.glob(".*")), "no half-made folder is left"


def test_a_plain_peft_adapter_gets_a_card(store, llama_base, folder):
    (folder / CARD).unlink()
    card = import_adapter(folder, store, llama_base.folder, "found", "bapo").card
    assert (card.base_fingerprint, card.training_pairs, card.held_out) == (llama_base.fingerprint, 0, None)
    assert "nothing is known" in card.description


def spoil(folder, **changes):
    for name, change in changes.items():
        file = folder / {"config": CONFIG, "card": CARD, "weights": WEIGHTS}[name]
        if name == "weights":
            save_file(change(load_file(file)), file)
        else:
            values = json.loads(file.read_text())
            file.write_text(json.dumps({**values, **change}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"config": {"peft_type": "IA3"}}, "It is a IA3 adapter; only LoRA"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "changes more than linear layers"),
        ({"card": {"base_fingerprint": "f" * 64, "base": "other"}}, "on another base .'other'., not on tiny-llama"),
        ({"weights": lambda w: {**w, "lm_head.weight": torch.zeros(2, 2)}}, "belongs to no linear layer of this base"),
        (
            {"weights": lambda w: {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in w.items()}},
            "has the shape .* the base's layer is",
        ),
        ({"weights": lambda w: {name: t.int() for name, t in w.items()}}, "not of a floating-point type"),
        ({"weights": lambda w: {}}, "holds no tensors"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(store, llama_base, folder, changes, sentence):
    spoil(folder, **changes)
    with pytest.raises(BapoError, match=sentence):
        import_adapter(folder, store, llama_base.folder, "mine", "bapo")
    assert [adapter.name for adapter in store.adapters()] == ["P2A-bapo"]
    assert not list(store.folder.glob(".*"))


def test_hostile_zips_are_refused(store, llama_base, tmp_path):
    def refused(sentence, write, name="mine"):
        file = tmp_path / "a.zip"
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            write(archive)
        with pytest.raises(BapoError, match=sentence):
            import_adapter(file, store, llama_base.folder, name, "bapo")

    refused("There is no adapter_config.json", lambda archive: archive.writestr("../../evil.txt", "x"))
    refused("larger than 1 MB", lambda archive: archive.writestr(CONFIG, " " * (2 * 2**20)))
    refused(
        "no safetensors file", lambda a: (a.writestr(f"x/{CONFIG}", '{"peft_type": "LORA"}'), a.writestr(WEIGHTS, "x"))
    )
    refused("is not a JSON object", lambda a: (a.writestr(CONFIG, "["), a.writestr(WEIGHTS, "x")))
    refused("named with letters", lambda archive: None, name="../up")
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CONFIG, json.dumps({"peft_type": "LORA"}) * 50)
    damaged = bytearray((tmp_path / "c.zip").read_bytes())
    start = 30 + len(CONFIG)  # behind the entry's header: its compressed data
    damaged[start : start + 8] = b"\xff" * 8
    (tmp_path / "c.zip").write_bytes(damaged)
    with pytest.raises(BapoError, match="no zip archive that can be read"):
        import_adapter(tmp_path / "c.zip", store, llama_base.folder, "mine", "bapo")
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(BapoError, match="no zip archive"):
        import_adapter(tmp_path / "b.zip", store, llama_base.folder, "mine", "bapo")
    with pytest.raises(BapoError, match="does not exist"):
        import_adapter(tmp_path / "absent", store, llama_base.folder, "mine", "bapo")


def test_rename_delete_undo_and_publish(store, llama_base, tmp_path):
    mine = store.of(tmp_path / "own")
    make_adapter(llama_base, mine, "taste", "bapo", seed=5)
    assert [(a.name, mine.owns(a)) for a in mine.adapters()] == [("P2A-bapo", False), ("taste-bapo", True)]
    for touch in (mine.remove, lambda a: mine.rename(a, "x"), lambda a: mine.publish(a, store)):
        with pytest.raises(BapoError, match="belongs to everyone"):
            touch(mine.named("P2A-bapo"))

    renamed = mine.rename(mine.named("taste-bapo"), "other")
    assert (renamed.name, renamed.card.preference) == ("other-bapo", "other")
    held = mine.remove(renamed)
    assert [a.name for a in mine.adapters()] == ["P2A-bapo"]
    assert mine.restore(held).sha256 == renamed.sha256
    with pytest.raises(BapoError, match="not in the bin any more"):
        mine.restore("../../other")
    held = mine.remove(mine.named("other-bapo"))
    mine.empty_bin(older_than_seconds=3600)
    mine.restore(held)
    mine.remove(mine.named("other-bapo"))
    mine.empty_bin()
    with pytest.raises(BapoError, match="not in the bin any more"):
        mine.restore(held)

    make_adapter(llama_base, mine, "P2A", "bapo", seed=6)
    assert mine.owns(mine.named("P2A-bapo")), "one's own goes before everyone's"
    with pytest.raises(BapoError, match="shared adapter P2A-bapo already"):
        mine.publish(mine.named("P2A-bapo"), store)
    shared = mine.publish(mine.rename(mine.named("P2A-bapo"), "new"), store)
    assert store.owns(shared)
    assert [a.name for a in store.adapters()] == ["P2A-bapo", "new-bapo"]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_zip_is_refused_whatever_its_compression(store, llama_base, tmp_path, compression):
    file = tmp_path / "a.zip"
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("adapter_config.json", bytes(range(256)) * 8)
    whole = file.read_bytes()
    damaged = bytearray(whole)
    damaged[60:90] = b"\xff" * 30  # within the compressed bytes
    shifted = bytearray(whole)
    shifted[-6] += 1  # where the directory says that it starts: the file would start before its first byte
    for content in (damaged, shifted):
        file.write_bytes(content)
        with pytest.raises(BapoError, match="a.zip is no zip archive that can be read"):
            import_adapter(file, store, llama_base.folder, "mine", "bapo")


def test_a_full_disk_is_not_taken_for_a_damaged_zip(store, llama_base, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("adapter_config.json", "{}")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    with pytest.raises(OSError, match="No space left"):
        import_adapter(tmp_path / "a.zip", store, llama_base.folder, "mine", "bapo")
