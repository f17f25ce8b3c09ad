"""What an adapter's log-probs amount to: reward accuracy and drift. Plain numbers, no torch."""

from collections.abc import Mapping, Sequence
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


def margin(chosen: Mapping[str, float], rejected: Mapping[str, float], policy: str) -> float:
    """The implicit reward log π_θ/π_ref of chosen − that of rejected, in nats: the margin of Eq. 4 without its β.

    `chosen` and `rejected` are those of a `PairLogps`.
    """
    return (chosen[policy] - chosen[BASE]) - (rejected[policy] - rejected[BASE])


def reward_accuracy(pairs: Sequence[PairLogps], policy: str) -> float:
    """Share of pairs whose implicit reward is higher for chosen than for rejected."""
    return sum(margin(pair.chosen, pair.rejected, policy) > 0 for pair in pairs) / len(pairs)


def mean_drift(pairs: Sequence[PairLogps], policy: str) -> Drift:
    """Drift averaged over prompts (a prompt with several pairs counts once); per token over all their tokens."""
    once = {pair.prompt: pair for pair in pairs}.values()
    nats = [pair.base_response[BASE] - pair.base_response[policy] for pair in once]
    return Drift(sum(nats) / len(nats), sum(nats) / sum(pair.base_tokens for pair in once))
