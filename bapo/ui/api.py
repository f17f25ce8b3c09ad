"""The product as named, typed endpoints, for gradio_client and as MCP tools. The same services as the page."""

import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from bapo.comparison import compare, score_pairs
from bapo.errors import BapoError
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.jobs.service import Jobs
from bapo.pair_files import read_limits
from bapo.pairs import PairsReport, read_pairs
from bapo.training.plan import TrainingPlan
from bapo.ui.visitors import Visitors

MAX_SCORED = 200  # pairs in one call of `score`


def build_api(engine: LocalEngine, jobs: Jobs, visitors: Visitors) -> None:
    """Add the endpoints to the current `gr.Blocks`.

    `token` is the caller's own secret of 24 to 64 letters, digits, '-' and '_': whoever has it sees the
    jobs and adapters made with it, and nobody else does. Signed-in users need none.
    """

    def compare_policies(
        prompt: str,
        preference: str,
        request: gr.Request,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        token: str = "",
    ) -> dict[str, Any]:
        """Answer a prompt as the base, as DPO and as BAPO: texts, log-probs and drift in nats.

        Args:
            prompt: The question.
            preference: The taste, such as P2A or literature, or one of your own.
            max_new_tokens: Tokens of an answer at most.
            temperature: 0 takes the likeliest token always.
            seed: The same seed gives the same answer.
            token: Your own secret, needed for adapters of your own.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=1.0, seed=seed)
        store = visitors.adapters(token, request)
        *_, last = compare(engine, prompt, preference, sampling, store)
        return last.as_dict()

    def score(pairs: str, preference: str, request: gr.Request, token: str = "") -> dict[str, Any]:
        """Log-probs of preference pairs under base, DPO and BAPO, with reward accuracy and drift.

        Args:
            pairs: JSON lines (or any other text format that check_pairs takes) with prompt, chosen and rejected.
            preference: The taste whose adapters score.
            token: Your own secret, needed for adapters of your own.
        """
        found = _sound(_read(pairs))
        if len(found.pairs) > MAX_SCORED:
            raise BapoError(f"{len(found.pairs)} pairs are too many for one call; send {MAX_SCORED} at most.")
        store = visitors.adapters(token, request)
        return score_pairs(engine, found.pairs, preference, store=store)

    def check_pairs(pairs: str) -> dict[str, Any]:
        """Say what a file of preference pairs holds and what is wrong with it, row by row.

        Args:
            pairs: The text of the file: JSON lines, JSON, CSV or TSV.
        """
        return _read(pairs).as_dict()

    def submit_job(
        pairs: str,
        name: str,
        request: gr.Request,
        method: str = "bapo",
        description: str = "",
        epochs: float = 1.0,
        learning_rate: float = 3e-4,
        token: str = "",
    ) -> dict[str, Any]:
        """Queue a training on preference pairs; returns the job with its id.

        Args:
            pairs: JSON lines (or any other text format that check_pairs takes) without faulty rows.
            name: What the taste is called.
            method: bapo, dpo or both.
            description: What the answers should be like.
            epochs: How often every pair is seen.
            learning_rate: Adam's.
            token: Your own secret: whoever has it sees the job.
        """
        if method not in ("bapo", "dpo", "both"):
            raise BapoError(f"There is no method {method!r}; choose bapo, dpo or both.")
        plan = TrainingPlan(
            preference=name, description=description.strip(), epochs=epochs, learning_rate=learning_rate
        )
        methods = ("dpo", "bapo") if method == "both" else (method,)
        return jobs.submit(visitors.owner(token, request), _sound(_read(pairs)).pairs, plan, methods).as_dict()

    def job_status(job_id: str, request: gr.Request, token: str = "") -> dict[str, Any]:
        """Where a job of yours stands: its state, place in the queue, phase, progress and ETA in seconds.

        Args:
            job_id: What submit_job returned as id.
            token: The secret the job was submitted with.
        """
        return jobs.get(visitors.owner(token, request), job_id).as_dict()

    def _read(text: str) -> PairsReport:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pairs"
            file.write_text(text, encoding="utf-8", errors="surrogateescape")
            return read_pairs(file, limits=read_limits(jobs.settings))

    shared: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": None}
    gr.api(_told(compare_policies), api_name="compare", **shared)
    gr.api(_told(score), api_name="score", **shared)
    gr.api(_told(check_pairs), api_name="check_pairs", concurrency_limit=4)
    gr.api(_told(submit_job), api_name="submit_job", concurrency_limit=4)
    gr.api(_told(job_status), api_name="job_status", concurrency_limit=None)


def _told(function: Callable) -> Callable:
    """Faults reach the caller as their sentence."""

    @wraps(function)
    def endpoint(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BapoError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return endpoint


def _sound(found: PairsReport) -> PairsReport:
    if found.question:
        raise BapoError(f"{found.question} Send prompt, chosen and rejected.")
    if found.problems:
        raise BapoError(f"{found.faulty_rows} rows are faulty, the first: {found.problems[0]}. See check_pairs.")
    if not found.pairs:
        raise BapoError("There are no pairs in it.")
    return found
