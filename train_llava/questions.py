"""A file of questions to a model, and the file of their answers, which a killed run goes on writing.

A question is a line `{"id", "image", "prompt"}`; `image` or `images` are files, addresses or data URIs, one or a list.
Ids are those of records (see `records`), and `question` or `text` may stand for `prompt`. A conversation that ends
with a question may stand under `messages`. An answer is a line `{"id", "prompt", "answer", "cut", "settings"}`. It is
`cut` where it has as many tokens as it may; `settings` are the model and the options that gave it.
"""

import json
import os
import reprlib
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from train_llava.cli import ADDRESSES
from train_llava.readers import BadRecordError, read_jsonl
from train_llava.records import IMAGE_TOKEN, Record, id_of, pictures_of, text_of, to_messages

OTHERWISE = "choose another name, or remove that file"


class Question(NamedTuple):
    """A line of a file of questions."""

    id: Any
    prompt: str
    messages: list[dict[str, Any]]
    pictures: list[str]  # paths, addresses, data URIs


def read_question(record: Record, number: int, folder: Path) -> Question:
    """A line of a file of questions; pictures are named relative to `folder`.

    Raises:
        ValueError: it is no question; the message is the reason.
    """
    if not isinstance(record, dict):
        raise record if isinstance(record, BadRecordError) else ValueError("it is no object")
    pictures = pictures_of(record)
    if not all(isinstance(name, str) for name in pictures):
        raise ValueError("a picture is neither a file nor an address")
    prompt = next((record[key] for key in ("prompt", "question", "text") if isinstance(record.get(key), str)), None)
    if isinstance(prompt, str):
        tags = "" if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * len(pictures)
        turns = [{"role": "user", "content": tags + prompt}]
    elif isinstance(record.get("messages"), list):
        turns = record["messages"]
    else:
        raise ValueError("it has no prompt")
    answered = [*turns, {"role": "assistant", "content": "?"}]
    messages = to_messages({"messages": answered, "images": pictures})[:-1]
    if all(part["type"] == "image" for part in messages[-1]["content"]):
        raise ValueError("its prompt is empty")
    if not isinstance(prompt, str):
        prompt = text_of(messages[-1])
    names = [name if name.startswith(ADDRESSES) else str(folder / name) for name in pictures]
    name = id_of(record)
    return Question(str(number) if name is None else name, prompt, messages, names)


def read_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl file.

    Raises:
        OSError, ValueError: it is not there, or a line of it is no question.
    """
    questions = []
    for number, record in enumerate(read_jsonl(path)):
        try:
            questions.append(read_question(record, number, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, question {number + 1}: {error}") from error
    return questions


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing a file.

    Raises:
        ValueError: one of them writes it now.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path} is being written by another process: wait for it, or name another file") from None
    try:
        yield
    finally:
        os.unlink(lock.lock_file)
        lock.release()


def read_answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file of answers, and how many bytes of one that a kill has torn follow them.

    Raises:
        OSError, ValueError: it cannot be read, or another program wrote it.
    """
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    read = []
    for number, line in enumerate([*lines, torn], 1):
        try:
            content = json.loads(line)
        except ValueError:
            # where a kill cut it, a line still begins as all do
            if number > len(lines) and (line.startswith(b'{"id": ') or b'{"id": '.startswith(line)):
                break
            content = None
        if not (isinstance(content, dict) and {"id", "prompt", "answer"} <= content.keys()):
            raise ValueError(f"{path}, line {number}, is no answer of this command: choose another file")
        read.append(content)
    return read[: len(lines)], len(torn)


def answered_before(path: Path, asked: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any] | None]:
    """For each question, its line in a file of answers, or None; a question is known by `id`, `prompt` and `number`.

    A last line that a kill has torn is cut off the file.

    Raises:
        OSError, ValueError: the file cannot be read, another program wrote it, or it answers other questions, or with
            other settings.
    """
    found: list[dict[str, Any] | None] = [None] * len(asked)
    lines, torn = read_answers(path)
    places = defaultdict(deque)
    for place, question in enumerate(asked):
        places[question.get("number"), str(question["id"]), question["prompt"]].append(place)
    for line in lines:
        for name, value in settings.items():
            before = line.get("settings", {}).get(name)
            if before != value:
                raise ValueError(f"{path} was answered with {name} {before}, and now it is {value}: {OTHERWISE}")
        waiting = places[line.get("number"), str(line["id"]), line["prompt"]]
        if not waiting:
            now = [reprlib.repr(question["prompt"]) for question in asked if str(question["id"]) == str(line["id"])]
            before = f"{path} answers {reprlib.repr(line['prompt'])} as question {line['id']!r}"
            raise ValueError(f"{before}, and that is now {' and '.join(now) or 'not asked'}: {OTHERWISE}")
        found[waiting.popleft()] = line
    if torn:
        os.truncate(path, path.stat().st_size - torn)
    return found
