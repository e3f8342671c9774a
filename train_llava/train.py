"""Trains a LLaVA checkpoint on pictures and conversations: arguments, what trains, a plain Hugging Face `Trainer`.

    python -m train_llava.train --train_type lora \
        --model_name_or_path output/llava --data_path data --output_dir output/run

runs in one process; `bash run_zero2.sh` takes the same arguments and trains with DeepSpeed ZeRO-2 on every GPU. All of
`TrainingArguments` is accepted.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from datasets import IterableDataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlavaForConditionalGeneration, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.checkpoint import BITS_HELP, count_parameters, load_checkpoint
from train_llava.cli import parse_arguments, run_command
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset, stream_items
from train_llava.metrics import markdown
from train_llava.model_card import ancestors, write_card
from train_llava.preflight import preflight
from train_llava.trainer import LlavaTrainer, check_resumable, finished_checkpoint

# Learning rates that make each type work, from the LLaVA-1.5 recipe (Liu et al., 2023): stage 1 trains the projector,
# stage 2 everything after it.
LEARNING_RATES = {"projector": 1e-3, "lora": 2e-4, "freeze_vision": 2e-5, "full": 2e-5}
TUTORIAL_NAMES = {"use_lora": "lora", "none": "full"}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "The LLaVA checkpoint to start from, a folder or a hub id."})
    lora_r: int = field(default=128, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(
        default=256, metadata={"help": "LoRA's scale; the update counts lora_alpha / lora_r times."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA (Liu et al., 2024): directions and lengths apart."})
    use_rslora: bool = field(default=False, metadata={"help": "rsLoRA: lora_alpha / sqrt(lora_r) times instead."})
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": f"With lora alone. {BITS_HELP}"})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, or what is installed: flash_attention_2, kernels of the hub."}
    )


@dataclass
class DataArguments:
    data_path: list[str] = field(
        metadata={"help": "One or several: a folder with chat.json, a .json, .jsonl, .parquet or .tar file, a hub id."}
    )
    data_weights: list[float] | None = field(
        default=None, metadata={"help": "How often a pass goes through each data path; default: once through all."}
    )
    image_dir: str | None = field(
        default=None,
        metadata={
            "help": "The pictures' folder or .zip; default: images_dl/, images/ or images.zip beside the records."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read shards as they come, without a table on disk; takes --max_steps."}
    )
    bad_samples: Literal["skip", "error"] = field(
        default="skip",
        metadata={"help": "skip: log a bad record in bad_samples.jsonl and take the next; error: stop at the first."},
    )
    max_bad_fraction: float = field(default=0.01, metadata={"help": "Stop once more of the records are bad."})
    eval_data_path: str | None = field(default=None, metadata={"help": "Held-out data, in the same form."})
    eval_image_dir: str | None = field(default=None, metadata={"help": "Its pictures' folder, found as image_dir is."})
    max_length: int = field(default=2048, metadata={"help": "Longest conversation in tokens, pictures included."})
    packing: bool = field(
        default=False, metadata={"help": "Put a batch's conversations into one row, without padding, kept apart."}
    )


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with what trains, and with defaults that suit a LLaVA."""

    train_type: Literal["lora", "full", "freeze_vision", "projector", "use_lora", "none"] = field(
        default="lora",
        metadata={
            "help": "lora: adapters in the language model, and the projector; full: everything; freeze_vision: all "
            "but the vision tower; projector: it alone. use_lora and none are the tutorial's names of lora and full."
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
    preflight: bool = field(
        default=True, metadata={"help": "First try a step, saving and reading back on the longest records."}
    )
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1, that part of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate's schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logged losses."})
    report_to: str = field(default="tensorboard", metadata={"help": "Where the losses are reported."})
    bf16: bool | None = field(default=None, metadata={"help": "Compute in bfloat16; default: where the GPU can."})
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
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        super().__post_init__()


def lora_config(language_model: nn.Module, arguments: ModelArguments) -> LoraConfig:
    """Low-rank adapters on every linear layer inside the language model, the projector in full beside them."""
    linear = {name.rsplit(".", 1)[-1] for name, m in language_model.named_modules() if isinstance(m, nn.Linear)}
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        # anchored: a bare name such as q_proj would match the vision tower's layers too
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(linear))})",
        modules_to_save=["multi_modal_projector"],
        task_type="CAUSAL_LM",
    )


