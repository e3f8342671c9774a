"""Reads raw records from files, a few at a time: JSON, JSON Lines, CSV, Parquet, and WebDataset shards.

`--data_path` is one of these:

| data path | a record | its images |
|---|---|---|
| a folder with `chat.json`, or a `.json` file, as LLaVA's | an object of the list | files in `image_dir` |
| a `.jsonl` or `.csv` file, or a folder with such a `metadata` file | a line | files in `image_dir` |
| a `.parquet` file, or a folder of them | a row | bytes in `image`, `images` or `image_bytes` |
| a `.tar` file, or a folder of them (WebDataset) | the files of one key | its files beside `.json`, `.txt` |
| `owner/name` or `owner/name:config:split` | a record of that data set on the hub, see `hub` | as above |

Without `image_dir`, images are looked for in `images_dl/`, `images/` or `images.zip` beside the records, then
in the records' own folder. A record that cannot be read comes as a `BadRecordError`, and reading goes on.
"""

import csv
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from train_llava.dataset import archives
from train_llava.dataset.hub import HUB_ID, IMAGE_PLACES, METADATA, find_on_hub, opened, rows_on_hub

BATCH_BYTES = 64 << 20  # of Parquet rows in memory at once, as they may hold images
ID_KEYS = ("id", "question_id", "questionId", "image_id")
PART_KEYS = ("image", "image_url", "url", "path")  # where a part of a message names its image
SPLITS = {"train", "val", "valid", "validation", "dev", "test"}  # first words of published files
Record = dict[str, Any]


class BadRecordError(ValueError):
    """A record that cannot be used: its id, and the reason."""

    def __str__(self) -> str:
        return f"record {self.args[0]!r}: {self.args[1]}" if len(self.args) == 2 else self.args[0]


def id_of(record: Record) -> Any:
    """The id of a record or question; None where it has none."""
    return next((record[key] for key in ID_KEYS if record.get(key) is not None), None)


def images_of(record: Record) -> list[Any]:
    """The images of a record, in order: names, bytes, or `{"bytes", "path"}` as `datasets` stores them.

    They are under `images`, `image`, `image_bytes` or a key that ends in `file_name`, or inside the messages.
    """
    name_keys = [key for key in record if str(key).endswith(("file_name", "file_names"))]
    for key in ("images", "image", "image_bytes", *name_keys):
        value = record.get(key) or []
        images = [image for image in value if image] if isinstance(value, list) else [value]
        if images:
            return images

    # Inside the messages: a part may name its image in several ways, and may nest it under `url`
    images = []
    for key in ("messages", "conversations", "prompt"):
        for turn in _dicts(record.get(key)):
            for part in _dicts(turn.get("content")):
                values = [part[key] for key in PART_KEYS if part.get(key)]
                if values and part.get("type") != "text":
                    value = values[0]
                    images.append(value.get("url", value) if isinstance(value, dict) else value)
    return images


