"""The queue at work: one child process at a time, started again where it died."""

import logging
import os
import subprocess
import sys
import threading
import time

from filelock import FileLock, Timeout

from bapo.errors import BapoError
from bapo.jobs.child import lock_of
from bapo.jobs.store import FAILED, RUNNING, Job, JobStore
from bapo.settings import REPOSITORY, Settings

POLL_SECONDS = 0.5
STOP_SECONDS = 4.0  # between asking a child to stop and killing it
# Starts without coming further than before, after which a job is given up: it may be what kills the process.
MAX_ATTEMPTS = 8

logger = logging.getLogger(__name__)


class Runner:
    """Starts the jobs of a store in their order. One runner works per data folder, others wait for it to end."""

    def __init__(self, store: JobStore, settings: Settings):
        self.store = store
        self.settings = settings
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="job runner", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop the child, which keeps its last checkpoint, and end. The job goes on when a runner starts again."""
        self._stopping.set()
        self._thread.join()

    def run_until_empty(self) -> None:
        """Work in the foreground until no job waits; `BapoError` where another runner is at work."""
        lock = self._lock()
        try:
            lock.acquire()
        except Timeout:
            raise BapoError("The queue is being worked on already, by the app or by another terminal.") from None
        with lock:
            while self._step():
                pass

    def _lock(self) -> FileLock:
        return FileLock(self.settings.data / "runner.lock", timeout=0)

    def _work(self) -> None:
        lock = self._lock()
        while not self._stopping.is_set():
            try:
                with lock:
                    while not self._stopping.is_set():
                        if not self._step():
                            self._stopping.wait(POLL_SECONDS)
            except Timeout:
                self._stopping.wait(5 * POLL_SECONDS)
            except Exception:  # a full disk, say: the next round may do better
                logger.exception("the job runner stumbled")
                self._stopping.wait(10 * POLL_SECONDS)

    def _step(self) -> bool:
        """Run the next job to its end; False where there is none."""
        self.store.sweep()
        for job in self.store.running():
            if self._abandoned(job):
                self._again(job, "its process was gone")
            else:  # a child that outlived its app
                self._stopping.wait(POLL_SECONDS)
                return not self._stopping.is_set()
        queued = self.store.next_queued()
        if queued is None:
            return False
        self._run(queued)
        return True

    def _abandoned(self, job: Job) -> bool:
        lock = lock_of(self.store, job.id)
        try:
            lock.acquire()
        except Timeout:
            return False
        lock.release()
        return True

    def _run(self, job: Job) -> None:
        with self.store.log_file(job.id).open("ab") as log:
            log.write(f"── started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
            log.flush()
            child = subprocess.Popen(
                [sys.executable, "-m", "bapo", "jobs", "work", job.id],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                env={**os.environ, **self.settings.as_environment(), "PYTHONUNBUFFERED": "1"},
            )
        while child.poll() is None:
            if self._stopping.wait(POLL_SECONDS) or self.store.state(job.id) != RUNNING:
                self._end(child)
        if self.store.state(job.id) == RUNNING:  # it did not get so far as to say how it ended
            ended = "was killed" if child.returncode < 0 else f"ended with status {child.returncode}"
            self._again(job, f"its process {ended}")

    def _end(self, child: subprocess.Popen) -> None:
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _again(self, job: Job, reason: str) -> None:
        if self.store.get(job.id).attempts >= MAX_ATTEMPTS:
            self.store.end(
                job.id,
                FAILED,
                f"Given up after {MAX_ATTEMPTS} starts without coming further: {reason} each time, which is what a "
                "machine does that is out of memory. Resume it when there is more, or start with a smaller batch.",
            )
        else:
            logger.warning("job %s goes on from its last checkpoint: %s", job.id, reason)
            self.store.requeue(job.id)
