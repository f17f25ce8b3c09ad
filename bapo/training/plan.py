"""What to train: a plan is complete and reproducible."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bapo.errors import BapoError
from bapo.pairs import Pair, own_pairs, read_prompts, split_by_prompt, usable_pairs
from bapo.preferences import CATALOGUE
from bapo.training.objectives import METHODS

ANCHOR_PROMPTS = Path(__file__).parent.parent / "data" / "anchor_prompts.txt"
# What `--all` changes of the defaults. A step is four prompts with a pair each, and under BAPO half as many questions
# that only anchor. Adapters of the last 18 of the embedded base's 30 layers take 2.9 MB each, so that all twenty can
# be shipped.
RECIPE: dict[str, Any] = {"learning_rate": 6e-4, "epochs": 1.0, "batch_size": 4, "last_layers": 18}
ANCHORS_A_STEP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what an adapter becomes; the same plan gives the same adapter.

    `pairs` is a file of preference pairs, `None` means our own set. `held_out_share` is the share of
    a file's prompts kept for evaluation; our own set has its marked. `anchor_prompts` is a file of
    further prompts on which the base's answer is anchored and nothing is preferred. `last_layers`
    limits the adapter to the last transformer layers; `None` means all. `description` says what the
    taste means, on the adapter's card, and changes nothing else.
    """

    preference: str
    method: str = "bapo"
    pairs: str | None = None
    anchor_prompts: str | None = None
    lambda_: float = 5.0
    beta: float = 0.1
    learning_rate: float = 3e-4
    epochs: float = 1.0
    batch_size: int = 8
    rank: int = 8
    alpha: int = 16
    last_layers: int | None = None
    max_response_tokens: int = 512
    held_out_share: float = 0.1
    seed: int = 0
    description: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BapoError(f"There is no method {self.method!r}; choose one of {', '.join(METHODS)}.")
        for name in ("beta", "learning_rate", "epochs", "batch_size", "rank", "alpha", "max_response_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise BapoError(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.last_layers is not None and self.last_layers < 1:
            raise BapoError(f"last_layers must be 1 or more, not {self.last_layers}.")
        if not 0 <= self.lambda_ < math.inf:
            raise BapoError(f"lambda must be 0 or more, not {self.lambda_}.")
        if not 0 <= self.held_out_share < 1:
            raise BapoError(f"The held-out share must lie in [0, 1), not {self.held_out_share}.")
        if self.anchor_prompts is not None and self.method == "dpo":
            raise BapoError("DPO has no anchor: give anchor prompts to the method bapo, or leave them out.")

    def load_pairs(self) -> tuple[list[Pair], list[Pair]]:
        """(training, held-out) pairs of the plan."""
        if self.pairs is None:
            return own_pairs(self.preference, held_out=False), own_pairs(self.preference, held_out=True)
        return split_by_prompt(usable_pairs(Path(self.pairs)), self.held_out_share, self.seed)

    def load_anchor_prompts(self) -> list[str]:
        """Prompts that carry an anchor and no pair."""
        return [] if self.anchor_prompts is None else read_prompts(Path(self.anchor_prompts))

    def hyperparameters(self) -> dict[str, float | int | str | None]:
        """What the adapter's card tells of the plan: neither names nor files."""
        hidden = ("preference", "method", "pairs", "anchor_prompts", "description")
        return {name: value for name, value in asdict(self).items() if name not in hidden}

    def key(self, *more: str) -> str:
        """Names this plan, together with what else identifies the run, in a folder name."""
        return hashlib.sha256(json.dumps([asdict(replace(self, description="")), *more]).encode()).hexdigest()[:24]


def catalogue_plans() -> list[TrainingPlan]:
    """Every preference of the catalogue under every method."""
    plans = []
    for preference in CATALOGUE:
        for method in METHODS:
            plan = TrainingPlan(preference=preference, method=method, **RECIPE)
            if method != "dpo":
                rows = plan.batch_size + ANCHORS_A_STEP
                plan = replace(plan, batch_size=rows, anchor_prompts=str(ANCHOR_PROMPTS))
            plans.append(plan)
    return plans
