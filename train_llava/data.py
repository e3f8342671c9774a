"""From records to batches: a data set tokenises each record once, a collator pads or packs samples."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from train_llava.chat import IGNORE, Chat, Processor, chat_of
from train_llava.dataset.bad_samples import log_bad_sample
from train_llava.dataset.images import prepare_pictures
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.table import load_records, to_item
from train_llava.dataset.weights import weighted_rows, weights_of
from train_llava.modeling.attention import packed_arguments, use_packed_attention


@dataclass
class Sample:
    """A record as the model is trained on it. `input_ids` and `labels` are `(T,)`: see `Chat.encode`."""

    id: str
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    input_ids: np.ndarray
    labels: np.ndarray
    is_replacement: bool = False  # it takes the place of a bad record


def to_sample(item: dict[str, Any], chat: Chat) -> Sample:
    """Tokenises an item of a `LlavaDataset`; a BadRecordError if the model cannot be trained on it."""
    sizes = item.get("image_sizes") or [image.size for image in item["images"]]
    try:
        if item.get("objects"):
            raise ValueError("its boxes are not written: set `chat` of the LlavaDataset")
        input_ids, labels = chat.encode(item["messages"], sizes)
    except ValueError as error:
        raise BadRecordError(item["id"], str(error)) from error
    return Sample(item["id"], item["messages"], item["images"], input_ids, labels)


class LlavaDataset(torch.utils.data.Dataset):
    """The records of one or several data sets.

    `[i]` is a dict of `id`, `messages`, `images`, `image_sizes` (width, height), `language`, `answers` and
    `references`. Records are mapped from Arrow files on disk. Images are opened when their record is read.

    Args:
        data_weights: how often a pass takes each source: 2 is twice, 0.5 is always the same half of it.
        decode: False leaves out the images.

    With the `chat` of a model, large JPEGs are decoded smaller, and boxes are written as that model sees the images.
    An OSError or ValueError names a source that does not exist or has no known format, or a bad record.
    """

    def __init__(
        self,
        data_path: str | list[str],
        image_dir: str | None = None,
        data_weights: list[float] | None = None,
        decode: bool = True,
    ):
        paths = [data_path] if isinstance(data_path, str) else data_path
        weights = weights_of(paths, data_weights)
        self.tables, self.image_dirs = zip(*(load_records(path, image_dir) for path in paths), strict=True)
        self.decode, self.chat = decode, None
        self.index = weighted_rows(list(map(len, self.tables)), weights)  # (records, 2): source and row
        if not len(self.index):
            reason = f": --data_weights {' '.join(map(str, weights))}" if any(map(len, self.tables)) else ""
            raise ValueError(f"--data_path {' '.join(paths)} holds no records{reason}")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.read(index, self.decode)

    def read(self, index: int, decode: bool) -> dict[str, Any]:
        """The item of a record, with or without its images; see `to_item`."""
        source, row = self.index[index]
        return to_item(self.tables[source][int(row)], self.image_dirs[source], self.chat, decode)


class CheckedDataset(torch.utils.data.Dataset):
    """The `Sample`s of a `LlavaDataset`. A good record replaces a bad one, so batches keep their size.

    A bad record is written once, with index, id and reason, to `log`. It is a ValueError if `bad_samples` is `error`,
    or if more than `max_bad_fraction` are bad.
    """

    def __init__(
        self, records: LlavaDataset, chat: Chat, log: Path, bad_samples: str = "skip", max_bad_fraction: float = 0.01
    ):
        self.records, self.chat, self.log = records, chat, log
        records.chat = chat
        self.bad_samples, self.limit = bad_samples, max_bad_fraction * len(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        # The index seeds the choice of a replacement: it differs among bad records, and stays in every pass
        others = np.random.default_rng(index).integers(len(self), size=64)
        for i in chain([index], others, range(len(self))):
            if (sample := self.good_sample(int(i))) is not None:
                sample.is_replacement = bool(i != index)
                return sample
        raise ValueError("no record is good")

    def good_sample(self, index: int, decode: bool = True) -> Sample | None:
        """The sample of this record, None if it is bad. Without `decode`, its images are not opened."""
        try:
            return to_sample(self.records.read(index, decode), self.chat)
        except BadRecordError as error:
            if self.bad_samples == "error":
                raise
            bad = log_bad_sample(self.log, index, *error.args)
        if bad > self.limit:
            raise ValueError(f"{bad} of {len(self)} records are bad, more than --max_bad_fraction: see {self.log}")
        return None


class LlavaCollator:
    """Turns samples, or items of a `LlavaDataset`, into a batch of B conversations, at most T tokens, P images:

    - `input_ids`, `attention_mask` `(B, T)`: padded on the right; the mask is 0 on padding
    - `pixel_values` `(P, 3, H, W)`: the images in the order of their `<image>` tokens (see `prepare_pictures`)
    - `labels` `(B, T)`: the supervised tokens, -100 elsewhere
    - `logits_to_keep` `(B, T)`, bool: the positions whose next token has a label
    - `shift_labels` `(N,)`: the labels of these positions' next tokens, row by row

    With the last two, the model computes logits at N positions instead of B x T. Loss and gradients are the same.

    With `packing`, the conversations are one row `(1, T)` without `attention_mask`; `packed_arguments` part them.

    Args:
        padding_mask: False leaves out `attention_mask`, for models to which padding on the right is invisible.
        multiple: T is rounded up to a multiple of it, so that batches have few distinct lengths. Padding at the end of
            a packed row is kept apart as a conversation is.
    """

    def __init__(
        self,
        processor: Processor,
        max_length: int | None = None,
        packing: bool = False,
        padding_mask: bool = True,
        multiple: int = 1,
    ):
        self.processor, self.packing, self.chat = processor, packing, chat_of(processor, max_length)
        self.padding_mask, self.multiple = padding_mask, multiple
        if packing:
            use_packed_attention()

    def __call__(self, items: list[Sample | dict[str, Any]]) -> dict[str, Any]:
        # The tokens, labels and images of all samples
        samples = [item if isinstance(item, Sample) else to_sample(item, self.chat) for item in items]
        images = list(chain.from_iterable(sample.images for sample in samples))
        rows = [torch.from_numpy(sample.input_ids) for sample in samples]
        labels = [torch.from_numpy(sample.labels) for sample in samples]
        attended_lengths = torch.tensor([len(row) for row in rows])
        # Without an image, the projector would get no gradient, and other ranks would wait for it forever.
        # No token sees a blank image behind the first row's last token: its gradient is zero
        if not images:
            images = [Image.new("RGB", (self.chat.side, self.chat.side))]
            picture = torch.from_numpy(self.chat.picture_ids(images[0].size))
            rows[0] = torch.cat([rows[0], picture])
            labels[0] = torch.cat([labels[0], torch.full_like(picture, IGNORE)])
        # All rows become one, or each is padded to the longest
        lengths = [len(row) for row in rows]
        if self.packing:
            rows, labels = [torch.cat(rows)], [torch.cat(labels)]
        pad_id = self.processor.tokenizer.pad_token_id
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        if more := -input_ids.shape[1] % self.multiple:
            input_ids = nn.functional.pad(input_ids, (0, more), value=pad_id)
            labels = nn.functional.pad(labels, (0, more), value=IGNORE)
            lengths.append(more)
        # The token before each label predicts it
        logits_to_keep = torch.zeros_like(labels, dtype=torch.bool)
        logits_to_keep[:, :-1] = labels[:, 1:] != IGNORE
        batch = {"input_ids": input_ids, "labels": labels, "logits_to_keep": logits_to_keep}
        batch["shift_labels"] = labels[:, 1:][logits_to_keep[:, :-1]]
        if self.packing:
            batch |= packed_arguments(lengths)
        elif self.padding_mask:
            batch["attention_mask"] = (torch.arange(input_ids.shape[1]) < attended_lengths[:, None]).long()
        return batch | prepare_pictures(self.processor.image_processor, images)
