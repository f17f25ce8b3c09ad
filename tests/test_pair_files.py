"""Files as they come: every format and every layout read exactly, and what is broken told in a sentence."""

import csv
import gzip
import json
import zlib

import pytest

from bapo.errors import BapoError
from bapo.pair_files import ReadLimits
from bapo.pairs import Pair, read_pairs, usable_pairs, write_pairs

PAIRS = [
    Pair("Why is the sky blue?", "Air scatters blue light.", "It is."),
    Pair("é “你好”?", "one,\ntwo", "three;\tfour"),
]
USER, ASSISTANT = "user", "assistant"


def say(role, content):
    return {"role": role, "content": content}


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(tmp_path, name, data, **options):
    file = tmp_path / name
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_pairs(file, **options)


def as_rows(pairs):
    return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]


def table(pairs, delimiter):
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "chosen", "rejected"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(as_rows(pairs))
    return text.getvalue()


def parquet(rows) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(*as_rows(PAIRS))),
        ("a.jsonl", "\ufeff" + lines(*as_rows(PAIRS)).replace("\n", "\r\n")),
        ("a.json", json.dumps(as_rows(PAIRS), indent=2)),
        ("a.json", json.dumps({"data": as_rows(PAIRS)}, indent=2)),
        ("a.json", lines(*as_rows(PAIRS))),
        ("a.csv", table(PAIRS, ",")),
        ("a.csv", table(PAIRS, ";")),
        ("a.tsv", table(PAIRS, "\t")),
        ("a.tsv", table(PAIRS, "\t").encode("utf-16")),
        ("a.parquet", parquet(as_rows(PAIRS))),
        ("a.jsonl.gz", gzip.compress(lines(*as_rows(PAIRS)).encode())),
        ("a.csv.gz", gzip.compress(table(PAIRS, ",").encode())),
        ("no-suffix", table(PAIRS, ",")),
    ],
)
def test_every_format_holds_the_same_pairs(tmp_path, name, data):
    report = read(tmp_path, name, data)
    assert (report.pairs, report.problems, report.rows) == (PAIRS, [], 2)


QUESTION, GOOD, BAD = "What is 2 + 2?", "Four.", "Five, I think."
TURNS = [say(USER, "Hi"), say(ASSISTANT, "Hello."), say(USER, QUESTION)]
TALK = ((USER, "Hi"), (ASSISTANT, "Hello."), (USER, QUESTION))
SYSTEM = [say("system", "Be kind."), say(USER, QUESTION)]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        # TRL: text, conversational, implicit prompt in both
        ({"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}, [Pair(QUESTION, GOOD, BAD)]),
        (
            {"prompt": [say(USER, QUESTION)], "chosen": [say(ASSISTANT, GOOD)], "rejected": [say(ASSISTANT, BAD)]},
            [Pair(QUESTION, GOOD, BAD)],
        ),
        (
            {"chosen": [*TURNS, say(ASSISTANT, GOOD)], "rejected": [*TURNS, say(ASSISTANT, BAD)]},
            [Pair(TALK, GOOD, BAD)],
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            [Pair("The sky is", "blue.", "green.")],
        ),
        # a system message stays; ShareGPT's names
        (
            {"chosen": [*SYSTEM, say(ASSISTANT, GOOD)], "rejected": [*SYSTEM, say(ASSISTANT, BAD)]},
            [Pair((("system", "Be kind."), (USER, QUESTION)), GOOD, BAD)],
        ),
        (
            {
                "prompt": [{"from": "human", "value": QUESTION}],
                "chosen": [{"from": "gpt", "value": GOOD}],
                "rejected": [{"from": "gpt", "value": BAD}],
            },
            [Pair(QUESTION, GOOD, BAD)],
        ),
        # Anthropic HH
        (
            {
                "chosen": f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
                "rejected": f"\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
            },
            [Pair(TALK, GOOD, BAD)],
        ),
        # UltraFeedback: as binarised by H4, and with scored completions
        (
            {
                "prompt": QUESTION,
                "chosen": [say(USER, QUESTION), say(ASSISTANT, GOOD)],
                "rejected": [say(USER, QUESTION), say(ASSISTANT, BAD)],
                "score_chosen": 9.0,
                "score_rejected": 2.0,
            },
            [Pair(QUESTION, GOOD, BAD)],
        ),
        (
            {
                "instruction": QUESTION,
                "completions": [
                    {"response": BAD, "overall_score": 2.0},
                    {"response": GOOD, "overall_score": 9.5},
                    {"response": "4!", "overall_score": 9.5},
                    {"response": "?", "overall_score": 1.0},
                ],
            },
            [Pair(QUESTION, GOOD, BAD), Pair(QUESTION, GOOD, "?")],
        ),
        (
            {"prompt": QUESTION, "responses": [BAD, GOOD], "scores": [0.1, 0.9]},
            [Pair(QUESTION, GOOD, BAD)],
        ),
        # P-Soups
        ({"user_input": QUESTION, "completion_a": GOOD, "completion_b": BAD}, [Pair(QUESTION, GOOD, BAD)]),
        # one chosen, several rejected
        (
            {"question": QUESTION, "chosen": GOOD, "rejected": [BAD, "No idea."]},
            [Pair(QUESTION, GOOD, BAD), Pair(QUESTION, GOOD, "No idea.")],
        ),
    ],
)
def test_layouts_in_use_are_understood_without_asking(tmp_path, row, pairs):
    for name, data in (("a.jsonl", lines(row)), ("a.parquet", parquet([row]))):
        report = read(tmp_path, name, data)
        assert (report.pairs, report.problems, report.question) == (pairs, [], ""), name
    cells = {column: value if isinstance(value, str) else json.dumps(value) for column, value in row.items()}
    if not isinstance(row.get("rejected"), list) or isinstance(row["rejected"][0], dict):
        text = ",".join(cells) + "\n" + ",".join('"' + str(cell).replace('"', '""') + '"' for cell in cells.values())
        assert read(tmp_path, "a.csv", text).pairs == pairs


