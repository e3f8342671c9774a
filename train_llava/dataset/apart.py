"""Keeps records apart to evaluate on, for `--eval_fraction`: pictures that look like theirs are not trained on."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch

from train_llava.common.files import replacing
from train_llava.data import LlavaDataset
from train_llava.dataset.archives import data_uri, read_image
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.table import to_item

SIDE, ALIKE = 8, 3  # pictures look alike if, at 8 x 8 pixels, they differ by less than 3 of 256 levels (RMS)


def keep_apart(records: LlavaDataset, fraction: float, seed: int, folder: Path | None = None) -> list[tuple[int, int]]:
    """Source and row of the records kept apart, drawn by seed; `folder` gets `train.jsonl` and `heldout.jsonl`.

    Records that share a picture, or have pictures that look alike, stay together. Bad ones are not kept apart.
    """
    import networkx  # here, since it takes a third of a second

    places, graph = sorted(set(map(tuple, records.index.tolist()))), networkx.Graph()
    with ThreadPoolExecutor() as pool:
        for place, looks in zip(places, pool.map(partial(_looks, records), places), strict=True):
            graph.add_edges_from((place, look) for look in looks or [place])
    # Pictures that look alike
    pictures = [node for node in graph if isinstance(node, bytes)]
    pixels = torch.tensor(np.frombuffer(b"".join(pictures), np.uint8).reshape(-1, 3 * SIDE**2)).float()
    for start in range(0, len(pictures), 1000):
        near = torch.cdist(pixels[start : start + 1000], pixels) < ALIKE * pixels.shape[1] ** 0.5
        graph.add_edges_from((pictures[start + i], pictures[j]) for i, j in near.nonzero().tolist())
    # What hangs together goes to one side, in random order, as long as it fits
    groups, apart = list(networkx.connected_components(graph)), []
    most = min(max(round(fraction * len(places)), 1), len(places) - 1)
    for group in random.Random(seed).sample(groups, len(groups)):
        found = [node for node in group if isinstance(node, tuple)]
        apart += found if "bad" not in group and len(apart) + len(found) <= most else []
    if not apart:
        raise ValueError(f"--eval_fraction {fraction} keeps none of {len(places)} records apart: too many look alike")
    # The two sides as files: with the names of pictures, and kept apart with the pictures themselves
    for name, side in zip(("train", "heldout"), divided(records, apart) if folder else (), strict=False):
        with replacing(folder / f"{name}.jsonl") as file, open(file, "w", encoding="utf-8") as lines:
            for source, number in np.unique(side.index, axis=0).tolist():
                row = side.tables[source][number]
                row |= {key: json.loads(row[key] or "[]") for key in ("messages", "objects")}
                images = row.pop("image_bytes")
                if name == "heldout":
                    images += [read_image(side.image_dirs[source], image) for image in row["images"]]
                    row["images"] = [
                        data_uri(each if isinstance(each, bytes) else each.read_bytes()) for each in images
                    ]
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return sorted(apart)


def _looks(records: LlavaDataset, place: tuple[int, int]) -> list[bytes | str]:
    """The pixels of a record's pictures at `SIDE`, or "bad"."""
    try:
        images = to_item(records.tables[place[0]][place[1]], records.image_dirs[place[0]])["images"]
    except BadRecordError:
        return ["bad"]
    return [image.resize((SIDE, SIDE), reducing_gap=2).tobytes() for image in images]


def divided(records: LlavaDataset, apart: list[tuple[int, int]]) -> tuple[LlavaDataset, LlavaDataset]:
    """The records to train on, as often as their weights say, and those kept apart."""
    train, heldout, chosen = copy(records), copy(records), set(map(tuple, apart))
    train.index = records.index[[tuple(place) not in chosen for place in records.index.tolist()]]
    heldout.index = np.array(sorted(chosen))
    return train, heldout
