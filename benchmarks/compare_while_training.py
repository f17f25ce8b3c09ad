"""How much of its speed a comparison keeps while a job trains on the same machine. Run by hand:

    python -m benchmarks.compare_while_training [ROUNDS]

Alternates, in one run, comparisons on an idle machine and comparisons while a job of the embedded base
trains (its process is paused in between), and prints the medians of all answers' tokens per second and
their ratio. Then ten visitors ask at once, different questions, while the job trains: every answer must be
the one that its question gets alone.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

from bapo.comparison import compare
from bapo.inference.base import EMBEDDED
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.jobs.runner import Runner
from bapo.jobs.service import Jobs
from bapo.pairs import own_pairs
from bapo.settings import Settings
from bapo.training.plan import TrainingPlan

PREFERENCE = "P2A"
SAMPLING = Sampling(max_new_tokens=48, temperature=0.0, top_p=1.0, seed=0)
SHORT = replace(SAMPLING, max_new_tokens=12)
QUESTIONS = [f"Tell me one thing about the number {number}." for number in range(1, 11)]


def rate(engine: LocalEngine) -> float:
    """Tokens per second over all answers of one comparison."""
    *_, last = compare(engine, "Why is the sky blue?", PREFERENCE, SAMPLING)
    return sum(answer.tokens for answer in last.answers) / last.seconds


def texts(engine: LocalEngine, question: str) -> list[str]:
    *_, last = compare(engine, question, PREFERENCE, SHORT)
    return [answer.text for answer in last.answers]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as scratch:
        settings = replace(Settings.from_environment(), base=EMBEDDED, data=Path(scratch) / "data")
        engine = LocalEngine.load(settings)
        jobs = Jobs(settings, engine.store)
        alone = [texts(engine, question) for question in QUESTIONS]
        plan = TrainingPlan(preference="load")
        job = jobs.submit("benchmark", own_pairs(PREFERENCE, held_out=False), plan, ("bapo",))
        runner = Runner(jobs.store, settings)
        runner.start()
        try:
            while jobs.get("benchmark", job.id).progress.phase != "training":
                time.sleep(1)
            child = int(subprocess.run(["pgrep", "-f", f"jobs work {job.id}"], capture_output=True).stdout.split()[0])
            idle, busy = [], []
            for _ in range(rounds):
                os.kill(child, signal.SIGSTOP)
                idle.append(rate(engine))
                os.kill(child, signal.SIGCONT)
                busy.append(rate(engine))
            before, after = statistics.median(idle), statistics.median(busy)
            print(f"tokens/s of a comparison: idle {before:.1f}, while a job trains {after:.1f}: {after / before:.0%}")

            heard: dict[int, list[str]] = {}
            waited: dict[int, float] = {}

            def visit(number: int) -> None:
                start = time.monotonic()
                heard[number] = texts(engine, QUESTIONS[number])
                waited[number] = time.monotonic() - start

            visitors = [threading.Thread(target=visit, args=(number,)) for number in range(len(QUESTIONS))]
            for visitor in visitors:
                visitor.start()
            for visitor in visitors:
                visitor.join()
            right = sum(heard.get(number) == alone[number] for number in range(len(QUESTIONS)))
            print(
                f"ten visitors at once while it trains: {right} of {len(QUESTIONS)} got their own answers, the last "
                f"after {max(waited.values()):.1f} s; the job is {jobs.get('benchmark', job.id).state}"
            )
        finally:
            jobs.cancel("benchmark", job.id)
            runner.stop()


if __name__ == "__main__":
    main()
