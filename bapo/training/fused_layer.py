"""Llama's decoder layer under LoRA in few functions of its own: the same numbers, fewer tensors kept, fewer passes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, eager_attention_forward

from bapo.inference.kernels import SHARES
from bapo.inference.projection import project
from bapo.inference.tree_attention import arrays
from bapo.training import layer_kernels
from bapo.training.arena import Arena
from bapo.training.lora_linear import FusedLoraLinear, across, live_rows, product_backward, spread


class FusedLayer(LlamaDecoderLayer):
    """Whatever of the layer is not `FusedLoraLinear` sends it the library's way.

    For the way back autograd would also keep what the norms give, silu(gate) and its product with up, all of which
    follow from the layer's input, gate and up; and it would add up gradients in passes of their own.
    """

    arena: Arena  # of the model
    opens: bool  # whether a pass begins with this layer

    def forward(self, hidden_states: Tensor, attention_mask=None, **kwargs) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        inputs = _factors(hidden_states, attention.q_proj, attention.k_proj, attention.v_proj)
        output = _factors(hidden_states, attention.o_proj)
        inside = _factors(hidden_states, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if self.opens:
            self.arena.open(hidden_states.flatten(0, 1))
        if inputs is None or output is None or inside is None or kwargs.get("past_key_values") is not None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        rows, length, _ = hidden_states.shape
        x = hidden_states.flatten(0, 1)
        cos, sin = (part.expand(rows, -1, -1).flatten(0, 1) for part in kwargs.pop("position_embeddings"))
        norm = self.input_layernorm
        *states, x = _QueryKeyValue.apply(self.arena, x, norm.weight, norm.variance_epsilon, cos, sin, *inputs)
        query, key, value = (part.view(rows, length, -1, attention.head_dim).transpose(1, 2) for part in states)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        if kwargs.get("segments") is not None:
            kwargs["take"] = self.arena.take
        attended, _ = attend(attention, query, key, value, attention_mask, scaling=attention.scaling, **kwargs)
        x = _Output.apply(self.arena, x, attended.reshape(rows * length, -1), *output)
        norm = self.post_attention_layernorm
        return _GatedMlp.apply(self.arena, x, norm.weight, norm.variance_epsilon, *inside).view_as(hidden_states)


def fuse_layers(model: PreTrainedModel) -> None:
    """Make Llama's layers fused ones in place. To be called before the model gets its adapter."""
    fused = []
    for layer in getattr(model.get_decoder(), "layers", ()):
        if (
            type(layer) is LlamaDecoderLayer
            and type(layer.mlp.act_fn) in (nn.SiLU, SiLUActivation)
            and type(layer.input_layernorm) is type(layer.post_attention_layernorm) is LlamaRMSNorm
            and not layer.self_attn.attention_dropout
        ):
            layer.__class__ = FusedLayer  # and not a new module: adapters and checkpoints know all by their names
            fused.append(layer)
    arena = Arena(sum(map(_kept, fused)))
    for number, layer in enumerate(fused):
        layer.arena, layer.opens = arena, number == 0


def _kept(layer: FusedLayer) -> int:
    """Numbers per token that a layer keeps in the arena: input, query, key, value and what was attended to, the sum
    behind them, gate and up."""
    attention = layer.self_attn
    heads = 2 * attention.q_proj.out_features + 2 * attention.k_proj.out_features
    return 2 * layer.hidden_size + heads + 2 * layer.mlp.gate_proj.out_features


def _factors(x: Tensor, *layers: nn.Module) -> list[Any] | None:
    """W, A, B and s of each layer, one after the other; None where one of them is not plain."""
    found: list[Any] = []
    for layer in layers:
        own = layer.factors(x) if isinstance(layer, FusedLoraLinear) and layer.base_layer.bias is None else None
        if own is None:
            return None
        found.extend(own)
    return found


