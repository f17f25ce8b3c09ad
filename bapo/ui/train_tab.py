"""The Train tab: a file of pairs, a taste, a job that lives without the page, and its curves."""

import logging
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from bapo.errors import BapoError
from bapo.inference.engine import LocalEngine
from bapo.jobs.service import Jobs
from bapo.jobs.store import CANCELLED, FAILED, FINISHED, QUEUED, RUNNING, Job
from bapo.pair_files import read_limits
from bapo.pairs import COLUMNS, PairsReport, read_pairs
from bapo.training.plan import TrainingPlan
from bapo.training.preview import estimate, preview
from bapo.ui import texts, train_texts
from bapo.ui.compare_tab import CompareTab
from bapo.ui.train_charts import CHARTS, training_figure
from bapo.ui.visitors import Visitors

logger = logging.getLogger(__name__)

FILE_TYPES = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz"]
METHOD_CHOICES = {"BAPO": ("bapo",), "DPO": ("dpo",), "Both in turn, to compare": ("dpo", "bapo")}
REFRESH_SECONDS = 2.0
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


@dataclass(slots=True)
class Upload:
    """What this page has read: the file's report, kept while the form is filled in."""

    report: PairsReport


@dataclass(frozen=True, slots=True)
class TrainTab:
    """What other tabs and the page need of this one."""

    refresh: Callable
    inputs: list
    outputs: list


