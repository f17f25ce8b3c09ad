"""The benchmark's folds, and what it counts."""

from dataclasses import replace

import pytest

from bapo.adapters import AdapterCard, HeldOut
from bapo.inference.base import load_base
from bapo.inference.base_responses import BaseResponse
from bapo.pairs import hash_of, own_pairs, preference_set
from bapo.training.plan import catalogue_plans
from bapo.training.run import run
from benchmarks import cross_validation
from benchmarks.cross_validation import FOLDS, fold_plan, row, trained, wrong

PLANS = {(plan.preference, plan.method): plan for plan in catalogue_plans()}


@pytest.mark.parametrize(("preference", "others"), [("business", 4), ("P2A", 1)])
def test_every_training_prompt_is_evaluated_once_and_never_trained_beside(preference, others):
    training_prompts = [item.prompt for item in preference_set() if not item.held_out]
    evaluated = []
    for fold in range(FOLDS):
        plan = fold_plan(PLANS[preference, "bapo"], fold)
        training, held_out = plan.load_pairs()
        inside, outside = {pair.prompt for pair in training}, {pair.prompt for pair in held_out}
        assert (len(inside), len(outside), len(held_out)) == (99, 33, 33 * others)
        assert not inside & outside
        assert set(training) < set(own_pairs(preference, held_out=False))
        evaluated += outside
        # A step has as many pairs and anchors as the recipe's, so that there are a quarter fewer of them.
        assert round((len(training) + len(plan.load_anchor_prompts())) / plan.batch_size) == 25
    assert sorted(evaluated) == sorted(training_prompts)


def test_the_folds_are_those_of_both_methods_and_their_plans_differ():
    dpo, bapo = (fold_plan(PLANS["academy", method], 2) for method in ("dpo", "bapo"))
    assert dpo.load_pairs() == bapo.load_pairs()
    assert dpo.load_anchor_prompts() == []
    assert len({fold_plan(PLANS["academy", "dpo"], fold).key() for fold in range(FOLDS)}) == FOLDS


def card_with(prompts, pairs, accuracy, drift):
    return AdapterCard(
        base="b",
        base_fingerprint="f",
        preference="x",
        method="dpo",
        hyperparameters={},
        data_sha256="s",
        training_pairs=3,
        held_out=HeldOut(
            prompts=prompts, pairs=pairs, reward_accuracy=accuracy, drift_nats=drift, drift_per_token=drift / 100
        ),
        versions={},
    )


def test_wrong_pairs_are_counted_and_drift_is_weighted_by_prompts():
    cards = [card_with(33, 132, 129 / 132, 2.0), card_with(11, 44, 1.0, 6.0)]
    assert list(map(wrong, cards)) == [3, 0]
    assert row("x", "dpo", cards) == "| x | dpo | 3 of 176 | 3, 0 | +3.0 |"


def test_a_fold_is_trained_once_and_again_when_its_plan_changes(tiny_folders, settings, monkeypatch):
    def short_answers(base, prompts, cache, progress):
        return {prompt: BaseResponse([65, 66, base.end_of_turn], "AB", True) for prompt in prompts}

    runs = []
    monkeypatch.setattr("bapo.training.rows.base_responses", short_answers)
    monkeypatch.setattr(cross_validation, "run", lambda plan, *more: runs.append(plan) or run(plan, *more))
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    plan = replace(fold_plan(PLANS["business", "dpo"], 1), epochs=0.02, last_layers=None, max_response_tokens=8)
    card = trained(plan, base, settings)
    assert (card.training_pairs, card.held_out.pairs, card.data_sha256) == (99, 132, hash_of(plan.load_pairs()[0]))
    assert trained(plan, base, settings) == card
    assert len(runs) == 1
    assert trained(replace(plan, beta=0.2), base, settings).hyperparameters["beta"] == 0.2
    assert runs == [plan, replace(plan, beta=0.2)]
