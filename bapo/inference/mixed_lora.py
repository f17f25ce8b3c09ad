"""Linear layers for a batch in which every row has an adapter of its own, a mix of adapters, or none.

Row i of y = x Wᵀ + (x Aᵢᵀ) Bᵢ: the base's product is one for all rows, and the policies' matrices are
gathered once per request, not per step. A mix Σ wⱼ AⱼᵀBⱼ is a policy with the ranks below each other. Layers that
read the same input (query, key and value; gate and up) are one layer with one product.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bapo.inference.lora_weights import LoraWeights
from bapo.inference.norms import fuse_norms
from bapo.inference.products import Lora, Product, add_lora

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

Weighted = Sequence[tuple[LoraWeights, float]]  # a row's adapters with their weights in the mix; none is the base


@dataclass(slots=True)
class RowWeights:
    """Every layer's matrices for the rows of a batch; None where no row has any."""

    layers: list[Lora | None]

    def select(self, rows: Sequence[int]) -> "RowWeights":
        """The same for some of the rows, in this order; a row may come several times. Copies no matrix."""
        return RowWeights([lora and lora._replace(places=lora.places[rows]) for lora in self.layers])


@dataclass(slots=True)
class _Pass:
    """What the layers of a model must know of the pass that is running."""

    rows: RowWeights | None = None
    exact: bool = True


@dataclass(slots=True)
class _Held:
    """What was computed for layers that have not asked for it yet."""

    input: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()


class MixedLinear(nn.Module):
    """Takes the place of one linear layer, or of several with the same input; then it stands at the first one's.

    `parts` lists (module name, first column, last column + 1); `depth` is the number of its transformer layer.
    """

    def __init__(self, index: int, names: Sequence[str], linears: Sequence[nn.Linear], state: _Pass):
        super().__init__()
        self.index = index
        self.parts: list[tuple[str, int, int]] = []
        self.in_features = linears[0].in_features
        self.out_features = 0
        for name, linear in zip(names, linears, strict=True):
            self.parts.append((name, self.out_features, self.out_features + linear.out_features))
            self.out_features += linear.out_features
        self.linears = nn.ModuleList(linears)
        depth = re.search(r"\blayers\.(\d+)\.", names[0])
        self.depth = int(depth[1]) if depth else 0
        self.product = Product(*_joined(linears)) if type(linears[0]) is nn.Linear else None
        self._state = state
        self._widths = [stop - start for _, start, stop in self.parts]
        self._held = _Held()

    @property
    def weight(self) -> Tensor:
        return cast(nn.Linear, self.linears[0]).weight

    @property
    def bias(self) -> Tensor | None:
        return cast(nn.Linear, self.linears[0]).bias

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, 0)

    def part(self, x: Tensor, place: int) -> Tensor:
        """The columns of one of the layers; all are computed when the first is asked for."""
        last = len(self.parts) - 1
        if last == 0:
            return self.joined(x)
        held = self._held
        if x is not held.input:
            held.input, held.outputs = x, self.joined(x).split(self._widths, -1)
        output = held.outputs[place]
        if place == last:
            held.input, held.outputs = None, ()
        return output

    def joined(self, x: Tensor) -> Tensor:
        """The columns of all the layers."""
        state = self._state
        lora = state.rows.layers[self.index] if state.rows else None
        if self.product is None:
            return add_lora(self.linears[0](x), x, lora)
        return self.product(x, lora, state.exact)


class Follower(nn.Module):
    """Stands where a layer was that shares its input with an earlier one."""

    def __init__(self, leader: MixedLinear, place: int):
        super().__init__()
        self._leader = (leader,)  # in a tuple, so that it is not registered a second time
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        return self._leader[0].part(x, self._place)


