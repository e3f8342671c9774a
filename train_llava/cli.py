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
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import HfArgumentParser


def device() -> torch.device:
    """The accelerator that is there, or the CPU. A CUDA build of torch names `cuda` where there is no GPU, too."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


if device().type == "cpu":
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
    """Parses the command line into one instance of each dataclass; the fields' `help` is the documentation.

    Raises:
        ValueError: an argument is wrong, or what `*_name_or_path` names is neither a folder nor on the hub.
    """
    parser = HfArgumentParser(dataclasses)
    parser.error = _refuse  # argparse's own prints the usage, which has hundreds of lines
    parsed = parser.parse_args_into_dataclasses()
    for name, value in [item for arguments in parsed for item in vars(arguments).items()]:
        if name.endswith("name_or_path") and value is not None:
            check_name(f"--{name} {value}", value)
        elif name.endswith("data_path") and value is not None:
            paths = [value] if isinstance(value, str) else value
            if not all(map(os.path.exists, paths)):
                hub_answers()
    return parsed


def _refuse(message: str) -> None:
    raise ValueError(message)


def check_name(option: str, name_or_path: str) -> None:
    """Refuses a model's name that is neither a folder nor, as far as can be told at once, a name on the hub.

    Raises:
        ValueError: the message begins with `option`.
    """
    if os.path.isdir(name_or_path):
        return
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise ValueError(f"{option} is no folder, and no name on the hub, which would be owner/name") from error
    if os.path.exists(name_or_path):
        raise ValueError(f"{option} is a file: name the folder of the model")
    configs = ("config.json", "adapter_config.json")
    if not hub_answers() and not any(isinstance(try_to_load_from_cache(name_or_path, c), str) for c in configs):
        raise ValueError(f"{option} is no folder here, and the hub cannot be reached to ask for it")


def hub_answers() -> bool:
    """Whether the hub can be reached. Where it cannot, nothing in this process, or one that it starts, asks again:

    what was fetched earlier is opened at once, and the rest refused, where each file would be asked for six times.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # what it raises without a network depends on the HTTP library that the hub's uses
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
    return not constants.HF_HUB_OFFLINE


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
    except (OSError, ValueError, ImportError) as error:  # an option may need a package that is not installed
        # an error in a data-loader worker comes with the worker's traceback in front of it
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition("Error: ")[2]
        sys.exit(_once(f"error: {' '.join(text.split())}"))
    except torch.OutOfMemoryError as error:
        needs_less = "a smaller batch needs less, and so do --activation_checkpointing true and --bits 4 in training"
        sys.exit(_once(f"error: {str(error).partition('. ')[0]}: {needs_less}"))
    except KeyboardInterrupt:
        sys.exit(_once("stopped"))


def _once(message: str) -> str | int:
    """What to exit with: the message, or, where another rank of the run has printed the same, the code 1 alone.

    The first rank with a message leaves an empty file in `ERROR_DIR`, a folder that run_zero2.sh makes for a run.
    """
    folder = Path(os.environ.get("ERROR_DIR", "nowhere"))
    if folder.is_dir():
        try:
            (folder / sha256(message.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return 1
    return message


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
