"""Opens a LLaVA checkpoint, also from older versions, names its parts, and decides which parameters train.

A checkpoint is a folder or a hub id. A ValueError says why one cannot be opened, or is no whole LLaVA.
"""

import json
import os
import re
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
)
from transformers.hf_argparser import HfArg
from transformers.utils import cached_file

from train_llava.chat import image_size
from train_llava.cli import device
from train_llava.common.files import opening
from train_llava.modeling.kinds import PARTS, Config, Llava, Processor, complete_processor
from train_llava.modeling.quantization import quantization
from train_llava.modeling.templates import complete_generation_config, context_length, patch_chat_template
from train_llava.modeling.towers import skip_unused_layers

if device().type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed prints a complaint when imported

# For each type: a learning rate that works, from the LLaVA-1.5 recipe (Liu et al., 2023), and the parts that
# train in full
TRAIN_TYPES = {
    "projector": (1e-3, ["projector"]),
    "lora": (2e-4, ["projector"]),
    "lora_all": (2e-4, ["projector"]),
    "freeze_vision": (2e-5, ["projector", "language model"]),
    "full": (2e-5, ["projector", "language model", "vision tower"]),
}
# The parts whose linear layers get low-rank adapters (Hu et al., 2021) beside it
LORA_PARTS = {"lora": ["language model"], "lora_all": ["language model", "vision tower"]}


@dataclass
class LoraArguments:
    lora_r: int = HfArg(default=128, help="LoRA's rank.")
    lora_alpha: int = HfArg(default=256, help="LoRA's scale: updates count lora_alpha / lora_r times.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before LoRA's matrices.")
    use_dora: bool = HfArg(default=False, help="DoRA (Liu et al., 2024): directions and lengths apart.")
    use_rslora: bool = HfArg(default=False, help="rsLoRA: lora_alpha / sqrt(lora_r) times instead.")


