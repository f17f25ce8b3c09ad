"""The Compare tab: one question, three answers side by side, and what the taste cost."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import gradio as gr

from bapo.adapters import AdapterStore
from bapo.comparison import METHODS, Frame, compare
from bapo.errors import BapoError
from bapo.evaluation import BASE
from bapo.inference.decoding import Sampling
from bapo.inference.engine import LocalEngine
from bapo.preferences import CATALOGUE
from bapo.recording import recorded_frame
from bapo.ui import texts
from bapo.ui.charts import NAMES, drift_figure
from bapo.ui.visitors import Visitors

logger = logging.getLogger(__name__)

EXAMPLES = (
    "Why do leaves change colour in autumn?",
    "Plan a rainy Sunday at home.",
    "How can I fall asleep faster?",
    "What does inflation mean?",
)
CHART_SECONDS = 0.4  # plotly redraws the whole figure: more often than this it flickers
VISITORS = 32  # those beyond wait in gradio's queue, unseen; those within are told their place


@dataclass(frozen=True, slots=True)
class CompareTab:
    """What the page needs of this tab: the picker of tastes, and what fills it for a visitor: (token, request,
    the taste to pick, or None to leave it) → update."""

    preference: gr.Radio
    offered: Callable


def build_compare_tab(engine: LocalEngine, visitors: Visitors, token: gr.BrowserState) -> CompareTab:
    """Build the tab inside the current `gr.Blocks`."""
    offered = _offered(engine.store)
    recording = recorded_frame(engine)
    first = recording.frame if recording else None
    start = first.preference if first else (offered[0][1] if offered else None)
    views = _views(first, METHODS[0])

    last_frame = gr.State(first)
    with gr.Row(equal_height=True, elem_classes="bapo-ask"):
        prompt = gr.Textbox(
            value=recording.prompt if recording else "",
            placeholder="Ask anything …",
            label="Your question",
            lines=1,
            max_lines=6,
            scale=8,
            autofocus=True,
            elem_id="prompt",
        )
        ask = gr.Button("Ask", variant="primary", scale=1, min_width=90, elem_id="ask")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=90, interactive=False, elem_id="stop")
    with gr.Row(elem_classes="bapo-examples"):
        examples = [gr.Button(text, size="sm", variant="secondary", min_width=60) for text in EXAMPLES]
    preference = gr.Radio(
        offered,
        value=start,
        label="Taste",
        elem_id="preference",
    )
    about = gr.HTML(_description(engine.store, start), elem_id="about")
    with gr.Accordion("Length, temperature, seed", open=False), gr.Row():
        length = gr.Slider(
            8,
            engine.settings.max_new_tokens,
            value=min(128, engine.settings.max_new_tokens),
            step=8,
            label="Length",
            info="tokens at most",
        )
        temperature = gr.Slider(0, 2, value=0, step=0.1, label="Temperature", info="0: always the likeliest token")
        top_p = gr.Slider(0.05, 1, value=1, step=0.05, label="Top-p", info="share of the probability drawn from")
        seed = gr.Number(0, precision=0, label="Seed", info="same seed, same answer")
    state = gr.HTML(_opening(offered, bool(recording)), elem_id="state")
    with gr.Row(equal_height=True, elem_classes="bapo-answers"):
        panels = [
            gr.HTML(html, elem_id=f"answer-{name}", min_width=280)
            for name, html in zip((BASE, *METHODS), views[:3], strict=True)
        ]
    with gr.Column(elem_classes="bapo-cost"):
        gr.HTML(
            elem_classes="bapo-heading",
            value="<h3>What the taste cost <small>log-prob of the base's own answer, while it is written</small></h3>",
        )
        sentence = gr.HTML(views[3], elem_id="reading")
        chart = gr.Plot(views[4], show_label=False, elem_id="chart")
        with gr.Row(elem_classes="bapo-strip-head"):
            gr.HTML(
                elem_classes="bapo-heading",
                value="<h3>The base's answer, token by token <small>change in nats under</small></h3>",
                scale=3,
            )
            method = gr.Radio(
                [(NAMES[name], name) for name in METHODS],
                value=METHODS[0],
                show_label=False,
                label="Adapter",
                container=False,
                scale=1,
                min_width=160,
                elem_id="method",
            )
        strip = gr.HTML(views[5], elem_id="tokens")
    with gr.Accordion("The same from a terminal", open=False):
        command = gr.Code(
            texts.terminal_command(recording.prompt if recording else EXAMPLES[0], start or "P2A", 128, 0, 1, 0),
            language="shell",
            show_label=False,
            interactive=False,
            elem_id="command",
        )

    def answer(
        prompt, preference, length, temperature, top_p, seed, method, known, request: gr.Request
    ) -> Iterator[tuple]:
        try:
            if not preference:
                raise BapoError("There is no adapter yet to compare with. Train one: python -m bapo train --help")
            sampling = Sampling(
                max_new_tokens=int(length), temperature=float(temperature), top_p=float(top_p), seed=int(seed or 0)
            )
            drawn = -CHART_SECONDS
            for frame in compare(engine, prompt or "", preference, sampling, visitors.adapters(known, request)):
                full = frame.done or frame.seconds - drawn >= CHART_SECONDS
                if full:
                    drawn = frame.seconds
                shown = _views(frame, method)
                if not full:
                    shown = (*shown[:4], gr.skip(), gr.skip())
                yield (*_controls(idle=frame.done), texts.status(frame), frame, *shown)
        except BapoError as error:
            yield (*_controls(idle=True), texts.notice(str(error), "alert"), gr.skip(), *(gr.skip() for _ in views))
        except (RuntimeError, MemoryError, OSError):  # out of memory, a device or a disk that failed
            logger.exception("a comparison broke off")
            message = "The model could not finish this answer. Ask again, with a shorter length or prompt."
            yield (*_controls(idle=True), texts.notice(message, "alert"), gr.skip(), *(gr.skip() for _ in views))

    inputs = [prompt, preference, length, temperature, top_p, seed, method, token]
    controls = [ask, stop, method, *examples]
    outputs = [*controls, state, last_frame, *panels, sentence, chart, strip]
    # A limit above one, so that those who wait do so in the engine's line, which tells them their place.
    shared = {
        "concurrency_id": "model",
        "concurrency_limit": VISITORS,
        "show_progress": "hidden",
        "api_visibility": "private",
        "trigger_mode": "once",
    }
    runs = [gr.on([ask.click, prompt.submit], answer, inputs, outputs, **shared)]
    for button, text in zip(examples, EXAMPLES, strict=True):
        filled = button.click(lambda text=text: text, None, prompt, queue=False, api_visibility="private")
        runs.append(filled.then(answer, inputs, outputs, **shared))

    def stopped(frame: Frame | None, method: str):
        tokens = sum(answer.tokens for answer in frame.answers) if frame else 0
        message = texts.notice(f"Stopped after {tokens} tokens." if tokens else "Stopped.")
        shown = _views(replace(frame, done=True) if frame else None, method)
        return (*_controls(idle=True), message, *shown)

    # First cancel, then say so: a frame on its way would otherwise disable Ask again.
    cancelled = stop.click(None, cancels=runs, queue=False, api_visibility="private")
    cancelled.then(
        stopped,
        [last_frame, method],
        [*controls, state, *panels, sentence, chart, strip],
        queue=False,
        api_visibility="private",
    )

    def offered_to(known, request: gr.Request, picked: str | None = None):
        choices = _offered(visitors.adapters(known, request))
        return gr.update(choices=choices) if picked is None else gr.update(choices=choices, value=picked)

    def describe(preference, known, request: gr.Request):
        return _description(visitors.adapters(known, request), preference)

    preference.change(describe, [preference, token], about, queue=False, api_visibility="private")
    method.change(
        texts.token_strip,
        [last_frame, method],
        strip,
        queue=False,
        api_visibility="private",
    )

    def as_command(prompt, preference, length, temperature, top_p, seed):
        return texts.terminal_command(prompt, preference or "", int(length), temperature, top_p, int(seed or 0))

    options = [prompt, preference, length, temperature, top_p, seed]
    changes = [component.change for component in options]
    gr.on(changes, as_command, options, command, queue=False, api_visibility="private", trigger_mode="always_last")
    return CompareTab(preference, offered_to)


def _controls(idle: bool) -> tuple:
    """Updates of Ask, Stop, the token strip's adapter and the examples: one run at a time writes the page."""
    others = [gr.update(interactive=idle) for _ in ("method", *EXAMPLES)]
    return (gr.update(interactive=idle), gr.update(interactive=not idle), *others)


