"""BAPOTrainer against TRL's own DPOTrainer, and what training leaves behind."""

import json
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
from bapo.training.run import Progress, TrainingPlan, run
from bapo.training.trainer import BAPOTrainer, PromptOrderSampler
from tests.tiny import logps_apart

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


def test_packed_bapo_equals_separate_triples(tiny_base, tmp_path):
    """Loss and LoRA gradients in float64 against the equations applied to one plain forward pass a response."""
    tiny_base.model.double()
    trainer = bapo_trainer(tiny_base, with_reference(tiny_base), tmp_path)
    disturb(trainer.model)
    trainer.model.double().train()
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    assert batch["branches"].max() + 1 == 5 + 3, "chosen and base response of a prompt are computed once"
    packed = trainer.compute_loss(trainer.model, batch)
    packed.backward()
    packed_grads = gradients(trainer.model)
    trainer.model.zero_grad()

    losses = []
    for i, row in enumerate(rows):
        logps = {}
        for role in ("chosen", "rejected", "base"):
            ids = row["prompt_ids"] + row[f"{role}_ids"]
            logits = trainer.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            logps[role] = sum(logits[j - 1, ids[j]] for j in range(start, len(ids)))
        ref = {role: batch[f"ref_{role}_logps"][i] for role in logps}
        margin = 0.1 * ((logps["chosen"] - ref["chosen"]) - (logps["rejected"] - ref["rejected"]))
        losses.append(torch.log1p(torch.exp(-margin)) + 5.0 * torch.clamp(ref["base"] - logps["base"], min=0))
    apart = torch.stack(losses).mean()
    apart.backward()
    assert packed.item() == pytest.approx(apart.item(), abs=1e-9)
    for name, grad in gradients(trainer.model).items():
        # The norms of these architectures run in float32 in any model, so gradients round there.
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_the_order_of_pairs_changes_nothing(llama_base, tmp_path):
    llama_base.model.double()
    trainer = bapo_trainer(llama_base, with_reference(llama_base), tmp_path)
    disturb(trainer.model)
    trainer.model.double()
    rows = list(trainer.train_dataset)
    losses = [
        trainer.compute_loss(trainer.model, trainer.data_collator([rows[i] for i in order])).item()
        for order in ([0, 1, 2, 3], [3, 1, 0, 2])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


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
    sampler = PromptOrderSampler([(1,), (2,), (1,), (3,), (2,), (1,)], seed=0)
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


@pytest.fixture
def pairs_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"{word} {i}"}
        for i in range(6)
        for word in ("no", "never")
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def train_tiny(tiny_folders, settings, pairs_file, **plan):
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
    folder = run(TrainingPlan(**{**values, **plan}), base, store, settings, heard.append)
    return folder, store, heard


def test_a_run_installs_an_adapter_that_stock_peft_loads(tiny_folders, settings, pairs_file):
    folder, store, heard = train_tiny(tiny_folders, settings, pairs_file)
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
    assert list(dict.fromkeys(p.phase for p in heard)) == ["base responses", "reference", "training", "evaluating"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    assert steps[-1]["loss/preference"] < steps[0]["loss/preference"]

    # The card's figures are those of the adapter as stock PEFT loads it.
    base = load_base(replace(settings, base=str(tiny_folders["llama"])))
    _, held_out = TrainingPlan(preference="mine", pairs=str(pairs_file), held_out_share=0.34).load_pairs()
    prompts = list(dict.fromkeys(pair.prompt for pair in held_out))
    from bapo.inference.base_responses import base_responses

    answers = base_responses(base, prompts, settings.cache)
    reference = [
        response_logps(base.model, base.head, base.encode_prompt(p), [answers[p].token_ids]).item() for p in prompts
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
