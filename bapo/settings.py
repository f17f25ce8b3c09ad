"""Every knob of the app, from the environment, in one dataclass."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from bapo.errors import BapoError

REPOSITORY = Path(__file__).resolve().parent.parent


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bapo"


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may change. Paths are folders, counts are whole numbers.

    `base` is a preset, a hub id or a local folder; `None` chooses by the machine
    (see `bapo.inference.base.default_preset`). `precision` concerns CUDA alone.
    """

    base: str | None = None
    cache: Path = field(default_factory=_user_cache)
    adapters: Path = REPOSITORY / "adapters"
    precision: str = "nf4"
    host: str = "127.0.0.1"
    port: int = 7860
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 512
    resident_adapters: int = 8

    def __post_init__(self) -> None:
        if self.precision not in ("nf4", "bf16"):
            raise BapoError(f"BAPO_PRECISION is {self.precision!r}; it must be 'nf4' or 'bf16'.")
        for name in ("port", "max_prompt_tokens", "max_new_tokens", "resident_adapters"):
            if getattr(self, name) < 1:
                raise BapoError(f"BAPO_{name.upper()} must be 1 or more, not {getattr(self, name)}.")
        if self.port > 65535:
            raise BapoError(f"BAPO_PORT must be 65535 or less, not {self.port}.")

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read `BAPO_BASE`, `BAPO_CACHE`, `BAPO_ADAPTERS`, … ; what is unset keeps its default."""
        given = {name: os.environ.get(f"BAPO_{name.upper()}") for name in cls.__dataclass_fields__}
        # A Space sets gradio's own variables to be reached from outside.
        given["host"] = given["host"] or os.environ.get("GRADIO_SERVER_NAME")
        given["port"] = given["port"] or os.environ.get("GRADIO_SERVER_PORT")
        values: dict = {name: value for name, value in given.items() if value}
        for name in ("cache", "adapters"):
            if name in values:
                values[name] = Path(values[name]).expanduser()
        for name in ("port", "max_prompt_tokens", "max_new_tokens", "resident_adapters"):
            if name in values:
                try:
                    values[name] = int(values[name])
                except ValueError:
                    raise BapoError(f"BAPO_{name.upper()} is {values[name]!r}; it must be a whole number.") from None
        return cls(**values)
