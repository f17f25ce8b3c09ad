"""Attention over packed prompt trees, as an attention implementation of transformers.

Every branch attends to its prefix and to itself, so a packed sequence costs what its branches cost
alone, not its length squared. Models reach it through their configuration's attention
implementation, `NAME`; a call without a tree is the library's SDPA.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bapo.inference.prefix_tree import PromptTree, Segment
from bapo.inference.tree_kernels import attend_trees, attend_trees_backward

NAME = "prefix_tree"
# Below 128 positions torch would take its kernel for decoding, which cannot be compiled where the queries of heads that
# share a key exceed a block of the mask.
FLEX_KERNEL = {"BACKEND": "TRITON"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an architecture can read. Lengths are positions from the prompt's first token to a response's last.

    `trees`: whether its attention can be replaced at all. `window`: beyond this length its attention
    slides. `rope_switch`: beyond this length its rotary factors change (longrope), for all that is
    computed together.
    """

    trees: bool
    window: int | None
    rope_switch: int | None

    def pack(self, tree: PromptTree) -> bool:
        """Whether the tree may be packed; otherwise its branches are padded rows."""
        return self.trees and (self.window is None or tree.longest <= self.window)

    def regime(self, tree: PromptTree) -> tuple[bool, bool]:
        """Only trees of the same regime may be computed together."""
        return self.pack(tree), self.rope_switch is not None and tree.longest > self.rope_switch


def limits_of(model: PreTrainedModel) -> Limits:
    """The limits of a model as `load_base` returns it, wrapped by PEFT or not."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return Limits(
        trees=config._attn_implementation == NAME,
        window=getattr(config, "sliding_window", None),
        rope_switch=rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None,
    )


def enable_trees(model: PreTrainedModel) -> None:
    """Let the model's attention read trees, where its architecture allows it."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    softcap = getattr(config, "attn_logit_softcapping", None)
    if model._supports_attention_backend and not softcap and kinds <= {"full_attention", "sliding_attention"}:
        model.set_attn_implementation(NAME)


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    *,
    segments: Sequence[Segment] | None = None,
    scaling: float | None = None,
    take: Callable[[Tensor, int], Tensor] | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, in every row the same: query [rows, heads, T, width] → [rows, T, heads, width].

    `segments` is `pack_trees`' entry of that name, and `take` may provide the memory of what a CPU computes: see
    `bapo.training.arena`. Dropout is not applied inside trees.
    """
    if segments is None:
        if query.shape[2] == 1 and attention_mask is None:
            return _attend_to_all(query, key, value, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, kernel_options=FLEX_KERNEL
        )[0], None
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64):
        return _TreeAttention.apply(query, key, value, scaling, segments, take), None
    return _attend_by_segment(query, key, value, scaling, segments), None


def _attend_by_segment(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, segments) -> Tensor:
    """Attention of a tree on any device, with autograd's own way back."""
    output = torch.empty_like(query.transpose(1, 2))
    for start, before, place, length in segments:
        prefix, own = slice(start, start + before), slice(place, place + length)
        part, keys, values, mask = _inputs(query, key, value, prefix, own)
        attended = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scaling)
        output[:, own] = attended.reshape(query[:, :, own].shape).transpose(1, 2)
    return output


class _TreeAttention(torch.autograd.Function):
    """The same on the CPU, through kernels of our own."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, segments, take=None) -> Tensor:
        states = [states.transpose(1, 2).contiguous() for states in (query, key, value)]
        rows, length, heads, width = states[0].shape
        lines = states[0].view(rows * length, heads * width)
        output = (take(lines, heads * width) if take else torch.empty_like(lines)).view(states[0].shape)
        sums = query.new_empty(rows, heads, length)
        ctx.scaling, ctx.segments = width**-0.5 if scaling is None else scaling, _by_cost(segments)
        attend_trees(*arrays(*states), ctx.segments, ctx.scaling, *arrays(output, sums), torch.get_num_threads())
        ctx.save_for_backward(*states, output, sums)
        return output

    @staticmethod
    def backward(ctx, upstream: Tensor):
        states = ctx.saved_tensors
        gradients = [torch.empty_like(one) for one in states[:3]]
        attend_trees_backward(
            *arrays(upstream.contiguous(), *states), ctx.segments, ctx.scaling, *arrays(*gradients),
            torch.get_num_threads(),
        )  # fmt: skip
        return *(one.transpose(1, 2) for one in gradients), None, None, None


def arrays(*tensors: Tensor) -> Any:
    """The same memory, for compiled loops."""
    return [tensor.detach().numpy() for tensor in tensors]


def _by_cost(segments: Sequence[Segment]) -> np.ndarray:
    """As the kernels take them, those with the most to do first."""
    return np.array(sorted(segments, key=lambda segment: -segment[3] * (2 * segment[1] + segment[3])))


def _inputs(query: Tensor, key: Tensor, value: Tensor, prefix: slice, own: slice) -> tuple[Tensor, ...]:
    """Queries of `own`, keys and values of `prefix` and `own`, and the mask between them, as SDPA takes them."""
    keys, values = (torch.cat([states[:, :, prefix], states[:, :, own]], 2) for states in (key, value))
    copies = query.shape[1] // key.shape[1]
    mask = _mask(own.stop - own.start, keys.shape[2], copies, query.dtype, query.device)
    return _below(query[:, :, own], key.shape[1]), keys, values, mask


def _below(states: Tensor, key_heads: int) -> Tensor:
    """Query heads that share a key head below each other, so that the keys need not be repeated."""
    return states.reshape(states.shape[0], key_heads, -1, states.shape[3])


@lru_cache(maxsize=24)  # about what one sequence has branches: its layers share the masks
def _mask(span: int, seen: int, copies: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of the last `span` of `seen` positions: 0 up to its own, −∞ behind; so many below
    each other, [copies · span, seen]."""
    with torch.inference_mode(False):  # scoring may come first, and training then keep it for the way back
        future = torch.full((span, seen), -torch.inf, dtype=dtype, device=device).triu(seen - span + 1)
        return future.repeat(copies, 1)


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Attention of one decoded position to all positions; query [rows, heads, 1, width] → [rows, 1, heads, width]."""
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
    output = F.scaled_dot_product_attention(grouped, key, value, scale=scaling)
    return output.reshape(rows, 1, heads, -1)


def block_mask(segments: Sequence[Segment], device: torch.device) -> BlockMask:
    """The same attention as a block mask for flex attention (CUDA)."""
    ordered = torch.tensor(sorted(segments, key=lambda segment: segment[2]), device=device)
    prefix, before, own, lengths = ordered.T
    prefix, before, own = (torch.repeat_interleave(part, lengths) for part in (prefix, before, own))

    def visible(batch, head, query, key):
        in_prefix = (key >= prefix[query]) & (key < prefix[query] + before[query])
        return in_prefix | ((key >= own[query]) & (key <= query))

    return create_block_mask(visible, None, None, len(own), len(own), device=str(device))


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
