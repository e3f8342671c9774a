"""liger-kernel's GPU kernels in the language model, whose logits they must not change."""

import sys

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.liger import apply_liger_kernel

from train_llava.modeling.verification import difference, tolerance
from train_llava.trainer import LlavaTrainer
from train_llava.training.memory import precision


def use_liger(trainer: LlavaTrainer, language_model: nn.Module) -> None:
    """Lets liger-kernel compute what it knows of a language model (norms, rotary embedding, MLPs), and not the loss.

    Raises a ValueError if a kernel does not run here, or changes the logits by more than noise.
    """
    args, whole = trainer.args, not is_deepspeed_zero3_enabled()  # under ZeRO-3 no rank holds the whole model

    @torch.no_grad()
    def logits() -> torch.Tensor:
        model = trainer.model.to(args.device).eval()
        with trainer.accelerator.autocast():
            return model(input_ids=torch.arange(16, device=args.device)[None], use_cache=False).logits

    # liger-kernel also replaces the classes, but its own have no biases: a checkpoint opened later may need them
    names = vars(sys.modules[type(language_model).__module__])
    classes = {name: value for name, value in names.items() if isinstance(value, type)}
    refused = f"--use_liger_kernel: leave it out, since this {language_model.config.model_type}"
    before = logits() if whole else None
    try:
        apply_liger_kernel(language_model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        apart = difference(logits(), before) if whole else 0.0
    except Exception as error:  # of any type: some of its functions cannot do without an output layer
        raise ValueError(f"{refused} does not run with it here: {error}") from error
    names.update(classes)
    if not apart <= tolerance(precision(args)):
        raise ValueError(f"{refused} has other logits with it (by {apart:.0e} of the largest)")
