"""Keys and values of decoded rows, in buffers with room: a step writes one position and copies nothing."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256  # positions added when a buffer is full


def _states(place: int) -> Any:
    """The states that the library knows, made when they are asked for: a step by kernels has no use for them."""

    def read(layer: "RoomyLayer") -> Tensor | None:
        buffer = layer.buffers[place]
        return None if buffer is None else buffer[:, :, : layer.seen]

    def write(layer: "RoomyLayer", states: Tensor | None) -> None:
        layer.buffers[place] = states
        layer.seen = 0 if states is None else states.shape[2]

    return property(read, write)


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, positions, width]: so many positions as are `seen` of two buffers."""

    keys = _states(0)
    values = _states(1)

    def __init__(self) -> None:
        self.buffers: list[Any] = [None, None]
        self.seen = 0
        super().__init__()

    def get_seq_length(self) -> int:
        return self.seen

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = self.seen
        self._extend(key_states.shape[2])
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, first : self.seen] = states
        return self.keys, self.values

    def append_one(self) -> list[Tensor]:
        """Make a position of what is to be written next, and return the buffers to write it into."""
        self._extend(1)
        return self.buffers

    @property
    def room(self) -> int:
        """Positions that can be appended before the buffers are others."""
        return self.buffers[0].shape[2] - self.seen

    def _extend(self, added: int) -> None:
        if self.room < added:
            rows, heads, _, width = self.buffers[0].shape
            shape = (rows, heads, self.seen + added + ROOM, width)
            for place, former in enumerate((self.keys, self.values)):
                # Zeros, because a graph reads, under a mask, what is not written yet.
                self.buffers[place] = former.new_zeros(shape)
                self.buffers[place][:, :, : self.seen] = former
        self.seen += added


def roomy_cache(model: PreTrainedModel, positions: int) -> Cache:
    """An empty cache for so many positions; layers that attend to all of them are roomy, others the library's."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if _sees_all(layer, positions) else layer for layer in cache.layers]
    return cache


def _sees_all(layer: CacheLayerMixin, positions: int) -> bool:
    sliding = type(layer) is DynamicSlidingWindowLayer and positions <= layer.sliding_window
    return type(layer) is DynamicLayer or sliding
