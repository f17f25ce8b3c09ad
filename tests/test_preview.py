"""What a training would be, before it starts."""

import pytest

from bapo.errors import BapoError
from bapo.pairs import Pair
from bapo.training.observation import steps_of
from bapo.training.plan import TrainingPlan
from bapo.training.preview import estimate, preview

PAIRS = [Pair(f"question {i}", "yes" * i, "no") for i in range(1, 21)]


def test_lengths_are_those_of_the_trained_tokens(tiny_base):
    shown = preview(tiny_base, PAIRS, max_response_tokens=40)
    for role, ids in (
        ("prompt", [tiny_base.encode_prompt(pair.prompt) for pair in PAIRS]),
        ("chosen", [tiny_base.encode_response(pair.prompt, pair.chosen) for pair in PAIRS]),
        ("rejected", [tiny_base.encode_response(pair.prompt, pair.rejected) for pair in PAIRS]),
    ):
        counts = sorted(map(len, ids))
        assert shown.lengths[role].longest == counts[-1], role
        assert shown.lengths[role].p95 == counts[18], role
    assert shown.cut == sum(len(tiny_base.encode_response(p.prompt, p.chosen)) > 40 for p in PAIRS)
    first = tiny_base.tokenizer.decode(tiny_base.encode_response("question 1", "yes"))
    assert shown.rows[0][1] == first


def test_a_conversation_that_the_template_refuses_is_a_sentence(llama_base):
    llama_base.tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(BapoError, match=r"does not take this conversation: only user and assistant"):
        preview(llama_base, [Pair((("system", "x"), ("user", "y")), "a", "b")], 40)


def test_an_estimate_grows_with_what_is_asked(llama_base):
    one = TrainingPlan(preference="x", method="bapo", batch_size=4)
    three = TrainingPlan(preference="x", method="bapo", batch_size=4, epochs=3)
    base = estimate(llama_base, PAIRS, [one])
    assert base.steps == 5  # 18 of 20 prompts are trained on
    assert estimate(llama_base, PAIRS, [three]).steps == 15
    assert estimate(llama_base, PAIRS, [three]).seconds > base.seconds
    assert estimate(llama_base, PAIRS * 3, [one]).seconds == pytest.approx(base.seconds, rel=0.5), "shared text is free"
    assert estimate(llama_base, PAIRS, [one, one]).seconds < 2 * base.seconds, "the second finds the references ready"
    assert base.memory_bytes > 0.9e9


def test_observations_end_with_the_last_step_and_leave_short_runs_alone():
    assert steps_of(80) == {10, 20, 30, 40, 50, 60, 70, 80}
    assert steps_of(6) == {3, 6}
    assert [steps_of(total) for total in (1, 2, 3)] == [{1}, {2}, {3}]
