"""A training plan carried out, from pairs to an installed adapter."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig

from bapo.adapters import AdapterCard, AdapterStore, HeldOut
from bapo.disk_cache import DiskCache
from bapo.errors import BapoError
from bapo.evaluation import BASE, PairLogps, mean_drift, reward_accuracy
from bapo.inference.base import Base
from bapo.inference.base_responses import BaseResponse, base_responses
from bapo.inference.scoring import response_logps
from bapo.pairs import Pair, hash_of, own_pairs, split_by_prompt, usable_pairs
from bapo.settings import Settings
from bapo.training.objectives import METHODS
from bapo.training.trainer import BAPOTrainer

PHASES = ("base responses", "reference", "training", "evaluating")
LIBRARIES = ("torch", "transformers", "trl", "peft")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what an adapter becomes; the same plan gives the same adapter.

    `pairs` is a file of preference pairs, `None` means our own set. `held_out_share` is the share of
    a file's prompts kept for evaluation; our own set has its marked.
    """

    preference: str
    method: str = "bapo"
    pairs: str | None = None
    lambda_: float = 5.0
    beta: float = 0.1
    learning_rate: float = 3e-4
    epochs: float = 1.0
    batch_size: int = 8
    rank: int = 8
    alpha: int = 16
    max_response_tokens: int = 512
    held_out_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BapoError(f"There is no method {self.method!r}; choose one of {', '.join(METHODS)}.")
        for name in ("beta", "learning_rate", "epochs", "batch_size", "rank", "alpha", "max_response_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise BapoError(f"{name} must be above 0, not {getattr(self, name)}.")
        if not 0 <= self.lambda_ < math.inf:
            raise BapoError(f"lambda must be 0 or more, not {self.lambda_}.")
        if not 0 <= self.held_out_share < 1:
            raise BapoError(f"The held-out share must lie in [0, 1), not {self.held_out_share}.")

    def load_pairs(self) -> tuple[list[Pair], list[Pair]]:
        """(training, held-out) pairs of the plan."""
        if self.pairs is None:
            return own_pairs(self.preference, held_out=False), own_pairs(self.preference, held_out=True)
        return split_by_prompt(usable_pairs(Path(self.pairs)), self.held_out_share, self.seed)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. `eta_seconds` concerns the phase and is None until a speed is known."""

    phase: str
    done: int
    total: int
    eta_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


Listener = Callable[[Progress], None]


def run(plan: TrainingPlan, base: Base, store: AdapterStore, settings: Settings, tell: Listener) -> Path:
    """Carry out the plan and return the folder of the installed adapter.

    `base.model` is changed (adapter layers are added), so a process that serves answers must not
    train: it starts another one. `tell` hears of every step.
    """
    training, held_out = plan.load_pairs()
    if not training:
        raise BapoError("There is nothing to train on: every prompt is held out. Give more prompts or hold out fewer.")
    store.place(plan.preference, plan.method)  # a name that cannot be stored is refused before the work
    clock = _PhaseClock(tell)
    prompts = [pair.prompt for pair in [*training, *held_out]]
    answers = base_responses(base, prompts, settings.cache, progress=lambda *at: clock.tell("base responses", *at))
    known = DiskCache(settings.cache / "reference-logps" / base.cache_key)
    rows = _reference_rows(plan, base, [*training, *held_out], answers, known, clock)

    store.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store.folder, prefix=".training-") as scratch:
        trainer = _train(plan, base, rows[: len(training)], Path(scratch) / "trainer", clock)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        # Adapters are stored in 16 bits and PEFT widens them again on loading. Rounding before the
        # evaluation makes the figures on the card those of the stored adapter.
        _cast_adapter(policy, torch.float16)
        _cast_adapter(policy, torch.float32)
        figures = evaluate(policy, rows[len(training) :], clock) if held_out else None
        _cast_adapter(policy, torch.float16)
        folder = Path(scratch) / "adapter"
        policy.peft_config["default"].base_model_name_or_path = base.name  # not a path on this machine
        policy.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub about them
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; our card says what there is to say
        history = [entry for entry in trainer.state.log_history if "loss/preference" in entry]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
        card = AdapterCard(
            base=base.name,
            base_fingerprint=base.fingerprint,
            preference=plan.preference,
            method=plan.method,
            hyperparameters={
                name: value for name, value in asdict(plan).items() if name not in ("preference", "method", "pairs")
            },
            data_sha256=hash_of(training),
            training_pairs=len(training),
            held_out=figures,
            versions={name: version(name) for name in LIBRARIES},
        )
        return store.install(folder, card)


def _reference_rows(
    plan: TrainingPlan,
    base: Base,
    pairs: list[Pair],
    answers: dict[str, BaseResponse],
    known: DiskCache,
    clock: "_PhaseClock",
) -> list[dict]:
    """The trainer's rows, in the order of `pairs`: token ids of each response and its log-prob under the base.

    `known` remembers log-probs, so that another method or another λ on the same pairs starts at once.
    """
    by_prompt: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    ids: dict[tuple[str, str], list[int]] = {}
    logps: dict[tuple[str, str], float] = {}
    for done, (prompt, own) in enumerate(by_prompt.items(), start=1):
        texts = list(dict.fromkeys(text for pair in own for text in (pair.chosen, pair.rejected)))
        responses = [base.encode_response(prompt, text)[: plan.max_response_tokens] for text in texts]
        responses.append(answers[prompt].token_ids)
        prompt_ids = base.encode_prompt(prompt)
        key = [prompt_ids, responses]
        if key not in known:
            known[key] = response_logps(base.model, base.head, prompt_ids, responses).tolist()
        for text, response, logp in zip([*texts, ""], responses, known[key], strict=True):  # "" stands for y_b
            ids[prompt, text], logps[prompt, text] = response, logp
        clock.tell("reference", done, len(by_prompt))
    return [
        {
            "prompt_ids": base.encode_prompt(pair.prompt),
            "chosen_ids": ids[pair.prompt, pair.chosen],
            "rejected_ids": ids[pair.prompt, pair.rejected],
            "base_ids": ids[pair.prompt, ""],
            "ref_chosen_logps": logps[pair.prompt, pair.chosen],
            "ref_rejected_logps": logps[pair.prompt, pair.rejected],
            "ref_base_logps": logps[pair.prompt, ""],
        }
        for pair in pairs
    ]


def _train(plan: TrainingPlan, base: Base, rows: list[dict], scratch: Path, clock: "_PhaseClock") -> BAPOTrainer:
    disable_progress_bar()  # datasets' own bars would break ours
    on_cpu = base.model.device.type == "cpu"
    arguments = DPOConfig(
        output_dir=str(scratch),
        beta=plan.beta,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # below 1: a share of all steps
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size,
        max_length=None,
        seed=plan.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=not on_cpu,  # trades time for memory, of which a CPU has plenty
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = BAPOTrainer(
        base.model,
        method=plan.method,
        lambda_=plan.lambda_,
        args=arguments,
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        callbacks=[_TrainingProgress(clock)],
    )
    trainer.pop_callback(PrinterCallback)
    trainer.train()
    return trainer


def evaluate(policy, rows: list[dict], clock: "_PhaseClock") -> HeldOut:
    """Reward accuracy over pairs and drift over prompts of a PEFT model's active adapter."""
    policy.eval()
    head = policy.get_output_embeddings()
    by_prompt: dict[tuple[int, ...], list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(row["prompt_ids"]), []).append(row)
    pairs = []
    for done, (prompt_ids, own) in enumerate(by_prompt.items(), start=1):
        responses = [row[f"{role}_ids"] for row in own for role in ("chosen", "rejected")]
        *scores, base_logp = response_logps(policy, head, prompt_ids, [*responses, own[0]["base_ids"]]).tolist()
        for row, chosen, rejected in zip(own, scores[::2], scores[1::2], strict=True):
            pairs.append(
                PairLogps(
                    prompt=str(prompt_ids),
                    chosen={BASE: row["ref_chosen_logps"], "policy": chosen},
                    rejected={BASE: row["ref_rejected_logps"], "policy": rejected},
                    base_response={BASE: row["ref_base_logps"], "policy": base_logp},
                    base_tokens=len(row["base_ids"]),
                )
            )
        clock.tell("evaluating", done, len(by_prompt))
    drift = mean_drift(pairs, "policy")
    return HeldOut(
        prompts=len(by_prompt),
        pairs=len(pairs),
        reward_accuracy=reward_accuracy(pairs, "policy"),
        drift_nats=drift.nats,
        drift_per_token=drift.per_token,
    )


def _cast_adapter(policy, dtype: torch.dtype) -> None:
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


class _PhaseClock:
    """Tells the listener of progress, with an ETA from the speed measured since the phase began."""

    def __init__(self, listener: Listener):
        self.listener = listener
        self.phase = ""
        self.start, self.done_at_start = 0.0, 0

    def tell(self, phase: str, done: int, total: int, metrics: dict[str, float] | None = None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self.phase, self.start, self.done_at_start = phase, now, done
        advanced = done - self.done_at_start
        eta = (now - self.start) / advanced * (total - done) if advanced else None
        self.listener(Progress(phase, done, total, eta, metrics or {}))


class _TrainingProgress(TrainerCallback):
    def __init__(self, clock: _PhaseClock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.tell("training", 0, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "drift" in logs:
            self.clock.tell("training", state.global_step, state.max_steps, logs)
