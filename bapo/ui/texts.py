"""What the Compare page says: HTML from plain data. Model text and prompts are escaped here."""

import shlex
from html import escape

from bapo.comparison import Answer, BaseToken, Frame
from bapo.evaluation import BASE
from bapo.preferences import CATALOGUE
from bapo.ui.charts import NAMES

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
WHAT_IT_IS = {
    "base": "the untouched model",
    "dpo": "the taste, trained the usual way",
    "bapo": "the taste, anchored to the base",
}
WEIGHTS = {"int16": "16-bit integers"}  # others go by their own names
TOLD_CHANGE = 0.05  # nats; smaller changes are not worth a number under the token


def answer_panel(name: str, answer: Answer | None, frame: Frame | None) -> str:
    """One column: what a policy said, and what that took; or that there is no such policy."""
    text = answer.text.strip() if answer else ""
    waiting = frame is not None and not frame.done
    body = escape(text)
    if frame and frame.answers and not answer:
        missing = f"This taste has no {NAMES[name]} adapter for this base."
        body = f'<span class="bapo-faint">{missing}</span>'
    elif waiting and not text:
        body = '<span class="bapo-faint">…</span>'
    writing = " bapo-writing" if answer and waiting and not answer.done else ""
    facts = []
    if answer and answer.tokens:
        facts.append(f"{answer.tokens} tokens · {answer.tokens_per_second:.1f} tokens/s")
        if name != BASE and frame:
            facts.append(f"drift {signed(frame.drift(name).nats)} nats")
    return (
        f'<section class="bapo-panel bapo-{name}" aria-label="{NAMES[name]} answer">'
        f"<h3>{NAMES[name]} <small>{WHAT_IT_IS[name]}</small></h3>"
        f'<div class="bapo-text{writing}">{body}</div><footer>{" · ".join(facts)}</footer></section>'
    )


def reading(frame: Frame | None) -> str:
    """The chart in a sentence, such as “DPO drifted 18.2 nats: … BAPO −0.4 nats: …”."""
    if frame is None or not frame.base_tokens or not frame.methods:
        return ""
    parts = []
    for method in frame.methods:
        nats = frame.drift(method).nats
        whole = round(abs(nats))
        if whole == 0:
            effect = "the base's answer is as likely as it was"
        else:
            power = "e" if whole == 1 else f"e{str(whole).translate(SUPERSCRIPTS)}"
            effect = f"the base's answer became {power} times {'less' if nats > 0 else 'more'} likely"
        parts.append(f"<b>{NAMES[method]}</b> drifted {signed(nats).lstrip('+')} nats: {effect}")
    return f'<p class="bapo-reading">{"; ".join(parts)}.</p>'


def token_strip(frame: Frame | None, method: str) -> str:
    """The base's answer; under each token its log-prob change in nats, behind it the same as a colour."""
    if frame is None or method not in frame.methods:
        return ""
    spans = []
    for token, text in _merged(frame.base_tokens):
        change = sum(part.change(method) for part in token)
        strength = 0.6 * min(abs(change) / 3, 1)  # strongest from e³ on, and still readable in light and dark
        colour = f"rgba(217,115,13,{strength:.2f})" if change < 0 else f"rgba(13,159,143,{strength:.2f})"
        label = signed(change) if abs(change) >= TOLD_CHANGE else ""
        hint = f"{signed(change, 2)} nats under {NAMES[method]}"
        shown = escape(text).replace("\n", "↵") if text else ("end" if frame.done else "…")
        spans.append(
            f'<span class="bapo-token" title="{hint}"><span style="background:{colour}">{shown}</span>'
            f"<small>{label}</small></span>" + '<span class="bapo-break"></span>' * text.count("\n")
        )
    return f'<div class="bapo-tokens">{"".join(spans)}</div>' if spans else ""


def _merged(tokens: tuple[BaseToken, ...]) -> list[tuple[list[BaseToken], str]]:
    # A character may be spread over several tokens: those before it have no text of their own.
    groups: list[tuple[list[BaseToken], str]] = []
    pending: list[BaseToken] = []
    for token in tokens:
        pending.append(token)
        if token.text:
            groups.append((pending, token.text))
            pending = []
    return [*groups, *([(pending, "")] if pending else [])]


def status(frame: Frame) -> str:
    """One line on where a comparison stands."""
    if frame.ahead:
        others = "one question is" if frame.ahead == 1 else f"{frame.ahead} questions are"
        return notice(f"Waiting: {others} being answered before yours.")
    if not frame.done:
        return notice("Answering …")
    total = sum(answer.tokens for answer in frame.answers)
    weights = f" The base's weights: {WEIGHTS.get(frame.weights, frame.weights)}." if frame.weights else ""
    speed = f"{total} tokens in {frame.seconds:.1f} s, {frame.tokens_per_second:.1f} tokens/s over all answers."
    return notice(speed + weights)


def notice(text: str, kind: str = "status") -> str:
    """A line for the status area; `kind` is "status" or "alert"."""
    return f'<p class="bapo-{kind}" role="{kind}">{escape(text)}</p>'


def description(preference_id: str, own: str = "") -> str:
    """What a preference means, in its own words; `own` is what its adapter's card says."""
    known = CATALOGUE.get(preference_id)
    text = f"{known.label}: {known.description}" if known else f"{preference_id}: {own or 'a taste trained here.'}"
    return f'<p class="bapo-faint">“{escape(text)}”</p>'


def label(preference_id: str) -> str:
    known = CATALOGUE.get(preference_id)
    return known.label if known else preference_id


def terminal_command(prompt: str, preference: str, length: int, temperature: float, top_p: float, seed: int) -> str:
    """The same comparison as a command."""
    options = f"--preference {shlex.quote(preference)} --max-new-tokens {length}"
    if temperature:
        options += f" --temperature {temperature:g} --top-p {top_p:g} --seed {seed}"
    return f"python -m bapo compare {shlex.quote(prompt)} {options}"


def signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a true minus and no minus on zero."""
    rounded = round(value, digits)
    return f"{'−' if rounded < 0 else '+' if rounded > 0 else ''}{abs(rounded):.{digits}f}"
