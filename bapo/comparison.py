"""One prompt under the base, DPO and BAPO: a stream of frames. Knows an engine, no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from bapo.adapters import Adapter, AdapterStore
from bapo.evaluation import BASE, Drift, PairLogps, mean_drift, reward_accuracy
from bapo.pair_layouts import Prompt
from bapo.pairs import Pair

if TYPE_CHECKING:  # another engine, a server say, will stand behind the same calls
    from bapo.inference.decoding import Sampling
    from bapo.inference.engine import LocalEngine, Piece

FRAME_SECONDS = 0.1  # a page gains nothing from more frames than this
TURN_STEPS = 8  # tokens of every row before the next visitor's turn: a short answer never waits for a long one
METHODS = ("dpo", "bapo")  # the policies compared with the base, in the order they are shown


@dataclass(slots=True)
class Answer:
    """What one policy has said so far. `logps` is the answer's log-prob under that policy, in nats."""

    name: str  # "base", "dpo" or "bapo"
    text: str = ""
    tokens: int = 0
    logps: float = 0.0
    seconds: float = 0.0
    done: bool = False

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class BaseToken:
    """A token of the base's answer with its log-prob (nats) under every policy, "base" among them."""

    text: str
    logps: dict[str, float]

    def change(self, method: str) -> float:
        """Log-prob under the adapter − under the base; below 0 the adapter finds the token less likely."""
        return self.logps[method] - self.logps[BASE]


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything a view shows at one moment.

    `ahead` counts the requests that must be answered first; answers begin when it is 0. `weights` says with
    which numbers the base's weights are decoded: "int16", "float32", …
    """

    preference: str
    base: str
    answers: tuple[Answer, ...] = ()
    base_tokens: tuple[BaseToken, ...] = ()
    ahead: int = 0
    seconds: float = 0.0
    done: bool = False
    weights: str = ""

    @property
    def methods(self) -> list[str]:
        return [answer.name for answer in self.answers if answer.name != BASE]

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers together."""
        return sum(answer.tokens for answer in self.answers) / self.seconds if self.seconds else 0.0

    def drift(self, method: str) -> Drift:
        """Drift of the base's answer so far."""
        nats = -sum(token.change(method) for token in self.base_tokens)
        return Drift(nats, nats / len(self.base_tokens) if self.base_tokens else 0.0)

    def logps_change(self, method: str) -> list[float]:
        """Cumulative log-prob change (nats) of the base's answer after each of its tokens: −drift."""
        return list(accumulate(token.change(method) for token in self.base_tokens))

    def as_dict(self) -> dict:
        return {
            "policies": [
                {
                    "name": answer.name,
                    "text": answer.text,
                    "tokens": answer.tokens,
                    "tokens_per_second": answer.tokens_per_second,
                    "logps": answer.logps,
                }
                for answer in self.answers
            ],
            "drift": {method: _drift_dict(self.drift(method)) for method in self.methods},
            "base": self.base,
            "weights": self.weights,
            "preference": self.preference,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(slots=True)
class _Run:
    """The state behind the frames of one comparison."""

    methods: list[str]
    answers: list[Answer] = field(default_factory=list)
    base_tokens: list[BaseToken] = field(default_factory=list)

    def advance(self, pieces: Sequence[Piece], seconds: float) -> None:
        count = len(self.answers)  # the rows behind the answers follow the base, one per method
        following = {self.methods[piece.row - count]: piece.logp for piece in pieces if piece.row >= count}
        for piece in pieces:
            if piece.row >= count:
                continue
            answer = self.answers[piece.row]
            answer.text += piece.text
            answer.tokens += 1
            answer.logps += piece.logp
            answer.seconds = seconds
            answer.done = piece.last
            if answer.name == BASE:
                self.base_tokens.append(BaseToken(piece.text, {BASE: piece.logp, **following}))


def compare(
    engine: LocalEngine, prompt: str, preference: str, sampling: Sampling, store: AdapterStore | None = None
) -> Iterator[Frame]:
    """Stream frames until every policy has answered; close the iterator to stop at once.

    The adapters come from `store`, the engine's own where it is not given. Raises `BapoError` where the
    prompt or the preference cannot be used.
    """
    engine.check(prompt, sampling)
    found = (store or engine.store).for_preference(preference)
    methods = [method for method in METHODS if method in found]
    frame = Frame(preference, engine.base_name, weights=engine.decoding_weights)
    with engine.turns.ticket() as ticket:
        while not ticket.wait(0.5):
            yield replace(frame, ahead=ticket.ahead)
        yield frame  # a long prompt takes a while: say that it is being worked on, so that it can be stopped
        run = _Run(methods, [Answer(name) for name in (BASE, *methods)])
        adapters: list[Adapter | None] = [None, *(found[method] for method in methods)]
        # The last rows are fed the base's tokens under each adapter: their log-probs are the drift.
        adapters += [found[method] for method in methods]
        follows = [None] * len(run.answers) + [0] * len(methods)
        start = time.monotonic()
        shown = -FRAME_SECONDS  # the first token is shown at once
        for step, pieces in enumerate(engine.decode(prompt, adapters, follows, sampling), start=1):
            seconds = time.monotonic() - start
            run.advance(pieces, seconds)
            frame = _frame(frame, run, seconds)
            if seconds - shown >= FRAME_SECONDS:
                shown = seconds
                yield frame
            if step % TURN_STEPS == 0 and ticket.pass_on():
                while not ticket.wait(0.5):
                    yield frame  # nothing new, but a moment to be stopped in
    yield _frame(frame, run, time.monotonic() - start, done=True)


def _frame(frame: Frame, run: _Run, seconds: float, done: bool = False) -> Frame:
    answers = tuple(replace(answer) for answer in run.answers)  # copies: a frame does not change once it is shown
    return replace(frame, answers=answers, base_tokens=tuple(run.base_tokens), seconds=seconds, done=done)


def score_pairs(
    engine: LocalEngine,
    pairs: Sequence[Pair],
    preference: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
    store: AdapterStore | None = None,
) -> dict:
    """Log-probs of chosen, rejected and base response of every pair under base, DPO and BAPO.

    Returns a JSON-ready dict: `pairs` (one entry each), `reward_accuracy` over pairs and `drift`
    averaged over prompts, both by method, and `base` and `preference`. The adapters come from `store`, the
    engine's own where it is not given.
    """
    found = (store or engine.store).for_preference(preference)
    methods = [method for method in METHODS if method in found]
    policies = [BASE, *methods]
    adapters = [None, *(found[method] for method in methods)]
    by_prompt: dict[Prompt, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    with engine.turns.ticket() as ticket:
        ticket.wait()
        answers = engine.base_responses(list(by_prompt), progress)
        scored: dict[Pair, PairLogps] = {}
        for done, (prompt, own) in enumerate(by_prompt.items(), start=1):
            texts = list(dict.fromkeys(text for pair in own for text in (pair.chosen, pair.rejected)))
            responses = [engine.base.encode_response(prompt, text) for text in texts]
            rows = engine.score(prompt, [*responses, answers[prompt].token_ids], adapters)
            logps = {
                text: {policy: row[i] for policy, row in zip(policies, rows, strict=True)}
                for i, text in enumerate(texts)
            }
            base_response = {policy: row[-1] for policy, row in zip(policies, rows, strict=True)}
            for pair in own:
                scored[pair] = PairLogps(
                    prompt, logps[pair.chosen], logps[pair.rejected], base_response, len(answers[prompt].token_ids)
                )
            progress(done, len(by_prompt))
            if ticket.pass_on():
                ticket.wait()
    every = [scored[pair] for pair in pairs]
    return {
        "base": engine.base_name,
        "preference": preference,
        "reward_accuracy": {method: reward_accuracy(every, method) for method in methods},
        "drift": {method: _drift_dict(mean_drift(every, method)) for method in methods},
        "pairs": [
            {
                "prompt": pair.prompt,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "base_response": pair.base_response,
                "base_response_text": answers[pair.prompt].text,
                "base_response_tokens": pair.base_tokens,
                # A base response cut at the token limit has no end-of-turn token.
                "base_response_complete": answers[pair.prompt].complete,
            }
            for pair in every
        ],
    }


def _drift_dict(drift: Drift) -> dict[str, float]:
    return {"nats": drift.nats, "per_token": drift.per_token}
