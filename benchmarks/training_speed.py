"""Pairs per second of packed BAPO against TRL's DPOTrainer and against BAPO on padded triples. Run by hand, alone:

    python -m benchmarks.training_speed FILE

FILE holds prompts with one response per domain (JSON lines: `prompt`, `responses`); a pair is the
literary response against each other one. Every side has a process of its own, as its users have it, and
has seen all prompts before it is timed. Then they take the same prompts in turn, forwards,
backwards and optimiser, so that whatever slows the machine slows all. Printed are medians over the
rounds, of each side's speed and of the ratios; prompts differ in length, so a ratio is one round's. TRL
runs as installed, with reference log-probs precomputed, no anchor, and the batch size that is fastest
for it. Peak memory is that of a side's process.

Where there is a CUDA device, the same on it: with a base of Phi-3-mini's size in bfloat16, whose weights are random, as
speed does not depend on them, and four times as many prompts a step. Peak memory is then the device's.
"""

import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as `python -m bapo train` does; it helps every side

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from bapo.inference.base import EMBEDDED, Base, load_base
from bapo.inference.embedded import embedded_folder
from bapo.inference.prefix_tree import PromptTree, pad_trees
from bapo.inference.projection import project
from bapo.inference.tree_attention import enable_trees
from bapo.pairs import Pair
from bapo.settings import Settings
from bapo.training.fused_layer import fuse_layers
from bapo.training.lora_linear import FusedLoraLinear
from bapo.training.packing import ROLES, computed_tokens, predicted_tokens
from bapo.training.rows import prepare_rows
from bapo.training.trainer import BAPOTrainer
from benchmarks.preparation import spread

CUDA = torch.cuda.is_available()
PROMPTS_A_STEP = 8 if CUDA else 2
ROUNDS = 3 if CUDA else 5
BATCH_SIZES = (32, 16, 8, 4) if CUDA else (8, 4, 2, 1)  # of TRL, to choose from
RATED = 8192 if CUDA else 2048  # rows and columns of the matrices by which the machine's rate is measured


class Side:
    """A trainer and its batches, one list of micro-batches per step."""

    def __init__(self, trainer: DPOTrainer, steps: list[list[dict]], tokens: Callable[[dict], int]):
        self.trainer, self.tokens = trainer, tokens
        self.steps = [[trainer.data_collator(part) for part in _micro_batches(trainer, step)] for step in steps]
        self.predicting: list[int] = []  # of the last step: predicting positions that had a gradient
        if trainer.args.gradient_checkpointing:  # where `train` would do it
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # what the trainers take by themselves
        trainer.model.train()

    def take(self, step: int) -> float:
        """Seconds of one optimiser step."""
        self.predicting.clear()
        start = now()
        for batch in self.steps[step]:
            # BAPOTrainer goes backwards after every packed sequence, as its training step does.
            for part in [{"parts": [part]} for part in batch["parts"]] if "parts" in batch else [batch]:
                part = self.trainer._prepare_inputs(part)  # to the device
                with self.trainer.compute_loss_context_manager():
                    loss = self.trainer.compute_loss(self.trainer.model, part) / len(self.steps[step])
                loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now() - start


