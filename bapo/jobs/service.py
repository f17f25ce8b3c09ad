"""What a person may do with jobs: the one door for the page, the terminal and the API."""

import hashlib
import logging
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.jobs.store import QUEUED, RUNNING, Curves, Job, JobRequest, JobStore, new_id
from bapo.pair_layouts import Pair
from bapo.pairs import split_by_prompt, write_pairs
from bapo.settings import Settings
from bapo.training.plan import TrainingPlan

logger = logging.getLogger(__name__)

OPERATOR = "operator"  # whoever has the terminal: sees and may do everything
MAX_NAME, MAX_DESCRIPTION, MAX_PROBES, MAX_PROBE = 64, 300, 2, 500  # characters, and probe prompts
LOG_BYTES = 64 * 2**10


def owner_of(token: str) -> str:
    """The owner that a browser's token or a user's name stands for; safe as a folder name, and no way back."""
    return hashlib.sha256(f"bapo owner {token}".encode()).hexdigest()[:32]


class Jobs:
    """Jobs of one data folder over one base, whose adapters for everyone are `shared`.

    Every method that takes an owner shows and touches only that owner's.
    """

    def __init__(self, settings: Settings, shared: AdapterStore):
        self.settings = settings
        self.shared = shared
        self.store = JobStore(settings.data)

    def adapters_of(self, owner: str) -> AdapterStore:
        """Everyone's adapters and the owner's own."""
        return self.shared if owner == OPERATOR else self.shared.of(self.settings.data / "adapters" / owner)

    def submit(
        self, owner: str, pairs: Sequence[Pair], plan: TrainingPlan, methods: Sequence[str], probes: Sequence[str] = ()
    ) -> Job:
        """Queue the plan under each of the methods, in turn, on these pairs.

        `plan.preference` is the taste's name. `probes` are prompts to answer while it trains. When this
        returns, pairs and job are on the disk.
        """
        name = plan.preference
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > MAX_NAME:
            raise BapoError(f"Name the taste with at most {MAX_NAME} letters, digits, '-' and '_', not {name!r}.")
        if not methods:
            raise BapoError("Choose a method: BAPO, DPO, or both.")
        if len(plan.description) > MAX_DESCRIPTION:
            raise BapoError(f"The description may have {MAX_DESCRIPTION} characters, not {len(plan.description)}.")
        probes = tuple(probe.strip() for probe in probes if probe.strip())
        if len(probes) > MAX_PROBES or any(len(probe) > MAX_PROBE for probe in probes):
            raise BapoError(f"Give {MAX_PROBES} probe prompts at most, of {MAX_PROBE} characters at most each.")
        if not pairs:
            raise BapoError("There are no pairs to train on: upload a file first.")
        if len(pairs) > self.settings.max_pairs:
            raise BapoError(f"{len(pairs):,} pairs are too many: at most {self.settings.max_pairs:,} are allowed here.")
        self._check_space()
        job_id = new_id()
        folder = self.store.folder(job_id)
        adapters = self.adapters_of(owner)
        self._check_steps(plan, pairs)
        pairs_file = str(folder / "pairs.jsonl")
        plans = tuple(replace(plan, method=method, pairs=pairs_file) for method in methods)
        under_way = {
            (job.request.name, method)
            for job in self.store.jobs(owner)
            if job.state in (QUEUED, RUNNING)
            for method in job.methods
        }
        for method in methods:
            if adapters.place(name, method).exists():
                raise BapoError(f"You have an adapter {name}-{method} already. Choose another name.")
            if (name, method) in under_way:
                raise BapoError(f"A job for {name}-{method} waits or runs already.")
        request = JobRequest(
            name=name,
            plans=plans,
            base=self.shared.base_name,
            base_fingerprint=self.shared.base_fingerprint,
            probes=probes,
            pairs=len(pairs),
            prompts=len({pair.prompt for pair in pairs}),
        )
        folder.mkdir(parents=True, mode=0o700)
        try:
            write_pairs(pairs, folder / "pairs.jsonl")
            return self.store.add(job_id, owner, request, self.settings.max_jobs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def jobs(self, owner: str) -> list[Job]:
        """The owner's jobs, the newest first; the operator sees all."""
        return self.store.jobs(None if owner == OPERATOR else owner)

    def get(self, owner: str, job_id: str) -> Job:
        """One job; the same `BapoError` for one that is not there and one of somebody else's."""
        job = self.store.get(job_id) if re.fullmatch(r"[0-9a-f]{16}", job_id or "") else None
        if job is None or owner not in (OPERATOR, job.owner):
            raise BapoError("There is no such job, or it is not yours.")
        return job

    def cancel(self, owner: str, job_id: str) -> Job:
        self.store.cancel(self.get(owner, job_id).id)
        return self.get(owner, job_id)

    def resume(self, owner: str, job_id: str) -> Job:
        self.store.resume(self.get(owner, job_id).id)
        return self.get(owner, job_id)

    def delete(self, owner: str, job_id: str) -> None:
        self.store.delete(self.get(owner, job_id).id)

    def curves(self, owner: str, job_id: str) -> Curves:
        return self.store.curves(self.get(owner, job_id).id)

    def log(self, owner: str, job_id: str) -> str:
        """The end of what the job's process wrote, the plain cause of a failure first."""
        job = self.get(owner, job_id)
        file = self.store.log_file(job.id)
        written = ""
        if file.exists():
            with file.open("rb") as log:
                log.seek(max(0, file.stat().st_size - LOG_BYTES))
                written = log.read().decode("utf-8", errors="replace")
        return f"{job.error}\n\n{written}" if job.error else written

    def _check_steps(self, plan: TrainingPlan, pairs: Sequence[Pair]) -> None:
        training, _ = split_by_prompt(list(pairs), plan.held_out_share, plan.seed)
        if not training:
            raise BapoError("Every prompt would be held out: give more prompts or hold out fewer.")
        steps = -(-len(training) // plan.batch_size) * plan.epochs
        if steps > self.settings.max_steps:
            raise BapoError(
                f"That are {steps:,.0f} steps; at most {self.settings.max_steps:,} are allowed here. "
                "Take fewer epochs or pairs, or more pairs a step."
            )

    def _check_space(self) -> None:
        used = 0
        for path in self.settings.data.rglob("*"):
            with suppress(FileNotFoundError):  # checkpoints come and go
                used += path.stat().st_size if path.is_file() else 0
        if used > self.settings.max_data_gb * 10**9:
            raise BapoError(
                f"The jobs here take {used / 10**9:.1f} GB already; {self.settings.max_data_gb} GB are allowed. "
                "Delete jobs or adapters first."
            )
