"""What lies between two products of a layer in training, forwards and backwards, each in one pass over its tensors.

Arrays are contiguous, float32 or float64, with one line per token; `shares` is the number of parts that the lines
are computed in.
"""

import numpy as np
from numba import njit, prange

from bapo.inference.exponential import FREEDOM, exp


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def normalise(x, gain, epsilon, out, scale, shares):
    """out[m] = x[m] · scale[m] · gain, where `scale` [M] becomes 1 ÷ root mean square of x[m]."""
    count, width = x.shape
    for share in prange(shares):
        for m in range(count * share // shares, count * (share + 1) // shares):
            line, own = x[m], out[m]
            squares = line[0] * line[0]
            for k in range(1, width):
                squares += line[k] * line[k]
            factor = x.dtype.type(1 / np.sqrt(squares / width + epsilon))
            scale[m] = factor
            for k in range(width):
                own[k] = line[k] * factor * gain[k]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def normalise_backward(upstream, x, gain, scale, beside, out, shares):
    """out = `beside` + the gradient by `normalise`'s x, where `upstream` is that by its out."""
    count, width = x.shape
    for share in prange(shares):
        for m in range(count * share // shares, count * (share + 1) // shares):
            line, above, more, own, factor = x[m], upstream[m], beside[m], out[m], scale[m]
            along = above[0] * gain[0] * line[0]
            for k in range(1, width):
                along += above[k] * gain[k] * line[k]
            back = along * factor * factor / x.dtype.type(width)
            for k in range(width):
                own[k] = (above[k] * gain[k] - line[k] * back) * factor + more[k]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def rotate(states, cos, sin, direction, out, shares):
    """Rotary embedding of `states` [M, heads, D] by angles of [M, D], whose halves are the same; with `direction` −1
    back again."""
    count, heads, width = states.shape
    half = width // 2
    for share in prange(shares):
        for m in range(count * share // shares, count * (share + 1) // shares):
            for head in range(heads):
                line, own = states[m, head], out[m, head]
                for d in range(half):
                    turn = sin[m, d] * states.dtype.type(direction)
                    a, b = line[d], line[half + d]
                    own[d] = a * cos[m, d] - b * turn
                    own[half + d] = b * cos[m, d] + a * turn


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def gated(gate, up, out, shares):
    """out = silu(gate) · up."""
    count, width = gate.shape
    for share in prange(shares):
        for m in range(count * share // shares, count * (share + 1) // shares):
            line, other, own = gate[m], up[m], out[m]
            for k in range(width):
                own[k] = line[k] * _sigmoid(line[k]) * other[k]


@njit(fastmath=FREEDOM, parallel=True, nogil=True, cache=True)
def gated_backward(upstream, gate, up, shares):
    """In `upstream`, so far the gradient by `gated`'s out, that by gate; that by up in `up`; and out in `gate`."""
    count, width = gate.shape
    for share in prange(shares):
        for m in range(count * share // shares, count * (share + 1) // shares):
            line, other, own = gate[m], up[m], upstream[m]
            for k in range(width):
                sigmoid = _sigmoid(line[k])
                activated = line[k] * sigmoid
                by_gate = own[k] * other[k] * (sigmoid + activated - activated * sigmoid)
                by_up = own[k] * activated
                line[k] = activated * other[k]
                other[k] = by_up
                own[k] = by_gate


@njit(inline="always")
def _sigmoid(x):
    return np.float32(1) / (np.float32(1) + exp(-x))


@njit(nogil=True, cache=True)
def mark(states, live):
    """`live`[m] becomes true where line m of `states` is not all zeros; NaN is none."""
    for m in range(len(states)):
        for value in states[m]:
            if value != 0:
                live[m] = True
                break
