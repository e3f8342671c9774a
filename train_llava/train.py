"""Trains a LLaVA checkpoint on pictures and conversations: arguments, what trains, a plain Hugging Face `Trainer`.

    python -m train_llava.train --train_type lora \
        --model_name_or_path output/llava --data_path data --output_dir output/run

runs in one process; `bash run_zero2.sh` takes the same arguments and trains with DeepSpeed ZeRO-2 on every GPU. All of
`TrainingArguments` is accepted, and a recipe, a YAML file of arguments, may stand in front.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from datasets import IterableDataset
from transformers import IntervalStrategy, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.chat import Chat
from train_llava.cli import BITS_HELP, device, given_arguments, parse_arguments, run_command
from train_llava.common.files import writing
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset.lengths import order_seed
from train_llava.dataset.packing import PackedDataset
from train_llava.dataset.streaming import stream_items
from train_llava.model import (
    TRAIN_TYPES,
    LoraArguments,
    count_parameters,
    describe_trainable,
    load_checkpoint,
    set_trainable,
)
from train_llava.modeling.adapter import continued, load_adapter
from train_llava.modeling.verification import verify_for_training
from train_llava.modeling.weights import save_projector
from train_llava.trainer import LlavaTrainer
from train_llava.training.arguments import check_argument_pairs, check_batches, check_training_options
from train_llava.training.cards import write_run_card
from train_llava.training.checkpointing import locked, on_first_rank, starting_point, write_recipe
from train_llava.training.memory import precision, print_estimate
from train_llava.training.preflight import preflight
from train_llava.training.resume import (
    SETTINGS,
    compare,
    completed,
    data_fingerprint,
    model_fingerprint,
    settings_of,
    write_settings,
)
from train_llava.training.throughput import describe_throughput

LEARNING_RATES = {name: rate for name, (rate, _) in TRAIN_TYPES.items()}
TUTORIAL_NAMES = {"use_lora": "lora", "none": "full"}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The LLaVA checkpoint to start from, a folder or a hub id."})
    adapter_name_or_path: str | None = field(
        default=None, metadata={"help": "A LoRA adapter of that model, which goes on training; its LoRA stays."}
    )
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": f"With lora alone. {BITS_HELP}"})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2 …"})


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={
            "help": "One or several: a folder with chat.json, a .json, .jsonl, .csv, .parquet or .tar file, an id."
        }
    )
    data_weights: list[float] | None = field(default=None, metadata={"help": "How often a pass takes each path."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder or .zip of pictures; default: images_dl/, images/, images.zip beside."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read shards as they come; takes --max_steps."})
    bad_samples: Literal["skip", "error"] = field(
        default="skip",
        metadata={"help": "skip: log a bad record in bad_samples.jsonl and take another; error: stop at the first."},
    )
    max_bad_fraction: float = field(default=0.01, metadata={"help": "Stop once more of the records are bad."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out data, in the same form."})
    eval_image_dir: str | None = field(default=None, metadata={"help": "Its pictures' folder, found as image_dir is."})
    eval_answers: int | None = field(default=None, metadata={"help": "Held-out questions each evaluation asks: 64."})
    max_length: int = field(default=2048, metadata={"help": "Longest conversation in tokens, pictures included."})
    packing: bool = field(default=False, metadata={"help": "A batch in one row without padding, each kept apart."})

    def __post_init__(self) -> None:
        if self.eval_answers is None:
            self.eval_answers = 0 if self.eval_data_path is None else 64


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with what trains, and with defaults that suit a LLaVA."""

    train_type: Literal[*TRAIN_TYPES, *TUTORIAL_NAMES] = field(
        default="lora",
        metadata={
            "help": "; ".join(f"{name}: the {', the '.join(parts)}" for name, (_, parts) in TRAIN_TYPES.items())
            + ". lora trains adapters in the language model, too; use_lora and none are the tutorial's names."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"Default by train_type: {', '.join(f'{k} {v:g}' for k, v in LEARNING_RATES.items())}."},
    )
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "The projector's; default: learning_rate, a tenth of it for lora."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "The vision tower's, where it trains; default: a tenth of learning_rate."}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without a better --metric_for_best_model."}
    )
    preflight: bool = field(
        default=True, metadata={"help": "First try a step, saving and reading back on the longest records."}
    )
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1, that part of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate's schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    report_to: str = field(
        default="tensorboard", metadata={"help": "Where losses are reported: tensorboard, wandb, swanlab, trackio …"}
    )
    tokens_per_batch: int | None = field(default=None, metadata={"help": "Packing: fill batches to so many tokens."})
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; default: where the GPU can."})
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "What the outcome is written in; auto: as the model that it began with."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: the collator needs them all."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Stays true: logits are kept at labels only."})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: name the folder to write to")
        self.train_type = TUTORIAL_NAMES.get(self.train_type, self.train_type)
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.train_type]
        if self.projector_learning_rate is None:
            self.projector_learning_rate = self.learning_rate * (0.1 if self.train_type == "lora" else 1)
        if self.vision_learning_rate is None:
            self.vision_learning_rate = self.learning_rate * 0.1
        if self.tokens_per_batch is not None:
            self.per_device_train_batch_size = 1  # a row, of as many records as fit
        if self.bf16 is None:
            on_gpu = device().type == "cuda" and not self.fp16
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.use_cpu = self.use_cpu or device().type == "cpu"
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if self.fp16 and self.use_cpu:
            raise ValueError("--fp16 takes a GPU: on a CPU take --bf16 true, or neither")
        if self.early_stopping_patience is not None or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        super().__post_init__()
        self.accelerator_config.dispatch_batches = False  # of a stream, every rank reads shards of its own


