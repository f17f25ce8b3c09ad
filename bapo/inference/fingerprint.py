"""What identifies a base: its configuration, its tokenizer and its weights, not its name or place."""

import hashlib
import json
from pathlib import Path

from bapo.disk_cache import DiskCache

VOLATILE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "tokenizer_config.json")


def fingerprint(folder: Path, cache: Path) -> str:
    """SHA-256 (hex) over config, tokenizer files and every tensor of a model folder.

    Reading gigabytes takes seconds, so the answer is kept in `cache`, keyed by the folder and the
    size and modification time of its files.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    key = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    known = DiskCache(cache / "fingerprints")
    if key not in known:
        known[key] = compute_fingerprint(folder)
    return known[key]


def compute_fingerprint(folder: Path) -> str:
    """The same, always read from the files."""
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text())
    stable = {key: value for key, value in config.items() if key not in VOLATILE_CONFIG_KEYS}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            digest.update(name.encode() + (folder / name).read_bytes())
    for name, header, path, start in sorted(_tensors(folder)):
        begin, end = header["data_offsets"]
        digest.update(json.dumps([name, header["dtype"], header["shape"]]).encode())
        with path.open("rb") as file:
            file.seek(start + begin)
            for offset in range(begin, end, 1 << 22):
                digest.update(file.read(min(1 << 22, end - offset)))
    return digest.hexdigest()


def _tensors(folder: Path):
    # The layout is fixed by the safetensors format: an 8-byte header length, a JSON header, the data.
    # Tensors are hashed by name, so that neither sharding nor metadata changes the fingerprint.
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                yield name, entry, path, 8 + length
