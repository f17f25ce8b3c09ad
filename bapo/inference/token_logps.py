"""Log-probs of given tokens from hidden states, without ever holding all logits."""

import torch
from torch import Tensor, nn

CHUNK = 512  # positions projected at a time: enough for a fast matrix product, few enough to stay in memory's reach


def token_logps(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """log softmax(head(h))[label] for each position: hidden [tokens, width] and labels [tokens] → [tokens].

    In nats, float32 or wider. Differentiable by `hidden` alone: the head is part of the base, which is frozen.
    """
    if head.weight.requires_grad:
        raise ValueError("the vocabulary projection is trained, but its gradient is not computed here")
    return _TokenLogps.apply(hidden, head.weight, head.bias, labels)


class _TokenLogps(torch.autograd.Function):
    """∂ log p(label) / ∂h = W[label] − softmax(h Wᵀ) W needs no upstream gradient, so it is taken on the way forward.

    The logits of a chunk serve both and are dropped; all logits of a batch would take gigabytes, and
    backward would compute or read them again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        # One buffer for every chunk: the system would hand out, and clear, as many pages again for each.
        buffer = weight.new_empty(min(CHUNK, len(hidden)), len(weight))
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            label = labels[chunk, None]
            logits = torch.mm(hidden[chunk].to(weight.dtype), weight.T, out=buffer[: len(label)])
            if bias is not None:
                logits += bias
            logits = logits.to(wide)
            chosen, largest = logits.gather(1, label), logits.amax(1, keepdim=True)
            weights = logits.sub_(largest).exp_()
            total = weights.sum(1, keepdim=True)
            logps[chunk] = (chosen - largest - total.log()).squeeze(1)
            if gradient is not None:
                mean = (weights.to(weight.dtype) @ weight).to(wide) / total
                gradient[chunk] = (weight[label.squeeze(1)] - mean).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.unsqueeze(1)).to(gradient.dtype), None, None, None
