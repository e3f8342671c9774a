"""What every command shares: it parses arguments, and prints an error that the user can mend as one line."""

import atexit
import logging
import os
import re
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from transformers import HfArgumentParser

from train_llava.common.checks import check_json, check_name, check_number, check_picture, hub_answers
from train_llava.common.files import is_out_of_memory
from train_llava.common.recipes import read_recipe, unknown

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
# Options that DeepSpeed's launcher and run_zero2.sh put in front of the user's own; a recipe overrides them
LAUNCHER_OPTIONS = ("--local_rank=", "--deepspeed=")
RECIPES = (".yaml", ".yml")
BATCH, NEW_TOKENS = 16, 128  # by default: the questions answered at once, and the longest answer
Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of the files that a command writes
CUT_BOXES_HELP = "Keep the boxes of objects that the model sees in part; their records are bad by default."
BITS_HELP = "Hold the language model's weights in 4 or 8 bits; needs bitsandbytes."


def device() -> "torch.device":
    """The accelerator, or the CPU. A CUDA build of torch names `cuda` on a machine without a GPU, too."""
    import torch  # here, since it takes longer than everything else that --help and a wrong argument need

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _is_of_use(record: logging.LogRecord) -> bool:
    """Whether a warning of transformers concerns the user. Unused weights of a part, as in CLIP, do not."""
    text = record.getMessage()
    is_of_part = "LOAD REPORT" in text and "LlavaForConditionalGeneration" not in text
    return not is_of_part or "MISMATCH" in text or "CONVERSION" in text


logging.getLogger("transformers.modeling_utils").addFilter(_is_of_use)
# PEFT asks transformers for it
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def parse_arguments(*dataclasses: type) -> tuple[Any, ...]:
    """Parses the command line into one instance of each dataclass; the fields' `help` is the documentation.

    A recipe, a YAML file of arguments, may come first. Arguments after it override it. A ValueError says which
    argument is wrong, or names something that does not exist.
    """
    # Every required argument is there, and every value lies in its interval
    arguments, parser = given_arguments(dataclasses), HfArgumentParser(dataclasses)
    defaults = {action.dest: action.default for action in parser._actions}
    required = [action.dest for action in parser._actions if action.required]
    missing = [f"--{name}" for name in required if name not in arguments]
    if missing:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    for name, value in arguments.items():
        if value != defaults[name]:  # a default is never refused
            check_number(name, value)
    for dataclass in dataclasses:
        for name in getattr(dataclass, "_VALID_DICT_FIELDS", ()):  # of `TrainingArguments`
            if name in arguments:
                check_json(name, arguments[name])
    try:
        parsed = parser.parse_dict(arguments)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:  # a library's
        raise ValueError(f"an argument cannot be used: {error}") from error

    # The models, data and pictures that the arguments name
    for part in parsed:
        for name, value in vars(part).items():
            if name.endswith("name_or_path") and value is not None:
                check_name(f"--{name} {value}", value)
            elif name.endswith("data_path") and value is not None:
                paths = [value] if isinstance(value, str) else value
                if not all(os.path.exists(path.removeprefix("folder:").partition("::")[0]) for path in paths):
                    hub_answers()
            elif name == "image":
                for picture in [value] if isinstance(value, str) else value:
                    check_picture(picture)
    return parsed


