"""Kills a job's process, and the app around it, at random moments, and looks at what is left. Run by hand:

    python -m benchmarks.kill_job [KILLS]

A small random base trains "both in turn". First undisturbed; then again, with SIGKILL to the child or to
the runner's process (as if the app had been killed) after a random time, 20 kills in all, spread over as
many jobs as that takes. Prints for each job how often it was killed, and whether its adapters are bit-equal
to the undisturbed ones, the database is whole and nothing half-made is left.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bapo.adapters import AdapterStore
from bapo.inference.base import identify
from bapo.jobs.service import OPERATOR, Jobs
from bapo.jobs.store import FINISHED
from bapo.pairs import Pair
from bapo.settings import Settings
from bapo.training.plan import TrainingPlan
from tests.tiny import byte_tokenizer, tiny_model

PAIRS = [Pair(f"question {i}", f"yes {i}", f"{word} {i}") for i in range(20) for word in ("no", "never")]
PLAN = TrainingPlan(preference="undisturbed", epochs=12, learning_rate=5e-3)
BOTH, PROBES = ("dpo", "bapo"), ("question 1",)
RUNNER = [sys.executable, "-m", "bapo", "jobs", "run"]


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = _jobs(Path(scratch))
        environment = {**os.environ, **jobs.settings.as_environment(), "OMP_NUM_THREADS": "1"}
        jobs.submit(OPERATOR, PAIRS, PLAN, BOTH, PROBES)
        start = time.monotonic()
        subprocess.run(RUNNER, env=environment, check=True, capture_output=True)
        whole = time.monotonic() - start
        expected = _weights(jobs, "undisturbed")
        print(f"undisturbed: {whole:.0f} s, {len(expected)} adapters")
        done, number = 0, 0
        while done < kills:
            number += 1
            name = f"killed-{number}"
            job = jobs.submit(OPERATOR, PAIRS, replace(PLAN, preference=name), BOTH, PROBES)
            own = 0
            while jobs.get(OPERATOR, job.id).state != FINISHED:
                runner = subprocess.Popen(RUNNER, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                if done < kills:
                    _wait(runner, rng.uniform(0, whole))
                    if runner.poll() is None and _kill(rng.choice(["child", "app"]), job.id, runner):
                        done, own = done + 1, own + 1
                runner.wait()
                assert jobs.get(OPERATOR, job.id).state in ("running", "queued", FINISHED), jobs.log(OPERATOR, job.id)
            _wait_for_orphans(job.id)
            left = [path for path in jobs.shared.folder.glob(".*")]
            left += list((jobs.store.folder(job.id)).glob("checkpoints"))
            equal = _weights(jobs, name) == expected
            print(
                f"{name}: {own} kills · adapters bit-equal: {equal} · database whole: {jobs.store.sound()} · "
                f"left behind: {[path.name for path in left] or 'nothing'}",
                flush=True,
            )
            if not equal or left or not jobs.store.sound():
                sys.exit(1)
        print(f"{done} kills, {number} jobs: every job ended as the undisturbed one")


def _jobs(folder: Path) -> Jobs:
    tokenizer = byte_tokenizer("llama")
    tiny_model("llama", tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    settings = Settings(
        base=str(folder / "tiny"), cache=folder / "cache", adapters=folder / "adapters", data=folder / "data"
    )
    found = identify(settings)
    return Jobs(settings, AdapterStore(settings.adapters, found.name, found.fingerprint))


def _wait(process: subprocess.Popen, seconds: float) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _kill(whom: str, job_id: str, runner: subprocess.Popen) -> bool:
    """SIGKILL to the job's process or to the runner's; False where there was none to kill."""
    target = runner.pid
    if whom == "child":
        found = subprocess.run(["pgrep", "-f", f"jobs work {job_id}"], capture_output=True, text=True).stdout.split()
        if not found:
            return False
        target = int(found[0])
    try:
        os.kill(target, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _wait_for_orphans(job_id: str) -> None:
    while subprocess.run(["pgrep", "-f", f"jobs work {job_id}"], capture_output=True).stdout:
        time.sleep(0.2)


def _weights(jobs: Jobs, name: str) -> dict[str, str]:
    return {a.card.method: a.sha256 for a in jobs.shared.adapters() if a.card.preference == name}


if __name__ == "__main__":
    main()