def now() -> float:
    """Seconds, once the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def _micro_batches(trainer: DPOTrainer, rows: list[dict]) -> list[list[dict]]:
    size = trainer.args.per_device_train_batch_size
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def arguments(folder: str, batch_size: int, **more) -> DPOConfig:
    return DPOConfig(
        output_dir=folder, per_device_train_batch_size=batch_size, use_cpu=not CUDA, bf16=CUDA, max_length=None,
        gradient_checkpointing=CUDA, report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def lora(fused: bool) -> LoraConfig:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if fused:
        config._register_custom_module({nn.Linear: FusedLoraLinear})
    return config


def steps_of(file: Path) -> list[list[Pair]]:
    """Pairs of each step."""
    prompts = spread(file, PROMPTS_A_STEP * ROUNDS)
    pairs = [
        [
            Pair(p["prompt"], p["responses"]["literature"], text)
            for name, text in p["responses"].items()
            if name != "literature"
        ]
        for p in prompts
    ]
    return [list(chain(*pairs[at : at + PROMPTS_A_STEP])) for at in range(0, len(pairs), PROMPTS_A_STEP)]


def trl_side(steps: list[list[Pair]], folder: str, batch_size: int) -> Side:
    base = fresh_base("sdpa")
    rows = [
        {"prompt": [{"role": "user", "content": pair.prompt}]}
        | {name: [{"role": "assistant", "content": getattr(pair, name)}] for name in ("chosen", "rejected")}
        for step in steps
        for pair in step
    ]
    # It hashes the whole model to name a file of reference log-probs, which no other process would find.
    with patch("trl.trainer.dpo_trainer.hash_module", lambda model: "base"):
        trainer = DPOTrainer(
            base.model, args=arguments(folder, batch_size, precompute_ref_log_probs=True),
            processing_class=base.tokenizer, train_dataset=Dataset.from_list(rows), peft_config=lora(fused=False),
        )  # fmt: skip
    trainer.pop_callback(PrinterCallback)
    tokenised = iter(list(trainer.train_dataset))
    side = Side(trainer, [[next(tokenised) for _ in step] for step in steps], lambda batch: batch["input_ids"].numel())
    return side


def bapo_side(steps: list[list[Pair]], folder: str, packed: bool) -> Side:
    base = fresh_base()
    pairs = [pair for step in steps for pair in step]
    rows = iter(prepare_rows(base, pairs, [], 512, Settings().cache).rows)
    steps_rows = [[next(rows) for _ in step] for step in steps]
    batch_size = len(steps[0]) if packed else 2
    if packed:
        fuse_layers(base.model)
    trainer = BAPOTrainer(
        base.model, method="bapo", lambda_=5.0, args=arguments(folder, batch_size), processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(steps_rows[0]), peft_config=lora(fused=packed),
    )  # fmt: skip
    if not packed:
        trainer.data_collator = padded_triples
    side = Side(trainer, steps_rows, computed_tokens)
    if packed:  # a slack anchor's response has no gradient

        def count(gradient: torch.Tensor) -> None:
            side.predicting.append(int(gradient.any(-1).sum()))

        trainer.model.get_decoder().norm.register_forward_hook(lambda *called: called[-1].register_hook(count) and None)
    return side


def padded_triples(examples: list[dict]) -> dict:
    """Pairs as anyone would write BAPO first: three rows for each pair, padded to the longest of the batch."""
    trees = [PromptTree.grow(example["prompt_ids"], [example[f"{role}_ids"]]) for example in examples for role in ROLES]
    part: dict = {"sequence": pad_trees(trees), "share": 1.0, "late": 0}
    for number, role in enumerate(ROLES):
        part[f"{role}_branch"] = torch.arange(number, 3 * len(examples), 3)
        part[f"ref_{role}_logps"] = torch.tensor([example[f"ref_{role}_logps"] for example in examples])
    return {"parts": [part]}


def fresh_base(attention: str | None = None) -> Base:
    base = phi3_mini_sized() if CUDA else load_base(Settings(base=EMBEDDED))
    if attention:
        base.model.set_attn_implementation(attention)
    return base


def phi3_mini_sized() -> Base:
    """A base with random weights of Phi-3-mini's sizes, in bfloat16, with the embedded base's tokenizer."""
    folder = embedded_folder(Settings().cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda"):  # the sizes are the configuration's defaults
        model = AutoModelForCausalLM.from_config(
            Phi3Config(vocab_size=len(tokenizer), **special), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    enable_trees(model)
    return Base(
        name="phi-3-mini-sized", folder=folder, model=model, tokenizer=tokenizer, fingerprint="random-phi-3-mini-sized",
        numerics="bfloat16", end_of_turn=tokenizer.eos_token_id, stop_ids=frozenset({tokenizer.eos_token_id}),
    )  # fmt: skip


def matrix_rate() -> float:
    """GFLOP/s of a product of large square matrices by the faster of two libraries: what this machine can do."""
    a, b = torch.randn(2, RATED, RATED, device="cuda", dtype=torch.bfloat16) if CUDA else torch.randn(2, RATED, RATED)
    seconds: dict[Callable[..., torch.Tensor], list[float]] = {torch.matmul: [], project: []}
    for _ in range(5):
        for product, times in seconds.items():
            start = now()
            product(a, b)
            times.append(now() - start)
    return 2 * RATED**3 / min(map(statistics.median, seconds.values())) / 1e9


def model_gflop(side: Side, step: int) -> float:
    """Products with the model's weights that the last step needed to train a LoRA: once forwards, and once backwards
    for the inputs that have a gradient."""
    model = side.trainer.model
    head = model.get_output_embeddings().weight.numel()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) - head
    computed, predicted = (sum(map(count, side.steps[step])) for count in (computed_tokens, predicted_tokens))
    live = sum(side.predicting)
    return 2 * (linear * (2 * computed - predicted + live) + head * (predicted + live)) / 1e9


def peak_megabytes() -> float:
    """Of this process. Not getrusage: a child's count starts at its parent's."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 1e6
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1000