class MixedModel:
    """A causal language model whose linear layers are mixed. Called without `mixed` it is the base as it was."""

    _known: ClassVar["WeakKeyDictionary[PreTrainedModel, MixedModel]"] = WeakKeyDictionary()

    def __init__(self, model: PreTrainedModel):
        self.layers: list[MixedLinear] = []
        self._state = _Pass()
        self._decoder_layers = getattr(model.get_decoder(), "layers", ())
        for path, parent in list(model.named_modules()):
            for names in _groups(parent):
                linears = [getattr(parent, name) for name in names]
                full = [f"{path}.{name}" if path else name for name in names]
                leader = MixedLinear(len(self.layers), full, linears, self._state)
                self.layers.append(leader)
                for place, name in enumerate(names):
                    setattr(parent, name, Follower(leader, place) if place else leader)
        self._head = model.get_output_embeddings()
        fuse_norms(model)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "MixedModel":
        """The model with its linear layers replaced, once. Its weights stay the very tensors they are."""
        if model not in cls._known:
            cls._known[model] = cls(model)
        return cls._known[model]

    @classmethod
    def knows(cls, model: PreTrainedModel) -> bool:
        """Whether the model's layers were replaced."""
        return model in cls._known

    @property
    def products(self) -> list[Product]:
        """Those of the layers whose weight is a plain matrix."""
        return [layer.product for layer in self.layers if layer.product]

    @contextmanager
    def mixed(self, rows: RowWeights | None, exact: bool) -> Iterator[None]:
        """Passes inside run row i under `rows`' i-th adapter; with `exact` false, few rows meet rounded weights."""
        self._state.rows, self._state.exact = rows, exact
        try:
            yield
        finally:
            self._state.rows, self._state.exact = None, True

    @contextmanager
    def one_row_until(self, first: int, rows: int) -> Iterator[None]:
        """Passes inside are given one row, which becomes `rows` equal ones before the layer `first`."""

        def repeat(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return inputs[0].expand(rows, -1, -1), *inputs[1:]

        hook = self._decoder_layers[first].register_forward_pre_hook(repeat)
        try:
            yield
        finally:
            hook.remove()

    def first_adapted(self, rows: RowWeights) -> int:
        """The first transformer layer in which any row has an adapter; before it all rows of a prompt are one."""
        adapted = [layer.depth for layer in self.layers if rows.layers[layer.index] is not None]
        return min(adapted, default=0)

    def missing(self, lora: LoraWeights) -> list[str]:
        """Modules of an adapter that are no linear layers of the decoder, or not in the adapter's shape.

        The vocabulary projection is none of them: scoring takes it apart (`bapo.inference.token_logps`).
        """
        shapes = {
            name: (layer.in_features, stop - start)
            for layer in self.layers
            if layer is not self._head
            for name, start, stop in layer.parts
        }
        return [name for name, (a, b) in lora.matrices.items() if shapes.get(name) != (a.shape[1], b.shape[1])]

    def gather(self, rows: Sequence[Weighted]) -> RowWeights:
        """Every layer's matrices for these rows."""
        return RowWeights([_stack(layer, rows) for layer in self.layers])


def _stack(layer: MixedLinear, rows: Sequence[Weighted]) -> Lora | None:
    found = [
        [(*lora.matrices[name], weight, start) for lora, weight in row for name, start, _ in layer.parts
         if name in lora.matrices]
        for row in rows
    ]  # fmt: skip
    adapted = [row for row in found if row]
    if not adapted:
        return None
    rank = max(sum(len(a) for a, *_ in row) for row in adapted)
    like = adapted[0][0][0]
    stacked = Lora(
        like.new_zeros(len(adapted), rank, layer.in_features),
        like.new_zeros(len(adapted), rank, layer.out_features),
        np.zeros((len(adapted), rank, 2), np.int64),
        np.full(len(rows), -1),
    )
    stacked.places[[place for place, row in enumerate(found) if row]] = range(len(adapted))
    for place, row in enumerate(adapted):
        first = 0
        for a, b, weight, start in row:
            last = first + len(a)
            stacked.a[place, first:last] = a
            stacked.b[place, first:last, start : start + b.shape[1]] = b * weight
            stacked.spans[place, first:last] = start, start + b.shape[1]
            first = last
    return stacked


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of the children that are linear layers, those that share their input together."""
    linears = {name: child for name, child in parent.named_children() if isinstance(child, nn.Linear)}
    for names in SHARED_INPUT:
        kinds = {(type(linears.get(name)), getattr(linears.get(name), "bias", None) is None) for name in names}
        if kinds in ({(nn.Linear, True)}, {(nn.Linear, False)}):
            for name in names:
                del linears[name]
            yield names
    for name in linears:
        yield (name,)


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the layers, joined; the layers' own become views of these, so that nothing is held twice."""
    if len(linears) == 1:
        return linears[0].weight.detach(), None if linears[0].bias is None else linears[0].bias.detach()
    weight = torch.cat([linear.weight.detach() for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias.detach() for linear in linears])
    first = 0
    for linear in linears:
        last = first + linear.out_features
        linear.weight.data = weight[first:last]
        if bias is not None:
            linear.bias.data = bias[first:last]
        first = last
    return weight, bias
