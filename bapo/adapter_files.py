"""Adapters that come and go as files. What comes in is untrusted: sizes first, names from a list, tensors alone."""

import errno
import json
import lzma
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bapo.adapters import CARD, CONFIG, WEIGHTS, Adapter, AdapterCard, AdapterStore
from bapo.errors import BapoError

MAX_BYTES = 512 * 2**20  # a LoRA adapter of a few billion parameters takes tens of megabytes
MAX_CONFIG_BYTES = 2**20
DAMAGED = (  # what reading a zip raises, by its four compressions
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, NotImplementedError, RuntimeError, EOFError, ValueError,
)  # fmt: skip
PREFIX = "base_model.model."  # PEFT's, before the base's own name of a module
README = """\
A LoRA adapter for {base}. With PEFT:

    from peft import PeftModel
    model = PeftModel.from_pretrained(base_model, "this folder")

Preference: {preference}. Method: {method}. bapo.json is its card.
"""


def export_zip(adapter: Adapter, file: Path) -> None:
    """Write an adapter as a zip whose one folder stock PEFT loads."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name in (CONFIG, WEIGHTS, CARD, "metrics.jsonl"):
            if (adapter.folder / name).exists():
                archive.write(adapter.folder / name, f"{adapter.name}/{name}")
        text = README.format(base=adapter.card.base, preference=adapter.card.preference, method=adapter.card.method)
        archive.writestr(f"{adapter.name}/README.txt", text)


def import_adapter(path: Path, store: AdapterStore, base_folder: Path, preference: str, method: str) -> Adapter:
    """Install a PEFT LoRA adapter from a folder or a zip under a name; a `BapoError` says why it is refused.

    Every tensor must be a LoRA matrix of a linear layer of the base in `base_folder`, in its shape.
    """
    target = store.place(preference, method)
    if target.exists():
        raise BapoError(f"There is an adapter {target.name} already. Choose another name.")
    scratch = store.scratch(target)
    try:
        (_unzip if path.is_file() else _copy)(path, scratch)
        card = _checked_card(scratch, store, base_folder, preference, method)
        store.install(scratch, card)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return store.named(target.name)


def _copy(path: Path, scratch: Path) -> None:
    if not path.is_dir():
        raise BapoError(f"{path} does not exist.")
    for name in (CONFIG, WEIGHTS, CARD):
        if (path / name).is_file():
            shutil.copyfile(path / name, scratch / name)


def _unzip(path: Path, scratch: Path) -> None:
    """Take the known files out of a zip, wherever its one folder lies; paths in the zip are never used."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/").rsplit("/", 1)[-1]
                if name not in (CONFIG, WEIGHTS, CARD) or (scratch / name).exists():
                    continue
                limit = MAX_BYTES if name == WEIGHTS else MAX_CONFIG_BYTES
                with archive.open(info) as source, (scratch / name).open("wb") as sink:
                    # The size in the directory may be a lie: count what really comes out.
                    while block := source.read(2**20):
                        if sink.tell() + len(block) > limit:
                            raise BapoError(f"{name} in {path.name} is larger than {limit >> 20} MB.")
                        sink.write(block)
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the disk's error, not the archive's: bz2 names no errno, an offset before the start is EINVAL
        raise BapoError(f"{path.name} is no zip archive that can be read: {error}.") from error


def _checked_card(scratch: Path, store: AdapterStore, base_folder: Path, preference: str, method: str) -> AdapterCard:
    for name in (CONFIG, WEIGHTS):
        if not (scratch / name).exists():
            raise BapoError(f"There is no {name}; expected a LoRA adapter in PEFT's format, with safetensors weights.")
    config = _config(scratch)
    if config.get("peft_type") != "LORA":
        raise BapoError(f"It is a {str(config.get('peft_type'))[:40]} adapter; only LoRA is supported.")
    for key in ("auto_mapping", "modules_to_save", "trainable_token_indices", "layer_replication"):
        if config.get(key):
            raise BapoError(f"It changes more than linear layers ({key}); only plain LoRA is supported.")
    _check_tensors(scratch / WEIGHTS, base_shapes(base_folder), config)
    card = None
    if (scratch / CARD).exists():
        try:
            card = AdapterCard.read(scratch)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise BapoError(f"{CARD} is not what it should be; leave it out.") from None
        if card.base_fingerprint != store.base_fingerprint:
            raise BapoError(f"It was trained on another base ({str(card.base)[:60]!r}), not on {store.base_name}.")
    known = card or AdapterCard(
        base=store.base_name,
        base_fingerprint=store.base_fingerprint,
        preference=preference,
        method=method,
        hyperparameters={},
        data_sha256="",
        training_pairs=0,
        held_out=None,
        versions={},
        description="Uploaded; nothing is known of its training.",
    )
    return known.renamed(preference, method)


def _config(scratch: Path) -> dict[str, Any]:
    try:
        config = json.loads((scratch / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BapoError(f"{CONFIG} is not a JSON object.")
    return config


def _check_tensors(weights: Path, shapes: dict[str, list[int]], config: dict[str, Any]) -> None:
    try:
        with safe_open(weights, "pt") as tensors:
            names = list(tensors.keys())
            if not names:
                raise BapoError("It holds no tensors.")
            for name in names:
                shape = tensors.get_slice(name).get_shape()
                if tensors.get_slice(name).get_dtype() not in ("F32", "F16", "BF16"):
                    raise BapoError(f"The tensor {name[:120]!r} is not of a floating-point type.")
                parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", name)
                base = shapes.get(f"{parts[1]}.weight") if parts else None
                if parts is None or base is None:
                    raise BapoError(f"The tensor {name[:120]!r} belongs to no linear layer of this base.")
                side = 1 if parts[2] == "lora_A" else 0  # A is [rank, in], B is [out, rank], the base [out, in]
                if len(shape) != 2 or shape[side] != base[side]:
                    raise BapoError(f"The tensor {name[:120]!r} has the shape {shape}, the base's layer is {base}.")
    except (SafetensorError, OSError) as error:
        raise BapoError(f"{WEIGHTS} is no safetensors file: {error}.") from error


def base_shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name → shape of every matrix of a base, from the headers of its files."""
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no dict)
    return {name: shape for name, shape in shapes.items() if len(shape) == 2}
