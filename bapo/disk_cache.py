"""Small results that took long to compute, one JSON file each."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class DiskCache:
    """Maps JSON-ready keys to JSON-ready values in a folder. Entries appear whole or not at all."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __contains__(self, key: Any) -> bool:
        return self._file(key).exists()

    def __getitem__(self, key: Any) -> Any:
        return json.loads(self._file(key).read_text())

    def __setitem__(self, key: Any, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self._file(key)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(value))
        scratch.replace(file)

    def _file(self, key: Any) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
