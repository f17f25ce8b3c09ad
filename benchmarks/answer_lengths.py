"""How long the answers of the concise and the detailed adapters get when hardly anything cuts them. Run by hand:

    python -m benchmarks.answer_lengths

Greedy answers to the held-out prompts of our own set, with four times the room that the table of all adapters gives. A
small base often falls into a loop and never ends, so the words before a loop are counted too.
"""

import statistics

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
    print(f"{len(asked)} prompts, up to {TOKENS} tokens: words, those before a loop, and how many ended")
    whole, clean = 0.0, 0.0
    for one, name in zip(who, ["base", *names], strict=True):
        own = answers.of(one, asked)
        mean = statistics.mean(words(answer["text"]) for answer in own)
        before = statistics.mean(before_loop(answer["text"]) for answer in own)
        whole, clean = whole or mean, clean or before
        ended = sum(answer["complete"] for answer in own)
        print(f"{name:9} {mean:6.1f} ({mean / whole - 1:+.0%})  {before:6.1f} ({before / clean - 1:+.0%})  {ended}")


if __name__ == "__main__":
    main()
