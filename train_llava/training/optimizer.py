"""The parameters that train: their precision, their learning rates, and whether they are finite."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from train_llava.model import TRAIN_TYPES, count_parameters, part_of


def use_float32(model: nn.Module, train_type: str) -> None:
    """Puts the parameters that train into float32: half precision is too coarse for small updates.

    If the vision tower trains, its unused norms follow, since they would not take float32 inputs.
    """
    for parameter in model.parameters():
        if parameter.requires_grad or "vision tower" in TRAIN_TYPES[train_type][1]:
            parameter.data = parameter.data.float()


def describe_trainable(model: nn.Module, learning_rates: dict[str, float]) -> str:
    """Writes a table of each part's trainable parameters, all its parameters, and its learning rate."""
    lines = [f"{'':<16}{'trainable':>16}{'of':>16}{'learning rate':>16}"]
    for part, (trainable, total) in count_parameters(model).items():
        rate = f"{learning_rates[part]:g}" if trainable else ""
        lines.append(f"{part:<16}{trainable:>16,}{total:>16,}{rate:>16}".rstrip())
    # With LoRA: parameters of the layers that get no adapter, such as a mixture's experts
    if isinstance(model, PeftModel):
        parameters = model.get_decoder().layers.named_parameters()
        uncovered = {name.partition(".")[2] for name, p in parameters if p.ndim > 2 and "lora_" not in name}
        if uncovered:
            lines.append(f"no adapter on {', '.join(sorted(uncovered))}: no linear layers")
        if any(name.endswith("image_newline") for name, _ in model.named_parameters()):
            lines.append("image_newline stays as it is: PEFT saves modules, and this is none")
    return "\n".join(lines)


def check_finite(model: nn.Module, where: str) -> None:
    """Raises a ValueError if a parameter that trains is not finite; the message begins with `where`."""
    for name, parameter in model.named_parameters():
        # Under ZeRO-3, a rank holds a part of each parameter
        if parameter.requires_grad and not getattr(parameter, "ds_tensor", parameter).isfinite().all():
            raise ValueError(f"{where}: {name} is not finite")


def split_by_part(optimizer: torch.optim.Optimizer, model: nn.Module, learning_rates: dict[str, float]) -> None:
    """Splits an optimizer's groups, with and without weight decay, by part of the model, each at its rate.

    `learning_rates` are by the names of `part_of`. The log shows that of the last part.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for part in reversed(learning_rates):
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if part_of(names[parameter]) == part]
            if parameters:
                groups.append(group | {"params": parameters, "lr": learning_rates[part]})
    optimizer.param_groups[:] = groups


def restore_settings(
    optimizer: torch.optim.Optimizer, scheduler: LRScheduler, group_settings: list[dict[str, Any]]
) -> None:
    """Sets rates, decay and schedule to those of the arguments, after a checkpoint has loaded its own.

    `group_settings` are the groups before that. A schedule that is no `LambdaLR` computes its rate from the scores so
    far, and keeps it.
    """
    groups = optimizer.param_groups
    for group, settings in zip(groups, group_settings, strict=True):
        group |= {name: settings[name] for name in ("weight_decay", "betas", "eps") if name in settings}
    # A schedule is a factor of the first rate for each step
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [settings["initial_lr"] for settings in group_settings]
        for group, rate, factor in zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor(scheduler.last_epoch)}
        scheduler._last_lr = [group["lr"] for group in groups]