def _dicts(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; none where the value is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def texts_of(value: Any) -> list[str]:
    """The texts of a list, of VQA's objects with `answer`, or of a single text or number."""
    if isinstance(value, dict):
        return texts_of(value.get("answer"))
    if isinstance(value, list):
        return list(chain.from_iterable(map(texts_of, value)))
    return [str(value).strip()] if isinstance(value, (str, int, float)) else []


def answers_of(record: Record) -> list[str]:
    """The answers that several people gave to a record's question."""
    answer = record.get("answer")
    return texts_of(record.get("answers")) or texts_of(answer if isinstance(answer, list) else None)


def parse_json(data: bytes | mmap.mmap, name: str, kind: type = Any) -> Any:
    """JSON in UTF-8 as Python objects; `list[msgspec.Raw]` leaves the members of a list unparsed.

    Raises:
        ValueError: it is not JSON, or not in UTF-8; the message begins with `name`.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError):
        pass  # Python's parser, several times slower, also takes NaN, lone surrogates and a byte order mark
    try:
        return json.loads(str(bytes(data), "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not in UTF-8: save it anew with this encoding") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def read_json(path: Path) -> Iterator[Any]:
    """The objects of a JSON list, parsed one by one: as Python objects, half a million take a gigabyte."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    try:
        records = parse_json(data, str(path), list[msgspec.Raw])
    except ValueError:
        if data[:1] != b"{":
            raise
        yield from read_jsonl(path)  # some publish lines with the extension .json
        return
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a list of records")
    for record in records:
        yield parse_json(record, str(path)) if isinstance(record, msgspec.Raw) else record


def read_jsonl(path: PurePath) -> Iterator[Any]:
    """The objects of a file with one on each line; only line feeds end a line."""
    with opened(path, "r", encoding="utf-8-sig", newline="\n") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield parse_json(line.encode(), f"{path}, line {number},")
                    except ValueError as error:
                        yield BadRecordError(f"line {number}", str(error))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not in UTF-8: save it anew with this encoding") from error


def read_csv(path: PurePath) -> Iterator[Record]:
    """The rows of a CSV file with a header; an empty cell is absent."""
    with opened(path, "r", encoding="utf-8-sig", newline="") as file:
        try:
            for row in csv.DictReader(file):
                yield {name: cell for name, cell in row.items() if cell}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def read_parquet(path: PurePath) -> Iterator[Record]:
    """The rows of a Parquet file, at most `BATCH_BYTES` at a time, because they may hold images."""
    try:
        source = path if isinstance(path, Path) else opened(path)
        file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)  # pre-buffered bytes stay in memory
        # As many rows at a time as the largest ones allow
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        for batch in file.iter_batches(min(1 + BATCH_BYTES // (row_bytes + 1), 32)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_tar(path: PurePath) -> Iterator[Record | BadRecordError]:
    """The samples of a WebDataset shard: files that follow each other and share a name up to its first dot.

    Images come in the order of the sample's `.json`, which names them by file name or by extension. Without it,
    they come in the order of the numbers in their file names.
    """
    try:
        archive = tarfile.open(fileobj=opened(path), mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar archive: {error}") from error
    with archive.fileobj, archive:
        for key, members in groupby(archives.tar_members(archive), lambda member: _split(member.name)[0]):
            try:
                yield {"id": key} | _sample(path, archive, list(members))
            except (OSError, ValueError, tarfile.TarError) as error:
                yield BadRecordError(key, f"{path.name}: {error}")


def _sample(path: PurePath, archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Record:
    """A sample of a shard as a record. Its images are `ArchiveMember`s, or bytes where the shard is on the hub."""
    if members[-1].size < 0:
        raise ValueError(f"the archive is broken in {members[-1].name}, and what follows is lost")
    record: Record = {}
    files: dict[str, archives.ArchiveMember | bytes] = {}  # by file name, and by extension
    images = []
    for member in sorted(members, key=lambda member: _by_number(member.name)):
        extension = _split(member.name)[1]
        if extension == "json":
            fields = parse_json(archive.extractfile(member).read(), member.name)
            if not isinstance(fields, dict):
                raise ValueError(f"{member.name} is not an object")
            record |= {name: value for name, value in fields.items() if value is not None}
        elif extension == "txt":
            try:
                text = archive.extractfile(member).read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{member.name} is not in UTF-8") from error
            record["caption"] = text.rstrip("\r\n")  # the file's own last line break
        else:
            file = archives.ArchiveMember(os.path.abspath(path), member.name, member.offset_data, member.size)
            if member.issparse() or not isinstance(path, Path):  # not stored as it is, or not on this disk
                file = archive.extractfile(member).read()
            files |= {os.path.basename(member.name).lower(): file, extension: file}
            if archives.is_image(member.name):
                images.append(file)

    # The names that the record gives decide, if any of them is a file of the sample
    names = images_of(record)
    matches = [files.get(os.path.basename(archives.normal_path(str(name))).lower()) for name in names]
    if any(matches):
        if None in matches:
            raise ValueError(f"{names[matches.index(None)]} is not in the sample")
        record["images"] = matches
    elif images:
        record["images"] = images
    return record


def _by_number(name: str) -> list[str | int]:
    """A key that sorts 2 before 10: `a10.png` → `["a", 10, ".png"]`."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _split(name: str) -> tuple[str, str]:
    """A member's key and its extension, from the first dot on: `a/b.left.PNG` → `("a/b", "left.png")`."""
    folder, name = os.path.split(name)
    key, _, extension = name.partition(".")
    return os.path.join(folder, key), extension.lower()


READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet, ".tar": read_tar}


def raw_records(data_path: str, files: list[PurePath]) -> Iterator[Any]:
    """The records of files, or of a data set on the hub (see `find_on_hub`); a good record is a dict."""
    for file in files:
        read = READERS.get(file.suffix.lower())
        yield from read(file) if read else rows_on_hub(data_path, file)


def find_records(
    data_path: str, image_dir: str | None = None, streaming: bool = False
) -> tuple[list[PurePath], PurePath | None]:
    """The files of records at `data_path`, and the folder or archive of their images; see also `find_on_hub`.

    Raises:
        FileNotFoundError: one of them does not exist; the message says where it was looked for.
    """
    images = Path(image_dir) if image_dir else None
    if images is not None and not (images.is_dir() or (images.is_file() and archives.is_archive(images))):
        raise FileNotFoundError(f"--image_dir {image_dir} does not exist as a folder or a .zip file")
    path = Path(data_path)
    if not path.exists():  # it may be a data set on the hub
        if HUB_ID.fullmatch(data_path) and path.suffix.lower() not in READERS:
            files, images_on_hub = find_on_hub(data_path, READERS, images is None, streaming)
            return files, images or images_on_hub
        raise FileNotFoundError(f"--data_path {data_path} does not exist")
    files = _files_of_folder(path) if path.is_dir() else [path]
    if files[0].suffix.lower() not in READERS:
        raise FileNotFoundError(f"--data_path {data_path} is none of {', '.join(READERS)}")

    # Images are beside the records; the hub's metadata files name them from their own folder
    places = [] if files[0].name in METADATA else [files[0].parent / name for name in IMAGE_PLACES]
    return files, images or next((place for place in places if place.exists()), files[0].parent)


def _files_of_folder(folder: Path) -> list[Path]:
    """The files of records in a folder: `chat.json`, else Parquet files, else shards, else the metadata."""
    if (folder / "chat.json").exists():
        return [folder / "chat.json"]
    # All files of one kind: the first kind that the folder has
    entries = sorted(entry for entry in folder.iterdir() if not archives.is_hidden(entry.name))
    files = [entry for entry in entries if entry.suffix.lower() == ".parquet"]
    files = files or [entry for entry in entries if entry.suffix.lower() == ".tar"]
    files = files or [entry for entry in entries if entry.name in METADATA]
    if not files:
        raise FileNotFoundError(f"--data_path {folder} holds no chat.json, and no .parquet or .tar files")
    # A test split is not trained on by mistake
    splits = {re.split("[^a-z]", file.name.lower())[0] for file in files} & SPLITS
    if len(splits) > 1:
        raise FileNotFoundError(
            f"--data_path {folder} has files of {' and '.join(sorted(splits))} side by side: "
            "name the files that are meant, or put them into a folder of their own"
        )
    return files