def build_train_tab(
    engine: LocalEngine,
    jobs: Jobs,
    visitors: Visitors,
    token: gr.BrowserState,
    tabs: gr.Tabs,
    compare: CompareTab,
) -> TrainTab:
    """Build the tab; “compare now” goes to the Compare tab, with the trained taste picked."""
    upload = gr.State(None)
    shown = gr.State(None)  # what the curves on the page were drawn from

    gr.HTML("<h3>1 &nbsp;Your pairs</h3>", elem_classes="bapo-heading")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="A file of preference pairs", file_types=FILE_TYPES, height=120, elem_id="pairs-file")
            gr.HTML(
                '<p class="bapo-faint">Prompt, chosen and rejected as JSON lines, JSON, CSV, TSV or Parquet, plain or '
                "gzipped; conversations, scored lists and responses by name are understood too.</p>"
            )
        with gr.Column(scale=2, min_width=320):
            report = gr.HTML(elem_id="pairs-report")
            with gr.Row(visible=False, elem_id="mapper") as mapper:
                pickers = [gr.Dropdown([], label=role, allow_custom_value=False) for role in COLUMNS]
                map_columns = gr.Button("Read it so", min_width=100)
            with gr.Row(visible=False) as namer:
                wanted = gr.Dropdown([], label="The wanted response", elem_id="wanted")
                read_wanted = gr.Button("Read it so", min_width=100)
            leave_out = gr.Checkbox(label="Leave the faulty rows out", value=False, visible=False, elem_id="leave-out")
            details = gr.HTML(elem_id="pairs-details")

    gr.HTML("<h3>2 &nbsp;The taste</h3>", elem_classes="bapo-heading")
    with gr.Row():
        name = gr.Textbox(label="Name", placeholder="my-taste", info="letters, digits, - and _", elem_id="taste-name")
        description = gr.Textbox(
            label="Description", placeholder="Short answers, no small talk.", info="for the adapter's card", scale=2
        )
        method = gr.Radio(
            list(METHOD_CHOICES), value="BAPO", label="Method", scale=2, elem_id="method-choice",
            info="BAPO keeps what the base knew; DPO is the usual way",
        )  # fmt: skip
    defaults = TrainingPlan(preference="default")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            lambda_ = gr.Number(defaults.lambda_, label="λ", info="weight of the anchor; 0 makes BAPO DPO")
            beta = gr.Number(defaults.beta, label="β", info="how sharply a margin counts; small trains further")
            rate = gr.Number(defaults.learning_rate, label="Learning rate", info="above 5e-4 models start to babble")
            epochs = gr.Number(defaults.epochs, label="Epochs", info="times that every pair is seen")
        with gr.Row():
            batch = gr.Number(defaults.batch_size, precision=0, label="Pairs a step", info="fewer need less memory")
            rank = gr.Number(defaults.rank, precision=0, label="LoRA rank", info="size of the adapter")
            share = gr.Number(defaults.held_out_share, label="Held-out share", info="prompts kept for the figures")
            seed = gr.Number(defaults.seed, precision=0, label="Seed", info="same seed, same adapter")
        with gr.Row():
            probes = [
                gr.Textbox(label=f"Probe prompt {i}", info="answered now and then while it trains") for i in (1, 2)
            ]

    gr.HTML("<h3>3 &nbsp;Start</h3>", elem_classes="bapo-heading")
    with gr.Row(elem_classes="bapo-start"):
        expected = gr.HTML(elem_id="estimate")
        start = gr.Button("Train", variant="primary", interactive=False, min_width=120, scale=0, elem_id="train")
    message = gr.HTML(elem_id="train-message")

    gr.HTML("<h3>Your jobs</h3>", elem_classes="bapo-heading")
    picker = gr.Dropdown([], label="Job", elem_id="job-picker", show_label=False, container=False)
    panel = gr.HTML(train_texts.job_panel(None), elem_id="job")
    with gr.Row(elem_classes="bapo-actions"):
        cancel = gr.Button("Cancel", variant="stop", interactive=False, min_width=90, elem_id="cancel-job")
        resume = gr.Button("Resume", interactive=False, min_width=90, elem_id="resume-job")
        delete = gr.Button("Delete", interactive=False, min_width=90, elem_id="delete-job")
        compare_now = gr.Button(
            "Compare now", variant="primary", interactive=False, min_width=120, elem_id="compare-now"
        )
    charts = []
    with gr.Column(visible=False, elem_id="curves") as pictures:
        for row in (CHARTS[:2], CHARTS[2:]):
            with gr.Row():
                charts += [gr.Plot(training_figure(chart, {}), show_label=False, min_width=320) for chart in row]
    answers = gr.HTML(elem_id="probe-answers")
    with gr.Accordion("Log", open=False):
        log = gr.Code(language=None, interactive=False, show_label=False, lines=8, max_lines=20, elem_id="job-log")

    form = [method, name, description, lambda_, beta, rate, epochs, batch, rank, share, seed, *probes]
    reading = [upload, report, mapper, *pickers, namer, wanted, leave_out, details, expected, start]
    jobs_view = [picker, panel, pictures, cancel, resume, delete, compare_now, *charts, answers, log, shown]

    # ── 1: the file ─────────────────────────────────────────────────────────────────────────────────────────
    def read(path: str | None, columns: dict[str, str] | None, named: str | None, *sizes):
        if path is None:
            return _nothing_read("")
        try:
            found = read_pairs(Path(path), columns=columns, wanted=named, limits=read_limits(jobs.settings))
            told = train_texts.report(found)
            more = ""
            if found.pairs:
                limit = defaults.max_response_tokens
                more = train_texts.lengths(preview(engine.base, found.pairs, limit), limit)
        except BapoError as error:
            return _nothing_read(texts.notice(str(error), "alert"))
        if not found.question:
            Path(path).unlink(missing_ok=True)  # gradio's copy; what was read stays with this page
        ready = bool(found.pairs) and not found.problems
        return (
            Upload(found),
            told,
            gr.update(visible=bool(found.guess)),
            *(gr.update(choices=found.columns, value=found.guess.get(role)) for role in COLUMNS),
            gr.update(visible=bool(found.names)),
            gr.update(choices=found.names, value=named),
            gr.update(visible=bool(found.problems and found.pairs), value=False),
            more,
            _estimate_text(found, *sizes),
            gr.update(interactive=ready),
        )

    def _estimate_text(found: PairsReport | None, method, epochs, batch, share) -> str:
        if not found or not found.pairs:
            return ""
        try:
            plans = [
                TrainingPlan(
                    preference="x", method=one, epochs=float(epochs), batch_size=int(batch), held_out_share=float(share)
                )
                for one in METHOD_CHOICES[method]
            ]
            return train_texts.estimated(estimate(engine.base, found.pairs, plans))
        except (BapoError, TypeError, ValueError):
            return ""

    sizes = [method, epochs, batch, share]
    file.upload(lambda path, *more: read(path, None, None, *more), [file, *sizes], reading, api_visibility="private")
    file.clear(lambda: _nothing_read(""), None, reading, **QUIET)
    map_columns.click(
        lambda path, a, b, c, *more: read(path, dict(zip(COLUMNS, (a, b, c), strict=True)), None, *more),
        [file, *pickers, *sizes], reading, api_visibility="private",
    )  # fmt: skip
    read_wanted.click(
        lambda path, named, *more: read(path, None, named, *more),
        [file, wanted, *sizes], reading, api_visibility="private",
    )  # fmt: skip
    leave_out.change(
        lambda yes, found: gr.update(interactive=bool(found and found.report.pairs and yes)),
        [leave_out, upload], start, **QUIET,
    )  # fmt: skip
    gr.on(
        [component.change for component in (method, epochs, batch, share)],
        lambda found, *more: _estimate_text(found.report if found else None, *more),
        [upload, *sizes], expected, show_progress="hidden", api_visibility="private", trigger_mode="always_last",
    )  # fmt: skip

    # ── 3: the job ──────────────────────────────────────────────────────────────────────────────────────────
    def submit(known, found: Upload | None, sound_only, request: gr.Request, *values):
        try:
            if found is None:
                raise BapoError("Upload a file of pairs first.")
            if found.report.problems and not sound_only:
                raise BapoError("Some rows are faulty: leave them out, or mend the file.")
            method, *settings = values
            *settings, first, second = settings
            job = jobs.submit(
                visitors.owner(known, request),
                found.report.pairs,
                _plan(*settings),
                METHOD_CHOICES[method],
                (first or "", second or ""),
            )
            told = "Queued. You may close this page: the job goes on, and is here when you come back."
            return texts.notice(told), *view(known, job.id, None, request)
        except BapoError as error:
            return texts.notice(str(error), "alert"), *_skipped(jobs_view)
        except (OSError, sqlite3.Error):  # a full disk, most likely: nothing of the submission is left behind
            logger.exception("a job could not be stored")
            told = "The job could not be stored. Free some space on the server's disk, then press Train again."
            return texts.notice(told, "alert"), *_skipped(jobs_view)

    def view(known, job_id, drawn, request: gr.Request):
        """Everything that concerns the picked job; the curves only where there is something new."""
        try:
            who = visitors.owner(known, request)
        except BapoError:
            return _skipped(jobs_view)
        mine = jobs.jobs(who)
        job = next((one for one in mine if one.id == job_id), mine[0] if mine else None)
        choices = [(train_texts.job_line(one), one.id) for one in mine]
        looks = (job.id, job.state, job.progress.part, job.progress.done, job.progress.phase) if job else None
        head = (
            gr.update(choices=choices, value=job.id if job else None),
            train_texts.job_panel(job),
            gr.update(visible=job is not None),
            *_actions(job),
        )
        if looks == drawn:
            return (*head, *_skipped([*charts, answers, log]), drawn)
        try:
            curves = jobs.curves(who, job.id) if job else None
            written = jobs.log(who, job.id) if job else ""
        except BapoError:  # deleted from somewhere else in this very moment; the next look shows it
            return _skipped(jobs_view)
        figures = [training_figure(chart, curves.metrics if curves else {}) for chart in CHARTS]
        told = train_texts.answers(curves) if curves else ""
        return (*head, *figures, told, written, looks)

    def act(what: Callable, known, job_id, request: gr.Request):
        try:
            what(visitors.owner(known, request), job_id or "")
            return "", *view(known, job_id, None, request)
        except BapoError as error:
            return texts.notice(str(error), "alert"), *view(known, job_id, None, request)

    start.click(submit, [token, upload, leave_out, *form], [message, *jobs_view], api_visibility="private")
    for button, what in ((cancel, jobs.cancel), (resume, jobs.resume), (delete, jobs.delete)):

        def pressed(known, job_id, request: gr.Request, what=what):
            return act(what, known, job_id, request)

        button.click(pressed, [token, picker], [message, *jobs_view], **QUIET)

    def to_compare(known, job_id, request: gr.Request):
        try:
            job = jobs.get(visitors.owner(known, request), job_id or "")
        except BapoError:  # deleted meanwhile
            return gr.skip(), gr.skip()
        return gr.Tabs(selected="compare"), compare.offered(known, request, job.request.name)

    compare_now.click(to_compare, [token, picker], [tabs, compare.preference], **QUIET)
    picker.input(view, [token, picker, gr.State(None)], jobs_view, **QUIET)
    gr.Timer(REFRESH_SECONDS).tick(view, [token, picker, shown], jobs_view, **QUIET)
    return TrainTab(view, [token, picker, shown], jobs_view)


