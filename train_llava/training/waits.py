"""Spares a training step waits of the host for the GPU: after each, the GPU has nothing to do for a moment."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_positions(model: nn.Module, positions: torch.Tensor) -> RemovableHandle:
    """Shows the head these positions `(N,)` of all rows `(B x T)` alone. A mask would make the host wait."""
    return model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: inputs[0].flatten(0, 1).index_select(0, positions)
    )


def check_losses(losses: list[tuple[list[str], torch.Tensor]], step: int) -> None:
    """Raises a ValueError with the records of a loss that is not finite. All are there after a wait for gradients."""
    for ids, loss in losses:
        if not loss.isfinite():
            raise ValueError(f"step {step}: the loss is {loss} at the records {', '.join(map(repr, ids))}")
    losses.clear()


def check_on_device(model: nn.Module) -> None:
    """Lets the device compare the numbers of image tokens and features; the model's own check makes the host wait."""

    def placeholder_mask(input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor) -> Any:
        mask = (input_ids == model.config.image_token_id)[..., None]
        equal = mask.sum() * inputs_embeds.shape[-1] == image_features.numel()
        torch._assert_async(equal, "image features and image tokens do not match")
        return mask

    model.model.get_placeholder_mask = placeholder_mask


def wait_once_for_norm(optimizer: Any) -> None:
    """Lets ZeRO-2 wait for the norm of the gradients once, and not for each group of parameters."""
    if hasattr(optimizer, "scaled_global_norm"):
        norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: norm().cpu()