def test_responses_by_name_ask_which_one_is_wanted(tmp_path):
    row = {"query": QUESTION, "responses": {"academy": GOOD, "business": BAD, "normal": "Hm."}}
    asked = read(tmp_path, "a.jsonl", lines(row))
    assert (asked.pairs, asked.names) == ([], ["academy", "business", "normal"])
    assert "wanted" in asked.question
    report = read(tmp_path, "a.jsonl", lines(row), wanted="academy")
    assert report.pairs == [Pair(QUESTION, GOOD, BAD), Pair(QUESTION, GOOD, "Hm.")]
    wrong = read(tmp_path, "a.jsonl", lines(row), wanted="poetry")
    assert [str(problem) for problem in wrong.problems] == ["row 1, column 'responses': has no response named 'poetry'"]


def test_unknown_columns_are_asked_for_with_a_guess(tmp_path):
    row = {"id": 7, "user text": QUESTION, "losing answer": BAD, "winning answer": GOOD}
    asked = read(tmp_path, "a.jsonl", lines(row))
    assert asked.guess == {"prompt": "user text", "chosen": "winning answer", "rejected": "losing answer"}
    assert "Which columns" in asked.question
    assert read(tmp_path, "a.jsonl", lines(row), columns=asked.guess).pairs == [Pair(QUESTION, GOOD, BAD)]
    with pytest.raises(BapoError, match="Which columns"):
        usable_pairs(tmp_path / "a.jsonl")


def test_written_pairs_are_read_back_exactly(tmp_path):
    pairs = [*PAIRS, Pair(TALK, GOOD, BAD), Pair("\u2028 x \u0085", "a\rb", "[1]"), Pair("p", '[{"a": 1}]x', "{}")]
    write_pairs(pairs, tmp_path / "a.jsonl")
    assert usable_pairs(tmp_path / "a.jsonl") == [
        Pair(one.prompt.strip() if isinstance(one.prompt, str) else one.prompt, one.chosen, one.rejected)
        for one in pairs
    ]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"chosen": [say(USER, "x")], "rejected": [say(USER, "y")]}, "column 'chosen': must end with the assistant's"),
        (
            {"chosen": [*TURNS, say(ASSISTANT, GOOD)], "rejected": [say(USER, "Other"), say(ASSISTANT, BAD)]},
            "column 'rejected': must be the same conversation as chosen up to the last message",
        ),
        (
            {"prompt": "other", "chosen": [*TURNS, say(ASSISTANT, GOOD)], "rejected": BAD},
            "column 'chosen': begins with another conversation than the column 'prompt' holds",
        ),
        (
            {"prompt": [say("robot", "x")], "chosen": GOOD, "rejected": BAD},
            "column 'prompt': every message needs a role",
        ),
        ({"prompt": [say(ASSISTANT, "x")], "chosen": "a", "rejected": "b"}, "must end with the user's message"),
        ({"prompt": QUESTION, "responses": [GOOD, BAD], "scores": [1]}, "column 'scores': expected a list of 2 scores"),
        ({"prompt": QUESTION, "responses": [GOOD, BAD], "scores": [1, 1]}, "all responses have the same score"),
        ({"prompt": QUESTION, "responses": [GOOD, BAD], "scores": [1, "x"]}, "expected a number as score, found 'x'"),
        ({"prompt": QUESTION, "chosen": "a\0", "rejected": "b"}, "column 'chosen': holds a NUL character"),
        (
            {"prompt": QUESTION, "chosen": "a\ud800", "rejected": "b"},
            "column 'chosen': is not UTF-8 text at character 2",
        ),
        ({"chosen": "abc", "rejected": "xyz"}, "column 'prompt': is missing"),
        ({f"c{i}": 1 for i in range(600)} | {"prompt": "p", "chosen": "a"}, "column 'rejected': is missing"),
    ],
)
def test_faulty_rows_are_told_in_a_sentence(tmp_path, row, sentence):
    good = {column: value for column, value in row.items() if column in ("prompt", "responses", "scores")}
    report = read(tmp_path, "a.jsonl", json.dumps(row))
    assert not report.pairs, good
    assert [problem.row for problem in report.problems] == [1]
    assert sentence in str(report.problems[0])


