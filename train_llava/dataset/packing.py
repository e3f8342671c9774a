"""Fills rows up to a budget of tokens with records, by their lengths."""

from itertools import chain

import numpy as np
from accelerate import PartialState
from torch.utils.data import Dataset

from train_llava.data import CheckedDataset, Sample
from train_llava.dataset.lengths import count_tokens

WINDOW = 4096  # records that are packed among each other: rows stay a random mixture, and the search short


def pack(tokens: np.ndarray, has_image: np.ndarray, budget: int, blank: int = 0, seed: int = 0) -> list[np.ndarray]:
    """Puts each record's number into one row of at most `budget` tokens, by first-fit decreasing.

    The longest record comes first, and each goes into the first row that has room (D. S. Johnson, Near-Optimal
    Bin Packing Algorithms, 1973). This is done within windows of `WINDOW` records, which `seed` shuffles. For
    example, records of 6, 4 and 3 tokens in rows of 10 give `[[0, 1], [2]]`.

    Args:
        tokens: of each record, at most `budget`; a record of 0 is left out.
        has_image: whether a record has an image, `(records,)`.
        blank: the tokens of the blank image that a row without images gets.
    """
    order, rows = np.random.default_rng(seed).permutation(np.flatnonzero(tokens)), []
    for window in np.split(order, range(WINDOW, len(order), WINDOW)):
        # The free tokens of each row, and how many of them are reserved for a blank image
        room, reserved = np.full(len(window), budget), np.full(len(window), blank)
        filled: list[list[int]] = [[]]  # the last is empty
        for i in window[np.argsort(-tokens[window], kind="stable")]:
            free = room[: len(filled)] - (0 if has_image[i] else reserved[: len(filled)])
            row = np.argmax(free >= tokens[i])
            room[row] -= tokens[i]
            reserved[row] *= not has_image[i]
            filled[row].append(i)
            if filled[-1]:
                filled.append([])
        rows += map(np.array, filled[:-1])
    return rows


class PackedDataset(Dataset):
    """The good records of a data set in rows; `[i]` is the list of a row's samples, at most `budget` tokens.

    Rows are made once. The `Trainer` treats a row as a sample and as a batch: it shuffles the rows in each pass,
    divides them among the ranks, and resumes between them.

    A broken image is found when its row is opened. Its record is left out, since a replacement might be longer.
    Only a row that would be empty takes in one other record. A ValueError is one of `CheckedDataset`, or says that a
    record is longer than `budget`, or none is good.
    """

    def __init__(self, dataset: CheckedDataset, budget: int, seed: int = 0):
        self.dataset, chat = dataset, dataset.chat
        counts = count_tokens(dataset.records, chat)
        # Bad records, and those that are too long, are logged and left out
        for i in np.flatnonzero((counts[:, 0] == 0) | (counts[:, 0] > chat.longest)):
            if dataset.good_sample(int(i), decode=False) is None:
                counts[i] = 0
        tokens, has_image = counts[:, 0], counts[:, 1] > 0
        # The collator puts a blank image into a row without one, and a broken image may make such a row
        blank = len(chat.picture_ids((chat.side, chat.side)))
        tokens[has_image] = np.maximum(tokens[has_image], blank)
        # A row of one record has to fit
        alone = tokens + blank * ((tokens > 0) & ~has_image)
        if alone.max() > budget:
            name = dataset.records.read(int(alone.argmax()), decode=False)["id"]
            remedy = "(if it has no picture, with a blank one): give as many, or leave it out by a lower --max_length"
            raise ValueError(f"--tokens_per_batch {budget}: record {name!r} takes {alone.max()} {remedy}")
        # The rows
        self.rows = pack(tokens, has_image, budget, blank, seed)
        if not self.rows:
            raise ValueError("no record is good")
        self.tokens = np.array([tokens[row].sum() for row in self.rows])  # of each row
        share, number = self.tokens.mean() / budget, (tokens > 0).sum()
        PartialState().print(f"{number:,} records in {len(self):,} rows of up to {budget:,} tokens, {share:.1%} full")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[Sample]:
        row = [int(i) for i in self.rows[index]]
        samples = [self.dataset.good_sample(i) for i in row]
        return [sample for sample in samples if sample is not None] or [self.dataset[row[0]]]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        """The batch of these rows; PyTorch's loader calls it."""
        return list(chain.from_iterable(self[index] for index in indices))
