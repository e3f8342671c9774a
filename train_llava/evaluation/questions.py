"""Reads a file of questions and writes the file of their answers. A killed run can continue it.

A question is a line `{"id", "image", "prompt"}`. `image` or `images` is a file, an address, a data URI, or a
list. Ids are those of records (see `records`). `prompt` may be called `question` or `text`. `messages` hold a
whole conversation.

An answer is a line `{"id", "prompt", "answer", "cut", "settings"}`. `cut`: it has as many tokens as it may.
`settings`: the model and the options of the answer.
"""

import hashlib
import json
import os
import reprlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from tqdm import tqdm

from train_llava.chat import Chat
from train_llava.common.checks import ADDRESSES
from train_llava.common.files import held
from train_llava.dataset.readers import BadRecordError, Record, id_of, images_of, read_jsonl
from train_llava.evaluation.generation import WINDOW, Messages, generate_all, prepare, sampling, this_process
from train_llava.model import Llava
from train_llava.modeling.weights import first_values
from train_llava.records import IMAGE_TOKEN, text_of, to_messages

REMEDY = "choose another name, or remove that file"
LINE_START = b'{"id": '  # of every answer
# Arguments of `infer` and `evaluate` that decide an answer
SETTINGS = ("model_name_or_path", "adapter_name_or_path", "data_path", "image_dir", "bits", "max_new_tokens",
            "temperature", "top_p")  # fmt: skip


def read_question(record: Record, number: int, folder: Path) -> dict[str, Any]:
    """A line of a file of questions, as `id`, `prompt`, `messages` and `pictures`.

    `pictures` are files, relative to `folder`, addresses and data URIs. Without an id, `number` is the id. A
    ValueError says why it is no question.
    """
    if not isinstance(record, dict):
        raise record if isinstance(record, BadRecordError) else ValueError("it is no object")
    pictures = images_of(record)
    if not all(isinstance(name, str) for name in pictures):
        raise ValueError("a picture is neither a file nor an address")
    # A prompt is a conversation of one question; without tags, its pictures come first
    prompts = [record[key] for key in ("prompt", "question", "text") if isinstance(record.get(key), str)]
    if prompts:
        tags = "" if IMAGE_TOKEN in prompts[0] else f"{IMAGE_TOKEN}\n" * len(pictures)
        turns = [{"role": "user", "content": tags + prompts[0]}]
    elif isinstance(record.get("messages"), list):
        turns = record["messages"]
    else:
        raise ValueError("it has no prompt")
    # Checked as a record, which needs an answer
    answered = [*turns, {"role": "assistant", "content": "?"}]
    messages = to_messages({"messages": answered, "images": pictures})[:-1]
    if all(part["type"] == "image" for part in messages[-1]["content"]):
        raise ValueError("its prompt is empty")
    prompt = prompts[0] if prompts else text_of(messages[-1])
    files = [name if name.startswith(ADDRESSES) else str(folder / name) for name in pictures]
    name = str(number) if id_of(record) is None else id_of(record)
    return {"id": name, "prompt": prompt, "messages": messages, "pictures": files}


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a .jsonl file; a ValueError names a line that is none."""
    questions = []
    for number, record in enumerate(read_jsonl(path)):
        try:
            questions.append(read_question(record, number, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, question {number + 1}: {error}") from error
    return questions


def read_answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file of answers, and the bytes of a torn line at its end, which a killed run left.

    An OSError or ValueError says that it cannot be read, or that another program wrote it.
    """
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    answers = []
    for number, line in enumerate([*lines, torn], 1):
        try:
            answers.append(json.loads(line))
            is_answer = isinstance(answers[-1], dict) and {"id", "prompt", "answer"} <= answers[-1].keys()
        except ValueError:
            # A torn line begins as all do
            begins = line.startswith(LINE_START) or LINE_START.startswith(line)
            is_answer = number > len(lines) and begins
        if not is_answer:
            raise ValueError(f"{path}, line {number}, is no answer of this command: choose another file")
    return answers[: len(lines)], len(torn)


