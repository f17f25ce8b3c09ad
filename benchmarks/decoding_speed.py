"""Decoding base, DPO and BAPO side by side, against the usual ways. Run by hand, alone on the machine:

    python -m benchmarks.decoding_speed

Five prompts, 96 tokens, greedy, no early end; every prompt is answered by every side in turn, by our own, which are
quick, three times, so that whatever else slows the machine slows them all. Printed are medians. What a policy makes
of the chat template's opening is kept from one prompt to the next; a swapped adapter's comes from the disk as the
adapter does.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bapo.adapters import Adapter, AdapterStore
from bapo.inference.base import Base, load_base
from bapo.inference.decoding import Row, Sampling, decode
from bapo.inference.policies import Policies
from bapo.settings import Settings

PROMPTS = (
    "Why do leaves change colour in autumn?",
    "Plan a rainy Sunday for two people.",
    "How does a vaccine work?",
    "Write a note to a colleague who is leaving.",
    "What should I know before I rent a flat?",
)
TOKENS = 96
SWAPS = 9
RESIDENT = 20
MEGABYTE = 10**6


def in_turn(model: PeftModel, adapters: list[Adapter], ids: list[int], tokens: int) -> float:
    """Seconds for three answers one after the other, by switching the adapter."""
    start = time.perf_counter()
    with model.disable_adapter():
        _generate(model, [ids], tokens)
    for adapter in adapters:
        model.set_adapter(adapter.key)
        _generate(model, [ids], tokens)
    return time.perf_counter() - start


def peft_mixed(model: PeftModel, adapters: list[Adapter], ids: list[int], tokens: int) -> float:
    """Seconds for three answers in one batch of PEFT's."""
    start = time.perf_counter()
    _generate(model, [ids] * 3, tokens, adapter_names=["__base__", *(adapter.key for adapter in adapters)])
    return time.perf_counter() - start


@torch.inference_mode()
def _generate(model: PeftModel, rows: list[list[int]], tokens: int, **arguments) -> None:
    prompt = torch.tensor(rows)
    model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens,
        min_new_tokens=tokens, pad_token_id=0, **arguments,
    )  # fmt: skip


def ours(policies: Policies, rows: list[Row], ids: list[int], tokens: int, exact: bool = False) -> tuple[float, float]:
    """(seconds to the first token of all rows, seconds to the last)."""
    start = time.perf_counter()
    stream = decode(policies, ids, rows, Sampling(max_new_tokens=tokens), exact)
    next(stream)
    first = time.perf_counter() - start
    for _ in stream:
        pass
    return first, time.perf_counter() - start


