"""One token of every row through a Llama-like decoder on the CPU, without transformers' graph around the layers.

With a small base, dispatching hundreds of little operations takes longer than reading all the weights.
The layers are the model's own, in the same order and with the same numbers; what is written out here is
only what lies between them: rotation, attention to the cache, residuals.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from bapo.inference.kernels import attend
from bapo.inference.mixed_lora import MixedLinear
from bapo.inference.norms import FusedNorm
from bapo.inference.roomy_cache import RoomyLayer

ARCHITECTURES = ("LlamaForCausalLM", "Phi3ForCausalLM", "GemmaForCausalLM")


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: nn.Module
    query_key_value: MixedLinear
    out: MixedLinear
    mlp_norm: nn.Module
    gate_up: MixedLinear
    down: MixedLinear
    activate: nn.Module
    scaling: float


class DecoderStep:
    """The step of a model whose linear layers are mixed; made by `of`."""

    def __init__(self, model: Any):
        decoder = model.model
        self._embed = decoder.embed_tokens
        self._rotary = decoder.rotary_emb
        self._layers = [_layer(layer) for layer in decoder.layers]
        self._norm = decoder.norm
        self._head = model.lm_head

    @classmethod
    def of(cls, model: PreTrainedModel) -> "DecoderStep | None":
        """None where the model is of another kind, or not in float32 on the CPU."""
        if type(model).__name__ not in ARCHITECTURES:
            return None
        mixed = [module for module in model.modules() if isinstance(module, MixedLinear)]
        norms = any(isinstance(module, FusedNorm) for module in model.modules())
        return cls(model) if norms and all(layer.product and layer.product.special for layer in mixed) else None

    def __call__(self, token_ids: Tensor, cache: Cache) -> Tensor:
        """Logits of the next token, [rows, vocabulary], after one token of every row, [rows]; extends the cache.

        To be called while the model's layers are told which rows they have (`MixedModel.mixed`).
        """
        position = cache.get_seq_length()
        x = self._embed(token_ids)
        cos, sin = (part[0, 0].numpy() for part in self._rotary(x[None], torch.tensor([[position]])))
        for layer, kept in zip(self._layers, cache.layers, strict=True):
            states = layer.query_key_value.joined(layer.attention_norm(x)).contiguous()
            keys, values = kept.append_one()
            attended = torch.empty(len(x), layer.out.in_features)
            attend(
                *(states.numpy(), cos, sin, keys.numpy(), values.numpy()), position, layer.scaling, attended.numpy()
            )  # fmt: skip
            x = x + layer.out.joined(attended)
            gate, up = layer.gate_up.joined(layer.mlp_norm(x)).chunk(2, -1)
            x = x + layer.down.joined(layer.activate(gate) * up)
        return self._head.joined(self._norm(x))

    def takes(self, cache: Cache) -> bool:
        """Whether every layer attends to all that came before."""
        return all(isinstance(layer, RoomyLayer) for layer in cache.layers)


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
