"""Attention over packed prompt trees, as an attention implementation of transformers.

Every branch attends to its prefix and to itself, so a packed sequence costs what its branches cost
alone, not its length squared. Models reach it through their configuration's attention
implementation, `NAME`; a call without a tree is the library's SDPA.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bapo.inference.prefix_tree import PREFIX, PromptTree

NAME = "prefix_tree"
# What F.scaled_dot_product_attention calls on a CPU; its way back is part of autograd alone.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    tree: Sequence[Sequence[int]] | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of a packed sequence, in every row the same: query [rows, heads, T, width] → [rows, T, heads, width].

    `tree` is `pack_trees`' entry of that name. Dropout is not applied inside trees.
    """
    if tree is None:
        if query.shape[2] == 1 and attention_mask is None:
            return _attend_to_all(query, key, value, scaling), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if isinstance(attention_mask, BlockMask):
        return flex_attention_forward(module, query, key, value, attention_mask, scaling=scaling)[0], None
    if query.device.type == "cpu":
        return _TreeAttention.apply(query, key, value, scaling, tree), None
    return _attend_by_segment(query, key, value, scaling, tree), None


def _attend_by_segment(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, tree) -> Tensor:
    """Attention of a tree on any device, with autograd's own way back."""
    output = torch.empty_like(query.transpose(1, 2))
    for prefix, own in _segments(tree):
        part, keys, values, mask = _inputs(query, key, value, prefix, own)
        attended = F.scaled_dot_product_attention(part, keys, values, attn_mask=mask, scale=scaling)
        output[:, own] = attended.reshape(query[:, :, own].shape).transpose(1, 2)
    return output


class _TreeAttention(torch.autograd.Function):
    """The same on the CPU: autograd would keep a prefix's keys and values with every branch, and the output twice."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, tree) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        sums = []
        for prefix, own in _segments(tree):
            part, keys, values, mask = _inputs(query, key, value, prefix, own)
            attended, logsumexp = CPU_ATTENTION(part, keys, values, attn_mask=mask, scale=scaling)
            output[:, own] = attended.reshape(query[:, :, own].shape).transpose(1, 2)
            sums.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *sums)
        ctx.scaling, ctx.tree = scaling, tree
        return output

    @staticmethod
    def backward(ctx, upstream: Tensor):
        query, key, value, output, *sums = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        live = torch.linalg.vector_norm(upstream, 1, dim=(0, 2, 3)) != 0
        for (prefix, own), logsumexp in zip(_segments(ctx.tree), sums, strict=True):
            if not live[own].any():  # a response on which the loss does not depend
                to_query[:, :, own] = 0
                continue
            part, keys, values, mask = _inputs(query, key, value, prefix, own)
            above, attended = (_below(states.transpose(1, 2)[:, :, own], key.shape[1]) for states in (upstream, output))
            of_part, of_keys, of_values = CPU_ATTENTION_BACKWARD(
                above, part, keys, values, attended, logsumexp, 0.0, False, attn_mask=mask, scale=ctx.scaling
            )
            to_query[:, :, own] = of_part.reshape(query[:, :, own].shape)
            seen = prefix.stop - prefix.start
            for whole, one in ((to_key, of_keys), (to_value, of_values)):
                whole[:, :, prefix] += one[:, :, :seen]
                whole[:, :, own] += one[:, :, seen:]
        return to_query, to_key, to_value, None, None


def _segments(tree: Sequence[Sequence[int]]) -> Iterator[tuple[slice, slice]]:
    """(prefix, own) of every prefix, before which nothing stands, and of every branch, as places in the sequence."""
    start = 0
    for length, *branches in tree:
        prefix = slice(start, start + length)
        if length:
            yield slice(start, start), prefix
        start = prefix.stop
        for branch in branches:
            yield prefix, slice(start, start + branch)
            start += branch


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


def block_mask(branches: Tensor, tree: Sequence[Sequence[int]]) -> BlockMask:
    """The same attention as a block mask for flex attention (CUDA); `branches` as `pack_trees` numbers them, [1, T]."""
    own = branches[0]
    group = torch.repeat_interleave(torch.tensor([sum(lengths) for lengths in tree], device=own.device))

    def visible(batch, head, query, key):
        return (query >= key) & (group[query] == group[key]) & ((own[key] == PREFIX) | (own[key] == own[query]))

    return create_block_mask(visible, None, None, len(own), len(own), device=str(own.device))


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
