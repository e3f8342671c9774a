"""What is on disk of a run: what is finished, what it can go on from, and whether what was saved is whole."""

import json
import os
import platform
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import _get_resolved_checkpoint_files, load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from train_llava.cli import ROOT, apply_umask, given_arguments, replacing
from train_llava.model import find_file, part_of

FINGERPRINT = "base_fingerprint.json"  # of the model that an adapter was trained on, in the adapter's folder
RECIPE = "recipe.yaml"
DERIVED = ("train_type", "learning_rate", "projector_learning_rate", "vision_learning_rate", "bf16", "seed")
PROJECTOR = "projector.safetensors"  # of a run that trained it alone
LOCK = "_lock"  # held by the run that is at work in a folder; a push to the hub leaves out such names
UNFINISHED = "unfinished"  # a file that a checkpoint holds while it is being written
_known: dict[Path, tuple[int, set[int | str]]] = {}  # of each log of bad records, how much is read, and the records


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / "trainer_state.json").exists() and not (checkpoint / UNFINISHED).exists()


@contextmanager
def unfinished(checkpoint: Path, accelerator: Accelerator) -> Iterator[None]:
    """Marks a checkpoint, which all ranks write in the block, as not finished until all of them are done.

    Raises:
        ValueError: it cannot be written. Nothing is left of it.
    """
    try:
        if accelerator.is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / UNFINISHED).touch()
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (checkpoint / UNFINISHED).unlink()
    except Exception as error:  # a full disk is of any type: the tokenizers' is an Exception
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise ValueError(f"{checkpoint} could not be written ({error}); checkpoints before it are whole") from error


def finished_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that was written to its end; None if there is none."""
    whole = {number_of(folder): folder for folder in Path(output_dir).glob("checkpoint-*") if is_finished(folder)}
    whole.pop(None, None)  # a copy that somebody has put aside
    return str(whole[max(whole)]) if whole else None


def number_of(checkpoint: Path) -> int | None:
    """The step that a checkpoint was written at; None where its name tells none."""
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.absolute().name)
    return int(found[1]) if found else None


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints that a run wrote into its folder until `limit` are left; None: all stay.

    The last one stays, and the best. Links and copies that people put there are not the run's: a copy under another
    number names the step of its original.
    """
    own = {}
    for checkpoint in folder.glob("checkpoint-*"):
        number = number_of(checkpoint)
        if checkpoint.name == f"checkpoint-{number}" and not checkpoint.is_symlink() and is_finished(checkpoint):
            with suppress(ValueError):  # a file that somebody has broken
                if json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == number:
                    own[number] = checkpoint
    for number in sorted(own)[:-1]:
        if limit is not None and len(own) > limit and (best is None or number != number_of(Path(best))):
            shutil.rmtree(own.pop(number), ignore_errors=True)


@contextmanager
def locked(args: TrainingArguments) -> Iterator[None]:
    """Keeps every other run out of a run's folder; the system frees it of a run that dies.

    Raises:
        OSError, ValueError: another run is at work in it, or it cannot be written to.
    """
    folder = Path(args.output_dir)
    file, is_new = folder / LOCK, not folder.exists()
    lock = FileLock(file)

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = file.read_text()
            raise ValueError(f"--output_dir {folder}: another run is at work in it ({holder})") from None
        file.write_text(f"process {os.getpid()} on {platform.node()}")

    on_first_rank(args, acquire)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
            lock.release()
            if is_new and not any(folder.iterdir()):
                folder.rmdir()


def on_first_rank(args: TrainingArguments, task: Callable[[], Any]) -> Any:
    """What a task returns on the first rank, for all ranks; the others wait for it.

    Raises:
        ValueError: the task has raised it, or an OSError.
    """
    outcome, error = None, None
    if args.process_index == 0:
        try:
            outcome = task()
        except (OSError, ValueError) as raised:
            error = str(raised)
    if args.world_size > 1:
        outcome, error = broadcast_object_list([outcome, error])
    if error is not None:
        raise ValueError(error)
    return outcome


def requested_checkpoint(args: TrainingArguments) -> tuple[bool | str, str | None]:
    """What `--resume_from_checkpoint` says, a folder or whether to go on, and the checkpoint that this means.

    Raises:
        ValueError: it says neither.
    """
    resume, checkpoint = args.resume_from_checkpoint or "false", None
    if not Path(resume).is_dir():
        try:
            resume = string_to_bool(resume)
        except ArgumentTypeError as error:
            raise ValueError(f"--resume_from_checkpoint {resume} is not true, and no folder") from error
    if resume:
        checkpoint = finished_checkpoint(args.output_dir) if resume is True else resume
    return resume, checkpoint


