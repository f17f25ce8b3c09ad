"""What the Train and Adapters tabs say: HTML from plain data. Everything a user wrote is escaped here."""

import time
from collections.abc import Sequence
from html import escape

from bapo.adapters import Adapter
from bapo.jobs.store import FINISHED, QUEUED, RUNNING, Curves, Job
from bapo.pairs import PairsReport
from bapo.training.preview import Estimate, Preview
from bapo.ui.charts import NAMES
from bapo.ui.texts import label, signed

SHOWN_PROBLEMS = 50
SHOWN_CHARACTERS = 1200


def report(found: PairsReport) -> str:
    """What was read, what is wrong row by row, and what deserves a second look."""
    name = escape(found.file)
    if found.question:
        return f'<p class="bapo-alert" role="alert">{name} was read. {escape(found.question)}</p>'
    lines = [
        f"<p><b>{len(found.pairs):,} pairs</b> of {found.prompts:,} prompts in {found.rows:,} rows of {name}.</p>",
    ]
    if found.problems:
        rows = "".join(
            f"<tr><td>{problem.row}</td><td>{escape(problem.column or '')}</td><td>{escape(problem.expected)}</td></tr>"
            for problem in found.problems[:SHOWN_PROBLEMS]
        )
        more = len(found.problems) - SHOWN_PROBLEMS
        lines.append(
            f'<p class="bapo-alert" role="alert">{found.faulty_rows} rows cannot be used. '
            "Mend the file, or leave these rows out.</p>"
            '<div class="bapo-scroll"><table class="bapo-table"><thead><tr><th>row</th><th>column</th>'
            f"<th>what is wrong</th></tr></thead><tbody>{rows}</tbody></table></div>"
            + (f'<p class="bapo-faint">and {more} more</p>' if more > 0 else "")
        )
    lines += [f'<p class="bapo-faint">{escape(note)}</p>' for note in found.notes]
    return "".join(lines)


def lengths(shown: Preview, max_response_tokens: int) -> str:
    """Token counts by role, how many responses are cut, and the first rows as they are trained."""
    rows = "".join(
        f"<tr><td>{role}</td><td>{own.median}</td><td>{own.p95}</td><td>{own.longest}</td></tr>"
        for role, own in shown.lengths.items()
    )
    cut = (
        f"<p>{shown.cut} responses are longer than {max_response_tokens} tokens and will be cut at their end.</p>"
        if shown.cut
        else ""
    )
    examples = "".join(
        f"<section class='bapo-row'><h4>row {number}, prompt</h4><pre>{_clipped(prompt)}</pre>"
        f"<h4>chosen</h4><pre>{_clipped(chosen)}</pre><h4>rejected</h4><pre>{_clipped(rejected)}</pre></section>"
        for number, (prompt, chosen, rejected) in enumerate(shown.rows, start=1)
    )
    return (
        '<table class="bapo-table"><thead><tr><th>tokens</th><th>median</th><th>95 of 100 under</th><th>longest</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>{cut}"
        f"<details><summary>The first rows as the model reads them</summary>{examples}</details>"
    )


def estimated(found: Estimate | None) -> str:
    if found is None:
        return ""
    return (
        f'<p class="bapo-faint">About {duration(found.seconds)} and {found.memory_bytes / 1e9:.1f} GB of memory here, '
        f"{found.steps} steps.</p>"
    )


def job_line(job: Job) -> str:
    """A job in the picker; plain text."""
    return f"{job.request.name} · {'/'.join(NAMES[m] for m in job.methods)} · {job.state} · {_when(job.created)}"


def job_panel(job: Job | None) -> str:
    """Where a job stands."""
    if job is None:
        return '<p class="bapo-faint">No job yet. What you train here appears with its curves.</p>'
    progress = job.progress
    if job.state == QUEUED:
        told = f"Waiting: place {job.place} in the queue." + (
            " It goes on from its last checkpoint." if job.started else ""
        )
    elif job.state == RUNNING:
        left = "" if progress.eta_seconds is None else f" · {duration(progress.eta_seconds)} left in this phase"
        part = f" · {progress.part + 1} of {len(job.methods)}" if len(job.methods) > 1 else ""
        method = f"{NAMES[progress.method]}{part}: " if progress.method else ""
        counted = f" {progress.done} of {progress.total}" if progress.total > 1 else ""
        told = f"{method}{progress.phase or 'starting its process'}{counted}{left}"
    elif job.state == FINISHED:
        assert job.started is not None and job.ended is not None
        told = f"Finished after {duration(job.ended - job.started)}."
    else:
        told = f"{job.state.capitalize()}. {job.error}" if job.error else f"{job.state.capitalize()}."
    bar = ""
    if job.state == RUNNING:
        share = progress.done / progress.total if progress.total else 0.0
        bar = f'<progress max="1" value="{share:.3f}" aria-label="{escape(progress.phase)}"></progress>'
    kind = "alert" if job.error else "status"
    note = f'<p class="bapo-faint">{escape(progress.note)}</p>' if progress.note else ""
    return (
        f'<p><b>{escape(job.request.name)}</b> <span class="bapo-faint">{job.request.pairs:,} pairs of '
        f"{job.request.prompts:,} prompts · {escape(job.request.base)} · job {job.id}</span></p>"
        f'{bar}<p class="bapo-{kind}" role="{kind}" data-state="{job.state}">{escape(told)}</p>{note}'
    )


def answers(curves: Curves) -> str:
    """Probe by probe: the base's answer beside the policies', the latest ones, with the step they are from."""
    blocks = []
    for prompt, by_method in curves.answers.items():
        columns = []
        for method in ("base", "dpo", "bapo"):
            if method not in by_method:
                continue
            step, text = by_method[method][-1]
            when = "" if method == "base" else f" <small>step {step}</small>"
            columns.append(
                f'<section class="bapo-panel bapo-{method} bapo-probe"><h3>{NAMES[method]}{when}</h3>'
                f'<div class="bapo-text">{escape(text.strip())}</div></section>'
            )
        blocks.append(f'<p>“{escape(prompt)}”</p><div class="bapo-probes">{"".join(columns)}</div>')
    return "".join(blocks)


def adapter_cards(found: Sequence[Adapter], own: set[str]) -> str:
    """Every adapter with its figures; `own` are the visitor's."""
    if not found:
        return '<p class="bapo-faint">No adapter fits this base yet.</p>'
    rows = []
    for adapter in found:
        card = adapter.card
        figures = card.held_out
        shown = (
            f"<td>{figures.reward_accuracy:.3f}</td><td>{signed(figures.drift_nats)}</td>"
            if figures
            else "<td></td><td></td>"
        )
        whose = "yours" if adapter.key in own else "everyone's"
        data = card.data_sha256[:12] or "unknown"
        rows.append(
            f"<tr><td><b>{escape(label(card.preference))}</b><br><small>{escape(card.description)}</small></td>"
            f"<td>{escape(NAMES.get(card.method, card.method))}</td><td>{whose}</td>"
            f"<td>{card.training_pairs:,}</td>{shown}<td><code>{escape(data)}</code></td></tr>"
        )
    return (
        '<div class="bapo-scroll"><table class="bapo-table"><thead><tr><th>taste</th><th>method</th><th>whose</th>'
        "<th>pairs</th><th>held-out accuracy</th><th>drift, nats a prompt</th><th>data</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _when(moment: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(moment))


def _clipped(text: str) -> str:
    return escape(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …")
