"""Writes weights so that they read back bit for bit, and compares them with a base model's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from train_llava.common.files import apply_umask, replacing
from train_llava.model import find_file, part_of

FINGERPRINT = "base_fingerprint.json"  # of the model that an adapter was trained on, in the adapter's folder


PROJECTOR = "projector.safetensors"  # of a run that trained it alone


def base_tensors(model_name_or_path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's files by their names there.

    They are mapped from the disk: they take no memory, and stay when the folder is removed.
    """
    files, _ = _get_resolved_checkpoint_files(model_name_or_path, None, None, None, None, is_remote_code=False)
    return {name: tensor for file in files for name, tensor in load_state_dict(file).items()}


def tensors_in_files(model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """A model's tensors, persistent buffers among them, by their names in files; with an adapter, the adapter's alone.

    The names are those of the checkpoint that the model was read from. A tied weight is there once.

    Args:
        state_dict: what DeepSpeed has gathered of the model; None: the model itself holds everything.

    Raises:
        OSError: a tensor was not gathered, or not whole.
    """
    fault = "was not gathered whole: ZeRO-3 needs stage3_gather_16bit_weights_on_model_save"
    if isinstance(model, PeftModel):
        try:
            tensors = get_peft_model_state_dict(model, state_dict)
        except KeyError as error:
            raise OSError(f"{error} {fault}") from error
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        if sum(tensor.numel() for tensor in tensors.values()) < trained:
            raise OSError(f"the adapter {fault}")
        return tensors
    held = model.state_dict() if state_dict is None else dict(state_dict)
    for name, place in model.state_dict(keep_vars=True).items():
        if name not in held or held[name].shape != getattr(place, "ds_shape", place.shape):
            raise OSError(f"{name} {fault}")
        if name in model.all_tied_weights_keys:  # of which DeepSpeed hands over copies
            held.pop(name)
    return revert_weight_conversion(model, held)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have one type and shape and hold the same, NaN included."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    ours, theirs = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs))
    return ours.equal(theirs)


def as_read(name: str, held: torch.Tensor, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of `base` that gives `held` when it is loaded in its precision; `held` itself where training has
    changed it. A name that is not in `base` is found by its values: a tied weight's other one, or any under ZeRO-3."""
    if name in base and base[name].dtype == held.dtype:
        return held
    if name in base:
        return base[name] if same_bits(base[name].to(held.dtype), held) else held
    for tensor in base.values():
        begins_alike = tensor.shape == held.shape and same_bits(_beginning(tensor).to(held.dtype), _beginning(held))
        if begins_alike and same_bits(tensor.to(held.dtype), held):
            return tensor.clone()  # several tensors may have these values, as norms do, and each needs its own storage
    return held


def _beginning(tensor: torch.Tensor) -> torch.Tensor:
    """The first numbers of a tensor, which tell most tensors apart at once."""
    return tensor.flatten()[:64]


def save_weights(
    model: nn.Module,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    base: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    write_in: Literal["held", "base", "dtype"] = "held",
) -> dict[str, torch.Tensor]:
    """Writes a model's weights and configuration, or an adapter's. Returns the tensors as written, for `read_back`.

    What training has left as it was read is written as it was read: see `as_read`.

    Args:
        state_dict: see `tensors_in_files`.
        base: the tensors of the checkpoint that the model was read from: see `base_tensors`.
        dtype: the precision that the configuration names, in which the model is opened; float32 where a value is too
            large for it.
        write_in: what the other tensors are written in: as the model holds them, or as `base` has them. With "dtype"
            all tensors are written in that.

    Raises:
        OSError: see `tensors_in_files`.
    """
    tensors, base, dtype = tensors_in_files(model, state_dict), base or {}, dtype or model.dtype
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict)
        apply_umask(*folder.glob("*.safetensors"))
        return tensors
    for name, held in tensors.items():
        if not held.is_floating_point():
            continue
        tensor = as_read(name, held, base)
        target = {"held": tensor.dtype, "base": base[name].dtype if name in base else dtype, "dtype": dtype}[write_in]
        limit = min(torch.finfo(target).max, torch.finfo(dtype).max)
        if torch.finfo(tensor.dtype).max > limit and (largest := max(map(abs, tensor.aminmax()))) > limit:
            print(f"{folder} is to be opened in float32: {name} holds {largest:.3g}, too large for {dtype}")
            dtype = torch.float32
        elif target != tensor.dtype:
            tensor = tensor.to("cpu", target)
        # with a storage of its own: of those that share one, as experts do, transformers would make copies
        tensors[name] = torch.from_dlpack(tensor.contiguous())
    model.save_pretrained(folder, state_dict=dict(tensors), save_original_format=False)
    apply_umask(*folder.glob("*.safetensors"))
    config = deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    return tensors


def differing_tensor(folder: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """The first tensor that a folder's files do not hold as given, by name, type, shape and values, or hold beside
    these; or their index, where it says otherwise than they do. None: all is as given."""
    files: dict[str, str] = {}
    for path in sorted(set(folder.glob("*.safetensors")) - {folder / PROJECTOR}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name in files or name not in tensors or not same_bits(file.get_tensor(name), tensors[name]):
                    return name
                files[name] = path.name
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    right = not index.exists() or json.loads(index.read_text())["weight_map"] == files
    return next(iter(tensors.keys() - files.keys()), None if right else index.name)


def read_back(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Makes sure that the weights just saved are those that were to be saved: see `differing_tensor`.

    Raises:
        OSError: they are not. It is no ValueError, which `Trainer` takes for another thing under DeepSpeed.
    """
    if (name := differing_tensor(folder, tensors)) is not None:
        raise OSError(f"{folder} was not saved whole: {name} is not saved as it is in memory")


@contextmanager
def in_saved_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gives a model in training, for a while, the precision that it has once it is saved and opened again.

    What trains is held in float32 by training without DeepSpeed, and LoRA's matrices in half precision by training
    with it, each otherwise than by `from_pretrained`. `dtype` is what a model that is held in float32 is opened in.
    """
    held, opened_in = {}, dtype if model.dtype == torch.float32 else model.dtype
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if "lora_" in name else opened_in
        if parameter.is_floating_point() and parameter.dtype != dtype and not is_deepspeed_zero3_enabled():
            held[parameter] = parameter.data
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


def save_projector(folder: Path) -> None:
    """Writes the projector of a whole model just saved alone, too, for `build_model --projector`."""
    held = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= {name: file.get_tensor(name) for name in file.keys() if part_of(name) == "projector"}  # noqa: SIM118
    with replacing(folder / PROJECTOR) as file:
        save_file(held, file)


def first_values(model: nn.Module) -> dict[str, list[float]]:
    """The first numbers of every tensor of a model, by which it is told from another one of its shape.

    Left out are tensors in 4 or 8 bits, which no model in more bits has.
    """
    return {
        # where ZeRO-3 has shared a parameter out, the first rank holds its beginning
        name: getattr(parameter, "ds_tensor", parameter).detach().flatten()[:8].float().tolist()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }


def base_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """The `first_values` of a model, with or without an adapter, that an adapter leaves as they are.

    The projector is left out: an adapter brings it along.
    """
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): numbers
        for name, numbers in first_values(model).items()
        if "lora_" not in name and "multi_modal_projector" not in name
    }


def save_base_fingerprint(model: nn.Module, folder: Path) -> None:
    """Writes the fingerprint of the model that an adapter is trained on into the adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINGERPRINT).write_text(json.dumps(base_fingerprint(model)))


def check_base(adapter_name_or_path: str, model: nn.Module, model_name: str) -> None:
    """Refuses a model that is not the one an adapter was trained on, as far as the adapter's folder tells.

    Numbers may differ by what half precision rounds away.

    Raises:
        ValueError: it is another one, or the fingerprint cannot be read.
    """
    path = find_file(adapter_name_or_path, FINGERPRINT)
    if path is None:  # trained elsewhere
        return
    numbers = base_fingerprint(model)
    try:
        pairs = [
            pair
            for name, saved in json.loads(path.read_text()).items()
            for pair in zip(saved, numbers.get(name, []), strict=False)
        ]
        same = all(abs(a - b) <= abs(a) / 128 + 1e-6 for a, b in pairs)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not same:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
