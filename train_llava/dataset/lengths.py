"""About how long a data set's records are in tokens, to sort by: without tokenising each, and without its pictures."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.compute as pc
import torch
from tqdm import tqdm
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from train_llava.chat import Chat
from train_llava.data import LlavaDataset, to_item
from train_llava.dataset.readers import BadRecordError


def order_seed(args: TrainingArguments) -> int:
    """What a run's order of records is drawn by."""
    return args.seed if args.data_seed is None else args.data_seed


class GroupedByLength(LengthGroupedSampler):
    """The order of transformers' sampler, told by a seed and the epoch alone: the same on every rank, whatever numbers
    it has drawn, and in a run that goes on from a checkpoint."""

    def __init__(self, batch_size: int, lengths: np.ndarray, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return super().__iter__()


def estimate_lengths(dataset: LlavaDataset, chat: Chat) -> np.ndarray:
    """About how many tokens each record has, pictures included, `(records,)`.

    200 records, from short to long, tell by least squares how many tokens come of so many turns, characters, and
    bytes, which differ by language.
    """
    sizes = []  # of each record: turns, characters, bytes, pictures
    for source, table in enumerate(dataset.tables):
        texts, *lists = (table.data.column(name) for name in ("messages", "images", "image_bytes"))
        size = [pc.count_substring(texts, '"role"'), pc.utf8_length(texts), pc.binary_length(texts)]
        size = np.stack([*size, pc.add(*map(pc.list_value_length, lists))], axis=1)
        sizes.append(size[dataset.index[dataset.index[:, 0] == source, 1]])
    sizes = np.concatenate(sizes)
    order = np.argsort(sizes[:, 2], kind="stable")[(sizes[:, 0] == 0).sum() :]  # without those that have no turn
    sample = order[np.linspace(0, len(order) - 1, min(len(order), 200), dtype=int)]
    texts = [dataset.tables[source].data.column("messages")[int(row)] for source, row in dataset.index[sample]]
    tokens = [chat.count_tokens(json.loads(text.as_py())) for text in texts]
    weights, *_ = np.linalg.lstsq(sizes[sample], tokens, rcond=None)
    return sizes @ weights + picture_tokens(dataset, chat, sizes[:, 3])


def picture_tokens(dataset: LlavaDataset, chat: Chat, pictures: np.ndarray) -> np.ndarray:
    """How many more tokens than one the pictures of each record have, which are so many; a bad record's count 0.

    By their tiles, each has as many as its size says, and its head is read.
    """
    if not chat.anyres:
        return pictures * (chat.image_tokens() - 1)

    def more(place: np.ndarray) -> int:
        row = dataset.tables[place[0]][int(place[1])]
        try:
            sizes = to_item(row, dataset.image_dirs[place[0]], decode=False)["image_sizes"]
        except BadRecordError:
            return 0
        return sum(chat.image_tokens(size) - 1 for size in sizes)

    with ThreadPoolExecutor() as pool:
        found = pool.map(more, dataset.index)
        return np.array(list(tqdm(found, "measuring pictures", len(dataset), disable=len(dataset) < 10_000)))
