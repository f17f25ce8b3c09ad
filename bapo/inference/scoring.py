"""Log-probs of given responses: all responses of a prompt in one pass with a shared prefix."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bapo.inference.prefix_tree import PREFIX, Batch, PromptTree, pack_trees, pad_trees, repeat_batch, sum_branches
from bapo.inference.token_logps import token_logps
from bapo.inference.tree_attention import block_mask, limits_of

if TYPE_CHECKING:  # training scores too, and needs no policies
    from bapo.inference.policies import Policies, Policy

# Where one of these is set, the model does more to its logits than project hidden states.
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@torch.inference_mode()
def policy_logps(
    policies: "Policies", chosen: Sequence["Policy"], prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log-probs, in nats, of each response under each policy, in one pass; shape [policies, responses]."""
    model = policies.base.model
    tree = PromptTree.grow(prompt_ids, responses)
    packed = limits_of(model).pack(tree)
    batch = repeat_batch((pack_trees if packed else pad_trees)([tree]), len(chosen))
    rows = [policy for policy in chosen for _ in range(1 if packed else len(responses))]
    forward = partial(policies.forward, policies.gather(rows))
    logps = branch_logps(forward, model, {name: _on(model.device, value) for name, value in batch.items()})
    return logps.view(len(chosen), len(responses))


@torch.inference_mode()
def response_logps(
    forward: Callable, model: PreTrainedModel, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log-probs, in nats, of each response after the prompt; shape [responses].

    `model` is the causal language model (wrapped by PEFT or not) and `forward` a forward pass of it,
    as itself or under an adapter.
    """
    tree = PromptTree.grow(prompt_ids, responses)
    batch = (pack_trees if limits_of(model).pack(tree) else pad_trees)([tree])
    return branch_logps(forward, model, {name: _on(model.device, value) for name, value in batch.items()})


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def branch_logps(forward: Callable, model: PreTrainedModel, batch: Batch, late: int = 0) -> Tensor:
    """Summed log-probs, in nats, of every branch of a batch made by `pack_trees` or `pad_trees`.

    Differentiable; shape [branches], float32 or wider. `late` counts the predicting positions at the end on which
    a loss may not depend (see `token_logps`).
    """
    inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    if "segments" in batch:
        inputs["segments"] = batch["segments"]
        # What has four dimensions goes to the attention as it is: otherwise transformers would make a mask.
        inputs["attention_mask"] = (
            block_mask(batch["segments"], model.device)
            if model.device.type == "cuda"
            else batch["branches"][:1][None, None]
        )
    else:
        inputs["attention_mask"] = batch["attention_mask"]
    predicting = batch["branches"] != PREFIX
    head = model.get_output_embeddings()
    projected = all(getattr(model.config, name, None) in (None, 1.0) for name in LOGIT_SETTINGS)
    with _at_the_head(head, predicting, skip=projected) as hidden:
        logits = forward(**inputs, use_cache=False).logits
    if projected:
        logps = token_logps(hidden[0], head, batch["labels"], late)
    else:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logps = logits.gather(1, batch["labels"].unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
    return sum_branches(logps, batch["branches"][predicting])


@contextmanager
def _at_the_head(head: nn.Linear, selected: Tensor, skip: bool) -> Iterator[list[Tensor]]:
    """Let the vocabulary projection see the selected positions alone: [rows, T, width] → [selected, width].

    It is a quarter of a small model's work, and neither prompt nor padding needs it. With `skip` it
    sees none: the list that is returned then holds its input, to be projected elsewhere. A hook
    reaches the head through every wrapper (PEFT, distributed), whereas `logits_to_keep` keeps the
    same columns of all rows.
    """
    caught: list[Tensor] = []

    def select(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        caught.append(inputs[0][selected])
        return (caught[0][:0] if skip else caught[0],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield caught
    finally:
        hook.remove()
