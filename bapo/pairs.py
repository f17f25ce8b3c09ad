"""Preference pairs: our own set, files of the user's, and what is wrong with them, row by row."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from bapo.errors import BapoError
from bapo.preferences import CATALOGUE, family_of

PREFERENCE_SET = Path(__file__).parent / "data" / "preference_set.jsonl"
COLUMNS = ("prompt", "chosen", "rejected")
MAX_FILE_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with the response that was preferred and one that was not."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one row. `row` counts lines (JSON lines) or items (JSON) from 1."""

    row: int
    column: str | None
    expected: str

    def __str__(self) -> str:
        place = f"row {self.row}" + (f", column {self.column!r}" if self.column else "")
        return f"{place}: {self.expected}"


@dataclass(slots=True)
class PairsReport:
    """What a file holds: the usable pairs, the faulty rows, and what deserves a second look."""

    file: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        return len({pair.prompt for pair in self.pairs})

    def as_dict(self) -> dict:
        return {
            "file": self.file,
            "pairs": len(self.pairs),
            "prompts": self.prompts,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": self.notes,
        }


@dataclass(frozen=True, slots=True)
class PreferencePrompt:
    """One prompt of our own set: ten responses of the same content, one per preference id."""

    id: str
    kind: str
    held_out: bool
    prompt: str
    responses: dict[str, str]


@cache
def preference_set() -> tuple[PreferencePrompt, ...]:
    """Our own preference set, as it is shipped."""
    rows = [json.loads(line) for line in PREFERENCE_SET.read_text(encoding="utf-8").splitlines()]
    return tuple(
        PreferencePrompt(row["id"], row["kind"], row["split"] == "heldout", row["prompt"], row["responses"])
        for row in rows
    )


def own_pairs(preference_id: str, *, held_out: bool) -> list[Pair]:
    """Pairs of our own set for one preference (paper, Appendix A).

    chosen is the response in the wanted preference, rejected each other response of the same family.
    """
    if preference_id not in CATALOGUE:
        raise BapoError(
            f"There is no preference {preference_id!r} in the catalogue ({', '.join(CATALOGUE)}). "
            "For a taste of your own give its pairs with --pairs FILE."
        )
    wanted, *others = family_of(preference_id)
    return [
        Pair(item.prompt, item.responses[wanted], item.responses[other])
        for item in preference_set()
        if item.held_out == held_out
        for other in others
    ]


def read_prompts(file: Path) -> list[str]:
    """Prompts of a text file, one a line, each once."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BapoError(f"{file} cannot be read: expected a UTF-8 text file with one prompt a line.") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise BapoError(f"{file} holds no prompts: expected one a line.")
    return prompts


def split_by_prompt(pairs: list[Pair], held_out_share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs; all pairs of a prompt fall on the same side."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: round(len(prompts) * held_out_share)])
    training = [pair for pair in pairs if pair.prompt not in held_out]
    return training, [pair for pair in pairs if pair.prompt in held_out]


def hash_of(pairs: Iterable[Pair]) -> str:
    """SHA-256 (hex) over the pairs in their order."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def read_pairs(path: Path) -> PairsReport:
    """Read a file of pairs: JSON lines or a JSON list of {"prompt", "chosen", "rejected"}, UTF-8.

    Faulty rows end up in `problems`, never in `pairs`. Raises `BapoError` where the file as a whole
    cannot be read.
    """
    text = _text_of(path)
    report = PairsReport(path.name)
    for row, value in _rows(text, path, report):
        problems = list(_problems(row, value))
        report.problems += problems
        if not problems:
            report.pairs.append(Pair(*(value[column].strip() for column in COLUMNS)))
    report.problems.sort(key=lambda problem: problem.row)
    report.notes = list(_notes(report.pairs))
    return report


def usable_pairs(path: Path) -> list[Pair]:
    """The pairs of a file in which nothing is wrong; otherwise a `BapoError` that names the first faults."""
    report = read_pairs(path)
    if report.problems:
        first = "; ".join(str(problem) for problem in report.problems[:3])
        raise BapoError(
            f"{path.name} has {len({problem.row for problem in report.problems})} faulty rows ({first}). "
            f"See them all with: python -m bapo pairs check {path}"
        )
    if not report.pairs:
        raise BapoError(f"{path.name} holds no pairs; expected JSON lines with {', '.join(COLUMNS)}.")
    return report.pairs


def _text_of(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BapoError(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MB; split it into smaller files.")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BapoError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise BapoError(f"{path} cannot be read: {error.strerror}.") from error


def _rows(text: str, path: Path, report: PairsReport):
    """(row number, parsed value) of a JSON list or of JSON lines; lines that do not parse are reported."""
    if text.lstrip().startswith("["):
        try:
            yield from enumerate(json.loads(text), start=1)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BapoError(f"{path.name} starts like a JSON list but is not valid JSON: {error}.") from error
        return
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            report.problems.append(Problem(number, None, 'expected a JSON object such as {"prompt": …}'))
            continue
        yield number, value


def _problems(row: int, value: object) -> Iterable[Problem]:
    if not isinstance(value, dict):
        yield Problem(row, None, "expected a JSON object with " + ", ".join(COLUMNS))
        return
    sound = True
    for column in COLUMNS:
        if column not in value:
            sound = False
            yield Problem(row, column, "is missing")
        elif not isinstance(value[column], str):
            sound = False
            yield Problem(row, column, f"expected text, found {type(value[column]).__name__}")
        elif not value[column].strip():
            sound = False
            yield Problem(row, column, "is empty")
    if sound and value["chosen"].strip() == value["rejected"].strip():
        yield Problem(row, "rejected", "is the same text as chosen; a pair must differ")


def _notes(pairs: list[Pair]) -> Iterable[str]:
    duplicates = sum(count - 1 for count in Counter(pairs).values())
    if duplicates:
        yield f"{duplicates} pairs are exact duplicates of an earlier one."
    known = set(pairs)
    opposed = sum(Pair(pair.prompt, pair.rejected, pair.chosen) in known for pair in known) // 2
    if opposed:
        yield f"{opposed} pairs contradict each other: the same two responses in both directions."