def set_trainable(
    model: LlavaForConditionalGeneration, train_type: str, arguments: ModelArguments
) -> LlavaForConditionalGeneration | PeftModel:
    """Decides what trains; everything else is frozen. The projector always trains.

    The tower's layers behind the one that the projector reads are kept, to be saved, but not run any more.

    - `projector`: nothing else
    - `freeze_vision`: and the language model
    - `full`: and the vision tower, up to the layer the projector reads (what lies behind it has no effect)
    - `lora`: and low-rank adapters (Hu et al., 2021) on every linear layer inside the language model, by PEFT. The
      projector is trained in full beside them and saved with them.
    """
    model.requires_grad_(False)
    tower = model.model.vision_tower
    layers = tower.encoder.layers
    # hidden_states[0] is the embedding, hidden_states[i] what layer i - 1 gives
    behind = layers[range(len(layers) + 1)[model.config.vision_feature_layer] :]
    for layer in behind:
        layer.forward = lambda hidden_states, *_, **__: hidden_states  # what it would compute is read by nothing
    if train_type == "lora":
        return get_peft_model(model, lora_config(model.model.language_model, arguments))
    model.model.multi_modal_projector.requires_grad_(True)
    if train_type in ("freeze_vision", "full"):
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
    if train_type == "full":
        tower.requires_grad_(True)
        behind.requires_grad_(False)
        for name, module in tower.named_children():
            if name in ("post_layernorm", "head"):
                module.requires_grad_(False)
    return model


def describe_trainable(model: nn.Module, learning_rates: dict[str, float]) -> str:
    """A table of what trains: each part's trainable parameters, all it has, and its learning rate."""
    lines = [f"{'':<16}{'trainable':>16}{'of':>16}{'learning rate':>16}"]
    for part, (trainable, total) in count_parameters(model).items():
        rate = f"{learning_rates[part]:g}" if trainable else ""
        lines.append(f"{part:<16}{trainable:>16,}{total:>16,}{rate:>16}".rstrip())
    return "\n".join(lines)


