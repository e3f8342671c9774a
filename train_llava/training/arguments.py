"""Refuses, before anything is loaded, arguments of a run that do not go together."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from train_llava.dataset.weights import weights_of
from train_llava.evaluation.answers import LOGGED

# What `TrainingArguments` has and a LLaVA's training here cannot follow, or would pass over in silence
UNSUPPORTED = (
    "batch_eval_metrics",
    "debug",
    "fsdp",
    "include_for_metrics",
    "label_names",
    "label_smoothing_factor",
    "prediction_loss_only",
    "remove_unused_columns",
)


def check_argument_pairs(adapter: str | None, bits: int | None, data_arguments: Any, args: TrainingArguments) -> None:
    """Refuses arguments of training that need each other, or shut each other out.

    Raises:
        ValueError: the message names them.
    """
    if adapter is not None and (args.train_type != "lora" or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "--adapter_name_or_path goes with --train_type lora, and not with ZeRO-3: merge_lora it first"
        )
    if bits and (args.train_type != "lora" or is_deepspeed_zero3_enabled()):
        raise ValueError("--bits goes with --train_type lora, and not with ZeRO-3: weights in few bits cannot train")
    for field in fields(args):
        if field.name in UNSUPPORTED and (value := getattr(args, field.name)) not in (field.default, []):
            raise ValueError(f"--{field.name} {value} is not supported: leave it out")
    weights_of(data_arguments.data_path, data_arguments.data_weights)
    if args.save_dtype != "auto" and args.train_type == "lora":
        raise ValueError("--save_dtype is for whole models, and lora writes an adapter: leave it out")
    if data_arguments.streaming and args.max_steps <= 0:
        raise ValueError("--streaming has no end: set --max_steps")
    if args.tokens_per_batch is not None:
        if not data_arguments.packing:
            raise ValueError("--tokens_per_batch fills the rows of --packing true: set it, too")
        if data_arguments.streaming:
            raise ValueError("--tokens_per_batch counts all records beforehand: not with --streaming")
    for option, given, orders in (
        ("--streaming", data_arguments.streaming, ("random",)),
        ("--tokens_per_batch", args.tokens_per_batch is not None, ("random", "sequential")),
        ("data of pictures and texts", True, ("random", "sequential", "group_by_length")),
    ):
        if given and args.train_sampling_strategy not in orders:
            raise ValueError(f"{option} not with --train_sampling_strategy {args.train_sampling_strategy}")
    if data_arguments.eval_data_path is None:
        given = {"eval_strategy": args.eval_strategy != "no", "save_strategy best": args.save_strategy == "best"}
        given |= {name: getattr(data_arguments, name) for name in ("eval_answers", "eval_image_dir")}
        given |= {name: getattr(args, name) for name in ("early_stopping_patience", "eval_on_start")}
        if any(given.values()):
            raise ValueError(f"--{next(filter(given.get, given))} takes held-out data: set --eval_data_path")


def check_batches(number: int, args: TrainingArguments) -> None:
    """Refuses data, so many records or packed rows, of which `--dataloader_drop_last` leaves nothing.

    Raises:
        ValueError: they are less than one batch on every rank.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and number < batch:
        raise ValueError(f"--dataloader_drop_last leaves nothing of {number} records: all ranks' batch is {batch}")


def check_training_options(args: TrainingArguments, model: nn.Module, eval_answers: int) -> None:
    """Asks the libraries for what the arguments name, before data is read or anything written.

    Raises:
        ValueError: there is nothing of that name, or it needs a package that is not installed.
    """
    measured, metric = ["loss", *LOGGED] if eval_answers else ["loss"], args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise ValueError(f"--metric_for_best_model {metric}: this run measures {', '.join(measured)}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel")
    scheduled = (args.lr_scheduler_type, SGD([torch.zeros(1)]), 1, 2, args.lr_scheduler_kwargs)
    compiled = {"mode": args.torch_compile_mode, "backend": args.torch_compile_backend}
    options = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    loading = {option: getattr(args, f"dataloader_{option}") for option in options}
    asked = {
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args, model),
        "lr_scheduler_type": lambda: get_scheduler(*scheduled),
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
        "torch_compile": lambda: args.torch_compile and torch.compile(nn.Identity(), **compiled),
        "dataloader_num_workers": lambda: DataLoader([0], **loading),
    }
    for name, ask in asked.items():
        try:
            ask()
        except (RuntimeError, TypeError, ValueError) as error:
            value = getattr(args, name)
            raise ValueError(f"--{name} {getattr(value, 'value', value)}, or what goes with it: {error}") from error
