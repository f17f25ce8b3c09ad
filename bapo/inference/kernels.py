"""Decoding on the CPU: a few rows through frozen weights, each of which is read once whatever the number of rows.

Matrix libraries are made for many rows: at two to eight they copy the weight into panels first, or
read it again for every row. So the product is written out here, and what lies between two products, so that a
step of all layers is one call; numba compiles it for the machine (once; it keeps the compiled code beside this
file or in the user's cache).
"""

import os
from typing import Any

import numpy as np
import torch

os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))  # numba reads it when it is imported

from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

# Sums may be taken in any order, as every matrix library does; infinities and NaNs keep their meaning.
FREEDOM = {"reassoc", "contract"}
SHARES = 2 * torch.get_num_threads()  # of the outputs: a thread that is late takes fewer

AHEAD = 3  # lines of a weight that are asked for before their turn
CACHE_LINE = 64  # bytes


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def multiply(weight, scale, x, a, b, places, out, shares):
    """out[m, n] = scale[n] · Σ_k weight[n, k] · x[m, k] + Σ_r (Σ_k x[m, k] · a[p, r, k]) · b[p, r, n], p = places[m].

    `weight` is [N, K] float32 or int16; the others are float32: `scale` [N], `x` [M, K], `out` [M, N], and the
    LoRA matrices `a` [P, rank, K] and `b` [P, rank, N]; P may be 0. A row at no place (−1) has none. All
    contiguous. The outputs are computed in so many `shares`.
    """
    rows, width = x.shape
    outputs, rank = len(weight), a.shape[1] if len(a) else 0
    # Where multiplying takes longer than reading, the processor by itself does not read on meanwhile.
    busy = rows > 2 and weight.itemsize == 2
    inner = np.zeros((rows, rank), np.float32)
    if rank:
        for unit in prange(rows * rank):
            m, r = unit // rank, unit % rank
            if places[m] >= 0:
                line = a[places[m], r]
                total = np.float32(0)
                for k in range(width):
                    total += line[k] * x[m, k]
                inner[m, r] = total
    for share in prange(shares):
        first, last = outputs * share // shares, outputs * (share + 1) // shares
        half = (last - first + 1) // 2
        for n in range(first, first + half):
            if busy:
                _fetch(weight, n + AHEAD)
                _fetch(weight, n + half + AHEAD)
            _row_dots(weight, scale, x, out, n, min(n + half, last - 1))
        for m in range(rows if rank else 0):
            if places[m] >= 0:
                sums = out[m, first:last]
                for r in range(rank):
                    factor, line = inner[m, r], b[places[m], r, first:last]
                    for n in range(sums.shape[0]):  # from 0, or the loop is not vectorised
                        sums[n] += factor * line[n]


def _to_prefetch(typing_context, array, n, k):
    def build(context, builder, signature, arguments):
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        row = builder.mul(arguments[1], cgutils.unpack_tuple(builder, held.strides)[0])
        column = builder.mul(arguments[2], held.itemsize)
        start = builder.bitcast(held.data, cgutils.voidptr_t)
        place = builder.gep(start, [builder.add(row, column)])
        word = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        builder.call(prefetch, [place, word(0), word(2), word(1)])  # to read, into the second level, data
        return context.get_dummy_value()

    return types.void(array, n, k), build


_prefetch: Any = intrinsic(_to_prefetch)