def load_data(
    data_arguments: DataArguments, args: TrainArguments, chat: Chat
) -> tuple[CheckedDataset | IterableDataset, CheckedDataset | None]:
    """The data to train on and, where there is any, the held-out data, both free of bad records."""
    folder, settings = Path(args.output_dir), (data_arguments.bad_samples, data_arguments.max_bad_fraction)
    log, eval_log, held_out = folder / "bad_samples.jsonl", folder / "bad_eval_samples.jsonl", None
    if data_arguments.eval_data_path is not None:
        dataset = LlavaDataset(data_arguments.eval_data_path, data_arguments.eval_image_dir, min_side=chat.min_side)
        held_out = CheckedDataset(dataset, chat, eval_log, *settings)
    sources = (data_arguments.data_path, data_arguments.image_dir, data_arguments.data_weights)
    if data_arguments.streaming:
        return stream_items(*sources, chat, log, *settings, order_seed(args)), held_out
    dataset = LlavaDataset(*sources, chat.min_side)
    if args.process_index == 0:
        print(f"{len(dataset):,} records, {len(held_out or ()):,} held out")
    return CheckedDataset(dataset, chat, log, *settings), held_out


def main() -> None:
    # 1. What is asked for
    model_arguments, lora_arguments, data_arguments, args = parse_arguments(
        ModelArguments, LoraArguments, DataArguments, TrainArguments
    )
    adapter = model_arguments.adapter_name_or_path
    check_argument_pairs(adapter, model_arguments.bits, data_arguments, args)
    if adapter is not None:
        lora_arguments = continued(
            adapter, given_arguments([LoraArguments, ModelArguments, DataArguments, TrainArguments])
        )
    if data_arguments.eval_data_path is not None and args.eval_strategy == "no":
        args.eval_strategy = IntervalStrategy.EPOCH
    with locked(args):
        run(model_arguments, lora_arguments, data_arguments, args)


