"""The benchmark's arithmetic: margins, how far from wrong a pair is, and which pairs one method alone gets wrong."""

import pytest

from bapo.evaluation import margin
from benchmarks.reward_margins import Separation, summary, wrong_alone


def test_a_margin_is_the_change_of_the_difference_against_the_base():
    chosen = {"base": -20.0, "bapo": -17.0}
    rejected = {"base": -30.0, "bapo": -34.5}
    assert margin(chosen, rejected, "bapo") == pytest.approx(3.0 + 4.5)


def test_margins_that_are_all_scaled_separate_no_better():
    small = Separation([1.0, 2.0, 3.0, 6.0])
    assert (small.mean, small.ratio) == (3.0, pytest.approx(3 / (14 / 3) ** 0.5))
    assert Separation([10 * nats for nats in small.margins]).ratio == pytest.approx(small.ratio)


def test_ties_are_wrong_and_those_of_both_methods_are_not_one_methods_alone():
    own = [Separation([0.0, -1.0, 2.0]), Separation([5.0, -2.0])]
    other = [Separation([1.0, -3.0, -4.0]), Separation([3.0, 4.0])]
    assert (wrong_alone(own, other), wrong_alone(other, own)) == (2, 1)
    assert summary("bapo", own).startswith("| **all 2** | bapo | 3 of 5 |")
