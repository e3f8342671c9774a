"""The arguments of `train`: their defaults, and the `help` that is their documentation."""

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from train_llava.cli import BITS_HELP, CUT_BOXES_HELP, Dtype, device
from train_llava.model import LORA_PARTS, TRAIN_TYPES
from train_llava.training.batch_size import divide_batch

LEARNING_RATES = {name: rate for name, (rate, _) in TRAIN_TYPES.items()}
TUTORIAL_NAMES = {"use_lora": "lora", "none": "full"}
TRAIN_TYPE_HELP = "; ".join(f"{name}: the {', the '.join(parts)}" for name, (_, parts) in TRAIN_TYPES.items())
RATE_HELP = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())


@dataclass
class ModelArguments:
    model_name_or_path: str = HfArg(help="The LLaVA checkpoint to start from: a folder or a hub id.")
    adapter_name_or_path: str | None = HfArg(default=None, help="A LoRA adapter to train further; its settings stay.")
    bits: Literal[4, 8] | None = HfArg(default=None, help=f"With lora and lora_all. {BITS_HELP}")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager, flash_attention_2 …")


@dataclass
class DataArguments:
    data_path: list[str] = HfArg(
        help="One or several: a folder or file of records in any form of docs/data.md, folder:PATH, a hub id."
    )
    data_weights: list[float] | None = HfArg(default=None, help="How often a pass takes each path.")
    image_dir: str | None = HfArg(
        default=None, help="Folder or .zip of pictures; default: images_dl/, images/, images.zip beside the records."
    )
    streaming: bool = HfArg(default=False, help="Read shards as they come; needs --max_steps.")
    bad_samples: Literal["skip", "error"] = HfArg(
        default="skip", help="skip: log a bad record in bad_samples.jsonl and replace it; error: stop at the first."
    )
    max_bad_fraction: float = HfArg(default=0.01, help="Stop if more of the records are bad.")
    eval_data_path: str | None = HfArg(default=None, help="Held-out data, in the same form.")
    eval_image_dir: str | None = HfArg(default=None, help="Its pictures' folder, found as image_dir is.")
    eval_fraction: float | None = HfArg(default=None, help="Keep this part of the records apart, by their pictures.")
    eval_answers: int | None = HfArg(default=None, help="Held-out questions of each evaluation; default: 64.")
    replay: float | None = HfArg(default=None, help="This share of a pass are texts that the model answered before.")
    replay_questions: str | None = HfArg(default=None, help="Their questions, a .jsonl file; default: the data's.")
    keep_cut_boxes: bool = HfArg(default=False, help=CUT_BOXES_HELP)
    max_length: int = HfArg(default=2048, help="Longest conversation in tokens, pictures included.")
    packing: bool = HfArg(default=False, help="Each batch is one row without padding; conversations stay apart.")

    def __post_init__(self) -> None:
        self.has_held_out = self.eval_data_path is not None or self.eval_fraction is not None
        if self.eval_answers is None:
            self.eval_answers = 64 if self.has_held_out else 0


class NumberOrAuto(int):
    """An int, or the text "auto", of a text on the command line."""

    def __new__(cls, text: str) -> int | str:
        return text if text == "auto" else int(text)


