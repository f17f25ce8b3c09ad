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

from bapo.inference.exponential import FREEDOM, exp

SHARES = 2 * torch.get_num_threads()  # of the outputs: a thread that is late takes fewer

SUMS = 8  # side by side in a register
PIECE = 2 * SUMS  # columns that fill a register as 16-bit integers
SPAN = 8 * SUMS  # columns whose products are added up in 32 bits: 8 products a sum, which fit if they are of at most
LARGEST_WEIGHT, LARGEST_INPUT = 8191, 32767
AHEAD = 4096  # bytes of a weight that are asked for before their turn
FLOAT, INDEX, WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def multiply(weight, scale, x, a, b, spans, places, out, shares):
    """out[m, n] = scale[n] · Σ_k weight[n, k] · x[m, k] + Σ_r (Σ_k x[m, k] · a[p, r, k]) · b[p, r, n], p = places[m].

    `weight` is [N, K] float32, or int16 up to ±`LARGEST_WEIGHT`, with which x is rounded to integers too; the others
    are float32: `scale` [N], `x` [M, K], `out` [M, N], and the LoRA matrices `a` [P, rank, K] and `b` [P, rank, N]; P
    may be 0. Line r of b[p] is zero but for the columns `spans`[p, r], from and to. A row at no place (−1) has no
    LoRA. All contiguous. The outputs are computed in so many `shares`.
    """
    rows, width = x.shape
    outputs, rank = len(weight), a.shape[1] if len(a) else 0
    integers = weight.itemsize == 2
    rounded, steps = np.empty((rows if integers else 0, width), np.int16), np.ones(rows, np.float32)
    if integers:
        _round(x, rounded, steps)
    inner = np.zeros((rows, rank), np.float32)
    if rank:
        for unit in prange(rows * rank):
            m, r = unit // rank, unit % rank
            if places[m] >= 0 and spans[places[m], r, 1]:
                line = a[places[m], r]
                total = np.float32(0)
                for k in range(width):
                    total += line[k] * x[m, k]
                inner[m, r] = total
    for share in prange(shares):
        first, last = outputs * share // shares, outputs * (share + 1) // shares
        half = (last - first + 1) // 2
        for n in range(first, first + half):
            _row_dots(weight, scale, x, rounded, steps, out, n, min(n + half, last - 1))
        for m in range(rows if rank else 0):
            if places[m] >= 0:
                for r in range(rank):
                    start, stop = max(first, spans[places[m], r, 0]), min(last, spans[places[m], r, 1])
                    factor, sums, line = inner[m, r], out[m, start:stop], b[places[m], r, start:stop]
                    for n in range(sums.shape[0]):  # from 0, or the loop is not vectorised
                        sums[n] += factor * line[n]


@njit(nogil=True)
def _round(x, rounded, steps):
    """x[m] ≈ rounded[m] · steps[m], the step being the row's largest ÷ `LARGEST_INPUT`. With an infinity or a NaN in
    the row the step is one too, and whatever is multiplied with it."""
    bits = x.view(np.int32)  # a float's order is that of its bits, and the compiler finds the largest integer faster
    for m in range(len(x)):
        largest = np.float32(1e-30).view(np.int32)
        for k in range(x.shape[1]):
            largest = max(largest, bits[m, k] & np.int32(0x7FFFFFFF))
        top = np.int32(largest).view(np.float32)
        steps[m], factor = top / np.float32(LARGEST_INPUT), np.float32(LARGEST_INPUT) / top
        for k in range(x.shape[1]):
            shifted = x[m, k] * factor + np.float32(3 << 22)  # the last bits are the nearest integer
            rounded[m, k] = np.float32(shifted).view(np.int32) - np.float32(3 << 22).view(np.int32)


