"""What every adapter learnt, what it forgot and what one can see of it, as the table of the README. Run by hand:

    python -m benchmarks.adapter_table

Reward accuracy and drift come from the adapters' cards: held-out prompts of our own set. The rest is
read off greedy answers, to the held-out prompts (length, readability, loops) and to the questions of
`facts.jsonl` (right answers). Answers are kept on the disk, so that a second run only prints.
"""

import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import textstat
from peft import PeftModel
from tqdm import tqdm

from bapo.adapters import Adapter, AdapterStore
from bapo.comparison import METHODS
from bapo.disk_cache import DiskCache
from bapo.inference.base import Base, load_base
from bapo.inference.base_responses import BaseResponse, greedy_responses
from bapo.pairs import preference_set
from bapo.preferences import CATALOGUE
from bapo.settings import Settings

FACTS = [json.loads(line) for line in Path(__file__).with_name("facts.jsonl").read_text().splitlines()]
HELD_OUT = [item.prompt for item in preference_set() if item.held_out]
FACT_TOKENS, ANSWER_TOKENS = 48, 256  # a small base often never ends: answers are compared up to here

Answers = dict[str, list[dict]]  # "facts" and "held out", each a list of texts with whether they ended


def words(text: str) -> float:
    return len(text.split())


def grade(text: str) -> float:
    """Automated Readability Index: the US school grade that reads the text, by letters a word and words a sentence."""
    return textstat.automated_readability_index(text)


def exclamations(text: str) -> float:
    """Exclamation marks per hundred words."""
    return 100 * text.count("!") / max(1, len(text.split()))


TRAITS: dict[str, tuple[str, Callable[[str], float]]] = {
    "P1A": ("school grade", grade),
    "P1B": ("school grade", grade),
    "P2A": ("words", words),
    "P2B": ("words", words),
    "P3A": ("! per 100 words", exclamations),
    "P3B": ("words", words),
    "academy": ("school grade", grade),
    "entertainment": ("! per 100 words", exclamations),
}


def is_right(answer: str, accepted: list[str]) -> bool:
    """Whether an accepted spelling stands in the answer as a whole word."""
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", answer.lower()) for one in accepted)


def loops(text: str) -> bool:
    """Whether some four words in a row occur four times or more."""
    tokens = text.lower().split()
    counts = Counter(zip(*(tokens[start:] for start in range(4)), strict=False))
    return max(counts.values(), default=0) >= 4


def answers_of(base: Base, adapter: Adapter | None, known: DiskCache) -> Answers:
    """Greedy answers of the base, or of the base under one adapter."""
    key = [adapter.sha256 if adapter else "base", [item["question"] for item in FACTS], HELD_OUT, ANSWER_TOKENS]
    if key not in known:
        model = PeftModel.from_pretrained(base.model, adapter.folder) if adapter else None
        if model:
            model.eval()
        facts = greedy_responses(base, [item["question"] for item in FACTS], FACT_TOKENS)
        held_out = greedy_responses(base, HELD_OUT, ANSWER_TOKENS)
        if model:
            model.unload()
        known[key] = {"facts": list(map(_plain, facts)), "held out": list(map(_plain, held_out))}
    return known[key]


def _plain(response: BaseResponse) -> dict:
    return {"text": response.text, "complete": response.complete, "tokens": len(response.token_ids)}


def right_answers(answers: Answers) -> int:
    return sum(is_right(one["text"], item["answers"]) for one, item in zip(answers["facts"], FACTS, strict=True))


def loop_share(answers: Answers) -> float:
    return statistics.mean(loops(one["text"]) for one in answers["held out"])


def trait(preference: str, answers: Answers) -> float | None:
    if preference not in TRAITS:
        return None
    return statistics.mean(TRAITS[preference][1](one["text"]) for one in answers["held out"])


def row(preference: str, method: str, adapter: Adapter, base: Answers, own: Answers) -> list[str | float]:
    card = adapter.card.held_out
    assert card is not None  # our own set has held-out prompts
    before, after = trait(preference, base), trait(preference, own)
    shown = "" if before is None else f"{TRAITS[preference][0]} {before:.1f} → {after:.1f}"
    kept = right_answers(own) / right_answers(base)
    return [
        preference, method, card.reward_accuracy, card.drift_nats, card.drift_per_token, kept, loop_share(own), shown,
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
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    known = DiskCache(settings.cache / "greedy-answers" / base.cache_key)
    plain = answers_of(base, None, known)
    rows = []
    found = store.by_preference()
    pending = [(name, method) for name in CATALOGUE for method in METHODS if method in found.get(name, {})]
    for preference, method in tqdm(pending, desc="answering", leave=False, file=sys.stderr):
        adapter = found[preference][method]
        rows.append(row(preference, method, adapter, plain, answers_of(base, adapter, known)))
    cut = sum(not one["complete"] for one in plain["held out"])
    print(
        f"base: {right_answers(plain)} of {len(FACTS)} facts right, {loop_share(plain):.0%} of its {len(HELD_OUT)} "
        f"held-out answers loop, {cut} are cut at {ANSWER_TOKENS} tokens"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
