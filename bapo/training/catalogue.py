"""All adapters of the catalogue, one after another: skips what is there, goes on where it was cut off."""

import time
from dataclasses import replace

from bapo.adapters import AdapterStore
from bapo.inference.base import Base
from bapo.settings import Settings
from bapo.training.plan import TrainingPlan, catalogue_plans
from bapo.training.run import Listener, Progress, run


def missing_plans(store: AdapterStore) -> list[TrainingPlan]:
    """Plans of the catalogue whose adapters are not in the store yet."""
    return [plan for plan in catalogue_plans() if not store.place(plan.preference, plan.method).exists()]


def train_all(base: Base, store: AdapterStore, settings: Settings, tell: Listener) -> list[str]:
    """Train what is missing; returns the names of the new adapters.

    `tell` hears one progress over everything: `done` and `total` count adapters in thousandths, and
    the ETA follows from the share done since the call.
    """
    plans = missing_plans(store)
    start = time.monotonic()
    first: float | None = None  # the share at the first word of training: an interrupted run starts ahead
    names = []
    for number, plan in enumerate(plans):

        def overall(progress: Progress, number=number, plan=plan) -> None:
            nonlocal first, start
            within = {
                "training": 0.85 * progress.done / progress.total,
                "evaluating": 0.85 + 0.15 * progress.done / progress.total,
                "installing": 1.0,
            }
            share = number + within.get(progress.phase, 0.0)
            if first is None and progress.phase == "training":
                first, start = share, time.monotonic()
            gone = share - first if first is not None else 0.0
            eta = (time.monotonic() - start) / gone * (len(plans) - share) if gone else None
            phase = f"{plan.preference}-{plan.method} ({number + 1} of {len(plans)}): {progress.phase}"
            tell(replace(progress, phase=phase, done=round(1000 * share), total=1000 * len(plans), eta_seconds=eta))

        names.append(run(plan, base, store, settings, overall).name)
    return names
