"""Rows that fill a budget of tokens: each record's tokens are counted, records put into rows, a row's items opened."""

import os
from copy import copy
from functools import partial
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from train_llava.data import CheckedDataset

WINDOW = 4096  # records that are packed among each other: rows stay a random mixture, and the search for room short
MANY = 10_000  # records from which on it pays to count them in several processes


def count_tokens(dataset: CheckedDataset) -> np.ndarray:
    """How many tokens each record has, and how many of them are pictures', `(records, 2)`; zeros where it is bad.

    Records are tokenised as for training, each rank a share of them. Pictures are not opened, but for the heads of
    their files where the size tells the number of tokens: one that is broken is found when its row is trained on.

    Raises:
        ValueError: see `CheckedDataset`.
    """
    texts, state = copy(dataset), PartialState()
    texts.dataset = copy(dataset.dataset)
    texts.dataset.decode, texts.dataset.measure = False, dataset.chat.anyres
    share = np.array_split(np.arange(len(dataset)), state.num_processes)[state.process_index]
    workers = (os.cpu_count() or 1) // state.num_processes if len(dataset) >= MANY else 0
    loader = DataLoader(share, batch_size=200, num_workers=workers, collate_fn=partial(_counts, texts))
    silent = len(dataset) < MANY or not state.is_main_process
    counts = list(tqdm(loader, "counting tokens", disable=silent, unit=" x 200 records"))
    return np.concatenate(gather_object(counts))


def _counts(texts: CheckedDataset, indices: list[np.integer]) -> np.ndarray:
    """The rows of `count_tokens` for some records; in a worker."""
    items = [texts.good_item(int(i)) for i in indices]
    ids = [np.zeros(0) if item is None else item["input_ids"] for item in items]
    return np.array([(len(row), (row == texts.chat.processor.image_token_id).sum()) for row in ids])


def pack(tokens: np.ndarray, pictured: np.ndarray, budget: int, blank: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Puts records into rows of at most `budget` tokens, each record into one: first-fit decreasing, by which the
    longest comes first, and each into the first row that has room (D. S. Johnson, Near-Optimal Bin Packing Algorithms,
    1973), within windows of `WINDOW` records that `seed` shuffles.

    Args:
        tokens: of each record, at most `budget`; one of 0 is left out.
        pictured: whether a record has a picture, `(records,)`.
        blank: how many tokens a row takes besides as long as it has no picture.

    Returns:
        The records' numbers, row by row.
    """
    order, rows = np.random.default_rng(seed).permutation(np.flatnonzero(tokens)), []
    for window in np.split(order, range(WINDOW, len(order), WINDOW)):
        room, kept_free = np.full(len(window), budget), np.full(len(window), blank)
        filled: list[list[int]] = [[]]  # the last is empty
        for i in window[np.argsort(-tokens[window], kind="stable")]:
            left = room[: len(filled)]
            row = np.argmax((left if pictured[i] else left - kept_free[: len(filled)]) >= tokens[i])
            room[row] -= tokens[i]
            kept_free[row] *= not pictured[i]
            filled[row].append(i)
            if filled[-1]:
                filled.append([])
        rows += map(np.array, filled[:-1])
    return rows


class PackedDataset(Dataset):
    """The good records of a data set in rows; `[i]` is the list of a row's items, at most `budget` tokens together.

    Rows are made once. To the `Trainer` a row is a sample, and a batch is one sample: it shuffles the rows anew in
    each pass, gives each rank as many (what is missing at the end of a pass are rows of its beginning again), and
    resumes among them.

    A picture that turns out to be broken leaves its record out, where in a batch by number another takes its place: it
    might be longer. Only a row of which nothing is left takes in one other record.

    Raises:
        ValueError: see `CheckedDataset`; or a record is longer than `budget`, or none is good.
    """

    def __init__(self, dataset: CheckedDataset, budget: int, seed: int = 0):
        self.dataset, chat = dataset, dataset.chat
        tokens, of_pictures = count_tokens(dataset).T
        pictured = of_pictures > 0
        # LlavaCollator puts a blank picture into a row without one, as a row may come to be by a broken picture
        blank = chat.image_tokens((chat.side, chat.side))
        tokens[pictured] = np.maximum(tokens[pictured], blank)
        alone = tokens + blank * ((tokens > 0) & ~pictured)
        if alone.max() > budget:
            source, row = dataset.dataset.index[alone.argmax()]
            raise ValueError(
                f"--tokens_per_batch {budget}: record {dataset.dataset.tables[source][int(row)]['id']!r} takes "
                f"{alone.max()}{'' if pictured[alone.argmax()] else f', {blank} of a blank picture among them'}: "
                "give as many, or leave it out by a lower --max_length"
            )
        self.rows = pack(tokens, pictured, budget, blank, seed)
        if not self.rows:
            raise ValueError("no record is good")
        self.tokens = np.array([tokens[row].sum() for row in self.rows])  # of each row
        full, number = self.tokens.mean() / budget, (tokens > 0).sum()
        PartialState().print(f"{number:,} records in {len(self):,} rows of up to {budget:,} tokens, {full:.1%} full")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        row = [int(i) for i in self.rows[index]]
        return [item for i in row if (item := self.dataset.good_item(i)) is not None] or [self.dataset[row[0]]]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What PyTorch's loader takes as the batch of these rows."""
        return [item for index in indices for item in self[index]]
