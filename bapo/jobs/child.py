"""What a job's process does: its plans, one after another, with everything it learns written into the store."""

import errno
import logging
import shutil
import sqlite3
import time
import traceback
from collections.abc import Callable

from filelock import FileLock, Timeout

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import Base, load_base
from bapo.inference.base_responses import base_responses
from bapo.jobs.process import Stopped
from bapo.jobs.service import Jobs
from bapo.jobs.store import FAILED, FINISHED, RUNNING, Job, JobProgress, JobStore
from bapo.settings import Settings
from bapo.training.observation import ANSWER_TOKENS
from bapo.training.plan import TrainingPlan
from bapo.training.run import Progress, run

TELL_SECONDS = 0.5  # how often the page's progress bar may move
DISK_FULL = "The disk is full. Free some space and resume the job: it goes on from its last checkpoint."
NO_MEMORY = "There was not enough memory. Close other programs, or start the job again with a smaller batch."

logger = logging.getLogger(__name__)


def work(job_id: str, settings: Settings) -> bool:
    """Carry out a job that is marked as running. Returns whether it has finished.

    Only one process can work on a job: `BapoError` where another one does. How it ended is in the
    store, unless the process was killed or the disk is full: then the job is still marked as running.
    """
    store = JobStore(settings.data)
    job = store.get(job_id)
    lock = lock_of(store, job_id)
    try:
        lock.acquire()
    except Timeout:
        raise BapoError(f"The job {job_id} is being worked on by another process.") from None
    try:
        _carry_out(job, store, settings)
        store.end(job_id, FINISHED)
        return True
    except Stopped:
        logger.warning("stopped; the last checkpoint stays")
        return False
    except Exception as error:
        traceback.print_exc()
        store.end(job_id, FAILED, cause_of(error))
        return False
    finally:
        lock.release()


def lock_of(store: JobStore, job_id: str) -> FileLock:
    """Held by the process that works on the job, and let go by the system when that process dies."""
    return FileLock(store.folder(job_id) / "lock", timeout=0)


def cause_of(error: BaseException) -> str:
    """Why a job failed, for the person who started it."""
    if isinstance(error, BapoError):
        return str(error)
    # safetensors and torch raise their own errors where a file cannot be written.
    full = "No space left" in str(error) or "disk is full" in str(error) or "file write failed" in str(error)
    if full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return DISK_FULL
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "can't allocate" in str(error):
        return NO_MEMORY
    if isinstance(error, sqlite3.Error):
        return f"The job store could not be written: {error}."
    return f"Training broke off ({type(error).__name__}). The log has the details."


def _carry_out(job: Job, store: JobStore, settings: Settings) -> None:
    store.tell(job.id, JobProgress(phase="checking", method=job.methods[0], total=1))
    base = load_base(settings)
    if base.fingerprint != job.request.base_fingerprint:
        raise BapoError(
            f"The base has changed since this job began: it was {job.request.base} with the fingerprint "
            f"{job.request.base_fingerprint[:12]}, now it is {base.name} with {base.fingerprint[:12]}. Put the earlier "
            "one back and resume, or start a new job."
        )
    if job.request.probes:
        answers = base_responses(base, job.request.probes, settings.cache, max_tokens=ANSWER_TOKENS)
        store.add_answers(job.id, "base", 0, {prompt: answers[prompt].text for prompt in job.request.probes})
    shared = AdapterStore(settings.adapters, base.name, base.fingerprint)
    adapters = Jobs(settings, shared).adapters_of(job.owner)
    for part, plan in enumerate(job.request.plans):
        adapters.clear_scratch(plan.preference, plan.method)
        if adapters.place(plan.preference, plan.method).exists():
            continue  # done before the job was interrupted
        _train(job, part, plan, base, adapters, store, settings)


def _train(
    job: Job, part: int, plan: TrainingPlan, base: Base, adapters: AdapterStore, store: JobStore, settings: Settings
) -> None:
    tell = _teller(job, part, plan, store)
    # The cache may be emptied at any time; a job's checkpoints belong to the job.
    checkpoints = store.folder(job.id) / "checkpoints"
    run(plan, base, adapters, settings, tell, probes=job.request.probes, checkpoints=checkpoints)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _teller(job: Job, part: int, plan: TrainingPlan, store: JobStore) -> Callable[[Progress], None]:
    shown, phase, notes = 0.0, "", ""

    def tell(progress: Progress) -> None:
        nonlocal shown, phase, notes
        if progress.note:
            print(progress.note, flush=True)
            notes = f"{notes} {progress.note}.".strip()
        if progress.metrics:
            store.add_metrics(job.id, plan.method, "training", progress.done, _curves(progress.metrics))
        if progress.observation:
            store.add_metrics(job.id, plan.method, "held out", progress.done, progress.observation.held_out)
            store.add_answers(job.id, plan.method, progress.done, progress.observation.answers)
        now = time.monotonic()
        if progress.phase != phase or now - shown >= TELL_SECONDS or progress.done == progress.total:
            if progress.phase != phase:
                print(f"{plan.preference}-{plan.method}: {progress.phase}", flush=True)
            shown, phase = now, progress.phase
            place = JobProgress(part, plan.method, phase, progress.done, progress.total, progress.eta_seconds, notes)
            store.tell(job.id, place)
            if store.state(job.id) != RUNNING:  # cancelled, and nobody is there to send a signal
                raise Stopped

    return tell


# What the page draws; the rest of the trainer's figures is in the adapter's metrics.jsonl.
KEPT = (
    *("loss", "loss/preference", "loss/anchor", "rewards/accuracies", "rewards/margins", "drift"),
    *("logps_change/chosen", "logps_change/rejected", "logps_change/base"),
)


def _curves(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in KEPT if name in metrics}
