"""Reading pairs: what is taken, what is refused and in which words. And our own set."""

import json

import pytest

from bapo.errors import BapoError
from bapo.pairs import Pair, hash_of, own_pairs, preference_set, read_pairs, split_by_prompt, usable_pairs
from bapo.preferences import CATALOGUE, rejected_beside

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def write(tmp_path, *lines, name="pairs.jsonl"):
    file = tmp_path / name
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_json_lines_and_a_json_list_are_read_alike(tmp_path):
    expected = [Pair("p", "a", "b"), Pair("héllo 你好", "x", "y")]
    rows = [GOOD, {"prompt": " héllo 你好 ", "chosen": "x", "rejected": "y\n", "extra": 1}]
    lines = read_pairs(write(tmp_path, *rows))
    listed = read_pairs(write(tmp_path, json.dumps(rows, indent=1), name="pairs.json"))
    assert lines.pairs == listed.pairs == expected
    assert (lines.prompts, lines.problems, lines.notes) == (2, [], [])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{broken", 'row 2: expected a JSON object such as {"prompt": …}'),
        ("[1]", "row 2: expected a JSON object with prompt, chosen, rejected"),
        ({"prompt": "p", "chosen": "a"}, "row 2, column 'rejected': is missing"),
        ({**GOOD, "chosen": 3}, "row 2, column 'chosen': expected text, found int"),
        ({**GOOD, "prompt": "  "}, "row 2, column 'prompt': is empty"),
        ({**GOOD, "rejected": " a "}, "row 2, column 'rejected': is the same text as chosen; a pair must differ"),
    ],
)
def test_a_faulty_row_is_named_and_the_others_are_kept(tmp_path, row, sentence):
    report = read_pairs(write(tmp_path, GOOD, row, {**GOOD, "chosen": "c"}))
    assert [str(problem) for problem in report.problems] == [sentence]
    assert [pair.chosen for pair in report.pairs] == ["a", "c"]
    with pytest.raises(BapoError, match="1 faulty rows .*pairs check"):
        usable_pairs(write(tmp_path, GOOD, row))


def test_duplicates_and_contradictions_are_noted(tmp_path):
    report = read_pairs(write(tmp_path, GOOD, GOOD, GOOD, {"prompt": "p", "chosen": "b", "rejected": "a"}))
    assert report.notes == [
        "2 pairs are exact duplicates of an earlier one.",
        "1 pairs contradict each other: the same two responses in both directions.",
    ]


def test_a_line_separator_inside_a_text_is_no_new_row(tmp_path):
    line = json.dumps({**GOOD, "chosen": "one\u2028two"}, ensure_ascii=False)
    assert read_pairs(write(tmp_path, line)).pairs[0].chosen == "one\u2028two"


def test_all_pairs_of_a_prompt_fall_on_the_same_side():
    pairs = [Pair(f"p{i}", "a", word) for i in range(10) for word in ("b", "c")]
    training, held_out = split_by_prompt(pairs, 0.3, seed=0)
    assert (len(training), len(held_out)) == (14, 6)
    assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}
    assert split_by_prompt(list(reversed(pairs)), 0.3, seed=0)[1] == list(reversed(held_out))
    assert split_by_prompt(pairs, 0.3, seed=1)[1] != held_out


def test_the_hash_sees_every_text_and_the_order():
    pairs = [Pair("p", "a", "b"), Pair("p", "a", "c")]
    assert hash_of(pairs) == hash_of(list(pairs))
    assert len({hash_of(pairs), hash_of(pairs[::-1]), hash_of([Pair("p", "a", "b"), Pair("p", "ab", "")])}) == 3


def test_our_own_set_keeps_its_rules():
    prompts = preference_set()
    assert len(prompts) == 166
    assert sum(item.held_out for item in prompts) == 34
    assert len({item.kind for item in prompts}) >= 12
    assert len({item.prompt for item in prompts}) == len({item.id for item in prompts}) == len(prompts)
    for item in prompts:
        assert list(item.responses) == list(CATALOGUE), item.id
        assert len(set(item.responses.values())) == len(CATALOGUE), item.id
        for preference, text in item.responses.items():
            assert 25 <= len(text.split()) <= (110 if preference == "P2B" else 90), (item.id, preference)
        words = {preference: len(text.split()) for preference, text in item.responses.items()}
        assert words["P2A"] == min(words.values()), item.id
        assert words["P2B"] == max(words.values()), item.id


def test_a_style_is_preferred_to_the_other_end_of_its_dimension():
    assert [rejected_beside(style) for style in ("P1A", "P1B", "P2A", "P2B", "P3A", "P3B")] == [
        ["P1B"], ["P1A"], ["P2B"], ["P2A"], ["P3B"], ["P3A"],
    ]  # fmt: skip
    assert len(own_pairs("P2A", held_out=True)) == 34


def test_a_domain_is_preferred_to_the_other_domains_and_the_plain_answer():
    rejected = ("academy", "business", "entertainment", "P2A")
    first = next(item for item in preference_set() if item.held_out)
    own = [pair for pair in own_pairs("literature", held_out=True) if pair.prompt == first.prompt]
    assert [pair.rejected for pair in own] == [first.responses[other] for other in rejected]
    assert {pair.chosen for pair in own} == {first.responses["literature"]}

    items = [item for item in preference_set() if not item.held_out]
    in_turn = [items[place].responses[other] for place, other in enumerate(4 * list(rejected))]
    assert [pair.rejected for pair in own_pairs("literature", held_out=False)][:16] == in_turn


def test_the_detailed_answer_begins_with_the_concise_one():
    # So that the two differ in nothing but where they stop.
    for item in preference_set():
        assert item.responses["P2B"].startswith(item.responses["P2A"] + " "), item.id


def test_an_unknown_preference_has_no_pairs_of_ours():
    with pytest.raises(BapoError, match="no preference 'P9'"):
        own_pairs("P9", held_out=False)
