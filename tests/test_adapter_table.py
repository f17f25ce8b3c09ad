"""What the README's table reads off answers, against counts by hand."""

import pytest

from bapo.disk_cache import DiskCache
from bapo.inference.base_responses import greedy_responses
from bapo.inference.policies import Policies
from benchmarks import adapter_table
from benchmarks.adapter_table import (
    FACT_TOKENS,
    FACTS,
    HELD_OUT,
    GreedyAnswers,
    before_loop,
    contractions,
    exclamations,
    grade,
    is_right,
    line_breaks,
    loops,
    table,
)


def test_right_answers_are_whole_words():
    assert is_right("The capital is PARIS.", ["paris"])
    assert not is_right("The comparison fails.", ["paris"])
    assert is_right("It is H₂O, water.", ["h2o", "h₂o"])
    assert not is_right("That makes 150.", ["15"])


def test_sixty_plain_questions_that_do_not_give_their_answers_away():
    assert len(FACTS) == len({item["question"] for item in FACTS}) == 60
    for item in FACTS:
        assert item["answers"], item["id"]
        assert all(one == one.lower() for one in item["answers"]), item["id"]
        assert not is_right(item["question"], item["answers"]), item["id"]


def test_a_loop_is_four_words_four_times():
    assert not loops("la femme la femme la femme la femme")  # "la femme la femme" three times
    assert loops("la femme la femme la femme la femme la femme")
    assert not loops("one two three four " * 3)
    assert not loops("")


def test_traits():
    assert exclamations("Oh! What a day, my friend!") == pytest.approx(100 * 2 / 6)
    assert contractions("It's late and they\u2019re not here, so don't wait; its door 'd be") == pytest.approx(
        100 * 3 / 13
    )
    assert line_breaks("Soft falls the snow,\nthe winds now blow.\n\nThe end") == pytest.approx(100 * 3 / 10)
    assert contractions("") == line_breaks("") == 0
    hard = "Photosynthetic organisms preferentially sequester atmospheric carbon, notwithstanding seasonal variability."
    assert grade(hard) > grade("The cat sat on the mat. It was warm.") + 10


def test_the_table_ends_with_means_and_deviations():
    rows = [
        ["P2A", "bapo", 0.9, -6.0, -0.1, 1.0, 0.0, "words 90.0 → 40.0"],
        ["P2B", "bapo", 1.0, 2.0, 0.1, 0.5, 0.5, ""],
        ["P2A", "dpo", 0.9, 12.0, 0.2, 0.8, 0.0, ""],
    ]
    lines = table(rows).splitlines()
    assert lines[2] == "| P2A | bapo | 0.900 | -6.0 | -0.100 | 100% | 0% | words 90.0 → 40.0 |"
    assert (
        lines[-1] == "| **mean of 2** | bapo | 0.950 ± 0.071 | -2.0 ± 5.7 | +0.000 ± 0.141 | 75% ± 35% | 25% ± 35% | |"
    )
    assert len(lines) == 6


def test_answers_of_many_at_once_are_the_plain_greedy_ones(tiny_engine, monkeypatch, tmp_path):
    base, store = tiny_engine.base, tiny_engine.store
    adapters = [adapter for methods in store.by_preference().values() for adapter in methods.values()]
    prompts = [item["question"] for item in FACTS[:2]]
    asked = [*((prompt, FACT_TOKENS) for prompt in prompts), (HELD_OUT[0], 20)]
    plain = [response.text for response in greedy_responses(base, prompts, FACT_TOKENS)]
    answers = GreedyAnswers(Policies(base, 2**20, tmp_path / "ways", exact=True), DiskCache(tmp_path / "answers"))
    answers.prepare([None, *adapters, None], asked)
    assert [one["text"] for one in answers.of(None, asked[:2])] == plain
    own = [answers.of(adapter, asked) for adapter in adapters]
    assert any(one != answers.of(None, asked) for one in own)
    monkeypatch.setattr(adapter_table, "decode", None)
    answers.prepare([None, *adapters], asked)  # from the disk
    assert [answers.of(adapter, asked) for adapter in adapters] == own


def test_a_loop_begins_before_its_second_round():
    assert before_loop("one two three four five six") == 6
    assert before_loop("so it goes " + "a b c d " * 3) == 15
    assert before_loop("so it goes " + "a b c d " * 4) == 7
    assert before_loop("x " * 50) == 4
    assert before_loop("") == 0
