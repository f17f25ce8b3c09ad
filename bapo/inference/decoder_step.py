"""One token of every row through a Llama-like decoder on the CPU, without transformers' graph around the layers.

With a small base, dispatching hundreds of little operations takes longer than reading all the weights.
The layers are the model's own, in the same order and with the same numbers; what is written out here is
only what lies between them: rotation, attention to the cache, residuals. Where every product takes its way in one
pass over the weight, all layers are one call of `kernels.run_layers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.cache_utils import Cache

from bapo.inference.kernels import SHARES, attend, run_layers
from bapo.inference.mixed_lora import MixedLinear, RowWeights
from bapo.inference.norms import FusedNorm
from bapo.inference.products import Product
from bapo.inference.roomy_cache import RoomyLayer

ARCHITECTURES = ("LlamaForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM")
GATES = {nn.SiLU: False, SiLUActivation: False, GELUTanh: True}  # activation → `gelu` of `kernels.gate`


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: FusedNorm
    query_key_value: MixedLinear
    out: MixedLinear
    mlp_norm: FusedNorm
    gate_up: MixedLinear
    down: MixedLinear
    activate: nn.Module
    scaling: float

    @property
    def linears(self) -> tuple[MixedLinear, ...]:
        return self.query_key_value, self.out, self.gate_up, self.down

    @property
    def products(self) -> list[Product]:
        return [linear.product for linear in self.linears if linear.product]


class _Weights(NamedTuple):
    """Weights and scales of all layers as `run_layers` takes them, and the arrays that hold them."""

    weights: np.ndarray
    scales: np.ndarray
    compact: np.ndarray
    held: list


class DecoderStep:
    """The step of a model whose linear layers are mixed; made by `of`."""

    def __init__(self, model: Any):
        decoder = model.model
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._norm = decoder.norm
        self._head = model.lm_head
        self._shapes = np.array([product.shape for product in self._layers[0].products])
        self._norms = np.array(
            [[n.array.ctypes.data for n in (one.attention_norm, one.mlp_norm)] for one in self._layers]
        )
        self._gelu = GATES.get(type(self._layers[0].activate))
        self._known: dict[tuple[int, bool], _Weights | None] = {}
        self._loras: tuple[RowWeights | None, np.ndarray, int] = None, np.empty(0), 0

    @staticmethod
    def suits(model: PreTrainedModel) -> bool:
        """Whether it is of an architecture that is written out here, in float32 on the CPU."""
        return type(model).__name__ in ARCHITECTURES and model.device.type == "cpu" and model.dtype == torch.float32

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DecoderStep | None":
        """None where the model does not suit, or not all of its layers were replaced."""
        if not cls.suits(model):
            return None
        mixed = [module for module in model.modules() if isinstance(module, MixedLinear)]
        norms = any(isinstance(module, FusedNorm) for module in model.modules())
        return cls(model) if norms and all(layer.product and layer.product.special for layer in mixed) else None

    def __call__(
        self,
        token_ids: Tensor,
        cache: Cache,
        rows: RowWeights,
        exact: bool,
        leaders: Sequence[int] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, [rows, vocabulary], after one token of every row, [rows]; extends the cache.

        A row has been fed the same tokens as the row `leaders` names for it. The cache's first positions may be
        `padding`, so many of every row, [rows]. To be called while the model's layers are told of `rows` and `exact`
        (`MixedModel.mixed`).
        """
        position = cache.get_seq_length()
        x = self._embed(token_ids)
        starts = torch.zeros_like(token_ids) if padding is None else padding
        angles = self._rotary(x[None], (position - starts)[:, None])
        cos, sin = (part.expand(len(x), -1, -1)[:, 0].contiguous().numpy() for part in angles)
        rotation = position, starts.numpy(), cos, sin
        buffers = [kept.append_one() for kept in cache.layers]
        weights = self._in_one_pass(len(x), exact)
        if weights is None:
            x = self._layer_by_layer(x, buffers, rotation)
        else:
            cache_table = np.array([(k.data_ptr(), v.data_ptr(), k.shape[2]) for k, v in buffers])
            first, heads = self._layers[0], tuple(buffers[0][0].shape[1::2])
            loras, alike = self._lora_table(rows)
            copies = _copies(alike, len(x), leaders)
            run_layers(
                *(x.numpy(), *weights[:3], self._shapes, loras, self._norms, first.mlp_norm.epsilon),
                *(cache_table, heads, rotation, first.scaling, self._gelu, copies, SHARES),
            )  # fmt: skip
        return self._head.joined(self._norm(x))

    @property
    def cache_bytes(self) -> int:
        """What one position of one row takes in the cache."""
        first = self._layers[0]
        keys_and_values = first.query_key_value.out_features - first.out.in_features
        return len(self._layers) * keys_and_values * torch.float32.itemsize

    def takes(self, cache: Cache) -> bool:
        """Whether every layer attends to all that came before."""
        return all(isinstance(layer, RoomyLayer) for layer in cache.layers)

    def _layer_by_layer(self, x: Tensor, buffers: list[list[Tensor]], rotation: tuple) -> Tensor:
        """What `run_layers` does, with each product in its own way."""
        position, starts, cos, sin = rotation
        for layer, (keys, values) in zip(self._layers, buffers, strict=True):
            states = layer.query_key_value.joined(layer.attention_norm(x)).contiguous()
            attended = torch.empty(len(x), layer.out.in_features)
            cached = keys.numpy(), values.numpy()
            attend(states.numpy(), cos, sin, *cached, position, starts, layer.scaling, attended.numpy())
            x = x + layer.out.joined(attended)
            gate, up = layer.gate_up.joined(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down.joined(layer.activate(gate) * up)
        return x

    def _in_one_pass(self, rows: int, exact: bool) -> _Weights | None:
        """What `run_layers` needs, or None where it is not what was chosen for so many rows."""
        key = rows, exact
        if key not in self._known:
            found = [[product.one_pass(rows, exact) for product in layer.products] for layer in self._layers]
            self._known[key] = None if self._gelu is None else _tables(found)
        return self._known[key]

    def _lora_table(self, rows: RowWeights) -> tuple[np.ndarray, int]:
        """`loras` of `run_layers`, made anew when the rows are others, and the first layer that has any."""
        if rows is not self._loras[0]:
            table = np.zeros((len(self._layers), 4, 6), np.int64)
            for n, layer in enumerate(self._layers):
                for part, linear in enumerate(layer.linears):
                    if lora := rows.layers[linear.index]:
                        matrices = lora.a.data_ptr(), lora.b.data_ptr()
                        table[n, part] = *matrices, lora.spans.ctypes.data, lora.places.ctypes.data, *lora.a.shape[:2]
            self._loras = rows, table, int(table.any((1, 2)).argmax())
        return self._loras[1:]


def _copies(alike: int, rows: int, leaders: Sequence[int] | None) -> tuple[int, int, np.ndarray]:
    """`copies` of `run_layers`, where the rows behind some first ones follow these."""
    own = np.arange(rows)
    leading = own if leaders is None else np.array(leaders)
    distinct = int((leading == own).sum())
    if not alike or (leading[:distinct] != own[:distinct]).any() or (leading >= distinct).any():
        return 0, rows, own
    return alike, distinct, leading


def _tables(found: list[list[tuple[np.ndarray, np.ndarray] | None]]) -> _Weights | None:
    """The products' weights and scales by layer; None where one is missing or the layers are not alike."""
    whole = [[held for held in layer if held is not None] for layer in found]
    alike = {tuple((weight.shape, weight.dtype) for weight, _ in layer) for layer in whole}
    if len(alike) > 1 or len(whole[0]) < len(found[0]):
        return None
    weights, scales = (np.array([[held[n].ctypes.data for held in layer] for layer in whole]) for n in (0, 1))
    return _Weights(weights, scales, np.array([weight.dtype == np.int16 for weight, _ in whole[0]]), whole)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm,
        query_key_value=attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.q_proj,
        out=attention.o_proj,
        mlp_norm=layer.post_attention_layernorm,
        gate_up=mlp.gate_up_proj if hasattr(mlp, "gate_up_proj") else mlp.gate_proj,
        down=mlp.down_proj,
        activate=mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn,
        scaling=attention.scaling,
    )