def starting_point(args: TrainingArguments) -> str | None:
    """The checkpoint that a run goes on from: the last finished one, or what is named; None: it starts anew.

    Raises:
        ValueError: there is none to go on from, or the folder to write to holds a model already.
    """
    resume, checkpoint = requested_checkpoint(args)
    check_output_dir(args.output_dir, checkpoint, resume is True)
    if resume and args.process_index == 0:
        start = "no checkpoint was finished: training from the start"
        print(f"resuming from {checkpoint}" if checkpoint else start)
    if checkpoint is not None:
        check_resumable(Path(checkpoint), args.world_size)
    elif args.local_process_index == 0:
        for earlier in Path(args.output_dir).glob(
            "bad_*samples.jsonl"
        ):  # another run's bad records are not this one's
            earlier.unlink(missing_ok=True)  # another node's first rank may have been faster
    return checkpoint


def write_recipe(*arguments: Any) -> None:
    """Writes what a run was started with to its folder, as a recipe by which it can be run again.

    That is all that was given, and of the rest what was derived from it. An earlier start's recipe that says otherwise
    is kept beside it as recipe-1.yaml, recipe-2.yaml, …

    Args:
        arguments: the instances of the run's dataclasses; the last are its `TrainingArguments`.
    """
    args = arguments[-1]
    if args.process_index != 0:
        return
    given = given_arguments([type(part) for part in arguments]) | {name: getattr(args, name) for name in DERIVED}
    if "deepspeed" in given and Path(given["deepspeed"]).parent == ROOT:
        given["deepspeed"] = Path(given["deepspeed"]).name
    names = [field.name for part in arguments for field in fields(part)]
    kept = [name for name in names if name in given and name != "local_rank" and not name.endswith("_token")]
    folder = Path(args.output_dir)
    command = "bash run_zero2.sh" if args.deepspeed else "python -m train_llava.train"
    text = f"# What a run on {args.world_size} ranks was started with; again: {command} THIS_FILE --output_dir NEW\n"
    text += yaml.safe_dump({name: given[name] for name in kept}, allow_unicode=True, sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RECIPE).exists() and (folder / RECIPE).read_text(encoding="utf-8") != text:
        shutil.copy(folder / RECIPE, folder / f"recipe-{len(list(folder.glob('recipe-*.yaml'))) + 1}.yaml")
    with replacing(folder / RECIPE) as file:
        file.write_text(text, encoding="utf-8")


def check_resumable(checkpoint: Path, ranks: int) -> None:
    """Refuses what a run of so many ranks cannot go on from.

    Raises:
        ValueError: the checkpoint is not whole, or was written by another number of ranks, each of which keeps a part
            of the optimizer's state.
    """
    if not is_finished(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint that was written to its end")
    written_by = len(list(checkpoint.glob("rng_state*.pth")))
    if written_by == 0:
        raise ValueError(f"{checkpoint} holds the model only (--save_only_model): a run cannot go on from it")
    if written_by != ranks:
        raise ValueError(f"{checkpoint} was written by {written_by} ranks and this run has {ranks}: take as many")


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
def as_opened(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
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


def first_numbers(model: nn.Module) -> dict[str, list[float]]:
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
    """The `first_numbers` of a model, with or without an adapter, that an adapter leaves as they are.

    The projector is left out: an adapter brings it along.
    """
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): numbers
        for name, numbers in first_numbers(model).items()
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


def check_output_dir(output_dir: str, checkpoint: str | None, resume: bool) -> None:
    """Refuses a folder that holds a model or checkpoints already, unless the run goes on from its last checkpoint.

    Raises:
        ValueError: it does; what was to go on and has not finished a checkpoint may begin anew where it had begun one.
    """
    folder = Path(output_dir)
    holds = [*folder.glob("*.safetensors"), *([] if resume else folder.glob("checkpoint-*"))]
    if checkpoint is not None and Path(checkpoint).absolute().parent.resolve() == folder.resolve():
        last = finished_checkpoint(output_dir) or checkpoint
        if (number_of(Path(last)) or 0) > (number_of(Path(checkpoint).resolve()) or 0):
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {last} is later; move it away, or go on from it")
    elif holds:
        remedy = "remove it, since no checkpoint is there" if resume else "--resume_from_checkpoint true"
        raise ValueError(f"--output_dir {output_dir} holds {holds[0].name}: choose another, or {remedy}")


def log_bad_sample(log: Path, record: int | str, record_id: str, reason: str) -> int:
    """Adds a bad record to a log that ranks and workers share, unless it is there; returns how many there are.

    `record` is its place in the data, since ids may be missing or the same. A process reads what others have added
    since it last looked, and nothing twice: there may be many, and each is met again in every pass.
    """
    read, known = _known.get(log, (0, set()))
    size = log.stat().st_size if log.exists() else 0
    if size < read:  # another run's
        read, known = 0, set()
    if record not in known:
        log.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(log.with_suffix(".lock")), open(log, "ab+") as file:
            file.seek(read)
            added = file.read()
            for line in added.splitlines():
                with suppress(ValueError):  # torn, by a full disk
                    known.add(json.loads(line)["record"])
            if record not in known:
                line = json.dumps({"record": record, "id": record_id, "reason": reason}, ensure_ascii=False)
                torn = b"\n" if added and not added.endswith(b"\n") else b""
                file.write(torn + line.encode(errors="backslashreplace") + b"\n")
                known.add(record)
            _known[log] = file.tell(), known
    return len(known)
