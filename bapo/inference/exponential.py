"""eˣ in compiled loops: for float32 by a polynomial, which goes through the vector units, for float64 the library's."""

import numpy as np
from numba import njit, types
from numba.extending import overload

# Sums may be taken in any order, as every matrix library does; infinities and NaNs keep their meaning.
FREEDOM = {"reassoc", "contract"}


@njit(inline="always")
def _polynomial(x):
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


def exp(x):
    return np.exp(x)


@overload(exp, jit_options={"fastmath": FREEDOM})
def _exp(x):
    return (lambda x: _polynomial(x)) if x == types.float32 else (lambda x: np.exp(x))
