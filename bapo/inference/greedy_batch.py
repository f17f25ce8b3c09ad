"""Greedy answers of the base to many prompts at once, on the CPU: one step reads every weight once for all of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from bapo.inference.decoder_step import DecoderStep
from bapo.inference.kernels import compile_kernels
from bapo.inference.mixed_lora import MixedModel
from bapo.inference.products import choose_ways
from bapo.inference.roomy_cache import roomy_cache
from bapo.inference.tree_attention import limits_of

ROWS = 32  # answered together: of more, each would cost as much
CACHE_BYTES = 2**30  # that their keys and values may take


@dataclass(slots=True)
class Answer:
    """Token ids of an answer and its log-prob, in nats: decoding has it at hand."""

    token_ids: list[int]
    logp: float


class GreedyBatch:
    """Answers of a model as the base; made by `of`."""

    _twins: ClassVar["WeakKeyDictionary[PreTrainedModel, PreTrainedModel]"] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel, step: DecoderStep):
        self._model, self._mixed, self._step = model, MixedModel.of(model), step

    @classmethod
    def of(cls, model: PreTrainedModel, positions: int, cache: Path) -> "GreedyBatch | None":
        """None where `DecoderStep` does not take the model, an adapter is in it, or its rotation changes within so
        many positions of prompt and answer."""
        adapted = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        if adapted or not DecoderStep.suits(model) or positions > (limits_of(model).rope_switch or positions):
            return None
        served = MixedModel.knows(model)
        if not served and model not in cls._twins:
            cls._twins[model] = _twin(model)
            choose_ways(MixedModel.of(cls._twins[model]).products, cache, compact=False)
            compile_kernels()
        own = model if served else cls._twins[model]
        step = DecoderStep.of(own)
        return cls(own, step) if step and step.takes(roomy_cache(own, positions)) else None

    def fitting(self, lengths: Sequence[int], max_tokens: int) -> int:
        """How many of the prompts, the shortest first, are answered together: one at least."""
        most = CACHE_BYTES // self._step.cache_bytes
        fits = (rows * (length + max_tokens) <= most for rows, length in enumerate(lengths[:ROWS], start=1))
        return max(1, sum(fits))

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_ids: frozenset[int]) -> list[Answer]:
        """The answer to every prompt (token ids), with the stop token where one was reached."""
        width = max(map(len, prompts))
        padding = torch.tensor([width - len(ids) for ids in prompts])
        input_ids = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
        places = torch.arange(width) - padding[:, None]
        cache = roomy_cache(self._model, width + max_tokens)
        logits = self._model(
            input_ids=input_ids,
            attention_mask=(places >= 0).long(),
            position_ids=places.clamp_min(0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        answers = [Answer([], 0.0) for _ in prompts]
        rows = list(range(len(prompts)))  # of the batch, each the number of its prompt
        open_ = set(rows)
        for count in range(1, max_tokens + 1):
            largest, tokens = logits.max(1)
            logps = -(logits - largest[:, None]).exp().sum(1).log()
            for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
                if row in open_:
                    answers[row].token_ids.append(token)
                    answers[row].logp += logp
                    if token in stop_ids:
                        open_.remove(row)
            if not open_ or count == max_tokens:
                break
            if 2 * len(open_) <= len(rows):  # leaving copies the cache, so rows leave many at a time
                staying = torch.tensor([place for place, row in enumerate(rows) if row in open_])
                cache.batch_select_indices(staying)
                tokens, padding, rows = tokens[staying], padding[staying], [rows[place] for place in staying]
            logits = self._step(tokens, cache, self._mixed.gather([()] * len(rows)), exact=True, padding=padding)
        return answers


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same layers over the very same weights: what replaces a layer in one is not in the other."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)
