"""Every knob of the app, from the environment, in one dataclass."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from bapo.errors import BapoError

REPOSITORY = Path(__file__).resolve().parent.parent


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bapo"


def _user_data() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bapo"


HUGGING_FACE = "huggingface"  # as `sign_in`: whoever has an account there
PATHS = ("cache", "adapters", "data")
SWITCHES = ("exact", "publishing")
COUNTS = (
    *("port", "max_prompt_tokens", "max_new_tokens", "adapter_memory_mb"),
    *("max_upload_mb", "max_pairs", "max_steps", "max_jobs", "max_data_gb"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may change. Paths are folders, counts are whole numbers.

    `base` is a preset, a hub id or a local folder; `None` chooses by the machine
    (see `bapo.inference.base.default_preset`). `precision` concerns CUDA alone; `exact` keeps a CPU from
    decoding with rounded weights. `adapter_memory_mb` is for adapters used lately. `cache` may be deleted at any
    time; `data` holds what users made: jobs, their pairs and their adapters. `max_pairs` and `max_steps` limit
    one job, `max_jobs` what one user may have waiting or running, `max_data_gb` what all jobs may take on the
    disk. `sign_in` is "huggingface" on a Space, or lists users who must give a password, as
    name:password,name:password. `publishing` lets visitors share their adapters with all others.
    """

    base: str | None = None
    cache: Path = field(default_factory=_user_cache)
    adapters: Path = REPOSITORY / "adapters"
    precision: str = "nf4"
    host: str = "127.0.0.1"
    port: int = 7860
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 512
    adapter_memory_mb: int = 512
    exact: bool = False
    data: Path = field(default_factory=_user_data)
    max_upload_mb: int = 32
    max_pairs: int = 20_000
    max_steps: int = 5_000
    max_jobs: int = 3
    max_data_gb: int = 20
    sign_in: str = ""
    publishing: bool = False

    def __post_init__(self) -> None:
        if self.precision not in ("nf4", "bf16"):
            raise BapoError(f"BAPO_PRECISION is {self.precision!r}; it must be 'nf4' or 'bf16'.")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise BapoError(f"BAPO_{name.upper()} must be 1 or more, not {getattr(self, name)}.")
        if self.sign_in not in ("", HUGGING_FACE) and not all(map(all, self.users)):
            raise BapoError("BAPO_SIGN_IN must be 'huggingface' or a list such as ann:secret,bob:secret.")
        if self.port > 65535:
            raise BapoError(f"BAPO_PORT must be 65535 or less, not {self.port}.")

    @property
    def users(self) -> list[tuple[str, str]]:
        """(name, password) of everyone who may sign in; empty where no password is asked for."""
        if self.sign_in in ("", HUGGING_FACE):
            return []
        parts = (user.partition(":") for user in self.sign_in.split(","))
        return [(name.strip(), password) for name, _, password in parts]

    @classmethod
    def from_environment(cls) -> "Settings":
        """Read `BAPO_BASE`, `BAPO_CACHE`, `BAPO_ADAPTERS`, … ; what is unset keeps its default."""
        given = {name: os.environ.get(f"BAPO_{name.upper()}") for name in cls.__dataclass_fields__}
        # A Space sets gradio's own variables to be reached from outside.
        given["host"] = given["host"] or os.environ.get("GRADIO_SERVER_NAME")
        given["port"] = given["port"] or os.environ.get("GRADIO_SERVER_PORT")
        values: dict = {name: value for name, value in given.items() if value}
        for name in PATHS:
            if name in values:
                values[name] = Path(values[name]).expanduser()
        for name in SWITCHES:
            if name in values:
                values[name] = values[name].lower() in ("1", "true", "yes", "on")
        for name in COUNTS:
            if name in values:
                try:
                    values[name] = int(values[name])
                except ValueError:
                    raise BapoError(f"BAPO_{name.upper()} is {values[name]!r}; it must be a whole number.") from None
        return cls(**values)

    def as_environment(self) -> dict[str, str]:
        """The environment in which `from_environment` gives these settings: for child processes."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {f"BAPO_{name.upper()}": str(value) for name, value in values.items() if value not in (None, "")}
