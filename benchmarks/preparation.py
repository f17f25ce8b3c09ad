"""Base responses and reference log-probs per prompt, against the way they are usually got. Run by hand, alone:

    python -m benchmarks.preparation FILE

FILE holds prompts with several responses (JSON lines: `prompt`, `responses`). The usual way: `generate`
one prompt at a time, then one forward pass per pair, both sequences padded. Ours: batches of prompts,
then one packed pass a prompt. Both sides take the same prompts, in turn; medians per prompt are printed.
"""

import json
import statistics
import sys
import tempfile
import time
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


def usual(base: Base, pairs: list[Pair]) -> tuple[float, int]:
    """(seconds, tokens computed)."""
    start, tokens = time.perf_counter(), 0
    base.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        for prompt in dict.fromkeys(pair.prompt for pair in pairs):
            ids = torch.tensor([base.encode_prompt(prompt)])
            answer = base.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
                eos_token_id=sorted(base.stop_ids), pad_token_id=base.end_of_turn,
            )  # fmt: skip
            tokens += answer.shape[1]
            log_probs(base, [answer[0].tolist()], ids.shape[1])
            tokens += answer.shape[1]
        for pair in pairs:
            prompt_ids = base.encode_prompt(pair.prompt)
            rows = [prompt_ids + base.encode_response(pair.prompt, text) for text in (pair.chosen, pair.rejected)]
            log_probs(base, rows, len(prompt_ids))
            tokens += 2 * max(map(len, rows))
    return time.perf_counter() - start, tokens


def log_probs(base: Base, rows: list[list[int]], start: int) -> torch.Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logps = base.model(input_ids=ids, attention_mask=mask).logits[:, start - 1 : -1].log_softmax(-1)
    return (logps.gather(2, ids[:, start:, None]).squeeze(2) * mask[:, start:]).sum(1)


def ours(base: Base, pairs: list[Pair]) -> float:
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        prepare_rows(base, pairs, [], 512, Path(cache))
        return time.perf_counter() - start


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    lines = spread(Path(sys.argv[1]), ROUNDS * ROWS)
    theirs_base, our_base = load_base(Settings(base=EMBEDDED)), load_base(Settings(base=EMBEDDED))
    seconds: dict[str, list[float]] = {"usual": [], "ours": []}
    for number in range(ROUNDS):
        prompts = lines[number * ROWS : (number + 1) * ROWS]
        pairs = [
            Pair(item["prompt"], item["responses"]["literature"], text)
            for item in prompts
            for name, text in item["responses"].items()
            if name != "literature"
        ]
        seconds["ours"].append(ours(our_base, pairs) / len(prompts))
        took, tokens = usual(theirs_base, pairs)
        seconds["usual"].append(took / len(prompts))
        print(f"round {number + 1}: usual {took:.0f} s for {len(prompts)} prompts, {len(pairs)} pairs, {tokens} tokens")
    usual_median, our_median = (statistics.median(seconds[name]) for name in ("usual", "ours"))
    print(f"generate one by one, a pass a pair   {usual_median:6.2f} s a prompt")
    print(f"batches, a packed pass a prompt      {our_median:6.2f} s a prompt")
    print(f"ratio                                {usual_median / our_median:6.2f} ×")


if __name__ == "__main__":
    main()