def run(
    model_arguments: ModelArguments, lora_arguments: LoraArguments, data_arguments: DataArguments, args: TrainArguments
) -> None:
    """The run itself, in a folder that is its own."""
    learning_rates = {
        "vision tower": args.vision_learning_rate,
        "projector": args.projector_learning_rate,
        "language model": args.learning_rate,
    }

    # 2. Where the run begins: anew, or at a checkpoint, with what a resume may change
    settings = settings_of(model_arguments, lora_arguments, data_arguments, args)
    if (line := on_first_rank(args, lambda: completed(args, settings))) is not None:
        PartialState().print(line)
        return
    if args.process_index == 0:
        print(f"train_type {args.train_type}, learning rate {args.learning_rate:g}, bf16 {args.bf16}")
    checkpoint = starting_point(args)
    changes = compare(checkpoint, settings, args)
    if args.process_index == 0 and checkpoint is not None:
        if not (Path(checkpoint) / SETTINGS).exists():
            print(f"{checkpoint} does not tell its run's settings, which have to be given again as they were")
        print(*changes, sep="\n", end="\n" * bool(changes))

    # 3. The model
    if args.preflight and args.process_index == 0:
        more = (model_arguments.bits, data_arguments.packing, data_arguments.max_length)
        print_estimate(model_arguments.model_name_or_path, lora_arguments, args, *more)
    if args.deepspeed is not None:
        from train_llava.training.extension import build_extensions  # here, since DeepSpeed takes seconds

        build_extensions(args)
    if is_deepspeed_zero3_enabled():
        # Weights are shared out while they are loaded, before a Trainer has told DeepSpeed of the other ranks
        from deepspeed import init_distributed  # here, since it takes seconds and complains where it is not needed

        init_distributed(verbose=False)
    model, processor = load_checkpoint(
        model_arguments.model_name_or_path, precision(args), model_arguments.attn_implementation, model_arguments.bits
    )
    check_training_options(args, model, data_arguments.eval_answers)
    verify_for_training(model, processor, data_arguments.packing)

    # 4. The data
    collator = LlavaCollator(processor, data_arguments.max_length, data_arguments.packing)
    train_dataset, eval_dataset = load_data(data_arguments, args, collator.chat)

    def add_fingerprints() -> None:
        path, dataset = data_arguments.data_path, None if data_arguments.streaming else train_dataset.records
        settings["data_path"] = data_fingerprint(dataset, path, data_arguments.image_dir)
        settings["model_name_or_path"] = model_fingerprint(model_arguments.model_name_or_path, model)
        compare(checkpoint, settings, args)

    on_first_rank(args, add_fingerprints)

    # 5. What trains
    adapter = model_arguments.adapter_name_or_path
    language_model = model.model.language_model
    set_seed(args.seed)  # LoRA's matrices are drawn now, before there is a Trainer to do this
    if adapter is None:
        model = set_trainable(model, args.train_type, lora_arguments)
    else:
        model = set_trainable(model, "projector", lora_arguments)
        model = load_adapter(model, adapter, model_arguments.model_name_or_path, trains=True)
    model.config.text_config.use_cache = False  # the Trainer turns it off in `config` only
    if args.deepspeed is None:
        # Half-precision weights are too coarse for small updates; DeepSpeed keeps its own fp32 copies. Where the
        # tower trains, its unread norms follow: they would not take fp32
        for parameter in model.parameters():
            if parameter.requires_grad or "vision tower" in TRAIN_TYPES[args.train_type][1]:
                parameter.data = parameter.data.float()
    if args.process_index == 0:
        print(describe_trainable(model, learning_rates))
    if args.activation_checkpointing:
        # of the language model alone: the Trainer would also recompute a frozen vision tower, and hook its inputs
        language_model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        args.activation_checkpointing = False

    # 6. The trainer, and a step to see that all will go well
    records = None if data_arguments.streaming else len(train_dataset)
    if args.tokens_per_batch is not None:
        train_dataset = PackedDataset(train_dataset, args.tokens_per_batch, args.seed)
    if not data_arguments.streaming:
        check_batches(len(train_dataset), args)
    trained = {part: learning_rates[part] for part, (count, _) in count_parameters(model).items() if count}
    trainer = LlavaTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        learning_rates=learning_rates,
        write_card=partial(write_run_card, model_arguments, lora_arguments, data_arguments, args, records, trained),
        eval_answers=data_arguments.eval_answers,
    )
    if args.preflight:
        trainer.throughput.learn_operations(model.config, lora_arguments, args)
        preflight(trainer)

    # 7. Training, and what it leaves
    write_recipe(model_arguments, lora_arguments, data_arguments, args)
    on_first_rank(args, lambda: write_settings(args.output_dir, settings, changes))
    trainer.train(resume_from_checkpoint=checkpoint)
    with writing(args.output_dir, "make room on its disk, and go on by --resume_from_checkpoint true"):
        trainer.save_model()
        if args.train_type == "projector" and args.process_index == 0:
            save_projector(Path(args.output_dir))
        trainer.save_state()  # by which a run is told to be done
        trainer.create_model_card()
    if trainer.is_world_process_zero():
        print(describe_throughput(trainer.state.log_history))
        print(f"written to {args.output_dir}")
    trainer.accelerator.end_training()  # ranks that leave without parting from each other may abort at exit


if __name__ == "__main__":
    run_command(main)
