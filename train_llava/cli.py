"""What every command shares: arguments and recipes of them, errors in one line, folders that appear whole."""

import atexit
import json
import logging
import os
import re
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import HfArgumentParser

if TYPE_CHECKING:
    import torch


def device() -> "torch.device":
    """The accelerator that is there, or the CPU. A CUDA build of torch names `cuda` where there is no GPU, too."""
    import torch  # here, since it takes longer than all else that --help and a wrong argument need

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


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


ROOT = Path(__file__).parent.parent
# What DeepSpeed's launcher and run_zero2.sh put in front of a command's own words; a recipe may say otherwise
LAUNCHERS_OWN = ("--local_rank=", "--deepspeed=")
BATCH, NEW_TOKENS = 16, 128  # questions asked at once, and the longest answer, by default
ADDRESSES = ("http://", "https://", "data:")  # a picture that is no file
# Which numbers an argument takes, in every command: one that is not named takes those from 0 on. A default is taken
INTERVALS = {
    "(-inf, inf)": "vision_feature_layer",
    "(0, inf)": "eval_steps logging_steps num_train_epochs save_steps",
    "[1, inf)": "batch_size dataloader_prefetch_factor early_stopping_patience eval_accumulation_steps "
    "gradient_accumulation_steps lora_alpha lora_r max_length max_new_tokens max_steps num_proc "
    "per_device_eval_batch_size per_device_train_batch_size save_total_limit tokens_per_batch torch_empty_cache_steps",
    "[1, 2147483648)": "ddp_bucket_cap_mb ddp_timeout",
    "(0, 1]": "adam_epsilon learning_rate top_p",
    "[0, 1]": "max_bad_fraction projector_learning_rate vision_learning_rate",
    "[0, 1)": "adam_beta1 adam_beta2 lora_dropout",
    "[0, 4294967296)": "data_seed seed",
    "[1, 65535]": "port",
}
BITS_HELP = "Hold the language model's weights in 4 or 8 bits; needs bitsandbytes."


def parse_arguments(*dataclasses: type) -> tuple[Any, ...]:
    """Parses the command line into one instance of each dataclass; the fields' `help` is the documentation.

    A recipe, a file of arguments in YAML, may stand first; the arguments behind it override it.

    Raises:
        ValueError: an argument is wrong, or names what is not there.
    """
    given = given_arguments(dataclasses)
    own = [field for dataclass in dataclasses for field in fields(dataclass) if field.init]
    required = [field.name for field in own if field.default is MISSING and field.default_factory is MISSING]
    missing = [f"--{name}" for name in required if name not in given]
    if missing:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    for field in own:
        if field.name in given and given[field.name] != field.default:
            check_number(field.name, given[field.name])
    for dataclass in dataclasses:
        for name in getattr(dataclass, "_VALID_DICT_FIELDS", ()):  # of `TrainingArguments`
            if name in given:
                check_json(name, given[name])
    try:
        parsed = HfArgumentParser(dataclasses).parse_dict(given)
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:  # a library's
        raise ValueError(f"an argument cannot be used: {error}") from error
    for name, value in [item for arguments in parsed for item in vars(arguments).items()]:
        if name.endswith("name_or_path") and value is not None:
            check_name(f"--{name} {value}", value)
        elif name.endswith("data_path") and value is not None:
            paths = [value] if isinstance(value, str) else value
            if not all(map(os.path.exists, paths)):
                hub_answers()
        elif name == "image":
            for picture in value:
                check_picture(picture)
    return parsed


