"""What every command shares: arguments from dataclasses, errors in one line, folders that appear whole."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import HfArgumentParser

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is imported, complains on standard output


def parse_arguments(*dataclasses: type) -> tuple[Any, ...]:
    """Parses the command line into one instance of each dataclass; the fields' `help` is the documentation."""
    return HfArgumentParser(dataclasses).parse_args_into_dataclasses()


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. What the user can mend (a wrong path, a broken file) ends it with one line and exit code 1."""
    try:
        main()
    except (OSError, ValueError, ImportError) as error:  # an option may need a package that is not installed
        # an error in a data-loader worker comes with the worker's traceback in front of it
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition("Error: ")[2]
        sys.exit(f"error: {' '.join(text.split())}")
    except torch.OutOfMemoryError as error:
        needs_less = "a smaller batch needs less, and so do --activation_checkpointing true and --bits 4 in training"
        sys.exit(f"error: {str(error).partition('. ')[0]}: {needs_less}")
    except KeyboardInterrupt:
        sys.exit("stopped")


@contextmanager
def written_whole(output_dir: str) -> Iterator[Path]:
    """Yields a temporary folder beside `output_dir` that takes its name when the block ends without an error.

    So a folder under its final name is always complete. The block reads back what it wrote before it ends.

    Raises:
        ValueError: `output_dir` exists and is not an empty folder; nothing is overwritten.
    """
    target = Path(output_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir} exists already: remove it or choose another name")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.absolute().parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())  # mkdtemp made it private to its owner
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which Python can only read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
