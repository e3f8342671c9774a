"""From records to the tensors the model is trained on: records → messages → token ids and labels → padded batch."""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor

from train_llava.chat import IGNORE, Chat
from train_llava.pictures import open_image, prepare_pictures, read_picture
from train_llava.records import BadRecordError, find_records, load_records, table_rows


def to_item(
    row: dict[str, Any], pictures: Path | None, at_least: int | None = None, decode: bool = True
) -> dict[str, Any]:
    """A row of the table as an item of a data set, its pictures opened unless not to `decode`; see `LlavaDataset`.

    Raises:
        BadRecordError: the record or one of its pictures cannot be used.
    """
    try:
        if row["fault"] is not None:
            raise ValueError(row["fault"])
        images = []
        if decode:
            sources = [(read_picture(pictures, name), name) for name in row["images"]]
            sources += [(content, f"picture {i}") for i, content in enumerate(row["image_bytes"])]
            images = [open_image(source, name, at_least) for source, name in sources]
    except (OSError, ValueError) as error:
        raise BadRecordError(row["id"], str(error)) from error
    said = {"messages": json.loads(row["messages"]), "images": images}
    return {key: row[key] for key in ("id", "language", "answers", "references")} | said


class LlavaDataset(torch.utils.data.Dataset):
    """The records of one or several data sets; `[i]` gives `id`, `messages`, `images`, `language`, `answers` and
    `references`.

    The records lie in Arrow files on disk and are mapped into memory, so that neither this process nor a data-loader
    worker holds them; pictures are opened when their record is asked for. `data_weights` says how often a pass goes
    through each source: 2 is twice, 0.5 is half of its records, always the same half. With `at_least`, large JPEGs are
    decoded smaller (see `open_image`).

    Raises:
        OSError, ValueError: a source is not there or not in any format (see `records`); `[i]`: the record is bad.
    """

    def __init__(
        self,
        data_path: str | list[str],
        image_dir: str | None = None,
        data_weights: list[float] | None = None,
        at_least: int | None = None,
    ):
        paths = [data_path] if isinstance(data_path, str) else data_path
        weights = data_weights or [1.0] * len(paths)
        if len(weights) != len(paths):
            raise ValueError(f"--data_weights names {len(weights)} weights for {len(paths)} data paths")
        self.tables, self.pictures = zip(*(load_records(path, image_dir) for path in paths), strict=True)
        self.at_least = at_least
        rng = np.random.default_rng(0)
        picked = []
        for source, (table, weight) in enumerate(zip(self.tables, weights, strict=True)):
            rows = np.arange(len(table))
            part = np.sort(rng.permutation(rows)[: round(weight % 1 * len(table))])
            rows = np.concatenate([rows] * int(weight) + [part])
            picked.append(np.stack([np.full(len(rows), source), rows], axis=1).astype(np.int32))
        self.index = np.concatenate(picked)  # (records, 2): source and row
        if not len(self.index):
            raise ValueError(f"--data_path {' '.join(paths)} holds no records")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index)

    def item(self, index: int, decode: bool = True) -> dict[str, Any]:
        """`[index]`; without its pictures if they are not to be decoded."""
        source, row = self.index[index]
        return to_item(self.tables[source][int(row)], self.pictures[source], self.at_least, decode)

    def lengths(self) -> list[int]:
        """The records' lengths in characters, by which like can be put with like without opening a picture."""
        columns = [table.data.column("length").to_numpy() for table in self.tables]
        return [int(columns[source][row]) for source, row in self.index]


class CheckedDataset(torch.utils.data.Dataset):
    """A data set for training, in which a bad record never reaches the model.

    A record that cannot be used (see `LlavaDataset` and `Chat.encode`) is written once, with its id and the
    reason, to the file `log`, and the next good one takes its place: batches keep their size, ranks stay in step, and
    what is seen does not depend on the number of workers.

    Raises:
        ValueError: at a bad record if `bad_samples` is `error`, or once they are more than `max_bad_fraction` of all.
    """

    def __init__(
        self,
        dataset: LlavaDataset,
        chat: Chat,
        log: Path,
        bad_samples: str = "skip",
        max_bad_fraction: float = 0.01,
    ):
        self.dataset, self.chat, self.log = dataset, chat, log
        self.bad_samples, self.most = bad_samples, max_bad_fraction * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for i in range(index, index + len(self)):
            try:
                return self.chat.labelled(self.dataset[i % len(self)])
            except BadRecordError as error:
                if self.bad_samples == "error":
                    raise
                found = log_bad_sample(self.log, *error.args)
            if found > self.most:
                raise ValueError(
                    f"{found} of {len(self)} records are bad, more than --max_bad_fraction: see {self.log}"
                )
        raise ValueError("no record is good")


