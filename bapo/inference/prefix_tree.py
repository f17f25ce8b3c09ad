"""One prompt and all its responses as one sequence with a shared prefix; several such groups in a row.

    prefix            branch 0                branch 1
    x₁ … x₍P₋₁₎   |   x_P  y₁ … y₍R₋₁₎   |   x_P  z₁ … z₍S₋₁₎   | …

Every branch starts with the prompt's last token, so that each of its positions predicts one token of
its response and the first response token needs no special case. Positions restart at P−1 in every
branch, and a branch attends to its group's prefix and to itself. The log-probs equal those of the
responses run apart, for P − 1 + ΣR tokens instead of Σ(P + R). (Prefix sharing for pairs: arXiv 2410.20305.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

PREFIX = -1  # branch number of a shared prefix

# Where a prefix starts and its length, then where the segment itself starts and its length: its positions see the
# prefix, and the segment up to themselves. A prefix is a segment that sees no other.
Segment = tuple[int, int, int, int]

Batch = dict[str, Any]  # what `pack_trees` returns


@dataclass(frozen=True, slots=True)
class PromptTree:
    """A prompt with its responses, flattened. All lists have one entry per position."""

    token_ids: list[int]
    positions: list[int]
    branches: list[int]
    labels: list[int]  # the tokens that the branches' positions predict: one entry per position outside the prefix
    lengths: tuple[int, ...]  # of the prefix, then of each branch

    @classmethod
    def grow(cls, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> "PromptTree":
        """Flatten `prompt_ids` (one or more) and the responses (each of one or more token ids)."""
        if not prompt_ids or not responses or not all(responses):
            raise ValueError("a prompt and each of its responses need at least one token")
        *prefix, last = prompt_ids
        start = len(prefix)
        tree = cls([*prefix], [*range(start)], [PREFIX] * start, [], (start, *map(len, responses)))
        for branch, response in enumerate(responses):
            tree.token_ids.extend([last, *response[:-1]])
            tree.positions.extend(range(start, start + len(response)))
            tree.branches.extend([branch] * len(response))
            tree.labels.extend(response)
        return tree

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def longest(self) -> int:
        """Positions on the longest path from the prompt's first token to a response's last."""
        return self.lengths[0] + max(self.lengths[1:])


def pack_trees(trees: Sequence[PromptTree]) -> Batch:
    """Trees as one sequence without padding, length T.

    Returns `input_ids`, `position_ids` and `branches`, each of shape [1, T], where `branches` numbers
    the branches through all trees (prefixes hold −1); `labels`, the tokens predicted by the positions outside
    the prefixes; and `segments`, one for every prefix and every branch. The last branches of all trees stand at the
    end: training puts base responses there, which often have no gradient, and what has one is then in one piece.
    """
    first = list(accumulate((len(tree.lengths) - 1 for tree in trees), initial=0))
    parts = [(number, part) for number, tree in enumerate(trees) for part in range(len(tree.lengths) - 1)]
    parts += [(number, len(tree.lengths) - 1) for number, tree in enumerate(trees)]
    token_ids: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    labels: list[int] = []
    segments: list[Segment] = []
    prefixes: dict[int, int] = {}
    for number, part in parts:
        tree, place = trees[number], len(token_ids)
        prefix, length = tree.lengths[0], tree.lengths[part]
        start = sum(tree.lengths[:part])
        own = slice(start, start + length)
        token_ids += tree.token_ids[own]
        positions += tree.positions[own]
        if part == 0:
            prefixes[number] = place
            branches += [PREFIX] * length
            segments += [(place, 0, place, length)] if length else []
        else:
            branches += [first[number] + part - 1] * length
            labels += tree.labels[start - prefix : start - prefix + length]
            segments.append((prefixes[number], prefix, place, length))
    return {
        "input_ids": torch.tensor([token_ids]),
        "position_ids": torch.tensor([positions]),
        "branches": torch.tensor([branches]),
        "labels": torch.tensor(labels),
        "segments": segments,
    }


def pad_trees(trees: Sequence[PromptTree]) -> Batch:
    """The same for a model that cannot read trees: one row per branch, its prefix repeated, padded on the right.

    Instead of `segments` there is `attention_mask`, of the shape [branches, length] of the others.
    """
    rows = []
    for tree in trees:
        prefix, start = tree.lengths[0], tree.lengths[0]
        for length in tree.lengths[1:]:
            rows.append((tree.token_ids[:prefix] + tree.token_ids[start : start + length], prefix))
            start += length
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[list[int]], filling: int) -> Tensor:
        return torch.tensor([row + [filling] * (width - len(row)) for row in values])

    return {
        "input_ids": padded([ids for ids, _ in rows], 0),
        "position_ids": padded([[*range(len(ids))] for ids, _ in rows], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "branches": padded(
            [[PREFIX] * prefix + [n] * (len(ids) - prefix) for n, (ids, prefix) in enumerate(rows)], PREFIX
        ),
        "labels": torch.tensor([label for tree in trees for label in tree.labels]),
    }


def repeat_batch(batch: Batch, times: int) -> Batch:
    """The batch several times below itself, for as many policies; branches are numbered on through the copies."""
    count = int(batch["branches"].max()) + 1
    rows = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in batch.items() if name != "segments"}
    copy = torch.arange(times).repeat_interleave(len(batch["branches"]))[:, None]
    rows["branches"] = torch.where(rows["branches"] == PREFIX, PREFIX, rows["branches"] + copy * count)
    return {**batch, **rows}


def sum_branches(token_logps: Tensor, branches: Tensor) -> Tensor:
    """Sum per-token log-probs over each branch: [tokens] with their branch numbers → [branches]."""
    return token_logps.new_zeros(int(branches.max()) + 1).index_add(0, branches, token_logps)
