"""Builds DeepSpeed's extensions in C++ before a run needs them.

torch keeps two builds apart by a file, `lock`, in the extension's folder. A killed build leaves it there, and every
later build would wait for ever. Here, a lock of the system protects the build, which ends with its process.
"""

import os
import time
from pathlib import Path

import psutil
from deepspeed import init_distributed
from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import _get_build_directory
from transformers import TrainingArguments

from train_llava.cli import device
from train_llava.common.files import held
from train_llava.training.memory import zero_of


def prepare_deepspeed(args: TrainingArguments) -> None:
    """Loads the extensions that DeepSpeed would otherwise build in the middle of a run.

    Under ZeRO-3, it connects the ranks, which split the weights while they are loaded, before there is a Trainer.
    """
    stage, offload = zero_of(args)
    if device().type == "cpu":
        build_extension("ShareMemCommBuilder")
    if offload:
        build_extension("CPUAdamBuilder")
    if stage == 3:
        init_distributed(verbose=False)


def build_extension(builder: str) -> None:
    """Loads one of DeepSpeed's extensions, by its builder's class, and builds it first if that has not been done."""
    # One process builds, and the others wait for it
    extension = get_accelerator().create_op_builder(builder)
    folder = Path(_get_build_directory(extension.name, verbose=False))
    with held(folder / "builder.lock", f"waiting for a build of DeepSpeed's {extension.name}", wait=True):
        wait_for_others(folder)
        if not (folder / f"{extension.name}.so").exists():
            print(f"building DeepSpeed's CPU extension {extension.name}, about a minute", flush=True)
        extension.load(verbose=False)


def wait_for_others(folder: Path) -> None:
    """Waits for a build by torch alone in this folder. Removes its lock if that build was interrupted."""
    # Each reason to wait is printed once
    lock, last_reason = folder / "lock", None
    while lock.exists():
        process = builder_of(folder)
        owner = lock.owner() if lock.exists() else None
        if process is not None:
            reason = f"process {process.pid}, which holds {lock}"
        elif owner == psutil.Process().username() or os.getuid() == 0:
            lock.unlink(missing_ok=True)
            print(f"{lock} was left by a build that was interrupted: removed", flush=True)
            break
        else:
            reason = f"{lock} of the user {owner}, who may remove it if no build is running"
        if reason != last_reason:
            print(f"waiting for {reason}", flush=True)
        last_reason = reason
        time.sleep(0.5)


def builder_of(folder: Path) -> psutil.Process | None:
    """The process of this machine that builds in a folder: it has the lock open, or it is ninja, working there."""
    for process in psutil.process_iter():
        try:
            opened = [file.path for file in process.open_files()]
            if str(folder / "lock") in opened or (process.name() == "ninja" and process.cwd() == str(folder)):
                return process
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return None
