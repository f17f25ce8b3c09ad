"""BAPOTrainer against TRL's own DPOTrainer, and what training leaves behind."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer

from bapo.adapters import AdapterCard, AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import load_base
from bapo.inference.scoring import response_logps
from bapo.training.plan import TrainingPlan
from bapo.training.run import Progress, run
from bapo.training.trainer import BAPOTrainer, PromptOrderSampler
from tests.tiny import logps_apart, write_pairs

# Two prompts; the first has three pairs that share chosen and base response. One response is one token.
ROWS = [
    {"prompt_ids": [5, 6, 7], "chosen_ids": [10, 11, 12], "rejected_ids": [20], "base_ids": [30, 31]},
    {"prompt_ids": [5, 6, 7], "chosen_ids": [10, 11, 12], "rejected_ids": [21, 22, 23, 24], "base_ids": [30, 31]},
    {"prompt_ids": [5, 6, 7], "chosen_ids": [10, 11, 12], "rejected_ids": [10, 13], "base_ids": [30, 31]},
    {"prompt_ids": [8, 9], "chosen_ids": [40], "rejected_ids": [41, 42], "base_ids": [43, 44, 45, 46, 47]},
]
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps", "ref_base_logps")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def arguments(folder, **changes) -> DPOConfig:
    values = {
        "output_dir": str(folder),
        "beta": 0.1,
        "per_device_train_batch_size": len(ROWS),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }
    return DPOConfig(**{**values, **changes})


def with_reference(base):
    rows = []
    for row in ROWS:
        logps = logps_apart(base.model, row["prompt_ids"], [row[f"{r}_ids"] for r in ("chosen", "rejected", "base")])
        rows.append({**row, **dict(zip(REFERENCES, logps.tolist(), strict=True))})
    return rows


def bapo_trainer(base, rows, folder, method="bapo", lambda_=5.0, **changes):
    return BAPOTrainer(
        base.model,
        method=method,
        lambda_=lambda_,
        args=arguments(folder, **changes),
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(**LORA),
    )


def disturb(model, seed=11):
    """Move the LoRA weights off their start, where the policy equals the base and nothing can go wrong."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def gradients(model):
    return {
        name.split(".", 2)[-1]: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def test_lambda_0_reproduces_trl_loss_and_gradients(tiny_folders, architecture, settings, tmp_path):
    at = replace(settings, base=str(tiny_folders[architecture]))
    ours_base, theirs_base = load_base(at), load_base(at)
    ours = bapo_trainer(ours_base, with_reference(ours_base), tmp_path, lambda_=0.0)

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    theirs = Tokenised(
        theirs_base.model,
        args=arguments(tmp_path),
        processing_class=theirs_base.tokenizer,
        train_dataset=Dataset.from_list([{k: v for k, v in row.items() if k != "base_ids"} for row in ROWS]),
        peft_config=LoraConfig(**LORA),
    )
    losses, grads = [], []
    for trainer, rows in ((ours, list(ours.train_dataset)), (theirs, list(theirs.train_dataset))):
        disturb(trainer.model)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        loss.backward()
        losses.append(loss.item())
        grads.append(gradients(trainer.model))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] != pytest.approx(0.6931, abs=1e-3), "at the start every DPO loss is log 2"
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_metrics_of_a_step(llama_base, tmp_path):
    rows = with_reference(llama_base)
    trainer = bapo_trainer(llama_base, rows, tmp_path, max_steps=1, logging_steps=1, learning_rate=1e-3)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "drift" in entry)
    for role in ("chosen", "rejected", "base"):
        mean = sum(row[f"ref_{role}_logps"] for row in rows) / len(rows)
        assert first[f"logps/{role}"] == pytest.approx(mean, abs=1e-3), "before the first step the policy is the base"
        assert first[f"logps_change/{role}"] == pytest.approx(0, abs=1e-4)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert {"rewards/accuracies", "rewards/margins", "loss/preference", "loss/anchor"} <= first.keys()


def test_a_row_without_its_columns_is_refused(llama_base, tmp_path):
    with pytest.raises(ValueError, match="lacks the columns base_ids"):
        bapo_trainer(
            llama_base,
            [{k: v for k, v in row.items() if k != "base_ids"} for row in with_reference(llama_base)],
            tmp_path,
        )


