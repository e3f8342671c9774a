"""What deserves a look in good records, for `check_data`: copies of pictures, answers that differ or are cut off."""

from collections import Counter
from functools import lru_cache
from hashlib import blake2b
from pathlib import PurePath
from typing import Any
from unicodedata import category, name
from zlib import crc32

import numpy as np

from train_llava.chat import Chat
from train_llava.dataset.apart import look_alike, look_of
from train_llava.dataset.images import picture_size
from train_llava.dataset.table import Row, image_sources
from train_llava.records import IMAGE_TOKEN, text_of

LONG = 60  # bytes of an answer that should end with a full stop: twelve English words, twenty Chinese characters
LOST = 0.1  # of a picture's area
SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}  # others are called as in Unicode
FINDINGS = {
    "cropped": "pictures of which the crop cuts off more than a tenth: build_model --image_aspect_ratio pad or anyres",
    "identical": "pictures are another one under another name: leave the copies out",
    "similar": "pictures look like another: keep them on one side of held-out data, as --eval_fraction does",
    "in_eval_data": "records of --eval_data_path have pictures of the data, or that look like one: leave them out",
    "different_answers": "questions about one picture have several answers: keep one, or ask for what differs",
    "cut_answers": "answers end in the middle of a sentence: complete them, or the model learns to stop there",
}


def digest(*values: Any) -> int:
    """Eight bytes that stand for some values."""
    return int.from_bytes(blake2b(repr(values).encode(), digest_size=8).digest())


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter, such as Latin, Han or Cyrillic; None if it is no letter."""
    first = name(character, "").split(" ")[0] if character.isalpha() else ""
    return SCRIPTS.get(first, first.capitalize()) or None


def ending(answer: str) -> str:
    """How an answer ends: "cut" at a comma or an open bracket, "open" if it is long and ends with a letter."""
    last = answer.rstrip()[-1:]
    if last in [*",;，、；—"] or category(last or " ") in ("Ps", "Pi"):
        return "cut"
    return "short" if len(answer.encode()) <= LONG else "open" if last.isalnum() else "closed"


def facts_of(number: int, row: Row, item: dict[str, Any], image_dir: PurePath | None) -> dict[str, list]:
    """What `find` needs of the good record with this number: its row, its item, and the folder of its pictures."""
    facts: dict[str, list] = {"good": [number], "looks": list(map(look_of, item["images"]))}
    # Pictures: digests of their names and pixels
    sources = image_sources(row, image_dir) if item["images"] else []
    facts["sizes"] = [picture_size(*source) for source in sources]
    both = zip(item["images"], facts["looks"], strict=True)
    pixels = [digest(look, image.size, crc32(image.tobytes())) for image, look in both]
    names = [digest(str(image_dir), name) for name in row["images"]] or pixels
    facts["pictures"] = [(number, *picture) for picture in zip(names, pixels, strict=False)]
    # Questions with their answers, and the script of most letters
    seen = pixels or row["images"]
    texts = [text_of(message).replace(IMAGE_TOKEN, "").strip() for message in item["messages"]]
    learnt = [i for i, one in enumerate(item["messages"]) if one["role"] == "assistant" and one.get("train", True)]
    facts["endings"] = [(number, ending(texts[i])) for i in learnt]
    facts["questions"] = [(number, digest(seen, texts[i - 1]), digest(texts[i])) for i in learnt if seen and i]
    letters = Counter(map(script_of, "".join(texts)[:500]))
    del letters[None]
    facts["scripts"] = [script for script, _ in letters.most_common(1)]
    return facts


def find(facts: dict[str, list], held_out: dict[str, list], chat: Chat | None) -> dict[str, tuple[int, list[int]]]:
    """How many records, pictures or answers each of the `FINDINGS` concerns, and the numbers of their records."""
    found: dict[str, tuple[int, list[int]]] = {}
    rows = np.array(facts["pictures"] + held_out["pictures"], np.uint64).reshape(-1, 3)
    pictures = rows[: len(facts["pictures"])]
    # Cropped: measured once for all pictures of the same shape
    if chat is not None and len(pictures):
        sizes = np.array(facts["sizes"])
        percent = np.rint(100 * sizes / sizes.min(axis=1, keepdims=True)).astype(int)
        shapes, shape = np.unique(percent, axis=0, return_inverse=True)
        left, top, right, bottom = np.clip([chat.seen_part(tuple(one)) for one in shapes.tolist()], 0, 1).T
        cropped = pictures[(1 - (right - left) * (bottom - top) > LOST)[shape.ravel()], 0]
        found["cropped"] = len(cropped), cropped.tolist()
    # Identical: files whose pixels another file has. Similar: other pixels that look alike
    looks = facts["looks"] + held_out["looks"]
    _, first, pixels = np.unique(rows[:, 2], return_index=True, return_inverse=True)
    group = look_alike(b"".join(looks[i] for i in first))
    _, files = np.unique(pictures[:, 1], return_index=True)
    files.sort()
    copies = np.delete(files, np.unique(pixels[files], return_index=True)[1])
    found["identical"] = len(copies), pictures[copies, 0].tolist()
    known = np.unique(pixels[: len(pictures)])
    similar = known[np.bincount(group[known], minlength=1)[group[known]] > 1]
    found["similar"] = len(similar), rows[first[similar], 0].tolist()
    shared = rows[len(pictures) :, 0][np.isin(group[pixels[len(pictures) :]], group[known])]
    found["in_eval_data"] = len(np.unique(shared)), []
    # Questions with several answers
    questions = np.array(facts["questions"], np.uint64).reshape(-1, 3)
    keys, counts = np.unique(np.unique(questions[:, 1:], axis=0)[:, 0], return_counts=True)
    several = questions[np.isin(questions[:, 1], keys[counts > 1]), 0]
    found["different_answers"] = int((counts > 1).sum()), several.tolist()
    # Long answers without a full stop count where most have one
    ends = Counter(end for _, end in facts["endings"])
    unfinished = ("cut", "open") if ends["open"] < ends["closed"] else ("cut",)
    cut = [number for number, end in facts["endings"] if end in unfinished]
    return found | {"cut_answers": (len(cut), cut)}
