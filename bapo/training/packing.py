"""A batch of preference pairs as packed prompt groups: what prompts and pairs share is computed once."""

from itertools import accumulate
from typing import Any

import torch

from bapo.inference.prefix_tree import PREFIX, Batch, PromptTree, pack_trees, pad_trees
from bapo.inference.tree_attention import Limits

ROLES = ("chosen", "rejected", "base")
TOKEN_BUDGET = 1024  # positions computed together; a larger group stays whole


class PairCollator:
    """Collates tokenised pairs into packed sequences (see `bapo.inference.prefix_tree`).

    Pairs of one prompt share a group, and equal responses of that prompt share a branch: K pairs with
    the same chosen and base response cost 1 + K + 1 branches, not 3K. The loss stays that of the
    pairs, because each refers to its branches by number. An anchor-only prompt is a row whose chosen
    and rejected response are its base response: one branch, and a margin of zero.
    """

    def __init__(self, limits: Limits, budget: int = TOKEN_BUDGET):
        self.limits = limits
        self.budget = budget

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Collate dicts with `prompt_ids`, `chosen_ids`, `rejected_ids`, `base_ids` and the three `ref_*_logps`.

        Returns `parts`, one for each packed sequence: `sequence`, a batch for `branch_logps`; `share`,
        the part's share of the pairs; `late`, how many predicting positions at the end belong to anchors alone; and,
        each of shape [pairs of the part], `chosen_branch`, `rejected_branch` and `base_branch`, which number the
        sequence's branches, and the `ref_*_logps`.
        """
        # dicts as ordered sets: prompt → response → branch number inside the prompt's group
        groups: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        pairs: dict[tuple[int, ...], list[dict[str, Any]]] = {}
        for example in examples:
            prompt = tuple(example["prompt_ids"])
            pairs.setdefault(prompt, []).append(example)
            branches = groups.setdefault(prompt, {})
            for role in ("chosen", "rejected"):
                branches.setdefault(tuple(example[f"{role}_ids"]), len(branches))
        # Base responses come last: slack anchors have no gradient, and what has one is then in one piece.
        for example in examples:
            branches = groups[tuple(example["prompt_ids"])]
            branches.setdefault(tuple(example["base_ids"]), len(branches))
        trees = {prompt: PromptTree.grow(prompt, list(branches)) for prompt, branches in groups.items()}
        parts = []
        for prompts in self._sequences(trees):
            first = accumulate((len(groups[prompt]) for prompt in prompts), initial=0)
            part: dict[str, Any] = {"sequence": self._lay_out([trees[prompt] for prompt in prompts])}
            offsets = dict(zip(prompts, first, strict=False))
            own = [(prompt, example) for prompt in prompts for example in pairs[prompt]]
            for role in ROLES:
                numbers = [offsets[prompt] + groups[prompt][tuple(example[f"{role}_ids"])] for prompt, example in own]
                part[f"{role}_branch"] = torch.tensor(numbers)
                part[f"ref_{role}_logps"] = torch.tensor([example[f"ref_{role}_logps"] for _, example in own])
            parts.append({**part, "share": len(own) / len(examples), "late": _late(part)})
        return {"parts": parts}

    def _sequences(self, trees: dict[tuple[int, ...], PromptTree]) -> list[list[tuple[int, ...]]]:
        """Prompts that go together: of one regime, alike in length, within the budget."""
        sequences: list[list[tuple[int, ...]]] = []
        used, current = 0, None
        for prompt in sorted(trees, key=lambda prompt: (self.limits.regime(trees[prompt]), trees[prompt].longest)):
            tree, regime = trees[prompt], self.limits.regime(trees[prompt])
            if not sequences or regime != current or used + len(tree) > self.budget:
                sequences.append([])
                used, current = 0, regime
            sequences[-1].append(prompt)
            used += len(tree)
        return sequences

    def _lay_out(self, trees: list[PromptTree]) -> Batch:
        return (pack_trees if all(map(self.limits.pack, trees)) else pad_trees)(trees)


def _late(part: dict[str, Any]) -> int:
    """Predicting positions behind the last response that a pair prefers or rejects."""
    branches, chosen, rejected = part["sequence"]["branches"], part["chosen_branch"], part["rejected_branch"]
    paired = chosen != rejected
    early = torch.isin(branches[branches != PREFIX], torch.cat([chosen[paired], rejected[paired]])).nonzero()
    return int((branches != PREFIX).sum()) - (int(early.max()) + 1 if len(early) else 0)


def computed_tokens(batch: dict[str, Any]) -> int:
    """Positions that a collated batch sends through the model, padding included."""
    return sum(part["sequence"]["input_ids"].numel() for part in batch["parts"])


def predicted_tokens(batch: dict[str, Any]) -> int:
    """Positions of a collated batch at which the vocabulary is projected."""
    return sum(int((part["sequence"]["branches"] != PREFIX).sum()) for part in batch["parts"])