def swap(policies: Policies, adapters: list[Adapter], ids: list[int]) -> tuple[float, float]:
    """Seconds to the first token with the adapters on the disk, and with them in memory."""
    rows = [Row(None), *map(Row, adapters)]
    policies.memory = 0
    policies.require([])  # nobody's: all leave
    policies.openings._held.clear()
    cold, _ = ours(policies, rows, ids, 1)
    policies.memory = 2**30
    ours(policies, rows, ids, 1)
    warm, _ = ours(policies, rows, ids, 1)
    return cold, warm


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes a second, read and written, that a large tensor is copied with."""
    start = time.perf_counter()
    target.copy_(source)
    return 2 * source.nbytes / (time.perf_counter() - start)


def weight_bytes(base: Base, per_weight: int) -> int:
    """Bytes of weights that one decoding step reads: every matrix, the embedding as the vocabulary projection."""
    return per_weight * sum(weight.numel() for weight in set(base.model.parameters()) if weight.dim() == 2)


def resident_megabytes(adapters: int) -> float:
    """Peak memory of a process that answers once with so many adapters in memory."""
    command = [sys.executable, "-m", "benchmarks.decoding_speed", "--resident", str(adapters)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_resident(settings: Settings, count: int) -> None:
    base = load_base(settings)
    adapters = AdapterStore(settings.adapters, base.name, base.fingerprint).adapters()
    # Copies under other folders' keys: as many adapters as asked for, of the size of ours.
    copies = [replace(adapters[i % len(adapters)], written=-i) for i in range(count)]
    policies = Policies(base, 2**31, settings.cache)
    for copy in copies:
        loaded = policies._load(copy)
        policies._resident[f"{copy.key}-{copy.written}"] = copy, loaded
    ours(policies, [Row(None)] * 3, base.encode_prompt(PROMPTS[0]), 4)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / MEGABYTE)


def report(what: str, us: str, them: str, ratio: float, asked: str) -> None:
    print(f"{what:<52} {us:>16}  {them:>22}  {ratio:6.2f} ×  (aim {asked})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--resident", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--preference", default="literature")
    arguments = parser.parse_args()
    settings = Settings.from_environment()
    if arguments.resident is not None:
        return print_resident(settings, arguments.resident)

    base = load_base(settings)
    found = AdapterStore(settings.adapters, base.name, base.fingerprint).for_preference(arguments.preference)
    adapters = [found["dpo"], found["bapo"]]
    plain = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    peer = PeftModel.from_pretrained(plain, adapters[0].folder, adapter_name=adapters[0].key)
    peer.load_adapter(adapters[1].folder, adapter_name=adapters[1].key, torch_device="cpu")
    peer.eval()
    policies = Policies(base, 2**30, settings.cache)
    base.stop_ids = frozenset()
    three = [Row(None), *map(Row, adapters)]
    five = [*three, *(Row(adapter, 0) for adapter in adapters)]
    sides: dict[str, Callable[[list[int]], tuple[float, float]]] = {
        "in turn": lambda ids: (in_turn(peer, adapters, ids, 1), in_turn(peer, adapters, ids, TOKENS)),
        "PEFT mixed": lambda ids: (0.0, peft_mixed(peer, adapters, ids, TOKENS)),
        "float32, 3 rows": lambda ids: ours(policies, three, ids, TOKENS, exact=True),
        "compact, 3 rows": lambda ids: ours(policies, three, ids, TOKENS),
        "compact, 5 rows": lambda ids: ours(policies, five, ids, TOKENS),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    quick = [name for name in sides if "rows" in name]  # two seconds each, which other processes can spoil
    copies: list[float] = []
    source, target = torch.ones(2, 256 * MEGABYTE // 4)
    for prompt in PROMPTS:
        ids = base.encode_prompt(prompt)
        for name in [*sides, *quick, *quick]:
            seconds[name].append(sides[name](ids))
            copies.append(copy_rate(source, target))
        print(f"{prompt}  " + "  ".join(f"{name} {seconds[name][-1][1]:.1f} s" for name in sides), file=sys.stderr)
    first = {name: statistics.median(one[0] for one in times) for name, times in seconds.items()}
    last = {name: statistics.median(one[1] for one in times) for name, times in seconds.items()}

    def rate(name: str, rows: int = 3) -> float:
        return rows * TOKENS / last[name]

    def speed(what: str, side: str, other: str, aim: str) -> None:
        report(what, f"{rate(side):.1f} tok/s", f"{other} {rate(other):.1f} tok/s", last[other] / last[side], aim)

    speed("three answers, float32", "float32, 3 rows", "in turn", "3.5")
    speed("three answers, 16-bit integers", "compact, 3 rows", "in turn", "5")
    speed("three answers, float32, against PEFT's mixed batch", "float32, 3 rows", "PEFT mixed", "3")
    slower = last["compact, 5 rows"] / last["compact, 3 rows"]
    report("five rows (live drift) against three, time", f"{last['compact, 5 rows']:.2f} s",
           f"three rows {last['compact, 3 rows']:.2f} s", slower, "at most 1.15")  # fmt: skip
    print(f"five rows, all tokens: {rate('compact, 5 rows', 5):.1f} tok/s")
    report("first token of all three", f"{first['compact, 3 rows'] * 1e3:.0f} ms",
           f"in turn {first['in turn'] * 1e3:.0f} ms", first["in turn"] / first["compact, 3 rows"], "2")  # fmt: skip
    ids = base.encode_prompt(PROMPTS[0])
    cold, warm = (
        statistics.median(times) for times in zip(*(swap(policies, adapters, ids) for _ in range(SWAPS)), strict=True)
    )
    print(f"preference swapped, disk → first token: {cold * 1e3:.0f} ms, from memory {warm * 1e3:.0f} ms: "
          f"{(cold - warm) * 1e3:+.0f} ms (aim at most 150)")  # fmt: skip
    bandwidth = statistics.median(copies)
    for name, width in (("float32, 3 rows", 4), ("compact, 3 rows", 2), ("compact, 5 rows", 2)):
        steps = (TOKENS - 1) / (last[name] - first[name])  # a second; the first token is the prompt's
        read = weight_bytes(base, width) * steps
        report(f"weights read a second, {name}", f"{read / 1e9:.1f} GB/s", f"copy {bandwidth / 1e9:.1f} GB/s",
               read / bandwidth, "0.5")  # fmt: skip
    alone, full = resident_megabytes(0), resident_megabytes(RESIDENT)
    report(
        f"memory with {RESIDENT} adapters", f"{full:.0f} MB", f"base alone {alone:.0f} MB", full / alone, "at most 1.3"
    )


if __name__ == "__main__":
    main()
