"""Asks a model the questions of a data set, for `evaluate` and during training."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from train_llava.chat import Processor, chat_of
from train_llava.cli import BATCH
from train_llava.data import LlavaDataset
from train_llava.dataset.images import open_image
from train_llava.dataset.readers import BadRecordError
from train_llava.evaluation.generation import Messages, choose, generate_all, prepare, text_and_images, this_process
from train_llava.evaluation.metrics import is_exact, score_group
from train_llava.evaluation.plots import draw, draw_sample_grid
from train_llava.evaluation.questions import answer_questions
from train_llava.modeling.weights import in_saved_dtype
from train_llava.records import text_of

LOGGED = ("exact_match", "token_f1", "cider")  # during training


def questions(item: dict[str, Any]) -> list[dict[str, Any]]:
    """One question for each answer to learn of a record, with all messages and pictures before it."""
    result = []
    for i, message in enumerate(item["messages"]):
        if message["role"] != "assistant" or not message.get("train", True):
            continue
        before, reference = item["messages"][:i], text_of(message)
        pictures = sum(text_and_images(earlier)[1] for earlier in before)
        question = {"messages": before, "images": item["images"][:pictures], "pictures": pictures}
        # All other right answers of a record are answers to its last question
        is_last = i == len(item["messages"]) - 1
        right = item["references"] if is_last else []
        question |= {"prompt": text_of(before[-1]), "reference": reference}
        question["references"] = right if reference.strip() in right else [reference, *right]
        question["places"] = message.get("places", [])
        question["answers"], question["choices"] = (item[key] if is_last else [] for key in ("answers", "choices"))
        number = sum(earlier["role"] == "assistant" for earlier in before)
        question["kind"] = item["kinds"][number] if number < len(item["kinds"]) else None
        result.append(item | question)
    return result


def list_questions(dataset: LlavaDataset) -> Iterator[dict[str, Any]]:
    """Every question of a data set, and every bad record, without its messages and pictures: see `open_question`."""
    number = 0
    for index in range(len(dataset)):
        try:
            of_record = questions(dataset.read(index, decode=False))
        except BadRecordError as error:
            of_record = [{"id": error.args[0], "prompt": ""}]
        for turn, question in enumerate(of_record):
            for key in ("messages", "images", "image_sizes"):
                question.pop(key, None)
            yield question | {"index": index, "turn": turn, "number": number}
            number += 1


def open_question(dataset: LlavaDataset, question: dict[str, Any]) -> tuple[Messages, list[Image.Image]]:
    """The messages and pictures of a question; a ValueError with the reason if its record is bad."""
    try:
        opened = questions(dataset[question["index"]])[question["turn"]]
    except BadRecordError as error:
        raise ValueError(error.args[1]) from error
    return opened["messages"], opened["images"]


def predict(
    model: Any,
    processor: Processor,
    dataset: LlavaDataset,
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    pictures: Literal["own", "blank", "other"] = "own",
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The model's answer to every question of a data set.

    Its pictures are the question's `own`, or as many white ones (`blank`), or the first one of the record that is
    half of the data away, if it has one (`other`).

    Answers are written to `path` as they come; those in it already are used. See `answer_questions`. Every process
    gets all predictions, in the order of the records, and `id` and `reason` of each question that cannot be asked.
    """
    all_questions = list(list_questions(dataset))

    def opened(question: dict[str, Any]) -> tuple[Messages, list[Image.Image]]:
        messages, images = open_question(dataset, question)
        if pictures == "blank":
            images = [Image.new("RGB", image.size, "white") for image in images]
        elif pictures == "other" and images:
            other = dataset[(question["index"] + len(dataset) // 2) % len(dataset)]
            images = (other["images"] or images)[:1] * len(images)
        return messages, images

    chat = chat_of(processor)
    lines, bad = answer_questions(model, chat, all_questions, opened, path, settings, batch_size)
    predictions = []
    for question, line in zip(all_questions, lines, strict=True):
        if line is not None:
            predictions.append(question | {"prediction": line["answer"], "cut": line["cut"]})
    return predictions, bad


def add_choices(
    model: Any,
    processor: Processor,
    dataset: LlavaDataset,
    predictions: list[dict[str, Any]],
    choices: list[str] | None,
) -> list[dict[str, Any]]:
    """The predictions with a right answer among `choices`, or among those of their record.

    They get `likely`: how likely each choice is, see `choose`.
    """
    chat, state, asked = chat_of(processor), this_process(), []
    for p in predictions:
        p["choices"] = choices or p["choices"]
        asked += [p] if any(is_exact(p | {"prediction": choice}) for choice in p["choices"]) else []
    with state.split_between_processes(asked) as share:
        bar = tqdm(share, "choices", disable=not asked or not state.is_main_process)
        found = gather_object([choose(model, chat, *open_question(dataset, p), p["choices"]) for p in bar])
    for p, likely in zip(asked, found, strict=True):
        p["likely"] = likely
    return asked


def score_answers(trainer: Trainer, number: int) -> dict[str, float]:
    """Asks the model in training the first questions of the held-out data, and scores its answers.

    The model answers in the precision in which it would be saved, so that `evaluate` gives the same. The first
    process writes the answers to answers/step-….jsonl. It draws some in a sample grid, also for TensorBoard. Returns
    the scores of `LOGGED`, the number of `questions`, and `answers_runtime` in seconds.
    """
    started, state, dataset = perf_counter(), this_process(), trainer.eval_dataset.records
    model, chat, step = trainer.model, chat_of(trainer.processing_class), trainer.state.global_step
    # The first questions that can be asked
    asked_questions, prompts = [], []
    for question in list_questions(dataset):
        with suppress(OSError, ValueError):
            prompts.append(prepare(chat, *open_question(dataset, question)))
            asked_questions.append(question)
        if len(asked_questions) == number:
            break
    if not asked_questions:
        raise ValueError("no held-out question can be asked of this model: set --eval_answers 0")
    # All processes get the same number of questions, some twice: under ZeRO-3 none computes alone
    indices, saved_dtype = list(range(len(prompts))), in_saved_dtype(model, trainer.dtype)
    with state.split_between_processes(indices, apply_padding=True) as share, saved_dtype:
        replies = generate_all(model, chat, [prompts[i] for i in share], BATCH)
    answers = dict(gather_object([(i, answer) for i, (answer, _) in zip(share, replies, strict=True)]))
    predictions = [question | {"prediction": answers[i]} for i, question in enumerate(asked_questions)]
    # The first process writes and draws them
    if state.is_main_process:
        path = Path(trainer.args.output_dir) / "answers" / f"step-{step:06}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions, path)
        grid = path.with_suffix(".png")
        draw(lambda path: draw_sample_grid(dataset, predictions, path, (2, 4)), grid)
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer and grid.exists():
                callback.tb_writer.add_image("answers", np.asarray(open_image(grid)), step, dataformats="HWC")
    scores = score_group(predictions)
    scores = {name: scores[name] for name in LOGGED if name in scores}
    return scores | {"questions": len(predictions), "answers_runtime": round(perf_counter() - started, 1)}


def write_predictions(predictions: list[dict[str, Any]], path: Path) -> None:
    """Writes `id`, `prompt`, `reference`, `prediction`, several `references`, and how likely each of `choices` is."""
    with open(path, "w", encoding="utf-8") as file:
        for prediction in predictions:
            line = {key: prediction[key] for key in ("id", "prompt", "reference", "prediction")}
            if len(prediction["references"]) > 1:
                line["references"] = prediction["references"]
            line |= {"choices": prediction["likely"]} if "likely" in prediction else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
