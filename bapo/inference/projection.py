"""Products of many rows on the CPU by oneDNN, which torch brings along: `@` is MKL, on some machines slower."""

import os

# Every number of rows is a product of its own, whose code is kept: one layer's are enough, a training's take 300 MB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import torch
from torch import Tensor

# What torch's own compiler puts in the place of a linear layer; not every build has it.
LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, without autograd: x [rows, K] and weight [N, K], which may be a view, → [rows, N]."""
    if LINEAR is None or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return x @ weight.T
    return LINEAR(x, weight, None, "none", [], "")
