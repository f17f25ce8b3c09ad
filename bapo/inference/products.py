"""Products with the base's frozen weights: the fastest way for every shape, found by timing.

With few rows a product is bound by reading the weight, and up to `MANY` matrix libraries lose much of their time on
arranging it; which way is fastest depends on the processor, so every way is timed once per shape and the choice
kept on the disk. One of the ways reads the weight as 16-bit integers with a scale per output ("compact") and multiplies
integers: half the bytes, several products in one instruction, and closer to float32 than bfloat16 is.
"""

import hashlib
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bapo.disk_cache import DiskCache
from bapo.inference import kernels
from bapo.inference.kernels import LARGEST_WEIGHT, SHARES, multiply

FEW, SEVERAL, MANY = 8, 32, 256
TIMED_SEVERAL, TIMED_MANY = (1, 2, 3, 5, FEW, 16, 24, SEVERAL), (64, 128, MANY)
REPEATS = 3
TIMED_BYTES = 2**28  # of a shape's weights, or all of them: no cache holds so much
SAMPLE = 3  # products of a shape that are timed at more than `SEVERAL` rows: there reading the weights matters less
SMALL = 2**18  # weights of one shape below which no way takes time worth a choice

# Where all products take one pass over the weights, all layers are one call (`DecoderStep`): that is worth so much.
ONE_CALL = 1.25

LINEAR, TRANSPOSED, ONE_PASS, COMPACT = "linear", "transposed", "one pass", "compact"
EXACT_WAYS = (LINEAR, TRANSPOSED, ONE_PASS)


class Lora(NamedTuple):
    """One layer's matrices for a batch: A [policies, rank, K] and B [policies, rank, N], contiguous, ranks padded with
    zeros; row m takes those at `places[m]`, or none where that is −1. Where layers with the same input are one, a line
    of B belongs to one of them: it is zero but for columns from and to `spans` [policies, rank, 2]."""

    a: Tensor
    b: Tensor
    spans: np.ndarray
    places: np.ndarray


NO_LORA = Lora(torch.empty(0, 0, 0), torch.empty(0, 0, 0), np.empty((0, 0, 2), np.int64), np.empty(0, np.int64))


def add_lora(y: Tensor, x: Tensor, lora: Lora | None) -> Tensor:
    """y + (x Aᵀ) B, each row of x [rows, ..., K] and y [rows, ..., N] with its own matrices; writes to `y`."""
    if lora is None:
        return y
    first = 0
    # Neighbours with the same matrices are one product, and need not be gathered: they are slices.
    for last in (*np.flatnonzero(np.diff(lora.places)) + 1, len(lora.places)):
        place, rows, first = lora.places[first], slice(first, last), last
        if place < 0:
            continue
        inner = x[rows].flatten(0, -2).to(lora.a.dtype) @ lora.a[place].T
        target = y[rows].view(-1, y.shape[-1])
        if target.dtype == inner.dtype:
            target.addmm_(inner, lora.b[place])
        else:
            target += (inner @ lora.b[place]).to(target.dtype)
    return y


