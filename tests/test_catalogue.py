"""Training the whole catalogue: one after another, skipping what is there, going on where it was cut off."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bapo.adapters import AdapterStore
from bapo.cli import main
from bapo.inference.base import EMBEDDED, load_base
from bapo.pairs import hash_of, preference_set, read_prompts
from bapo.preferences import CATALOGUE
from bapo.settings import REPOSITORY
from bapo.training import catalogue
from bapo.training.catalogue import missing_plans, train_all
from bapo.training.plan import ANCHOR_PROMPTS, TrainingPlan, catalogue_plans


def test_every_preference_under_every_method():
    plans = catalogue_plans()
    assert len(plans) == 20
    assert {(plan.preference, plan.method) for plan in plans} == {(p, m) for p in CATALOGUE for m in ("dpo", "bapo")}
    # Both methods of a preference differ in the anchor alone: their figures are compared.
    for dpo, bapo in zip(plans[::2], plans[1::2], strict=True):
        anchored = {"anchor_prompts": bapo.anchor_prompts, "batch_size": bapo.batch_size}
        assert replace(dpo, method="bapo", **anchored) == bapo
    for plan in plans:
        pairs, held_out = plan.load_pairs()
        anchors = plan.load_anchor_prompts()
        assert (len(pairs), len(held_out)) == (132, 34 if plan.preference.startswith("P") else 34 * 4)
        assert len(anchors) == (66 if plan.method == "bapo" else 0)
        steps = plan.epochs * (len(pairs) + len(anchors)) / plan.batch_size
        assert steps == 33, "a step has as many pairs under both methods"


def test_anchor_prompts_are_neither_trained_nor_asked():
    anchors = set(map(str.lower, read_prompts(ANCHOR_PROMPTS)))
    facts = (REPOSITORY / "benchmarks" / "facts.jsonl").read_text().splitlines()
    assert not anchors & {json.loads(line)["question"].lower() for line in facts}
    assert not anchors & {item.prompt.lower() for item in preference_set()}


def test_the_shipped_adapters_are_those_of_the_recipe():
    folder = REPOSITORY / "adapters" / EMBEDDED
    for plan in catalogue_plans():
        adapter = folder / f"{plan.preference}-{plan.method}"
        card = json.loads((adapter / "bapo.json").read_text())
        pairs, held_out = plan.load_pairs()
        assert card["hyperparameters"] == plan.hyperparameters() | {"anchor_prompts": len(plan.load_anchor_prompts())}
        assert card["data_sha256"] == hash_of(pairs), "trained on the pairs that are shipped"
        assert card["held_out"]["pairs"] == len(held_out)
        tensors = load_file(adapter / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert len(list(folder.iterdir())) == 20
    assert sum(file.stat().st_size for file in folder.glob("*/*")) <= 60e6


@pytest.fixture
def few_plans(monkeypatch):
    """Two small plans in the place of twenty."""
    plans = [
        TrainingPlan(preference="literature", method=m, epochs=0.02, batch_size=3, max_response_tokens=8)
        for m in ("dpo", "bapo")
    ]
    monkeypatch.setattr(catalogue, "catalogue_plans", lambda: plans)
    monkeypatch.setattr("bapo.training.rows.base_responses", _short_answers)
    return plans


def _short_answers(base, prompts, cache, progress):
    from bapo.inference.base_responses import BaseResponse

    return {prompt: BaseResponse([65, 66, base.end_of_turn], "AB", True) for prompt in prompts}


def test_all_trains_what_is_missing_and_then_nothing(tiny_folders, settings, few_plans):
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    heard = []

    def cut_off(progress):
        if progress.phase.startswith("literature-bapo (2 of 2): training") and progress.done > 1300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(base, store, settings, cut_off)
    assert [adapter.name for adapter in store.adapters()] == ["literature-dpo"]
    assert missing_plans(store) == few_plans[1:]

    again = load_base(replace(settings, base=str(tiny_folders["llama"])))
    assert train_all(again, store, settings, heard.append) == ["literature-bapo"]
    assert [adapter.name for adapter in store.adapters()] == ["literature-bapo", "literature-dpo"]
    assert heard[-1].done == heard[-1].total == 1000
    done = [progress.done for progress in heard]
    assert done == sorted(done), "one bar that only grows"
    assert any(progress.eta_seconds for progress in heard)
    assert train_all(again, store, settings, heard.append) == []


def test_all_takes_no_other_settings(capsys):
    assert main(["train", "--all", "--epochs", "2"]) == 2
    assert "leave the others out" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--preference" in capsys.readouterr().err
