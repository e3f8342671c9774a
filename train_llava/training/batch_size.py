"""Divides `--global_batch_size` into batches; `--per_device_train_batch_size auto` takes the largest that fits."""

import os
import platform
from bisect import bisect_left
from contextlib import suppress
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object, release_memory
from torch import nn
from transformers import TrainingArguments

from train_llava.data import CheckedDataset, LlavaCollator
from train_llava.dataset.lengths import count_tokens
from train_llava.model import LoraArguments, load_config
from train_llava.training.checkpointing import on_first_rank
from train_llava.training.memory import MODEL_STATES, estimate_memory, print_estimate

# The share of the free memory that a batch may take. Estimates were up to 9 % too low (docs/speed.md), and gaps
# between tensors come on top; the preflight finds what this does not cover
SHARE = 0.9


def divide_batch(args: TrainingArguments) -> list[tuple[int, bool]] | None:
    """Lets `gradient_accumulation_steps` follow from `--global_batch_size`, while `args` are made.

    Returns, for `auto`, the batches of a rank to try: numbers of records, and whether activations are recomputed. A
    ValueError says that the total is missing, or cannot be divided so.
    """
    size, total, steps = args.per_device_train_batch_size, args.global_batch_size, args.gradient_accumulation_steps
    is_auto, ranks = size == "auto", int(os.environ.get("WORLD_SIZE", 1))
    if is_auto or args.tokens_per_batch is not None:  # a batch of --tokens_per_batch is one row
        size = 1
    if total is not None:
        follows, rest = divmod(total, size * ranks)
        if rest:
            at_once = f"batches of {size} on {ranks} ranks: take {max(follows, 1) * size * ranks}"
            raise ValueError(f"--global_batch_size {total} cannot be divided into {at_once}")
        if steps is not None and (is_auto or steps != follows):
            raise ValueError(f"--gradient_accumulation_steps {steps} follows from --global_batch_size: leave it out")
        steps = follows
    elif is_auto:
        raise ValueError("--per_device_train_batch_size auto divides a total: set --global_batch_size, such as 128")
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, steps or 1
    if not is_auto:
        return None
    given = args.gradient_checkpointing if args.activation_checkpointing is None else args.activation_checkpointing
    sizes = [n for n in range(steps, 0, -1) if steps % n == 0 and (n == 1 or args.tokens_per_batch is None)]
    return [(n, recompute) for recompute in (False, True) if given in (None, recompute) for n in sizes]


def take_batch(args: TrainingArguments, size: int, recompute: bool) -> None:
    """Sets one of `args.batches`, in DeepSpeed's configuration, too, which is filled in by now."""
    args.per_device_train_batch_size, args.activation_checkpointing = size, recompute
    args.gradient_accumulation_steps = args.global_batch_size // (args.world_size * size)
    if args.deepspeed is not None:
        config = args.hf_deepspeed_config.config
        config["train_micro_batch_size_per_gpu"] = size
        config["gradient_accumulation_steps"] = args.gradient_accumulation_steps


def recompute_activations(model: nn.Module, args: TrainingArguments) -> None:
    """Activation checkpointing of the language model alone: the Trainer would recompute a frozen tower, too."""
    if args.activation_checkpointing:
        model.get_decoder().activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        args.activation_checkpointing = False


def choose_batch(
    args: TrainingArguments,
    model: nn.Module,
    lora_arguments: LoraArguments,
    bits: int | None,
    dataset: Any,
    collator: LlavaCollator,
) -> None:
    """Takes the largest batch without recomputation, otherwise with it, that is estimated to fit every rank.

    `args.batches` are then this one and what the preflight may try after it.
    """
    # What is free, or holds the model already. Without GPUs, the ranks of a node share its memory
    ranks_here = gather_object([platform.node()]).count(platform.node())
    free = psutil.virtual_memory().available / ranks_here + model.get_memory_footprint()
    if args.device.type == "cuda":
        free = torch.cuda.mem_get_info(args.device)[0] + torch.cuda.memory_reserved(args.device)
    free = SHARE * min(gather_object([free]))

    def fitting() -> list[tuple[int, bool]]:
        # Every record of a batch counts as the longest of the data; of a stream, only the limit is known
        chat, longest, batches = collator.chat, [collator.chat.longest] * 3, args.batches
        if isinstance(dataset, CheckedDataset):
            batches = [batch for batch in batches if batch[0] == 1 or batch[0] * args.world_size <= len(dataset)]
            counts = count_tokens(dataset.records, chat)
            tokens, image_tokens = counts[counts[:, 0] <= chat.longest].T
            blank = len(chat.picture_ids((chat.side, chat.side))) * (image_tokens == 0)
            columns = (tokens + blank, image_tokens, tokens - image_tokens)
            longest = [int(column.max(initial=1)) for column in columns]
        longest[0] += -longest[0] % collator.multiple
        run = (model.config.name_or_path, lora_arguments, args, bits, collator.packing, None, longest)

        def fits(batch: tuple[int, bool]) -> bool:
            take_batch(args, *batch)
            sizes, optimizer_step, _ = estimate_memory(load_config(run[0]), *run[1:])
            states = sum(sizes[name] for name in MODEL_STATES)
            return max(sum(sizes.values()), states + optimizer_step) <= free

        fit: list[tuple[int, bool]] = []
        with suppress(Exception):  # of any type; `print_estimate` says why there is no estimate
            for recompute in (False, True):
                alike = [batch for batch in batches if batch[1] == recompute]
                fit = fit or alike[bisect_left(alike, True, key=fits) :]
        fit = fit or batches[-1:]
        take_batch(args, *fit[0])
        print_estimate(*run)
        return fit + [batch for batch in batches if batch[0] <= fit[0][0] and batch[1] > fit[0][1]]

    args.batches = on_first_rank(args, fitting)
    take_batch(args, *args.batches[0])
    print_batch(args, f"for {free / 1e9:.1f} GB")


def next_batch(args: TrainingArguments, model: nn.Module) -> None:
    """Goes on to the next of `args.batches`, since memory ran out."""
    release_memory()
    (size, _), *args.batches = args.batches
    take_batch(args, *args.batches[0])
    print_batch(args, f"since {size} do not fit")
    recompute_activations(model, args)


def print_batch(args: TrainingArguments, reason: str) -> None:
    """Prints how a step's records are divided."""
    if args.process_index == 0:
        how = "with" if args.activation_checkpointing else "without"
        parts = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        text = "batch: {} x {} accumulation steps x {} ranks".format(*parts)
        print(f"{text} = {args.global_batch_size}, {how} activation checkpointing, {reason}")
