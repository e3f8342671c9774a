"""Opens a LLaVA checkpoint with or without a LoRA adapter, to be asked or to go on training."""

import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from train_llava.chat import Processor
from train_llava.cli import device
from train_llava.model import Llava, LoraArguments, load_checkpoint
from train_llava.modeling.weights import check_base

# The parts of a LLaVA as transformers named them before 4.52, and their names today
RENAMED = {
    r"^language_model\.lm_head": "lm_head",
    r"^language_model\.model": "model.language_model",
    r"^(vision_tower|multi_modal_projector)": r"model.\1",
}


def load_model(
    model_name_or_path: str, adapter_name_or_path: str | None = None, bits: int | None = None
) -> tuple[Llava | PeftModel, Processor]:
    """Opens a checkpoint, and an adapter on top of it, on the accelerator where there is one.

    Raises:
        ValueError: either cannot be opened, or the adapter is not one of this model's.
    """
    model, processor = load_checkpoint(model_name_or_path, bits=bits)
    if adapter_name_or_path is not None:
        model = load_adapter(model, adapter_name_or_path, model_name_or_path)
    if not bits:
        model = model.to(device())
    return model.eval(), processor


def read_adapter_config(adapter_name_or_path: str) -> LoraConfig:
    """The configuration of a LoRA adapter, a folder or a hub id.

    Raises:
        ValueError: it cannot be opened; the message names the broken file.
    """
    path, name = Path(adapter_name_or_path), "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(adapter_name_or_path)
        if not isinstance(config, LoraConfig):
            raise ValueError("it is no LoRA adapter's")
    except Exception as error:  # a broken file raises whatever its reader does
        if (path / name).exists():
            raise ValueError(f"{path / name} cannot be read: {error}") from error
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub") from error
    return config


def continued(adapter_name_or_path: str, given: dict[str, Any]) -> LoraArguments:
    """The LoRA of an adapter that goes on training.

    Args:
        given: what the command line says of LoRA, by argument.

    Raises:
        ValueError: it says otherwise than the adapter, or the adapter does not train the projector.
    """
    config = read_adapter_config(adapter_name_or_path)
    if "multi_modal_projector" not in (config.modules_to_save or []):
        raise ValueError(f"{adapter_name_or_path} holds no projector: merge it by merge_lora, and train a new adapter")
    own = {name: getattr(config, name.replace("lora_r", "r")) for name in vars(LoraArguments())}
    for name, value in own.items():
        if given.get(name, value) != value:
            raise ValueError(f"--{name} {given[name]}: {adapter_name_or_path}, which goes on training, has {value}")
    return LoraArguments(**own)


def load_adapter(model: Llava, adapter_name_or_path: str, model_name: str, trains: bool = False) -> PeftModel:
    """Puts a LoRA adapter on a model, and makes sure that every tensor of it found its place there.

    With `trains` it goes on training, its projector with it. One that was saved by transformers before 4.52, where the
    parts of a LLaVA had other names, is read, too.

    Raises:
        ValueError: it cannot be opened, or was trained on another model; the message says which.
    """
    config, folder = read_adapter_config(adapter_name_or_path), Path(adapter_name_or_path)
    name = next((path.name for path in folder.glob("adapter_model.*")), "adapter_model.safetensors")
    try:
        saved = load_peft_weights(adapter_name_or_path, device="cpu", key_mapping=RENAMED)
    except Exception as error:  # a broken file raises whatever its reader does
        if (folder / name).exists():
            raise ValueError(f"{folder / name} cannot be read: {error}") from error
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub") from error
    check_base(adapter_name_or_path, model, model_name)
    targets = config.target_modules or set()
    config.target_modules = _rename(targets) if isinstance(targets, str) else set(map(_rename, targets))
    try:
        settings = {"config": config, "is_trainable": trains, "key_mapping": RENAMED}
        adapted = PeftModel.from_pretrained(model, adapter_name_or_path, **settings)
        fits = get_peft_model_state_dict(adapted).keys() == saved.keys()
    except Exception:  # shapes that differ, names that are not there, and what else PEFT meets
        fits = False
    if not fits:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
    return adapted


def _rename(target: str) -> str:
    """The name of a layer, or a pattern of names, as transformers before 4.52 had it, in today's."""
    return re.sub(r"language_model(\\?\.)model(?=\\?\.)", r"model\1language_model", target)
