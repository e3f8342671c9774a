"""A run's files on disk: its lock, its checkpoints, its recipe, and the checkpoint that it starts from."""

import json
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from train_llava.cli import ROOT, given_arguments
from train_llava.common.files import held, replacing

RECIPE = "recipe.yaml"
SETTINGS = "resume.json"  # in a run's folder and in each checkpoint: the settings that a resume compares
DERIVED = ("train_type", "learning_rate", "projector_learning_rate", "vision_learning_rate", "bf16", "seed")
LOCK = "_lock"  # locked by the run that writes to the folder; a push to the hub leaves out such names
INCOMPLETE = "unfinished"  # a file that a checkpoint holds while it is being written


def is_checkpoint_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / "trainer_state.json").exists() and not (checkpoint / INCOMPLETE).exists()


@contextmanager
def marked_incomplete(checkpoint: Path, accelerator: Accelerator) -> Iterator[None]:
    """Marks a checkpoint as incomplete until all ranks have left the block; an error removes it."""
    try:
        if accelerator.is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / INCOMPLETE).touch()
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (checkpoint / INCOMPLETE).unlink()
    except Exception as error:  # a full disk raises errors of any type
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise ValueError(f"{checkpoint} could not be written ({error}); checkpoints before it are whole") from error


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that was written to its end; None if there is none."""
    folders = filter(is_checkpoint_complete, Path(output_dir).glob("checkpoint-*"))
    complete = {number_of(folder): str(folder) for folder in folders}
    complete.pop(None, None)  # a copy may have another name
    return complete[max(complete)] if complete else None


def number_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint, by its name; None if the name is another."""
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.absolute().name)
    return int(match[1]) if match else None


