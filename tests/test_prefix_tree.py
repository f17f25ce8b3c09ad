"""One sequence with a shared prefix gives the log-probs of the responses run apart."""

import pytest
import torch

from bapo.inference.prefix_tree import PREFIX, PromptTree, pack_trees, pad_trees
from bapo.inference.scoring import branch_logps, response_logps
from tests.tiny import logps_apart

PROMPT = [5, 17, 3, 80, 41]
RESPONSES = [[9, 8, 7], [33], [60, 61, 62, 63, 64, 65], [9, 8, 7, 6]]


def test_a_tree_by_hand():
    tree = PromptTree.grow([1, 2, 3], [[10, 11], [20]])
    assert tree.token_ids == [1, 2, 3, 10, 3]
    assert tree.positions == [0, 1, 2, 3, 2]
    assert tree.branches == [PREFIX, PREFIX, 0, 0, 1]
    assert tree.labels == [10, 11, 20]
    assert tree.lengths == (2, 2, 1)


def test_packed_trees_number_their_branches_through_the_sequence():
    trees = [PromptTree.grow([1, 2], [[10], [20]]), PromptTree.grow([3], [[30, 31]])]
    batch = pack_trees(trees)
    assert batch["input_ids"].tolist() == [[1, 2, 2, 3, 30]]
    assert batch["position_ids"].tolist() == [[0, 1, 1, 0, 1]]
    assert batch["branches"].tolist() == [[-1, 0, 1, 2, 2]]
    assert batch["labels"].tolist() == [10, 20, 30, 31]
    assert batch["segments"] == [(0, 0, 0, 1), (0, 1, 1, 1), (0, 1, 2, 1), (2, 0, 3, 2)]
    assert [tree.longest for tree in trees] == [2, 2]


def test_the_last_branches_of_all_trees_stand_at_the_end():
    batch = pack_trees([PromptTree.grow([1, 2], [[10], [20, 21]]), PromptTree.grow([3, 4, 5], [[30], [40, 41]])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 2, 20, 5, 40]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 1, 2, 2, 3]]
    assert batch["branches"].tolist() == [[-1, 0, -1, -1, 2, 1, 1, 3, 3]]
    assert batch["labels"].tolist() == [10, 30, 20, 21, 40, 41]
    own = [(0, 0, 0, 1), (0, 1, 1, 1), (2, 0, 2, 2), (2, 2, 4, 1), (0, 1, 5, 2), (2, 2, 7, 2)]
    assert batch["segments"] == own


def test_padded_trees_repeat_the_prefix():
    batch = pad_trees([PromptTree.grow([1, 2], [[10], [20]]), PromptTree.grow([3], [[30, 31, 32]])])
    assert batch["input_ids"].tolist() == [[1, 2, 0], [1, 2, 0], [3, 30, 31]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["branches"].tolist() == [[-1, 0, -1], [-1, 1, -1], [2, 2, 2]]
    assert batch["labels"].tolist() == [10, 20, 30, 31, 32]


def test_empty_prompts_and_responses_are_refused():
    for prompt, responses in (([], [[1]]), ([1], [[1], []])):
        with pytest.raises(ValueError, match="at least one token"):
            PromptTree.grow(prompt, responses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logps_equal_those_of_separate_sequences(tiny_base, dtype):
    model = tiny_base.model.to(dtype)
    packed = response_logps(model, model, PROMPT, RESPONSES)
    apart = logps_apart(model, PROMPT, RESPONSES)
    assert packed.dtype == dtype
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-4)


def test_both_rope_regimes_of_phi3(tiny_folders, settings):
    # Beyond 256 positions the tiny Phi-3 switches to its long factors: by the branch, not the packed length.
    from dataclasses import replace

    from bapo.inference.base import load_base

    base = load_base(replace(settings, base=str(tiny_folders["phi3"])))
    model = base.model.double()
    generator = torch.Generator().manual_seed(0)
    short = [torch.randint(0, 250, (90,), generator=generator).tolist() for _ in range(4)]
    torch.testing.assert_close(
        response_logps(model, model, PROMPT, short), logps_apart(model, PROMPT, short), rtol=0, atol=1e-9
    )
    long = [torch.randint(0, 250, (n,), generator=generator).tolist() for n in (270, 280)]
    torch.testing.assert_close(
        response_logps(model, model, PROMPT, long), logps_apart(model, PROMPT, long), rtol=0, atol=1e-9
    )


def test_a_token_changed_in_one_branch_changes_no_other(llama_base):
    before = response_logps(llama_base.model, llama_base.model, PROMPT, RESPONSES)
    changed = [RESPONSES[0], RESPONSES[1], [60, 61, 99, 63, 64, 65], RESPONSES[3]]
    after = response_logps(llama_base.model, llama_base.model, PROMPT, changed)
    assert before[2] != after[2]
    assert before[[0, 1, 3]].tolist() == after[[0, 1, 3]].tolist()


def test_several_trees_in_a_batch_equal_each_alone(tiny_base):
    model = tiny_base.model.double()
    groups = [(PROMPT, RESPONSES[:2]), ([7, 7], RESPONSES[2:])]
    batch = pack_trees([PromptTree.grow(*group) for group in groups])
    with torch.no_grad():
        together = branch_logps(model, model, batch)
    alone = torch.cat([response_logps(model, model, *group) for group in groups])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
