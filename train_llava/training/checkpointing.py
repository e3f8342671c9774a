"""What is on disk of a run: what is finished, what it can go on from, and whether what was saved is whole."""

import json
import os
import platform
import re
import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from train_llava.cli import ROOT, given_arguments
from train_llava.common.files import replacing

RECIPE = "recipe.yaml"
DERIVED = ("train_type", "learning_rate", "projector_learning_rate", "vision_learning_rate", "bf16", "seed")
LOCK = "_lock"  # held by the run that is at work in a folder; a push to the hub leaves out such names
INCOMPLETE = "unfinished"  # a file that a checkpoint holds while it is being written


def is_checkpoint_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / "trainer_state.json").exists() and not (checkpoint / INCOMPLETE).exists()


@contextmanager
def unfinished(checkpoint: Path, accelerator: Accelerator) -> Iterator[None]:
    """Marks a checkpoint, which all ranks write in the block, as not finished until all of them are done.

    Raises:
        ValueError: it cannot be written. Nothing is left of it.
    """
    try:
        if accelerator.is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / INCOMPLETE).touch()
        yield
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (checkpoint / INCOMPLETE).unlink()
    except Exception as error:  # a full disk is of any type: the tokenizers' is an Exception
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise ValueError(f"{checkpoint} could not be written ({error}); checkpoints before it are whole") from error


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that was written to its end; None if there is none."""
    whole = {
        number_of(folder): folder for folder in Path(output_dir).glob("checkpoint-*") if is_checkpoint_complete(folder)
    }
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
        if (
            checkpoint.name == f"checkpoint-{number}"
            and not checkpoint.is_symlink()
            and is_checkpoint_complete(checkpoint)
        ):
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
        checkpoint = last_complete_checkpoint(args.output_dir) if resume is True else resume
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
    if not is_checkpoint_complete(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint that was written to its end")
    written_by = len(list(checkpoint.glob("rng_state*.pth")))
    if written_by == 0:
        raise ValueError(f"{checkpoint} holds the model only (--save_only_model): a run cannot go on from it")
    if written_by != ranks:
        raise ValueError(f"{checkpoint} was written by {written_by} ranks and this run has {ranks}: take as many")


def check_output_dir(output_dir: str, checkpoint: str | None, resume: bool) -> None:
    """Refuses a folder that holds a model or checkpoints already, unless the run goes on from its last checkpoint.

    Raises:
        ValueError: it does; what was to go on and has not finished a checkpoint may begin anew where it had begun one.
    """
    folder = Path(output_dir)
    holds = [*folder.glob("*.safetensors"), *([] if resume else folder.glob("checkpoint-*"))]
    if checkpoint is not None and Path(checkpoint).absolute().parent.resolve() == folder.resolve():
        last = last_complete_checkpoint(output_dir) or checkpoint
        if (number_of(Path(last)) or 0) > (number_of(Path(checkpoint).resolve()) or 0):
            raise ValueError(f"--resume_from_checkpoint {checkpoint}: {last} is later; move it away, or go on from it")
    elif holds:
        remedy = "remove it, since no checkpoint is there" if resume else "--resume_from_checkpoint true"
        raise ValueError(f"--output_dir {output_dir} holds {holds[0].name}: choose another, or {remedy}")
