"""PEFT's LoRA linear layer with its products fused: the same numbers, fewer passes over memory."""

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from bapo.inference.projection import project
from bapo.training.layer_kernels import mark

Factors = tuple[Tensor, Tensor, Tensor, float]  # W [out, in], A [rank, in], B [out, rank] and the scale s

MOSTLY = 0.95  # of the rows; choosing them costs more than so few others


class FusedLoraLinear(Linear):
    """y = x Wᵀ + s (x Aᵀ) Bᵀ with both sums inside the matrix products, forwards and backwards.

    Written for the one adapter of a training run over a plain, frozen linear layer; everything else
    takes PEFT's own way. What it saves is PEFT's.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        factors = None if "adapter_names" in kwargs else self.factors(x)
        if factors is None:
            return super().forward(x, *args, **kwargs)
        result = _LoraProduct.apply(x.flatten(0, -2), *factors)
        if self.base_layer.bias is not None:
            result = result + self.base_layer.bias
        return result.unflatten(0, x.shape[:-1])

    def factors(self, x: Tensor) -> Factors | None:
        """W, A, B and s, where the layer is nothing more than the formula for an input like this."""
        adapter = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        plain = (
            not self.disable_adapters
            and not self.merged
            and adapter in self.lora_A
            and adapter not in self.lora_variant
            and isinstance(self.lora_dropout[adapter], nn.Identity)
            and type(self.base_layer) is nn.Linear
            and x.device.type == "cpu"
            and x.dtype in (torch.float32, torch.float64)
            and self.lora_A[adapter].weight.dtype == x.dtype
            and not torch.is_autocast_enabled("cpu")
        )
        if not plain:
            return None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return self.base_layer.weight, a, b, self.scaling[adapter]


def live_rows(*upstreams: Tensor) -> slice | Tensor | None:
    """The rows, of [tokens, …] each, that have a gradient, as an index; None where nearly all have.

    Nothing looks at a response but itself. One on which the loss does not depend, such as a base response whose
    anchor is slack, therefore has no gradient in any layer, and need not be taken through the way back.
    """
    live = torch.zeros(len(upstreams[0]), dtype=torch.bool)
    for upstream in upstreams:
        mark(upstream.numpy(), live.numpy())
    rows = live.nonzero().squeeze(1)
    if len(rows) and len(rows) == rows[-1] + 1 < len(live):
        return slice(0, len(rows))  # often so, as base responses come last: nothing need be copied
    return rows if len(rows) < MOSTLY * len(live) else None


def spread(part: Tensor, rows: slice | Tensor | None, count: int) -> Tensor:
    """`count` rows: those of `part` at the places `rows`, zeros elsewhere."""
    if rows is None:
        return part
    whole = part.new_zeros(count, part.shape[1])
    whole[rows] = part
    return whole


def across(narrow: Tensor, wide: Tensor) -> Tensor:
    """narrowᵀ · wide: [tokens, rank] and [tokens, width] → [rank, width]; the other way round it is slower."""
    return project(narrow.T, wide.T)


def product_backward(
    upstream: Tensor, saved: tuple[Tensor, ...], scaling: float, needed: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients by x (where it is `needed`), a and b of x wᵀ + scaling · narrow · bᵀ, where narrow = x aᵀ.

    `saved` holds x, narrow, w, a and b.
    """
    x, narrow, w, a, b = saved
    count, rows = len(x), live_rows(upstream)
    if rows is not None:
        x, narrow, upstream = x[rows], narrow[rows], upstream[rows]
    inner = project(upstream, b.T).mul_(scaling)
    grad_x = spread(project(upstream, w.T).addmm_(inner, a), rows, count) if needed else None
    return grad_x, across(inner, x), across(narrow, upstream).mul_(scaling).T


class _LoraProduct(torch.autograd.Function):
    """x [tokens, in], w [out, in], a [rank, in], b [out, rank] → [tokens, out]."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        narrow = project(x, a)
        ctx.save_for_backward(x, narrow, w, a, b)
        ctx.scaling = scaling
        return project(x, w).addmm_(narrow, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad_x, grad_a, grad_b = product_backward(upstream, ctx.saved_tensors, ctx.scaling, ctx.needs_input_grad[0])
        return grad_x, None, grad_a, grad_b, None