def given_arguments(dataclasses: Iterable[type], words: list[str] | None = None) -> dict[str, Any]:
    """The arguments on the command line and in its recipe, by name; the others are left out.

    `words` are the command line, by default this process's. A ValueError names a word that is no argument, or a
    value of the wrong type.
    """
    words = sys.argv[1:] if words is None else words
    parser = HfArgumentParser(dataclasses)
    known = [action.dest for action in parser._actions]
    # Help, which argparse prints, and a parser that leaves out absent arguments
    if "-h" in words or "--help" in words:
        parser.parse_args(["--help"])
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    parser.error = _refuse  # argparse's own prints the usage, which has hundreds of lines

    # A recipe overrides a launcher's words in front of it; words behind it override both
    arguments, launched = {}, list(takewhile(lambda word: word.startswith(LAUNCHER_OPTIONS), words))
    own = words[len(launched) :]
    if own and own[0].lower().endswith(RECIPES):
        arguments, words = vars(parser.parse_args(launched)) | read_recipe(own[0], parser, known), own[1:]
    parsed, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("--"):
            _refuse(unknown(word.partition("=")[0], known))
    if rest:
        remedy = ": a recipe stands first" if rest[0].endswith(RECIPES) else ""
        _refuse(f"{rest[0]} belongs to no argument{remedy}")
    arguments |= vars(parsed)

    # DeepSpeed's settings are files of the caller's folder or of this one
    settings = arguments.get("deepspeed")
    if settings is not None and not os.path.exists(settings) and (ROOT / settings).exists():
        arguments["deepspeed"] = str(ROOT / settings)
    return arguments


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def parse_first(*dataclasses: type) -> None:
    """Ends a command with a wrong command line before its slow imports; `main` parses the line again."""
    message = _error_of(partial(parse_arguments, *dataclasses))
    if message is not None:
        sys.exit(message)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. An error that the user can mend, such as a wrong path, is one line and exit code 1."""
    message = _error_of(main)
    if "LOCAL_RANK" in os.environ:
        _leave_rank(message)
    if message is not None:
        sys.exit(message)


def _error_of(main: Callable[[], Any]) -> str | int | None:
    """Calls `main` and returns the line or the code to exit with; None: all went well."""
    try:
        main()
    except (OSError, ValueError, ImportError) as error:  # an option may need a package that is not installed
        text = str(error).strip()
        if "Original Traceback" in text:  # a data-loader worker puts its traceback in front of its error
            text = text.splitlines()[-1].partition("Error: ")[2]
        return _once(f"error: {' '.join(text.split())}")
    except RuntimeError as error:
        # A connection to another rank broke, of torch's (`Dist…Error`) or of its library gloo
        if type(error).__name__.startswith("Dist") or "/gloo/" in str(error):
            folder, reason = os.environ.get("ERROR_DIR"), re.sub(r"\[/\S*] ", "", str(error)).partition("\n")[0]
            if folder is not None and os.path.isdir(folder) and os.listdir(folder):
                return 1  # a rank of this machine ended with an error, and has printed it
            where = "the output of its machine may say why; go on by --resume_from_checkpoint true"
            return _once(f"error: another rank has ended or cannot be reached ({reason}): {where}")
        if not is_out_of_memory(error):
            raise
        # What may help when a GPU's memory is full
        advice = "a smaller batch needs less, and so do --activation_checkpointing true and --bits 4 in "
        advice += "training; if the optimizer does not fit, --train_type lora, more GPUs or ds_zero3_offload.json"
        return _once(f"error: {str(error).partition('. ')[0]}: {advice}")
    except KeyboardInterrupt:
        return _once("stopped")
    return None


def _once(message: str) -> str | int:
    """The message, or the exit code 1 alone where another rank of the run has printed the same.

    The first rank that fails leaves an empty file in `ERROR_DIR`, a folder of run_zero2.sh. It need not be rank
    0: a bad record may stop one rank alone. torch's `record` does not help: measured under DeepSpeed's launcher,
    it writes no file, and each rank prints its traceback.
    """
    folder = os.environ.get("ERROR_DIR")
    if folder is not None and os.path.isdir(folder):
        try:
            (Path(folder) / sha256(message.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return 1
    return message


def _leave_rank(message: str | int | None) -> NoReturn:
    """Ends a rank like `sys.exit`, but without the interpreter's own clean-up.

    DeepSpeed's process groups keep threads, which now and then abort the process during the clean-up. Then a
    run that went well would count as failed.
    """
    if isinstance(message, str):
        print(message, file=sys.stderr)
    atexit._run_exitfuncs()  # for example, libraries send off their reports
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if message is None else 1)
