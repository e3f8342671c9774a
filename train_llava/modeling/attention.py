"""Attention in a packed row, one conversation at a time: the cost is not that of the whole row squared."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend_to_each(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    conversation_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The `sdpa` of transformers and, with `conversation_lengths`, the same outcome for a packed row.

    What the mask (1, 1, T, T) keeps apart is computed apart, under its own part of the mask.

    Args:
        query, key, value: `(1, heads, T, width)`.
        conversation_lengths: of the row's conversations, in order; T together.

    Returns:
        `(1, T, heads, width)`, and nothing in place of the probabilities.
    """
    if conversation_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, stop = [], 0
    # a split has one gradient, where each slice would have one of the whole row's size
    parts = (states.split(conversation_lengths, dim=2) for states in (query, key, value))
    for length, *inputs in zip(conversation_lengths, *parts, strict=True):
        part = slice(stop, stop := stop + length)
        mask = None if attention_mask is None else attention_mask[..., part, part]
        outputs.append(sdpa_attention_forward(module, *inputs, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def use_conversation_lengths() -> None:
    """Lets models with `sdpa` take `conversation_lengths`; without, nothing changes for them."""
    AttentionInterface.register("sdpa", attend_to_each)
