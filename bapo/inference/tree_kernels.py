"""Attention over packed prompt trees on the CPU, forwards and backwards, in loops of our own.

A packed sequence is many short attentions: every branch to its prefix and itself. Libraries compute each of them
with a mask, also what the mask then hides, copy the prefix's keys for every branch, and spread a way back over heads
alone. Here a segment's queries meet only the keys that they may see, and segments are dealt out to the threads.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from bapo.inference.exponential import FREEDOM, exp
from bapo.inference.kernels import INDEX

LANES = 8  # numbers of a register
ROWS, COLUMNS = 4, 2 * LANES  # of a tile, whose sums stay in registers
BLOCK = 48  # queries at a time, so that their scores stay near


def _tile_of(adding):
    """tile(a, i, row, step, b, j, line, c, k, wide, depth): a tile of a matrix product, C = A·B or C += A·B.

    A[r, t] is `a[i + r·row + t·step]`, B[t, n] is `b[j + t·line + n]` and C[r, n] is `c[k + r·wide + n]`, for r <
    `ROWS`, n < `COLUMNS` and t < `depth`; a, b and c are flat arrays.
    """

    def to_tile(typing_context, a, i, row, step, b, j, line, c, k, wide, depth):
        def build(context, builder, signature, arguments):
            scalar = context.get_data_type(a.dtype)
            vector = ir.VectorType(scalar, LANES)

            def start(array, offset):
                made = context.make_array(signature.args[array])(context, builder, arguments[array])
                return builder.gep(made.data, [arguments[offset]])

            def at(pointer, offset):
                place = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
                return place, a.dtype.bitwidth // 8

            lines, steps, rights, outs = start(0, 1), start(4, 5), arguments[6], start(7, 8)
            zero, word = ir.Constant(vector, None), ir.IntType(32)
            first = ir.Constant(ir.VectorType(word, LANES), None)
            sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(2)] for _ in range(ROWS)]
            with cgutils.for_range_slice(builder, INDEX(0), arguments[10], INDEX(1), INDEX) as (t, _):
                right = builder.mul(t, rights)
                halves = []
                for half in range(2):
                    place, align = at(steps, builder.add(right, INDEX(half * LANES)))
                    halves.append(builder.load(place, align=align))
                left = builder.mul(t, arguments[3])
                for r, own in enumerate(sums):
                    offset = builder.add(left, builder.mul(arguments[2], INDEX(r)))
                    one = builder.load(builder.gep(lines, [offset]))
                    single = builder.insert_element(ir.Constant(vector, ir.Undefined), one, word(0))
                    many = builder.shuffle_vector(single, single, first)
                    for place, half in zip(own, halves, strict=True):
                        product = builder.fmul(many, half, flags=sorted(FREEDOM))
                        builder.store(builder.fadd(builder.load(place), product, flags=sorted(FREEDOM)), place)
            for r, own in enumerate(sums):
                for half, total in enumerate(own):
                    offset = builder.add(builder.mul(arguments[9], INDEX(r)), INDEX(half * LANES))
                    place, align = at(outs, offset)
                    value = builder.load(total)
                    if adding:
                        value = builder.fadd(value, builder.load(place, align=align))
                    builder.store(value, place, align=align)
            return context.get_dummy_value()

        return types.void(a, i, row, step, b, j, line, c, k, wide, depth), build

    return intrinsic(to_tile)


_tile: Any = _tile_of(adding=False)
_tile_added: Any = _tile_of(adding=True)


@njit(inline="always")
def _up(number, to):
    return (number + to - 1) // to * to


@njit(nogil=True)
def _gather(states, head, prefix, before, own, length, factor, out):
    """Lines of `states` [T, heads, width] of a prefix (from, how many) and of a segment, times `factor`, below each
    other in `out` [lines, columns], zeros elsewhere."""
    width = states.shape[2]
    scale = out.dtype.type(factor)
    out[before + length :] = 0
    for n in range(before + length):
        line, copy = states[prefix + n if n < before else own + n - before, head], out[n]
        for d in range(width):
            copy[d] = line[d] * scale
        copy[width:] = 0


@njit(nogil=True)
def _in_panels(lines, out):
    """`lines` [S, columns] transposed, in panels of `COLUMNS` of its lines: [S ÷ COLUMNS, columns, COLUMNS]."""
    for panel in range(len(out)):
        for n in range(COLUMNS):
            line = lines[panel * COLUMNS + n]
            for d in range(len(line)):
                out[panel, d, n] = line[d]


@njit(nogil=True)
def _against(lines, first, panels, past, bound, out):
    """out[r, s] = Σ_d lines[first + r, d] · panels[s]ᵀ[d], for the rows of a block and s < `bound`; where s lies a
    tile and more beyond `past` + r, what the row may see, nothing is written."""
    width = lines.shape[1]
    left, right, flat = lines.reshape(-1), panels.reshape(-1), out.reshape(-1)
    rows = min(BLOCK, len(lines) - first)
    for s in range(0, bound, COLUMNS):
        for r in range(max(0, s - past) // ROWS * ROWS, rows, ROWS):
            _tile(
                left, (first + r) * width, width, 1, right, s * width, COLUMNS, flat, r * out.shape[1] + s,
                out.shape[1], width,
            )  # fmt: skip


@njit(nogil=True)
def _along(weights, lines, past, bound, rows, out):
    """out[r] = Σ_s weights[r, s] · lines[s], for s < `bound`; beyond `past` + r the weights are zeros."""
    left, right, flat = weights.reshape(-1), lines.reshape(-1), out.reshape(-1)
    width = lines.shape[1]
    for d in range(0, width, COLUMNS):
        for r in range(0, rows, ROWS):
            _tile(
                left, r * weights.shape[1], weights.shape[1], 1, right, d, width, flat, r * width + d, width,
                min(bound, past + r + ROWS),
            )  # fmt: skip


@njit(nogil=True)
def _across(weights, lines, first, past, bound, rows, out):
    """out[s] += Σ_r weights[r, s] · lines[first + r], for s < `bound`; beyond `past` + r the weights are zeros."""
    left, right, flat = weights.reshape(-1), lines.reshape(-1), out.reshape(-1)
    width = lines.shape[1]
    for d in range(0, width, COLUMNS):
        for s in range(0, bound, ROWS):
            start = max(0, s - past)
            _tile_added(
                left, start * weights.shape[1] + s, 1, weights.shape[1], right, (first + start) * width + d, width,
                flat, s * width + d, width, rows - start,
            )  # fmt: skip


@njit(inline="always")
def _largest(scores, count, bound, best):
    """The largest of the first `count`; `best` is for its use. As many at a time as a tile has columns: one after the
    other each would wait for the last."""
    scores[count:bound] = -np.inf
    best[:] = -np.inf
    for s in range(0, bound, COLUMNS):
        some = scores[s : s + COLUMNS]
        for n in range(COLUMNS):
            best[n] = some[n] if some[n] > best[n] else best[n]
    return best.max()


@njit(inline="always")
def _powers(scores, count, bound, largest):
    """In place e^(score − largest) of the first `count`, zeros up to `bound`."""
    for s in range(count):
        scores[s] = exp(scores[s] - largest)
    scores[count:bound] = 0


@njit(nogil=True)
def _deal(segments, copies, live, workers):
    """The worker of every unit, which are `copies` of each segment: whoever has least to do so far. Units that are not
    `live` cost nothing."""
    owners, loads = np.empty(len(live), np.int64), np.zeros(workers, np.int64)
    for unit in range(len(live)):
        _, before, _, length = segments[unit // copies]
        owner = loads.argmin()
        owners[unit] = owner
        if live[unit]:
            loads[owner] += length * (2 * before + length)
    return owners


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def attend_trees(query, key, value, segments, scaling, out, sums, workers):
    """out = softmax(scaling · query · keyᵀ) · value for what a query may see, and `sums`, the logs of what the
    softmaxes divide by.

    `query` and `out` [rows, T, H, D], `key` and `value` [rows, T, G, D], `sums` [rows, H, T], contiguous, float32 or
    float64; `segments` [n, 4] are (prefix, its length, own, its length): places of the sequence whose positions see the
    prefix and themselves up to their own. The longest first, as they are dealt to the `workers` one by one.
    """
    rows, _, heads, width = query.shape
    groups = key.shape[2]
    shared, wide = heads // groups, _up(width, COLUMNS)
    units = len(segments) * groups * rows
    owners = _deal(segments, groups * rows, np.ones(units, np.bool_), workers)
    for worker in prange(workers):
        for unit in range(units):
            if owners[unit] != worker:
                continue
            m, g = unit % rows, unit // rows % groups
            prefix, before, own, length = segments[unit // rows // groups]
            seen, lines = _up(before + length, COLUMNS), _up(length, ROWS)
            keys, values = np.empty((seen, wide), query.dtype), np.empty((seen, wide), query.dtype)
            _gather(key[m], g, prefix, before, own, length, 1.0, keys)
            _gather(value[m], g, prefix, before, own, length, 1.0, values)
            panels = np.empty((seen // COLUMNS, wide, COLUMNS), query.dtype)
            _in_panels(keys, panels)
            queries = np.empty((lines, wide), query.dtype)
            scores, result = np.empty((BLOCK, seen), query.dtype), np.empty((BLOCK, wide), query.dtype)
            totals, best = np.empty(BLOCK, query.dtype), np.empty(COLUMNS, query.dtype)
            for head in range(g * shared, (g + 1) * shared):
                _gather(query[m], head, 0, 0, own, length, scaling, queries)
                for first in range(0, lines, BLOCK):
                    some = min(BLOCK, lines - first)
                    bound = min(seen, _up(before + first + some, COLUMNS))
                    _against(queries, first, panels, before + first, bound, scores)
                    for r in range(some):
                        count = min(before + first + r + 1, before + length)
                        line = scores[r]
                        largest = _largest(line, count, bound, best)
                        _powers(line, count, bound, largest)
                        total = line[0]
                        for s in range(1, count):
                            total += line[s]
                        totals[r] = total
                        if first + r < length:
                            sums[m, head, own + first + r] = largest + np.log(total)
                    _along(scores, values, before + first, bound, some, result)
                    for r in range(min(some, length - first)):
                        place = out[m, own + first + r, head]
                        for d in range(width):
                            place[d] = result[r, d] / totals[r]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def attend_trees_backward(
    upstream, query, key, value, out, sums, segments, scaling, to_query, to_key, to_value, workers
):
    """The gradients by query, key and value, written to the last three, of whose shapes they are; `upstream` is that by
    `out`. A segment without one is passed over. Everything else as in `attend_trees`."""
    rows, _, heads, width = query.shape
    groups = key.shape[2]
    shared, wide = heads // groups, _up(width, COLUMNS)
    units = len(segments) * groups * rows
    longest = segments[:, 1].max()
    # What a branch gives its prefix's keys and values is added up at the end: branches are computed at once.
    parts = np.zeros((units, 2, longest, width), query.dtype)
    live = np.empty(units, np.bool_)
    for unit in range(units):
        m, g = unit % rows, unit // rows % groups
        _, _, own, length = segments[unit // rows // groups]
        live[unit] = _any(upstream[m, own : own + length, g * shared : (g + 1) * shared])
    owners = _deal(segments, groups * rows, live, workers)
    for worker in prange(workers):
        for unit in range(units):
            if owners[unit] != worker:
                continue
            m, g = unit % rows, unit // rows % groups
            prefix, before, own, length = segments[unit // rows // groups]
            if not live[unit]:
                to_query[m, own : own + length, g * shared : (g + 1) * shared] = 0
                to_key[m, own : own + length, g] = 0
                to_value[m, own : own + length, g] = 0
                continue
            seen, lines = _up(before + length, COLUMNS), _up(length, ROWS)
            keys = np.empty((seen, wide), query.dtype)
            key_panels = np.empty((seen // COLUMNS, wide, COLUMNS), query.dtype)
            value_panels = np.empty_like(key_panels)
            _gather(value[m], g, prefix, before, own, length, 1.0, keys)
            _in_panels(keys, value_panels)
            _gather(key[m], g, prefix, before, own, length, 1.0, keys)
            _in_panels(keys, key_panels)
            by_key, by_value = np.zeros((seen, wide), query.dtype), np.zeros((seen, wide), query.dtype)
            queries, aboves = np.empty((lines, wide), query.dtype), np.empty((lines, wide), query.dtype)
            weights, slopes = np.empty((BLOCK, seen), query.dtype), np.empty((BLOCK, seen), query.dtype)
            result = np.empty((BLOCK, wide), query.dtype)
            for head in range(g * shared, (g + 1) * shared):
                _gather(query[m], head, 0, 0, own, length, scaling, queries)
                _gather(upstream[m], head, 0, 0, own, length, 1.0, aboves)
                for first in range(0, lines, BLOCK):
                    some = min(BLOCK, lines - first)
                    bound = min(seen, _up(before + first + some, COLUMNS))
                    _against(queries, first, key_panels, before + first, bound, weights)
                    _against(aboves, first, value_panels, before + first, bound, slopes)
                    for r in range(some):
                        if first + r >= length:
                            weights[r, :bound] = 0
                            slopes[r, :bound] = 0
                            continue
                        at = own + first + r
                        count = before + first + r + 1
                        _powers(weights[r], count, bound, sums[m, head, at])
                        mean = aboves[first + r, 0] * out[m, at, head, 0]
                        for d in range(1, width):
                            mean += aboves[first + r, d] * out[m, at, head, d]
                        for s in range(count):
                            slopes[r, s] = weights[r, s] * (slopes[r, s] - mean)
                        slopes[r, count:bound] = 0
                    _along(slopes, keys, before + first, bound, some, result)
                    for r in range(min(some, length - first)):
                        for d in range(width):
                            to_query[m, own + first + r, head, d] = result[r, d] * scaling
                    _across(weights, aboves, first, before + first, bound, some, by_value)
                    _across(slopes, queries, first, before + first, bound, some, by_key)
            parts[unit, 0, :before] = by_key[:before, :width]
            parts[unit, 1, :before] = by_value[:before, :width]
            to_key[m, own : own + length, g] = by_key[before : before + length, :width]
            to_value[m, own : own + length, g] = by_value[before : before + length, :width]
    for unit in range(units):
        m, g = unit % rows, unit // rows % groups
        prefix, before, _, _ = segments[unit // rows // groups]
        for n in range(before):
            for d in range(width):
                to_key[m, prefix + n, g, d] += parts[unit, 0, n, d]
                to_value[m, prefix + n, g, d] += parts[unit, 1, n, d]


@njit(nogil=True)
def _any(states):
    for a in states:
        for b in a:
            for c in b:
                if c != 0:  # NaN is a gradient too
                    return True
    return False


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def weigh(logits, largest, total, decay, shares):
    """One more block of `logits` [M, N] of a softmax: they become e^(logit − largest). `largest` [M] and the sums
    `total` [M] so far are brought up to date, these scaled by what is then `decay` [M]."""
    count, width = logits.shape
    for share in prange(shares):
        best = np.empty(COLUMNS, logits.dtype)
        for m in range(count * share // shares, count * (share + 1) // shares):
            line = logits[m]
            whole = width // COLUMNS * COLUMNS
            top = max(largest[m], _largest(line, whole, whole, best))
            for n in range(whole, width):
                top = max(top, line[n])
            decay[m] = exp(largest[m] - top)
            _powers(line, width, width, top)
            added = line[0]
            for n in range(1, width):
                added += line[n]
            total[m] = total[m] * decay[m] + added
            largest[m] = top


def compile_tree_kernels() -> None:
    """Compile the way forwards, or fetch what was compiled before: otherwise the first answer that is scored would
    wait for it."""
    one = np.ones((1, 1, 1, 1), np.float32)
    attend_trees(one, one, one, np.array([[0, 0, 0, 1]]), 1.0, one.copy(), one[0].copy(), 1)
    weigh(one[0, 0].copy(), *np.zeros((3, 1), np.float32), 1)
