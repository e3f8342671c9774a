"""A file of questions to a model, and the file of their answers, which a killed run goes on writing.

A question is a line `{"id", "image", "prompt"}`; `image` or `images` are files, addresses or data URIs, one or a list.
Ids are those of records (see `records`), and `question` or `text` may stand for `prompt`. A conversation that ends
with a question may stand under `messages`. An answer is a line `{"id", "prompt", "answer", "cut", "settings"}`. It is
`cut` where it has as many tokens as it may; `settings` are the model and the options that gave it.
"""

import hashlib
import json
import os
import reprlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from peft import PeftModel
from PIL import Image
from tqdm import tqdm

from train_llava.chat import Chat
from train_llava.common.checks import ADDRESSES
from train_llava.dataset.readers import BadRecordError, read_jsonl
from train_llava.evaluation.generation import WINDOW, generate_all, prepare, sampling, this_process
from train_llava.model import Llava
from train_llava.modeling.weights import first_values
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


def weights_digest(model: torch.nn.Module) -> str:
    """By what a model, with its adapter, is told from another: the first numbers of its tensors."""
    numbers = list(first_values(model).values())
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def shares(number: int, batch_size: int) -> list[range]:
    """This process's share of each window of so many questions or records, as their numbers; the last may be empty."""
    state = this_process()
    share = max(1, min(WINDOW * batch_size, -(-number // state.num_processes)))
    windows = range(share * state.process_index, number + share * state.process_index, share * state.num_processes)
    return [range(min(start, number), min(start + share, number)) for start in windows]


def settings_of(arguments: Any, model: torch.nn.Module) -> dict[str, Any]:
    """What decides a model's answers: the arguments of `infer` or `evaluate`, and its weights."""
    names = ("model_name_or_path", "adapter_name_or_path", "data_path", "image_dir", "bits", "max_new_tokens")
    settings = {
        name: getattr(arguments, name) for name in (*names, "temperature", "top_p") if hasattr(arguments, name)
    }
    return settings | {"weights": weights_digest(model)}


def answer_questions(
    model: Llava | PeftModel,
    chat: Chat,
    asked: list[dict[str, Any]],
    open_question: Callable[[int], tuple[list[dict[str, Any]], list[Image.Image]]],
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    description: str | None = None,
) -> tuple[list[dict[str, Any] | None], list[dict[str, Any]]]:
    """Answers questions, every process its share, and writes each answer to a file as it comes (see `questions`).

    Those that the file answers already are not asked again. `open_question` gives the messages and the pictures of one
    by its place in `asked`; no more pictures are kept than it has.

    Returns:
        Each question's line of the file, None where it could not be asked; and the `id` and `reason` of these.

    Raises:
        OSError, ValueError: the file cannot be gone on with; see `locked` and `answered_before`.
    """
    state, bad, limit = this_process(), [], settings["max_new_tokens"]
    options = sampling(settings.get("temperature", 0), settings.get("top_p", 1))
    writes = state.is_main_process
    with locked(path) if writes else nullcontext():
        with state.main_process_first():  # which cuts off what a kill has torn
            lines = answered_before(path, asked, settings)
        state.wait_for_everyone()
        left = [place for place, line in enumerate(lines) if line is None]
        bar = tqdm(total=len(asked), initial=len(asked) - len(left), desc=description, disable=not writes)
        with open(path if writes else os.devnull, "ab") as file, bar:
            for share in shares(len(left), batch_size):
                places, prepared, refused = [], [], []
                for place in left[share.start : share.stop]:
                    try:
                        prepared.append(prepare(model, chat, *open_question(place), limit))
                        places.append(place)
                    except (OSError, ValueError) as error:
                        refused.append({"id": asked[place]["id"], "reason": str(error)})
                replies = generate_all(model, chat, prepared, batch_size, **options)
                for answered, unasked in gather_object([(list(zip(places, replies, strict=True)), refused)]):
                    for place, (answer, cut) in answered:
                        named = {key: asked[place][key] for key in ("id", "prompt", "number") if key in asked[place]}
                        line = lines[place] = named | {"answer": answer, "cut": bool(cut), "settings": settings}
                        # a half of a surrogate pair, which only an id can hold, is written as it was: escaped
                        file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                    bad += unasked
                    bar.update(len(answered) + len(unasked))
                file.flush()
    return lines, bad
