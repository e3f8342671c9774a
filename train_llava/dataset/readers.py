"""From files to raw records: JSON, JSON Lines, Parquet and WebDataset shards, each read a few records at a time.

What `--data_path` names, and what one record of it and its pictures are:

- a folder with `chat.json`, or a `.json` file: an object of the list; files in `image_dir`. LLaVA's pretrain 595K and
  558K and `llava_v1_5_mix665k.json` are such files
- a `.jsonl` or `.csv` file, or a folder with a `metadata.jsonl` or `metadata.csv`, as the hub's `imagefolder`: a line;
  files in `image_dir`
- a `.parquet` file, or a folder of them: a row; bytes in the columns `image`, `images` or `image_bytes`
- a `.tar` file, or a folder of them (WebDataset): the files of one key, `.json`, or `.txt` with a caption; its others
- anything else of the form `owner/name` or `owner/name:config:split`: that data set on the hub, of the split `train`
  where none is named: what its files are, as above, or a row as `datasets` reads it (see `hub`)

`image_dir` is, where it is not given, `images_dl/`, `images/` or an unextracted `images.zip` beside the records, or
the records' own folder.

A sample that cannot be read comes as a `BadRecordError` in place of a record, and reading goes on behind it.
"""

import csv
import json
import mmap
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePath
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from train_llava.dataset.archives import ArchiveMember, is_archive, is_picture, plain
from train_llava.dataset.hub import BESIDE, HUB_ID, METADATA, find_on_hub, opened, rows_on_hub

BATCH_BYTES = 64 << 20  # of rows that are held at once, as they may hold pictures
PART_KEYS = ("image", "image_url", "url", "path")  # where a part of a message names its picture
Record = dict[str, Any]


class BadRecordError(ValueError):
    """A record that cannot be used: its id, and the reason."""

    def __str__(self) -> str:
        return f"record {self.args[0]!r}: {self.args[1]}" if len(self.args) == 2 else self.args[0]


def pictures_of(record: Record) -> list[Any]:
    """The pictures a record names, in order: names, bytes, or `{"bytes", "path"}` as `datasets` keeps them.

    They stand under `images`, `image` or `image_bytes`, under what ends in `file_name`, or inside the `messages`.
    """
    named = [key for key in record if str(key).endswith(("file_name", "file_names"))]
    for key in ("images", "image", "image_bytes", *named):
        value = record.get(key) or []
        if pictures := [picture for picture in value if picture] if isinstance(value, list) else [value]:
            return pictures
    named = []
    for turns in (record.get(key) for key in ("messages", "conversations", "prompt")):
        for turn in turns if isinstance(turns, list) else []:
            content = turn.get("content") if isinstance(turn, dict) else None
            for part in content if isinstance(content, list) else []:
                values = [part[key] for key in PART_KEYS if part.get(key)] if isinstance(part, dict) else []
                if values and part.get("type") != "text":
                    named.append(values[0].get("url", values[0]) if isinstance(values[0], dict) else values[0])
    return named


def texts_of(value: Any) -> list[str]:
    """The texts of a list, of an object or objects with `answer`, as VQA has them, or of one text alone."""
    if isinstance(value, dict):
        return texts_of(value.get("answer"))
    if isinstance(value, list):
        return [text for part in value for text in texts_of(part)]
    return [str(value).strip()] if isinstance(value, (str, int, float)) else []


def parse_json(data: bytes | mmap.mmap, name: str, kind: type = Any) -> Any:
    """JSON in UTF-8 as Python objects, fast; `list[msgspec.Raw]` leaves the members of a list as they are written.

    Raises:
        ValueError: it is not JSON, or not in UTF-8; the message has its `name`.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (ValueError, RecursionError):
        pass  # what Python's own parser takes all the same: NaN, halves of surrogate pairs, a byte order mark
    try:
        return json.loads(str(bytes(data), "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not in UTF-8: save it anew with this encoding") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def read_json(path: Path) -> Iterator[Any]:
    """The objects of a JSON list, parsed one after the other: half a million take a gigabyte as Python objects."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    try:
        records = parse_json(data, str(path), list[msgspec.Raw])
    except ValueError:
        if data[:1] != b"{":
            raise
        yield from read_jsonl(path)  # lines under the other ending, as some publish them
        return
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a list of records")
    for record in records:
        yield parse_json(record, str(path)) if isinstance(record, msgspec.Raw) else record