def _normalise(x: Tensor, gain: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The root-mean-square norm of every row of x and what it was scaled by, [tokens]."""
    normal, scale = torch.empty_like(x), x.new_empty(len(x))
    layer_kernels.normalise(*arrays(x, gain), epsilon, *arrays(normal, scale), SHARES)
    return normal, scale


def _normalise_backward(
    upstream: Tensor, x: Tensor, gain: Tensor, scale: Tensor, beside: Tensor, rows: slice | Tensor | None, count: int
) -> Tensor:
    """The gradient by x, + `beside`, of those of `count` rows that are `rows`; zeros in the others."""
    if not isinstance(rows, slice):
        out = torch.empty_like(x)
        layer_kernels.normalise_backward(*arrays(upstream, x, gain, scale, beside, out), SHARES)
        return spread(out, rows, count)
    whole = x.new_empty(count, x.shape[1])
    whole[rows.stop :] = 0
    layer_kernels.normalise_backward(*arrays(upstream, x, gain, scale, beside, whole[rows]), SHARES)
    return whole


def _rotate(states: Tensor, cos: Tensor, sin: Tensor, direction: int, rotated: Tensor) -> Tensor:
    """Rotary embedding of [tokens, heads · width] by angles of [tokens, width], into `rotated`; back again with
    `direction` −1."""
    heads = (len(cos), states.shape[1] // cos.shape[1], cos.shape[1])
    layer_kernels.rotate(
        *arrays(states.view(heads), cos, sin), direction, rotated.view(heads).numpy(), SHARES,
    )  # fmt: skip
    return rotated


class _QueryKeyValue(torch.autograd.Function):
    """Norm, products and rotation: x [tokens, in] → query, key and value, [tokens, heads · width] each, and x.

    What x is added to later takes it from here, so that its gradient comes by here and is added on the way.
    Every w [out, in], a [rank, in], b [out, rank]; cos and sin [tokens, width].
    """

    @staticmethod
    def forward(ctx, arena, x, gain, epsilon, cos, sin, q_w, q_a, q_b, q_s, k_w, k_a, k_b, k_s, v_w, v_a, v_b, v_s):
        normal, scale = _normalise(x, gain, epsilon)
        narrow = project(normal, torch.cat([q_a, k_a, v_a]))
        parts = narrow.split([len(a) for a in (q_a, k_a, v_a)], dim=1)
        query, key = (
            project(normal, w).addmm_(part, b.T, alpha=s)
            for part, w, b, s in ((parts[0], q_w, q_b, q_s), (parts[1], k_w, k_b, k_s))
        )
        value = torch.addmm(project(normal, v_w), parts[2], v_b.T, alpha=v_s, out=arena.take(x, len(v_w)))
        ctx.save_for_backward(x, gain, scale, cos, sin, narrow, q_w, q_a, q_b, k_w, k_a, k_b, v_w, v_a, v_b)
        ctx.scalings = q_s, k_s, v_s
        query, key = (_rotate(states, cos, sin, 1, arena.take(x, states.shape[1])) for states in (query, key))
        return query, key, value, x

    @staticmethod
    def backward(ctx, query: Tensor, key: Tensor, value: Tensor, beside: Tensor):
        x, gain, scale, cos, sin, narrow, q_w, q_a, q_b, k_w, k_a, k_b, v_w, v_a, v_b = ctx.saved_tensors
        query, key, value, beside = (upstream.contiguous() for upstream in (query, key, value, beside))
        count, rows = len(x), live_rows(query, key, value, beside)
        if rows is not None:
            x, scale, cos, sin, narrow = x[rows], scale[rows], cos[rows], sin[rows], narrow[rows]
            query, key, value, beside = query[rows], key[rows], value[rows], beside[rows]
        query, key = (_rotate(states, cos, sin, -1, torch.empty_like(states)) for states in (query, key))
        ranks = [len(a) for a in (q_a, k_a, v_a)]
        upstreams, scalings = (query, key, value), ctx.scalings
        inner = torch.cat(
            [project(u, b.T).mul_(s) for u, b, s in zip(upstreams, (q_b, k_b, v_b), scalings, strict=True)], 1
        )
        q_grad_a, k_grad_a, v_grad_a = _grad_a(inner, x, gain, scale).split(ranks)
        q_grad_b, k_grad_b, v_grad_b = map(_grad_b, narrow.split(ranks, dim=1), upstreams, scalings)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad = project(query, q_w.T).add_(project(key, k_w.T)).add_(project(value, v_w.T))
            grad.addmm_(inner, torch.cat([q_a, k_a, v_a]))
            grad_x = _normalise_backward(grad, x, gain, scale, beside, rows, count)
        return (
            *(None, grad_x, None, None, None, None),
            *(None, q_grad_a, q_grad_b, None),
            *(None, k_grad_a, k_grad_b, None),
            *(None, v_grad_a, v_grad_b, None),
        )


class _Output(torch.autograd.Function):
    """residual + o(x): x [tokens, in], w [out, in], a [rank, in], b [out, rank] → [tokens, out]."""

    @staticmethod
    def forward(ctx, arena, residual, x, w, a, b, scaling):
        narrow = project(x, a)
        ctx.save_for_backward(x, narrow, w, a, b)
        ctx.scaling = scaling
        out = torch.add(residual, project(x, w), out=arena.take(x, len(w)))
        return out.addmm_(narrow, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_x, grad_a, grad_b = product_backward(upstream, ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[2])
        return None, upstream, grad_x, None, grad_a, grad_b, None


class _GatedMlp(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)) of n = norm(x): x [tokens, in] → [tokens, in].

    Every w [out, in], a [rank, in], b [out, rank].
    """

    @staticmethod
    def forward(
        ctx, arena, x, gain, epsilon,
        gate_w, gate_a, gate_b, gate_s, up_w, up_a, up_b, up_s, down_w, down_a, down_b, down_s,
    ):  # fmt: skip
        normal, scale = _normalise(x, gain, epsilon)
        narrow = project(normal, torch.cat([gate_a, up_a]))
        gate, up = (
            torch.addmm(project(normal, w), part, b.T, alpha=s, out=arena.take(x, len(w)))
            for part, w, b, s in (
                (narrow[:, : len(gate_a)], gate_w, gate_b, gate_s),
                (narrow[:, len(gate_a) :], up_w, up_b, up_s),
            )
        )
        inside = torch.empty_like(gate)
        layer_kernels.gated(*arrays(gate, up, inside), SHARES)
        down_narrow = project(inside, down_a)
        ctx.save_for_backward(
            *(x, gain, scale, gate, up, narrow, down_narrow),
            *(gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b),
        )
        ctx.scalings = gate_s, up_s, down_s
        out = torch.add(x, project(inside, down_w), out=arena.take(x, x.shape[1]))
        return out.addmm_(down_narrow, down_b.T, alpha=down_s)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, gain, scale, gate, up, narrow, down_narrow, *weights = ctx.saved_tensors
        gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = weights
        gate_s, up_s, down_s = ctx.scalings
        rank = len(gate_a)
        upstream = upstream.contiguous()
        count, rows = len(x), live_rows(upstream)
        if rows is not None:
            x, scale, gate, up, narrow = x[rows], scale[rows], gate[rows], up[rows], narrow[rows]
            down_narrow, upstream = down_narrow[rows], upstream[rows]
        down_inner = project(upstream, down_b.T).mul_(down_s)
        grad_gate = project(upstream, down_w.T).addmm_(down_inner, down_a)  # that of what `down` reads, at first
        layer_kernels.gated_backward(*arrays(grad_gate, gate, up), SHARES)
        torch.autograd.graph.increment_version([gate, up])  # so that autograd refuses to go back a second time
        inside, grad_up = gate, up
        grad_down_a = across(down_inner, inside)
        inner = torch.cat([project(grad_gate, gate_b.T).mul_(gate_s), project(grad_up, up_b.T).mul_(up_s)], 1)
        grad_a = _grad_a(inner, x, gain, scale)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad = project(grad_gate, gate_w.T).add_(project(grad_up, up_w.T))
            grad.addmm_(inner, torch.cat([gate_a, up_a]))
            grad_x = _normalise_backward(grad, x, gain, scale, upstream, rows, count)
        return (
            *(None, grad_x, None, None),
            *(None, grad_a[:rank], _grad_b(narrow[:, :rank], grad_gate, gate_s), None),
            *(None, grad_a[rank:], _grad_b(narrow[:, rank:], grad_up, up_s), None),
            *(None, grad_down_a, _grad_b(down_narrow, upstream, down_s), None),
        )


def _grad_a(inner: Tensor, x: Tensor, gain: Tensor, scale: Tensor) -> Tensor:
    """innerᵀ · norm(x), without making the norm again: [tokens, rank] → [rank, in]."""
    return across(inner * scale[:, None], x).mul_(gain)


def _grad_b(narrow: Tensor, upstream: Tensor, scaling: float) -> Tensor:
    """[out, rank]."""
    return across(narrow, upstream).mul_(scaling).T
