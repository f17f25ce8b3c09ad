"""The local engine: one base in this process, asked for two things, rows decoded and responses scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tokenizers.decoders import DecodeStream

from bapo.adapters import Adapter, AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import Base, load_base
from bapo.inference.base_responses import BaseResponse, base_responses
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.policies import Policies
from bapo.inference.scoring import response_logps
from bapo.inference.turns import Turns
from bapo.settings import Settings


@dataclass(frozen=True, slots=True)
class Piece:
    """What one row of a stream did in one step: its token's text and log-prob (nats).

    `text` is empty while a character is not complete, and for the end-of-turn token.
    """

    row: int
    text: str
    logp: float
    last: bool


class LocalEngine:
    """Answers and scores with a base loaded here. Whoever uses it first waits in `turns`."""

    def __init__(self, base: Base, store: AdapterStore, settings: Settings):
        self.base = base
        self.store = store
        self.settings = settings
        self.turns = Turns()
        self._policies = Policies(base, settings.resident_adapters)

    @classmethod
    def load(cls, settings: Settings) -> "LocalEngine":
        base = load_base(settings)
        return cls(base, AdapterStore(settings.adapters, base.name, base.fingerprint), settings)

    @property
    def base_name(self) -> str:
        return self.base.name

    @property
    def resident_adapters(self) -> list[str]:
        """Names of the adapters in memory."""
        return self._policies.resident

    def check_prompt(self, prompt: str) -> None:
        """Raise a `BapoError` where the prompt is empty or too long."""
        if not prompt.strip():
            raise BapoError("The prompt is empty. Type a question or an instruction first.")
        limit = self.settings.max_prompt_tokens
        # A token is at least one byte, most are several: no need to tokenise a book to refuse it.
        count = len(self.base.encode_prompt(prompt)) if len(prompt) < 20 * limit else None
        if count is None or count > limit:
            size = f"{count} tokens" if count else f"{len(prompt):,} characters"
            raise BapoError(f"The prompt is too long: {size}, at most {limit} tokens fit. Shorten it.")

    def decode(
        self, prompt: str, adapters: Sequence[Adapter | None], follows: Sequence[int | None], sampling: Sampling
    ) -> Iterator[list[Piece]]:
        """Stream one row per entry of `adapters` (None is the base); see `bapo.inference.decoding`."""
        self._policies.require(adapter for adapter in adapters if adapter)
        rows = [
            Row(adapter.name if adapter else None, leader) for adapter, leader in zip(adapters, follows, strict=True)
        ]
        streams = [DecodeStream(skip_special_tokens=True) for _ in rows]
        tokenizer = self.base.tokenizer._tokenizer  # the Rust tokenizer, which DecodeStream asks for
        for step in decode(self._policies, self.base.encode_prompt(prompt), rows, sampling):
            yield [
                Piece(token.row, streams[token.row].step(tokenizer, token.token_id) or "", token.logp, token.last)
                for token in step
            ]

    def score(
        self, prompt: str, responses: Sequence[list[int]], adapters: Sequence[Adapter | None]
    ) -> list[list[float]]:
        """Log-probs (nats, summed) of tokenised responses: one list per adapter, None is the base."""
        self._policies.require(adapter for adapter in adapters if adapter)
        prompt_ids = self.base.encode_prompt(prompt)
        scores = []
        for adapter in adapters:
            forward = partial(self._policies.forward, [adapter.name if adapter else None])
            scores.append(response_logps(forward, self.base.head, prompt_ids, responses).tolist())
        return scores

    def base_responses(
        self, prompts: Sequence[str], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, BaseResponse]:
        """y_b of every prompt; generated once, then from the disk."""
        with self._policies.base_alone() as base:
            return base_responses(base, prompts, self.settings.cache, progress=progress)