def read_jsonl(path: PurePath) -> Iterator[Any]:
    """The objects of a file with one on each line; lines end at line feeds alone."""
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
    """The rows of a CSV file with a head; an empty cell is absent."""
    with opened(path, "r", encoding="utf-8-sig", newline="") as file:
        try:
            for row in csv.DictReader(file):
                yield {name: cell for name, cell in row.items() if cell}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as CSV in UTF-8: {error}") from error


def read_parquet(path: PurePath) -> Iterator[Record]:
    """The rows of a Parquet file, a few at a time: they may hold pictures."""
    try:
        source = path if isinstance(path, Path) else opened(path)
        file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)  # or it holds all that it has read
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
        for batch in file.iter_batches(min(1 + BATCH_BYTES // (row_bytes + 1), 32)):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def read_tar(path: PurePath) -> Iterator[Record | BadRecordError]:
    """The samples of a WebDataset shard: files that follow each other and share a name up to its first dot.

    A picture is named by its place in the shard, so that it can be read without unpacking. They come in the order in
    which the sample's `.json` names them, by file name or by what follows the key; otherwise in that of their numbers.
    """
    try:
        archive = tarfile.open(fileobj=opened(path), mode="r:")  # noqa: SIM115 - closed below
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar archive: {error}") from error
    with archive.fileobj, archive:
        for key, members in groupby(_members(archive), lambda member: _split(member.name)[0]):
            try:
                yield {"id": key} | _sample(path, archive, list(members))
            except (OSError, ValueError, tarfile.TarError) as error:
                yield BadRecordError(key, f"{path.name}: {error}")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an archive but hidden ones; of a broken one those before the damage, then one of size -1 that says
    where it is. A link to a file of the archive is that file under the link's name."""
    seen: dict[str, tarfile.TarInfo] = {}
    member, damage, whole = None, None, False
    try:
        for member in archive:
            name, target = plain(member.name), member
            seen.setdefault(name, member)
            for _ in range(9):  # a link may lead to a link
                if target is not None and (target.islnk() or target.issym()):
                    folder = os.path.dirname(plain(target.name)) if target.issym() else ""
                    where = plain(os.path.normpath(os.path.join(folder, target.linkname)))
                    if where not in seen and not whole:  # the target may come behind the link
                        seen, whole = {plain(other.name): other for other in archive.getmembers()}, True
                    target = seen.get(where)
            if target is not None and target.isfile() and not is_hidden(name):
                yield target.replace(name=name, deep=False)
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # neither a header nor the end
            damage = f"what follows {member.name}" if member else "its first bytes"
    except (tarfile.TarError, OSError):
        damage = member.name if member else "its first bytes"
    if damage is not None:
        broken = tarfile.TarInfo(damage)
        broken.size = -1
        yield broken


def is_hidden(name: str) -> bool:
    """Whether a file is no data: hidden, or among what macOS writes beside each file."""
    return os.path.basename(name).startswith(".") or "__MACOSX" in name.split("/")


def _sample(path: PurePath, archive: tarfile.TarFile, members: list[tarfile.TarInfo]) -> Record:
    """A sample of a shard as a record. Its images are `ArchiveMember`s, or bytes if the shard stays on the hub."""
    if members[-1].size < 0:
        raise ValueError(f"the archive is broken in {members[-1].name}, and what follows is lost")
    record: Record = {}
    places: dict[str, ArchiveMember | bytes] = {}
    pictures = []
    for member in sorted(members, key=lambda member: _by_number(member.name)):
        ending = _split(member.name)[1]
        if ending == "json":
            fields = parse_json(archive.extractfile(member).read(), member.name)
            if not isinstance(fields, dict):
                raise ValueError(f"{member.name} is not an object")
            record |= {name: value for name, value in fields.items() if value is not None}
        elif ending == "txt":
            try:
                text = archive.extractfile(member).read().decode("utf-8-sig")
                record["caption"] = text.rstrip("\r\n")  # the file's own last line break
            except UnicodeDecodeError as error:
                raise ValueError(f"{member.name} is not in UTF-8") from error
        else:
            place = ArchiveMember(os.path.abspath(path), member.name, member.offset_data, member.size)
            if member.issparse() or not isinstance(path, Path):  # its zeros are not stored; it stays on the hub
                place = archive.extractfile(member).read()
            places |= dict.fromkeys((os.path.basename(member.name).lower(), ending), place)
            pictures += [place] * is_picture(member.name)
    names = pictures_of(record)
    named = [places.get(os.path.basename(plain(str(name))).lower()) for name in names]
    if any(named) and None in named:
        raise ValueError(f"{names[named.index(None)]} is not in the sample")
    if any(named) or pictures:
        record["images"] = named if any(named) else pictures
    return record


def _by_number(name: str) -> list[str | int]:
    """A key that sorts 2 before 10."""
    return [int(piece) if i % 2 else piece for i, piece in enumerate(re.split(r"(\d+)", name))]


def _split(name: str) -> tuple[str, str]:
    """A member's key, its folder included, and what follows the first dot of its file name."""
    folder, name = os.path.split(name)
    key, _, ending = name.partition(".")
    return os.path.join(folder, key), ending.lower()


SPLITS = {"train", "val", "valid", "validation", "dev", "test"}  # as which files of a published data set begin
READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet, ".tar": read_tar}


def raw_records(data_path: str, files: list[PurePath]) -> Iterator[Any]:
    """What the files hold, or the data set on the hub that one stands for: dicts where all is well."""
    for file in files:
        read = READERS.get(file.suffix.lower())
        yield from read(file) if read else rows_on_hub(data_path, file)


def find_records(
    data_path: str, image_dir: str | None = None, streaming: bool = False
) -> tuple[list[PurePath], PurePath | None]:
    """The files of records that `data_path` stands for, and the folder or archive of pictures; see `find_on_hub`.

    Raises:
        FileNotFoundError: one of them is not there; the message says what was looked for.
    """
    path = Path(data_path)
    if image_dir is not None and not Path(image_dir).exists():
        raise FileNotFoundError(f"--image_dir {image_dir} does not exist")
    if image_dir is not None and not (Path(image_dir).is_dir() or is_archive(Path(image_dir))):
        raise FileNotFoundError(f"--image_dir {image_dir} is no folder and no .zip file")
    if not path.exists():
        if HUB_ID.fullmatch(data_path) and path.suffix.lower() not in READERS:
            files, pictures = find_on_hub(data_path, READERS, image_dir is None, streaming)
            return files, Path(image_dir) if image_dir else pictures
        raise FileNotFoundError(f"--data_path {data_path} does not exist")
    if path.is_dir():
        files = [path / "chat.json"] if (path / "chat.json").exists() else []
        there = sorted(file for file in path.iterdir() if not is_hidden(file.name))
        for ending in (".parquet", ".tar"):
            files = files or [file for file in there if file.suffix.lower() == ending]
        files = files or [file for file in there if file.name in METADATA]
        splits = {re.split("[^a-z]", file.name.lower())[0] for file in files} & SPLITS
        if len(splits) > 1:
            what = f"--data_path {data_path} has files of {' and '.join(sorted(splits))} side by side"
            raise FileNotFoundError(f"{what}: name the files that are meant, or put them into a folder of their own")
        if not files:
            raise FileNotFoundError(f"--data_path {data_path} holds no chat.json, and no .parquet or .tar files")
    else:
        files = [path]
    if files[0].suffix.lower() not in READERS:
        raise FileNotFoundError(f"--data_path {data_path} is none of {', '.join(READERS)}")
    beside = [files[0].parent / name for name in BESIDE if files[0].name not in METADATA]
    return files, Path(image_dir) if image_dir else next((p for p in beside if p.exists()), files[0].parent)
