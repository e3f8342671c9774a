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

from train_llava.common.files import apply_umask, opening, replacing
from train_llava.model import find_file, part_of

FINGERPRINT = "base_fingerprint.json"  # in an adapter's folder: of the model that it was trained on
PROJECTOR = "projector.safetensors"  # in the folder of a run that trained it alone


def base_tensors(model_name_or_path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's files, mapped from disk: they take no memory, and outlive the folder."""
    unset = dict.fromkeys(("variant", "gguf_file", "use_safetensors", "user_agent"))
    files, _ = _get_resolved_checkpoint_files(model_name_or_path, is_remote_code=False, **unset)
    tensors = {}
    for file in files:
        tensors |= load_state_dict(file)
    return tensors


def tensors_in_files(model: nn.Module, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """A model's tensors and persistent buffers, or an adapter's alone, as files hold them.

    Their names are those of the checkpoint that the model was read from. A tied weight appears once.
    `state_dict` is what DeepSpeed gathered of it; None: the model itself holds everything. An OSError names a
    tensor that was not gathered, or not whole.
    """
    not_whole = "was not gathered whole: ZeRO-3 needs stage3_gather_16bit_weights_on_model_save"
    # An adapter: as many numbers as train
    if isinstance(model, PeftModel):
        try:
            tensors = get_peft_model_state_dict(model, state_dict)
        except KeyError as error:
            raise OSError(f"{error} {not_whole}") from error
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        if sum(tensor.numel() for tensor in tensors.values()) < trained:
            raise OSError(f"the adapter {not_whole}")
        return tensors

    # A whole model: each tensor is there, in its full size
    tensors = model.state_dict() if state_dict is None else dict(state_dict)
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name not in tensors or tensors[name].shape != getattr(parameter, "ds_shape", parameter.shape):
            raise OSError(f"{name} {not_whole}")
        if name in model.all_tied_weights_keys:  # DeepSpeed gathers copies of these
            tensors.pop(name)
    return revert_weight_conversion(model, tensors)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; so NaN equals NaN."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    ours, theirs = (tensor.cpu().contiguous().flatten().view(torch.uint8) for tensor in (ours, theirs))
    return ours.equal(theirs)


def as_read(name: str, tensor: torch.Tensor, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor of `base` with the same values, in the precision of its file; `tensor` itself if there is none.

    For example, training holds a float16 tensor of `base` in float32: unchanged, it is written in float16 again.
    Where `base` lacks the name (a tied weight's other name, or any under ZeRO-3), the values find the tensor.
    """
    dtype = tensor.dtype
    if name in base:
        read = base[name]
        return read if read.dtype != dtype and same_bits(read.to(dtype), tensor) else tensor
    for read in base.values():
        if read.shape != tensor.shape:
            continue
        beginning = read.flatten()[:64].to(dtype)  # tells most tensors apart
        if same_bits(beginning, tensor.flatten()[:64]) and same_bits(read.to(dtype), tensor):
            return read.clone()  # norms may have the same values, and each needs its own storage
    return tensor


def save_weights(
    model: nn.Module,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    base: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype | None = None,
    write_in: Literal["memory", "base", "dtype"] = "memory",
) -> dict[str, torch.Tensor]:
    """Writes a model's weights and configuration, or an adapter's. Returns the tensors for `read_back`.

    Tensors that training has not changed are written as they were read: see `as_read`.

    Args:
        state_dict: see `tensors_in_files`, which may raise an OSError.
        base: the tensors of the checkpoint that the model was read from: see `base_tensors`.
        dtype: the precision in the configuration, in which the model is opened; float32 for too large values.
        write_in: the precision of changed tensors: that of the model in memory, or that of `base`. With
            "dtype", all tensors are written in that.
    """
    tensors, base, dtype = tensors_in_files(model, state_dict), base or {}, dtype or model.dtype
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict)
        apply_umask(*folder.glob("*.safetensors"))
        return tensors

    for name, in_memory in tensors.items():
        if not in_memory.is_floating_point():
            continue
        # The precision that it is written in
        tensor = as_read(name, in_memory, base)
        if write_in == "memory":
            target = tensor.dtype
        else:
            target = base[name].dtype if write_in == "base" and name in base else dtype
        # A value that is too large for the target, or for the precision in the configuration, is kept
        limit = min(torch.finfo(target).max, torch.finfo(dtype).max)
        if torch.finfo(tensor.dtype).max > limit and (largest := max(map(abs, tensor.aminmax()))) > limit:
            print(f"{folder} is to be opened in float32: {name} holds {largest:.3g}, too large for {dtype}")
            dtype = torch.float32
        elif target != tensor.dtype:
            tensor = tensor.to("cpu", target)
        # With its own storage: transformers would copy tensors that share one, as experts do
        tensors[name] = torch.from_dlpack(tensor.contiguous())

    # The weights, and the configuration with the precision in which they are opened
    model.save_pretrained(folder, state_dict=dict(tensors), save_original_format=False)
    apply_umask(*folder.glob("*.safetensors"))
    config = deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    return tensors


def differing_tensor(folder: Path, tensors: dict[str, torch.Tensor]) -> str | None:
    """A name where a folder's files or index hold other tensors; None: they hold these tensors alone."""
    # The files' tensors, and which file has which
    weight_map: dict[str, str] = {}
    for path in sorted(set(folder.glob("*.safetensors")) - {folder / PROJECTOR}):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                expected = name in tensors and name not in weight_map
                if not expected or not same_bits(file.get_tensor(name), tensors[name]):
                    return name
                weight_map[name] = path.name
    if missing := tensors.keys() - weight_map.keys():
        return min(missing)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    fits = not index.exists() or json.loads(index.read_text())["weight_map"] == weight_map
    return None if fits else index.name


def read_back(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises an OSError if the files just saved hold other tensors. `Trainer` catches a ValueError itself."""
    if (name := differing_tensor(folder, tensors)) is not None:
        raise OSError(f"{folder} was not saved whole: {name} is not saved as it is in memory")


@contextmanager
def in_saved_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Gives a model in training, for a while, the precision that it will have when its files are opened.

    Training without DeepSpeed holds trained weights in float32, training with it LoRA's in half precision.
    Opened, LoRA's are float32. All others are `dtype`, or the model's own where that is not float32.
    """
    opened_in = dtype if model.dtype == torch.float32 else model.dtype
    data_in_training = {}
    for name, parameter in model.named_parameters():
        target = torch.float32 if "lora_" in name else opened_in
        if parameter.is_floating_point() and parameter.dtype != target and not is_deepspeed_zero3_enabled():
            data_in_training[parameter] = parameter.data
            parameter.data = parameter.data.to(target)
    try:
        yield
    finally:
        for parameter, data in data_in_training.items():
            parameter.data = data


def save_projector(folder: Path) -> None:
    """Writes the projector of a model just saved into its own file, too, for `build_model --projector`."""
    tensors = base_tensors(str(folder)).items()
    projector = {name: tensor for name, tensor in tensors if part_of(name) == "projector"}
    with replacing(folder / PROJECTOR) as file:
        save_file(projector, file)


def first_values(model: nn.Module) -> dict[str, list[float]]:
    """The first 8 numbers of each parameter not in 4 or 8 bits. They tell models of one shape apart."""
    return {
        # Under ZeRO-3, the first rank's share is the beginning
        name: getattr(parameter, "ds_tensor", parameter).detach().flatten()[:8].float().tolist()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }


def base_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """The `first_values` of the model below an adapter, without a projector that the adapter brings."""
    fingerprint = {}
    for name, numbers in first_values(model).items():
        if not any(part in name for part in ("lora_", ".original_module.", ".modules_to_save.")):
            fingerprint[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = numbers
    return fingerprint


def save_base_fingerprint(model: nn.Module, folder: Path) -> None:
    """Writes the fingerprint of the model that an adapter is trained on into the adapter's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINGERPRINT).write_text(json.dumps(base_fingerprint(model)))


def check_base(adapter_name_or_path: str, model: nn.Module, model_name: str) -> None:
    """Raises a ValueError for a model other than an adapter's own, by a fingerprint, up to half precision's noise."""
    path = find_file(adapter_name_or_path, FINGERPRINT)
    if path is None:  # trained elsewhere
        return
    numbers, same = base_fingerprint(model), True
    with opening(str(path)):
        for name, saved in json.loads(path.read_text()).items():
            for theirs, ours in zip(saved, numbers.get(name, []), strict=False):
                same = same and abs(theirs - ours) <= abs(theirs) / 128 + 1e-6
    if not same:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
