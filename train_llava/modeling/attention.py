"""Attention in a packed row, one conversation at a time, so that the cost is not that of one long text."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"  # an attention implementation for which transformers makes no mask


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The `sdpa` of transformers and, with `cu_seq_lens_q`, the same outcome for a packed row.

    On a GPU, one call computes all conversations, without a mask. On a CPU, each is computed by itself, under its
    own part of the mask `(1, 1, T, T)`.

    Args:
        query, key, value: `(1, heads, T, width)`.
        cu_seq_lens_q: where the row's conversations begin, and T, `(conversations + 1,)`, int32.
        max_length_q: the tokens of the longest.

    Returns:
        `(1, T, heads, width)`, and nothing in place of the probabilities.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    # One call, on a GPU
    if module.config._attn_implementation == PACKED:
        rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # (T, heads, width)
        window = kwargs.get("sliding_window")
        outputs = varlen_attn(
            *rows,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=kwargs.get("scaling"),
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return outputs[None], None

    # One conversation after the other. A split has one gradient; each slice would have one of the row's size
    lengths = cu_seq_lens_q.diff().tolist()
    parts = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs, stop = [], 0
    for length, *inputs in zip(lengths, *parts, strict=True):
        part = slice(stop, stop := stop + length)
        mask = None if attention_mask is None else attention_mask[..., part, part]
        outputs.append(sdpa_attention_forward(module, *inputs, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def use_packed_attention() -> None:
    """Lets models with `sdpa` take `cu_seq_lens_q`; without it, nothing changes for them."""
    AttentionInterface.register("sdpa", packed_attention)
    AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def in_one_call(language_model: nn.Module | None) -> Iterator[None]:
    """A model with `sdpa`, if there is one, computes the attention of packed rows in one call a layer.

    It must enclose the backward pass, too: activation checkpointing computes the attention again.
    """
    if language_model is None or language_model.config._attn_implementation != "sdpa":
        yield
        return
    config = language_model.config
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def packed_arguments(lengths: list[int], device: torch.device | str = "cpu") -> dict[str, Any]:
    """A model's arguments to keep the conversations of a row apart; `lengths` are their numbers of tokens.

    `position_ids` `(1, T)` count from 0 in each, and `use_cache` is False. With the others, attention skips the
    pairs of tokens of two conversations. transformers' own flash attention takes them, too.
    """
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    longest = max(lengths)
    return {
        "position_ids": position_ids,
        "use_cache": False,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