def answered_before(
    path: Path, questions: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any] | None]:
    """For each question, its line in a file of answers, or None. They match by `id`, `prompt` and `number`.

    A torn last line is cut off the file. An OSError or ValueError says that it cannot be read, or answers other
    questions, or with other settings.
    """
    # The places of each question without an answer; equal questions take the lines in their order
    waiting = defaultdict(list)
    for place, question in enumerate(questions):
        waiting[_key(question)].append(place)
    answers, torn = read_answers(path)
    lines: list[dict[str, Any] | None] = [None] * len(questions)
    # Each line has to come from the same settings, and to answer one of them
    for line in answers:
        for name, value in settings.items():
            before = line.get("settings", {}).get(name)
            if before != value:
                raise ValueError(f"{path} was answered with {name} {before}, and now it is {value}: {REMEDY}")
        if not waiting[_key(line)]:
            question = f"{line['id']!r}, {reprlib.repr(line['prompt'])}"
            raise ValueError(f"{path} answers question {question}, which is not asked now: {REMEDY}")
        lines[waiting[_key(line)].pop(0)] = line
    if torn:
        os.truncate(path, path.stat().st_size - torn)
    return lines


def _key(entry: dict[str, Any]) -> tuple[Any, str, str]:
    return entry.get("number"), str(entry["id"]), entry["prompt"]


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of the first numbers of a model's tensors, with its adapter: it identifies the model."""
    numbers = list(first_values(model).values())
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def settings_of(arguments: Any, model: torch.nn.Module) -> dict[str, Any]:
    """The settings that decide a model's answers: arguments of `infer` or `evaluate`, and its weights."""
    settings = {name: getattr(arguments, name) for name in SETTINGS if hasattr(arguments, name)}
    return settings | {"weights": weights_digest(model)}


def answer_questions(
    model: Llava | PeftModel,
    chat: Chat,
    questions: list[dict[str, Any]],
    open_question: Callable[[dict[str, Any]], tuple[Messages, list[Image.Image]]],
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
) -> tuple[list[dict[str, Any] | None], list[dict[str, Any]]]:
    """Answers questions, every process its share, and writes each answer to a file as it comes.

    Questions that the file answers already are not asked again. `open_question` opens the messages and pictures
    of a question. No more pictures are open than those of one question. Returns each question's line of the file, or
    None; and the `id` and `reason` of each that could not be asked.
    """
    state, refused = this_process(), []
    options = sampling(settings.get("temperature", 0), settings.get("top_p", 1))

    def answer(share: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """For each question, its `answer` and whether it was `cut`, or the `reason` why it cannot be asked."""
        # Prepare all, then generate the answers of those that can be asked
        results, prompts = [], []
        for question in share:
            try:
                prompts.append(prepare(chat, *open_question(question), settings["max_new_tokens"]))
                results.append({})
            except (OSError, ValueError) as error:
                results.append({"reason": str(error)})
        answers = iter(generate_all(model, chat, prompts, batch_size, **options))
        for result in results:
            if "reason" not in result:
                result["answer"], result["cut"] = next(answers)
        return results

    writes, lock_file = state.is_main_process, path.with_name(f".{path.name}.lock")
    taken = f"{path} is being written by another process: wait, or name another file"
    with held(lock_file, taken) if writes else nullcontext():
        # The first process cuts off a torn line before the others read
        with state.main_process_first():
            lines = answered_before(path, questions, settings)
        state.wait_for_everyone()
        unanswered = [place for place, line in enumerate(lines) if line is None]
        done = len(questions) - len(unanswered)
        bar = tqdm(total=len(questions), initial=done, desc=path.name, disable=not writes)
        step = WINDOW * batch_size * state.num_processes
        with open(path if writes else os.devnull, "ab") as file, bar:
            for start in range(0, len(unanswered), step):
                # Each process answers its share, and gets the results of all
                window = unanswered[start : start + step]
                with state.split_between_processes([questions[place] for place in window]) as share:
                    results = gather_object(answer(share))
                for place, result in zip(window, results, strict=True):
                    question = questions[place]
                    if "reason" in result:
                        refused.append({"id": question["id"]} | result)
                        continue
                    known = {key: question[key] for key in ("id", "prompt", "number") if key in question}
                    lines[place] = known | result | {"settings": settings}
                    # An id may hold half of a surrogate pair: it is written as it was, escaped
                    text = json.dumps(lines[place], ensure_ascii=False)
                    file.write(text.encode(errors="backslashreplace") + b"\n")
                file.flush()
                bar.update(len(window))
    return lines, refused
