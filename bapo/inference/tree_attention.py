"""Attention over packed prompt trees, as an attention implementation of transformers.

Every branch attends to its prefix and to itself, so a packed sequence costs what its branches cost
alone, not its length squared. Models reach it through their configuration's attention
implementation, `NAME`; a call without a tree is the library's SDPA.
"""

from collections.abc import Sequence
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
    lengths = [length for group in tree for length in group]
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for group in tree:
        prefix_query, prefix_key, prefix_value = next(parts)
        if group[0]:
            outputs.append(_attend(prefix_query, prefix_key, prefix_value, scaling))
        for _ in group[1:]:
            branch_query, branch_key, branch_value = next(parts)
            keys = torch.cat([prefix_key, branch_key], 2)
            values = torch.cat([prefix_value, branch_value], 2)
            outputs.append(_attend(branch_query, keys, values, scaling))
    return torch.cat(outputs, 1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of the last Q of K positions; query [rows, heads, Q, width] → [rows, Q, heads, width]."""
    rows, heads, span, seen = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    # Query heads that share a key head stand below each other, so that the keys need not be repeated.
    shared = heads // key.shape[1]
    output = F.scaled_dot_product_attention(
        query.reshape(rows, key.shape[1], shared * span, -1),
        key,
        value,
        attn_mask=_mask(span, seen, shared, query.dtype, query.device),
        scale=scaling,
    )
    return output.reshape(rows, heads, span, -1).transpose(1, 2)


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
