"""A look at the policy while it trains: how it does on held-out prompts, and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback

from bapo.inference.base import Base
from bapo.inference.base_responses import greedy_responses
from bapo.inference.scoring import response_logps

TIMES = 8  # observations in a run, and fewer where a run is short: each takes as long as a step or two
STEPS_BETWEEN = 3
PROMPTS = 4  # held-out prompts looked at: enough for a curve, few enough to cost a step or two
ANSWER_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Observation:
    """What was seen at one step: mean figures over a few held-out prompts, and probe prompt → greedy answer.

    The figures go by the trainer's names: `logps_change/…` (nats), `drift`, `rewards/accuracies`.
    """

    held_out: dict[str, float] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)


class Observing(TrainerCallback):
    """Observes at the same steps in every run, and leaves the training as it finds it."""

    def __init__(
        self,
        base: Base,
        held_out: Sequence[dict],
        probes: Sequence[str],
        tell: Callable[[int, int, Observation], None],
    ):
        self.base = base
        self.groups: dict[tuple[int, ...], list[dict]] = {}
        for row in held_out:
            prompt = tuple(row["prompt_ids"])
            if prompt in self.groups or len(self.groups) < PROMPTS:
                self.groups.setdefault(prompt, []).append(row)
        self.probes = list(probes)
        self.tell = tell

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero and state.global_step in steps_of(state.max_steps):
            model.eval()
            with torch.no_grad():
                self.tell(state.global_step, state.max_steps, Observation(self._held_out(model), self._answers()))
            model.train()

    def _held_out(self, model) -> dict[str, float]:
        changes: dict[str, list[float]] = {"chosen": [], "rejected": [], "base": []}
        right = []
        for prompt, rows in self.groups.items():
            responses = [row[f"{role}_ids"] for row in rows for role in ("chosen", "rejected")]
            *pairs, own = response_logps(model, model, list(prompt), [*responses, rows[0]["base_ids"]]).tolist()
            changes["base"].append(own - rows[0]["ref_base_logps"])
            for row, chosen, rejected in zip(rows, pairs[::2], pairs[1::2], strict=True):
                changes["chosen"].append(chosen - row["ref_chosen_logps"])
                changes["rejected"].append(rejected - row["ref_rejected_logps"])
                right.append(changes["chosen"][-1] > changes["rejected"][-1])
        if not right:
            return {}
        means = {f"logps_change/{role}": sum(values) / len(values) for role, values in changes.items()}
        return {**means, "drift": -means["logps_change/base"], "rewards/accuracies": sum(right) / len(right)}

    def _answers(self) -> dict[str, str]:
        if not self.probes:
            return {}
        answers = greedy_responses(self.base, self.probes, ANSWER_TOKENS)
        return {prompt: answer.text for prompt, answer in zip(self.probes, answers, strict=True)}


def steps_of(total: int) -> set[int]:
    """The steps of a run that are observed: spread evenly, the last one among them."""
    times = max(1, min(TIMES, total // STEPS_BETWEEN))
    return {-(-total * number // times) for number in range(1, times + 1)}