def _dots_of(rows):
    """dots(weight, n, o, x, rounded, m): lines n and o of the weight times `rows` rows of x from row m on; two sums for
    the first row, two for the second, …, float32. An int16 weight is multiplied with `rounded` in place of x. Columns
    that do not fill a `PIECE` are left out.

    A piece of a line is loaded once for all rows, and of a row once for both lines. This is in the compiler's own terms
    for two reasons: processors add two products of 16-bit integers in one instruction, which it does not find in
    a loop; and what is needed later must be asked for evenly, between the products, or all wait for it.
    """

    def to_dots(typing_context, weight, n, o, x, rounded, m):
        integers = weight.dtype == types.int16
        piece = ir.VectorType(ir.IntType(16), PIECE) if integers else ir.VectorType(FLOAT, SUMS)
        item = weight.dtype.bitwidth // 8

        def build(context, builder, signature, arguments):
            arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (0, 3, 4)]
            weights, inputs = arrays[0], arrays[2 if integers else 1]
            width = cgutils.unpack_tuple(builder, weights.shape)[1]
            lines = [(weights, arguments[1]), (weights, arguments[2])]
            lines += [(inputs, builder.add(arguments[5], INDEX(row))) for row in range(rows)]
            starts = [builder.gep(array.data, [builder.mul(number, width)]) for array, number in lines]

            def loop(first, last, step):
                return cgutils.for_range_slice(builder, first, last, INDEX(step), INDEX)

            def zeros(kind):
                zero = ir.Constant(ir.VectorType(kind, SUMS), None)
                return [cgutils.alloca_once_value(builder, zero) for _ in range(2 * rows)]

            def add(sums, values):
                for place, value in zip(sums, values, strict=True):
                    builder.store(_plus(builder, builder.load(place), value), place)

            totals = zeros(FLOAT)
            whole = builder.and_(width, INDEX(-PIECE))
            with loop(INDEX(0), whole, SPAN) as (first, _):
                last = builder.add(first, INDEX(SPAN))
                last = builder.select(builder.icmp_signed("<", last, whole), last, whole)
                sums = zeros(WORD if integers else FLOAT)
                with loop(first, last, piece.count) as (k, _):
                    for line in starts[:2]:
                        _prefetch(builder, builder.gep(line, [builder.add(k, INDEX(AHEAD // item))]))
                    pointers = [builder.bitcast(builder.gep(line, [k]), piece.as_pointer()) for line in starts]
                    loaded = [builder.load(pointer, align=item) for pointer in pointers]
                    add(sums, [_times(builder, line, row) for row in loaded[2:] for line in loaded[:2]])
                add(totals, [_float(builder, builder.load(place)) for place in sums])
            return context.make_tuple(builder, signature.return_type, [_sum(builder, place) for place in totals])

        return types.UniTuple(types.float32, 2 * rows)(weight, n, o, x, rounded, m), build

    return intrinsic(to_dots)


def _times(builder, line, row):
    """The products of two pieces, added up to `SUMS`."""
    if line.type.element == FLOAT:
        return builder.fmul(line, row, flags=sorted(FREEDOM))
    wide = ir.VectorType(WORD, PIECE)
    products = builder.mul(builder.sext(line, wide), builder.sext(row, wide))
    halves = [ir.Constant(ir.VectorType(WORD, SUMS), list(range(first, PIECE, 2))) for first in (0, 1)]
    return builder.add(*(builder.shuffle_vector(products, products, half) for half in halves))


def _plus(builder, one, other):
    return builder.fadd(one, other, flags=sorted(FREEDOM)) if one.type.element == FLOAT else builder.add(one, other)


def _float(builder, sums):
    return sums if sums.type.element == FLOAT else builder.sitofp(sums, ir.VectorType(FLOAT, SUMS))


def _sum(builder, place):
    kind = ir.FunctionType(FLOAT, [FLOAT, ir.VectorType(FLOAT, SUMS)])
    add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{SUMS}f32")
    return builder.call(add, [FLOAT(0.0), builder.load(place)], fastmath=sorted(FREEDOM))


def _prefetch(builder, place):
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, WORD, WORD, WORD])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
    # To read, into the second level, data. It may lie behind the last line: nothing is read there.
    builder.call(prefetch, [builder.bitcast(place, cgutils.voidptr_t), WORD(0), WORD(2), WORD(1)])


def _group_of(size):
    dots: Any = _dots_of(size)

    @njit(inline="always")
    def group(weight, scale, x, rounded, steps, out, m, n, o):
        sums = dots(weight, n, o, x, rounded, m)
        width = x.shape[1]
        for row in range(size):
            i, one, other = m + row, sums[2 * row], sums[2 * row + 1]
            for k in range(width - width % PIECE, width):
                y = np.float32(rounded[i, k]) if weight.itemsize == 2 else x[i, k]
                one += weight[n, k] * y
                other += weight[o, k] * y
            out[i, n], out[i, o] = one * steps[i] * scale[n], other * steps[i] * scale[o]

    return group


_one, _two, _three, _four, _five = (_group_of(size) for size in range(1, 6))


@njit(inline="always")
def _row_dots(weight, scale, x, rounded, steps, out, n, o):
    """Outputs n and o of every row. Two at a time, or loading x takes longer than multiplying; and from lines far
    apart, as a processor fetches two streams ahead but not one that goes to and fro between neighbours."""
    rows = x.shape[0]
    m = 0
    # The rows of a group share each load of the weight: groups as large as the registers allow.
    while m < rows:
        left = rows - m
        if left == 5:
            _five(weight, scale, x, rounded, steps, out, m, n, o)
            m += 5
        elif left == 4 or left > 6:
            _four(weight, scale, x, rounded, steps, out, m, n, o)
            m += 4
        elif left == 3 or left == 6:
            _three(weight, scale, x, rounded, steps, out, m, n, o)
            m += 3
        elif left == 2:
            _two(weight, scale, x, rounded, steps, out, m, n, o)
            m += 2
        else:
            _one(weight, scale, x, rounded, steps, out, m, n, o)
            m += 1


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
                weights[t] = exp(weights[t] - largest)
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
                own[k] = x / (np.float32(1) + exp(-turn)) * right[k]


def _to_pointer(typing_context, address):
    def build(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), build


_pointer: Any = intrinsic(_to_pointer)  # an address, int64, as what `carray` makes an array of


@njit(nogil=True, cache=True)
def _product(x, weight, scale, compact, shape, lora, out, shares):
    """`multiply` with everything but x and out given by address, as `run_layers` has it."""
    outputs, width = shape[0], shape[1]
    policies, rank = lora[4], lora[5]
    a = carray(_pointer(lora[0]), (policies, rank, width), np.float32)
    b = carray(_pointer(lora[1]), (policies, rank, outputs), np.float32)
    spans = carray(_pointer(lora[2]), (policies, rank, 2), np.int64)
    places = carray(_pointer(lora[3]), (len(x) if policies else 0,), np.int64)
    scales = carray(_pointer(scale), (outputs,), np.float32)
    if compact:
        multiply(carray(_pointer(weight), (outputs, width), np.int16), scales, x, a, b, spans, places, out, shares)
    else:
        multiply(carray(_pointer(weight), (outputs, width), np.float32), scales, x, a, b, spans, places, out, shares)


@njit(nogil=True, cache=True)
def run_layers(
    x, weights, scales, compact, shapes, loras, norms, epsilon, cache, heads, rotation, scaling, gelu, copies, shares
):
    """One token of every row through all layers: x [M, K] becomes what leaves the last one.

    What belongs to a layer is given by its address, int64, and kept alive by the caller: `weights` and `scales`
    [layers, 4] of the products (query/key/value, out, gate/up, down), whose shapes [N, K] are `shapes` [4, 2] and
    whose weights are int16 where `compact` [4] is true; `loras` [layers, 4, 6]: a, b, spans, places, then P and the
    rank; `norms` [layers, 2]; `cache` [layers, 3]: keys, values [M, G, positions, D], positions; `heads` is (G, D);
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
        multiply(one.astype(kind), line[:1], one, nothing, nothing, none.reshape(0, 0, 2), none, out, SHARES)
    normalise(one, line, 1e-6, one.copy())
    first = np.zeros(1, np.int64)
    attend(np.ones((1, 6), np.float32), one, one, cache, cache.copy(), 0, first, 1.0, one.copy())
    gate(one, False, one[:, :1].copy(), SHARES)
    tables, shapes, loras = np.empty((0, 4), np.int64), np.ones((4, 2), np.int64), np.empty((0, 4, 6), np.int64)
    run_layers(
        *(one, tables, tables, np.empty(4, np.bool_), shapes, loras, tables, 1e-6),
        *(tables, (1, 2), (0, first, one, one), 1.0, False, (0, 1, first), SHARES),
    )  # fmt: skip
