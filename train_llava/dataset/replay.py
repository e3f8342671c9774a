"""`--replay`: the model repeats what it said before it was trained, so that it keeps what it knew."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from train_llava.chat import Chat
from train_llava.cli import BATCH, NEW_TOKENS
from train_llava.common.files import replacing
from train_llava.data import LlavaDataset
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.table import load_records
from train_llava.dataset.weights import weighted_rows
from train_llava.evaluation.generation import user_message
from train_llava.evaluation.questions import answer_questions, read_questions, weights_digest
from train_llava.records import IMAGE_TOKEN, text_of
from train_llava.training.checkpointing import on_first_rank


def add_replay(records: LlavaDataset, share: float, file: str | None, model: Any, chat: Chat, args: Any) -> None:
    """Adds conversations without pictures to the records of a run, until they are this `share` of a pass.

    Their questions are those of a `file` (see `questions`), or of the records. The model as it is answers each once,
    greedily; those of `NEW_TOKENS` are left out. replay.answers.jsonl and replay.json in the run's folder keep
    them, also for a resume. A ValueError says that the file has no questions in text, or that no answer is left.
    """
    number, folder, texts = round(share / (1 - share) * len(records)), Path(args.output_dir), {}
    if file is not None:
        texts = {question["prompt"]: None for question in read_questions(Path(file)) if not question["pictures"]}
    for i in np.random.default_rng(0).permutation(len(records) if file is None else 0).tolist():
        with suppress(BadRecordError):
            asked = [text_of(one) for one in records.read(i, decode=False)["messages"] if one["role"] == "user"]
            texts |= dict.fromkeys(text.replace(IMAGE_TOKEN, "").strip() for text in asked)
        if len(texts) > number:
            break
    questions = [{"id": str(i), "prompt": text} for i, text in enumerate(filter(None, texts))][:number]
    # The answers, and the records that they make
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"max_new_tokens": NEW_TOKENS, "weights": weights_digest(model)}
    model = model.eval() if getattr(model, "is_quantized", False) else model.eval().to(args.device)
    lines, _ = answer_questions(
        model,
        chat,
        questions,
        lambda question: ([user_message(question["prompt"], 0)], []),
        folder / "replay.answers.jsonl",
        settings,
        BATCH,
    )
    whole = [line for line in lines if line is not None and not line["cut"] and line["answer"].strip()]
    if not whole:
        raise ValueError(
            f"--replay: none of {len(questions)} questions has an answer of less than {NEW_TOKENS} tokens"
        )

    def write() -> None:
        with replacing(folder / "replay.json") as new:
            new.write_text(json.dumps([{"question": line["prompt"], "answer": line["answer"]} for line in whole]))

    on_first_rank(args, write)
    table, image_dir = load_records(str(folder / "replay.json"))
    rows = weighted_rows([len(table)], [number / len(table)]) + np.array([len(records.tables), 0], dtype=np.int32)
    records.tables, records.image_dirs = (*records.tables, table), (*records.image_dirs, image_dir)
    records.index = np.concatenate([records.index, rows])
    if args.process_index == 0:
        print(f"replay: {len(rows):,} records a pass, of {len(table):,} questions that the model answered itself")