def test_a_table_with_faulty_rows_keeps_the_others(tmp_path):
    text = 'prompt,chosen,rejected\np,a,b\np,a\n\n=1+1,=cmd,"b"\np,é,b\n'
    report = read(tmp_path, "a.csv", text.encode("latin-1"))
    assert report.pairs == [Pair("p", "a", "b"), Pair("=1+1", "=cmd", "b")]
    assert [str(problem) for problem in report.problems] == [
        "row 2: expected 3 fields as in the first line, found 2",
        "row 4, column 'chosen': is not UTF-8 text at character 1; save the file as UTF-8",
    ]
    opened = read(tmp_path, "b.csv", 'prompt,chosen,rejected\np,a,b\np,"' + "x\n" * 100_000)
    assert (len(opened.pairs), "quotation mark" in opened.problems[0].expected) == (1, True)


def test_a_json_list_that_breaks_off_keeps_what_came_before(tmp_path):
    report = read(tmp_path, "a.json", json.dumps(as_rows(PAIRS))[:-20])
    assert (report.pairs, str(report.problems[0])) == (
        PAIRS[:1],
        "row 2: is not valid JSON; it and what follows cannot be read",
    )
    deep = read(tmp_path, "a.json", "[" * 100_000)
    assert "not valid JSON" in str(deep.problems[0])


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.jsonl", b"", "is empty; expected JSON lines, JSON, CSV"),
        ("a.jsonl", b"PK\x03\x04" + b"x" * 50, "zip archive or a spreadsheet"),
        ("a.csv", "a,b\n".encode("utf-16-le"), "holds NUL bytes"),
        ("a.jsonl.gz", gzip.compress(b"x" * 1000)[:-9], "truncated gzip"),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + b"\xff" * 50, "damaged gzip"),
        ("a.jsonl.gz", zlib.compress(bytes(50 * 2**20), wbits=31), "unpacks to more than 32 MB"),
        ("a.parquet", b"PAR1" + b"\0" * 100 + b"PAR1", "damaged Parquet"),
        ("a.parquet", parquet(as_rows(PAIRS))[:-30], "damaged Parquet"),
        ("a.csv", ",".join(map(str, range(100_000))) + "\n", "has 100,000 columns; expected 500 at most"),
        ("a.csv", "prompt,prompt,chosen\n1,2,3\n", "has the column 'prompt' twice"),
        ("a.csv", "just a text\nand another\n", "only one column"),
        ("a.csv", "x" * (2 * 2**20), "first line is longer than"),
        ("a.jsonl", lines(*({"prompt": str(i), "chosen": "a"} for i in range(20_001))), "more than 20,000 rows"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, data, sentence):
    with pytest.raises(BapoError, match=sentence):
        read(tmp_path, name, data)


def test_files_that_are_none_and_files_too_large(tmp_path):
    with pytest.raises(BapoError, match="does not exist"):
        read_pairs(tmp_path / "absent.jsonl")
    with pytest.raises(BapoError, match="is not a file"):
        read_pairs(tmp_path)
    huge = tmp_path / "huge.jsonl"
    with huge.open("wb") as sparse:
        sparse.truncate(2 * 2**30)
    with pytest.raises(BapoError, match="larger than 32 MB"):
        read_pairs(huge)
    with pytest.raises(BapoError, match="larger than 0 MB"):
        read(tmp_path, "a.jsonl", lines(*as_rows(PAIRS)), limits=ReadLimits(bytes=10))
