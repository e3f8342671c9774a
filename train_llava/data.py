"""From records to the tensors the model is trained on: records → messages → token ids and labels → padded batch."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from train_llava.chat import IGNORE, Chat, Processor
from train_llava.dataset.archives import label, read_image
from train_llava.dataset.bad_samples import log_bad_sample
from train_llava.dataset.images import open_image, picture_size, prepare_pictures
from train_llava.dataset.table import load_records
from train_llava.modeling.attention import use_conversation_lengths
from train_llava.records import BadRecordError


def to_item(
    row: dict[str, Any], image_dir: Path | None, min_side: int | None = None, decode: bool = True, measure: bool = True
) -> dict[str, Any]:
    """A row of the table as an item of a data set, its pictures opened; see `LlavaDataset`.

    Raises:
        BadRecordError: the record or one of its pictures cannot be used.
    """
    images, sizes = [], []
    try:
        if row["error"] is not None:
            raise ValueError(row["error"])
        if decode or measure:
            sources = [(read_image(image_dir, name), label(name)) for name in row["images"]]
            sources += [(content, f"picture {i}") for i, content in enumerate(row["image_bytes"])]
            images = [open_image(source, name, min_side) for source, name in sources if decode]
            sizes = [image.size for image in images] or [picture_size(*source) for source in sources]
    except (OSError, ValueError) as error:
        raise BadRecordError(row["id"], str(error)) from error
    kept = {key: row[key] for key in ("id", "language", "answers", "references")}
    return kept | {"messages": json.loads(row["messages"]), "images": images, "image_sizes": sizes}


class LlavaDataset(torch.utils.data.Dataset):
    """The records of one or several data sets; `[i]` gives `id`, `messages`, `images`, `image_sizes` (width, height),
    `language`, `answers` and `references`.

    The records lie in Arrow files on disk and are mapped into memory, so that neither this process nor a data-loader
    worker holds them; pictures are opened when their record is asked for. `data_weights` says how often a pass goes
    through each source: 2 is twice, 0.5 is half of its records, always the same half. With `min_side`, large JPEGs are
    decoded smaller (see `open_image`). Without `decode`, items come without their pictures; with `measure`, the heads
    of their files are read for the sizes.

    Raises:
        OSError, ValueError: a source is not there or not in any format (see `records`); `[i]`: the record is bad.
    """

    def __init__(
        self,
        data_path: str | list[str],
        image_dir: str | None = None,
        data_weights: list[float] | None = None,
        min_side: int | None = None,
        decode: bool = True,
        measure: bool = False,
    ):
        paths = [data_path] if isinstance(data_path, str) else data_path
        weights = weights_of(paths, data_weights)
        self.tables, self.image_dirs = zip(*(load_records(path, image_dir) for path in paths), strict=True)
        self.min_side, self.decode, self.measure = min_side, decode, measure
        rng = np.random.default_rng(0)
        picked = []
        for source, (table, weight) in enumerate(zip(self.tables, weights, strict=True)):
            rows = np.arange(len(table))
            part = np.sort(rng.permutation(rows)[: round(weight % 1 * len(table))])
            rows = np.concatenate([rows] * int(weight) + [part])
            picked.append(np.stack([np.full(len(rows), source), rows], axis=1).astype(np.int32))
        self.index = np.concatenate(picked)  # (records, 2): source and row
        if not len(self.index):
            weighted = f": --data_weights {' '.join(map(str, weights))}" * any(map(len, self.tables))
            raise ValueError(f"--data_path {' '.join(paths)} holds no records" + weighted)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, row = self.index[index]
        record = self.tables[source][int(row)]
        return to_item(record, self.image_dirs[source], self.min_side, self.decode, self.measure)


def weights_of(paths: list[str], data_weights: list[float] | None) -> list[float]:
    """How often a pass goes through each data path.

    Raises:
        ValueError: there is not one weight, 0 or more, for each path.
    """
    weights = data_weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise ValueError(f"--data_weights names {len(weights)} weights for {len(paths)} data paths")
    if not all(0 <= weight < np.inf for weight in weights) or not any(weights):
        raise ValueError(f"--data_weights {' '.join(map(str, weights))}: weights are numbers from 0, one above it")
    return weights


class CheckedDataset(torch.utils.data.Dataset):
    """A data set for training, in which a bad record never reaches the model.

    A record that cannot be used (see `LlavaDataset` and `Chat.encode`) is written once, with index, id and reason, to
    `log`, and a good one takes its place: batches keep their size, ranks stay in step, workers change nothing.

    Raises:
        ValueError: at a bad record if `bad_samples` is `error`, or once they are more than `max_bad_fraction` of all.
    """

    def __init__(
        self, dataset: LlavaDataset, chat: Chat, log: Path, bad_samples: str = "skip", max_bad_fraction: float = 0.01
    ):
        self.dataset, self.chat, self.log = dataset, chat, log
        self.bad_samples, self.limit = bad_samples, max_bad_fraction * len(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # where it is bad: of bad ones in a row each has another stand-in, which its index alone tells
        others = (i * 7919 + index * 104729 for i in range(1, 65))
        for i in chain([index], others, range(len(self))):
            if (item := self.good_item(i % len(self))) is not None:
                return item | {"stand_in": i != index}
        raise ValueError("no record is good")

    def good_item(self, index: int) -> dict[str, Any] | None:
        """The item of this very record, None where it is bad."""
        try:
            return self.chat.labelled(self.dataset[index])
        except BadRecordError as error:
            if self.bad_samples == "error":
                raise
            bad = log_bad_sample(self.log, index, *error.args)
        if bad > self.limit:
            raise ValueError(f"{bad} of {len(self)} records are bad, more than --max_bad_fraction: see {self.log}")
        return None


class LlavaCollator:
    """Turns items of a `LlavaDataset` into one batch. B conversations of at most T tokens, P pictures in all:

    - `input_ids`, `attention_mask` `(B, T)`: padded on the right; the mask is 0 on padding
    - `pixel_values` `(P, 3, H, W)`: the pictures in the order of their `<image>` tokens (see `prepare_pictures`)
    - `labels` `(B, T)`: the tokens the assistant says, -100 elsewhere
    - `logits_to_keep` `(B, T)`, bool: the positions whose next token has a label
    - `shift_labels` `(N,)`: the labels of those positions' next tokens, row by row

    With the last two the model computes logits at N positions instead of B x T, to the same loss and gradients.

    With `packing` the conversations stand in one row, (1, sum of their lengths), without padding. Then there is no
    `attention_mask`, and `position_ids` count from 0 in each. By these a model keeps them apart as long as it uses no
    cache, so the batch says `use_cache` False too; `conversation_lengths` spare `sdpa` what the mask would hide.
    """

    def __init__(self, processor: Processor, max_length: int | None = None, packing: bool = False):
        self.processor, self.packing, self.chat = processor, packing, Chat(processor, max_length)
        if packing:
            use_conversation_lengths()

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        items = [self.chat.labelled(item) for item in items]
        rows = [(item["input_ids"], np.ones_like(item["input_ids"]), item["labels"]) for item in items]
        images = [image for item in items for image in item["images"]]
        if not images:
            # Without a picture the projector would get no gradient, and other ranks would wait for it forever. So one
            # blank picture follows the first row's last token, where no token can see it: its gradient is zero.
            images = [Image.new("RGB", (self.chat.side, self.chat.side))]
            blank = (self.processor.image_token_id, 0, IGNORE)
            tokens = self.chat.image_tokens(images[0].size)
            rows[0] = tuple(np.append(row, [value] * tokens) for row, value in zip(rows[0], blank, strict=True))
        if self.packing:
            lengths = [len(input_ids) for input_ids, _, _ in rows]
            position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
            rows = [tuple(np.concatenate(column) for column in zip(*rows, strict=True))]
        padding = (self.processor.tokenizer.pad_token_id, 0, IGNORE)
        input_ids, attention_mask, labels = (
            pad_sequence([torch.from_numpy(row[i]) for row in rows], batch_first=True, padding_value=padding[i])
            for i in range(3)
        )
        logits_to_keep = torch.zeros_like(labels, dtype=torch.bool)
        logits_to_keep[:, :-1] = labels[:, 1:] != IGNORE
        batch = {"input_ids": input_ids, "labels": labels, "logits_to_keep": logits_to_keep}
        batch["shift_labels"] = labels[:, 1:][logits_to_keep[:, :-1]]
        if self.packing:
            batch |= {"position_ids": position_ids, "use_cache": False, "conversation_lengths": lengths}
        else:
            batch["attention_mask"] = attention_mask
        return batch | prepare_pictures(self.processor.image_processor, images)
