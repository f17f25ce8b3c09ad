"""One packed pass against its brute-force twin: every triple padded and run on its own."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention.flex_attention import create_mask, flex_attention

import bapo.inference.token_logps as token_logps_module
from bapo.inference.base import load_base
from bapo.inference.prefix_tree import PromptTree, pack_trees
from bapo.inference.scoring import _on, branch_logps, response_logps
from bapo.inference.token_logps import BLOCK, token_logps
from bapo.inference.tree_attention import Limits, _attend_by_segment, _TreeAttention, block_mask, limits_of
from bapo.training.fused_layer import fuse_layers
from bapo.training.lora_linear import FusedLoraLinear
from bapo.training.objectives import Logps, bapo
from bapo.training.packing import ROLES, PairCollator, computed_tokens
from tests.tiny import logps_apart

TREES = Limits(trees=True, window=None, rope_switch=None)
BETA, LAMBDA = 0.1, 5.0


def policy_of(base, seed=3):
    """The base under a LoRA adapter far from its start, where the policy is the base and nothing can go wrong."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    lora._register_custom_module({nn.Linear: FusedLoraLinear})
    fuse_layers(base.model)
    policy = get_peft_model(base.model, lora)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(policy.named_parameters()):
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1
    return policy.train()


def rows_of(rejected_counts, lengths, seed=0):
    """Rows of pairs: a group for each entry of `rejected_counts`, responses of the lengths given in turn."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(0, 250, (count,), generator=generator).tolist()

    sizes = iter(lengths * 20)
    rows = []
    for rejected in rejected_counts:
        prompt, chosen, base = tokens(next(sizes) + 1), tokens(next(sizes)), tokens(next(sizes))
        for _ in range(rejected):
            row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": tokens(next(sizes)), "base_ids": base}
            # References near what the tiny model says, so that the anchor is on in some rows and off in others.
            rows.append({**row, **{f"ref_{role}_logps": -5.0 * len(row[f"{role}_ids"]) - len(rows) for role in ROLES}})
    return rows


def packed(policy, rows, budget=4096, limits=None):
    """(loss, logps by role in the order of the rows) of the packed pass."""
    batch = PairCollator(limits or limits_of(policy), budget)(rows)
    losses, scored = [], []
    for part in batch["parts"]:
        sequence = {name: _on(policy.device, value) for name, value in part["sequence"].items()}
        logps = branch_logps(policy, policy, sequence, part["late"])
        own = Logps(*(logps[part[f"{role}_branch"]] for role in ROLES))
        reference = Logps(*(part[f"ref_{role}_logps"].to(logps) for role in ROLES))
        losses.append(part["share"] * bapo(own, reference, BETA, LAMBDA).mean())
        scored.append((own, part["ref_rejected_logps"]))
    # Parts come in an order of their own; the rows' references tell which is which.
    order = [float(torch.tensor(row["ref_rejected_logps"])) for row in rows]
    places = [order.index(value) for _, references in scored for value in references.tolist()]
    back = torch.tensor(places).argsort()
    return sum(losses), Logps(*(torch.cat(parts)[back] for parts in zip(*(own for own, _ in scored), strict=True)))


def apart(policy, rows):
    """The same from one padded batch of three plain rows for each pair."""
    losses, scored = [], []
    for row in rows:
        whole = [row["prompt_ids"] + row[f"{role}_ids"] for role in ROLES]
        width = max(map(len, whole))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in whole])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in whole])
        logits = policy(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        start = len(row["prompt_ids"])
        logps = [sum(logits[i, j - 1, one[j]] for j in range(start, len(one))) for i, one in enumerate(whole)]
        margin = BETA * ((logps[0] - row["ref_chosen_logps"]) - (logps[1] - row["ref_rejected_logps"]))
        losses.append(torch.log1p(torch.exp(-margin)) + LAMBDA * torch.clamp(row["ref_base_logps"] - logps[2], min=0))
        scored.append(torch.stack(logps))
    return torch.stack(losses).mean(), Logps(*torch.stack(scored).T)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def compare(policy, rows, dtype, budget=4096):
    policy.to(dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    (loss, logps), (twin_loss, twin_logps) = packed(policy, rows, budget), apart(policy, rows)
    torch.testing.assert_close(loss, twin_loss, **tolerance)
    for role, one, twin in zip(ROLES, logps, twin_logps, strict=True):
        torch.testing.assert_close(one, twin, **tolerance, msg=role)
    grads, twin_grads = gradients(policy, loss), gradients(policy, twin_loss)
    largest = max(grad.abs().max().item() for grad in twin_grads.values())
    assert largest > 1e-2
    for name, grad in grads.items():
        # Relative to the largest gradient: some entries are sums that cancel to nothing.
        torch.testing.assert_close(grad / largest, twin_grads[name] / largest, rtol=0, atol=tolerance["atol"], msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("rejected", [1, 4, 5])
def test_a_group_equals_its_triples_apart(tiny_base, norms_in_double, rejected, dtype):
    compare(policy_of(tiny_base), rows_of([rejected], [5, 1, 9, 3, 12, 7, 1, 20]), dtype)


@pytest.mark.parametrize("budget", [4096, 60], ids=["one sequence", "several"])
def test_several_groups_equal_their_triples_apart(tiny_base, norms_in_double, budget):
    rows = rows_of([4, 1, 2], [6, 11, 3, 1, 14])
    batch = PairCollator(limits_of(tiny_base.model), budget)(rows)
    assert len(batch["parts"]) == (1 if budget == 4096 else 3)
    compare(policy_of(tiny_base), rows, torch.float64, budget)


def test_both_rope_regimes_of_phi3_in_one_batch(tiny_folders, settings, norms_in_double):
    """Beyond 256 positions the tiny Phi-3 takes its long factors: by the branch, not by the packed length."""
    base = load_base(replace(settings, base=str(tiny_folders["phi3"])))
    short, long = rows_of([4], [6, 70, 80, 75, 66, 71, 90]), rows_of([2], [6, 261, 265, 263, 270], seed=1)
    assert sum(len(row["rejected_ids"]) for row in short) > 256
    batch = PairCollator(limits_of(base.model))([*short, *long])
    assert [part["sequence"]["input_ids"].shape[1] > 700 for part in batch["parts"]] == [False, True]
    compare(policy_of(base), [*short, *long], torch.float64)


def test_the_order_of_rejected_responses_changes_nothing(tiny_base):
    policy = policy_of(tiny_base).double()
    rows = rows_of([5], [6, 11, 3, 1, 14])
    loss, logps = packed(policy, rows)
    turned, turned_logps = packed(policy, [rows[i] for i in (3, 0, 4, 2, 1)])
    assert loss.item() == pytest.approx(turned.item(), abs=1e-12)
    torch.testing.assert_close(logps.rejected[[3, 0, 4, 2, 1]], turned_logps.rejected, rtol=0, atol=1e-12)


def test_sliding_windows_and_strange_architectures_take_padded_rows(tiny_base, norms_in_double):
    rows = rows_of([3, 1], [6, 11, 3, 1, 14])
    policy = policy_of(tiny_base).double()
    expected, _ = packed(policy, rows)
    for limits in (Limits(False, None, None), Limits(True, 8, None)):
        assert all("segments" not in part["sequence"] for part in PairCollator(limits)(rows)["parts"])
        loss, _ = packed(policy, rows, limits=limits)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    some = PairCollator(Limits(True, 24, None))(rows)
    assert ["segments" in part["sequence"] for part in some["parts"]] == [False, True], "by the length of the group"


def test_a_response_that_logits_are_softcapped_for(llama_base, monkeypatch):
    """Models that do more than project (Cohere's and Gemma 2's settings) are asked for their own logits."""
    model, head = llama_base.model, llama_base.model.get_output_embeddings()
    plain = response_logps(model, model, [5, 6], [[7, 8], [9]])
    model.config.final_logit_softcapping = 30.0
    asked = []
    hook = head.register_forward_hook(lambda module, inputs, output: asked.append(output.shape[0]))
    through_logits = response_logps(model, model, [5, 6], [[7, 8], [9]])
    hook.remove()
    assert asked == [3]
    torch.testing.assert_close(through_logits, plain, rtol=0, atol=1e-4)


def test_packing_saves_what_pairs_share():
    rows = rows_of([4], [1])
    same = {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "base_ids": [8]}
    rows = [{**row, **same, "rejected_ids": [6, 7, n]} for n, row in enumerate(rows)]
    assert computed_tokens(PairCollator(TREES)(rows)) == (3 - 1) + 2 + 4 * 3 + 1
    anchor_only = {**rows[0], "chosen_ids": [8], "rejected_ids": [8]}
    batch = PairCollator(TREES)([anchor_only])
    assert computed_tokens(batch) == 3
    assert batch["parts"][0]["chosen_branch"].equal(batch["parts"][0]["rejected_branch"])


def test_late_positions_are_those_of_anchors_alone():
    prompt, chosen, rejected, base = [1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11, 12]

    def late(budget, *triples):
        rows = [
            {**dict(zip(["prompt_ids", *(f"{role}_ids" for role in ROLES)], triple, strict=True))}
            | {f"ref_{role}_logps": 0.0 for role in ROLES}
            for triple in triples
        ]
        return [part["late"] for part in PairCollator(TREES, budget)(rows)["parts"]]

    other = ([3, 2, 1], rejected, chosen, [13] * 6)
    assert late(99, (prompt, chosen, rejected, base)) == [4]
    assert late(99, (prompt, chosen, rejected, base), other) == [10], "all groups' base responses stand at the end"
    assert late(1, (prompt, chosen, rejected, base), other) == [4, 6]
    assert late(99, (prompt, base, rejected, base)) == [0], "the base response is preferred"
    assert late(99, (prompt, base, base, base)) == [4], "nothing is preferred"
    assert late(99, (prompt, chosen, rejected, base), ([3, 2, 1], base, base, base)) == [8]


@pytest.mark.parametrize("late", [0, 4, 9])
def test_token_logps_and_their_gradient_against_the_whole_softmax(late, monkeypatch):
    torch.manual_seed(0)
    words = 2 * BLOCK + 5
    head = nn.Linear(6, words, bias=True).double().requires_grad_(False)
    hidden = 10 * torch.randn(9, 6, dtype=torch.float64)  # far apart: the largest logits outweigh all before them
    hidden.requires_grad_()
    labels = torch.tensor([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, words - 1, 77])
    assert len((head(hidden).argmax(1) // BLOCK).unique()) >= 2, "largest logits in several blocks"
    upstream = torch.randn(9, dtype=torch.float64)
    upstream[[1, 6, 8]] = 0
    whole = head(hidden).log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    (expected,) = torch.autograd.grad(whole @ upstream, hidden)
    visits = []
    visit = token_logps_module._over_the_vocabulary
    monkeypatch.setattr(
        token_logps_module, "_over_the_vocabulary", lambda *args: visits.append(args[4]) or visit(*args)
    )
    blockwise = token_logps(hidden, head, labels, late)
    (gradient,) = torch.autograd.grad(blockwise @ upstream, hidden)
    torch.testing.assert_close(blockwise, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert visits == [9 - late, int(upstream[9 - late :].count_nonzero())][: 1 + bool(late)]
    blockwise = token_logps(hidden, head, labels, late)
    blockwise[: 9 - late].sum().backward()
    assert visits[-1] == 9 - late and not hidden.grad[9 - late :].any(), "nothing asked for a late one's gradient"
    with pytest.raises(ValueError, match="is trained"):
        token_logps(hidden, head.requires_grad_(True), labels)


def test_late_gradients_are_the_early_ones_where_a_device_trains_in_16_bits():
    """States are then bfloat16, and log-probs with their gradient float32."""
    torch.manual_seed(0)
    head = nn.Linear(6, 50, bias=False).bfloat16().requires_grad_(False)
    hidden, labels = torch.randn(9, 6).bfloat16().requires_grad_(), torch.arange(9)
    early, late = (torch.autograd.grad(token_logps(hidden, head, labels, n).sum(), hidden)[0] for n in (0, 9))
    assert early.any(1).all()
    torch.testing.assert_close(late, early, rtol=0.02, atol=0.002)


# (prefix, its length, own, its length): the second has a group without a prefix, and of another the last branch at the
# end; the third is longer than the kernels' blocks, and no multiple of their tiles.
SEGMENTS = {
    "one group": [(0, 0, 0, 3), (0, 3, 3, 2), (0, 3, 5, 5)],
    "two groups": [(0, 0, 0, 4), (4, 0, 4, 2), (4, 2, 6, 1), (4, 2, 7, 1), (4, 2, 8, 3)],
    "a branch at the end": [(0, 0, 0, 2), (0, 2, 2, 3), (5, 0, 5, 4), (5, 4, 9, 2), (0, 2, 11, 3)],
    "long": [(0, 0, 0, 53), (0, 53, 53, 101), (0, 53, 154, 47)],
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("without", [slice(0), slice(3, 5), slice(0, 3), slice(None)])
@pytest.mark.parametrize("width", [8, 16, 40])
def test_the_cpus_way_back_through_a_tree_is_autograds(segments, without, width):
    """Also where the loss does not depend on some positions: of such a branch it is left out."""
    torch.manual_seed(0)
    total = max(own + length for _, _, own, length in segments)
    states = [torch.randn(2, heads, total, width, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2)]
    upstream = torch.randn(2, total, 6, width, dtype=torch.float64)
    upstream[:, without] = 0
    results = []
    for attend in (_TreeAttention.apply, _attend_by_segment):
        output = attend(*states, 0.3, segments)
        results.append([output, *torch.autograd.grad((output * upstream).sum(), states)])
    for ours, autograds in zip(*results, strict=True):
        torch.testing.assert_close(ours, autograds, rtol=0, atol=1e-12)


def test_attention_to_large_scores_in_float32():
    """Scores of hundreds, as some heads have them: nothing overflows, and what a query may not see stays without
    weight, even where its score is the largest."""
    torch.manual_seed(0)
    segments = SEGMENTS["long"]
    states = [60 * torch.randn(1, heads, 201, 16) for heads in (2, 1, 1)]
    ours, exact = (
        attend(*(part.to(dtype) for part in states), 0.1, segments)
        for attend, dtype in ((_TreeAttention.apply, torch.float32), (_attend_by_segment, torch.float64))
    )
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=60 * 1e-3)


def test_the_block_mask_of_flex_attention_is_the_same_attention():
    """On CUDA the same tree runs as a block mask; here its pattern is compared, and its eager attention."""
    trees = [PromptTree.grow([1, 2, 3], [[4, 5], [6]]), PromptTree.grow([7], [[8, 9, 10]])]
    batch = pack_trees(trees)
    mask = block_mask(batch["segments"], torch.device("cpu"))
    dense = create_mask(mask.mask_mod, 1, 1, 8, 8, device="cpu")[0, 0]
    rows = ["1.......", "11......", "111.....", "1111....", "11..1...", ".....1..", ".....11.", ".....111"]
    assert ["".join("1" if seen else "." for seen in row) for row in dense.tolist()] == rows
    query, key, value = torch.randn(3, 1, 2, 8, 16)
    eager = flex_attention(query, key, value, block_mask=mask)
    plain = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(eager, plain, rtol=0, atol=1e-5)


def test_the_base_alone_scores_like_separate_passes(tiny_base):
    responses = [[9, 8, 7], [33], [60, 61, 62, 63, 64, 65]]
    scored = response_logps(tiny_base.model, tiny_base.model, [5, 17, 3], responses)
    torch.testing.assert_close(scored, logps_apart(tiny_base.model, [5, 17, 3], responses), rtol=0, atol=1e-4)
