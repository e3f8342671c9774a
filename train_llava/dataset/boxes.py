"""Boxes and points in texts: from the pixels of a file to places in what the model sees of it, from 0 to 1000."""

import re
import reprlib
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from train_llava.chat import Chat
from train_llava.dataset.readers import Record

TAG = re.compile(r"<(box|bbox|point)>")
NAME = "<ref-object>"  # ms-swift's, for the label of an object
GRID = 1000


def objects_of(record: Record) -> list[dict[str, Any]]:
    """A record's objects: `label`, `box` (x1, y1, x2, y2; of a point x, y) in pixels, and the number of its `image`.

    `objects` is a list of them, or as in ms-swift `{"ref": labels, "bbox": boxes, "image_id": numbers}`, with
    `"bbox_type": "norm1"` for shares of the picture. A ValueError says which one is no box.
    """
    objects = record["objects"]
    if isinstance(objects, dict):
        columns = [objects.get(key) or [] for key in ("ref", "bbox", "image_id")]
        relative = objects.get("bbox_type") == "norm1"
        objects = []
        for label, box, image in zip_longest(*columns):
            objects.append({"label": label, "box": box, "image": image, "relative": relative})
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise ValueError("its objects are no list of objects with a label and a box")
    for box in [one["box"] for one in objects if one.get("box") is not None]:
        is_box = isinstance(box, list) and all(isinstance(x, int | float) and abs(x) < 1e6 for x in box)
        if not is_box or len(box) not in (2, 4) or (len(box) == 4 and not (box[0] < box[2] and box[1] < box[3])):
            raise ValueError(f"the box of an object is {reprlib.repr(box)}, not [x1, y1, x2, y2] or [x, y] in pixels")
    return objects


def place_objects(messages: list[dict[str, Any]], record: Record, images: int) -> list[dict[str, Any]]:
    """The objects for the `<box>` and `<point>` tags of a conversation, in their order; without tags, those to draw.

    A label takes the place of each `<ref-object>`. A ValueError says that tags and objects are not as many.
    """
    parts = [part for message in messages for part in message["content"] if part["type"] == "text"]
    text = "".join(part["text"] for part in parts)
    tags, names = len(TAG.findall(text)), text.count(NAME)
    if not record.get("objects"):
        return []
    if not tags + names:  # nothing is learnt of them, and errors do not count
        with suppress(ValueError):
            objects = objects_of(record) if isinstance(record["objects"], list) else []
            return [{"box": one["box"]} for one in objects if one.get("box") and not one.get("image")]
        return []
    objects = objects_of(record)
    labels, boxes = ([one for one in objects if one.get(key)] for key in ("label", "box"))
    if tags not in (0, len(boxes)) or names not in (0, len(labels)):
        raise ValueError(f"{tags} <box> or <point> tags and {names} {NAME} tags for {len(objects)} objects")
    if not all((one.get("image") or 0) in range(images) for one in boxes):
        raise ValueError(f"an object lies in a picture that the record has not: it has {images}")
    labels = iter(labels)
    for part in parts:
        part["text"] = re.sub(NAME, lambda _: str(next(labels)["label"]), part["text"])
    return boxes if tags else []


def write_places(
    messages: list[dict[str, Any]], objects: list[dict[str, Any]], geometries: list[tuple[int, int, int]], chat: Chat
) -> None:
    """Writes `[x1, y1, x2, y2]` and `[x, y]` in place of the tags; `places` of a message are the boxes in it.

    `geometries` are the pictures' widths and heights as stored, and how EXIF turns them: see `stored_geometry`.
    A ValueError names an object of which the model sees nothing, or without `keep_cut_boxes` not all.
    """
    remaining = iter(objects)
    for message in messages:
        places: list[list[int]] = []

        def write(tag: re.Match, places: list[list[int]] = places) -> str:
            one = next(remaining)
            place = place_in(one, geometries[one.get("image") or 0], chat)
            places.append(place)
            if tag[1] == "point" and len(place) == 4:
                place = [(place[0] + place[2]) // 2, (place[1] + place[3]) // 2]
            return str(place)

        for part in message["content"]:
            if part["type"] == "text":
                part["text"] = TAG.sub(write, part["text"])
        if places:
            message["places"] = places


def place_in(one: dict[str, Any], geometry: tuple[int, int, int], chat: Chat) -> list[int]:
    """An object's box or point in what the model sees of its picture."""
    width, height, turn = geometry
    if turn >= 5:
        width, height = height, width
    points = upright_shares(one, geometry)
    sides, seen = zip(*points, strict=True), []
    # What the model sees reaches from `low` to `high`
    left, top, right, bottom = chat.seen_part((width, height))
    for ends, low, high in zip(sides, (left, top), (right, bottom), strict=True):
        if min(ends) > 1 or max(ends) < 0:
            raise ValueError(f"the object {one.get('label')} at {one['box']} lies outside its picture")
        ends = [(min(max(end, 0), 1) - low) / (high - low) * GRID for end in sorted(ends)]
        seen.append([round(min(max(end, 0), GRID)) for end in ends])
        is_cut = ends[0] < -0.5 or ends[-1] > GRID + 0.5
        if is_cut and (not chat.keep_cut_boxes or seen[-1][0] == seen[-1][-1]):
            remedy = "take --image_aspect_ratio pad or anyres, or --keep_cut_boxes true if part of it is seen"
            raise ValueError(f"the model does not see all of the object {one.get('label')}: {remedy}")
    return [seen[axis][end] for end in range(len(points)) for axis in (0, 1)]


def upright_shares(one: dict[str, Any], geometry: tuple[int, int, int]) -> list[tuple[float, float]]:
    """The x and y of an object's two corners, or of its point, in shares of its picture as people see it."""
    width, height, turn = geometry
    scale = (1, 1) if one.get("relative") else (width, height)
    shares = [value / scale[i % 2] for i, value in enumerate(one["box"])]
    # EXIF mirrors first, then turns by quarters
    return [turned(x, y, turn) for x, y in zip(shares[::2], shares[1::2], strict=True)]


def turned(x: float, y: float, turn: int) -> tuple[float, float]:
    """A place in shares of a picture as stored, as shares of the picture that EXIF's orientation 1 to 8 makes."""
    if turn in (2, 3, 7, 8):
        x = 1 - x
    if turn in (3, 4, 6, 7):
        y = 1 - y
    return (x, y) if turn < 5 else (y, x)
