"""The base responses y_b: what the untouched base answers, greedily, once per prompt and never again."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bapo.disk_cache import DiskCache
from bapo.inference.base import Base
from bapo.inference.greedy_batch import GreedyBatch
from bapo.pair_layouts import Prompt

MAX_TOKENS = 128  # a small base may never end its answer; what it says later says little more
BATCH = 16  # where `generate` answers


@dataclass(frozen=True, slots=True)
class BaseResponse:
    """A greedy answer. `complete` is false where it was cut at the limit and so has no end-of-turn token.

    `logp` is its log-prob in nats, where that came with the answer.
    """

    token_ids: list[int]
    text: str
    complete: bool
    logp: float | None = None


def base_responses(
    base: Base,
    prompts: Sequence[Prompt],
    cache: Path,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[Prompt, BaseResponse]:
    """The base response of every prompt, from the disk where it was generated before.

    The cache is keyed by the base and its numerics, the token limit and the prompt. `progress` is told
    (prompts done, prompts in all). `base.model` must answer as the base: no adapter may be active.
    """
    known = DiskCache(cache / "base-responses" / base.cache_key)
    keys = {prompt: [prompt, max_tokens] for prompt in prompts}
    ids = {prompt: base.encode_prompt(prompt) for prompt, key in keys.items() if key not in known}
    missing = sorted(ids, key=lambda prompt: len(ids[prompt]))  # alike lengths share a batch: little is padded
    done = len(keys) - len(missing)
    progress(done, len(keys))
    together = GreedyBatch.of(base.model, len(ids[missing[-1]]) + max_tokens, cache) if missing else None
    while missing:
        size = together.fitting([len(ids[prompt]) for prompt in missing], max_tokens) if together else BATCH
        batch, missing = missing[:size], missing[size:]
        if together:
            found = together.answers([ids[prompt] for prompt in batch], max_tokens, base.stop_ids)
            answers = [_response(base, answer.token_ids, answer.logp) for answer in found]
        else:
            answers = greedy_responses(base, batch, max_tokens)
        for prompt, response in zip(batch, answers, strict=True):
            known[keys[prompt]] = asdict(response)
        done += len(batch)
        progress(done, len(keys))
    return {prompt: BaseResponse(**known[key]) for prompt, key in keys.items()}


@torch.inference_mode()
def greedy_responses(base: Base, prompts: Sequence[Prompt], max_tokens: int) -> list[BaseResponse]:
    """Greedy answers to prompts in one batch, from whatever policy `base.model` is at the moment."""
    encoded = [base.encode_prompt(prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = base.end_of_turn
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in encoded], device=base.model.device)
    # By length, not by token: the pad token may be the end-of-turn token, which prompts contain.
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in encoded], device=base.model.device)
    output = base.model.generate(
        input_ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=sorted(base.stop_ids),
        pad_token_id=pad,
        # Whatever the model's own generation_config says: y_b is the plain argmax.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
    )
    return [_response(base, row) for row in output[:, width:].tolist()]


def _response(base: Base, token_ids: list[int], logp: float | None = None) -> BaseResponse:
    end = next((i for i, token in enumerate(token_ids) if token in base.stop_ids), None)
    if end is not None:
        token_ids = token_ids[: end + 1]
    return BaseResponse(token_ids, base.tokenizer.decode(token_ids, skip_special_tokens=True), end is not None, logp)
