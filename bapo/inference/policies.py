"""The base with its resident adapters: batches in which every row has a policy of its own."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bapo.adapters import Adapter, Mix
from bapo.errors import BapoError
from bapo.inference.base import Base
from bapo.inference.decoder_step import DecoderStep
from bapo.inference.graph_step import GraphStep
from bapo.inference.kernels import compile_kernels
from bapo.inference.lora_weights import LoraWeights, read_lora
from bapo.inference.mixed_lora import MixedModel, RowWeights
from bapo.inference.openings import Openings, States, fill
from bapo.inference.products import choose_ways
from bapo.inference.roomy_cache import roomy_cache
from bapo.inference.tree_kernels import compile_tree_kernels

Policy = Adapter | Mix | None  # None is the base


class Policies:
    """Holds the model and the adapters used last, up to `memory` bytes; the least recently used leaves first.

    The base's linear layers are replaced in place by layers that hold its very weights: these are neither
    changed nor copied, and a row without an adapter is the base itself. Unless `exact`, decoding on a CPU
    may read the weights as 16-bit integers (`bapo.inference.products`).
    """

    def __init__(self, base: Base, memory: int, cache: Path, exact: bool = False):
        self.base = base
        self.memory = memory
        self._model = MixedModel.of(base.model)
        self.openings = Openings(base, cache)
        self._resident: OrderedDict[str, tuple[Adapter, LoraWeights]] = OrderedDict()
        products = self._model.products
        rounded = 2 * sum(product.weight.numel() for product in products)
        choose_ways(products, cache, compact=not exact and 2 * rounded < psutil.virtual_memory().available)
        self._step = DecoderStep.of(base.model) or GraphStep.of(base.model)
        if isinstance(self._step, DecoderStep):
            compile_kernels()
        if base.model.device.type == "cpu":
            compile_tree_kernels()
        self.compact = any(product.is_compact for product in products)

    @property
    def resident(self) -> list[str]:
        """Names of the adapters in memory, least recently used first."""
        return [adapter.name for adapter, _ in self._resident.values()]

    def require(self, policies: Iterable[Policy]) -> None:
        """Load what is not in memory yet. One call's adapters stay, even beyond the limit."""
        wanted = {adapter.key: adapter for policy in policies for adapter, _ in _parts(policy)}
        for key, adapter in wanted.items():
            held = self._resident.get(key)
            if held is None or held[0] != adapter:  # new, or trained again since
                self._resident[key] = adapter, self._load(adapter)
            self._resident.move_to_end(key)
        sizes = {key: weights.bytes for key, (_, weights) in self._resident.items()}
        for key in [key for key in self._resident if key not in wanted]:
            if sum(sizes.values()) <= self.memory:
                break
            del self._resident[key], sizes[key]

    def gather(self, policies: Sequence[Policy]) -> RowWeights:
        """The matrices of rows under these policies, loading what is not in memory; they outlive its eviction."""
        self.require(policies)
        return self._model.gather(
            [[(self._resident[adapter.key][1], weight) for adapter, weight in _parts(policy)] for policy in policies]
        )

    def forward(self, rows: RowWeights, exact: bool = True, **inputs):
        """One forward pass; row i runs under the i-th of the gathered policies."""
        with self._model.mixed(rows, exact):
            return self.base.model(**inputs)

    def step(
        self, rows: RowWeights, exact: bool, token_ids: Tensor, cache: Cache, leaders: Sequence[int] | None = None
    ) -> Tensor:
        """One token of every row, [rows]: logits of the next, [rows, vocabulary]. Extends the cache of `prefill`.

        `leaders` names for every row one (itself, say) that has been given the same prompt and tokens so far:
        before the first adapted layer the two are computed once.
        """
        if self._step and self._step.takes(cache):
            with self._model.mixed(rows, exact):
                return self._step(token_ids, cache, rows, exact, leaders)
        return self.forward(rows, exact, input_ids=token_ids[:, None], past_key_values=cache).logits[:, -1]

    def prefill(
        self, policies: Sequence[Policy], prompt_ids: Sequence[int], new: int
    ) -> tuple[RowWeights, Tensor, Cache]:
        """Run a prompt under different policies: their matrices, logits of the next token, [policies, vocabulary], and
        the cache, which will take at most so many `new` tokens.

        The layers before the first adapted one are run once: there all rows are the base's. And the opening of the
        chat template is run once for all prompts.
        """
        rows = self.gather(policies)
        cache = roomy_cache(self.base.model, len(prompt_ids) + new)
        shared = self._model.first_adapted(rows) if len(policies) > 1 else 0
        if known := self.openings.start(prompt_ids, cache):
            fill(cache, [self._opening(policy) for policy in policies], shared)
        copies = self._model.one_row_until(shared, len(policies)) if shared else nullcontext()
        copied = [prompt_ids[known:]] * (1 if shared else len(policies))
        prompt = torch.tensor(copied, device=self.base.model.device)
        with copies:
            output = self.forward(rows, input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for layer in cache.layers[:shared]:
            layer.batch_repeat_interleave(len(policies))
        return rows, output.logits[:, -1], cache

    def _opening(self, policy: Policy) -> States:
        def compute() -> Cache:
            ids = self.openings.token_ids
            cache, prompt = roomy_cache(self.base.model, len(ids)), torch.tensor([ids])
            self.forward(self.gather([policy]), input_ids=prompt, past_key_values=cache, logits_to_keep=1)
            return cache

        return self.openings.of(_parts(policy), compute)

    def _load(self, adapter: Adapter) -> LoraWeights:
        dtype = torch.promote_types(self.base.model.dtype, torch.float32)  # as PEFT: adapters are never narrower
        remedy = f"Remove {adapter.folder.name} and train it again."
        try:
            weights = read_lora(adapter.folder, dtype, self.base.model.device)
        except BapoError as error:
            raise BapoError(f"The adapter {adapter.name} cannot be loaded: {error} {remedy}") from error
        if missing := self._model.missing(weights):
            raise BapoError(
                f"The adapter {adapter.name} does not fit the base: it changes {missing[0]}, which is no linear layer "
                f"of the decoder, or not of that shape. {remedy}"
            )
        return weights


def _parts(policy: Policy) -> Sequence[tuple[Adapter, float]]:
    if policy is None:
        return ()
    return policy.parts if isinstance(policy, Mix) else ((policy, 1.0),)
