"""Reads recipes: YAML files that hold the arguments of a command."""

import json
import os
import re
from argparse import ArgumentParser
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number. YAML 1.1, which the library follows, takes 1.0e-3 only."""


NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, [*"-+0123456789"])


def unknown(name: str, known: Collection[str]) -> str:
    """The message for an argument that a command does not have."""
    (nearest,) = get_close_matches(name.strip("-").replace("-", "_"), known, 1, 0)
    return f"{name} is not known: the nearest that is known is {'--' * name.startswith('--')}{nearest}"


def read_recipe(path: str, parser: ArgumentParser, known: Collection[str]) -> dict[str, Any]:
    """The arguments in a recipe, by name. The `parser` converts each value as on the command line.

    So `save_strategy: no` stays the text "no", although YAML reads false there. A list is several values, a
    mapping becomes JSON, and null is an argument that is not given. For example, the lines

        learning-rate: 1e-3
        data_path: [a, ~/b]
        bits: null

    give `{"learning_rate": 0.001, "data_path": ["a", "/home/me/b"]}`. A ValueError names the line that is wrong.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.load(content, RecipeLoader)
        texts = yaml.load(content, yaml.BaseLoader)  # the same lines, where each value is still a text
        if not isinstance(values, dict):
            raise ValueError(f"{path} does not hold lines `key: value`")
        nodes = yaml.compose(content).value  # keys with their lines; `load` keeps the last of two equal keys
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error

    # Every key once, and each by the parser
    arguments, seen = {}, set()
    for node, _ in nodes:
        key, where = node.value, f"{path}, line {node.start_mark.line + 1}"
        name = key.lstrip("-").replace("-", "_")
        if name not in known:
            raise ValueError(f"{where}: {unknown(key, known)}")
        if name in seen:
            raise ValueError(f"{where}: {key} is given twice")
        seen.add(name)
        if values[key] is None:
            continue

        # The words of a command line; in one word with its option, a value may begin with a dash
        words = texts[key] if isinstance(values[key], list) else [texts[key]]
        if isinstance(values[key], dict):
            words = [json.dumps(values[key], ensure_ascii=False, default=str)]
        words = [os.path.expanduser(word) if str(word).startswith("~/") else str(word) for word in words]
        option = [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
        try:
            parsed, rest = parser.parse_known_args(option)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if rest:
            raise ValueError(f"{where}: {key} takes one value, and here are {len(words)}")
        arguments |= vars(parsed)
    return arguments
