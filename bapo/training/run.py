"""A training plan carried out, from pairs to an installed adapter."""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from filelock import FileLock, Timeout
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig

from bapo.adapters import AdapterCard, AdapterStore, HeldOut
from bapo.errors import BapoError
from bapo.evaluation import BASE, PairLogps, mean_drift, reward_accuracy
from bapo.inference.base import Base
from bapo.inference.scoring import response_logps
from bapo.pairs import hash_of
from bapo.settings import Settings
from bapo.training.checkpoints import SealedCheckpoints, last_sealed_checkpoint
from bapo.training.fused_layer import fuse_layers
from bapo.training.lora_linear import FusedLoraLinear
from bapo.training.observation import Observation, Observing
from bapo.training.plan import TrainingPlan
from bapo.training.rows import prepare_rows
from bapo.training.trainer import BAPOTrainer

LIBRARIES = ("torch", "transformers", "trl", "peft")
CHECKPOINT_STEPS = 20  # what an interrupted run may lose, or an eighth of a short one


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; phases: "base responses", "reference", "training", "evaluating", "installing".

    `eta_seconds` concerns the phase and is None until a speed is known. While it trains, `done` is the
    step that `metrics` and `observation` belong to.
    """

    phase: str
    done: int
    total: int
    eta_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    note: str = ""  # something the user should know
    observation: Observation | None = None


Listener = Callable[[Progress], None]


def run(
    plan: TrainingPlan,
    base: Base,
    store: AdapterStore,
    settings: Settings,
    tell: Listener,
    probes: Sequence[str] | None = None,
    checkpoints: Path | None = None,
) -> Path:
    """Carry out the plan and return the folder of the installed adapter.

    Where `probes` are given, even none, the run observes itself now and then: figures of a few held-out
    prompts, and the policy's answers to the probes. `checkpoints` is the folder of its checkpoints, in the
    cache unless it is given.

    `base.model` is changed while it runs (adapter layers are added, and removed at the end), so a
    process that serves answers must not train: it starts another one. `tell` hears of every step. A
    run that was interrupted goes on from its last checkpoint when the same plan is run again. Under
    `accelerate launch` all processes call this; the first one writes and tells.
    """
    process = PartialState()
    training, held_out = plan.load_pairs()
    if not training:
        raise BapoError("There is nothing to train on: every prompt is held out. Give more prompts or hold out fewer.")
    if plan.batch_size % process.num_processes:
        raise BapoError(f"{plan.batch_size} pairs a step cannot be shared by {process.num_processes} processes evenly.")
    target = store.place(plan.preference, plan.method)  # a name that cannot be stored is refused before the work
    anchors = plan.load_anchor_prompts()
    clock = _PhaseClock(tell if process.is_main_process else lambda progress: None)
    with process.main_process_first():
        prepared = prepare_rows(
            base, [*training, *held_out], anchors, plan.max_response_tokens, settings.cache, clock.tell
        )
    if prepared.cut:
        clock.note(f"{prepared.cut} responses were cut at {plan.max_response_tokens} tokens")
    rows = prepared.rows[: len(training)] + prepared.rows[len(training) + len(held_out) :]

    work = (checkpoints or settings.cache / "training") / plan.key(base.cache_key, hash_of(training), *anchors)
    work.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work.with_suffix(".lock"), timeout=0)
    try:
        if process.is_main_process:
            lock.acquire()
    except Timeout:
        raise BapoError(f"{target.name} is being trained by another process already.") from None
    try:
        held_out_rows = prepared.rows[len(training) : len(training) + len(held_out)]
        store.clear_scratch(plan.preference, plan.method)
        callbacks: list[TrainerCallback] = [_TrainingProgress(clock)]
        if probes is not None:
            callbacks.append(Observing(base, held_out_rows, probes, clock.observed))
        trainer = _train(plan, base, rows, work, process.num_processes, callbacks)
        policy = trainer.accelerator.unwrap_model(trainer.model)
        if process.is_main_process:
            # Adapters are stored in 16 bits and PEFT widens them again on loading. Rounding before the
            # evaluation makes the figures on the card those of the stored adapter.
            _cast_adapter(policy, torch.float16)
            _cast_adapter(policy, torch.float32)
            card = AdapterCard(
                base=base.name,
                base_fingerprint=base.fingerprint,
                preference=plan.preference,
                method=plan.method,
                hyperparameters={**plan.hyperparameters(), "anchor_prompts": len(anchors)},
                data_sha256=hash_of(training),
                training_pairs=len(training),
                held_out=evaluate(policy, held_out_rows, clock) if held_out else None,
                versions={name: version(name) for name in LIBRARIES},
                description=plan.description,
            )
            _cast_adapter(policy, torch.float16)
            clock.tell("installing", 0, 1)
            store.install(_saved(policy, base, trainer.state.log_history, store.scratch(target)), card)
            shutil.rmtree(work, ignore_errors=True)
        process.wait_for_everyone()
        policy.unload()
    finally:
        lock.release()
    return target


def _saved(policy, base: Base, history: list[dict], folder: Path) -> Path:
    """The adapter in a hidden folder of the store, from where one rename puts it into place."""
    config = policy.peft_config["default"]
    config.base_model_name_or_path = base.name  # not a path on this machine
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs between processes
    policy.save_pretrained(folder, save_embedding_layers=False)  # else PEFT asks the hub about them
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; our card says what there is to say
    steps = [entry for entry in history if "drift" in entry]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in steps))
    return folder


def _train(
    plan: TrainingPlan, base: Base, rows: list[dict], work: Path, processes: int, callbacks: list[TrainerCallback]
) -> BAPOTrainer:
    disable_progress_bar()  # datasets' own bars would break ours
    on_cpu = base.model.device.type == "cpu"
    arguments = DPOConfig(
        output_dir=str(work),
        beta=plan.beta,
        learning_rate=plan.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # below 1: a share of all steps
        num_train_epochs=plan.epochs,
        per_device_train_batch_size=plan.batch_size // processes,
        max_length=None,
        seed=plan.seed,
        use_cpu=on_cpu,
        bf16=not on_cpu,
        gradient_checkpointing=not on_cpu,  # trades time for memory, of which a CPU has plenty
        dataloader_pin_memory=not on_cpu,
        logging_steps=1,
        save_steps=min(CHECKPOINT_STEPS, math.ceil(len(rows) / plan.batch_size * plan.epochs / 8)),
        save_total_limit=2,  # the last one may not be sealed yet when the process dies
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        target_modules=_target_modules(base.model, plan.last_layers),
        task_type="CAUSAL_LM",
    )
    if base.numerics != "nf4":
        lora._register_custom_module({nn.Linear: FusedLoraLinear})
        fuse_layers(base.model)
    trainer = BAPOTrainer(
        base.model,
        method=plan.method,
        lambda_=plan.lambda_,
        args=arguments,
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        callbacks=[*callbacks, SealedCheckpoints()],
    )
    trainer.pop_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_sealed_checkpoint(work))
    return trainer


def _target_modules(model: PreTrainedModel, last_layers: int | None) -> str | list[str]:
    """All linear layers but the vocabulary projection: everywhere, or in the last transformer layers alone."""
    if last_layers is None:
        return "all-linear"
    first = model.config.num_hidden_layers - last_layers
    found = []
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)\.", name)
        if isinstance(module, nn.Linear) and layer and int(layer[1]) >= first:
            found.append(name)
    return found


def evaluate(policy, rows: list[dict], clock: "_PhaseClock") -> HeldOut:
    """Reward accuracy over pairs and drift over prompts of a PEFT model's active adapter."""
    policy.eval()
    by_prompt: dict[tuple[int, ...], list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(tuple(row["prompt_ids"]), []).append(row)
    pairs = []
    for done, (prompt_ids, own) in enumerate(by_prompt.items(), start=1):
        responses = [row[f"{role}_ids"] for row in own for role in ("chosen", "rejected")]
        *scores, base_logp = response_logps(policy, policy, prompt_ids, [*responses, own[0]["base_ids"]]).tolist()
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

    def observed(self, step: int, total: int, observation: Observation) -> None:
        self.listener(Progress("training", step, total, observation=observation))

    def note(self, text: str) -> None:
        self.listener(Progress(self.phase, 1, 1, note=text))


class _TrainingProgress(TrainerCallback):
    def __init__(self, clock: _PhaseClock):
        self.clock = clock

    def on_train_begin(self, args, state, control, **kwargs):
        self.clock.tell("training", state.global_step, state.max_steps)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "drift" in logs:
            self.clock.tell("training", state.global_step, state.max_steps, logs)
