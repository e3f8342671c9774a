"""What is on disk of a run: what is finished, what it can go on from, and whether what was saved is whole."""

import json
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainingArguments
from transformers.core_model_loading import revert_weight_conversion
from transformers.hf_argparser import string_to_bool
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import cached_file

from train_llava.cli import ROOT, given_arguments, replacing
from train_llava.model import count_parameters, part_of

FINGERPRINT = "base_fingerprint.json"  # of the model that an adapter was trained on, in the adapter's folder
RECIPE = "recipe.yaml"
DERIVED = ("train_type", "learning_rate", "projector_learning_rate", "vision_learning_rate", "bf16", "seed")
PROJECTOR = "projector.safetensors"  # of a run that trained it alone
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


def starting_point(args: TrainingArguments) -> str | None:
    """The checkpoint that a run goes on from: the last finished one, or what is named; None: it starts anew.

    Raises:
        ValueError: there is none to go on from, or the folder to write to holds a model already.
    """
    resume, checkpoint = args.resume_from_checkpoint or "false", None
    if not Path(resume).is_dir():
        try:
            resume = string_to_bool(resume)
        except ArgumentTypeError as error:
            raise ValueError(f"--resume_from_checkpoint {resume} is not true, and no folder") from error
    if resume:
        checkpoint = finished_checkpoint(args.output_dir) if resume is True else resume
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


def read_back(folder: Path, model: nn.Module) -> None:
    """Looks at the weights just saved: as many numbers as the model has (an adapter: as many as train), none missing.

    Raises:
        ValueError: they are not all there.
    """
    counts = count_parameters(model).values()
    expected = sum(trainable if isinstance(model, PeftModel) else total for trainable, total in counts)
    numbers = {}
    for path in set(folder.glob("*.safetensors")) - {folder / PROJECTOR}:
        with safe_open(path, framework="pt") as file:
            numbers |= {name: torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()}  # noqa: SIM118
    if model.config.get_text_config().tie_word_embeddings:  # DeepSpeed writes the one tensor under both names
        numbers = {name: number for name, number in numbers.items() if not name.endswith("lm_head.weight")}
    empty = [name for name, number in numbers.items() if number == 0]
    if empty or sum(numbers.values()) != expected or not any("multi_modal_projector" in name for name in numbers):
        what = f"{empty[0]} is empty" if empty else f"{sum(numbers.values()):,} numbers in place of {expected:,}"
        raise ValueError(f"{folder} was not saved whole: {what}")


@contextmanager
def as_opened(model: nn.Module) -> Iterator[None]:
    """Gives a model in training, for a while, the precision that it has once it is saved and opened again.

    What trains is held in float32 by training without DeepSpeed, and LoRA's matrices in half precision by training
    with it, each otherwise than by `from_pretrained`.
    """
    held, saved_in = {}, model.dtype
    for name, parameter in model.named_parameters():
        dtype = torch.float32 if "lora_" in name else saved_in
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


def find_file(model_name_or_path: str, name: str) -> Path | None:
    """A file of a model's, in its folder or from the hub; None where it has none, or the hub is not reached.

    Raises:
        OSError: there is no such model.
    """
    settings = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(model_name_or_path, name, **settings)
    return found and Path(found)


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


def differing_tensor(folder: Path, model: nn.Module) -> str | None:
    """The first tensor of a model just saved that is not in the folder as it is in memory; None where all are.

    One is read at a time. In files, a whole model's have the names of the checkpoint that it was read from.
    """
    if isinstance(model, PeftModel):
        expected = get_peft_model_state_dict(model)
    else:
        expected = revert_weight_conversion(model, remove_tied_weights_from_state_dict(model.state_dict(), model))
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name not in expected or not torch.equal(file.get_tensor(name), expected.pop(name).cpu()):
                    return name
    return next(iter(expected), None)


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
