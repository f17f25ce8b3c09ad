"""Preference pairs: our own set, files of the user's, and what is wrong with them, row by row."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path

from bapo.errors import BapoError
from bapo.pair_files import FORMATS, Problem, ReadLimits, read_rows
from bapo.pair_layouts import Fault, Layout, Pair, guess, names_in, pairs_of, recognise
from bapo.preferences import CATALOGUE, rejected_beside

PREFERENCE_SET = Path(__file__).parent / "data" / "preference_set.jsonl"
COLUMNS = ("prompt", "chosen", "rejected")
SAMPLE_ROWS = 50  # what a layout is recognised by


@dataclass(slots=True)
class PairsReport:
    """What a file holds: the usable pairs, the faulty rows, and what deserves a second look.

    Where the user has to decide something before pairs can be read, `pairs` is empty and `question`
    says what: `guess` names the columns that might hold prompt, chosen and rejected, or `names` lists
    the responses of which one is wanted.
    """

    file: str
    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    columns: list[str] = field(default_factory=list)
    layout: Layout | None = None
    question: str = ""
    guess: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def prompts(self) -> int:
        return len({pair.prompt for pair in self.pairs})

    @property
    def faulty_rows(self) -> int:
        return len({problem.row for problem in self.problems})

    def as_dict(self) -> dict:
        return {
            "file": self.file,
            "rows": self.rows,
            "pairs": len(self.pairs),
            "prompts": self.prompts,
            "problems": [asdict(problem) for problem in self.problems],
            "notes": self.notes,
            "columns": self.columns,
            "question": self.question,
            "guess": self.guess,
            "names": self.names,
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
    """Pairs of our own set: chosen is the response in the wanted preference, rejected what `rejected_beside` names.

    A held-out prompt gives a pair with each of these, a training prompt one pair, with each of them in turn: the
    steps that four pairs of one prompt take teach more as one pair of four prompts.
    """
    if preference_id not in CATALOGUE:
        raise BapoError(
            f"There is no preference {preference_id!r} in the catalogue ({', '.join(CATALOGUE)}). "
            "For a taste of your own give its pairs with --pairs FILE."
        )
    others = rejected_beside(preference_id)
    return [
        Pair(item.prompt, item.responses[preference_id], item.responses[other])
        for place, item in enumerate(item for item in preference_set() if item.held_out == held_out)
        for other in (others if held_out else [others[place % len(others)]])
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
    prompts = sorted(
        {pair.prompt for pair in pairs}, key=lambda prompt: prompt if isinstance(prompt, str) else str(prompt)
    )
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: round(len(prompts) * held_out_share)])
    training = [pair for pair in pairs if pair.prompt not in held_out]
    return training, [pair for pair in pairs if pair.prompt in held_out]


def hash_of(pairs: Iterable[Pair]) -> str:
    """SHA-256 (hex) over the pairs in their order."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def read_pairs(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    wanted: str | None = None,
    limits: ReadLimits | None = None,
) -> PairsReport:
    """Read a file of pairs in any of the layouts of `bapo.pair_layouts`.

    `columns` names the columns of prompt, chosen and rejected where they cannot be recognised;
    `wanted` the preferred response where a row holds responses by name. Faulty rows end up in
    `problems`, never in `pairs`. Raises `BapoError` where the file as a whole cannot be read.
    """
    report = PairsReport(path.name)
    rows = read_rows(path, limits or ReadLimits())
    sample = list(islice(rows, SAMPLE_ROWS))
    objects = [value for _, value in sample if isinstance(value, dict)]
    report.columns = list(dict.fromkeys(str(column)[:200] for value in objects for column in list(value)[:500]))
    report.layout = Layout("pairs", **columns) if columns else recognise(objects)
    if report.layout is None and objects:
        report.guess = guess(objects)
        report.question = "Which columns hold prompt, chosen and rejected?"
        return report
    if report.layout and report.layout.kind == "named":
        report.names = names_in(objects, report.layout)
        if wanted is None:
            report.question = "Which of the named responses is the wanted one?"
            return report
    layout = report.layout or Layout("pairs", "prompt")
    for chunk in (sample, rows):
        for number, value in chunk:
            report.rows += 1
            _take(number, value, layout, wanted, report)
    report.notes = list(_notes(report.pairs, layout))
    return report


def _take(number: int, value: object, layout: Layout, wanted: str | None, report: PairsReport) -> None:
    if isinstance(value, Problem):
        report.problems.append(value)
        return
    if not isinstance(value, dict):
        report.problems.append(Problem(number, None, "expected a JSON object with " + ", ".join(COLUMNS)))
        return
    try:
        report.pairs += pairs_of(value, layout, wanted)
    except Fault as fault:
        report.problems.append(Problem(number, fault.column, fault.expected))


def usable_pairs(path: Path) -> list[Pair]:
    """The pairs of a file in which nothing is wrong; otherwise a `BapoError` that names the first faults."""
    report = read_pairs(path)
    if report.question:
        raise BapoError(
            f"{path.name}: {report.question} Its columns are {', '.join(report.columns[:20])}. Say it once with: "
            f"python -m bapo pairs convert {path} --help"
        )
    if report.problems:
        first = "; ".join(str(problem) for problem in report.problems[:3])
        raise BapoError(
            f"{path.name} has {report.faulty_rows} faulty rows ({first}). "
            f"See them all with: python -m bapo pairs check {path}"
        )
    if not report.pairs:
        raise BapoError(f"{path.name} holds no pairs; expected {', '.join(COLUMNS)} in {FORMATS}.")
    return report.pairs


def write_pairs(pairs: Iterable[Pair], path: Path) -> None:
    """Write pairs as JSON lines that `read_pairs` reads back exactly; a conversation becomes a list of messages."""
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps({**asdict(pair), "prompt": _plain_prompt(pair)}, ensure_ascii=False) + "\n")


def _plain_prompt(pair: Pair) -> str | list[dict[str, str]]:
    if isinstance(pair.prompt, str):
        return pair.prompt
    return [{"role": role, "content": text} for role, text in pair.prompt]


def _notes(pairs: list[Pair], layout: Layout) -> Iterable[str]:
    if layout.kind == "pairs" and layout.prompt is None and any(isinstance(pair.prompt, str) for pair in pairs):
        yield "There is no prompt column: the beginning that chosen and rejected share was taken as the prompt."
    duplicates = sum(count - 1 for count in Counter(pairs).values())
    if duplicates:
        yield f"{duplicates} pairs are exact duplicates of an earlier one."
    known = set(pairs)
    opposed = sum(Pair(pair.prompt, pair.rejected, pair.chosen) in known for pair in known) // 2
    if opposed:
        yield f"{opposed} pairs contradict each other: the same two responses in both directions."
