"""Adapters on disk: PEFT's LoRA format plus our card `bapo.json`; found, checked, installed."""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bapo.errors import BapoError

CARD = "bapo.json"
WEIGHTS = "adapter_model.safetensors"  # never a pickle: unpickling can run code
CONFIG = "adapter_config.json"
BIN = ".bin"  # deleted adapters, until their deletion can no longer be undone


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
    description: str = ""

    def write(self, folder: Path) -> None:
        (folder / CARD).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def renamed(self, preference: str, method: str) -> "AdapterCard":
        return replace(self, preference=preference, method=method)

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
    def key(self) -> str:
        """Tells adapters of one name but of different owners apart."""
        return f"{self.name}-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]}"

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the weights file."""
        return hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()


@dataclass(frozen=True, slots=True)
class Mix:
    """A policy of several adapters at once, each with its weight: θ = θ_base + Σ wᵢ·AᵢBᵢ."""

    parts: tuple[tuple[Adapter, float], ...]


def flush(folder: Path) -> None:
    """Have the folder's files on the disk itself, so that a rename never comes before what it names."""
    for path in [*(path for path in folder.rglob("*") if path.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def adapter_name(preference: str, method: str) -> str:
    return f"{preference}-{method}"


class AdapterStore:
    """The adapters of one base: `<root>/<base>/<preference>-<method>/`.

    What lies in the folder `shared` of the same shape can be seen and used as well; an adapter of the
    store's own goes before a shared one of the same name.
    """

    def __init__(self, root: Path, base_name: str, base_fingerprint: str, shared: Path | None = None):
        self.root = root
        self.folder = root / base_name
        self.shared = shared / base_name if shared else None
        self.base_name = base_name
        self.base_fingerprint = base_fingerprint

    def of(self, root: Path) -> "AdapterStore":
        """The store of another owner, to whom this one's adapters are shared."""
        return AdapterStore(root, self.base_name, self.base_fingerprint, shared=self.root)

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

    def named(self, name: str) -> Adapter:
        """The adapter `<preference>-<method>`; a `BapoError` where there is none."""
        found = next((adapter for adapter in self.adapters() if adapter.folder.name == name), None)
        if found is None:
            raise BapoError(f"There is no adapter {name!r}; there are {', '.join(a.name for a in self.adapters())}.")
        return found

    def owns(self, adapter: Adapter) -> bool:
        """Whether the adapter is the store's own, and not one that is shared with it."""
        return adapter.folder.parent == self.folder

    def rename(self, adapter: Adapter, preference: str) -> Adapter:
        """Give an adapter of the store's own another name."""
        self._require_own(adapter)
        target = self.place(preference, adapter.card.method)
        if target.exists():
            raise BapoError(f"There is an adapter {target.name} already. Choose another name.")
        scratch = self.scratch(target)
        shutil.copytree(adapter.folder, scratch, dirs_exist_ok=True)
        self.install(scratch, adapter.card.renamed(preference, adapter.card.method))
        shutil.rmtree(adapter.folder)
        return self.named(target.name)

    def publish(self, adapter: Adapter, shared: "AdapterStore") -> Adapter:
        """Move an adapter of the store's own to where everyone sees it."""
        self._require_own(adapter)
        target = shared.place(adapter.card.preference, adapter.card.method)
        if target.exists():
            raise BapoError(f"There is a shared adapter {target.name} already. Rename yours first.")
        scratch = shared.scratch(target)
        shutil.copytree(adapter.folder, scratch, dirs_exist_ok=True)
        shared.install(scratch, adapter.card)
        shutil.rmtree(adapter.folder)
        return shared.named(target.name)

    def remove(self, adapter: Adapter) -> str:
        """Put an adapter of the store's own into the bin; returns what `restore` needs."""
        self._require_own(adapter)
        held = f"{time.time_ns()}-{adapter.folder.name}"
        (self.folder / BIN).mkdir(exist_ok=True)
        adapter.folder.rename(self.folder / BIN / held)
        return held

    def restore(self, held: str) -> Adapter:
        """Take an adapter out of the bin again."""
        found = next((path for path in (self.folder / BIN).glob("*") if path.name == held), None)
        if found is None:
            raise BapoError("It is not in the bin any more.")
        target = self.folder / held.split("-", 1)[1]
        if target.exists():
            raise BapoError(f"There is another adapter {target.name} by now. Rename that one first.")
        found.rename(target)
        return self.named(target.name)

    def empty_bin(self, older_than_seconds: float = 0.0) -> None:
        """Remove for good what was put into the bin long enough ago."""
        for path in (self.folder / BIN).glob("*"):
            if time.time_ns() - int(path.name.split("-", 1)[0]) >= older_than_seconds * 10**9:
                shutil.rmtree(path, ignore_errors=True)

    def _require_own(self, adapter: Adapter) -> None:
        if not self.owns(adapter):
            raise BapoError(f"{adapter.name} belongs to everyone here: only the operator may change it.")

    def place(self, preference: str, method: str) -> Path:
        """The folder an adapter of this name lives in, there or not."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", preference):
            raise BapoError(f"A preference is named with letters, digits, '-' and '_' alone, not {preference!r}.")
        return self.folder / adapter_name(preference, method)

    def scratch(self, target: Path) -> Path:
        """An empty, hidden folder beside `target`, to be filled and then given to `install`."""
        folder = target.with_name(f".{target.name}.new")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def clear_scratch(self, preference: str, method: str) -> None:
        """Undo what a process left behind that died while it installed an adapter of this name."""
        target = self.place(preference, method)
        former = target.with_name(f".{target.name}.former")
        if former.is_dir() and not target.exists():
            former.rename(target)  # it died between the two renames of `install`
        for folder in (former, target.with_name(f".{target.name}.new")):
            shutil.rmtree(folder, ignore_errors=True)

    def install(self, scratch: Path, card: AdapterCard) -> Path:
        """Move a finished adapter folder into place in one rename; an earlier one of that name makes room first."""
        card.write(scratch)
        if isinstance(fault := self._inspect(scratch), str):
            raise BapoError(f"The adapter was not installed: {fault}.")
        target = self.place(card.preference, card.method)
        target.parent.mkdir(parents=True, exist_ok=True)
        flush(scratch)
        if target.exists():
            former = target.with_name(f".{target.name}.former")
            shutil.rmtree(former, ignore_errors=True)
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
        found: dict[str, Path] = {}
        for folder in (self.shared, self.folder):
            if folder and folder.is_dir():
                found |= {path.name: path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
        yield from (found[name] for name in sorted(found))
