"""Asks a model the questions of a data set, every process its share: for `evaluate`, and while it trains."""

import json
from copy import copy
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from transformers import Trainer
from transformers.integrations import TensorBoardCallback

from train_llava.chat import Chat, Processor
from train_llava.cli import BATCH, NEW_TOKENS
from train_llava.data import LlavaDataset
from train_llava.infer import generate_all, room_for_answer, shares, this_process
from train_llava.metrics import score_group
from train_llava.pictures import open_image
from train_llava.readers import BadRecordError
from train_llava.records import text_of
from train_llava.reports import draw, draw_sheet
from train_llava.run_folder import as_opened

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
            question["references"] = right if question["reference"] in right else [question["reference"], *right]
            asked.append(item | question)
    return asked


def askable(
    model: Any, chat: Chat, dataset: LlavaDataset, index: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The questions of a record, and the `id` and `reason` of what cannot be asked of it."""
    try:
        item = dataset[index]
    except BadRecordError as error:
        return [], [{"id": error.args[0], "reason": error.args[1]}]
    asked, bad = [], []
    for question in questions(item):
        try:
            room_for_answer(model, chat, question["messages"], question["images"])
            asked.append(question | {"index": index})
        except ValueError as error:
            bad.append({"id": item["id"], "reason": str(error)})
    return asked, bad


def ask(
    model: Any, chat: Chat, asked: list[dict[str, Any]], batch_size: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """The questions, so many at once, with the model's `prediction` and without their messages and pictures."""
    conversations, images = ([question[name] for question in asked] for name in ("messages", "images"))
    answers = generate_all(model, chat, conversations, images, batch_size, max_new_tokens)
    left_out = ("messages", "images", "image_sizes")
    return [
        {key: value for key, value in question.items() if key not in left_out} | {"prediction": answer}
        for question, answer in zip(asked, answers, strict=True)
    ]


def predict(
    model: Any, processor: Processor, dataset: LlavaDataset, batch_size: int, max_new_tokens: int, blank: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The model's answer to every question of a data set; with `blank`, each picture is replaced by a white one.

    Returns:
        The predictions in the order of the records, and the `id` and `reason` of each question that could not be
        asked; to every process all of them.
    """
    state, chat, predictions, bad = this_process(), Chat(processor), [], []
    what, quiet = "asking, pictures blank" if blank else "asking", not state.is_main_process
    for share in tqdm(shares(len(dataset), batch_size), what, disable=quiet):
        found = [askable(model, chat, dataset, i) for i in share]
        asked = [question for record, _ in found for question in record]
        if blank:
            asked = [q | {"images": [Image.new("RGB", i.size, "white") for i in q["images"]]} for q in asked]
        answered = ask(model, chat, asked, batch_size, max_new_tokens)
        gathered = gather_object([(answered, [entry for _, entries in found for entry in entries])])
        predictions += [prediction for one, _ in gathered for prediction in one]
        bad += [entry for _, one in gathered for entry in one]
    return predictions, bad


def first_questions(model: Any, processor: Processor, dataset: LlavaDataset, number: int) -> list[dict[str, Any]]:
    """The first questions of a data set that can be asked, so many or all."""
    chat, found = Chat(processor), []
    for index in range(len(dataset)):
        found += askable(model, chat, dataset, index)[0]
        if len(found) >= number:
            break
    return found[:number]


def score_answers(trainer: Trainer, number: int) -> dict[str, float]:
    """Asks the model in training the first questions of the held-out data, each process a share, and scores them all.

    The first process writes the answers to answers/step-….jsonl, and draws a few of them beside it, and into
    TensorBoard. The model is asked as `evaluate` would ask what is saved of it now.

    Returns:
        The scores of `LOGGED`, and `answers_runtime` in seconds.
    """
    started, state, dataset = perf_counter(), this_process(), copy(trainer.eval_dataset.dataset)
    dataset.at_least = None  # pictures as `evaluate` opens them
    model, processor, step = trainer.model, trainer.processing_class, trainer.state.global_step
    asked = first_questions(model, processor, dataset, number)
    if not asked:
        raise ValueError("no held-out question can be asked of this model: set --eval_answers 0")
    mine, share = asked[state.process_index :: state.num_processes], -(-len(asked) // state.num_processes)
    mine += [asked[0]] * (share - len(mine))  # under ZeRO-3 no process computes alone, and all ask batch by batch
    batches, chat = [mine[start : start + BATCH] for start in range(0, share, BATCH)], Chat(processor)
    with as_opened(model):
        gathered = gather_object([[p for batch in batches for p in ask(model, chat, batch, BATCH, NEW_TOKENS)]])
    predictions = [gathered[i % state.num_processes][i // state.num_processes] for i in range(len(asked))]
    if state.is_main_process:
        path = Path(trainer.args.output_dir) / "answers" / f"step-{step:06}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(predictions, path)
        sheet = path.with_suffix(".png")
        draw(lambda path: draw_sheet(dataset, predictions, path, (2, 4), asked=True), sheet)
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
