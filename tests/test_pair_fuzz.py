"""Files nobody would write: whatever is in them, they end in pairs or in a report, quickly and in little memory."""

import gzip
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bapo.errors import BapoError
from tests.test_pair_files import parquet, read

texts = st.text(max_size=40) | st.sampled_from(
    ["", "\0", "\ud800", "=cmd()", '"', "\n\nHuman: a\n\nAssistant: b", "[", "{}"]
)
values = st.recursive(
    texts | st.none() | st.booleans() | st.floats() | st.integers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "response", "score", "from", "value", "a"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    [
        "prompt",
        "chosen",
        "rejected",
        "query",
        "responses",
        "scores",
        "completions",
        "user_input",
        "completion_a",
        "x",
        "",
    ]
)
rows = st.lists(st.dictionaries(columns, values, max_size=5) | values, max_size=6)


def _spoilt(data: bytes, rng: random.Random) -> bytes:
    """The file truncated, with bytes changed or repeated, or as it was."""
    kind = rng.randrange(4)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 8))) + data[at + 1 :]
    if kind == 2:
        return data[:at] + data[max(0, at - 20) : at] * rng.randrange(1, 500) + data[at:]
    return data


def _written(rows: list, form: str) -> bytes:
    if form == "jsonl":
        return "\n".join(json.dumps(row) for row in rows).encode()
    if form == "json":
        return json.dumps(rows, indent=1).encode()
    objects = [row for row in rows if isinstance(row, dict)] or [{"prompt": "p"}]
    names = list(dict.fromkeys(name for row in objects for name in row))
    if form == "parquet":
        return parquet([{name: json.dumps(row.get(name)) for name in names or ["x"]} for row in objects])
    mark = {"csv": ",", "tsv": "\t"}[form]
    body = [mark.join(names), *(mark.join(str(row.get(name)) for name in names) for row in objects)]
    return "\n".join(body).encode("utf-8", "surrogatepass")


@settings(
    max_examples=2000, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    rows=rows,
    form=st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet"]),
    packed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_file_ends_in_pairs_or_in_a_report(tmp_path, rows, form, packed, seed):
    rng = random.Random(seed)
    data = _spoilt(_written(rows, form), rng)
    if packed:
        data = _spoilt(gzip.compress(data), rng)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        report = read(tmp_path, f"a.{form}", data)
    except BapoError as error:
        assert str(error).startswith("a.")
        return
    for pair in report.pairs:
        assert pair.prompt and pair.chosen.strip() and pair.rejected.strip()
        assert pair.chosen != pair.rejected
    assert len({problem.row for problem in report.problems}) <= report.rows
    assert bool(report.question) <= (not report.pairs)
    assert all(str(problem).startswith("row ") for problem in report.problems)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: a gigabyte


MEASURE = """
import re, sys
from pathlib import Path
from bapo.errors import BapoError
from bapo.pairs import read_pairs
try:
    print(len(read_pairs(Path(sys.argv[1])).problems))
except BapoError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize(
    "content",
    [
        "[" + "[]," * (10 * 2**20),
        "[" + "[" + "[]," * (10 * 2**20),
        '{"data": [' + '{"a":{}},' * (3 * 2**20),
        ("[" * 900 + "]" * 900 + "\n") * 17_000,
        '{"prompt": "' + "😀" * (7 * 2**20) + '"}',
        'prompt,chosen\n"' + "x" * (31 * 2**20),
        "a,b\n" * (8 * 2**20),
    ],
    ids=["lists", "nested lists", "wrapped objects", "deep lines", "one field", "open quote", "short rows"],
)
def test_the_worst_files_stay_within_a_gigabyte(tmp_path, content):
    file = tmp_path / "worst"
    file.write_text(content[: 32 * 2**20 - 4], encoding="utf-8", errors="ignore")
    with file.open("rb+") as cut:
        cut.truncate(min(file.stat().st_size, 32 * 2**20))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1024


def test_a_parquet_bomb_is_refused(tmp_path):
    repeated = parquet([{"prompt": "x" * 2**19, "chosen": "a", "rejected": "b"}] * 200)
    assert len(repeated) < 2**20  # one dictionary entry of half a megabyte, two hundred times
    report = read(tmp_path, "a.parquet", repeated)
    assert len(report.pairs) == 200
    wide = parquet([{"prompt": str(i) + "x" * 2**20} for i in range(40)])
    with pytest.raises(BapoError, match="unpacks to more than"):
        read(tmp_path, "a.parquet", wide)