def work(parent: Connection, name: str, file: Path, batch_size: int) -> None:
    """A side's process: tells the tokens that its steps compute, then takes each step that it is told, None to end."""
    disable_progress_bar()
    steps = steps_of(file)
    with tempfile.TemporaryDirectory() as folder:
        if name == "trl":
            side = trl_side(steps, folder, batch_size)
        else:
            side = bapo_side(steps, folder, packed=name == "packed")
        parent.send(sum(side.tokens(batch) for step in side.steps for batch in step))
        while (step := parent.recv()) is not None:
            seconds = side.take(step)
            parent.send((seconds, model_gflop(side, step) if side.predicting else None, peak_megabytes()))


def work_by_size(parent: Connection, file: Path) -> None:
    """Tells the seconds that TRL's first step takes by batch size. In a process of its own: memory that a large batch
    leaves behind makes the small ones after it faster than they are by themselves."""
    disable_progress_bar()
    steps = steps_of(file)[:1]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_side(steps, folder, BATCH_SIZES[0]).trainer
        rows = [row for row in trainer.train_dataset]
        by_size = {}
        for size in BATCH_SIZES:
            trainer.args.per_device_train_batch_size = size
            by_size[size] = Side(trainer, [rows], lambda batch: 0).take(0)
    parent.send(by_size)


class Process:
    """A process that computes one side, or TRL's first step by batch size."""

    def __init__(self, target: Callable, *arguments):
        self.connection, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()  # so that a process that dies is heard of
        self.found = self.connection.recv()  # what it tells at first; until then it computes, and nothing else may

    def take(self, step: int) -> tuple[float, float | None, float]:
        """Seconds, the GFLOP of the packed side, and the peak memory so far, in megabytes."""
        self.connection.send(step)
        return self.connection.recv()

    def take_all(self) -> float:
        """Seconds."""
        return sum(self.take(step)[0] for step in range(ROUNDS))

    def end(self) -> None:
        self.connection.send(None)


def fastest_trl(file: Path) -> tuple[int, Process]:
    """TRL's best batch size and its process, warm: of the two that are fastest for the first step, the one that is
    faster for all, once it has seen all."""
    first_step = Process(work_by_size, file).found
    sides = {size: Process(work, "trl", file, size) for size in sorted(first_step, key=first_step.__getitem__)[:2]}
    for side in sides.values():
        side.take_all()
    all_steps = {size: side.take_all() for size, side in sides.items()}
    for title, by_size in (("the first step", first_step), ("all steps", all_steps)):
        shown = {size: round(seconds, 1) for size, seconds in by_size.items()}
        print(f"TRL, seconds for {title} by batch size: {shown}", flush=True)
    best = min(all_steps, key=all_steps.__getitem__)
    for size in all_steps.keys() - {best}:
        sides[size].end()
    return best, sides[best]


def report(file: Path) -> None:
    pairs = [len(step) for step in steps_of(file)]
    best, trl = fastest_trl(file)
    titles = {
        "trl": f"trl.DPOTrainer, batch {best}, no anchor",
        "plain": "BAPO, padded triples",
        "packed": "BAPO, packed (the product)",
    }
    sides = {"trl": trl}
    for name in ("plain", "packed"):
        sides[name] = Process(work, name, file, best)
        sides[name].take_all()
    seconds: dict[str, list[float]] = {name: [] for name in titles}
    memory: dict[str, float] = {}
    rates, used = [], []
    for step in range(len(pairs)):
        for name in titles:
            duration, gflop, memory[name] = sides[name].take(step)
            seconds[name].append(duration)
            if gflop is not None:
                rates.append(matrix_rate())
                used.append(gflop / duration)
    for side in sides.values():
        side.end()
    speed = {name: statistics.median(n / s for n, s in zip(pairs, seconds[name], strict=True)) for name in titles}
    print(f"\n{sum(pairs)} pairs of {len(pairs) * PROMPTS_A_STEP} prompts, {len(pairs)} rounds, medians")
    for name, title in titles.items():
        shown = f"{speed[name]:6.3f} pairs/s  {sides[name].found:7} tokens computed  {memory[name]:7.0f} MB peak"
        print(f"{title:36} {shown}")
    for name, title in (("trl", "trl"), ("plain", "padded triples")):
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["packed"], strict=True)]
        shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{f'packed / {title}':36} {statistics.median(ratios):6.2f} ×  rounds: {shown}")
    print(f"peak memory, packed / trl            {memory['packed'] / memory['trl']:6.2f} ×")
    share = statistics.median(u / r for u, r in zip(used, rates, strict=True))
    print(f"model FLOPs used, packed             {share:6.0%} of {statistics.median(rates):.0f} GFLOP/s")


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    report(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
