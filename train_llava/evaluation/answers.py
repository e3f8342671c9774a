"""Asks a model the questions of a data set, every process its share: for `evaluate`, and while it trains."""

import json
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from train_llava.chat import Chat, Processor
from train_llava.cli import BATCH
from train_llava.data import LlavaDataset
from train_llava.dataset.images import open_image
from train_llava.dataset.readers import BadRecordError
from train_llava.evaluation.generation import generate_all, prepare, this_process
from train_llava.evaluation.metrics import score_group
from train_llava.evaluation.plots import draw, draw_sample_grid
from train_llava.evaluation.questions import answer_questions
from train_llava.modeling.weights import in_saved_dtype
from train_llava.records import text_of

LOGGED = ("exact_match", "token_f1", "cider")  # while training


def questions(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Every answer of a record as a question of its own, with all that came before it.

    `images` are the pictures shown up to that question, which may be fewer than the record's.
    """
    asked = []
    for i, message in enumerate(item["messages"]):
        if message["role"] == "assistant":
            before = item["messages"][:i]
            shown = sum(part["type"] == "image" for m in before for part in m["content"])
            question = {"messages": before, "images": item["images"][:shown], "pictures": shown}
            question |= {"prompt": text_of(before[-1]), "reference": text_of(message)}
            last = i == len(item["messages"]) - 1
            right = item["references"] if last else []
            question["answers"] = item["answers"] if last else []
            question["references"] = (
                right if question["reference"].strip() in right else [question["reference"], *right]
            )
            asked.append(item | question)
    return asked


def list_questions(dataset: LlavaDataset) -> Iterator[dict[str, Any]]:
    """Every question of a data set without its messages and pictures, which `open_question` gives by it.

    A record that cannot be used counts as a question.
    """
    records, number = copy(dataset), 0
    records.decode = records.measure = False
    for index in range(len(records)):
        try:
            found = questions(records[index])
        except BadRecordError as error:
            found = [{"id": error.args[0], "prompt": ""}]
        for turn, question in enumerate(found):
            kept = {key: value for key, value in question.items() if key not in ("messages", "images", "image_sizes")}
            yield kept | {"index": index, "turn": turn, "number": number}
            number += 1


def open_question(dataset: LlavaDataset, question: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The messages of a question of a data set, and its pictures.

    Raises:
        ValueError: the record or a picture cannot be used; the message is the reason.
    """
    try:
        found = questions(dataset[question["index"]])[question["turn"]]
    except BadRecordError as error:
        raise ValueError(error.args[1]) from error
    return found["messages"], found["images"]


def predict(
    model: Any,
    processor: Processor,
    dataset: LlavaDataset,
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    blank: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The model's answer to every question of a data set; with `blank`, each picture is replaced by a white one.

    They are written to `path` as they come, and those that stand there are not asked again; see `answer_questions`.

    Returns:
        The predictions in the order of the records, and the `id` and `reason` of each question that could not be
        asked; to every process all of them.
    """
    asked = list(list_questions(dataset))

    def opened(place: int) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        messages, images = open_question(dataset, asked[place])
        return messages, [Image.new("RGB", image.size, "white") for image in images] if blank else images

    description = "asking, pictures blank" if blank else "asking"
    lines, bad = answer_questions(model, Chat(processor), asked, opened, path, settings, batch_size, description)
    answered = [(question, line) for question, line in zip(asked, lines, strict=True) if line is not None]
    return [question | {"prediction": line["answer"], "cut": line["cut"]} for question, line in answered], bad


def score_answers(trainer: Trainer, number: int) -> dict[str, float]:
    """Asks the model in training the first questions of the held-out data, each process a share, and scores them all.

    The first process writes the answers to answers/step-….jsonl, and draws a few of them beside it, and into
    TensorBoard. The model is asked as `evaluate` would ask what is saved of it now.

    Returns:
        The scores of `LOGGED`, and `answers_runtime` in seconds.
    """
    started, state, dataset = perf_counter(), this_process(), trainer.eval_dataset.dataset
    model, chat, step = trainer.model, Chat(trainer.processing_class), trainer.state.global_step
    asked, prepared = [], []
    for question in list_questions(dataset):
        with suppress(OSError, ValueError):  # it cannot be asked
            prepared.append(prepare(model, chat, *open_question(dataset, question)))
            asked.append(question)
        if len(asked) == number:
            break
    if not asked:
        raise ValueError("no held-out question can be asked of this model: set --eval_answers 0")
    mine, share = prepared[state.process_index :: state.num_processes], -(-len(asked) // state.num_processes)
    mine += [prepared[0]] * (share - len(mine))  # under ZeRO-3 no process computes alone, and all ask batch by batch
    with in_saved_dtype(model, trainer.dtype):
        replies = [generate_all(model, chat, mine[start : start + BATCH], BATCH) for start in range(0, share, BATCH)]
        gathered = gather_object([[answer for batch in replies for answer, _ in batch]])
    predictions = [
        question | {"prediction": gathered[i % state.num_processes][i // state.num_processes]}
        for i, question in enumerate(asked)
    ]
    if state.is_main_process:
        path = Path(trainer.args.output_dir) / "answers" / f"step-{step:06}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions, path)
        sheet = path.with_suffix(".png")
        draw(lambda path: draw_sample_grid(dataset, predictions, path, (2, 4), asked=True), sheet)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer and sheet.exists():
                callback.tb_writer.add_image("answers", np.asarray(open_image(sheet)), step, dataformats="HWC")
    scores = score_group(predictions)
    return {name: scores[name] for name in LOGGED if name in scores} | {
        "answers_runtime": round(perf_counter() - started, 1)
    }


def write_predictions(predictions: list[dict[str, Any]], path: Path) -> None:
    """Writes a line for each question: `id`, `prompt`, `reference`, `prediction`, and all `references` where several
    are right."""
    with open(path, "w", encoding="utf-8") as file:
        for prediction in predictions:
            kept = {key: prediction[key] for key in ("id", "prompt", "reference", "prediction")}
            if len(prediction["references"]) > 1:
                kept["references"] = prediction["references"]
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
