"""Spares a training step waits of the host for the GPU: in each, the GPU soon has nothing to do."""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def keep_positions(model: nn.Module, positions: torch.Tensor) -> RemovableHandle:
    """Lets the head see these positions `(N,)` of all rows `(B x T)` alone, until the handle is left.

    `logits_to_keep` as a mask does the same, but the host has to wait for the number of positions.
    """

    def select(_: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].flatten(0, 1).index_select(0, positions),)

    return model.get_output_embeddings().register_forward_pre_hook(select)


def check_losses(losses: list[tuple[list[str], torch.Tensor]], step: int) -> None:
    """Stops a run at a loss that is not finite, and names the records of its batch. Empties the list.

    The losses have been copied without a wait: they are there after the next wait for a later result.
    """
    for ids, loss in losses:
        if not loss.isfinite():
            raise ValueError(f"step {step}: the loss is {loss} at the records {', '.join(map(repr, ids))}")
    losses.clear()


def check_on_device(model: nn.Module) -> None:
    """Lets the device check that a batch has as many image tokens as features. Otherwise, the host waits for it."""
    image_token_id = model.config.image_token_id

    def placeholder_mask(
        input_ids: torch.Tensor, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        mask = (input_ids == image_token_id)[..., None]
        equal = mask.sum() * inputs_embeds.shape[-1] == image_features.numel()
        torch._assert_async(equal, "image features and image tokens do not match")
        return mask

    model.model.get_placeholder_mask = placeholder_mask


def wait_once_for_norm(optimizer: Any) -> None:
    """Lets ZeRO-2 wait for the norm of the gradients once, and not for each group of parameters."""
    if hasattr(optimizer, "scaled_global_norm"):
        norm = optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: norm().cpu()
