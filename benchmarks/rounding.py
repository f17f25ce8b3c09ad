"""What decoding with 16-bit integers changes: per-token log-probs of strangers' responses, and drift. Run by hand:

    python -m benchmarks.rounding PAIRS

PAIRS is a file of preference pairs. Chosen responses and base responses are fed token by token, as
decoding does it, once with the weights as they are and once with the rounded ones.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bapo.adapters import AdapterStore
from bapo.inference.base import load_base
from bapo.inference.base_responses import base_responses
from bapo.inference.policies import Policies, Policy
from bapo.pairs import usable_pairs
from bapo.settings import Settings

PROMPTS = 8
TOKENS = 64


@torch.inference_mode()
def forced_logps(
    policies: Policies, chosen: list[Policy], prompt_ids: list[int], token_ids: list[int], exact: bool
) -> Tensor:
    """Log-probs (nats) of given tokens under each policy: [policies, tokens]."""
    rows, logits, cache = policies.prefill(chosen, prompt_ids, len(token_ids))
    logps = []
    for token in token_ids:
        logps.append(logits.log_softmax(-1)[:, token])
        logits = policies.step(rows, exact, torch.full((len(chosen),), token), cache)
    return torch.stack(logps, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--preference", default="literature")
    arguments = parser.parse_args()
    settings = Settings.from_environment()
    base = load_base(settings)
    policies = Policies(base, 2**30, settings.cache)
    found = AdapterStore(settings.adapters, base.name, base.fingerprint).for_preference(arguments.preference)
    rows: list[Policy] = [None, *found.values()]
    by_prompt = {pair.prompt: pair.chosen for pair in usable_pairs(arguments.pairs)}
    prompts = list(by_prompt)[:PROMPTS]
    answers = base_responses(base, prompts, settings.cache)
    changes, drifts = [], {True: torch.zeros(len(found)), False: torch.zeros(len(found))}
    for prompt in tqdm(prompts, leave=False):
        ids = base.encode_prompt(prompt)
        given = base.encode_response(prompt, by_prompt[prompt])[:TOKENS]
        exact, rounded = (forced_logps(policies, rows, ids, given, exact) for exact in (True, False))
        changes.append((exact - rounded).abs())
        for exact_weights, drift in drifts.items():
            logps = forced_logps(policies, rows, ids, answers[prompt].token_ids[:TOKENS], exact_weights).sum(1)
            drift += logps[0] - logps[1:]
    change = torch.cat(changes, 1)
    path = "16-bit integers" if policies.compact else "no rounded weights: every product was faster without"
    print(f"{path}; {len(prompts)} prompts, {change.shape[1]} tokens under {len(rows)} policies")
    print(f"per-token log-probs change by {change.mean():.5f} nats on average, {change.max():.4f} at most (aim 0.02)")
    for place, name in enumerate(found):
        before, after = (drifts[exact][place].item() / len(prompts) for exact in (True, False))
        print(f"{name} drift {before:+.3f} → {after:+.3f} nats a prompt: {abs(after / before - 1):.2%} (aim 3 %)")


if __name__ == "__main__":
    main()
