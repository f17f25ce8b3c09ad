"""Keys and values of decoded rows, in buffers with room: a step writes one position and copies nothing."""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

ROOM = 256  # positions added when a buffer is full


class RoomyLayer(DynamicLayer):
    """One layer's keys and values, [rows, heads, positions, width]: views of buffers with more positions."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, width = key_states.shape
            self.keys, self.values = (key_states.new_empty(rows, heads, 0, width) for _ in range(2))
            self.buffers = [self.keys, self.values]
        seen = self.get_seq_length()
        self._extend(key_states.shape[-2])
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, seen : self.get_seq_length()] = states
        return self.keys, self.values

    def append_one(self) -> list[Tensor]:
        """Make a position of what is to be written next, and return the buffers to write it into."""
        self._extend(1)
        return self.buffers

    @property
    def room(self) -> int:
        """Positions that can be appended before the buffers are others."""
        return self.buffers[0].shape[2] - self.get_seq_length()

    def _extend(self, added: int) -> None:
        seen = self.keys.shape[-2]
        if self.room < added:
            rows, heads, _, width = self.keys.shape
            shape = (rows, heads, seen + added + ROOM, width)
            for place, former in enumerate((self.keys, self.values)):
                # Zeros, because a graph reads, under a mask, what is not written yet.
                self.buffers[place] = former.new_zeros(shape)
                self.buffers[place][:, :, :seen] = former
        self.keys, self.values = (buffer[:, :, : seen + added] for buffer in self.buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = [self.keys, self.values]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.buffers = [self.keys, self.values]


def roomy_cache(model: PreTrainedModel, positions: int) -> Cache:
    """An empty cache for so many positions; layers that attend to all of them are roomy, others the library's."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if _sees_all(layer, positions) else layer for layer in cache.layers]
    return cache


def _sees_all(layer: CacheLayerMixin, positions: int) -> bool:
    sliding = type(layer) is DynamicSlidingWindowLayer and positions <= layer.sliding_window
    return type(layer) is DynamicLayer or sliding
