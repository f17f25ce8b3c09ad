"""A batch of preference pairs as prompt trees: what prompts and pairs share is computed once."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bapo.inference.prefix_tree import PromptTree, stack_trees

ROLES = ("chosen", "rejected", "base")


def collate_packed_pairs(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate tokenised pairs into trees with a shared prefix (see `bapo.inference.prefix_tree`).

    Pairs of one prompt share a tree, and equal responses of that prompt share a branch: K pairs with
    the same chosen and base response cost 1 + K + 1 branches, not 3K. The loss stays that of the
    pairs, because each refers to its branches by number.

    Takes dicts with `prompt_ids`, `chosen_ids`, `rejected_ids`, `base_ids` and the three
    `ref_*_logps`. Returns the tensors of `stack_trees`, plus, each of shape [pairs]:
    `chosen_branch`, `rejected_branch`, `base_branch` and the three `ref_*_logps`.
    """
    # dicts as ordered sets: prompt → response → branch number inside the prompt's tree
    trees: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
    for example in examples:
        branches = trees.setdefault(tuple(example["prompt_ids"]), {})
        for role in ROLES:
            branches.setdefault(tuple(example[f"{role}_ids"]), len(branches))
    batch = stack_trees([PromptTree.grow(prompt, list(branches)) for prompt, branches in trees.items()])
    counts = [len(branches) for branches in trees.values()]
    first = dict(zip(trees, [0, *accumulate(counts)], strict=False))  # a prompt's first branch in the batch
    for role in ROLES:
        numbers = []
        for example in examples:
            prompt = tuple(example["prompt_ids"])
            numbers.append(first[prompt] + trees[prompt][tuple(example[f"{role}_ids"])])
        batch[f"{role}_branch"] = torch.tensor(numbers)
        batch[f"ref_{role}_logps"] = torch.tensor([example[f"ref_{role}_logps"] for example in examples])
    return batch
