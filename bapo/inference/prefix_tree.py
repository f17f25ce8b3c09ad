"""One prompt and all its responses as one sequence with a shared prefix.

    prefix            branch 0                branch 1
    x₁ … x₍P₋₁₎   |   x_P  y₁ … y₍R₋₁₎   |   x_P  z₁ … z₍S₋₁₎   | …

Every branch starts with the prompt's last token, so that each of its positions predicts one token of
its response and the first response token needs no special case. Positions restart at P−1 in every
branch, and a branch attends to the prefix and to itself. The log-probs equal those of the responses
run apart, for P − 1 + ΣR tokens instead of Σ(P + R). (Prefix sharing for pairs: arXiv 2410.20305.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100  # label of a position that predicts nothing
PREFIX = -1  # branch number of the shared prefix


@dataclass(frozen=True, slots=True)
class PromptTree:
    """A prompt with its responses, flattened. All lists have one entry per position."""

    token_ids: list[int]
    positions: list[int]
    branches: list[int]
    labels: list[int]  # the token each position predicts

    @classmethod
    def grow(cls, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> "PromptTree":
        """Flatten `prompt_ids` (one or more) and the responses (each of one or more token ids)."""
        if not prompt_ids or not all(responses):
            raise ValueError("a prompt and each of its responses need at least one token")
        *prefix, last = prompt_ids
        start = len(prefix)
        tree = cls([*prefix], [*range(start)], [PREFIX] * start, [IGNORED] * start)
        for branch, response in enumerate(responses):
            tree.token_ids.extend([last, *response[:-1]])
            tree.positions.extend(range(start, start + len(response)))
            tree.branches.extend([branch] * len(response))
            tree.labels.extend(response)
        return tree

    def __len__(self) -> int:
        return len(self.token_ids)


def stack_trees(trees: Sequence[PromptTree]) -> dict[str, Tensor]:
    """Trees as one batch, padded on the right to the longest.

    Returns `input_ids`, `position_ids`, `labels` and `branches`, each of shape [trees, length], and
    `visible`, the attention pattern, boolean of shape [trees, 1, length, length]. `branches` numbers
    the branches through the whole batch; prefix and padding hold −1. Padding is told by its place,
    never by its token id, so any id will do.
    """
    length = max(map(len, trees))

    def padded(rows: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (length - len(row)) for row in rows])

    local = padded([tree.branches for tree in trees], PREFIX)
    branch_counts = torch.tensor([max(tree.branches) + 1 for tree in trees])
    first = (branch_counts.cumsum(0) - branch_counts).unsqueeze(1)
    return {
        "input_ids": padded([tree.token_ids for tree in trees], 0),
        "position_ids": padded([tree.positions for tree in trees], 0),
        "labels": padded([tree.labels for tree in trees], IGNORED),
        "branches": torch.where(local == PREFIX, PREFIX, local + first),
        "visible": _visible(local),
    }


def _visible(branches: Tensor) -> Tensor:
    # branches: [trees, length]. Padding stands behind everything and counts as prefix, so causality
    # alone hides it from the real tokens, and no row of the softmax is ever empty.
    query, key = branches.unsqueeze(2), branches.unsqueeze(1)
    causal = torch.ones(branches.shape[1], branches.shape[1], dtype=torch.bool).tril()
    return (((key == PREFIX) | (key == query)) & causal).unsqueeze(1)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention pattern as what attention adds to its scores: 0 where visible, else the lowest number."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def sum_branches(token_logps: Tensor, branches: Tensor) -> Tensor:
    """Sum per-token log-probs over each branch: [tokens] with their branch numbers → [branches]."""
    return token_logps.new_zeros(int(branches.max()) + 1).index_add(0, branches, token_logps)