def plot_loss(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss, and the held-out loss where there is one, over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set(xlabel="step", ylabel="loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def write_run_card(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    args: TrainArguments,
    records: int | None,
    learning_rates: dict[str, float],
    log_history: list[dict[str, Any]],
) -> None:
    """Writes the loss curve and the model card: what was trained on what, by which settings, and the losses."""
    folder, lora = Path(args.output_dir), args.train_type == "lora"
    plot_loss(log_history, folder / "loss.png")
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {
        "what trained": f"`{args.train_type}`",
        "learning rates": ", ".join(f"{part} {rate:g}" for part, rate in learning_rates.items()),
        "schedule": f"{args.lr_scheduler_type}, warm-up {args.warmup_steps:g}, weight decay {args.weight_decay:g}",
        "records": "streamed" if records is None else f"{records:,}",
        "batch": f"{batch} ({args.train_batch_size} x {args.gradient_accumulation_steps} x {args.world_size} ranks)",
        "length": f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "longest conversation": f"{data_arguments.max_length} tokens",
        "optimizer": args.optim,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": str(args.seed),
    }
    if lora:
        names = ("lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "bits")
        settings["LoRA"] = ", ".join(f"{name} {getattr(model_arguments, name)}" for name in names)
    losses = {"loss": "training loss, last", "train_loss": "training loss, mean", "eval_loss": "held-out loss, last"}
    for key, name in losses.items():
        values = [entry[key] for entry in log_history if key in entry]
        if values:
            settings[name] = f"{values[-1]:.4f}"
    sections = [f"## Training\n\n{markdown([('', ''), *settings.items()])}\n\n![Loss](loss.png)"]
    base, data = model_arguments.model_name_or_path, data_arguments.data_path
    write_card(folder, folder.absolute().name, ancestors(base), data, sections, adapter_of=base if lora else None)


def collate(items: list[dict[str, Any]], collator: LlavaCollator) -> dict[str, Any]:
    """The collator's batch, and the records' `ids`, which the trainer names when a loss is not finite."""
    return collator(items) | {"ids": [item["id"] for item in items]}


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Refuses a folder that holds a model or checkpoints already, unless they are what the run resumes from."""
    folder = Path(output_dir)
    holds = [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]
    if holds and not resume:
        raise ValueError(
            f"--output_dir {output_dir} holds {holds[0].name}: choose another, or --resume_from_checkpoint true"
        )


def load_data(
    arguments: DataArguments, args: TrainArguments, collator: LlavaCollator
) -> tuple[CheckedDataset | IterableDataset, CheckedDataset | None]:
    """The data to train on and, where there is any, the held-out data, both free of bad records."""

    def checked(dataset: LlavaDataset, log: str) -> CheckedDataset:
        return CheckedDataset(dataset, collator, folder / log, arguments.bad_samples, arguments.max_bad_fraction)

    folder, held_out = Path(args.output_dir), None
    if arguments.eval_data_path is not None:
        dataset = LlavaDataset(arguments.eval_data_path, arguments.eval_image_dir, at_least=collator.side)
        held_out = checked(dataset, "bad_eval_samples.jsonl")
        if args.eval_strategy == "no":
            args.eval_strategy = "epoch"
    if arguments.streaming:
        if args.max_steps <= 0:
            raise ValueError("--streaming has no end: set --max_steps")
        args.accelerator_config.dispatch_batches = False  # every rank reads shards of its own
        log = folder / "bad_samples.jsonl"
        return stream_items(arguments.data_path, arguments.image_dir, collator, log), held_out
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir, arguments.data_weights, collator.side)
    if args.process_index == 0:
        print(f"{len(dataset):,} records, {len(held_out or ()):,} held out")
    return checked(dataset, "bad_samples.jsonl"), held_out


def main() -> None:
    model_arguments, data_arguments, args = parse_arguments(ModelArguments, DataArguments, TrainArguments)
    if model_arguments.bits and (args.train_type != "lora" or is_deepspeed_zero3_enabled()):
        raise ValueError("--bits goes with --train_type lora, and not with ZeRO-3: weights in few bits cannot train")
    resume = {"true": True, "false": False, None: False}.get(args.resume_from_checkpoint, args.resume_from_checkpoint)
    check_output_dir(args.output_dir, bool(resume))
    checkpoint = finished_checkpoint(args.output_dir) if resume is True else resume or None
    if checkpoint is not None:
        check_resumable(Path(checkpoint), args.world_size)
    learning_rates = {
        "vision tower": args.vision_learning_rate,
        "projector": args.projector_learning_rate,
        "language model": args.learning_rate,
    }
    if args.process_index == 0:
        print(f"train_type {args.train_type}, learning rate {args.learning_rate:g}, bf16 {args.bf16}")
        if resume:
            print(f"resuming from {checkpoint or 'the start: no checkpoint was finished'}")

    if is_deepspeed_zero3_enabled():
        # Weights are shared out while they are loaded, before a Trainer has told DeepSpeed of the other ranks
        from deepspeed import init_distributed  # here, since it takes seconds and complains where it is not needed

        init_distributed(verbose=False)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    load_base = partial(
        load_checkpoint,
        model_arguments.model_name_or_path,
        dtype,
        model_arguments.attn_implementation,
        model_arguments.bits,
    )
    model, processor = load_base()
    collator = LlavaCollator(processor, data_arguments.max_length, data_arguments.packing)
    train_dataset, eval_dataset = load_data(data_arguments, args, collator)
    language_model = model.model.language_model
    set_seed(args.seed)  # LoRA's matrices are drawn now, before there is a Trainer to do this
    model = set_trainable(model, args.train_type, model_arguments)
    model.config.text_config.use_cache = False  # the Trainer turns it off in `config` only
    if args.deepspeed is None:
        # Half-precision weights are too coarse for small updates; DeepSpeed keeps its own fp32 copies
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if args.process_index == 0:
        print(describe_trainable(model, learning_rates))
    if args.activation_checkpointing:
        # of the language model alone: the Trainer would also recompute a frozen vision tower, and hook its inputs
        language_model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        args.activation_checkpointing = False

    records = None if data_arguments.streaming else len(train_dataset)
    trained = {part: learning_rates[part] for part, (count, _) in count_parameters(model).items() if count}
    trainer = LlavaTrainer(
        model=model,
        args=args,
        data_collator=partial(collate, collator=collator),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        learning_rates=learning_rates,
        write_card=partial(write_run_card, model_arguments, data_arguments, args, records, trained),
    )
    if args.preflight:
        preflight(trainer, load_base)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        print(f"written to {args.output_dir}")
    trainer.accelerator.end_training()  # ranks that leave without parting from each other may abort at exit


if __name__ == "__main__":
    matplotlib.use("Agg")
    run_command(main)