def test_prompts_stay_together_and_every_pair_comes_once():
    sampler = PromptOrderSampler([(1,), (2,), (1,), (3,), (2,), (1,)], [True] * 6, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(6))
    for group in ([0, 2, 5], [1, 4]):
        places = sorted(order.index(row) for row in group)
        assert places == list(range(places[0], places[0] + len(group)))
    assert list(sampler) == order
    sampler.set_epoch(1)
    epochs = {tuple(order)}
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        epochs.add(tuple(sampler))
    assert len(epochs) > 1


def test_anchor_only_prompts_are_spread_evenly():
    prompts = [(1,), (1,), (2,), (2,), (3,), (3,), (7,), (8,), (9,), (10,)]
    order = list(PromptOrderSampler(prompts, [True] * 6 + [False] * 4, seed=0))
    assert sorted(order) == list(range(10))
    assert ["a" if row >= 6 else "p" for row in order] == list("ppappappaa")
    alone = list(PromptOrderSampler(prompts[:6], [True] * 6, seed=0))
    assert [row for row in order if row < 6] == alone, "with and without anchors the pairs come in the same order"


@pytest.fixture
def pairs_file(tmp_path):
    return write_pairs(tmp_path / "pairs.jsonl", prompts=6)


def train_tiny(tiny_folders, settings, pairs_file, tell=None, **plan):
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    heard: list[Progress] = []
    values = {
        "preference": "mine",
        "pairs": str(pairs_file),
        "epochs": 3,
        "learning_rate": 5e-3,
        "held_out_share": 0.34,
    }
    folder = run(TrainingPlan(**{**values, **plan}), base, store, settings, tell or heard.append)
    return folder, store, heard


def test_a_run_installs_an_adapter_that_stock_peft_loads(tiny_folders, settings, pairs_file):
    folder, store, heard = train_tiny(tiny_folders, settings, pairs_file, epochs=6)
    assert folder == settings.adapters / "tiny-llama" / "mine-bapo"
    assert [adapter.name for adapter in store.adapters()] == ["mine-bapo"]
    assert not list(folder.parent.glob(".*")), "no half-made folder is left"

    card = AdapterCard.read(folder)
    assert (card.preference, card.method, card.training_pairs) == ("mine", "bapo", 8)
    assert (card.held_out.prompts, card.held_out.pairs) == (2, 4)
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert any(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name), "training moved it"
    assert all(p.total for p in heard)
    phases = ["base responses", "reference", "training", "evaluating", "installing"]
    assert list(dict.fromkeys(p.phase for p in heard)) == phases
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 6
    assert steps[-1]["loss/preference"] < steps[0]["loss/preference"] - 0.1

    # The card's figures are those of the adapter as stock PEFT loads it.
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    _, held_out = TrainingPlan(preference="mine", pairs=str(pairs_file), held_out_share=0.34).load_pairs()
    prompts = list(dict.fromkeys(pair.prompt for pair in held_out))
    from bapo.inference.base_responses import base_responses

    answers = base_responses(base, prompts, settings.cache)
    reference = [
        response_logps(base.model, base.model, base.encode_prompt(p), [answers[p].token_ids]).item() for p in prompts
    ]
    policy = PeftModel.from_pretrained(base.model, folder).eval()
    drifts = [
        ref - logps_apart(policy, base.encode_prompt(p), [answers[p].token_ids]).item()
        for p, ref in zip(prompts, reference, strict=True)
    ]
    assert card.held_out.drift_nats == pytest.approx(sum(drifts) / len(drifts), abs=1e-3)


def test_the_same_plan_gives_the_same_adapter(tiny_folders, settings, pairs_file):
    first, _, _ = train_tiny(tiny_folders, settings, pairs_file)
    before = (first / "adapter_model.safetensors").read_bytes()
    layers = json.loads((first / "adapter_config.json").read_text())["target_modules"]
    assert layers == sorted(layers), "a set has another order in every process"
    second, _, _ = train_tiny(tiny_folders, settings, pairs_file)
    assert second == first
    assert (second / "adapter_model.safetensors").read_bytes() == before
    third, _, _ = train_tiny(tiny_folders, settings, pairs_file, seed=1)
    assert (third / "adapter_model.safetensors").read_bytes() != before


