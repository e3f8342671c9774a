"""Refuses arguments of a run that do not go together, before anything is loaded."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from train_llava.dataset.weights import weights_of
from train_llava.evaluation.answers import LOGGED
from train_llava.model import LORA_PARTS

# Arguments of `TrainingArguments` that a LLaVA's training cannot follow, or would ignore without a word
UNSUPPORTED = {"batch_eval_metrics", "debug", "fsdp", "include_for_metrics", "label_names"}
UNSUPPORTED |= {"label_smoothing_factor", "prediction_loss_only", "remove_unused_columns"}


def check_argument_pairs(model_arguments: Any, data_arguments: Any, args: TrainingArguments) -> None:
    """Raises a ValueError if one argument of training needs, or excludes, another; the message names both."""
    # Options that only LoRA has, and one that it has not
    if args.train_type not in LORA_PARTS or is_deepspeed_zero3_enabled():
        reason = "goes with --train_type lora or lora_all, and not with ZeRO-3"
        if model_arguments.adapter_name_or_path is not None:
            raise ValueError(f"--adapter_name_or_path {reason}: merge_lora it first")
        if model_arguments.bits:
            raise ValueError(f"--bits {reason}: weights in few bits cannot train")
    if args.save_dtype != "auto" and args.train_type in LORA_PARTS:
        raise ValueError(f"--save_dtype is for whole models, and {args.train_type} writes an adapter: leave it out")
    if args.train_type == "projector" and "projector" in args.frozen_parts:
        raise ValueError("--projector_learning_rate 0 freezes all that --train_type projector trains: leave it out")
    # Arguments of `TrainingArguments` that a LLaVA cannot follow
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in UNSUPPORTED and value not in (field.default, []):
            raise ValueError(f"--{field.name} {value} is not supported: leave it out")

    # The data and its order
    streaming, tokens, order = data_arguments.streaming, args.tokens_per_batch, args.train_sampling_strategy
    weights_of(data_arguments.data_path, data_arguments.data_weights)
    if streaming and args.max_steps <= 0:
        raise ValueError("--streaming has no end: set --max_steps")
    if tokens is not None and not data_arguments.packing:
        raise ValueError("--tokens_per_batch fills the rows of --packing true: set it, too")
    if tokens is not None and streaming:
        raise ValueError("--tokens_per_batch counts all records beforehand: not with --streaming")
    for option, is_given, orders in (
        ("--streaming", streaming, ("random",)),
        ("--tokens_per_batch", tokens is not None, ("random", "sequential")),
        ("data of pictures and texts", True, ("random", "sequential", "group_by_length")),
    ):
        if is_given and order not in orders:
            raise ValueError(f"{option} not with --train_sampling_strategy {order}")
    if data_arguments.replay_questions and not data_arguments.replay:
        raise ValueError("--replay_questions goes with --replay")
    if data_arguments.replay and (streaming or is_deepspeed_zero3_enabled()):
        raise ValueError("--replay not with --streaming, whose records are not counted, or with ZeRO-3")

    # Held-out data
    held_out = data_arguments.eval_data_path or data_arguments.eval_image_dir
    if data_arguments.eval_fraction is not None and (held_out or streaming or args.push_to_hub):
        raise ValueError(
            "--eval_fraction not with --eval_data_path, --streaming, or --push_to_hub (of the records, too)"
        )
    if not data_arguments.has_held_out:
        values = vars(data_arguments) | vars(args)
        values["eval_strategy"] = args.eval_strategy != "no"
        values["save_strategy best"] = args.save_strategy == "best"
        answers = ("eval_strategy", "save_strategy best", "eval_answers", "eval_image_dir")
        for option in (*answers, "early_stopping_patience", "eval_on_start"):
            if values[option]:
                raise ValueError(f"--{option} takes held-out data: set --eval_data_path or --eval_fraction")


def check_batches(number: int, args: TrainingArguments) -> None:
    """Raises a ValueError if `--dataloader_drop_last` leaves nothing of so few records or packed rows."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and number < batch:
        raise ValueError(f"--dataloader_drop_last leaves nothing of {number} records: a step takes {batch}")


def check_training_options(args: TrainingArguments, model: nn.Module, eval_answers: int) -> None:
    """Raises a ValueError if a library cannot make the object that an argument names, such as an optimizer."""
    metrics, metric = ["loss", *LOGGED] if eval_answers else ["loss"], args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(f"--metric_for_best_model {metric}: this run measures {', '.join(metrics)}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel")
    if args.use_liger_kernel:
        from liger_kernel.transformers import monkey_patch  # here, since it need not be installed

        kind = model.config.text_config.model_type
        if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ValueError(f"--use_liger_kernel: leave it out, since liger-kernel does not know a {kind}")

    # Each library makes its object from the arguments, or says why it cannot
    schedule = (args.lr_scheduler_type, SGD([torch.zeros(1)]), 1, 2, args.lr_scheduler_kwargs)
    compiling = {"mode": args.torch_compile_mode, "backend": args.torch_compile_backend}
    options = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    loading = {option: getattr(args, f"dataloader_{option}") for option in options}
    trials = {
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args, model),
        "lr_scheduler_type": lambda: get_scheduler(*schedule),
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
        "torch_compile": lambda: args.torch_compile and torch.compile(nn.Identity(), **compiling),
        "dataloader_num_workers": lambda: DataLoader([0], **loading),
    }
    for name, attempt in trials.items():
        try:
            attempt()
        except (RuntimeError, TypeError, ValueError) as error:
            value = getattr(args, name)
            value = getattr(value, "value", value)  # of an enum
            raise ValueError(f"--{name} {value}, or what goes with it: {error}") from error
