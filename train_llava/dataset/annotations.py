"""Reads `.json` files: lists of records, and the annotations of COCO and of VQA v2."""

import mmap
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from msgspec import Raw, defstruct, json

from train_llava.dataset.readers import Record, parse_json, read_jsonl

LABELS_QUESTION = "What is in this picture?"
# What is read of annotations: other fields are skipped, such as the outlines of objects
FIELDS = ("id", "file_name", "name", "image_id", "question_id", "question", "caption", "category_id")
Entry = defstruct("Entry", [*((name, Any, None) for name in FIELDS), ("answers", Raw, Raw(b"[]"))])
LISTS = ("images", "categories", "annotations", "questions")
Annotations = defstruct("Annotations", [*((name, list[Entry], []) for name in LISTS), ("data_subtype", Any, None)])


def load_json(path: Path) -> Any:
    """The content of a `.json` file: `Annotations`, or records, which are not yet parsed if they are in a list."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    try:
        content = parse_json(data, str(path), list[Raw] | Annotations)
        if isinstance(content, dict):  # of Python's parser, which takes NaN and a byte order mark
            content = json.decode(json.encode(content), type=Annotations)
    except ValueError:
        if data[:9].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] != b"{":
            raise
        return read_jsonl(path)  # some publish lines with the extension .json
    if content == Annotations() or not isinstance(content, list | Annotations):
        raise ValueError(f"{path} is not a list of records")
    return content


def read_json(path: Path) -> Iterator[Any]:
    """The records of a `.json` file, parsed one by one: as Python objects, half a million take a gigabyte."""
    content = load_json(path)
    if isinstance(content, Annotations):
        yield from _read_coco(content) if content.images else _read_vqa(path, content)
    else:
        yield from (parse_json(record, str(path)) if isinstance(record, Raw) else record for record in content)


def _read_coco(content: Any) -> Iterator[Record]:
    """A record for each picture: its captions, or else the names of its objects' categories."""
    categories, by_picture = {str(entry.id): entry.name for entry in content.categories}, defaultdict(list)
    for note in content.annotations:
        by_picture[str(note.image_id)].append(note)
    for picture in content.images:
        notes, record = by_picture[str(picture.id)], {"id": picture.id, "image": picture.file_name}
        if captions := [note.caption.strip() for note in notes if note.caption is not None]:
            yield record | {"caption": captions}
        else:
            labels = dict.fromkeys(categories.get(str(note.category_id)) for note in notes)
            yield record | {"question": LABELS_QUESTION, "answer": ", ".join(filter(None, labels))}


def companion(file: PurePath) -> Path | None:
    """The file that belongs to one of records: VQA's annotations beside its questions, the text beside a picture."""
    annotations = re.sub("(OpenEnded|MultipleChoice)_", "", file.name).replace("questions", "annotations")
    names = [annotations] if file.suffix == ".json" else [f"{file.stem}.txt", f"{file.stem}.TXT"]
    paths = [file.with_name(name) for name in names if isinstance(file, Path) and name != file.name]
    return next(filter(Path.is_file, paths), None)


def _read_vqa(path: Path, content: Any) -> Iterator[Record]:
    """A record for each question, with the answers of all people. Pictures have the names of COCO 2014."""
    annotations = companion(path)
    if annotations is None or not content.questions:
        raise ValueError(f"{path} is not VQA's file of questions, with its file of annotations beside it")
    notes = {note.question_id: note for note in load_json(annotations).annotations}
    for question in content.questions:
        image = f"COCO_{content.data_subtype}_{int(question.image_id):012}.jpg"
        answers = json.decode(notes.get(question.question_id, Entry()).answers)
        yield {"id": question.question_id, "image": image, "question": question.question, "answers": answers}
