"""What is computed once before training: base responses, token ids and log-probs under the base."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bapo.disk_cache import DiskCache
from bapo.inference.base import Base
from bapo.inference.base_responses import base_responses
from bapo.inference.scoring import response_logps
from bapo.pair_layouts import Prompt
from bapo.pairs import Pair

Tell = Callable[[str, int, int], None]


class Rows(NamedTuple):
    """The trainer's rows, one per pair in the order given (then one per anchor-only prompt), and how many
    responses were cut at the token limit."""

    rows: list[dict]
    cut: int


def prepare_rows(
    base: Base,
    pairs: Sequence[Pair],
    anchor_prompts: Sequence[str],
    max_response_tokens: int,
    cache: Path,
    tell: Tell = lambda phase, done, total: None,
) -> Rows:
    """Token ids and reference log-probs of every pair: the columns that `BAPOTrainer` asks for.

    Base responses and log-probs are kept on the disk by base, numerics and text, so that another
    method or another λ on the same pairs starts at once. `tell` hears (phase, done, total).
    """
    by_prompt: dict[Prompt, list[Pair]] = {prompt: [] for prompt in anchor_prompts}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    answers = base_responses(base, list(by_prompt), cache, progress=lambda *at: tell("base responses", *at))
    known = DiskCache(cache / "reference-logps" / base.cache_key)
    ids: dict[tuple[Prompt, str], list[int]] = {}
    logps: dict[tuple[Prompt, str], float] = {}
    cut = 0
    for done, (prompt, own) in enumerate(by_prompt.items(), start=1):
        texts = list(dict.fromkeys(text for pair in own for text in (pair.chosen, pair.rejected)))
        whole = [base.encode_response(prompt, text) for text in texts]
        cut += sum(len(response) > max_response_tokens for response in whole)
        responses = [*(response[:max_response_tokens] for response in whole), answers[prompt].token_ids]
        prompt_ids = base.encode_prompt(prompt)
        own_key = [prompt_ids, answers[prompt].token_ids]
        if answers[prompt].logp is not None and own_key not in known:
            known[own_key] = answers[prompt].logp
        for text, response, logp in zip(
            [*texts, ""], responses, _known_logps(base, prompt_ids, responses, known), strict=True
        ):
            ids[prompt, text], logps[prompt, text] = response, logp  # "" stands for y_b
        tell("reference", done, len(by_prompt))

    def row(prompt: Prompt, chosen: str, rejected: str) -> dict:
        roles = {"chosen": chosen, "rejected": rejected, "base": ""}
        return {
            "prompt_ids": base.encode_prompt(prompt),
            **{f"{role}_ids": ids[prompt, text] for role, text in roles.items()},
            **{f"ref_{role}_logps": logps[prompt, text] for role, text in roles.items()},
        }

    rows = [row(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    return Rows([*rows, *(row(prompt, "", "") for prompt in anchor_prompts)], cut)


def _known_logps(base: Base, prompt_ids: list[int], responses: list[list[int]], known: DiskCache) -> list[float]:
    """Log-probs of responses under the base: those that are new in one pass, the others from the disk."""
    keys = [[prompt_ids, response] for response in responses]
    missing = [response for key, response in zip(keys, responses, strict=True) if key not in known]
    if missing:
        scored = response_logps(base.model, base.model, prompt_ids, missing).tolist()
        for response, logp in zip(missing, scored, strict=True):
            known[[prompt_ids, response]] = logp
    return [known[key] for key in keys]
