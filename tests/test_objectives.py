"""The losses against numbers worked out by hand."""

import math

import pytest
import torch

from bapo.training.objectives import METHODS, Logps, anchor, bapo, dpo, margins


def logps(chosen, rejected, base):
    return Logps(*(torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected, base)))


# margin = 0.1 · [(−10 + 12) − (−20 + 15)] = 0.7; anchor = max(0, −30 + 33) = 3
POLICY, REFERENCE = logps([-10.0], [-20.0], [-33.0]), logps([-12.0], [-15.0], [-30.0])


def test_dpo_is_equation_4():
    assert margins(POLICY, REFERENCE, 0.1).item() == pytest.approx(0.7)
    assert dpo(POLICY, REFERENCE, 0.1).item() == pytest.approx(math.log(1 + math.exp(-0.7)))


def test_bapo_is_equation_6():
    assert bapo(POLICY, REFERENCE, 0.1, 5.0).item() == pytest.approx(math.log(1 + math.exp(-0.7)) + 15.0)


def test_bapo_with_lambda_0_is_dpo():
    assert bapo(POLICY, REFERENCE, 0.1, 0.0).item() == dpo(POLICY, REFERENCE, 0.1).item()


@pytest.mark.parametrize(
    ("base_logp", "value", "gradient"),
    [(-33.0, 3.0, -1.0), (-28.0, 0.0, 0.0), (-30.0, 0.0, 0.0)],
    ids=["forgetting", "likelier than under the base", "on the boundary"],
)
def test_anchor_on_both_sides_of_zero(base_logp, value, gradient):
    policy = logps([-1.0], [-1.0], [base_logp])
    policy.base.requires_grad_(True)
    loss = anchor(policy, logps([-1.0], [-1.0], [-30.0]))
    loss.sum().backward()
    assert loss.item() == value
    assert policy.base.grad.item() == gradient


def test_losses_are_per_pair():
    policy, reference = logps([-1.0, -2.0], [-3.0, -1.0], [-4.0, -9.0]), logps([-1.0] * 2, [-1.0] * 2, [-5.0] * 2)
    assert anchor(policy, reference).tolist() == [0.0, 4.0]
    assert METHODS["bapo"](policy, reference, 0.1, 5.0).shape == (2,)
    assert METHODS["dpo"](policy, reference, 0.1, 5.0).tolist() == dpo(policy, reference, 0.1).tolist()
