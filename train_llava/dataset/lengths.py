"""Counts the tokens of each record once, and stores them beside the table. Groups records by their length."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from train_llava.chat import Chat
from train_llava.common.files import replacing
from train_llava.data import LlavaDataset
from train_llava.dataset.boxes import TAG
from train_llava.dataset.readers import BadRecordError
from train_llava.modeling.templates import TWO_TURNS

UNKNOWN_BOX = "[500, 500, 500, 500]"  # in place of a box, whose numbers depend on its picture
MANY = 10_000  # records; several processes and a progress bar pay from here on
COUNT_VERSION = 2  # of the rules in `Chat.tokenize`: raise it to have all tokens counted again


def order_seed(args: TrainingArguments) -> int:
    """The seed of a run's order of records."""
    return args.seed if args.data_seed is None else args.data_seed


class GroupedByLength(LengthGroupedSampler):
    """The order of transformers' sampler, from a seed and the epoch alone: the same on every rank, and in a resume."""

    def __init__(self, batch_size: int, lengths: np.ndarray, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


def count_tokens(records: LlavaDataset, chat: Chat) -> np.ndarray:
    """How many tokens each record has, and how many of them are image tokens, `(records, 2)`.

    Zeros where the record is bad. Images are not opened. With tiles, the heads of their files are read.
    """
    # Texts are counted by table, which has each record once whatever its weight
    counts = []
    for source, table in enumerate(records.tables):
        rows = records.index[records.index[:, 0] == source, 1]
        lists = [pc.list_value_length(table.data.column(name)) for name in ("images", "image_bytes")]
        counts.append(np.stack([_text_tokens(table, chat), pc.add(*lists).to_numpy()], axis=1)[rows])
    text_tokens, images = np.concatenate(counts).T
    if chat.anyres:
        picture_tokens, image_tokens = _picture_tokens_by_size(records, chat).T
    else:
        picture_tokens, image_tokens = images * len(chat.picture_ids()), images * chat.image_tokens()
    # The text has one token an image. Where no text or no image could be counted, the record is bad
    is_good = (text_tokens > 0) & ((images == 0) | (image_tokens > 0))
    return np.stack([text_tokens - images + picture_tokens, image_tokens], axis=1) * is_good[:, None]


def _text_tokens(table: datasets.Dataset, chat: Chat) -> np.ndarray:
    """How many tokens each row of a table has, with one an image, `(rows,)`; 0 where it cannot be tokenised.

    They are counted by the first process that asks, and stored in a file beside the table.
    """
    # A file for each way of counting; large tables by several processes
    folder = Path(table.cache_files[0]["filename"]).parent
    file = folder / f"tokens-{_fingerprint(chat)}.npy"
    with FileLock(f"{file}.lock"):  # one rank counts, the others wait for it
        if not file.exists():
            is_large = len(table) >= MANY
            loader = DataLoader(
                table.select_columns(["messages", "objects", "error"]),
                batch_size=200,
                num_workers=(os.cpu_count() or 1) if is_large else 0,
                collate_fn=partial(_count, chat=chat),
                generator=torch.Generator(),  # or a run would draw other random numbers if this is cached
            )
            counts = list(tqdm(loader, "counting tokens", disable=not is_large, unit=" x 200 records"))
            with replacing(file) as new, open(new, "wb") as content:
                np.save(content, np.concatenate([[], *counts]).astype(np.int32))  # a table may be empty
    return np.load(file).astype(np.int64)


def _count(rows: list[dict[str, str | None]], chat: Chat) -> np.ndarray:
    """The tokens of some rows; in a worker."""
    counts = np.zeros(len(rows), dtype=int)
    for i, row in enumerate(rows):
        if row["error"] is None:
            text = TAG.sub(UNKNOWN_BOX, row["messages"]) if row["objects"] else row["messages"]
            with suppress(ValueError):  # the reason is reported when the record is opened
                counts[i] = len(chat.tokenize(json.loads(text))[0])
    return counts


def _fingerprint(chat: Chat) -> str:
    """A hash of what decides how many tokens a text has."""
    # The tokenizer's own rules. Padding and truncation are those of its last call
    backend = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    rules = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    # The chat template, and the segments that it writes today: some have a date
    template = chat.tokenizer.chat_template, chat.segments(TWO_TURNS), sorted(chat.control_tokens)
    return hashlib.sha256(json.dumps([COUNT_VERSION, rules, template]).encode()).hexdigest()[:24]


def _picture_tokens_by_size(records: LlavaDataset, chat: Chat) -> np.ndarray:
    """How many tokens and image tokens the pictures of each record have, by the sizes in their files' heads."""

    def count(index: int) -> tuple[int, int]:
        try:
            sizes = records.read(index, decode=False)["image_sizes"]
        except BadRecordError:
            return 0, 0
        return sum(len(chat.picture_ids(size)) for size in sizes), sum(map(chat.image_tokens, sizes))

    with ThreadPoolExecutor() as pool:
        counts = pool.map(count, range(len(records)))
        counts = list(tqdm(counts, "measuring images", len(records), disable=len(records) < MANY))
        return np.array(counts).reshape(-1, 2)