def log_bad_sample(log: Path, record_id: str, reason: str) -> int:
    """Adds a bad record to a log that ranks and workers share, unless it is there; returns how many there are."""
    line = json.dumps({"id": record_id, "reason": reason}, ensure_ascii=False)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        lines = file.read().splitlines()
        if line not in lines:
            file.write(line + "\n")
            lines.append(line)
    return len(lines)


def stream_items(data_path: str | list[str], image_dir: str | None, chat: Chat, log: Path) -> datasets.IterableDataset:
    """The items of data sets of shards that are too large for the disk, read as they come, and again from the start.

    Every rank and worker reads shards of its own. What is bad is logged and left out; as the stream has no end, ranks
    stay in step.
    """
    shards = []
    for path in [data_path] if isinstance(data_path, str) else data_path:
        files, pictures = find_records(path, image_dir)
        shards += [(path, [file], pictures) for file in files] or [(path, [], None)]

    def items(shards: list[tuple[str, list[Path], Path | None]]) -> Iterator[dict[str, Any]]:
        for path, files, pictures in shards:
            for row in table_rows(path, files, pictures):
                try:
                    yield chat.labelled(to_item(row, pictures, chat.side))
                except BadRecordError as error:
                    log_bad_sample(log, *error.args)

    return datasets.IterableDataset.from_generator(items, gen_kwargs={"shards": shards}).repeat(None)


class LlavaCollator:
    """Turns items of a `LlavaDataset` into one batch. B conversations of at most T tokens, P pictures in all:

    - `input_ids`, `attention_mask` `(B, T)`: padded on the right; the mask is 0 on padding alone
    - `pixel_values` `(P, 3, H, W)`: the pictures in the order of their `<image>` tokens
    - `labels` `(B, T)`: the tokens the assistant says, -100 elsewhere
    - `logits_to_keep` `(B, T)`, bool: the positions whose next token has a label
    - `shift_labels` `(N,)`: the labels of those positions' next tokens, row by row

    With the last two the model computes logits at N positions instead of B x T, to the same loss and gradients.

    With `packing` the conversations stand in one row, (1, sum of their lengths), without padding. Then there is no
    `attention_mask`, and `position_ids` count from 0 in each. By these a model keeps them apart as long as it uses no
    cache, so the batch says `use_cache` False too.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None = None, packing: bool = False):
        self.processor, self.packing = processor, packing
        self.chat = Chat(processor, max_length)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        items = [self.chat.labelled(item) for item in items]
        rows = [(item["input_ids"], np.ones_like(item["input_ids"]), item["labels"]) for item in items]
        images = [image for item in items for image in item["images"]]
        if not images:
            # Without a picture the projector would get no gradient, and other ranks would wait for it forever. So one
            # blank picture follows the first row's last token, where no token can see it: its gradient is zero.
            images = [Image.new("RGB", (self.chat.side, self.chat.side))]
            blank = (self.processor.image_token_id, 0, IGNORE)
            rows[0] = tuple(
                np.append(row, [value] * self.chat.image_tokens) for row, value in zip(rows[0], blank, strict=True)
            )
        if self.packing:
            position_ids = torch.cat([torch.arange(len(input_ids)) for input_ids, _, _ in rows])[None]
            rows = [tuple(np.concatenate(column) for column in zip(*rows, strict=True))]
        padding = (self.processor.tokenizer.pad_token_id, 0, IGNORE)
        input_ids, attention_mask, labels = (
            pad_sequence([torch.from_numpy(row[i]) for row in rows], batch_first=True, padding_value=padding[i])
            for i in range(3)
        )
        logits_to_keep = torch.zeros_like(labels, dtype=torch.bool)
        logits_to_keep[:, :-1] = labels[:, 1:] != IGNORE
        if self.packing:
            layout = {"position_ids": position_ids, "use_cache": False}
        else:
            layout = {"attention_mask": attention_mask}
        return layout | {
            "input_ids": input_ids,
            "pixel_values": prepare_pictures(self.processor.image_processor, images),
            "labels": labels,
            "logits_to_keep": logits_to_keep,
            "shift_labels": labels[:, 1:][logits_to_keep[:, :-1]],
        }
