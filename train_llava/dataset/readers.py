"""Reads raw records from a file, a few at a time: JSON, JSON Lines, tables, Parquet, Arrow, and WebDataset shards.

A record that cannot be read comes as a `BadRecordError`, and reading goes on.
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
from train_llava.dataset.hub import opened

BATCH_BYTES = 64 << 20  # of Parquet rows in memory at once, as they may hold images
ID_KEYS = ("id", "question_id", "questionId", "questionid", "image_id")
PART_KEYS = ("image", "image_url", "url", "path")  # where a part of a message names its image
ERRORS = (pa.ArrowException, OSError)  # of parsers, without the file's name
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

    They are under `images`, `image`, `image_bytes` or a key as `file_name` or `image_path`, or inside the messages.
    """
    name_keys = [key for key in record if re.search("(file|image|img)_?(name|path|file)s?$", str(key))]
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
                value = next((part[key] for key in PART_KEYS if part.get(key)), None)
                if value is not None and part.get("type") != "text":
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


def read_jsonl(path: PurePath) -> Iterator[Any]:
    """The objects of a file with one on each line; only line feeds end a line."""
    with opened(path, "r", encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield parse_json(line.encode(), f"{path}, line {number},")
                except ValueError as error:
                    yield BadRecordError(f"line {number}", str(error))


def read_table(path: PurePath) -> Iterator[Record | BadRecordError]:
    """The rows of a CSV or TSV file; an empty cell is absent. The header, also in capitals, shows what ends a cell."""
    with opened(path, "r", encoding="utf-8-sig", newline="") as file:
        header = next(filter(str.strip, file), "").lower()
        mark = max("\t;,", key=header.count)
        rows = csv.DictReader(chain([header], file), delimiter=mark, skipinitialspace=True, strict=True)
        try:
            for row in rows:
                if any(row.pop(None, [])):
                    reason = f"more cells than the header: put a text with {mark!r} in it between double quotes"
                    yield BadRecordError(f"line {rows.line_num}", reason)
                elif any(row.values()):
                    yield {name.strip().replace(" ", "_"): cell for name, cell in row.items() if cell}
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.reader.line_num}, cannot be read: {error}") from error


def read_rows(path: PurePath) -> Iterator[Record]:
    """The rows of a Parquet file, or of an Arrow file of `datasets`, a few at a time, as they may hold images."""
    if path.suffix.lower() == ".arrow":
        stream = pa.ipc.open_stream(opened(path))
        batches = (batch.slice(start, 32) for batch in stream for start in range(0, len(batch), 32))
    else:
        source = path if isinstance(path, Path) else opened(path)
        file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)  # pre-buffered bytes stay in memory
        # As many rows at a time as the largest ones allow
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        batches = file.iter_batches(min(1 + BATCH_BYTES // (row_bytes + 1), 32))
    for batch in batches:
        yield from batch.to_pylist()


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
            text = archive.extractfile(member).read().decode("utf-8-sig", "surrogateescape")
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
