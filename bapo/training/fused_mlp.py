"""A decoder layer's gated MLP under LoRA as one function: the same numbers, fewer tensors kept, fewer passes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from bapo.training.lora_linear import FusedLoraLinear

PARTS = ("gate_proj", "up_proj", "down_proj")


class FusedMlp(nn.Module):
    """Takes the place of y = down(silu(gate(x)) · up(x)); whatever is not `FusedLoraLinear` takes the plain way.

    For the way back autograd would also keep silu(gate(x)) and the product, which follow from gate(x) and
    up(x), and it would add up the input's gradient in passes of its own.
    """

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, child in mlp.named_children():  # adapters and checkpoints know the layers by their own names
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Tensor:
        layers = [getattr(self, name) for name in PARTS]
        factors = [
            layer.factors(x) if isinstance(layer, FusedLoraLinear) and layer.base_layer.bias is None else None
            for layer in layers
        ]
        gate, up, down = factors
        if gate is None or up is None or down is None:
            return layers[2](F.silu(layers[0](x)) * layers[1](x))
        return _GatedMlp.apply(x.flatten(0, -2), *gate, *up, *down).unflatten(0, x.shape[:-1])


def fuse_mlps(model: PreTrainedModel) -> None:
    """Replace the model's gated MLPs with SiLU in place. To be called before it gets its adapter."""
    for layer in getattr(model.get_decoder(), "layers", ()):
        mlp = getattr(layer, "mlp", nn.Identity())
        kinds = {name: type(child) for name, child in mlp.named_children()}
        if kinds.pop("act_fn", None) in (nn.SiLU, SiLUActivation) and kinds == dict.fromkeys(PARTS, nn.Linear):
            layer.mlp = FusedMlp(mlp)


class _GatedMlp(torch.autograd.Function):
    """x [tokens, in] → [tokens, in]; every w [out, in], a [rank, in], b [out, rank]."""

    @staticmethod
    def forward(ctx, x, gate_w, gate_a, gate_b, gate_s, up_w, up_a, up_b, up_s, down_w, down_a, down_b, down_s):
        narrow = x @ torch.cat([gate_a, up_a]).T
        gate = (x @ gate_w.T).addmm_(narrow[:, : len(gate_a)], gate_b.T, alpha=gate_s)
        up = (x @ up_w.T).addmm_(narrow[:, len(gate_a) :], up_b.T, alpha=up_s)
        inside = F.silu(gate).mul_(up)
        down_narrow = inside @ down_a.T
        ctx.save_for_backward(
            x, gate, up, narrow, down_narrow, gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b
        )
        ctx.scalings = gate_s, up_s, down_s
        return (inside @ down_w.T).addmm_(down_narrow, down_b.T, alpha=down_s)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, gate, up, narrow, down_narrow, gate_w, gate_a, gate_b, up_w, up_a, up_b, down_w, down_a, down_b = (
            ctx.saved_tensors
        )
        gate_s, up_s, down_s = ctx.scalings
        rank = len(gate_a)
        down_inner = (upstream @ down_b).mul_(down_s)
        grad_inside = (upstream @ down_w).addmm_(down_inner, down_a)
        activated = F.silu(gate)
        grad_up = grad_inside * activated
        grad_down_a = down_inner.T @ activated.mul_(up)
        grad_gate = torch.ops.aten.silu_backward.grad_input(grad_inside.mul_(up), gate, grad_input=grad_inside)
        inner = torch.cat([(grad_gate @ gate_b).mul_(gate_s), (grad_up @ up_b).mul_(up_s)], 1)
        both = torch.cat([gate_a, up_a])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_gate @ gate_w).addmm_(grad_up, up_w).addmm_(inner, both)
        grad_a = inner.T @ x
        # Transposed, because narrow times wide is the faster product.
        return (
            grad_x,
            *(None, grad_a[:rank], (narrow[:, :rank].T @ grad_gate).mul_(gate_s).T, None),
            *(None, grad_a[rank:], (narrow[:, rank:].T @ grad_up).mul_(up_s).T, None),
            *(None, grad_down_a, (down_narrow.T @ upstream).mul_(down_s).T, None),
        )
