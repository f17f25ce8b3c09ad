"""From the rows of a file to preference pairs: the layouts that are in use, recognised by their columns."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# A prompt is one message of the user's, or a conversation that ends with one: ((role, text), …).
Prompt = str | tuple[tuple[str, str], ...]

PROMPTS = ("prompt", "instruction", "question", "query", "user_input")
COMPLETIONS = ("completions", "responses", "all_generated_responses", "answers", "candidates")
SCORES = ("scores", "all_scores", "ratings")
SCORE = ("overall_score", "score", "rating", "reward")
ANSWER = ("response", "text", "content", "answer", "output")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt with the response that was preferred and one that was not."""

    prompt: Prompt
    chosen: str
    rejected: str


class Fault(ValueError):
    """What is wrong with a row: the column, if it is one column's fault, and what was expected there."""

    def __init__(self, column: str | None, expected: str):
        super().__init__(expected)
        self.column, self.expected = column, expected


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns hold what. `kind` is "pairs", "scored" or "named".

    pairs: `chosen` and `rejected` (a text, a conversation, or several rejected) with or without `prompt`.
    scored: `responses` is a list and the scores are inside it or in the column `scores`.
    named: `responses` maps names to texts; the wanted name's is chosen, every other one is rejected.
    """

    kind: str
    prompt: str | None
    chosen: str = "chosen"
    rejected: str = "rejected"
    responses: str = ""
    scores: str | None = None


def recognise(rows: Sequence[dict[str, Any]]) -> Layout | None:
    """The layout of a file by some of its rows; `None` where the columns must be named by the user."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    prompt = next((name for name in PROMPTS if name in columns), None)
    if "chosen" in columns and "rejected" in columns:
        return Layout("pairs", prompt)
    if {"user_input", "completion_a", "completion_b"} <= set(columns):  # P-Soups: a is the better one
        return Layout("pairs", "user_input", "completion_a", "completion_b")
    responses = next((name for name in COMPLETIONS if name in columns), None)
    if prompt is None or responses is None:
        # A row that lacks one of two columns is a faulty row of the usual layout, not a layout of its own.
        return Layout("pairs", prompt) if prompt and {"chosen", "rejected"} & set(columns) else None
    values = [_structure(row.get(responses)) for row in rows]
    if any(isinstance(value, dict) for value in values):
        return Layout("named", prompt, responses=responses)
    scores = next((name for name in SCORES if name in columns), None)
    scored_inside = any(
        isinstance(item, dict) and any(name in item for name in SCORE)
        for value in values
        if isinstance(value, list)
        for item in value
    )
    return Layout("scored", prompt, responses=responses, scores=scores) if scores or scored_inside else None


