"""Reads data sets of shards that are too large for the disk, pass after pass, in a new order each."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
from datasets.iterable_dataset import ExamplesIterable

from train_llava.chat import Chat
from train_llava.data import Sample, to_item, to_sample
from train_llava.dataset.bad_samples import log_bad_sample
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.sources import find_records
from train_llava.dataset.table import table_rows
from train_llava.dataset.weights import weights_of

BUFFER = 1000  # rows that are shuffled among each other
Shard = tuple[str, list[PurePath], PurePath | None, float]  # data path, file, folder of images, share to take


def stream_items(
    data_path: str | list[str],
    image_dir: str | None,
    data_weights: list[float] | None,
    chat: Chat,
    log: Path,
    bad_samples: str = "skip",
    max_bad_fraction: float = 0.01,
    seed: int = 0,
) -> datasets.IterableDataset:
    """The samples of data sets of shards, without an end. Every rank and worker reads its own shards.

    A bad record is logged and left out. Each rank and worker counts its own, and stops if they are more than
    `max_bad_fraction` of the records of a pass. Within a pass, it allows for at least a thousand records.

    Raises:
        OSError, ValueError: a source does not exist; while it is read, too many records are bad, or all.
    """
    # A source of weight 2.5 is in the list twice whole and once with half of its records
    paths, placed = [data_path] if isinstance(data_path, str) else data_path, []
    for path, weight in zip(paths, weights_of(paths, data_weights), strict=True):
        files, images = find_records(path, image_dir, streaming=True)
        shares = [1.0] * int(weight) + ([weight % 1] if weight % 1 else [])
        for share in shares:
            for i, file in enumerate(files):
                placed.append(((i + 0.5) / len(files), (path, [file], images, share)))
    # Ranks and workers get stretches of the list. Sources are mixed, so that each stretch has a part of all
    shards = [shard for _, shard in sorted(placed, key=lambda entry: entry[0])]
    settings = {"chat": chat, "log": log, "bad_samples": bad_samples, "max_bad_fraction": max_bad_fraction}
    return datasets.IterableDataset(Passes(good_samples, {"shards": shards, "seed": seed} | settings))


class Passes(ExamplesIterable):
    """The samples of a rank or a worker; `datasets` itself would read one shard to its end before the next.

    `datasets` splits the list among the keyword arguments of the generator.
    """

    def __iter__(self) -> Iterator[tuple[int, Sample]]:
        return enumerate(self.generate_examples_fn(**self.kwargs))

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "Passes":
        # In stretches also among workers: every other shard could be of one source
        return Passes(self.generate_examples_fn, super().shard_data_sources(num_shards, index, True).kwargs)


def good_samples(
    shards: list[Shard], seed: int, chat: Chat, log: Path, bad_samples: str, max_bad_fraction: float
) -> Iterator[Sample]:
    """The samples of shards, pass after pass; see `stream_items`."""
    sources = ", ".join(sorted({path for path, *_ in shards}))
    for number in count():
        read = bad = 0
        rows = shuffled_rows(shards, np.random.default_rng([seed, number]))
        for read, (place, row, images) in enumerate(rows, 1):
            try:
                sample = to_sample(to_item(row, images, chat), chat)
            except BadRecordError as error:
                if bad_samples == "error":
                    raise
                log_bad_sample(log, place, *error.args)
                bad += 1
                if bad > max_bad_fraction * max(read, 1000):
                    break
            else:
                yield sample
        # A pass that gave too little ends the run
        if not read:
            raise ValueError(f"{sources} gave a rank or worker nothing to read")
        if bad == read:
            raise ValueError(f"no record of {sources} is good: see {log}")
        if bad > max_bad_fraction * read:
            raise ValueError(f"{bad} of {read} records are bad, more than --max_bad_fraction: see {log}")


def shuffled_rows(
    shards: list[Shard], rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any], PurePath | None]]:
    """The rows of shards in random order, as far as a buffer reaches, with their places and image folders."""
    buffer = []
    for i in rng.permutation(len(shards)):
        path, files, images, share = shards[i]
        draws = np.random.default_rng(0)  # every pass takes the same share
        for number, row in enumerate(table_rows(path, files, images)):
            if draws.random() < share:
                buffer.append((f"{files[0]}:{number}", row, images))
            # A full buffer gives one of its rows
            if len(buffer) == BUFFER:
                j = rng.integers(BUFFER)
                buffer[j], buffer[-1] = buffer[-1], buffer[j]
                yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer
