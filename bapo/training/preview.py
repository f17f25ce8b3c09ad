"""What a training would be, before it starts: lengths, first rows as they are trained, time and memory."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from bapo.inference.base import Base
from bapo.inference.base_responses import BATCH, MAX_TOKENS
from bapo.inference.projection import project
from bapo.pair_layouts import Pair
from bapo.pairs import split_by_prompt
from bapo.training.packing import TOKEN_BUDGET
from bapo.training.plan import TrainingPlan

SHOWN_ROWS = 2
# Shares of the machine's large-matrix rate that the phases reach on a CPU (benchmarks/training_speed.py prints
# the first); generating reads all weights for a few rows at a time, so it reaches less.
TRAINING_SHARE, GENERATING_SHARE = 0.5, 0.3
PROCESS_BYTES = 0.9e9  # Python with its libraries, before any weight


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one role: middle, what 95 of 100 stay under, and the longest."""

    median: int
    p95: int
    longest: int


@dataclass(frozen=True, slots=True)
class Preview:
    """`lengths` by role ("prompt", "chosen", "rejected"); `cut` responses are longer than the limit.

    `rows` shows the first pairs as the model will read them, chat template and all: (prompt, chosen,
    rejected) texts.
    """

    lengths: dict[str, Lengths]
    cut: int
    rows: list[tuple[str, str, str]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """About what a plan takes on this machine: seconds in all, and bytes of memory at its peak."""

    seconds: float
    memory_bytes: float
    steps: int


def preview(base: Base, pairs: Sequence[Pair], max_response_tokens: int) -> Preview:
    """Raises `BapoError` where the base's chat template does not take a conversation."""
    prompts = {prompt: len(base.encode_prompt(prompt)) for prompt in dict.fromkeys(pair.prompt for pair in pairs)}
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected)))
    encoded = base.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    counts = {text: len(ids) + 1 for text, ids in zip(texts, encoded, strict=True)}  # and the end of the turn
    by_role = {
        "prompt": [prompts[pair.prompt] for pair in pairs],
        "chosen": [counts[pair.chosen] for pair in pairs],
        "rejected": [counts[pair.rejected] for pair in pairs],
    }
    rows = [
        tuple(
            base.tokenizer.decode(ids)
            for ids in (
                base.encode_prompt(pair.prompt),
                base.encode_response(pair.prompt, pair.chosen),
                base.encode_response(pair.prompt, pair.rejected),
            )
        )
        for pair in pairs[:SHOWN_ROWS]
    ]
    return Preview(
        {role: _lengths(values) for role, values in by_role.items() if values},
        sum(count > max_response_tokens for count in counts.values()),
        rows,
    )


def _lengths(values: list[int]) -> Lengths:
    ordered = sorted(values)
    return Lengths(round(statistics.median(ordered)), ordered[int(0.95 * (len(ordered) - 1))], ordered[-1])


def estimate(base: Base, pairs: Sequence[Pair], plans: Sequence[TrainingPlan]) -> Estimate:
    """From the tokens that the plans compute and a matrix product timed here and now.

    Leaves out what a cache may save: it is the time of the first run on these pairs.
    """
    plan = plans[0]
    training, held_out = split_by_prompt(list(pairs), plan.held_out_share, plan.seed)
    characters = sum(len(text) for pair in pairs[:200] for text in (pair.chosen, pair.rejected))
    sample = [text for pair in pairs[:200] for text in (pair.chosen, pair.rejected)]
    tokens = sum(map(len, base.tokenizer(sample, add_special_tokens=False)["input_ids"])) if sample else 0
    per_character = tokens / max(1, characters)

    def positions(own: Sequence[Pair]) -> float:
        """What the packed sequences of these pairs hold: prompts, distinct responses, base responses."""
        prompts = {pair.prompt for pair in own}
        texts = {(pair.prompt, text) for pair in own for text in (pair.chosen, pair.rejected)}
        written = sum(len(text) for _, text in texts) + sum(len(str(prompt)) for prompt in prompts)
        return written * per_character + len(prompts) * MAX_TOKENS

    weights = sum(parameter.numel() for parameter in base.model.parameters())
    forward = 2 * weights / _machine_rate()  # seconds a token; the backward pass of frozen weights costs the same
    prompts = len({pair.prompt for pair in pairs})
    steps = round(-(-len(training) // plan.batch_size) * plan.epochs)
    seconds = 0.0
    for number, _ in enumerate(plans):
        if number == 0:  # the next plan finds base responses and reference log-probs on the disk
            seconds += -(-prompts // BATCH) * BATCH * MAX_TOKENS * forward / GENERATING_SHARE
            seconds += positions(pairs) * forward / TRAINING_SHARE
        seconds += 2 * plan.epochs * positions(training) * forward / TRAINING_SHARE
        seconds += positions(held_out) * forward / TRAINING_SHARE
    config = base.model.config
    # 0.4 is what layers keep of these widths; with the vocabulary and what is passing it comes to 0.7, measured.
    activations = 0.7 * config.num_hidden_layers * (12 * config.hidden_size + 5 * config.intermediate_size) * 4
    longest = max((len(pair.chosen) + len(pair.rejected) for pair in pairs), default=0) * per_character
    memory = PROCESS_BYTES + weights * 4 + activations * max(TOKEN_BUDGET, longest)
    return Estimate(seconds, memory, steps * len(plans))


@cache
def _machine_rate() -> float:
    """Floating-point operations per second of a large matrix product here."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    project(left, right)  # the first one wakes the threads
    start = time.perf_counter()
    for _ in range(8):
        project(left, right)
    return 8 * 2 * 1024**3 / (time.perf_counter() - start)
