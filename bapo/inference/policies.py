"""The base with its resident adapters: batches in which every row has a policy of its own."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from safetensors import SafetensorError

from bapo.adapters import Adapter
from bapo.errors import BapoError
from bapo.inference.base import Base

PEFT_BASE = "__base__"  # PEFT's name for "no adapter" in a mixed batch


class Policies:
    """Holds the model and at most `limit` adapters; the least recently used leaves first.

    PEFT wraps the base's linear layers in place: the base's weights are neither changed nor copied,
    and a row without an adapter is the base itself.
    """

    def __init__(self, base: Base, limit: int):
        self.base = base
        self.limit = limit
        self._model: PeftModel | None = None
        self._resident: OrderedDict[str, Adapter] = OrderedDict()

    @property
    def resident(self) -> list[str]:
        """Names of the adapters in memory, least recently used first."""
        return [adapter.name for adapter in self._resident.values()]

    def require(self, adapters: Iterable[Adapter | None]) -> None:
        """Load what is not in memory yet; None is the base. One call's adapters stay, even beyond the limit."""
        wanted = {adapter.key: adapter for adapter in adapters if adapter}
        for key, adapter in wanted.items():
            if self._resident.get(key) != adapter:  # new, or trained again since
                self._load(adapter)
            self._resident.move_to_end(key)
        while len(self._resident) > max(self.limit, len(wanted)):
            self._drop(next(iter(self._resident)))

    def forward(self, keys: Sequence[str | None], **inputs):
        """One forward pass; row i runs under the adapter with the key `keys[i]`, or as the base where it is None."""
        if self._model is None:
            return self.base.model(**inputs)
        return self._model(adapter_names=[key or PEFT_BASE for key in keys], **inputs)

    @contextmanager
    def base_alone(self) -> Iterator[Base]:
        """The plain base, for code that knows nothing of adapters."""
        if self._model is None:
            yield self.base
        else:
            with self._model.disable_adapter():
                yield self.base

    def _load(self, adapter: Adapter) -> None:
        device = str(self.base.model.device)
        try:
            if self._model is None:
                self._model = PeftModel.from_pretrained(
                    self.base.model, adapter.folder, adapter_name=adapter.key, torch_device=device
                )
            else:
                self._drop(adapter.key)
                self._model.load_adapter(adapter.folder, adapter_name=adapter.key, torch_device=device)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            self._drop(adapter.key)
            raise BapoError(
                f"The adapter {adapter.name} cannot be loaded: its files are damaged or do not fit the base. "
                f"Remove {adapter.folder.name} and train it again."
            ) from error
        self._model.eval()
        self._resident[adapter.key] = adapter

    def _drop(self, key: str) -> None:
        self._resident.pop(key, None)
        if self._model is not None and key in self._model.peft_config:
            self._model.delete_adapter(key)
