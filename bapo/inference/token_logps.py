"""Log-probs of given tokens from hidden states, without ever holding all logits."""

import torch
from torch import Tensor, nn

from bapo.inference.kernels import SHARES
from bapo.inference.projection import project
from bapo.inference.tree_attention import arrays
from bapo.inference.tree_kernels import weigh

BLOCK = 1024  # words of the vocabulary at a time: enough for a fast product, few enough for their logits to stay near


def token_logps(hidden: Tensor, head: nn.Linear, labels: Tensor, late: int = 0) -> Tensor:
    """log softmax(head(h))[label] for each position: hidden [tokens, width] and labels [tokens] → [tokens].

    In nats, float32 or wider. Differentiable by `hidden` alone: the head is part of the base, which is frozen. For
    the last `late` positions this is dearer, and free where the loss turns out not to depend on them.
    """
    if head.weight.requires_grad:
        raise ValueError("the vocabulary projection is trained, but its gradient is not computed here")
    return _TokenLogps.apply(hidden, head.weight, head.bias, labels, late)


class _TokenLogps(torch.autograd.Function):
    """∂ log p(label) / ∂h = W[label] − softmax(h Wᵀ) W needs no upstream gradient, so it is taken on the way forward,
    while the logits are at hand. That of late positions is not, and needs the logits once more if it is asked for."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, late: int) -> Tensor:
        early = len(hidden) - late if ctx.needs_input_grad[0] else 0
        logps, gradient = _over_the_vocabulary(hidden, weight, bias, labels, early)
        ctx.save_for_backward(gradient, hidden[early:], weight, bias, labels[early:])
        return logps

    @staticmethod
    def backward(ctx, upstream: Tensor):
        gradient, hidden, weight, bias, labels = ctx.saved_tensors
        early = len(gradient)
        whole = gradient.new_zeros(len(upstream), gradient.shape[1])
        whole[:early] = gradient * upstream[:early, None]
        rows = upstream[early:].nonzero().squeeze(1)
        if len(rows):
            _, gradient = _over_the_vocabulary(hidden[rows], weight, bias, labels[rows], len(rows))
            whole[early + rows] = (gradient * upstream[early + rows, None]).to(whole.dtype)
        return whole, None, None, None, None


def _over_the_vocabulary(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, slopes: int
) -> tuple[Tensor, Tensor]:
    """The log-probs of the labels [tokens], and their gradients by the first `slopes` hidden states [slopes, width].

    Both go over the vocabulary once, block by block, and what was summed is scaled down whenever a block has a
    larger logit than all before: all logits of a batch would take gigabytes, and read W twice.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    states = hidden.to(weight.dtype)
    chosen, total = states.new_zeros((2, len(states), 1), dtype=wide)
    largest = torch.full_like(total, -torch.inf)
    mean = torch.zeros_like(hidden[:slopes], dtype=wide)
    for start in range(0, len(weight), BLOCK):
        words = weight[start : start + BLOCK]
        logits = project(states, words)
        if bias is not None:
            logits += bias[start : start + BLOCK]
        logits = logits.to(wide)
        place = labels[:, None] - start
        here = (place >= 0) & (place < len(words))
        chosen = torch.where(here, logits.gather(1, place.clamp(0, len(words) - 1)), chosen)
        weights, decay = _weigh(logits, largest, total)
        if slopes:
            added = project(weights[:slopes].to(weight.dtype), words.T).to(wide)
            mean = added.addcmul_(mean, decay[:slopes])
    gradient = (weight[labels[:slopes]] - mean.div_(total[:slopes])).to(hidden.dtype)
    return (chosen - largest - total.log()).squeeze(1), gradient


def _weigh(logits: Tensor, largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """In place of the logits [tokens, words] of a block e^(logit − largest), and by what earlier ones are to be scaled.

    Takes the block into the largest logits and the sums so far, `largest` and `total` [tokens, 1].
    """
    if logits.device.type == "cpu":
        decay = torch.empty_like(largest)
        weigh(*arrays(logits, largest[:, 0], total[:, 0], decay[:, 0]), SHARES)
        return logits, decay
    before = largest.clone()
    torch.maximum(before, logits.amax(1, keepdim=True), out=largest)
    decay = (before - largest).exp_()
    weights = logits.sub_(largest).exp_()
    total.mul_(decay).add_(weights.sum(1, keepdim=True))
    return weights, decay
