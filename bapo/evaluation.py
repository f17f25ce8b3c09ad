"""What an adapter's log-probs amount to: reward accuracy and drift. Plain numbers, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from bapo.pair_layouts import Prompt

BASE = "base"


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probs (nats, summed) of a pair's three responses; each a dict policy → logps, with "base" among them.

    `base_tokens` counts the tokens of the base response.
    """

    prompt: Prompt
    chosen: dict[str, float]
    rejected: dict[str, float]
    base_response: dict[str, float]
    base_tokens: int


@dataclass(frozen=True, slots=True)
class Drift:
    """Logps under the base − logps under a policy, of the base response; above 0 is forgetting."""

    nats: float
    per_token: float


def reward_accuracy(pairs: Sequence[PairLogps], policy: str) -> float:
    """Share of pairs whose implicit reward log π_θ/π_ref is higher for chosen than for rejected."""
    wins = sum(pair.chosen[policy] - pair.chosen[BASE] > pair.rejected[policy] - pair.rejected[BASE] for pair in pairs)
    return wins / len(pairs)


def mean_drift(pairs: Sequence[PairLogps], policy: str) -> Drift:
    """Drift averaged over prompts (a prompt with several pairs counts once); per token over all their tokens."""
    once = {pair.prompt: pair for pair in pairs}.values()
    nats = [pair.base_response[BASE] - pair.base_response[policy] for pair in once]
    return Drift(sum(nats) / len(nats), sum(nats) / sum(pair.base_tokens for pair in once))
