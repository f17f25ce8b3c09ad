"""The local engine: one base in this process, asked for two things, rows decoded and responses scored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bapo.adapters import AdapterStore
from bapo.errors import BapoError
from bapo.inference.base import Base, load_base
from bapo.inference.base_responses import BaseResponse, base_responses
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.detokenizer import Detokenizer
from bapo.inference.model_thread import in_model_thread, iterate_in_model_thread
from bapo.inference.policies import Policies, Policy
from bapo.inference.scoring import policy_logps
from bapo.inference.turns import Turns
from bapo.pair_layouts import Prompt
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
    """Answers and scores with a base loaded here, in the thread of models. Whoever uses it first waits in `turns`."""

    def __init__(self, base: Base, store: AdapterStore, settings: Settings):
        self.base = base
        self.store = store
        self.settings = settings
        self.turns = Turns()
        self._policies = in_model_thread(
            Policies, base, settings.adapter_memory_mb * 10**6, settings.cache, settings.exact
        )

    @classmethod
    def load(cls, settings: Settings) -> "LocalEngine":
        base = in_model_thread(load_base, settings)
        return cls(base, AdapterStore(settings.adapters, base.name, base.fingerprint), settings)

    @property
    def base_name(self) -> str:
        return self.base.name

    @property
    def decoding_weights(self) -> str:
        """With which numbers the base's weights are decoded: "int16", "float32", "nf4", …"""
        return "int16" if self._policies.compact else self.base.numerics

    @property
    def resident_adapters(self) -> list[str]:
        """Names of the adapters in memory."""
        return self._policies.resident

    def check(self, prompt: str, sampling: Sampling) -> None:
        """Raise a `BapoError` where the prompt is empty, or prompt or answer would be too long."""
        if not prompt.strip():
            raise BapoError("The prompt is empty. Type a question or an instruction first.")
        if sampling.max_new_tokens > self.settings.max_new_tokens:
            raise BapoError(
                f"An answer of {sampling.max_new_tokens} tokens is too long: at most {self.settings.max_new_tokens} "
                "are allowed here (BAPO_MAX_NEW_TOKENS)."
            )
        context = getattr(self.base.model.config, "max_position_embeddings", None)
        limit = self.settings.max_prompt_tokens
        if context is not None:
            limit = min(limit, context - sampling.max_new_tokens)
        # A token is at least one byte, most are several: no need to tokenise a book to refuse it.
        count = len(self.base.encode_prompt(prompt)) if len(prompt) < 20 * limit else None
        if count is None or count > limit:
            size = f"{count} tokens" if count else f"{len(prompt):,} characters"
            raise BapoError(f"The prompt is too long: {size}, at most {limit} tokens fit. Shorten it.")

    def decode(
        self, prompt: str, policies: Sequence[Policy], follows: Sequence[int | None], sampling: Sampling
    ) -> Iterator[list[Piece]]:
        """Stream one row per policy; see `bapo.inference.decoding`. Others may use the engine between two steps."""
        rows = [Row(policy, leader) for policy, leader in zip(policies, follows, strict=True)]
        texts = [Detokenizer(self.base.tokenizer) for _ in rows]
        for step in iterate_in_model_thread(decode(self._policies, self.base.encode_prompt(prompt), rows, sampling)):
            yield [
                Piece(token.row, texts[token.row].push(token.token_id, token.last), token.logp, token.last)
                for token in step
            ]

    def score(self, prompt: Prompt, responses: Sequence[list[int]], policies: Sequence[Policy]) -> list[list[float]]:
        """Log-probs (nats, summed) of tokenised responses: one list per policy. All in one pass, in exact weights."""
        ids = self.base.encode_prompt(prompt)
        return in_model_thread(policy_logps, self._policies, policies, ids, responses).tolist()

    def base_responses(
        self, prompts: Sequence[Prompt], progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[Prompt, BaseResponse]:
        """y_b of every prompt; generated once, then from the disk."""
        return in_model_thread(base_responses, self.base, prompts, self.settings.cache, progress=progress)
