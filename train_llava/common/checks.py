"""Checks single arguments of every command: numbers, JSON, names of models, pictures."""

import json
import os
from contextlib import suppress
from typing import Any

from huggingface_hub import constants, get_session, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

CHOICES_HELP = "The answers to choose from, such as yes,no: how likely is each?"
ADDRESSES = ("http://", "https://", "data:")  # a picture that is no file
# The numbers that an argument takes, in every command. An argument that is not listed takes [0, inf)
INTERVALS = {
    "(-inf, inf)": "vision_feature_layer",
    "(0, inf)": "eval_steps logging_steps num_train_epochs save_steps",
    "[1, inf)": "batch_size dataloader_prefetch_factor early_stopping_patience eval_accumulation_steps "
    "global_batch_size gradient_accumulation_steps lora_alpha lora_r max_length max_new_tokens max_steps num_proc "
    "per_device_eval_batch_size per_device_train_batch_size save_total_limit tokens_per_batch "
    "torch_empty_cache_steps",
    "[1, 2147483648)": "ddp_bucket_cap_mb ddp_timeout",
    "(0, 1]": "adam_epsilon learning_rate top_p",
    "(0, 1)": "eval_fraction replay",
    "[0, 1]": "max_bad_fraction projector_learning_rate vision_learning_rate",
    "[0, 1)": "adam_beta1 adam_beta2 lora_dropout",
    "[0, 4294967296)": "data_seed seed",
    "[1, 65535]": "port",
}


def check_number(name: str, value: Any) -> None:
    """Raises a ValueError if a number, or one of a list, lies outside its argument's interval."""
    # The interval, such as "(0, 1]": its bounds, and by the brackets whether they belong to it
    interval = next((key for key, names in INTERVALS.items() if name in names.split()), "[0, inf)")
    low, high = map(float, interval[1:-1].split(","))
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        at_a_bound = (number == low and interval.startswith("[")) or (number == high and interval.endswith("]"))
        if not (low < number < high or at_a_bound):
            raise ValueError(f"--{name} {number}: it has to lie in {interval}")


def split_choices(choices: str | None) -> list[str] | None:
    """The texts of `--choices`, if it is given; a ValueError if there are not two, or one is empty."""
    texts = choices and list(dict.fromkeys(text.strip() for text in choices.split(",")))
    if texts is not None and (len(texts) < 2 or not all(texts)):
        raise ValueError(f"--choices {choices}: name two answers or more, with a comma between them, such as yes,no")
    return texts


def check_json(name: str, value: str) -> None:
    """Raises a ValueError if a text is neither a file nor a JSON object."""
    parsed = None
    with suppress(ValueError):
        parsed = json.loads(value)
    if not os.path.exists(value) and not isinstance(parsed, dict):
        raise ValueError(f"--{name} {value} is no file, and no JSON object")


def check_name(option: str, name_or_path: str) -> None:
    """Raises a ValueError if a model is no folder, and cannot be on the hub as far as its name and the cache tell."""
    if os.path.isdir(name_or_path):
        return
    try:
        validate_repo_id(name_or_path)
    except HFValidationError as error:
        raise ValueError(f"{option} is no folder (a run writes it at its end), and no name on the hub") from error
    if os.path.exists(name_or_path):
        raise ValueError(f"{option} is a file: name the folder of the model")
    if hub_answers():
        return
    # Without the hub, one of its files has to be in the cache
    cached = [try_to_load_from_cache(name_or_path, name) for name in ("config.json", "adapter_config.json")]
    if not any(isinstance(path, str) for path in cached):
        raise ValueError(f"{option} is no folder here, and the hub cannot be reached to ask for it")


def check_picture(name: str) -> None:
    """Raises a ValueError if an `--image` is a folder or does not exist; it is opened later."""
    if name == "-" or name.startswith(ADDRESSES):
        return
    if os.path.isdir(name):
        raise ValueError(f"--image {name} is a folder: name a picture in it")
    try:
        os.stat(name)
    except FileNotFoundError:
        raise ValueError(f"--image {name} does not exist") from None


def hub_answers() -> bool:
    """Whether the hub can be reached. If not, this process and its children go offline, which saves retries."""
    try:
        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # its type depends on the hub's HTTP library
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
    return not constants.HF_HUB_OFFLINE
