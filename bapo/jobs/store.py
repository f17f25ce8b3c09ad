"""Jobs on disk: one SQLite file for what pages show, one folder per job for its pairs, log and adapters."""

import json
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bapo.errors import BapoError
from bapo.training.plan import TrainingPlan

QUEUED, RUNNING, FINISHED, FAILED, CANCELLED = "queued", "running", "finished", "failed", "cancelled"
SUBMISSION_SECONDS = 600  # a folder without a job may be one that is just being submitted

# JSON where nothing is searched for. `turn` orders the queue; `attempts` counts starts since the training last
# came further than ever before (`furthest`).
SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'finished', 'failed', 'cancelled')),
    turn INTEGER NOT NULL,
    request TEXT NOT NULL,
    progress TEXT NOT NULL DEFAULT '{}',
    error TEXT NOT NULL DEFAULT '',
    attempts INTEGER NOT NULL DEFAULT 0,
    furthest INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL
);
CREATE TABLE IF NOT EXISTS curve (
    job TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    method TEXT NOT NULL,
    split TEXT NOT NULL,
    step INTEGER NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (job, method, split, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS answer (
    job TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    method TEXT NOT NULL,
    step INTEGER NOT NULL,
    prompt TEXT NOT NULL,
    text TEXT NOT NULL,
    PRIMARY KEY (job, method, step, prompt)
) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a user asks for. `plans` are carried out in order; their pairs are the job folder's.

    `probes` are prompts whose answer is shown while it trains.
    """

    name: str
    plans: tuple[TrainingPlan, ...]
    base: str
    base_fingerprint: str
    probes: tuple[str, ...] = ()
    pairs: int = 0
    prompts: int = 0

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "JobRequest":
        values = json.loads(text)
        plans = tuple(TrainingPlan(**plan) for plan in values.pop("plans"))
        return cls(plans=plans, probes=tuple(values.pop("probes")), **values)


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a running job stands: which of its plans, which phase of it, how far, how long it takes (seconds)."""

    part: int = 0
    method: str = ""
    phase: str = ""
    done: int = 0
    total: int = 0
    eta_seconds: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One row of the store."""

    id: str
    owner: str
    state: str
    request: JobRequest
    progress: JobProgress
    error: str
    attempts: int
    created: float
    started: float | None
    ended: float | None
    place: int = 0  # in the queue, from 1; 0 where it does not wait

    @property
    def methods(self) -> list[str]:
        return [plan.method for plan in self.request.plans]

    def as_dict(self) -> dict[str, Any]:
        """What the owner may see, without the data."""
        return {
            "id": self.id,
            "name": self.request.name,
            "state": self.state,
            "methods": self.methods,
            "pairs": self.request.pairs,
            "prompts": self.request.prompts,
            "base": self.request.base,
            "place": self.place,
            "progress": asdict(self.progress),
            "error": self.error,
            "created": self.created,
            "started": self.started,
            "ended": self.ended,
        }


@dataclass(slots=True)
class Curves:
    """What a job has shown so far: method → split ("training", "held out") → [(step, metrics)], and its answers.

    `answers` maps a prompt to method → [(step, text)]; the base's own answer goes by the method "base".
    """

    metrics: dict[str, dict[str, list[tuple[int, dict[str, float]]]]] = field(default_factory=dict)
    answers: dict[str, dict[str, list[tuple[int, str]]]] = field(default_factory=dict)


class JobStore:
    """All jobs of one data folder. Safe to use from several threads and processes at once."""

    def __init__(self, root: Path):
        self.root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._database() as database:
            for statement in filter(str.strip, SCHEMA.split(";")):
                database.execute(statement)

    def folder(self, job_id: str) -> Path:
        """The job's folder. Ids are made here and checked against the database before they get here."""
        return self.root / "jobs" / job_id

    def log_file(self, job_id: str) -> Path:
        return self.folder(job_id) / "log.txt"

    @contextmanager
    def _database(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction: committed to the disk at the end, or not at all."""
        database = sqlite3.connect(self.root / "jobs.sqlite", timeout=30, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")  # what a page has confirmed survives a power cut
            database.execute("PRAGMA foreign_keys = ON")
            database.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield database
            database.execute("COMMIT")
        except BaseException:
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        finally:
            database.close()

    # ── what users do ─────────────────────────────────────────────────────────────────────────────────────
    def add(self, job_id: str, owner: str, request: JobRequest, limit: int) -> Job:
        """Put a job whose folder is ready into the queue; a `BapoError` where the owner has `limit` active ones."""
        with self._database() as database:
            active = database.execute(
                "SELECT count(*) FROM job WHERE owner = ? AND state IN (?, ?)", (owner, QUEUED, RUNNING)
            ).fetchone()[0]
            if active >= limit:
                raise BapoError(f"You have {active} jobs waiting or running already; {limit} are allowed at a time.")
            database.execute(
                "INSERT INTO job (id, owner, state, turn, request, created) VALUES (?, ?, ?, ?, ?, ?)",
                (job_id, owner, QUEUED, _next_turn(database), request.as_json(), time.time()),
            )
        return self.get(job_id)

    def get(self, job_id: str) -> Job:
        with self._database(write=False) as database:
            row = database.execute("SELECT * FROM job WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise BapoError("There is no such job, or it is not yours.")
            return _job(row, _place(database, row))

    def state(self, job_id: str) -> str | None:
        """The job's state, None where it has been deleted."""
        with self._database(write=False) as database:
            row = database.execute("SELECT state FROM job WHERE id = ?", (job_id,)).fetchone()
            return row["state"] if row else None

    def jobs(self, owner: str | None = None) -> list[Job]:
        """The newest first; of one owner, or all."""
        with self._database(write=False) as database:
            rows = database.execute(
                "SELECT * FROM job WHERE ? IS NULL OR owner = ? ORDER BY created DESC", (owner, owner)
            ).fetchall()
            return [_job(row, _place(database, row)) for row in rows]

    def cancel(self, job_id: str) -> None:
        """A waiting or running job is cancelled; its child is stopped by whoever watches the state."""
        with self._database() as database:
            changed = database.execute(
                "UPDATE job SET state = ?, ended = ? WHERE id = ? AND state IN (?, ?)",
                (CANCELLED, time.time(), job_id, QUEUED, RUNNING),
            ).rowcount
        if not changed:
            raise BapoError("Only a job that waits or runs can be cancelled.")

    def resume(self, job_id: str) -> None:
        """A cancelled or failed job waits again, at the end of the queue; it goes on from its last checkpoint."""
        with self._database() as database:
            changed = database.execute(
                "UPDATE job SET state = ?, error = '', ended = NULL, attempts = 0, turn = ? "
                "WHERE id = ? AND state IN (?, ?)",
                (QUEUED, _next_turn(database), job_id, CANCELLED, FAILED),
            ).rowcount
        if not changed:
            raise BapoError("Only a job that was cancelled or has failed can be resumed.")

    def delete(self, job_id: str) -> None:
        """Remove a job that does not run, with its pairs, log, curves and unpublished adapters."""
        with self._database() as database:
            changed = database.execute("DELETE FROM job WHERE id = ? AND state != ?", (job_id, RUNNING)).rowcount
        if not changed:
            raise BapoError("Cancel the job before you delete it.")
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    # ── what the runner and the child do ──────────────────────────────────────────────────────────────────
    def next_queued(self) -> Job | None:
        """The job whose turn it is, now marked as running."""
        with self._database() as database:
            row = database.execute("SELECT * FROM job WHERE state = ? ORDER BY turn LIMIT 1", (QUEUED,)).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE job SET state = ?, started = coalesce(started, ?), attempts = attempts + 1 WHERE id = ?",
                (RUNNING, time.time(), row["id"]),
            )
        return self.get(row["id"])

    def running(self) -> list[Job]:
        return [job for job in self.jobs() if job.state == RUNNING]

    def requeue(self, job_id: str) -> None:
        """A running job whose child is gone waits again, before all others."""
        with self._database() as database:
            database.execute(
                "UPDATE job SET state = ?, turn = (SELECT min(turn) FROM job) - 1 WHERE id = ? AND state = ?",
                (QUEUED, job_id, RUNNING),
            )

    def end(self, job_id: str, state: str, error: str = "") -> None:
        """A running job has finished or failed; one that was cancelled in the meantime stays cancelled."""
        with self._database() as database:
            database.execute(
                "UPDATE job SET state = ?, error = ?, ended = ? WHERE id = ? AND state = ?",
                (state, error, time.time(), job_id, RUNNING),
            )

    def tell(self, job_id: str, progress: JobProgress) -> None:
        reached = progress.part * 10**6 + progress.done if progress.phase == "training" else 0
        with self._database() as database:
            database.execute(
                "UPDATE job SET progress = ?, attempts = iif(furthest < ?, 0, attempts), furthest = max(furthest, ?) "
                "WHERE id = ?",
                (json.dumps(asdict(progress)), reached, reached, job_id),
            )

    def add_metrics(self, job_id: str, method: str, split: str, step: int, metrics: dict[str, float]) -> None:
        """A step's figures; a step that is repeated after a restart replaces what it said before."""
        with self._database() as database:
            database.execute(
                "INSERT OR REPLACE INTO curve (job, method, split, step, metrics) VALUES (?, ?, ?, ?, ?)",
                (job_id, method, split, step, json.dumps(metrics)),
            )

    def add_answers(self, job_id: str, method: str, step: int, answers: dict[str, str]) -> None:
        with self._database() as database:
            database.executemany(
                "INSERT OR REPLACE INTO answer (job, method, step, prompt, text) VALUES (?, ?, ?, ?, ?)",
                [(job_id, method, step, prompt, text) for prompt, text in answers.items()],
            )

    def curves(self, job_id: str) -> Curves:
        curves = Curves()
        with self._database(write=False) as database:
            for row in database.execute("SELECT * FROM curve WHERE job = ? ORDER BY step", (job_id,)):
                by_split = curves.metrics.setdefault(row["method"], {})
                by_split.setdefault(row["split"], []).append((row["step"], json.loads(row["metrics"])))
            for row in database.execute("SELECT * FROM answer WHERE job = ? ORDER BY step", (job_id,)):
                by_method = curves.answers.setdefault(row["prompt"], {})
                by_method.setdefault(row["method"], []).append((row["step"], row["text"]))
        return curves

    def sweep(self) -> None:
        """Remove the folders of submissions that broke off before they were put into the queue."""
        folder = self.root / "jobs"
        known = {job.id for job in self.jobs()}
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.name not in known and time.time() - path.stat().st_mtime > SUBMISSION_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def sound(self) -> bool:
        """Whether SQLite finds the file whole."""
        with self._database(write=False) as database:
            return database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def new_id() -> str:
    """Unguessable, and safe as a folder name."""
    return secrets.token_hex(8)


def _next_turn(database: sqlite3.Connection) -> int:
    return database.execute("SELECT coalesce(max(turn), 0) + 1 FROM job").fetchone()[0]


def _place(database: sqlite3.Connection, row: sqlite3.Row) -> int:
    if row["state"] != QUEUED:
        return 0
    before: Sequence[Any] = database.execute(
        "SELECT count(*) FROM job WHERE state = ? OR (state = ? AND turn < ?)", (RUNNING, QUEUED, row["turn"])
    ).fetchone()
    return before[0] + 1


def _job(row: sqlite3.Row, place: int) -> Job:
    return Job(
        id=row["id"],
        owner=row["owner"],
        state=row["state"],
        request=JobRequest.from_json(row["request"]),
        progress=JobProgress(**json.loads(row["progress"])),
        error=row["error"],
        attempts=row["attempts"],
        created=row["created"],
        started=row["started"],
        ended=row["ended"],
        place=place,
    )
