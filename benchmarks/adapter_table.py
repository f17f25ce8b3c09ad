"""What every adapter learnt, what it forgot and what one can see of it, as the table of the README. Run by hand:

    python -m benchmarks.adapter_table

Reward accuracy and drift come from the adapters' cards: held-out prompts of our own set. The rest is
read off greedy answers, to the held-out prompts (length, readability, loops) and to the questions of
`facts.jsonl` (right answers). Eight policies answer at a time, as on the page. Answers are kept on the
disk, so that a second run only prints.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import textstat
from tqdm import tqdm

from bapo.adapters import Adapter, AdapterStore
from bapo.comparison import METHODS
from bapo.disk_cache import DiskCache
from bapo.inference.base import load_base
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.policies import Policies
from bapo.pairs import preference_set
from bapo.preferences import CATALOGUE
from bapo.settings import Settings

FACTS = [json.loads(line) for line in Path(__file__).with_name("facts.jsonl").read_text().splitlines()]
HELD_OUT = [item.prompt for item in preference_set() if item.held_out]
FACT_TOKENS, ANSWER_TOKENS = 48, 256  # a small base often never ends: answers are compared up to here

POLICIES_AT_ONCE = 8  # rows that the products of a CPU's decoding are written for

Question = tuple[str, int]  # with the tokens that an answer may have
Answers = dict[str, list[dict]]  # "facts" and "held out", each a list of texts with whether they ended


def words(text: str) -> float:
    return len(text.split())


def grade(text: str) -> float:
    """Automated Readability Index: the US school grade that reads the text, by letters a word and words a sentence."""
    return textstat.automated_readability_index(text)


def exclamations(text: str) -> float:
    """Exclamation marks per hundred words."""
    return 100 * text.count("!") / max(1, len(text.split()))


def contractions(text: str) -> float:
    """Short forms such as "it's" and "don't" per hundred words; possessives count too."""
    return 100 * len(re.findall(r"\w['’](?:s|re|ll|ve|t|d|m)\b", text)) / max(1, len(text.split()))


def line_breaks(text: str) -> float:
    """Line breaks per hundred words: verse has many."""
    return 100 * text.count("\n") / max(1, len(text.split()))


TRAITS: dict[str, tuple[str, Callable[[str], float]]] = {
    "P1A": ("school grade", grade),
    "P1B": ("school grade", grade),
    "P2A": ("words", words),
    "P2B": ("words", words),
    "P3A": ("! per 100 words", exclamations),
    "P3B": ("words", words),
    "academy": ("contractions per 100 words", contractions),
    "entertainment": ("! per 100 words", exclamations),
    "literature": ("line breaks per 100 words", line_breaks),
}


def is_right(answer: str, accepted: list[str]) -> bool:
    """Whether an accepted spelling stands in the answer as a whole word."""
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", answer.lower()) for one in accepted)


def before_loop(text: str) -> int:
    """Words up to the end of a loop's first round, a loop being some four words in a row that occur four times; all
    words where there is none."""
    tokens = text.lower().split()
    ends: dict[tuple[str, ...], list[int]] = {}
    for start in range(len(tokens) - 3):
        rounds = ends.setdefault(tuple(tokens[start : start + 4]), [])
        rounds.append(start + 4)
        if len(rounds) == 4:
            return rounds[0]
    return len(tokens)


def loops(text: str) -> bool:
    return before_loop(text) < len(text.split())


class GreedyAnswers:
    """Greedy answers of adapters and of the base (None), from the disk where they were given before."""

    def __init__(self, policies: Policies, known: DiskCache):
        self.policies = policies
        self.known = known
        self._weights: dict[str, str] = {}  # an adapter's key → the hash of its file, read once

    def prepare(self, who: list[Adapter | None], asked: Sequence[Question]) -> None:
        """Have those answer who have not answered yet."""
        for prompt, tokens in tqdm(asked, desc="answering", leave=False, file=sys.stderr):
            missing = [one for one in who if self._key(one, prompt, tokens) not in self.known]
            for start in range(0, len(missing), POLICIES_AT_ONCE):
                self._answer(missing[start : start + POLICIES_AT_ONCE], prompt, tokens)

    def of(self, one: Adapter | None, asked: Sequence[Question]) -> list[dict]:
        """What a prepared one answered."""
        return [self.known[self._key(one, *question)] for question in asked]

    def _answer(self, who: list[Adapter | None], prompt: str, tokens: int) -> None:
        base = self.policies.base
        ids: list[list[int]] = [[] for _ in who]
        rows = [Row(one) for one in who]
        for step in decode(self.policies, base.encode_prompt(prompt), rows, Sampling(max_new_tokens=tokens)):
            for token in step:
                ids[token.row].append(token.token_id)
        for one, own in zip(who, ids, strict=True):
            text = base.tokenizer.decode(own, skip_special_tokens=True)
            self.known[self._key(one, prompt, tokens)] = {"text": text, "complete": own[-1] in base.stop_ids}

    def _key(self, one: Adapter | None, prompt: str, tokens: int) -> list:
        weights = "base"
        if one is not None:
            weights = self._weights.get(one.key) or self._weights.setdefault(one.key, one.sha256)
        return [weights, self.policies.compact, prompt, tokens]


def questions() -> dict[str, list[Question]]:
    return {
        "facts": [(item["question"], FACT_TOKENS) for item in FACTS],
        "held out": [(prompt, ANSWER_TOKENS) for prompt in HELD_OUT],
    }


def right_answers(answers: Answers) -> int:
    return sum(is_right(one["text"], item["answers"]) for one, item in zip(answers["facts"], FACTS, strict=True))


def loop_share(answers: Answers) -> float:
    return statistics.mean(loops(one["text"]) for one in answers["held out"])


def trait(preference: str, answers: Answers) -> float | None:
    if preference not in TRAITS:
        return None
    return statistics.mean(TRAITS[preference][1](one["text"]) for one in answers["held out"])


def row(adapter: Adapter, base: Answers, own: Answers) -> list[str | float]:
    preference, card = adapter.card.preference, adapter.card.held_out
    assert card is not None  # our own set has held-out prompts
    before, after = trait(preference, base), trait(preference, own)
    shown = "" if before is None else f"{TRAITS[preference][0]} {before:.1f} → {after:.1f}"
    kept = right_answers(own) / right_answers(base)
    return [
        preference, adapter.card.method, card.reward_accuracy, card.drift_nats, card.drift_per_token,
        kept, loop_share(own), shown,
    ]  # fmt: skip


HEADINGS = (
    "preference",
    "method",
    "reward accuracy",
    "drift, nats a prompt",
    "a token",
    "facts kept",
    "loops",
    "trait",
)
FORMATS = ("", "", ".3f", "+.1f", "+.3f", ".0%", ".0%", "")


def table(rows: list[list]) -> str:
    """Markdown: the rows, then per method the mean with the standard deviation over preferences."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|" + "---:|" * 5 + "---|"]
    for cells in rows:
        lines.append("| " + " | ".join(format(c, f) for c, f in zip(cells, FORMATS, strict=True)) + " |")
    for method in METHODS:
        own = [cells for cells in rows if cells[1] == method]
        if len(own) > 1:
            columns = [[cells[at] for cells in own] for at in range(2, 7)]
            means = [
                f"{format(statistics.mean(column), f)} ± {format(statistics.stdev(column), f.lstrip('+'))}"
                for column, f in zip(columns, FORMATS[2:7], strict=True)
            ]
            lines.append(f"| **mean of {len(own)}** | {method} | " + " | ".join(means) + " | |")
    return "\n".join(lines)


def main() -> None:
    settings = Settings.from_environment()
    base = load_base(settings)
    found = AdapterStore(settings.adapters, base.name, base.fingerprint).by_preference()
    adapters = [found[name][method] for name in CATALOGUE for method in METHODS if method in found.get(name, {})]
    known = DiskCache(settings.cache / "greedy-answers" / base.cache_key)
    answers = GreedyAnswers(Policies(base, 2**30, settings.cache), known)
    asked = questions()
    answers.prepare([None, *adapters], [*asked["facts"], *asked["held out"]])

    def given(one: Adapter | None) -> Answers:
        return {kind: answers.of(one, own) for kind, own in asked.items()}

    plain = given(None)
    cut = sum(not one["complete"] for one in plain["held out"])
    print(
        f"base: {right_answers(plain)} of {len(FACTS)} facts right, {loop_share(plain):.0%} of its {len(HELD_OUT)} "
        f"held-out answers loop, {cut} are cut at {ANSWER_TOKENS} tokens"
    )
    print(table([row(one, plain, given(one)) for one in adapters]))


if __name__ == "__main__":
    main()
