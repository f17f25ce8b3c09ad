"""Rows that sample and rows that follow another row, advanced together one token at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from bapo.errors import BapoError
from bapo.inference.mixed_lora import RowWeights
from bapo.inference.policies import Policies, Policy


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence of a batch, under a policy: an adapter, a mix, or None, the base.

    A row with `follows` is fed the tokens of that row instead of its own choices: the log-probs it
    assigns to them are what teacher forcing would give.
    """

    policy: Policy
    follows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; `seed` decides every draw."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise BapoError(f"The answer's length must be 1 token or more, not {self.max_new_tokens}.")
        if not 0 <= self.seed < 2**63:
            raise BapoError(f"The seed must lie between 0 and 2⁶³, not {self.seed}.")
        if not 0 <= self.temperature <= 5:
            raise BapoError(f"The temperature must lie between 0 and 5, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise BapoError(f"top-p must lie above 0 and be at most 1, not {self.top_p}.")


@dataclass(frozen=True, slots=True)
class RowToken:
    """What one row did in one step. `logp` is the token's, in nats, at temperature 1, uncut by top-p."""

    row: int
    token_id: int
    logp: float
    last: bool


@torch.inference_mode()
def decode(
    policies: Policies, prompt_ids: Sequence[int], rows: Sequence[Row], sampling: Sampling, exact: bool = False
) -> Iterator[list[RowToken]]:
    """Yield, step by step, the tokens of all rows that are not done.

    The prompt is run once per distinct policy. All rows stand at the same position, so nothing is
    padded; a row that is done leaves the batch. Close the iterator to stop within one step. Between two
    steps the model may serve others. `exact` excludes the rounded weights, should `policies` have any.
    """
    generator = torch.Generator(policies.base.model.device).manual_seed(sampling.seed)
    live = list(range(len(rows)))
    weights, logits, cache = _prefill(policies, prompt_ids, rows, sampling.max_new_tokens)
    for step in range(sampling.max_new_tokens):
        noise = _gumbel(logits.shape[-1], generator) if sampling.temperature > 0 else None
        own = _choose(logits, sampling, noise).tolist()
        chosen = dict(zip(live, own, strict=True))
        # A leader and its followers are fed the same tokens, so they end and leave together.
        token_ids = [chosen[row if (leader := rows[row].follows) is None else leader] for row in live]
        index = torch.tensor(token_ids, device=logits.device).unsqueeze(1)
        logps = logits.gather(1, index).squeeze(1) - logits.logsumexp(1)
        final = step == sampling.max_new_tokens - 1
        tokens = [
            RowToken(row, token_id, logp, final or token_id in policies.base.stop_ids)
            for row, token_id, logp in zip(live, token_ids, logps.tolist(), strict=True)
        ]
        yield tokens
        staying = [i for i, token in enumerate(tokens) if not token.last]
        if not staying:
            return
        if len(staying) < len(live):
            cache.batch_select_indices(torch.tensor(staying, device=logits.device))
            live, index, weights = [live[i] for i in staying], index[staying], weights.select(staying)
        leaders = [live.index(row if (leader := rows[row].follows) is None else leader) for row in live]
        logits = _wide(policies.step(weights, exact, index.squeeze(1), cache, leaders))


def _prefill(
    policies: Policies, prompt_ids: Sequence[int], rows: Sequence[Row], new: int
) -> tuple[RowWeights, Tensor, Cache]:
    """Every row's matrices, logits of its first token, [rows, vocabulary], and cache."""
    distinct: list[Policy] = []
    for row in rows:
        if row.policy not in distinct:
            distinct.append(row.policy)
    weights, logits, cache = policies.prefill(distinct, prompt_ids, new)
    origin = [distinct.index(row.policy) for row in rows]
    cache.batch_select_indices(torch.tensor(origin, device=logits.device))
    return weights.select(origin), _wide(logits)[origin], cache


def _choose(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """The next token of every row: [rows, vocabulary] → [rows]."""
    if noise is None:
        return logits.argmax(1)
    scaled = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = scaled.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        beyond = probabilities.cumsum(1) - probabilities >= sampling.top_p
        scaled = scaled.scatter(1, order, ordered.masked_fill(beyond, -torch.inf))
    # Gumbel-max: the argmax is a draw from the softmax. All rows share the noise, so that answers
    # differ because the policies differ, not because the dice did.
    return (scaled + noise.to(scaled)).argmax(1)


def _gumbel(size: int, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    uniform = uniform.clamp_min(torch.finfo(torch.float64).tiny)
    return -torch.log(-torch.log(uniform))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