def check_number(name: str, value: Any) -> None:
    """Refuses a number, or one of a list, that lies outside its argument's interval.

    Raises:
        ValueError: the message names the argument and the interval.
    """
    interval = next((key for key, names in INTERVALS.items() if name in names.split()), "[0, inf)")
    low, high = map(float, interval[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            inside = low < number < high or (number == low and interval[0] == "[")
            if not inside and not (number == high and interval[-1] == "]"):
                raise ValueError(f"--{name} {number}: it has to lie in {interval}")


def check_json(name: str, value: str) -> None:
    """Refuses a text that is neither a file nor an object of JSON.

    Raises:
        ValueError: the message names the argument.
    """
    parsed = None
    with suppress(ValueError):
        parsed = json.loads(value)
    if not os.path.exists(value) and not isinstance(parsed, dict):
        raise ValueError(f"--{name} {value} is no file, and no object of JSON")


def given_arguments(dataclasses: Iterable[type], words: list[str] | None = None) -> dict[str, Any]:
    """The arguments that the command line and its recipe give, by name: what is not given is not there.

    Args:
        words: the command line; by default this process's.

    Raises:
        ValueError: a word is no argument, or a value is not of its type; an error in a recipe names it and the line.
    """
    words = sys.argv[1:] if words is None else words
    parser = HfArgumentParser(dataclasses)
    if not {"-h", "--help"}.isdisjoint(words):
        parser.parse_args(["--help"])
    for action in parser._actions:
        action.default, action.required = SUPPRESS, False
    known = [field.name for dataclass in dataclasses for field in fields(dataclass) if field.init]
    place = next((i for i, word in enumerate(words) if not word.startswith(LAUNCHERS_OWN)), len(words))
    if place < len(words) and words[place].lower().endswith((".yaml", ".yml")):
        words = [*words[:place], *_recipe_words(words[place], parser, known), *words[place + 1 :]]
    parser.error = _refuse  # argparse's own prints the usage, which has hundreds of lines
    given, rest = parser.parse_known_args(words)
    options = [word for word in rest if word.startswith("--")]
    if options:
        _refuse(_unknown(options[0].partition("=")[0], known, "--"))
    if rest:
        _refuse(f"{rest[0]} belongs to no argument" + ": a recipe stands first" * rest[0].endswith((".yaml", ".yml")))
    given = vars(given)
    if "deepspeed" in given and not os.path.exists(given["deepspeed"]) and (ROOT / given["deepspeed"]).exists():
        given["deepspeed"] = str(ROOT / given["deepspeed"])  # DeepSpeed's settings are those of this folder
    return given


def _refuse(message: str, where: str = "") -> None:
    raise ValueError(where + message)


def _unknown(name: str, known: list[str], dashes: str = "") -> str:
    (nearest,) = get_close_matches(name.strip("-").replace("-", "_"), known, 1, 0)
    return f"{name} is not known: the nearest that is known is {dashes}{nearest}"


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as the command line does; YAML 1.1, which the library follows, wants 1.0e-3."""


NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, [*"-+0123456789"])


def _recipe_words(path: str, parser: HfArgumentParser, known: list[str]) -> list[str]:
    """The words of a command line that a recipe stands for, each line tried by itself.

    A value is the text that stands there, as on the command line; of what YAML has beyond that, a list is several
    values, a mapping the JSON of it, and a null an argument that is not given.

    Raises:
        ValueError: the file is no YAML of lines `key: value`, or one of them is wrong.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8-sig"))
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path} " + ("is empty" if root is None else "does not hold lines `key: value`"))
        lines = [(f"{path}, line {key.start_mark.line + 1}: ", str(key.value), value) for key, value in root.value]
        values = [_values(value, loader) for _, _, value in lines]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    words, seen = [], set()
    for (where, key, _), texts in zip(lines, values, strict=True):
        name = key.lstrip("-").replace("-", "_")
        parser.error = partial(_refuse, where=where)
        if name not in known:
            parser.error(_unknown(key, known))
        if name in seen:
            parser.error(f"{key} stands there a second time")
        seen.add(name)
        if texts is not None:
            # in one word, a value may begin with a dash
            line = [f"--{name}={texts[0]}"] if len(texts) == 1 else [f"--{name}", *texts]
            if parser.parse_known_args(line)[1]:
                parser.error(f"{key} takes one value, and here are {len(texts)}")
            words += line
    return words


def _values(node: yaml.Node, loader: _Loader) -> list[str] | None:
    """The values of a recipe's key as texts; None: it is null."""
    if isinstance(node, yaml.SequenceNode):
        return [_text(item, loader) for item in node.value]
    return None if node.tag == "tag:yaml.org,2002:null" else [_text(node, loader)]


def _text(node: yaml.Node, loader: _Loader) -> str:
    if not isinstance(node, yaml.ScalarNode):
        return json.dumps(loader.construct_object(node, deep=True), ensure_ascii=False, default=str)
    home = node.value.startswith("~/") and node.style is None  # a shell leaves what is quoted as it is, too
    return os.path.expanduser(node.value) if home else node.value


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
        raise ValueError(
            f"{option} is no folder (a run writes its model when it ends), and no name on the hub, which is owner/name"
        ) from error
    if os.path.exists(name_or_path):
        raise ValueError(f"{option} is a file: name the folder of the model")
    configs = ("config.json", "adapter_config.json")
    if not hub_answers() and not any(isinstance(try_to_load_from_cache(name_or_path, c), str) for c in configs):
        raise ValueError(f"{option} is no folder here, and the hub cannot be reached to ask for it")


def check_picture(name: str) -> None:
    """Refuses what `--image` names where that is a folder, or nothing; what it holds is seen when it is opened.

    Raises:
        ValueError: the message names it.
    """
    if name == "-" or name.startswith(ADDRESSES):
        return
    if os.path.isdir(name):
        raise ValueError(f"--image {name} is a folder: name a picture in it")
    try:
        os.stat(name)
    except FileNotFoundError:
        raise ValueError(f"--image {name} does not exist") from None


def hub_answers() -> bool:
    """Whether the hub can be reached. Where it cannot, nothing in this process, or one that it starts, asks again:

    what was fetched earlier is opened at once, and the rest refused, where each file would be asked for six times.
    """
    try:
        if not constants.HF_HUB_OFFLINE:
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


def parse_first(*dataclasses: type) -> None:
    """Parses the command line for once, and leaves the outcome to `main`, which parses it again.

    A command calls it in front of the imports that take seconds, so that `--help` and a wrong argument do not wait.
    """
    message = _run(partial(parse_arguments, *dataclasses))
    if message is not None:
        sys.exit(message)


def run_command(main: Callable[[], None]) -> None:
    """Runs a command. What the user can mend (a wrong path, a broken file) ends it with one line and exit code 1."""
    message = _run(main)
    if "LOCAL_RANK" in os.environ:
        _leave_rank(message)
    if message is not None:
        sys.exit(message)


def _run(main: Callable[[], Any]) -> str | int | None:
    """Calls `main`, and gives what to exit with where the user can mend what it raises; None: all went well."""
    try:
        main()
    except (OSError, ValueError, ImportError) as error:  # an option may need a package that is not installed
        # an error in a data-loader worker comes with the worker's traceback in front of it
        text = str(error).strip()
        if "Original Traceback" in text:
            text = text.splitlines()[-1].partition("Error: ")[2]
        return _once(f"error: {' '.join(text.split())}")
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        needs_less = "a smaller batch needs less, and so do --activation_checkpointing true and --bits 4 in training; "
        needs_less += "where the optimizer does not fit, so do --train_type lora, more GPUs and ds_zero3_offload.json"
        return _once(f"error: {str(error).partition('. ')[0]}: {needs_less}")
    except KeyboardInterrupt:
        return _once("stopped")
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's, told by name: torch itself is not imported for this."""
    return type(error).__name__ == "OutOfMemoryError"


def _leave_rank(message: str | int | None) -> NoReturn:
    """Ends a rank as `sys.exit` does, but for taking the interpreter apart.

    DeepSpeed keeps process groups, whose threads run on when all is done. One that asks for Python while Python ends
    aborts the process, now and then, and a run that went well would count as failed.
    """
    if isinstance(message, str):
        print(message, file=sys.stderr)
    atexit._run_exitfuncs()  # what libraries wish to do last, such as sending off their reports
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if message is None else 1)


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