@dataclass
class TrainArguments(TrainingArguments):
    """`TrainingArguments` with what trains, and with defaults that suit a LLaVA."""

    train_type: Literal[*TRAIN_TYPES, *TUTORIAL_NAMES] = HfArg(
        default="lora",
        help=f"{TRAIN_TYPE_HELP}. lora also trains adapters in the language model, lora_all in the vision tower, "
        "too; use_lora and none are the tutorial's names.",
    )
    learning_rate: float | None = HfArg(default=None, help=f"Default by train_type: {RATE_HELP}.")
    projector_learning_rate: float | None = HfArg(
        default=None, help="The projector's; default: learning_rate, with LoRA a tenth of it; 0: it is frozen."
    )
    vision_learning_rate: float | None = HfArg(default=None, help="Default: a tenth of learning_rate; 0: frozen.")
    early_stopping_patience: int | None = HfArg(default=None, help="Evaluations without a better score to stop after.")
    preflight: bool = HfArg(default=True, help="First try a step, saving and reading back on the longest records.")
    price_per_hour: float | None = HfArg(default=None, help="Of the machine; the preflight prints the run's price.")
    global_batch_size: int | None = HfArg(default=None, help="Records (or packed rows) a step; accumulation follows.")
    per_device_train_batch_size: NumberOrAuto = HfArg(
        default=8, help="auto: the most that fit, if they do without --activation_checkpointing, of that total."
    )
    gradient_accumulation_steps: int | None = HfArg(default=None, help="Default: by global_batch_size, otherwise 1.")
    warmup_steps: float = HfArg(default=0.03, help="Steps of warm-up; below 1, a share of all steps.")
    lr_scheduler_type: str = HfArg(default="cosine", help="The learning rate's schedule.")
    logging_steps: float = HfArg(default=10, help="Steps between two logged losses.")
    logging_nan_inf_filter: bool = HfArg(default=False, help="Not needed: a loss that is not finite ends the run.")
    report_to: str = HfArg(default="tensorboard", help="Where losses go: tensorboard, wandb, swanlab, trackio …")
    tokens_per_batch: int | None = HfArg(default=None, help="Packing: fill each batch up to this many tokens.")
    bf16: bool | None = HfArg(default=None, help="Compute in bfloat16; default: if the GPU can.")
    save_dtype: Dtype = HfArg(default="auto", help="Of the saved model; auto: that of the model it began with.")
    dataloader_num_workers: int | None = HfArg(default=None, help="Processes for pictures; default: 4 on a GPU.")
    remove_unused_columns: bool = HfArg(default=False, help="Stays false: the collator needs all columns.")
    prediction_loss_only: bool = HfArg(default=True, help="Stays true: only logits with labels are computed.")

    def __post_init__(self) -> None:
        """Fills in the defaults that depend on other arguments; `Trainer` and a resume read these names."""
        if self.output_dir is None:
            raise ValueError("--output_dir is missing: name the folder to write to")
        # What trains, and at which rates
        self.train_type = TUTORIAL_NAMES.get(self.train_type, self.train_type)
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES[self.train_type]
        if self.projector_learning_rate is None:
            self.projector_learning_rate = self.learning_rate * (0.1 if self.train_type in LORA_PARTS else 1)
        if self.vision_learning_rate is None:
            self.vision_learning_rate = self.learning_rate * 0.1
        self.batches = divide_batch(self)
        # The device and its precision
        if self.bf16 is None:
            on_gpu = device().type == "cuda" and not self.fp16
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        self.use_cpu = self.use_cpu or device().type == "cpu"
        self.dataloader_pin_memory = self.dataloader_pin_memory and not self.use_cpu
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 0 if self.use_cpu else 4
        if self.fp16 and self.use_cpu:
            raise ValueError("--fp16 takes a GPU: on a CPU take --bf16 true, or neither")
        # The score that decides which checkpoint is best
        if self.early_stopping_patience is not None or self.save_strategy == "best":
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        super().__post_init__()
        self.accelerator_config.non_blocking = self.dataloader_pin_memory  # batches are copied while the GPU computes
        self.accelerator_config.dispatch_batches = False  # each rank reads its own shards of a stream

    @property
    def learning_rates(self) -> dict[str, float]:
        """The rate of each part of a LLaVA."""
        rates = (self.vision_learning_rate, self.projector_learning_rate, self.learning_rate)
        return dict(zip(("vision tower", "projector", "language model"), rates, strict=True))

    @property
    def frozen_parts(self) -> set[str]:
        """The parts whose rate is 0."""
        return {part for part, rate in self.learning_rates.items() if rate == 0}