def find_file(model_name_or_path: str, name: str) -> Path | None:
    """A file of a model's folder or hub id; None if it has none, or the hub is out of reach. Or an OSError."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = cached_file(model_name_or_path, name, **quiet)
    return path and Path(path)


def refuse_adapter(name_or_path: str) -> None:
    """Raises a ValueError where an adapter is named in place of a model. The message says how to use it."""
    with suppress(OSError):  # there is nothing of that name
        has_config = find_file(name_or_path, "config.json")
        if not has_config and (path := find_file(name_or_path, "adapter_config.json")):
            with opening(str(path)):
                base = json.loads(path.read_text())["base_model_name_or_path"]
            use = f"name it with --adapter_name_or_path behind --model_name_or_path {base}, or merge_lora it"
            raise ValueError(f"{name_or_path} is a LoRA adapter of {base}: {use}")


def load_config(model_name_or_path: str) -> Config:
    """Reads the configuration of a LLaVA checkpoint."""
    try:
        with opening(model_name_or_path):
            config = AutoConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        refuse_adapter(model_name_or_path)
        if Path(model_name_or_path).is_dir():
            raise
        raise ValueError(f"{model_name_or_path} is no model folder, and no model that the hub gives") from error
    if not isinstance(config, Config):
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, not a LLaVA: see build_model")
    return config


def load_processor(model_name_or_path: str) -> tuple[Config, Processor]:
    """Reads the configuration and the processor of a LLaVA checkpoint.

    Settings that older versions of transformers did not save are derived, with a line on standard error.
    """
    config = load_config(model_name_or_path)
    with opening(model_name_or_path):
        processor = AutoProcessor.from_pretrained(model_name_or_path)
        if not isinstance(processor, Processor):
            kind = type(processor).__name__
            raise ValueError(f"its processor is a {kind} and no LLaVA's: see the README's FAQ")
    tokenizer, derived = processor.tokenizer, []
    tokenizer.model_max_length = context_length(config.text_config)
    if complete_processor(processor, config, image_size(processor)):
        derived.append("the number of tokens a picture has")
    tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    with opening(model_name_or_path):
        derived += patch_chat_template(tokenizer)
    processor.chat_template = tokenizer.chat_template
    if derived:
        print(f"{model_name_or_path} lacks {' and '.join(derived)}: derived from its config", file=sys.stderr)
    return config, processor


def load_checkpoint(
    model_name_or_path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    bits: int | None = None,
) -> tuple[Llava, Processor]:
    """Opens a LLaVA checkpoint with its processor; `bits`: see `quantization`."""
    config, processor = load_processor(model_name_or_path)
    # The weights, and settings that transformers would skip silently
    settings = quantization(bits, config.dtype if dtype == "auto" else dtype) if bits else {}
    settings |= {"dtype": dtype, "attn_implementation": attn_implementation, "output_loading_info": True}
    with opening(model_name_or_path):
        model, loading_info = AutoModelForImageTextToText.from_pretrained(model_name_or_path, **settings)
        if Path(model_name_or_path, "generation_config.json").exists():  # a broken one is skipped silently
            GenerationConfig.from_pretrained(model_name_or_path)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would repack a layer, and no gradient passes it then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if missing := loading_info["missing_keys"]:
        raise ValueError(f"{model_name_or_path} lacks weights, for example {min(missing)}")
    complete_generation_config(model.generation_config, processor.tokenizer)
    return model, processor


def part_of(parameter_name: str) -> str:
    """Names the part of a LLaVA that a parameter belongs to: "vision tower", "projector" or "language model".

    `image_newline`, which ends each row of a picture's tiles, trains with the projector.
    """
    names = set(parameter_name.split("."))
    return next((part for part, modules in PARTS.items() if names & modules), "language model")


def module_name(model: Llava, part: str) -> str:
    """The name of a part's module in `model.model`, such as `vision_tower`."""
    return next(name for name, _ in model.model.named_children() if part_of(name) == part)


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Counts the parameters of each part of a LLaVA: (those that train, all); tied ones count once."""
    counts = {"vision tower": (0, 0), "projector": (0, 0), "language model": (0, 0)}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT trains a copy of the projector and keeps this one, too
            continue
        # Under ZeRO-3 a rank holds a share of a parameter, and `ds_numel` is the size of the whole
        size = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":  # two numbers in a byte
            size = parameter.quant_state.shape.numel()
        trainable, total = counts[part_of(name)]
        counts[part_of(name)] = trainable + size * parameter.requires_grad, total + size
    return counts


def lora_config(
    model: Llava, parts: Collection[str], arguments: LoraArguments, unused: Collection[str] = ()
) -> LoraConfig:
    """Configures low-rank adapters on every linear layer of some parts of a LLaVA.

    The experts of a mixture are one tensor a layer in transformers. They are no linear layers and get no
    adapter, as `describe_trainable` reports. PEFT cannot save `image_newline`, so it stays frozen.

    Args:
        parts: "language model" and "vision tower" for adapters, "projector" to train that in full.
        unused: names of the tower's parameters that the projector never uses; their layers get no adapter.
    """
    # Anchored names: a bare one such as q_proj would match layers of the other parts, too
    modules = model.get_decoder().named_modules()
    linear = {name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, nn.Linear)}
    target_modules = rf"model\.{module_name(model, 'language model')}\..*\.({'|'.join(sorted(linear))})"
    if "vision tower" in parts:
        modules = model.get_encoder("image").named_modules()
        layers = [name for name, module in modules if isinstance(module, nn.Linear) and f"{name}.weight" not in unused]
        target_modules += rf"|model\.{module_name(model, 'vision tower')}\.({'|'.join(map(re.escape, layers))})"
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        use_rslora=arguments.use_rslora,
        target_modules=target_modules,
        modules_to_save=[module_name(model, "projector")] if "projector" in parts else None,
        task_type="CAUSAL_LM",
    )


def set_trainable(
    model: Llava, train_type: str, arguments: LoraArguments, frozen_parts: Collection[str] = ()
) -> Llava | PeftModel:
    """Decides which parameters train, by `TRAIN_TYPES` and `LORA_PARTS`; all others and `frozen_parts` are frozen.

    Parameters of the tower that the projector never uses are always frozen. So are those that the language
    model's own class excludes, such as the expert score correction of ERNIE 4.5 MoE.
    """
    # What never trains
    unused = skip_unused_layers(model)
    frozen = {f"model.{module_name(model, 'vision tower')}.{name}" for name in unused}
    language_model = model.get_decoder()
    with torch.device("meta"):  # opening a checkpoint loses the exclusions; a fresh model shows them
        fresh = type(language_model)(language_model.config)
    for name, parameter in fresh.named_parameters():
        if not parameter.requires_grad:
            frozen.add(f"model.{module_name(model, 'language model')}.{name}")

    # All other parameters of the parts that train
    trained = set(TRAIN_TYPES[train_type][1]) - set(frozen_parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained and name not in frozen)
    if train_type not in LORA_PARTS:
        return model
    trained |= set(LORA_PARTS[train_type]) - set(frozen_parts)
    return get_peft_model(model, lora_config(model, trained, arguments, unused))
