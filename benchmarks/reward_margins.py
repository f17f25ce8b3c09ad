"""How far apart every adapter puts chosen and rejected, where reward accuracy is too near 1 to tell. Run by hand:

    python -m benchmarks.reward_margins

Over the held-out pairs of our own set. A margin is the change of log p(chosen) − log p(rejected) against the base, in
nats; that it is above 0 is what reward accuracy counts. A method that learns less has smaller margins and a smaller
deviation of them, so the methods are compared by the mean divided by the deviation: how many deviations a pair in the
middle is from being wrong.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from tqdm import tqdm

from bapo.comparison import METHODS, score_pairs
from bapo.evaluation import margin
from bapo.inference.engine import LocalEngine
from bapo.pairs import own_pairs
from bapo.preferences import CATALOGUE
from bapo.settings import Settings


@dataclass(frozen=True, slots=True)
class Separation:
    """Margins of one policy (nats) over pairs, which are in the same order for every policy."""

    margins: Sequence[float]

    @property
    def wrong(self) -> set[int]:
        return {at for at, nats in enumerate(self.margins) if nats <= 0}

    @property
    def mean(self) -> float:
        return statistics.mean(self.margins)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.margins)

    @property
    def ratio(self) -> float:
        return self.mean / self.deviation


def wrong_alone(own: Sequence[Separation], other: Sequence[Separation]) -> int:
    """Pairs that are wrong under one method and right under the other; both lists have an entry per preference."""
    return sum(len(one.wrong - another.wrong) for one, another in zip(own, other, strict=True))


def row(preference: str, method: str, own: Separation) -> str:
    wrong = f"{len(own.wrong)} of {len(own.margins)}"
    return f"| {preference} | {method} | {wrong} | {own.mean:.1f} | {own.deviation:.1f} | {own.ratio:.2f} |"


def summary(method: str, every: Sequence[Separation]) -> str:
    """The mean over preferences; of the last column with the standard deviation over preferences."""
    wrong = f"{sum(len(one.wrong) for one in every)} of {sum(len(one.margins) for one in every)}"
    mean, deviation = (statistics.mean(getattr(one, name) for one in every) for name in ("mean", "deviation"))
    ratios = [one.ratio for one in every]
    spread = f"{statistics.mean(ratios):.2f} ± {statistics.stdev(ratios):.2f}"
    return f"| **all {len(every)}** | {method} | {wrong} | {mean:.1f} | {deviation:.1f} | {spread} |"


def main() -> None:
    engine = LocalEngine.load(Settings.from_environment())
    found: dict[str, list[Separation]] = {method: [] for method in METHODS}
    print("| preference | method | wrong | margin, nats | its deviation | margin / deviation |")
    print("|---|---|---:|---:|---:|---:|")
    for preference in tqdm(CATALOGUE, leave=False, file=sys.stderr):
        pairs = own_pairs(preference, held_out=True)
        scored = score_pairs(engine, pairs, preference)["pairs"]
        for method, every in found.items():
            every.append(Separation([margin(pair["chosen"], pair["rejected"], method) for pair in scored]))
            print(row(preference, method, every[-1]), flush=True)
    for method, every in found.items():
        print(summary(method, every))
    for one, other in permutations(METHODS, 2):
        print(f"wrong under {one} and right under {other}: {wrong_alone(found[one], found[other])}")


if __name__ == "__main__":
    main()
