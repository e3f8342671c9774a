"""What every command shares: arguments from dataclasses, errors in one line, folders that appear whole."""

import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import HfArgumentParser

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is imported, complains on standard output


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a warning of transformers tells the user anything.

    A part of a LLaVA may come with weights that are not used, such as the text half of a CLIP; whether one is missing
    is looked at where it is opened.
    """
    text = record.getMessage()
    unused = "LOAD REPORT" in text and "LlavaForConditionalGeneration" not in text
    return not unused or "MISMATCH" in text or "CONVERSION" in text


logging.getLogger("transformers.modeling_utils").addFilter(_is_of_use)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks transformers


def parse_arguments(*dataclasses: type) -> tuple[Any, ...]:
    """Parses the command line into one instance of each dataclass; the fields' `help` is the documentation."""
    return HfArgumentParser(dataclasses).parse_args_into_dataclasses()


def check_positive(arguments: Any, *names: str) -> None:
    """Refuses a command's arguments where one of these is not above 0; None is an argument that was not given.

    Raises:
        ValueError: the message names it.
    """
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value}: it has to be above 0")


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. What the user can mend (a wrong path, a broken file) ends it with one line and exit code 1."""
    try:
        main()
    except (OSError, ValueError) as error:
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
def opening(name: str) -> Iterator[None]:
    """Turns whatever a library raises while it opens `name`, a file, a folder or an address, into one that names it.

    What libraries raise for a broken file is of any type, so this stands around their opening, and nothing else.

    Raises:
        ValueError: `name` cannot be opened; of a folder, the broken file is named. An `OSError` or `ValueError` that
            names it already passes as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        broken, known = _broken_file(Path(name)), isinstance(error, (OSError, ValueError))
        if broken is None and known and name in str(error):
            raise
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        if broken is not None and _is_lfs_pointer(broken):
            reason = "it is a Git LFS pointer, and `git lfs pull` fetches the file that it stands for"
        raise ValueError(f"{broken or name} cannot be opened: {reason}") from error


def _broken_file(path: Path) -> Path | None:
    """The first file of a model's folder, or the file itself, that does not hold what its name says; None: all do."""
    for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                empty = not content and file.name.endswith(("config.json", "tokenizer.json"))
                if empty or not isinstance(content, dict):
                    return file
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except Exception:  # SafetensorError is one
            return file
        if _is_lfs_pointer(file):
            return file
    return None


def _is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one where Git LFS is not installed."""
    with open(file, "rb") as content:
        return content.read(24) == b"version https://git-lfs."


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
        if target.exists():
            target.rmdir()  # it is empty, and on Windows a folder takes no other's place
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """The process's umask, which Python can only read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
