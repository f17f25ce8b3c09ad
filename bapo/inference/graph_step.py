"""One token of every row on CUDA as one recorded graph: launching kernels takes longer than running them on few rows.

A graph repeats the same kernels on the same addresses, so a step is recorded once for a cache's buffers and
its rows, with the token ids and the position in tensors that every step overwrites. Attention sees the whole
buffers under a mask, because a graph's shapes do not grow.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from bapo.inference.mixed_lora import RowWeights
from bapo.inference.roomy_cache import RoomyLayer

logger = logging.getLogger(__name__)

Run = Callable[[], Tensor]
LIKENESS = 0.05  # of the largest logit: what bfloat16 and another attention kernel may change


class _Recorded(NamedTuple):
    """A step that can be repeated, and what it reads: a graph knows addresses and keeps nothing alive."""

    rows: RowWeights
    token_ids: Tensor
    position: Tensor
    run: Run
    replay: Run

    def step(self, token_ids: Tensor, position: int) -> Tensor:
        self.token_ids.copy_(token_ids)
        self.position.fill_(position)
        return self.replay()


class GraphStep:
    """The step of a model on CUDA; made by `of`. The first step of a cache, and after every change of its rows or
    buffers, is the model's own, and is compared with what was recorded of it."""

    def __init__(self, model: PreTrainedModel, record: Callable[[Run], Run]):
        self._model, self._record = model, record
        self._recorded: WeakKeyDictionary[Cache, _Recorded] = WeakKeyDictionary()
        self._trusted = True

    @classmethod
    def of(cls, model: PreTrainedModel) -> "GraphStep | None":
        """None where the model is not on CUDA."""
        return cls(model, cuda_graph) if model.device.type == "cuda" else None

    def takes(self, cache: Cache) -> bool:
        """Whether every layer attends to all that came before, and no recording went wrong."""
        return self._trusted and all(isinstance(layer, RoomyLayer) for layer in cache.layers)

    def __call__(
        self, token_ids: Tensor, cache: Cache, rows: RowWeights, exact: bool, leaders: Sequence[int] | None = None
    ) -> Tensor:
        """As `DecoderStep`; nothing is rounded here and all rows are computed."""
        recorded = self._recorded.get(cache)
        if recorded is None or recorded.rows is not rows or not all(layer.room for layer in cache.layers):
            logits = self._model(input_ids=token_ids[:, None], past_key_values=cache).logits[:, -1]
            self._recorded.pop(cache, None)
            if problem := self._prepare(token_ids, cache, rows, logits):
                self._trusted = False
                logger.warning("decoding goes on without CUDA graphs: %s", problem)
            return logits
        position = cache.get_seq_length()
        for layer in cache.layers:
            layer.append_one()
        return recorded.step(token_ids, position)

    def _prepare(self, token_ids: Tensor, cache: Cache, rows: RowWeights, expected: Tensor) -> str:
        """Record the step just done and repeat it, which writes what is there already; says what went wrong."""
        position = cache.get_seq_length() - 1
        ids, place = token_ids.clone(), torch.tensor([position], device=token_ids.device)
        whole = _WholeBuffers([tuple(layer.buffers) for layer in cache.layers], place)
        positions = torch.arange(whole.positions, device=place.device)

        def run() -> Tensor:
            visible = (positions <= place).expand(len(ids), 1, 1, -1)
            inputs = {"input_ids": ids[:, None], "position_ids": place[None].expand(len(ids), 1)}
            return self._model(**inputs, attention_mask=visible, past_key_values=whole).logits[:, -1]

        try:
            recorded = _Recorded(rows, ids, place, run, self._record(run))
            found = recorded.step(token_ids, position)
        except RuntimeError as error:  # torch's for whatever cannot be recorded
            return str(error)
        if not (found - expected).abs().max() <= LIKENESS * expected.abs().max():
            return "a recorded step gave other logits than the model"
        self._recorded[cache] = recorded
        return ""


class _WholeBuffers(Cache):
    """The buffers of a roomy cache as the model sees them in a graph: written at a position that is a tensor."""

    def __init__(self, buffers: Sequence[Sequence[Tensor]], position: Tensor):
        super().__init__(layers=[])
        self._buffers, self._position = buffers, position

    @property
    def positions(self) -> int:
        return self._buffers[0][0].shape[2]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        keys, values = self._buffers[layer_idx]
        return keys.index_copy_(2, self._position, key_states), values.index_copy_(2, self._position, value_states)


def cuda_graph(run: Run) -> Run:
    """Record `run` and return what repeats it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # what libraries set up on first use cannot be recorded
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another thread may use the device meanwhile: only this one's mistakes end the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = run()

    def replay() -> Tensor:
        graph.replay()
        return logits.clone()

    return replay
