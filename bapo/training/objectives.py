"""The losses: pure functions of summed log-probs, one per equation of arXiv 2407.00693.

Every tensor has shape [pairs]: entry i belongs to the i-th (prompt, chosen, rejected, base response)
of the batch. Log-probs are summed over the response's tokens, in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Logps(NamedTuple):
    """Log-probs of the three responses under one model; each of shape [pairs]."""

    chosen: Tensor
    rejected: Tensor
    base: Tensor


def margins(policy: Logps, reference: Logps, beta: float) -> Tensor:
    """β · [(log π_θ − log π_ref)(y_w) − (log π_θ − log π_ref)(y_l)]; shape [pairs]."""
    return beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))


def dpo(policy: Logps, reference: Logps, beta: float) -> Tensor:
    """Eq. 4: L_DPO = −log σ(margin); shape [pairs]."""
    return -F.logsigmoid(margins(policy, reference, beta))


def anchor(policy: Logps, reference: Logps) -> Tensor:
    """Eq. 5: max(0, log π_ref(y_b|x) − log π_θ(y_b|x)); shape [pairs].

    Zero while the policy holds the base response at least as likely as the base does. The gradient
    is zero on the boundary as well. Training starts there but for rounding (π_θ = π_ref), so that
    the last bits of two equal log-probs decide which anchors pull in its first steps.
    """
    return torch.relu(reference.base - policy.base)


def bapo(policy: Logps, reference: Logps, beta: float, lambda_: float) -> Tensor:
    """Eq. 6: L_BAPO = L_DPO + λ · anchor; shape [pairs]."""
    return dpo(policy, reference, beta) + lambda_ * anchor(policy, reference)


Objective = Callable[[Logps, Logps, float, float], Tensor]

METHODS: dict[str, Objective] = {
    "dpo": lambda policy, reference, beta, lambda_: dpo(policy, reference, beta),
    "bapo": bapo,
}
