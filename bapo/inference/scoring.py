"""Log-probs of given responses: all responses of a prompt in one pass with a shared prefix."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bapo.inference.prefix_tree import PREFIX, PromptTree, additive_mask, stack_trees, sum_branches


@torch.inference_mode()
def response_logps(
    forward: Callable, head: nn.Linear, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log-probs, in nats, of each response after the prompt; shape [responses].

    `forward` is a causal language model or a policy's forward pass, `head` its vocabulary projection.
    """
    tree = stack_trees([PromptTree.grow(prompt_ids, responses)])
    return branch_logps(forward, head, {name: value.to(head.weight.device) for name, value in tree.items()})


def branch_logps(forward: Callable, head: nn.Linear, batch: dict[str, Tensor]) -> Tensor:
    """Summed log-probs, in nats, of every branch of a batch of trees (see `stack_trees`).

    Differentiable; shape [branches], float32 or wider.
    """
    predicting = batch["branches"] != PREFIX
    with _projecting_only(head, predicting):
        logits = forward(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=additive_mask(batch["visible"], head.weight.dtype),
            use_cache=False,
        ).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    token_logps = logits.gather(1, batch["labels"][predicting].unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
    return sum_branches(token_logps, batch["branches"][predicting])


@contextmanager
def _projecting_only(head: nn.Linear, selected: Tensor) -> Iterator[None]:
    """Let the vocabulary projection see the selected positions alone: [trees, length, width] → [selected, width].

    It is a quarter of a small model's work, and neither prompt nor padding needs it. A hook reaches
    it through every wrapper (PEFT, distributed), whereas `logits_to_keep` keeps the same columns of
    all rows.
    """
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0][selected],))
    try:
        yield
    finally:
        hook.remove()
