"""Base responses and reference log-probs per prompt, against the way they are usually got. Run by hand, alone:

    python -m benchmarks.preparation FILE

FILE holds prompts with several responses (JSON lines: `prompt`, `responses`). The usual way: `generate`
one prompt at a time, then one forward pass per pair, both sequences padded. Ours: batches of prompts,
then one packed pass a prompt. Both sides take the same prompts, in turn; medians per prompt are printed,
with the tokens that each side computed.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bapo.inference.base import EMBEDDED, Base, load_base
from bapo.inference.base_responses import MAX_TOKENS
from bapo.inference.greedy_batch import ROWS
from bapo.pairs import Pair
from bapo.settings import Settings
from bapo.training.rows import prepare_rows

ROUNDS = 3


def spread(file: Path, count: int) -> list[dict]:
    """So many lines of a JSON lines file, from all over it: the first ones may be longer than most."""
    lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // count][:count]]


class Side:
    """A way to prepare pairs, with a base of its own and what it took so far: (seconds, tokens) a prompt."""

    def __init__(self, prepare: Callable[[Base, list[Pair]], None]):
        self.prepare, self.base = prepare, load_base(Settings(base=EMBEDDED))
        self.found: list[tuple[float, int]] = []
        self._counts: list[int] = []  # positions that were embedded, padding included
        # The model's twin, with which base responses are made, is copied from it with this hook.
        embedding = self.base.model.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, inputs: self._counts.append(inputs[0].numel()))

    def take(self, pairs: list[Pair], prompts: int) -> str:
        self._counts.clear()
        start = time.perf_counter()
        self.prepare(self.base, pairs)
        self.found.append(((time.perf_counter() - start) / prompts, sum(self._counts) // prompts))
        return self.shown(*self.found[-1])

    @staticmethod
    def shown(seconds: float, tokens: float) -> str:
        return f"{seconds:6.2f} s and {tokens:5.0f} tokens a prompt"


def usual(base: Base, pairs: list[Pair]) -> None:
    base.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        for prompt in dict.fromkeys(pair.prompt for pair in pairs):
            ids = torch.tensor([base.encode_prompt(prompt)])
            answer = base.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
                eos_token_id=sorted(base.stop_ids), pad_token_id=base.end_of_turn,
            )  # fmt: skip
            log_probs(base, [answer[0].tolist()], ids.shape[1])
        for pair in pairs:
            prompt_ids = base.encode_prompt(pair.prompt)
            rows = [prompt_ids + base.encode_response(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
            log_probs(base, rows, len(prompt_ids))


def log_probs(base: Base, rows: list[list[int]], start: int) -> torch.Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logps = base.model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1].log_softmax(-1)
    return (logps.gather(2, ids[:, start:, None]).squeeze(2) * mask[:, start:]).sum(1)


def ours(base: Base, pairs: list[Pair]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        prepare_rows(base, pairs, [], 512, Path(cache))


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    lines = spread(Path(sys.argv[1]), ROUNDS * ROWS)
    sides = {"batches, a packed pass a prompt": Side(ours), "generate one by one, a pass a pair": Side(usual)}
    for number in range(ROUNDS):
        prompts = lines[number * ROWS : (number + 1) * ROWS]
        pairs = [
            Pair(item["prompt"], item["responses"]["literature"], text)
            for item in prompts
            for name, text in item["responses"].items()
            if name != "literature"
        ]
        print(f"round {number + 1}: {len(prompts)} prompts, {len(pairs)} pairs", flush=True)
        for title, side in sides.items():
            print(f"    {title:36} {side.take(pairs, len(prompts))}", flush=True)
    print(f"medians of {ROUNDS} rounds")
    for title, side in sides.items():
        print(f"    {title:36} {side.shown(*map(statistics.median, zip(*side.found, strict=True)))}")
    own, theirs = (side.found for side in sides.values())
    ratios = [other[0] / one[0] for one, other in zip(own, theirs, strict=True)]
    rounds = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"    {'ratio':36} {statistics.median(ratios):6.2f} ×  rounds: {rounds}")


if __name__ == "__main__":
    main()
