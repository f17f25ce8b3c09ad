"""The opening of the chat template, which every prompt has: its keys and values are computed once per policy.

A system message can be longer than the question behind it. Each policy's opening is computed alone, whatever else
is asked together with it, so that no answer depends, down to the last bit, on what was asked before.
"""

import hashlib
import json
import os
import platform
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.cache_utils import Cache

from bapo.adapters import Adapter
from bapo.inference.base import Base
from bapo.inference.roomy_cache import RoomyLayer

PROMPTS = ("Why?", "2 + 2", "über")  # what all of their encodings begin with is the template's
SHORTEST = 8  # tokens; what is shorter is not worth keeping
HELD_BYTES = 64 * 2**20
CHANGING_ROTATION = ("dynamic", "longrope")  # in which a prompt's length changes the keys of its first tokens


class States(NamedTuple):
    """Keys and values of every layer, [layers, heads, positions, width]."""

    keys: Tensor
    values: Tensor

    @property
    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Openings:
    """Openings used last, in memory up to `HELD_BYTES`; those of the base and of single adapters also in `cache`."""

    def __init__(self, base: Base, cache: Path):
        rope = getattr(base.model.config, "rope_parameters", None) or {}
        settled = base.model.device.type == "cpu" and rope.get("rope_type") not in CHANGING_ROTATION
        ids = _common_start([base.encode_prompt(prompt) for prompt in PROMPTS]) if settled else []
        self.token_ids = ids if len(ids) >= SHORTEST else []
        self._folder = cache / "openings"
        machine = [platform.processor() or platform.machine(), torch.__version__, torch.get_num_threads()]
        self._key = [base.cache_key, str(base.model.dtype), self.token_ids, *machine]
        self._held: OrderedDict[Hashable, States] = OrderedDict()

    def start(self, prompt_ids: Sequence[int], cache: Cache) -> int:
        """How many of the prompt's first tokens an empty cache may be given the states of: the opening's, or 0."""
        count = len(self.token_ids)
        suits = len(prompt_ids) > count and list(prompt_ids[:count]) == self.token_ids
        return count if suits and all(isinstance(layer, RoomyLayer) for layer in cache.layers) else 0

    def of(self, parts: Sequence[tuple[Adapter, float]], compute: Callable[[], Cache]) -> States:
        """The opening's states under adapters with their weights in a mix; `compute` runs it, where it must be."""
        identity = tuple((adapter.key, adapter.written, weight) for adapter, weight in parts)
        if identity not in self._held:
            self._held[identity] = self._from_disk(parts, compute)
        self._held.move_to_end(identity)
        while len(self._held) > 1 and sum(states.bytes for states in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return self._held[identity]

    def _from_disk(self, parts: Sequence[tuple[Adapter, float]], compute: Callable[[], Cache]) -> States:
        file = self._file(parts)
        if file is None:
            return _states(compute())
        with suppress(OSError, SafetensorError, KeyError):  # new, or damaged
            found = load_file(file)
            return States(found["keys"], found["values"])
        states = _states(compute())
        with suppress(OSError, SafetensorError):  # a full disk costs time, no answer
            self._folder.mkdir(parents=True, exist_ok=True)
            scratch = file.with_suffix(f".{os.getpid()}")
            save_file(states._asdict(), scratch)
            scratch.replace(file)
        return states

    def _file(self, parts: Sequence[tuple[Adapter, float]]) -> Path | None:
        """None for a mix, whose slider has too many places for files, and for an adapter that is gone by now."""
        if len(parts) > 1 or any(weight != 1 for _, weight in parts):
            return None
        try:
            key = json.dumps([*self._key, *(adapter.sha256 for adapter, _ in parts)])
        except OSError:
            return None
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"


def _common_start(sequences: Sequence[Sequence[int]]) -> list[int]:
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))]


def _states(cache: Cache) -> States:
    return States(*(torch.stack([getattr(layer, name)[0] for layer in cache.layers]) for name in States._fields))


def fill(cache: Cache, rows: Sequence[States], shared: int) -> None:
    """Give an empty cache the states of every row; in so many first layers, where all are alike, of one."""
    for n, layer in enumerate(cache.layers):
        own = rows[:1] if n < shared else rows
        layer.update(torch.stack([keys[n] for keys, _ in own]), torch.stack([values[n] for _, values in own]))
