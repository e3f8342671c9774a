"""Opens a LLaVA checkpoint with or without a LoRA adapter, to answer questions or to continue training."""

import re
from collections.abc import Collection
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from train_llava.chat import Processor
from train_llava.cli import device
from train_llava.common.files import opening
from train_llava.model import LORA_PARTS, Llava, LoraArguments, find_file, load_checkpoint, part_of
from train_llava.modeling.weights import check_base

# The names of a LLaVA's parts in transformers before 4.52, and since
RENAMED = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^(vision_tower|multi_modal_projector)": r"model.\1",
}


def load_model(
    model_name_or_path: str, adapter_name_or_path: str | None = None, bits: int | None = None
) -> tuple[Llava | PeftModel, Processor]:
    """Opens a checkpoint, and an adapter on it, on the accelerator if there is one; see `load_adapter`."""
    model, processor = load_checkpoint(model_name_or_path, bits=bits)
    if adapter_name_or_path is not None:
        model = load_adapter(model, adapter_name_or_path, model_name_or_path)
    if not bits:
        model = model.to(device())
    return model.eval(), processor


def read_adapter_config(adapter_name_or_path: str) -> LoraConfig:
    """Reads the configuration of a LoRA adapter, a folder or a hub id; a ValueError names a broken file."""
    if find_file(adapter_name_or_path, "adapter_config.json") is None:
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub")
    with opening(adapter_name_or_path):
        config = PeftConfig.from_pretrained(adapter_name_or_path)
        if not isinstance(config, LoraConfig):
            raise ValueError("it is no LoRA adapter's")
    return config


def continued(adapter_name_or_path: str, arguments: dict[str, Any]) -> LoraArguments:
    """Reads the LoRA settings of an adapter that is trained further.

    `arguments` are the command line's by name. A ValueError says which differs from the adapter's setting, or that
    a projector is to train that it lacks.
    """
    config = read_adapter_config(adapter_name_or_path)
    has_projector = any(part_of(name) == "projector" for name in config.modules_to_save or [])
    if not has_projector and arguments.get("projector_learning_rate") != 0:
        remedy = "take --projector_learning_rate 0, or merge it by merge_lora and train a new adapter"
        raise ValueError(f"{adapter_name_or_path} holds no projector: {remedy}")
    settings = {name: getattr(config, name.replace("lora_r", "r")) for name in vars(LoraArguments())}
    for name, value in settings.items():
        if (given := arguments.get(name, value)) != value:
            raise ValueError(f"--{name} {given}: {adapter_name_or_path}, which goes on training, has {value}")
    return LoraArguments(**settings)


def load_adapter(model: Llava, adapter_name_or_path: str, model_name: str, trains: bool = False) -> PeftModel:
    """Puts a LoRA adapter on a model, and makes sure that the model takes every tensor of it.

    With `trains`, the adapter and its projector continue to train. An adapter from transformers before 4.52,
    which names a LLaVA's parts differently, can be read, too. A ValueError says that it cannot be opened, or was
    trained on another model.
    """
    # Its files
    config = read_adapter_config(adapter_name_or_path)
    with opening(adapter_name_or_path):
        saved = load_peft_weights(adapter_name_or_path, device="cpu", key_mapping=RENAMED)
    check_base(adapter_name_or_path, model, model_name)

    # The adapter on the model: PEFT leaves out tensors that have no place, so the names are compared
    targets = config.target_modules or set()
    config.target_modules = _rename(targets) if isinstance(targets, str) else set(map(_rename, targets))
    try:
        settings = {"config": config, "is_trainable": trains, "key_mapping": RENAMED}
        adapted = PeftModel.from_pretrained(model, adapter_name_or_path, **settings)
        fits = get_peft_model_state_dict(adapted).keys() == saved.keys()
    except Exception:  # other shapes, missing names, and whatever else PEFT raises
        fits = False
    if not fits:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
    return adapted


def continue_adapter(
    model: Llava, adapter_name_or_path: str, model_name: str, train_type: str, frozen_parts: Collection[str]
) -> PeftModel:
    """Puts an adapter, which has to be on the parts of `train_type`, on a model to train all but `frozen_parts`."""
    adapted = load_adapter(model, adapter_name_or_path, model_name, trains=True)
    parts = {part_of(name) for name, _ in adapted.named_parameters() if "lora_" in name}
    if parts != set(LORA_PARTS[train_type]):
        has = f"{adapter_name_or_path}, which goes on training, has LoRA in the {' and the '.join(sorted(parts))}"
        raise ValueError(f"--train_type {train_type}: {has}")
    for name, parameter in adapted.named_parameters():
        if part_of(name) in frozen_parts:
            parameter.requires_grad_(False)
    return adapted


def _rename(target: str) -> str:
    """Turns a layer's name, or a pattern of names, from before transformers 4.52 into today's."""
    return re.sub(r"language_model(\\?\.)model(?=\\?\.)", r"model\1language_model", target)