class Product:
    """y = x Wᵀ + b for a weight [N, K] that does not change."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias
        # The kernels are written for float32 on the CPU.
        self.special = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.exact_ways = [LINEAR] * (MANY + 1)  # by number of rows
        self.ways = self.exact_ways
        if self.special:
            self._ones = torch.ones(len(weight)).numpy()
            self._weight = weight.contiguous().numpy()
        self._compact: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def is_compact(self) -> bool:
        """Whether any number of rows is multiplied with the rounded weight."""
        return COMPACT in self.ways

    def make_compact(self) -> None:
        """Keep a copy of the weight in 16-bit integers, to the nearest multiple of the row's largest ÷ 8191."""
        scale = self.weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_WEIGHT
        self._compact = (self.weight / scale[:, None]).round_().to(torch.int16).numpy(), scale.numpy()

    def drop_compact(self) -> None:
        self._compact = None

    def __call__(self, x: Tensor, lora: Lora | None = None, exact: bool = True) -> Tensor:
        """x [..., K] → [..., N]; with `lora`, x is [rows, ..., K]. `exact` excludes the rounded weight."""
        rows = x.numel() // x.shape[-1]
        if not self.special or not 0 < rows <= MANY:
            return add_lora(F.linear(x, self.weight, self.bias), x, lora)
        return self.by((self.exact_ways if exact else self.ways)[rows], x, lora)

    def one_pass(self, rows: int, exact: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Weight and scale as `kernels.multiply` reads them, where that is all there is to so many rows' product."""
        if not self.special or not 0 < rows <= MANY or self.bias is not None:
            return None
        return self._held((self.exact_ways if exact else self.ways)[rows])

    def _held(self, way: str) -> tuple[np.ndarray, np.ndarray] | None:
        return {COMPACT: self._compact, ONE_PASS: (self._weight, self._ones)}.get(way)

    def by(self, way: str, x: Tensor, lora: Lora | None = None) -> Tensor:
        """The product by one of the ways."""
        if way == LINEAR:
            return add_lora(F.linear(x, self.weight, self.bias), x, lora)
        flat = x.reshape(-1, x.shape[-1])
        inside = NO_LORA
        if way == TRANSPOSED:
            out = (self.weight @ flat.T).T
        else:
            out = torch.empty(len(flat), len(self.weight))
            held = self._held(way)
            assert held is not None  # `choose_ways` keeps the rounded weight of whatever it lets take this way
            weight, scale = held
            if lora and len(lora.places) == len(flat):  # one position of every row: the kernel adds the rows' own
                inside, lora = lora, None
            a, b, spans, places = inside
            inputs = flat.contiguous().numpy(), a.numpy(), b.numpy()
            multiply(weight, scale, *inputs, spans, places, out.numpy(), SHARES)
        if self.bias is not None:
            out = out + self.bias
        return add_lora(out.reshape(*x.shape[:-1], -1), x, lora)


@torch.inference_mode()
def choose_ways(products: Sequence[Product], cache: Path, compact: bool) -> None:
    """Time the ways on every shape among `products`, at every number of rows, and let each take the fastest.

    With `compact` the rounded weights take part. Small products are done in one pass, untimed. Choices are
    remembered in `cache` for this machine, these versions and these kernels: which way is taken decides the last bits
    of a result, so it must not change by chance.
    """
    known = DiskCache(cache / "products")
    own = hashlib.sha256(Path(kernels.__file__).read_bytes()).hexdigest()
    machine = [platform.processor() or platform.machine(), torch.__version__, numba.__version__, own]
    by_shape: dict[tuple[int, int], list[Product]] = {}
    for product in products:
        if product.special:
            by_shape.setdefault(product.shape, []).append(product)
    for shape, alike in by_shape.items():
        if len(alike) * shape[0] * shape[1] < SMALL:
            for product in alike:
                product.exact_ways = product.ways = [ONE_PASS] * (FEW + 1) + [LINEAR] * (MANY - FEW)
            continue
        if compact:
            for product in alike:
                product.make_compact()
        key = ["ways", *machine, torch.get_num_threads(), *shape, len(alike)]
        many = _choices(known, key, alike[:SAMPLE], TIMED_MANY, EXACT_WAYS)
        sample = alike[: 1 + TIMED_BYTES // alike[0].weight.nbytes]
        for exact in (True, False) if compact else (True,):
            several = _choices(known, key, sample, TIMED_SEVERAL, EXACT_WAYS if exact else (*EXACT_WAYS, COMPACT))
            chosen = several + many[SEVERAL + 1 :]
            for product in alike:
                product.ways = chosen
                if exact:
                    product.exact_ways = chosen
        if compact and not alike[0].is_compact:
            for product in alike:
                product.drop_compact()


def _choices(
    known: DiskCache, key: list, products: Sequence[Product], timed: Sequence[int], ways: Sequence[str]
) -> list[str]:
    """The fastest way by number of rows, up to the largest that is timed; from the disk where it was timed before."""
    key = [*key, timed, ways]
    if key not in known:
        known[key] = {str(rows): _fastest(products, rows, ways) for rows in timed}
    return [known[key][str(next(most for most in timed if most >= rows))] for rows in range(timed[-1] + 1)]


def _fastest(products: Sequence[Product], rows: int, ways: Sequence[str]) -> str:
    """The way that takes least time for all the products in turn, as decoding calls them: none is in the cache. A way
    that several rows cannot take in one call must be faster by a factor of `ONE_CALL`."""
    x = torch.ones(rows, products[0].shape[1])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(REPEATS + 1):
        for way in ways:
            start = time.perf_counter()
            for product in products:
                product.by(way, x)
            if repeat:  # the first compiles
                seconds[way].append(time.perf_counter() - start)
    costs = {way: statistics.median(times) for way, times in seconds.items()}
    for way in (LINEAR, TRANSPOSED) if rows <= SEVERAL else ():
        costs[way] *= ONE_CALL
    return min(ways, key=costs.__getitem__)
