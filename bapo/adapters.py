"""Adapters on disk: PEFT's LoRA format plus our card `bapo.json`; found, checked, installed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bapo.errors import BapoError

CARD = "bapo.json"
WEIGHTS = "adapter_model.safetensors"  # never a pickle: unpickling can run code
CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How the adapter does on pairs it was not trained on. Drift is averaged over prompts."""

    prompts: int
    pairs: int
    reward_accuracy: float
    drift_nats: float
    drift_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterCard:
    """Where an adapter comes from: enough to know what it fits and to train it again."""

    base: str
    base_fingerprint: str
    preference: str
    method: str
    hyperparameters: dict[str, float | int | str | None]
    data_sha256: str
    training_pairs: int
    held_out: HeldOut | None
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        (folder / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "AdapterCard":
        values = json.loads((folder / CARD).read_text())
        held_out = HeldOut(**values.pop("held_out")) if values.get("held_out") else values.pop("held_out")
        return cls(**values, held_out=held_out)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A usable adapter of the loaded base. `written` (ns) tells a newly trained one from its predecessor."""

    folder: Path
    card: AdapterCard
    written: int

    @property
    def name(self) -> str:
        return adapter_name(self.card.preference, self.card.method)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the weights file."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


def adapter_name(preference: str, method: str) -> str:
    return f"{preference}-{method}"


class AdapterStore:
    """The adapters of one base: `<root>/<base>/<preference>-<method>/`."""

    def __init__(self, root: Path, base_name: str, base_fingerprint: str):
        self.folder = root / base_name
        self.base_name = base_name
        self.base_fingerprint = base_fingerprint

    def adapters(self) -> list[Adapter]:
        """Every adapter that fits the base, by name. What does not fit is in `refused`."""
        found = [self._inspect(folder) for folder in self._folders()]
        return [adapter for adapter in found if isinstance(adapter, Adapter)]

    def refused(self) -> dict[str, str]:
        """Adapter folders that are not offered, each with the reason."""
        found = {folder.name: self._inspect(folder) for folder in self._folders()}
        return {name: fault for name, fault in found.items() if isinstance(fault, str)}

    def by_preference(self) -> dict[str, dict[str, Adapter]]:
        """preference id → method → adapter."""
        found: dict[str, dict[str, Adapter]] = {}
        for adapter in self.adapters():
            found.setdefault(adapter.card.preference, {})[adapter.card.method] = adapter
        return found

    def for_preference(self, preference: str) -> dict[str, Adapter]:
        """method → adapter of a preference; a `BapoError` where there is none."""
        found = self.by_preference()
        if preference not in found:
            faults = self.refused().items()
            refused = [f"{name}: {fault}" for name, fault in faults if name.startswith(f"{preference}-")]
            raise BapoError(
                f"The base {self.base_name} has no adapter for the preference {preference!r}"
                + (f" ({'; '.join(refused)})" if refused else "")
                + (f"; there are {', '.join(found)}" if found else "")
                + f". Train one with: python -m bapo train --preference {preference} --method bapo"
            )
        return found[preference]

    def place(self, preference: str, method: str) -> Path:
        """The folder an adapter of this name lives in, there or not."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", preference):
            raise BapoError(f"A preference is named with letters, digits, '-' and '_' alone, not {preference!r}.")
        return self.folder / adapter_name(preference, method)

    def install(self, scratch: Path, card: AdapterCard) -> Path:
        """Move a finished adapter folder into place in one rename; an earlier one of that name makes room first."""
        card.write(scratch)
        if isinstance(fault := self._inspect(scratch), str):
            raise BapoError(f"The adapter was not installed: {fault}.")
        target = self.place(card.preference, card.method)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            former = target.with_name(f".{target.name}.former-{os.getpid()}")
            target.rename(former)
            try:
                scratch.rename(target)
            except OSError:
                former.rename(target)
                raise
            shutil.rmtree(former)
        else:
            scratch.rename(target)
        return target

    def _inspect(self, folder: Path) -> Adapter | str:
        """The adapter in a folder, or why it cannot be used with this base."""
        for name in (CONFIG, WEIGHTS, CARD):
            if not (folder / name).is_file():
                return f"{name} is missing"
        try:
            kind = json.loads((folder / CONFIG).read_text()).get("peft_type")
            adapter = Adapter(folder, AdapterCard.read(folder), (folder / WEIGHTS).stat().st_mtime_ns)
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            return f"{CONFIG} or {CARD} is not what it should be"
        if kind != "LORA":
            return f"it is a {kind} adapter; only LoRA is supported"
        card = adapter.card
        if card.base_fingerprint != self.base_fingerprint:
            return f"it was trained on another base ({card.base}, fingerprint {card.base_fingerprint[:12]})"
        return adapter

    def _folders(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))