@njit(inline="always")
def _fetch(weight, n):
    """Ask for line n, which may lie behind the last: reading then goes on while the lines before it are multiplied."""
    for k in range(0, weight.shape[1], CACHE_LINE // weight.itemsize):
        _prefetch(weight, n, k)


@njit(inline="always")
def _row_dots(weight, scale, x, out, n, o):
    """Outputs n and o of every row. Two at a time, or loading x takes longer than multiplying; and from lines far
    apart, as a processor fetches two streams ahead but not one that goes to and fro between neighbours."""
    rows = x.shape[0]
    m = 0
    # The rows of a group share each load of the weight: groups as large as the registers allow.
    while m < rows:
        left = rows - m
        if left == 5:
            _five(weight[n], weight[o], scale[n], scale[o], x, out, m, n, o)
            m += 5
        elif left == 4 or left > 6:
            _four(weight[n], weight[o], scale[n], scale[o], x, out, m, n, o)
            m += 4
        elif left == 3 or left == 6:
            _three(weight[n], weight[o], scale[n], scale[o], x, out, m, n, o)
            m += 3
        elif left == 2:
            _two(weight[n], weight[o], scale[n], scale[o], x, out, m, n, o)
            m += 2
        else:
            _one(weight[n], weight[o], scale[n], scale[o], x, out, m, n, o)
            m += 1


@njit(inline="always")
def _one(line, other, factor, factor_other, x, out, m, n, o):
    a = p = np.float32(0)
    for k in range(line.shape[0]):
        v, w = np.float32(line[k]), np.float32(other[k])
        y = x[m, k]
        a += v * y
        p += w * y
    out[m, n], out[m, o] = a * factor, p * factor_other


@njit(inline="always")
def _two(line, other, factor, factor_other, x, out, m, n, o):
    a = b = p = q = np.float32(0)
    for k in range(line.shape[0]):
        v, w = np.float32(line[k]), np.float32(other[k])
        y = x[m, k]
        a += v * y
        p += w * y
        y = x[m + 1, k]
        b += v * y
        q += w * y
    out[m, n], out[m, o] = a * factor, p * factor_other
    out[m + 1, n], out[m + 1, o] = b * factor, q * factor_other


@njit(inline="always")
def _three(line, other, factor, factor_other, x, out, m, n, o):
    a = b = c = p = q = r = np.float32(0)
    for k in range(line.shape[0]):
        v, w = np.float32(line[k]), np.float32(other[k])
        y = x[m, k]
        a += v * y
        p += w * y
        y = x[m + 1, k]
        b += v * y
        q += w * y
        y = x[m + 2, k]
        c += v * y
        r += w * y
    out[m, n], out[m, o] = a * factor, p * factor_other
    out[m + 1, n], out[m + 1, o] = b * factor, q * factor_other
    out[m + 2, n], out[m + 2, o] = c * factor, r * factor_other


@njit(inline="always")
def _four(line, other, factor, factor_other, x, out, m, n, o):
    a = b = c = d = p = q = r = s = np.float32(0)
    for k in range(line.shape[0]):
        v, w = np.float32(line[k]), np.float32(other[k])
        y = x[m, k]
        a += v * y
        p += w * y
        y = x[m + 1, k]
        b += v * y
        q += w * y
        y = x[m + 2, k]
        c += v * y
        r += w * y
        y = x[m + 3, k]
        d += v * y
        s += w * y
    out[m, n], out[m, o] = a * factor, p * factor_other
    out[m + 1, n], out[m + 1, o] = b * factor, q * factor_other
    out[m + 2, n], out[m + 2, o] = c * factor, r * factor_other
    out[m + 3, n], out[m + 3, o] = d * factor, s * factor_other


@njit(inline="always")
def _five(line, other, factor, factor_other, x, out, m, n, o):
    a = b = c = d = e = p = q = r = s = t = np.float32(0)
    for k in range(line.shape[0]):
        v, w = np.float32(line[k]), np.float32(other[k])
        y = x[m, k]
        a += v * y
        p += w * y
        y = x[m + 1, k]
        b += v * y
        q += w * y
        y = x[m + 2, k]
        c += v * y
        r += w * y
        y = x[m + 3, k]
        d += v * y
        s += w * y
        y = x[m + 4, k]
        e += v * y
        t += w * y
    out[m, n], out[m, o] = a * factor, p * factor_other
    out[m + 1, n], out[m + 1, o] = b * factor, q * factor_other
    out[m + 2, n], out[m + 2, o] = c * factor, r * factor_other
    out[m + 3, n], out[m + 3, o] = d * factor, s * factor_other
    out[m + 4, n], out[m + 4, o] = e * factor, t * factor_other


@njit(fastmath=FREEDOM, nogil=True, cache=True)
def normalise(x, weight, epsilon, out):
    """out[m] = x[m] ÷ root mean square of x[m] × weight; [M, K] and [K], float32, contiguous."""
    rows, width = x.shape
    for m in range(rows):
        squares = np.float32(0)
        for k in range(width):
            squares += x[m, k] * x[m, k]
        factor = np.float32(1 / np.sqrt(squares / width + epsilon))
        for k in range(width):
            out[m, k] = x[m, k] * factor * weight[k]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def attend(states, cos, sin, keys, values, position, starts, scaling, out):
    """Rotate queries and keys, append keys and values to the cache at `position`, attend to all up to there.

    `states` [M, (H + 2G)·D] holds H query heads, G key heads and G value heads; `cos` and `sin` [M, ≤ D] turn the
    first dimensions; `keys` and `values` [M, G, positions, D] are the cache, in which a row's own positions begin
    at its entry of `starts` [M]; `out` is [M, H·D]. All but `starts` float32.
    """
    rows, groups, _, width = keys.shape
    heads = states.shape[1] // width - 2 * groups
    shared = heads // groups
    for unit in prange(rows * groups):
        m, g = unit // groups, unit % groups
        row, first = states[m], starts[m]
        _rotate(row[(heads + g) * width : (heads + g + 1) * width], cos[m], sin[m], keys[m, g, position])
        values[m, g, position] = row[(heads + groups + g) * width : (heads + groups + g + 1) * width]
        own, seen = keys[m, g, first : position + 1], values[m, g, first : position + 1]
        length = own.shape[0]
        query = np.empty(width, np.float32)
        weights = np.empty(length, np.float32)
        for head in range(g * shared, (g + 1) * shared):
            _rotate(row[head * width : (head + 1) * width], cos[m], sin[m], query)
            largest = np.float32(-np.inf)
            for t in range(length):
                score = np.float32(0)
                for d in range(width):
                    score += query[d] * own[t, d]
                weights[t] = score * np.float32(scaling)
                largest = max(largest, weights[t])
            total = np.float32(0)
            for t in range(length):
                weights[t] = _exp(weights[t] - largest)
                total += weights[t]
            attended = out[m, head * width : (head + 1) * width]
            attended[:] = 0
            blocks = length // 4
            for block in range(blocks):  # four positions for each time that the sums are loaded and stored
                t = 4 * block
                a, b, c, e = weights[t], weights[t + 1], weights[t + 2], weights[t + 3]
                for d in range(width):
                    attended[d] += a * seen[t, d] + b * seen[t + 1, d] + c * seen[t + 2, d] + e * seen[t + 3, d]
            for t in range(4 * blocks, length):
                for d in range(width):
                    attended[d] += weights[t] * seen[t, d]
            for d in range(width):
                attended[d] /= total


@njit(inline="always")
def _exp(x):
    """eˣ to a relative 1e-7, for x below −87 or above 88 as there: eˣ = 2ⁿ eʳ with a polynomial for eʳ (that of Cephes'
    `expf`). It goes through the vector units, where the library's function takes one number a call. NaN stays NaN."""
    x = np.float32(-87) if x < np.float32(-87) else np.float32(88) if x > np.float32(88) else x
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * np.int32((np.int32(n) + 127) << 23).view(np.float32)


@njit(inline="always")
def _rotate(x, cos, sin, out):
    turned = cos.shape[0]
    half = turned // 2
    for d in range(half):
        out[d] = x[d] * cos[d] - x[d + half] * sin[d]
        out[d + half] = x[d + half] * cos[d + half] + x[d] * sin[d + half]
    for d in range(turned, x.shape[0]):
        out[d] = x[d]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def gate(states, gelu, out, shares):
    """out = f(left half of `states`) · right half; [M, 2K] → [M, K], float32; f is SiLU, or GELU (tanh) with `gelu`."""
    rows, width = out.shape
    for share in prange(shares):
        first, last = width * share // shares, width * (share + 1) // shares
        for m in range(rows):
            left, right, own = states[m, first:last], states[m, width + first : width + last], out[m, first:last]
            for k in range(own.shape[0]):
                x = left[k]
                turn = x
                if gelu:  # tanh y = 2 sigmoid(2y) − 1, so both are x · sigmoid(…)
                    turn = np.float32(1.5957691216) * (x + np.float32(0.044715) * x * x * x)
                own[k] = x / (np.float32(1) + _exp(-turn)) * right[k]


def _to_pointer(typing_context, address):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


_pointer: Any = intrinsic(_to_pointer)  # an address, int64, as what `carray` makes an array of


@njit(nogil=True, cache=True)
def _product(x, weight, scale, compact, shape, lora, out, shares):
    """`multiply` with everything but x and out given by address, as `run_layers` has it."""
    outputs, width = shape[0], shape[1]
    policies, rank = lora[3], lora[4]
    a = carray(_pointer(lora[0]), (policies, rank, width), np.float32)
    b = carray(_pointer(lora[1]), (policies, rank, outputs), np.float32)
    places = carray(_pointer(lora[2]), (len(x) if policies else 0,), np.int64)
    scales = carray(_pointer(scale), (outputs,), np.float32)
    if compact:
        multiply(carray(_pointer(weight), (outputs, width), np.int16), scales, x, a, b, places, out, shares)
    else:
        multiply(carray(_pointer(weight), (outputs, width), np.float32), scales, x, a, b, places, out, shares)


@njit(nogil=True, cache=True)
def run_layers(
    x, weights, scales, compact, shapes, loras, norms, epsilon, cache, heads, rotation, scaling, gelu, copies, shares
):
    """One token of every row through all layers: x [M, K] becomes what leaves the last one.

    What belongs to a layer is given by its address, int64, and kept alive by the caller: `weights` and `scales`
    [layers, 4] of the products (query/key/value, out, gate/up, down), whose shapes [N, K] are `shapes` [4, 2] and
    whose weights are int16 where `compact` [4] is true; `loras` [layers, 4, 5]: a, b, places, then P and the rank;
    `norms` [layers, 2]; `cache` [layers, 3]: keys, values [M, G, positions, D], positions; `heads` is (G, D);
    `rotation` (position, starts, cos, sin); `epsilon` the norms', `scaling` the attention's, `gelu` as of `gate`.
    `copies` is (layers, rows, leaders): in so many first layers all rows but so many first ones are copies of
    their `leaders` [M], whose keys and values they get.
    """
    groups, depth = heads
    position, starts, cos, sin = rotation
    alike, distinct, leaders = copies
    normed, change = np.empty_like(x), np.empty_like(x)
    states = np.empty((len(x), shapes[0, 0]), np.float32)
    attended = np.empty((len(x), shapes[1, 1]), np.float32)
    gate_up = np.empty((len(x), shapes[2, 0]), np.float32)
    inside = np.empty((len(x), shapes[3, 1]), np.float32)
    for n in range(len(weights)):
        rows = distinct if n < alike else len(x)
        if n == alike:
            for m in range(distinct, rows):
                x[m] = x[leaders[m]]
        own, part, out = x[:rows], normed[:rows], change[:rows]
        normalise(own, carray(_pointer(norms[n, 0]), x.shape[1], np.float32), epsilon, part)
        _product(part, weights[n, 0], scales[n, 0], compact[0], shapes[0], loras[n, 0], states[:rows], shares)
        shape = len(x), groups, cache[n, 2], depth
        keys = carray(_pointer(cache[n, 0]), shape, np.float32)
        values = carray(_pointer(cache[n, 1]), shape, np.float32)
        attend(states[:rows], cos, sin, keys[:rows], values[:rows], position, starts, scaling, attended[:rows])
        for m in range(rows, len(x)):
            keys[m, :, position] = keys[leaders[m], :, position]
            values[m, :, position] = values[leaders[m], :, position]
        _product(attended[:rows], weights[n, 1], scales[n, 1], compact[1], shapes[1], loras[n, 1], out, shares)
        own += out
        normalise(own, carray(_pointer(norms[n, 1]), x.shape[1], np.float32), epsilon, part)
        _product(part, weights[n, 2], scales[n, 2], compact[2], shapes[2], loras[n, 2], gate_up[:rows], shares)
        gate(gate_up[:rows], gelu, inside[:rows], shares)
        _product(inside[:rows], weights[n, 3], scales[n, 3], compact[3], shapes[3], loras[n, 3], out, shares)
        own += out


def compile_kernels() -> None:
    """Compile all of the above, or fetch what was compiled before: half a minute once, then a fraction of one.

    Otherwise the first question of a new installation would wait for it.
    """
    one, line = np.ones((1, 2), np.float32), np.ones(2, np.float32)
    cache, nothing = np.ones((1, 1, 1, 2), np.float32), np.empty((0, 0, 0), np.float32)
    for kind in (np.float32, np.int16):
        none, out = np.empty(0, np.int64), np.empty((1, 1), np.float32)
        multiply(one.astype(kind), line[:1], one, nothing, nothing, none, out, SHARES)
    normalise(one, line, 1e-6, one.copy())
    first = np.zeros(1, np.int64)
    attend(np.ones((1, 6), np.float32), one, one, cache, cache.copy(), 0, first, 1.0, one.copy())
    gate(one, False, one[:, :1].copy(), SHARES)
    tables, shapes, loras = np.empty((0, 4), np.int64), np.ones((4, 2), np.int64), np.empty((0, 4, 5), np.int64)
    run_layers(
        *(one, tables, tables, np.empty(4, np.bool_), shapes, loras, tables, 1e-6),
        *(tables, (1, 2), (0, first, one, one), 1.0, False, (0, 1, first), SHARES),
    )  # fmt: skip
