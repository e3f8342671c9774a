"""Opens a LLaVA checkpoint to be asked, with or without a LoRA adapter."""

import re
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from train_llava.chat import Processor
from train_llava.cli import device
from train_llava.model import Llava, load_checkpoint
from train_llava.run_folder import check_base

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


def load_adapter(model: Llava, adapter_name_or_path: str, model_name: str) -> PeftModel:
    """Puts a LoRA adapter on a model, and makes sure that every tensor of it found its place there.

    One that was saved by transformers before 4.52, where the parts of a LLaVA had other names, is read, too.

    Raises:
        ValueError: it cannot be opened, or was trained on another model; the message says which.
    """
    folder, name = Path(adapter_name_or_path), "adapter_config.json"
    try:
        config = PeftConfig.from_pretrained(adapter_name_or_path)
        if not isinstance(config, LoraConfig):
            raise ValueError("it is no LoRA adapter's")
        name = next((path.name for path in folder.glob("adapter_model.*")), "adapter_model.safetensors")
        saved = load_peft_weights(adapter_name_or_path, device="cpu", key_mapping=RENAMED)
    except Exception as error:  # a broken file raises whatever its reader does
        if (folder / name).exists():
            raise ValueError(f"{folder / name} cannot be read: {error}") from error
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub") from error
    check_base(adapter_name_or_path, model, model_name)
    targets = config.target_modules or set()
    config.target_modules = _rename(targets) if isinstance(targets, str) else set(map(_rename, targets))
    try:
        adapted = PeftModel.from_pretrained(model, adapter_name_or_path, config=config, key_mapping=RENAMED)
        fits = get_peft_model_state_dict(adapted).keys() == saved.keys()
    except Exception:  # shapes that differ, names that are not there, and what else PEFT meets
        fits = False
    if not fits:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
    return adapted


def _rename(target: str) -> str:
    """The name of a layer, or a pattern of names, as transformers before 4.52 had it, in today's."""
    return re.sub(r"language_model(\\?\.)model(?=\\?\.)", r"model\1language_model", target)
