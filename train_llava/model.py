"""Opens a LLaVA checkpoint, older ones too; names its parts; decides what of them trains."""

import json
import os
import sys
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from train_llava.chat import Processor, image_size, image_tokens
from train_llava.cli import device
from train_llava.common.files import opening
from train_llava.modeling.quantization import quantization
from train_llava.modeling.templates import complete_generation_config, context_length, patch_chat_template

if device().type == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is imported, complains on standard output

Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration

# A learning rate that makes each type work, from the LLaVA-1.5 recipe (Liu et al., 2023), and the parts that train in
# full. `lora` trains low-rank adapters (Hu et al., 2021) of the language model beside them.
TRAIN_TYPES = {
    "projector": (1e-3, ["projector"]),
    "lora": (2e-4, ["projector"]),
    "freeze_vision": (2e-5, ["projector", "language model"]),
    "full": (2e-5, ["projector", "language model", "vision tower"]),
}


@dataclass
class LoraArguments:
    lora_r: int = field(default=128, metadata={"help": "LoRA's rank."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA's scale: updates count lora_alpha / lora_r times."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before LoRA's matrices."})
    use_dora: bool = field(default=False, metadata={"help": "DoRA (Liu et al., 2024): directions and lengths apart."})
    use_rslora: bool = field(default=False, metadata={"help": "rsLoRA: lora_alpha / sqrt(lora_r) times instead."})


def tower_states(
    config: PreTrainedConfig, side: int, **settings: int
) -> tuple[PreTrainedModel, tuple[torch.Tensor, ...]]:
    """A vision tower whose weights nobody has set, and its hidden states `(1, tokens, width)` for a picture of so many
    pixels a side. `settings` replace those of its configuration, to make it small.

    It runs on the processor, outside inference mode: what an architecture caches for the whole process is then what
    it would cache anyway.
    """
    config = deepcopy(config)
    for name, value in (settings | {"_attn_implementation": "eager"}).items():
        setattr(config, name, value)
    # memory that nobody writes to takes none; what a tower draws as it is made is not drawn from the run's numbers
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.random.fork_rng([]),
        no_init_weights(),
    ):
        # not by `from_config`, which under ZeRO-3 shares the weights out
        tower = AutoModel._model_mapping[type(config)](config).eval()
        return tower, tower(torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states


def unused_parameters(config: PreTrainedConfig, layers: int | list[int]) -> set[str]:
    """The names of a vision tower's parameters that none of these hidden states depends on.

    A small picture finds them: the graph of its hidden states does not lead to them.
    """
    side = 4 * config.patch_size
    tower, states = tower_states(config, side, image_size=side)
    left, passed = [states[i].grad_fn for i in ([layers] if isinstance(layers, int) else layers)], {None}
    while left:
        if (node := left.pop()) not in passed:
            passed.add(node)
            left += [before for before, _ in node.next_functions]
    read = {id(node.variable) for node in passed if hasattr(node, "variable")}
    return {name for name, parameter in tower.named_parameters() if id(parameter) not in read}


def find_file(model_name_or_path: str, name: str) -> Path | None:
    """A file of a model's, in its folder or from the hub; None where it has none, or the hub is not reached.

    Raises:
        OSError: there is no such model.
    """
    settings = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(model_name_or_path, name, **settings)
    return found and Path(found)


def refuse_adapter(name_or_path: str) -> None:
    """Says of an adapter that was named in place of a model what it is, and how it is used.

    Raises:
        ValueError: `name_or_path`, a folder or a hub id, is an adapter.
    """
    with suppress(OSError):  # nothing of that name
        has_config = find_file(name_or_path, "config.json")
        if not has_config and (path := find_file(name_or_path, "adapter_config.json")):
            with opening(str(path)):
                base = json.loads(path.read_text())["base_model_name_or_path"]
            use = f"name it with --adapter_name_or_path {name_or_path} behind --model_name_or_path {base}"
            raise ValueError(f"{name_or_path} is a LoRA adapter of {base}: {use}, or merge them by merge_lora first")


def load_config(model_name_or_path: str) -> LlavaConfig | LlavaNextConfig:
    """The configuration of a LLaVA checkpoint, a folder or a hub id.

    Raises:
        ValueError: there is no checkpoint of that name, or it is not a LLaVA; the message says which.
    """
    try:
        with opening(model_name_or_path):
            config = AutoConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        refuse_adapter(model_name_or_path)
        if Path(model_name_or_path).is_dir():
            raise
        raise ValueError(f"{model_name_or_path} is no model folder, and no model that the hub would give") from error
    if config.model_type not in ("llava", "llava_next"):
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, not a LLaVA: see build_model")
    return config


def load_processor(model_name_or_path: str) -> tuple[LlavaConfig | LlavaNextConfig, Processor]:
    """The configuration and the processor of a LLaVA checkpoint, a folder or a hub id.

    What processors saved by older versions of transformers lack is derived, and said so on standard error.

    Raises:
        ValueError: see `load_config`.
    """
    config = load_config(model_name_or_path)
    with opening(model_name_or_path):
        processor = AutoProcessor.from_pretrained(model_name_or_path)
        if not isinstance(processor, Processor):
            raise ValueError(f"its processor is a {type(processor).__name__} and no LLaVA's: see the README's FAQ")
    tokenizer, derived = processor.tokenizer, []
    tokenizer.model_max_length = context_length(config.text_config)
    side = image_size(processor)
    written = None if processor.patch_size is None else image_tokens(processor, side, (side, side))
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    features = tower_states(config.vision_config, side, num_hidden_layers=1)[1][0].shape[1]
    processor.num_additional_image_tokens = features - (side // processor.patch_size) ** 2
    if written != image_tokens(processor, side, (side, side)):
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
    """Opens a LLaVA checkpoint, a folder or a hub id, with its processor; `bits`: see `quantization`.

    Raises:
        ValueError: there is none of that name, or it is not a whole LLaVA; the message says which.
    """
    config, processor = load_processor(model_name_or_path)
    quantized = quantization(bits, config.dtype if dtype == "auto" else dtype) if bits else {}
    with opening(model_name_or_path):
        model, loading = AutoModelForImageTextToText.from_pretrained(
            model_name_or_path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            **quantized,
        )
        if Path(model_name_or_path, "generation_config.json").exists():  # broken, it would be left out without a word
            GenerationConfig.from_pretrained(model_name_or_path)
    for module in model.modules():
        # or bitsandbytes, on CPUs with AVX512-BF16, repacks a layer when it first answers: no gradient passes it then
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if loading["missing_keys"]:
        raise ValueError(f"{model_name_or_path} lacks weights, {min(loading['missing_keys'])} for one")
    complete_generation_config(model.generation_config, processor.tokenizer)
    return model, processor


def part_of(parameter_name: str) -> str:
    """The part of a LLaVA that a parameter belongs to: "vision tower", "projector" or "language model".

    What is written behind each row of a picture's tiles, `image_newline`, is learnt with the projector.
    """
    if "vision_tower." in parameter_name:
        return "vision tower"
    projector = "multi_modal_projector." in parameter_name or parameter_name.endswith("image_newline")
    return "projector" if projector else "language model"


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many parameters of each part of a LLaVA train, and how many there are; tied ones count once."""
    counts = {"vision tower": (0, 0), "projector": (0, 0), "language model": (0, 0)}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT trains a copy of the projector and keeps this one beside it
            continue
        # where ZeRO-3 has shared a parameter out, a rank holds a piece of it, and DeepSpeed's note of its whole size
        size = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":  # two numbers in a byte
            size = parameter.quant_state.shape.numel()
        part = part_of(name)
        trainable, total = counts[part]
        counts[part] = trainable + size * parameter.requires_grad, total + size
    return counts


def lora_config(language_model: nn.Module, arguments: LoraArguments) -> LoraConfig:
    """Low-rank adapters on every linear layer inside the language model, the projector in full beside them.

    A mixture's experts, which transformers keeps in one tensor a layer, are no linear layers and get no adapter;
    `describe_trainable` says so. Neither is `image_newline`, which PEFT has no way to save: it stays as it is.
    """
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


def skip_unused_layers(model: Llava) -> set[str]:
    """Skips the vision tower's layers whose output the projector never uses. They are kept, and saved.

    Returns the names of the tower's parameters that get no gradient.
    """
    unread = unused_parameters(model.config.vision_config, model.config.vision_feature_layer)
    for name, modules in model.model.vision_tower.named_modules():
        if isinstance(modules, nn.ModuleList):
            for i, layer in enumerate(modules):
                names = {f"{name}.{i}.{parameter}" for parameter, _ in layer.named_parameters()}
                if names and names <= unread:
                    layer.forward = lambda hidden_states, *_, **__: hidden_states
    return unread


def untrained_by_design(language_model: nn.Module) -> set[str]:
    """The names of the parameters that a language model's own class excludes from training, such as ERNIE 4.5 MoE's
    correction of its experts' scores. A fresh one, without weights, shows them: opening a checkpoint loses that."""
    with torch.device("meta"):
        fresh = type(language_model)(language_model.config)
    return {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}


def set_trainable(model: Llava, train_type: str, arguments: LoraArguments) -> Llava | PeftModel:
    """Decides what trains, by `TRAIN_TYPES`. All else is frozen, what of the tower the projector never uses, and what
    is `untrained_by_design`."""
    frozen = {f"model.vision_tower.{name}" for name in skip_unused_layers(model)}
    language_model = model.model.language_model
    frozen |= {f"model.language_model.{name}" for name in untrained_by_design(language_model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in TRAIN_TYPES[train_type][1] and name not in frozen)
    return get_peft_model(model, lora_config(language_model, arguments)) if train_type == "lora" else model
