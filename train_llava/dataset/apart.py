"""Keeps records apart to evaluate on, for `--eval_fraction`: pictures that look like theirs are not trained on."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from train_llava.common.files import replacing
from train_llava.data import LlavaDataset
from train_llava.dataset.archives import data_uri, read_image
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.table import to_item

SIDE, ALIKE = 8, 3  # pictures look alike if, at 8 x 8 pixels, they differ by less than 3 of 256 levels (RMS)
BLOCK, MANY = 512, 10_000  # looks compared at once; a progress bar pays from so many on


def keep_apart(records: LlavaDataset, fraction: float, seed: int, folder: Path | None = None) -> list[tuple[int, int]]:
    """Source and row of the records kept apart, drawn by seed; `folder` gets `train.jsonl` and `heldout.jsonl`.

    Records that share a picture, or have pictures that look alike, stay together. Bad ones are not kept apart.
    """
    import networkx  # here, since it takes a third of a second

    places, graph = sorted(set(map(tuple, records.index.tolist()))), networkx.Graph()
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(partial(_looks, records), places), "looking", len(places), disable=len(places) < MANY)
        for place, looks in zip(places, found, strict=True):
            graph.add_edges_from((place, look) for look in looks or [place])
    # Pictures that look alike
    pictures = [node for node in graph if isinstance(node, bytes)]
    graph.add_edges_from((pictures[i], pictures[j]) for i, j in enumerate(look_alike(b"".join(pictures)).tolist()))
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
    return list(map(look_of, images))


def look_of(image: Image.Image) -> bytes:
    """The pixels of an RGB image at `SIDE`, by which `look_alike` compares it."""
    return image.resize((SIDE, SIDE), reducing_gap=2).tobytes()


def look_alike(looks: bytes) -> np.ndarray:
    """The groups of N looks in a row that are alike, or are linked by others: the number of one member, `(N,)`.

    Looks that are alike are close along the axis on which all differ most: of each, a few neighbours are compared.
    """
    radius = ALIKE * (3 * SIDE**2) ** 0.5
    pixels = torch.from_numpy(np.frombuffer(looks, np.uint8).reshape(-1, 3 * SIDE**2).astype(np.float32))
    pixels -= pixels.mean(dim=0)
    along, order = (pixels @ torch.linalg.eigh(pixels.T @ pixels)[1][:, -1]).sort()
    pixels, group = pixels[order], np.arange(len(order))
    ends = torch.searchsorted(along, along + radius, right=True).tolist()
    for start in tqdm(range(0, len(order), BLOCK), "comparing pictures", disable=len(order) < MANY):
        block = pixels[start : start + BLOCK]
        near = torch.cdist(block, pixels[start : ends[start + len(block) - 1]]) < radius
        for i in (near.sum(dim=1) > 1).nonzero().flatten().tolist():
            members = start + near[i].nonzero().flatten().numpy()
            roots = np.unique(group[members])
            while (group[roots] != roots).any():
                roots = np.unique(group[roots])
            group[members] = group[roots] = roots[0]  # never a higher number than its own
    while (group[group] != group).any():
        group = group[group]
    order, members = order.numpy(), np.empty_like(group)
    members[order] = order[group]
    return members


def divided(records: LlavaDataset, apart: list[tuple[int, int]]) -> tuple[LlavaDataset, LlavaDataset]:
    """The records to train on, as often as their weights say, and those kept apart."""
    train, heldout, chosen = copy(records), copy(records), set(map(tuple, apart))
    train.index = records.index[[tuple(place) not in chosen for place in records.index.tolist()]]
    heldout.index = np.array(sorted(chosen))
    return train, heldout
