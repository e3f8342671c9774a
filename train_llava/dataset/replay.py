"""`--replay`: the model repeats what it said before it was trained, so that it keeps what it knew."""

import json
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from train_llava.chat import Chat
from train_llava.cli import BATCH, NEW_TOKENS
from train_llava.data import LlavaDataset
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.table import load_records
from train_llava.dataset.weights import weighted_rows
from train_llava.evaluation.generation import user_message
from train_llava.evaluation.questions import answer_questions, read_questions, weights_digest
from train_llava.records import IMAGE_TOKEN, text_of
from train_llava.training.checkpointing import on_first_rank


def add_replay(records: LlavaDataset, share: float, file: str | None, model: Any, chat: Chat, args: Any) -> None:
    """Adds conversations without pictures to a run's records, until they are this `share` of a pass.

    Their questions are those of a `file` (see `questions`), or of the records. The model as it is answers each once,
    greedily, into replay.answers.jsonl of the run's folder, which a resume takes. Answers of `NEW_TOKENS` are left
    out; a ValueError says that none is left.
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
    questions = [
        {"id": text, "prompt": text, "messages": [user_message(text, 0)], "images": []} for text in texts if text
    ]
    questions = questions[:number]
    # The answers, and the records that they make
    if model.device != args.device:
        model.to(args.device)
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "replay.answers.jsonl", {"max_new_tokens": NEW_TOKENS, "weights": weights_digest(model)}
    lines, _ = answer_questions(model, chat, questions, itemgetter("messages", "images"), path, settings, BATCH)
    whole = [line for line in lines if line and not line["cut"] and line["answer"].strip()]
    if not whole:
        raise ValueError(f"--replay: none of {len(questions)} questions gets an answer below {NEW_TOKENS} tokens")
    content = json.dumps([{"question": line["prompt"], "answer": line["answer"]} for line in whole])
    on_first_rank(args, lambda: (folder / "replay.json").write_text(content) and None)
    table, image_dir = load_records(str(folder / "replay.json"))
    rows = weighted_rows([len(table)], [number / len(table)]) + np.array([len(records.tables), 0], dtype=np.int32)
    records.tables, records.image_dirs = (*records.tables, table), (*records.image_dirs, image_dir)
    records.index = np.concatenate([records.index, rows])
    if args.process_index == 0:
        print(f"replay: {len(rows):,} records a pass, of {len(table):,} questions that the model answered itself")