def test_the_anchor_holds_the_base_response(tiny_folders, settings, pairs_file):
    drift = {}
    for method in ("dpo", "bapo"):
        _, store, _ = train_tiny(tiny_folders, settings, pairs_file, method=method, epochs=8)
        drift[method] = store.by_preference()["mine"][method].card.held_out.drift_nats
    assert drift["bapo"] < drift["dpo"]


class Interrupted(Exception):
    """Stands for a killed process."""


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(tiny_folders, settings, pairs_file, monkeypatch):
    monkeypatch.setattr("bapo.training.run.CHECKPOINT_STEPS", 2)
    plan = {"epochs": 4, "batch_size": 2}  # 16 steps of 4 an epoch
    whole, _, heard = train_tiny(tiny_folders, settings, pairs_file, **plan)
    weights = (whole / "adapter_model.safetensors").read_bytes()
    steps = (whole / "metrics.jsonl").read_text()
    assert heard[-1].phase == "installing"
    assert not list((settings.cache / "training").glob("*/")), "checkpoints go when the adapter is there"
    shutil.rmtree(whole)

    for stop_at in (7, 10):  # between two checkpoints, in the second epoch, and once more in the third

        def stop(progress, stop_at=stop_at):
            if progress.phase == "training" and progress.done == stop_at:
                raise Interrupted

        with pytest.raises(Interrupted):
            train_tiny(tiny_folders, settings, pairs_file, tell=stop, **plan)
        assert not whole.exists(), "nothing half-made is visible"
    resumed, _, heard = train_tiny(tiny_folders, settings, pairs_file, **plan)
    assert next(p.done for p in heard if p.phase == "training") == 8, "it starts at the last checkpoint"
    assert (resumed / "adapter_model.safetensors").read_bytes() == weights

    def figures(text):
        timed = {"epoch", "step"}
        return [{k: v for k, v in json.loads(line).items() if k in timed or "/" in k} for line in text.splitlines()]

    assert figures((resumed / "metrics.jsonl").read_text()) == figures(steps)


def test_a_second_method_starts_without_computing_the_reference_again(tiny_folders, settings, pairs_file, monkeypatch):
    train_tiny(tiny_folders, settings, pairs_file, method="dpo")
    monkeypatch.setattr("bapo.training.rows.response_logps", lambda *a: pytest.fail("computed again"))
    monkeypatch.setattr("bapo.inference.base_responses.greedy_responses", lambda *a: pytest.fail("generated again"))
    folder, _, _ = train_tiny(tiny_folders, settings, pairs_file, method="bapo", lambda_=2.0)
    assert AdapterCard.read(folder).hyperparameters["lambda_"] == 2.0


