"""Before a long run, what would fail after hours is tried once: a step, saving, and reading back what was saved."""

import resource
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.checkpoint import count_parameters, load_checkpoint
from train_llava.data import CheckedDataset
from train_llava.trainer import LlavaTrainer, read_back


def longest_batch(trainer: LlavaTrainer) -> dict[str, Any]:
    """One rank's batch of the longest records of the data, or of a stream's first."""
    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if isinstance(dataset, CheckedDataset):
        items = [dataset[int(i)] for i in np.argsort(dataset.dataset.lengths())[-size:]]
    else:
        items = list(islice(dataset, size))
    batch = trainer.data_collator(items)
    del batch["ids"]
    return trainer._prepare_inputs(batch)


def loss_of(trainer: LlavaTrainer, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a batch, in the precision that the run computes in."""
    with trainer.compute_loss_context_manager():
        return model(**batch).loss


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of the GPU, or, without one, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def preflight(trainer: LlavaTrainer, load_base: Callable[[], tuple[nn.Module, Any]]) -> None:
    """Tries forward, backward, saving and reading back on one rank, and says what memory the run will take.

    The model's weights, and the random numbers that the run will draw, stay as they are. `load_base` opens, once more,
    the checkpoint that the run starts from: a saved adapter is read back on top of it.

    Raises:
        ValueError: the loss or a gradient is missing or not finite, or the saved model is not the one in memory.
    """
    if trainer.is_world_process_zero():
        if is_deepspeed_zero3_enabled():
            print("preflight left out: under ZeRO-3 no rank holds the whole model")
        else:
            with torch.random.fork_rng():
                _try_once(trainer, load_base)
    trainer.accelerator.wait_for_everyone()


def _try_once(trainer: LlavaTrainer, load_base: Callable[[], tuple[nn.Module, Any]]) -> None:
    args = trainer.args
    model = trainer.model.to(args.device).train()
    batch = longest_batch(trainer)
    loss = loss_of(trainer, model, batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not torch.isfinite(parameter.grad).all()):
            fault = "no gradient" if parameter.grad is None else "a gradient that is not finite"
            raise ValueError(f"preflight: {name} gets {fault} (loss {loss.item():.4f})")
    model.zero_grad()
    peak = peak_memory(args.device)

    folder = Path(args.output_dir) / "preflight"
    try:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        read_back(folder, model)
        with torch.no_grad():
            expected = loss_of(trainer, model.eval(), batch).item()
            if isinstance(model, PeftModel):
                base, _ = load_base()
                again = PeftModel.from_pretrained(base, folder)
            else:
                again, _ = load_checkpoint(str(folder), "auto")
            found = loss_of(trainer, again.to(args.device).eval(), batch).item()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not abs(found - expected) <= (1e-4 if model.dtype == torch.float32 else 2e-2) * abs(expected):
        raise ValueError(f"preflight: the loss is {expected:.6f}, and {found:.6f} once saved and read back")

    trains = sum(trainable for trainable, _ in count_parameters(model).values())
    # AdamW's two moments and, under DeepSpeed, the fp32 weights, each rank holding its part of them under ZeRO
    optimizer = trains * (12 / args.world_size if trainer.is_deepspeed_enabled else 8)
    print(
        f"preflight: {len(batch['labels'])} of the longest records forward and backward, saved, read back alike (loss "
        f"{expected:.4f}); {peak / 1e9:.1f} GB, and {optimizer / 1e9:.1f} GB more a rank for the optimizer"
    )