def rotate_checkpoints(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints that a run wrote into its folder until `limit` are left; None: all stay.

    The last and the best stay. So do links and copies of people: a copy's state has another step than its name.
    """
    # The run's own checkpoints
    own = {}
    for checkpoint in folder.glob("checkpoint-*"):
        number = number_of(checkpoint)
        has_own_name = checkpoint.name == f"checkpoint-{number}" and not checkpoint.is_symlink()
        if has_own_name and is_checkpoint_complete(checkpoint):
            with suppress(ValueError):  # a broken file
                if json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == number:
                    own[number] = checkpoint
    # Without the last and the best, as many as are too many
    for number in sorted(own)[:-1]:
        if limit is not None and len(own) > limit and (best is None or number != number_of(Path(best))):
            shutil.rmtree(own.pop(number), ignore_errors=True)


@contextmanager
def locked(args: TrainingArguments) -> Iterator[None]:
    """Keeps every other run out of a run's folder; a ValueError says that one is at work in it."""
    folder, lock = Path(args.output_dir), ExitStack()
    is_new = not folder.exists()

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(held(folder / LOCK, f"--output_dir {folder}: another run is at work in it"))

    on_first_rank(args, acquire)
    try:
        with lock:
            yield
    finally:
        # A folder that stays empty, because the run fails early, is removed again
        if args.process_index == 0 and is_new and not any(folder.iterdir()):
            folder.rmdir()


def on_first_rank(args: TrainingArguments, task: Callable[[], Any]) -> Any:
    """Runs a task on the first rank. All ranks return its result, or raise its error as a ValueError."""
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
    """The value of `--resume_from_checkpoint`, a folder or a bool, and the checkpoint that it leads to."""
    resume, checkpoint = args.resume_from_checkpoint or "false", None
    if not Path(resume).is_dir():
        try:
            resume = string_to_bool(resume)
        except ArgumentTypeError as error:
            raise ValueError(f"--resume_from_checkpoint {resume} is not true, and no folder") from error
    if resume:
        checkpoint = last_complete_checkpoint(args.output_dir) if resume is True else resume
    return resume, checkpoint


def starting_point(args: TrainingArguments) -> str | None:
    """The checkpoint that a run resumes from, the last complete one or a given one; None: the run starts anew.

    A ValueError says why it cannot resume, or that its folder holds a model already.
    """
    resume, checkpoint = requested_checkpoint(args)
    check_output_dir(args.output_dir, checkpoint, resume is True)
    if resume and args.process_index == 0:
        print(f"resuming from {checkpoint}" if checkpoint else "no checkpoint was finished: training from the start")
        if checkpoint is not None and not (Path(checkpoint) / SETTINGS).exists():
            print(f"{checkpoint} does not tell its run's settings: repeat them unchanged")
    if checkpoint is not None:
        check_resumable(Path(checkpoint), args.world_size)
    elif args.local_process_index == 0:
        # Another run's bad records are not this one's. Another node's first rank may be faster
        for log in Path(args.output_dir).glob("bad_*samples.jsonl"):
            log.unlink(missing_ok=True)
    return checkpoint


def write_recipe(*arguments: Any) -> None:
    """Writes a run's arguments to its folder, as a recipe that starts the run again.

    These are the arguments of the command line, and those derived from them. A different recipe of an earlier start
    is saved as recipe-1.yaml, recipe-2.yaml, … `arguments` are the instances of the run's dataclasses; the last are
    its `TrainingArguments`.
    """
    args = arguments[-1]
    if args.process_index != 0:
        return
    # By name, in the order of the dataclasses, without secrets
    values = given_arguments([type(part) for part in arguments]) | {name: getattr(args, name) for name in DERIVED}
    if args.batches is not None:  # as `auto` chose; the accumulation follows
        values["per_device_train_batch_size"], values["activation_checkpointing"] = args.batches[0]
    if "deepspeed" in values and Path(values["deepspeed"]).parent == ROOT:
        values["deepspeed"] = Path(values["deepspeed"]).name
    recipe = {}
    for field in chain.from_iterable(map(fields, arguments)):
        if field.name in values and field.name != "local_rank" and not field.name.endswith("_token"):
            recipe[field.name] = values[field.name]

    # The file, and a copy of a different one
    folder = Path(args.output_dir)
    command = "bash run_zero2.sh" if args.deepspeed else "python -m train_llava.train"
    text = f"# What a run on {args.world_size} ranks was started with; again: {command} THIS_FILE --output_dir NEW\n"
    text += yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / RECIPE).exists() and (folder / RECIPE).read_text(encoding="utf-8") != text:
        shutil.copy(folder / RECIPE, folder / f"recipe-{len(list(folder.glob('recipe-*.yaml'))) + 1}.yaml")
    with replacing(folder / RECIPE) as file:
        file.write_text(text, encoding="utf-8")


def check_resumable(checkpoint: Path, ranks: int) -> None:
    """Raises a ValueError if a run of `ranks` processes cannot resume from a checkpoint.

    Each rank saves a part of the optimizer's state, so the number of ranks has to stay the same.
    """
    if not is_checkpoint_complete(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint that was written to its end")
    written_by = len(list(checkpoint.glob("rng_state*.pth")))
    if written_by == 0:
        raise ValueError(f"{checkpoint} holds the model only (--save_only_model): a run cannot go on from it")
    if written_by != ranks:
        raise ValueError(f"{checkpoint} was written by {written_by} ranks and this run has {ranks}: take as many")


def check_output_dir(output_dir: str, checkpoint: str | None, resume: bool) -> None:
    """Raises a ValueError if a folder holds a model or checkpoints, and the run does not resume from the last.

    With `resume`, a run without a complete checkpoint may begin anew beside an incomplete one.
    """
    folder = Path(output_dir)
    files = list(folder.glob("*.safetensors"))
    if not resume:
        files += folder.glob("checkpoint-*")
    if checkpoint is not None and Path(checkpoint).absolute().parent.resolve() == folder.resolve():
        last = last_complete_checkpoint(output_dir) or checkpoint
        if (number_of(Path(last)) or 0) > (number_of(Path(checkpoint).resolve()) or 0):
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {last} is later; move it away, or go on from it")
    elif files:
        remedy = "remove it, since no checkpoint is there" if resume else "--resume_from_checkpoint true"
        raise ValueError(f"--output_dir {output_dir} holds {files[0].name}: choose another, or {remedy}")