def _plan(name, description, lambda_, beta, rate, epochs, batch, rank, share, seed) -> TrainingPlan:
    try:
        return TrainingPlan(
            preference=(name or "").strip(),
            description=(description or "").strip(),
            lambda_=float(lambda_),
            beta=float(beta),
            learning_rate=float(rate),
            epochs=float(epochs),
            batch_size=int(batch),
            rank=int(rank),
            alpha=2 * int(rank),
            seed=int(seed),
            held_out_share=float(share),
        )
    except (TypeError, ValueError, OverflowError):
        raise BapoError("One of the advanced settings is empty or not a number.") from None


def _actions(job: Job | None) -> tuple:
    """Updates of Cancel, Resume, Delete and Compare now."""
    state = job.state if job else None
    allowed = (
        state in (QUEUED, RUNNING),
        state in (CANCELLED, FAILED),
        state in (QUEUED, CANCELLED, FAILED, FINISHED),
        state == FINISHED,
    )
    return tuple(gr.update(interactive=yes) for yes in allowed)


def _nothing_read(told: str) -> tuple:
    hidden = gr.update(visible=False)
    empty = gr.update(choices=[], value=None)
    return (None, told, hidden, empty, empty, empty, hidden, empty, hidden, "", "", gr.update(interactive=False))


def _skipped(outputs: list) -> tuple:
    return tuple(gr.skip() for _ in outputs)
