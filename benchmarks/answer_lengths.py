"""How long the answers of the concise and the detailed adapters get when hardly anything cuts them. Run by hand:

    python -m benchmarks.answer_lengths

Greedy answers to the held-out prompts of our own set, with four times the room that the table of all adapters gives. A
small base often falls into a loop and never ends, so two more means are printed: of the words before a loop, and of
those answers that end by themselves where the base's does too, of which nothing was cut.
"""

import statistics
from collections.abc import Callable, Sequence

from bapo.adapters import AdapterStore
from bapo.comparison import METHODS
from bapo.disk_cache import DiskCache
from bapo.inference.base import load_base
from bapo.inference.policies import Policies
from bapo.settings import Settings
from benchmarks.adapter_table import ANSWER_TOKENS, HELD_OUT, GreedyAnswers, before_loop, words

TOKENS = 4 * ANSWER_TOKENS
PREFERENCES = "P2A", "P2B"


def main() -> None:
    settings = Settings.from_environment()
    base = load_base(settings)
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    names = [f"{preference}-{method}" for preference in PREFERENCES for method in METHODS]
    who = [None, *map(store.named, names)]
    known = DiskCache(settings.cache / "greedy-answers" / base.cache_key)
    answers = GreedyAnswers(Policies(base, 2**30, settings.cache), known)
    asked = [(prompt, TOKENS) for prompt in HELD_OUT]
    answers.prepare(who, asked)
    print(f"{len(asked)} prompts, up to {TOKENS} tokens; words beside the base's, of all answers, of all before a loop")
    print("and of those that end by themselves where the base's does too")
    plain = answers.of(None, asked)
    for one, name in zip(who[1:], names, strict=True):
        beside = list(zip(answers.of(one, asked), plain, strict=True))
        ended = [both for both in beside if all(answer["complete"] for answer in both)]
        columns = compared(beside, words), compared(beside, before_loop), compared(ended, words)
        print(f"{name:9}", *columns, f"({len(ended)})", sep="  ")


def compared(beside: Sequence[tuple[dict, dict]], count: Callable[[str], float]) -> str:
    """Mean counts of an adapter's answers and of the base's beside them, and the change in percent."""
    if not beside:
        return "none"
    own, base = (statistics.mean(count(answer["text"]) for answer in side) for side in zip(*beside, strict=True))
    return f"{own:5.1f} / {base:5.1f} {own / base - 1:+.0%}"


if __name__ == "__main__":
    main()