def _views(frame: Frame | None, method: str) -> tuple:
    """(base panel, DPO panel, BAPO panel, reading, chart, token strip) of a frame."""
    answers = {answer.name: answer for answer in frame.answers} if frame else {}
    panels = [texts.answer_panel(name, answers.get(name), frame) for name in (BASE, *METHODS)]
    changes = {name: frame.logps_change(name) for name in frame.methods} if frame else {}
    tokens = frame.base_tokens if frame else ()
    chart = drift_figure(changes, [token.text for token in tokens])
    return (*panels, texts.reading(frame), chart, texts.token_strip(frame, method))


def _description(store: AdapterStore, preference: str | None) -> str:
    found = store.by_preference().get(preference or "", {})
    own = next((adapter.card.description for adapter in found.values() if adapter.card.description), "")
    return texts.description(preference, own) if preference else ""


def _offered(store: AdapterStore) -> list[tuple[str, str]]:
    """(label, preference id) of every taste that has an adapter, the catalogue's first."""
    found = store.by_preference()
    ordered = [*(known for known in CATALOGUE if known in found), *(own for own in found if own not in CATALOGUE)]
    return [(texts.label(preference), preference) for preference in ordered]


def _opening(offered: list[tuple[str, str]], recorded: bool) -> str:
    if not offered:
        return texts.notice("No adapter fits this base yet. Train one: python -m bapo train --help", "alert")
    if recorded:
        return texts.notice("A recorded run of this very model. Ask your own question to replace it.")
    return texts.notice("Ask a question: three answers will be written side by side.")