def guess(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A guess at prompt, chosen and rejected among unknown columns, to be confirmed: by name, else by order."""
    columns = [name for name in dict.fromkeys(column for row in rows for column in row)]
    columns = [name for name in columns if any(isinstance(row.get(name), str | list) for row in rows)]
    hints = {
        "rejected": ("reject", "worse", "bad", "lose", "neg", "dispref"),
        "chosen": ("chos", "better", "good", "win", "pos", "prefer", "accept", "best"),
        "prompt": (*PROMPTS, "input", "context", "user", "ask", "title"),
    }
    found: dict[str, str] = {}
    for role, words in hints.items():
        own = next((c for c in columns if c not in found.values() and any(word in c.lower() for word in words)), None)
        if own is not None:
            found[role] = own
    left = iter([column for column in columns if column not in found.values()])
    for role in ("prompt", "chosen", "rejected"):
        if role not in found and (column := next(left, None)) is not None:
            found[role] = column
    return {role: found[role] for role in ("prompt", "chosen", "rejected") if role in found}


def names_in(rows: Sequence[dict[str, Any]], layout: Layout) -> list[str]:
    """The names under which a "named" layout keeps its responses."""
    values = (_structure(row.get(layout.responses)) for row in rows)
    return list(dict.fromkeys(name for value in values if isinstance(value, dict) for name in value))


def pairs_of(row: dict[str, Any], layout: Layout, wanted: str | None = None) -> Iterator[Pair]:
    """The pairs of one row; raises `Fault` where it holds none."""
    if layout.kind == "named":
        yield from _named_pairs(row, layout, wanted)
    elif layout.kind == "scored":
        yield from _scored_pairs(row, layout)
    else:
        yield from _plain_pairs(row, layout)


def _plain_pairs(row: dict[str, Any], layout: Layout) -> Iterator[Pair]:
    chosen, rejected = (_decoded(_present(row, column)) for column in (layout.chosen, layout.rejected))
    # Several rejected responses to one prompt are a list of texts, or of conversations.
    several = isinstance(rejected, list) and bool(rejected) and not isinstance(rejected[0], dict)
    for one in rejected if several else [rejected]:
        yield _pair(row, layout, chosen, _decoded(one))


def _pair(row: dict[str, Any], layout: Layout, chosen: Any, rejected: Any) -> Pair:
    if layout.prompt is None or row.get(layout.prompt) is None:
        return _implicit(row, layout, chosen, rejected)
    prompt = _prompt(_decoded(row[layout.prompt]), layout.prompt)
    answers = []
    for column, value in ((layout.chosen, chosen), (layout.rejected, rejected)):
        if isinstance(value, list):
            *context, (role, text) = _conversation(value, column)
            if role != "assistant":
                raise Fault(column, "must end with the assistant's message")
            if context:
                whole = _prompt(context, column)
                if prompt not in (whole, context[-1][1].strip()):
                    raise Fault(column, f"begins with another conversation than the column {layout.prompt!r} holds")
                prompt = whole
            answers.append(text)
        else:
            answers.append(_text(value, column))
    return _checked(Pair(prompt, *answers), layout)


def _implicit(row: dict[str, Any], layout: Layout, chosen: Any, rejected: Any) -> Pair:
    """A prompt that is the common beginning of both responses."""
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise Fault(layout.rejected, "expected the same kind of value as in chosen: two texts or two conversations")
    if not isinstance(chosen, list):
        chosen, rejected = _text(chosen, layout.chosen), _text(rejected, layout.rejected)
        if not _TURN.match(chosen.strip()):
            return _checked(_common_beginning(chosen, rejected, layout), layout)
        dialogues = [_dialogue(text, column) for text, column in ((chosen, layout.chosen), (rejected, layout.rejected))]
    else:
        dialogues = [
            _conversation(value, column) for value, column in ((chosen, layout.chosen), (rejected, layout.rejected))
        ]
    (*context, (role, better)), (*other, (other_role, worse)) = dialogues
    for column, last in ((layout.chosen, role), (layout.rejected, other_role)):
        if last != "assistant":
            raise Fault(column, "must end with the assistant's message")
    if context != other:
        raise Fault(layout.rejected, "must be the same conversation as chosen up to the last message")
    return _checked(Pair(_prompt(context, layout.chosen), better, worse), layout)


def _common_beginning(chosen: str, rejected: str, layout: Layout) -> Pair:
    """TRL's implicit prompt: what two texts share, up to the last space before they part."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    cut = chosen.rfind(" ", 0, shared + 1)
    if cut <= 0:
        raise Fault("prompt", "is missing, and chosen and rejected have no beginning in common")
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _scored_pairs(row: dict[str, Any], layout: Layout) -> Iterator[Pair]:
    assert layout.prompt is not None
    prompt = _prompt(_decoded(_present(row, layout.prompt)), layout.prompt)
    responses = _structure(_present(row, layout.responses))
    if not isinstance(responses, list) or len(responses) < 2:
        raise Fault(layout.responses, "expected a list of two responses or more")
    if layout.scores is not None:
        scores = _structure(_present(row, layout.scores))
        if not isinstance(scores, list) or len(scores) != len(responses):
            raise Fault(layout.scores, f"expected a list of {len(responses)} scores, one for each response")
    else:
        scores = [_field(response, SCORE, layout.responses, "a score") for response in responses]
    numbers = [_number(score, layout.scores or layout.responses) for score in scores]
    texts = [
        _text(_field(one, ANSWER, layout.responses, "a text") if isinstance(one, dict) else one, layout.responses)
        for one in responses
    ]
    best = max(range(len(numbers)), key=numbers.__getitem__)
    worse = [i for i in range(len(numbers)) if numbers[i] < numbers[best]]
    if not worse:
        raise Fault(layout.scores or layout.responses, "all responses have the same score: none is preferred")
    for i in worse:
        yield _checked(Pair(prompt, texts[best], texts[i]), layout)


def _named_pairs(row: dict[str, Any], layout: Layout, wanted: str | None) -> Iterator[Pair]:
    assert layout.prompt is not None
    prompt = _prompt(_decoded(_present(row, layout.prompt)), layout.prompt)
    responses = _structure(_present(row, layout.responses))
    if not isinstance(responses, dict) or len(responses) < 2:
        raise Fault(layout.responses, "expected an object of two named responses or more")
    if wanted not in responses:
        raise Fault(layout.responses, f"has no response named {wanted!r}")
    chosen = _text(responses[wanted], layout.responses)
    for name, text in responses.items():
        if name != wanted:
            yield _checked(Pair(prompt, chosen, _text(text, layout.responses)), layout)


def _checked(pair: Pair, layout: Layout) -> Pair:
    texts = [("chosen", layout.chosen, pair.chosen), ("rejected", layout.rejected, pair.rejected)]
    if layout.kind != "pairs":
        texts = [(role, layout.responses, text) for role, _, text in texts]
    for _, column, text in texts:
        if not text.strip():
            raise Fault(column, "is empty")
    if pair.chosen.strip() == pair.rejected.strip():
        raise Fault(texts[1][1], "is the same text as chosen; a pair must differ")
    prompt = pair.prompt.strip() if isinstance(pair.prompt, str) else pair.prompt
    return Pair(prompt, pair.chosen.strip(), pair.rejected.strip())


def _prompt(value: Any, column: str) -> Prompt:
    if not isinstance(value, list):
        text = _text(value, column)
        if not text.strip():
            raise Fault(column, "is empty")
        return text.strip()
    messages = value if value and isinstance(value[0], tuple) else _conversation(value, column)
    if not messages or messages[-1][0] != "user":
        raise Fault(column, "must end with the user's message")
    if not messages[-1][1].strip():
        raise Fault(column, "is empty")
    return _shortest(messages)


def _shortest(messages: Sequence[tuple[str, str]]) -> Prompt:
    """A conversation of one user's message is that message."""
    return messages[0][1].strip() if len(messages) == 1 and messages[0][0] == "user" else tuple(messages)


def _conversation(value: list, column: str) -> list[tuple[str, str]]:
    """Messages as [{"role", "content"}], or as [{"from", "value"}]."""
    messages = []
    for message in value:
        if not isinstance(message, dict):
            raise Fault(column, 'expected a text or a list of messages such as {"role": "user", "content": "…"}')
        role = ROLES.get(str(message.get("role", message.get("from"))))
        if role is None:
            raise Fault(column, "every message needs a role: user, assistant or system")
        messages.append((role, _text(message.get("content", message.get("value")), column)))
    if not messages:
        raise Fault(column, "is an empty conversation")
    return messages


def _dialogue(text: str, column: str) -> list[tuple[str, str]]:
    """Anthropic's HH form: turns that begin with "Human:" and "Assistant:" after an empty line."""
    _, *parts = _TURN.split(text.strip())
    turns = [
        ("user" if who == "Human" else "assistant", said.strip())
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]
    if not turns:
        raise Fault(column, 'expected a dialogue of "Human:" and "Assistant:" turns')
    return turns


def _present(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise Fault(column, "is missing")
    return row[column]


def _field(item: Any, names: Sequence[str], column: str, what: str) -> Any:
    if isinstance(item, dict):
        for name in names:
            if item.get(name) is not None:
                return item[name]
    raise Fault(column, f"expected {what} in every response ({', '.join(names)})")


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Fault(column, f"expected a number as score, found {str(value)[:40]!r}") from None
    if number != number:
        raise Fault(column, "a score is not a number")
    return number


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise Fault(column, f"expected text, found {type(value).__name__}")
    if "\0" in value:
        raise Fault(column, "holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Fault(column, f"is not UTF-8 text at character {error.start + 1}; save the file as UTF-8") from None
    return value


def _decoded(value: Any) -> Any:
    """A cell of a table may hold a conversation as JSON; any other text is meant as it stands."""
    structure = _structure(value)
    is_conversation = isinstance(structure, list) and structure and all(isinstance(item, dict) for item in structure)
    return structure if is_conversation else value


def _structure(value: Any) -> Any:
    """A cell of a table that must be a list or an object holds it as JSON."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value
