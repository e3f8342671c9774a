"""Writes the records of a data set into one table on disk, opens it, and opens the images of a row."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import datasets
import msgspec
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from train_llava.chat import Chat
from train_llava.common.files import written_whole
from train_llava.dataset.annotations import companion
from train_llava.dataset.archives import Members, data_uri, is_archive, label, locate_image, read_image, zip_members
from train_llava.dataset.boxes import TAG, place_objects, write_places
from train_llava.dataset.images import open_image, picture_size, stored_geometry
from train_llava.dataset.readers import BadRecordError, answers_of, id_of, images_of, texts_of
from train_llava.dataset.sources import find_records, raw_records
from train_llava.records import to_messages

CACHE_VERSION = 14  # of the rules in records.py and here: raise it to have every data set read again
TEXT, TEXTS = datasets.Value("string"), datasets.List(datasets.Value("string"))
FEATURES = datasets.Features(
    id=TEXT,
    messages=TEXT,  # JSON
    images=TEXTS,  # where each image is: see `read_image`
    image_bytes=datasets.List(datasets.Value("binary")),  # or the images themselves, if none is named
    language=TEXT,
    answers=TEXTS,
    references=TEXTS,
    kinds=TEXTS,  # of its questions
    choices=TEXTS,  # of its last question
    objects=TEXT,  # JSON: those of the `<box>` and `<point>` tags, or without tags all of them
    error=TEXT,  # why the record cannot be used
)
Row = dict[str, Any]  # a value for each of these
EMPTY_ROW: Row = dict.fromkeys(FEATURES) | {"messages": "[]", "images": [], "image_bytes": []}
BATCH_BYTES = 64 << 20  # of images that are written at once: Arrow counts the bytes of a batch in 31 bits


def load_records(data_path: str, image_dir: str | None = None) -> tuple[datasets.Dataset, PurePath | None]:
    """The records of a data set as a table, and the folder or archive of its images.

    The table is a file in the cache folder of `datasets`, mapped into memory. It is written when the data set is
    opened for the first time, or has changed. A record that cannot be used has its reason under `error`.

    Raises:
        OSError, ValueError: the data does not exist, or is in no format; the message names it.
    """
    files, images = find_records(data_path, image_dir)
    # The name of the table depends on the files, and on the folders from which images are named and in which they lie
    key = [CACHE_VERSION, data_path, str(images.absolute() if isinstance(images, Path) else images)]
    beside = [*filter(None, map(companion, files)), *([images] if is_archive(images) else [])]
    for file in files + beside:
        if isinstance(file, Path):
            key += [str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns]
        else:  # on the hub; its path names the commit
            key += [data_path, str(file)]
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava" / name
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # one rank writes, the others wait for it
        if not cache.exists():
            rows = tqdm(table_rows(data_path, files, images), desc=f"reading {data_path}", unit=" records")
            remedy = "make room on its disk, or set HF_DATASETS_CACHE to a folder on another one"
            with written_whole(str(cache), remedy) as folder:
                _write_table(rows, folder / "records.arrow")
    return datasets.Dataset.from_file(str(cache / "records.arrow")), images


def table_rows(data_path: str, files: list[PurePath], image_dir: PurePath | None) -> Iterator[Row]:
    """Every record of a data set as a row of the table."""
    members = zip_members(image_dir) if is_archive(image_dir) else None
    for number, record in enumerate(raw_records(data_path, files)):
        yield table_row(record, number, image_dir, members)


def table_row(record: Any, number: int, image_dir: Path | None = None, members: Members | None = None) -> Row:
    """A record as a row of the table, with `number` as its id if it has none. `error` says why it is unusable."""
    if isinstance(record, BadRecordError):
        record_id, reason = record.args
        return EMPTY_ROW | {"id": _printable(record_id), "error": _printable(reason)}
    row = EMPTY_ROW | {"id": str(number)}
    try:
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
        if (record_id := id_of(record)) is not None:
            row["id"] = _printable(record_id)
        messages = to_messages(record)
        objects = place_objects(messages, record, len(images_of(record)))
        images = [locate_image(image, image_dir, members) for image in images_of(record)]
        language = record["language"] if isinstance(record.get("language"), str) else None
        captions = record["caption"] if isinstance(record.get("caption"), list) else None
        answers, references = answers_of(record), texts_of(record.get("references")) or texts_of(captions)
        kinds, choices = (texts_of(record.get(key)) for key in ("kinds", "choices"))
        # If one image has a name, all get one, which keeps their order: bytes become data URIs
        names = [image for image in images if isinstance(image, str)]
        if names and len(names) < len(images):
            names = [image if isinstance(image, str) else data_uri(image) for image in images]
        # Half a surrogate pair in any text is an error, as which a text file's bytes outside UTF-8 come
        "".join([*names, *answers, *references, *kinds, *choices, language or ""]).encode()
        row["messages"] = msgspec.json.encode(messages).decode()
        row["objects"] = msgspec.json.encode(objects).decode() if objects else None
        row["images"], row["image_bytes"] = names, [] if names else images
        row["language"], row["answers"], row["references"] = language, answers, references
        row["kinds"], row["choices"] = kinds, choices
    except UnicodeEncodeError:
        row["error"] = "it is not in UTF-8 (save it anew with this encoding), or holds half of a surrogate pair"
    except ValueError as error:
        row["error"] = _printable(error)
    return row


def _printable(value: Any) -> str:
    """A value as a text that can be written in UTF-8."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _write_table(rows: Iterable[Row], path: Path) -> None:
    """Writes rows in batches of at most 256, and of little more than `BATCH_BYTES`."""
    batch, size, schema = [], 0, FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            size += sum(map(len, row["image_bytes"] or row["images"]))
            if len(batch) == 256 or size > BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def image_sources(row: Row, image_dir: Path | None) -> list[tuple[Path | bytes, str]]:
    """Where each image of a row is, or its bytes, with the name for errors: what `open_image` takes."""
    sources = [(read_image(image_dir, name), label(name)) for name in row["images"]]
    return sources + [(content, f"picture {i}") for i, content in enumerate(row["image_bytes"])]


def to_item(row: Row, image_dir: Path | None, chat: Chat | None = None, decode: bool = True) -> dict[str, Any]:
    """A row of the table as an item of `LlavaDataset`. Without `decode`, images are at most measured.

    Raises:
        BadRecordError: the record or one of its images cannot be used.
    """
    # Only as much of the images as is needed: nothing, their sizes, or their pixels
    images, sizes, messages = [], [], json.loads(row["messages"])
    objects = json.loads(row["objects"] or "[]") if TAG.search(row["messages"]) else []  # others are not learnt
    try:
        if row["error"] is not None:
            raise ValueError(row["error"])
        if decode or (chat is not None and (objects or chat.anyres)):
            sources = image_sources(row, image_dir)
            min_side = None if chat is None else chat.min_side
            images = [open_image(source, name, min_side) for source, name in sources if decode]
            sizes = [image.size for image in images] or [picture_size(*source) for source in sources]
            if objects and chat is not None:
                write_places(messages, objects, [stored_geometry(*source) for source in sources], chat)
                objects = []
    except (OSError, ValueError) as error:
        raise BadRecordError(row["id"], str(error)) from error
    fields = {key: row[key] for key in ("id", "language", "answers", "references", "kinds", "choices")}
    return fields | {"messages": messages, "objects": objects, "images": images, "image_sizes": sizes}
