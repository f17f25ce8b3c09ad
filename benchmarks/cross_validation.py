"""How the recipe of `--all` does on prompts that its adapters did not see, by cross-validation. Run by hand:

    python -m benchmarks.cross_validation PREFERENCE ...

The held-out prompts are few, and whoever chooses a recipe looks at them again and again. Here every training prompt is
evaluated once, by an adapter that `--all`'s recipe trained without it, on a pair with each response that the
preference's own is preferred to. An adapter takes two to three minutes on two cores; it is kept in the cache, so that
a second run trains what is missing. Pairs and settings that change are noticed, code that trains is not: after changing
that, remove `folds` from the cache.
"""

import argparse
import random
from dataclasses import dataclass, fields

from tqdm import tqdm

from bapo.adapters import AdapterCard, AdapterStore
from bapo.comparison import METHODS
from bapo.inference.base import Base, load_base
from bapo.pairs import Pair, hash_of, own_pairs, preference_set
from bapo.preferences import CATALOGUE, rejected_beside
from bapo.settings import Settings
from bapo.training.plan import TrainingPlan, catalogue_plans
from bapo.training.run import Progress, run

FOLDS = 4


@dataclass(frozen=True, kw_only=True)
class FoldPlan(TrainingPlan):
    """A plan of the catalogue without one fold of its prompts, which are held out instead; as many steps a prompt."""

    fold: int

    def load_pairs(self) -> tuple[list[Pair], list[Pair]]:
        items = [item for item in preference_set() if not item.held_out]
        order = random.Random(0).sample(range(len(items)), len(items))
        outside = {items[place].prompt for place in order[self.fold :: FOLDS]}
        training = [pair for pair in own_pairs(self.preference, held_out=False) if pair.prompt not in outside]
        held_out = [
            Pair(item.prompt, item.responses[self.preference], item.responses[other])
            for item in items
            if item.prompt in outside
            for other in rejected_beside(self.preference)
        ]
        return training, held_out

    def load_anchor_prompts(self) -> list[str]:
        anchors = TrainingPlan.load_anchor_prompts(self)
        return [prompt for place, prompt in enumerate(anchors) if place % FOLDS != self.fold]


def fold_plan(plan: TrainingPlan, fold: int) -> FoldPlan:
    return FoldPlan(fold=fold, **{field.name: getattr(plan, field.name) for field in fields(plan)})


def trained(plan: FoldPlan, base: Base, settings: Settings) -> AdapterCard:
    """The card of the fold's adapter, which is trained unless the cache has it."""
    store = AdapterStore(settings.cache / "folds" / str(plan.fold), base.name, base.fingerprint)
    place = store.place(plan.preference, plan.method)
    training, _ = plan.load_pairs()
    expected = {**plan.hyperparameters(), "anchor_prompts": len(plan.load_anchor_prompts())}
    if place.exists():
        card = AdapterCard.read(place)
        found = (card.base_fingerprint, card.data_sha256, card.hyperparameters)
        if found == (base.fingerprint, hash_of(training), expected):
            return card
    with tqdm(desc=f"{plan.preference}-{plan.method}, fold {plan.fold + 1} of {FOLDS}", leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.total, bar.n = progress.total, progress.done
            bar.set_postfix_str(progress.phase)

        return AdapterCard.read(run(plan, base, store, settings, show))


def wrong(card: AdapterCard) -> int:
    """Held-out pairs whose margin is not above zero."""
    assert card.held_out is not None
    return round((1 - card.held_out.reward_accuracy) * card.held_out.pairs)


def row(preference: str, method: str, cards: list[AdapterCard]) -> str:
    """Markdown: wrong pairs, fold by fold and together, and the mean drift a prompt."""
    found = [card.held_out for card in cards if card.held_out is not None]
    pairs, prompts = sum(one.pairs for one in found), sum(one.prompts for one in found)
    drift = sum(one.drift_nats * one.prompts for one in found) / prompts
    counts = [wrong(card) for card in cards]
    return f"| {preference} | {method} | {sum(counts)} of {pairs} | {', '.join(map(str, counts))} | {drift:+.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("preferences", nargs="+", choices=list(CATALOGUE), metavar="PREFERENCE")
    chosen = parser.parse_args().preferences
    settings = Settings.from_environment()
    base = load_base(settings)
    plans = {(plan.preference, plan.method): plan for plan in catalogue_plans()}
    print("| preference | method | wrong | by fold | drift, nats a prompt |")
    print("|---|---|---:|---|---:|")
    for preference in chosen:
        for method in METHODS:
            cards = [trained(fold_plan(plans[preference, method], fold), base, settings) for fold in range(FOLDS)]
            print(row(preference, method, cards), flush=True)


if __name__ == "__main__":
    main()
