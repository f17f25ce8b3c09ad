"""Eight visitors at once, each asking again and again: cross-talk, memory, time to the first token, fairness. By hand:

    python -m benchmarks.visitors --minutes 10

Half of the visitors ask for long answers and half for short ones. Every answer is compared with what
its question gets alone.
"""

import argparse
import statistics
import threading
import time
from collections import defaultdict

import psutil

from bapo.comparison import compare
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.settings import Settings

VISITORS = 8
LENGTHS = (96, 16)
QUESTIONS = ("Why is the sky blue?", "What is rent?", "Name a river.", "How do bees find flowers?")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    engine = LocalEngine.load(Settings.from_environment())
    tastes = list(engine.store.by_preference())
    asked = {
        visitor: (QUESTIONS[visitor % len(QUESTIONS)], tastes[visitor % len(tastes)], LENGTHS[visitor % 2])
        for visitor in range(VISITORS)
    }

    def answer(visitor: int) -> tuple[float, float, list[str], int]:
        """(seconds to the first token, in all, texts, tokens of all rows)"""
        question, taste, length = asked[visitor]
        start, first = time.monotonic(), None
        for frame in compare(engine, question, taste, Sampling(max_new_tokens=length)):
            if first is None and frame.answers:
                first = time.monotonic() - start
        assert first is not None
        tokens = sum(answer.tokens for answer in frame.answers)
        return first, time.monotonic() - start, [answer.text for answer in frame.answers], tokens

    alone = {visitor: answer(visitor) for visitor in asked}
    results: dict[int, list] = defaultdict(list)
    until = time.monotonic() + 60 * arguments.minutes
    memory: list[int] = []

    def visit(visitor: int) -> None:
        while time.monotonic() < until:
            results[visitor].append(answer(visitor))

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in asked]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(psutil.Process().memory_info().rss)
        threads[0].join(5)
        time.sleep(1)
    for thread in threads:
        thread.join()

    every = [(visitor, one) for visitor, all_of in results.items() for one in all_of]
    wrong = sum(one[2] != alone[visitor][2] for visitor, one in every)
    firsts = sorted(one[0] for _, one in every)
    half = len(memory) // 2
    print(f"{VISITORS} visitors, {arguments.minutes:g} minutes: {len(every)} comparisons, {wrong} not as alone")
    print(f"first token: median {statistics.median(firsts):.2f} s, p95 {firsts[int(0.95 * len(firsts))]:.2f} s, "
          f"alone {statistics.median(one[0] for one in alone.values()):.2f} s")  # fmt: skip
    for length in LENGTHS:
        together = statistics.median(one[1] for visitor, one in every if asked[visitor][2] == length)
        single = statistics.median(one[1] for visitor, one in alone.items() if asked[visitor][2] == length)
        print(
            f"answers of {length} tokens: {together:.1f} s, alone {single:.1f} s: {together / single:.1f} times as long"
        )
    shares = [sum(one[3] for one in results[visitor]) for visitor in asked]
    print(f"fairness (Jain, tokens a visitor): {sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares)):.3f}")
    first_half, second_half = (statistics.median(part) / 1e6 for part in (memory[:half], memory[half:]))
    print(f"memory: {first_half:.0f} MB in the first half, {second_half:.0f} MB in the second")


if __name__ == "__main__":
    main()