def test_accumulated_steps_equal_one_large_step(llama_base, tmp_path):
    rows = with_reference(llama_base)
    whole = bapo_trainer(llama_base, rows, tmp_path, lambda_=1.0)
    disturb(whole.model)
    whole.model.train()
    whole.compute_loss(whole.model, whole.data_collator(rows)).backward()
    expected = gradients(whole.model)
    whole.model.zero_grad()
    for part in (rows[:2], rows[2:]):
        (whole.compute_loss(whole.model, whole.data_collator(part)) / 2).backward()
    for name, grad in gradients(whole.model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_in_several_sequences_is_the_same_step(llama_base, tmp_path):
    """The token budget decides what memory holds at a time, nothing else: metrics included."""
    results = []
    for budget in (4096, 1):
        trainer = bapo_trainer(llama_base, with_reference(llama_base), tmp_path, max_steps=1, logging_steps=1)
        disturb(trainer.model)
        trainer.data_collator.budget = budget
        batch = trainer.data_collator(list(trainer.train_dataset))
        assert len(batch["parts"]) == (1 if budget == 4096 else 2)
        trainer.accelerator.gradient_accumulation_steps = trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, batch)
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        results.append((loss.item(), metrics, gradients(trainer.model)))
        llama_base.model = trainer.model.unload()
    (loss, metrics, grads), (loss_apart, metrics_apart, grads_apart) = results
    assert loss_apart == pytest.approx(loss, rel=1e-5)
    assert metrics_apart == pytest.approx(metrics, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_apart[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def test_anchor_only_prompts_add_their_anchor_and_no_preference(llama_base, tmp_path):
    rows = with_reference(llama_base)
    extra = {
        **rows[3],
        **{f"{role}_ids": rows[3]["base_ids"] for role in ("chosen", "rejected")},
        "ref_base_logps": 0.0,
    }
    extra |= {f"ref_{role}_logps": extra["ref_base_logps"] for role in ("chosen", "rejected")}
    trainer = bapo_trainer(llama_base, rows, tmp_path)
    disturb(trainer.model)
    trainer.model.eval()
    pairs, both, alone = (
        trainer.compute_loss(trainer.model, trainer.data_collator(batch)).item()
        for batch in (rows, [*rows, extra], [extra])
    )
    logp = logps_apart(trainer.model, extra["prompt_ids"], [extra["base_ids"]]).item()
    assert alone == pytest.approx(5.0 * (extra["ref_base_logps"] - logp), rel=1e-4)
    assert both == pytest.approx((pairs * len(rows) + alone) / (len(rows) + 1), rel=1e-5)
    metrics = trainer._metrics["eval"]
    assert len(metrics["rewards/accuracies"]) == 2, "a batch without pairs has no accuracy"
    assert metrics["rewards/accuracies"][0] == metrics["rewards/accuracies"][1]
    assert len(metrics["drift"]) == 3


def test_anchor_prompts_from_a_file(tiny_folders, settings, pairs_file, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("What else?\n\nAnd this?\nWhat else?\n")
    folder, _, heard = train_tiny(tiny_folders, settings, pairs_file, anchor_prompts=str(file), epochs=1)
    assert AdapterCard.read(folder).training_pairs == 8
    assert [p.total for p in heard if p.phase == "training"][-1] == 2, "ten rows, eight a step"
    with pytest.raises(BapoError, match="DPO has no anchor"):
        TrainingPlan(preference="mine", method="dpo", anchor_prompts=str(file))
    with pytest.raises(BapoError, match="one prompt a line"):
        TrainingPlan(preference="mine", anchor_prompts=str(tmp_path / "none.txt")).load_anchor_prompts()


def test_long_responses_are_cut_and_counted(tiny_folders, settings, pairs_file):
    _, _, heard = train_tiny(tiny_folders, settings, pairs_file, epochs=1, max_response_tokens=7)
    # Six of "yes N" fit with their end-of-turn token; "never N" takes eight tokens.
    assert [p.note for p in heard if p.note] == ["6 responses were cut at 7 tokens"]


def test_the_last_layers_alone(tiny_folders, settings, pairs_file):
    folder, _, _ = train_tiny(tiny_folders, settings, pairs_file, epochs=1, last_layers=1)
    layers = {name.split(".layers.")[1].split(".")[0] for name in load_file(folder / "adapter_model.safetensors")}
    assert layers == {"1"}
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    PeftModel.from_pretrained(base.model, folder)


def test_a_model_card_is_written_for_the_hub(llama_base, tmp_path):
    trainer = bapo_trainer(llama_base, with_reference(llama_base), tmp_path)
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "2407.00693" in card
    assert "bapo" in card


def test_an_architecture_without_trees_trains_on_padded_rows_and_says_so(llama_base, tmp_path, caplog):
    packed = bapo_trainer(llama_base, with_reference(llama_base), tmp_path)
    assert not caplog.records
    llama_base.model.set_attn_implementation("sdpa")
    padded = bapo_trainer(llama_base, with_reference(llama_base), tmp_path)
    assert "padded rows are used" in caplog.text
    rows = list(packed.train_dataset)
    assert "segments" in packed.data_collator(rows)["parts"][0]["sequence"]
    assert "segments" not in padded.data_collator(rows)["parts"][0]["sequence"]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"method": "ppo"}, "choose one of dpo, bapo"),
        ({"lambda_": -1}, "lambda must be 0 or more"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"held_out_share": 1.0}, "held-out share"),
    ],
)
def test_impossible_plans_are_refused(wrong, sentence):
    with pytest.raises(BapoError, match=sentence):
        TrainingPlan(preference="P2A", **wrong)


def test_unknown_preferences_need_pairs_and_names_stay_inside_the_store(tiny_folders, settings, pairs_file):
    with pytest.raises(BapoError, match="--pairs FILE"):
        TrainingPlan(preference="mine").load_pairs()
    with pytest.raises(BapoError, match="letters, digits"):
        train_tiny(tiny_folders, settings, pairs_file, preference="../../etc")
