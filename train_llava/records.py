"""Every data format people have, read into one table of records on disk, and the pictures the records name.

What `--data_path` names, and what one record of it and its pictures are:

- a folder with `chat.json`, or a `.json` file: an object of the list; files in `image_dir`. LLaVA's pretrain 595K and
  558K and `llava_v1_5_mix665k.json` are such files
- a `.jsonl` file: a line; files in `image_dir`
- a `.parquet` file, or a folder of them: a row; bytes in the columns `image` or `images`
- a `.tar` file, or a folder of them (WebDataset): the files of one key, `.json`, or `.txt` with a caption; its others
- anything else of the form `owner/name`: a row of that data set on the hub, split `train`; `image` or `images`

`image_dir` is, where it is not given, `images_dl/`, `images/` or an unextracted `images.zip` beside the records, or
the records' own folder.

A record says what was said in one of three ways, and may name its `language` and, for evaluation, `answers`: what
several people said to its last question:

- `conversations`: `[{"from": "human" | "gpt" | "system", "value": "<image>\\nWhat is this?"}, …]`, as LLaVA
- `messages`: `[{"role": "user" | "assistant" | "system", "content": …}, …]`, as OpenAI and TRL; `content` is a text
  with `<image>` tags, or a list of `{"type": "image"}` and `{"type": "text", "text": …}`
- `caption`: a text, for one picture

and names its pictures under `image` or `images`, one or a list, in the order of their tags.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from train_llava.cli import written_whole
from train_llava.pictures import is_archive, zip_members

IMAGE_TOKEN = "<image>"
CAPTION_QUESTION = f"{IMAGE_TOKEN}\nDescribe this picture."
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
ROLES = ("user", "assistant", "system")
LARGE = 64 << 20  # bytes
LAYOUT = 3  # of the table below; another number makes every data set be read anew

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": datasets.Value("string"),  # JSON
        "images": datasets.List(datasets.Value("string")),  # where each picture is: see `read_picture`
        "image_bytes": datasets.List(datasets.Value("binary")),  # or the picture itself
        "language": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "length": datasets.Value("int32"),  # of the texts in bytes, to group conversations of like length
        "fault": datasets.Value("string"),  # why the record cannot be used
    }
)
Record = dict[str, Any]


class BadRecordError(ValueError):
    """A record that cannot be used: its id, and the reason."""

    def __str__(self) -> str:
        return f"record {self.args[0]!r}: {self.args[1]}" if len(self.args) == 2 else self.args[0]


def to_messages(record: Record) -> list[dict[str, Any]]:
    """A record's turns as chat messages, each a list of parts: pictures, and the texts around `<image>` tags.

    White space around a part is dropped here, and the chat template writes one line break between parts, so a picture
    and its text look the same in training as in any later use.

    Raises:
        ValueError: the conversation is malformed; the message is the reason.
    """
    if "conversations" in record:
        turns = [
            {"role": LLAVA_ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
            for turn in _list_of_dicts(record["conversations"], "conversations")
        ]
    elif "messages" in record:
        turns = _list_of_dicts(record["messages"], "messages")
    elif "caption" in record:
        turns = [
            {"role": "user", "content": CAPTION_QUESTION},
            {"role": "assistant", "content": record["caption"]},
        ]
    else:
        raise ValueError("it has no conversations, no messages and no caption")
    messages = [{"role": turn.get("role"), "content": _parts(turn)} for turn in turns]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("questions and answers do not take turns, a question first and an answer last")
    tags = sum(part["type"] == "image" for message in messages for part in message["content"])
    if tags != len(pictures_of(record)):
        raise ValueError(f"{tags} {IMAGE_TOKEN} tags for {len(pictures_of(record))} pictures")
    return messages


def _list_of_dicts(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"it has no {name}")
    return value


def _parts(turn: dict[str, Any]) -> list[dict[str, str]]:
    """One turn's content as parts."""
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"a turn of role {role} has no text")
    found: list[dict[str, str]] = []
    for part in parts:
        if part.get("type") != "text":
            found.append({"type": "image"})
            continue
        if not isinstance(part.get("text"), str):
            raise ValueError(f"a turn of role {role} has no text")
        if any("\ud800" <= c <= "\udfff" for c in part["text"]):
            raise ValueError(f"the text of a turn of role {role} is not Unicode")
        for i, piece in enumerate(part["text"].split(IMAGE_TOKEN)):
            if i > 0:
                found.append({"type": "image"})
            if piece.strip():
                found.append({"type": "text", "text": piece.strip()})
    if role != "user" and any(part["type"] == "image" for part in found):
        raise ValueError(f"{IMAGE_TOKEN} in a turn of role {role}")
    if not found:
        raise ValueError(f"a turn of role {role} has no text")
    return found


def text_of(message: dict[str, Any]) -> str:
    """A message as the chat template writes it: its parts in order, one a line, `<image>` for a picture."""
    return "\n".join(part.get("text", IMAGE_TOKEN) for part in message["content"])


def pictures_of(record: Record) -> list[Any]:
    """The pictures a record names, in order: file names, bytes, or `{"bytes", "path"}` as `datasets` keeps them.

    They stand under `image` or `images`, or inside the `messages`.
    """
    named = record.get("images", record.get("image"))
    if named is None and isinstance(record.get("messages"), list):
        contents = [turn.get("content") for turn in record["messages"] if isinstance(turn, dict)]
        parts = [part for content in contents if isinstance(content, list) for part in content]
        return [
            part[key] for part in parts for key in ("image", "url", "path") if isinstance(part, dict) and key in part
        ]
    return [] if named is None else named if isinstance(named, list) else [named]


def find_records(data_path: str, image_dir: str | None = None) -> tuple[list[Path], Path | None]:
    """The files of records that `data_path` stands for, and the folder or archive of pictures; no files: a hub id.

    Raises:
        FileNotFoundError: one of them is not there; the message says what was looked for.
    """
    path = Path(data_path)
    if image_dir is not None and not Path(image_dir).exists():
        raise FileNotFoundError(f"--image_dir {image_dir} does not exist")
    if not path.exists():
        if data_path.count("/") == 1 and not data_path.startswith((".", "/")):
            return [], None
        raise FileNotFoundError(f"--data_path {data_path} does not exist")
    if path.is_dir():
        found = [path / "chat.json"] if (path / "chat.json").exists() else []
        found = found or sorted(path.glob("*.parquet")) or sorted(path.glob("*.tar"))
        if not found:
            raise FileNotFoundError(f"--data_path {data_path} holds no chat.json, and no .parquet or .tar files")
    else:
        found = [path]
    if found[0].suffix not in READERS:
        raise FileNotFoundError(f"--data_path {data_path} is none of {', '.join(READERS)}")
    beside = [found[0].parent / name for name in ("images_dl", "images", "images.zip")]
    return found, Path(image_dir) if image_dir else next((p for p in beside if p.exists()), found[0].parent)


def read_json(path: Path) -> Iterator[Record]:
    """The objects of a JSON list, one after the other: a list of half a million takes a gigabyte as a whole."""
    decoder = json.JSONDecoder()
    with open(path, encoding="utf-8-sig") as file:
        text, begun, ended = "", False, False
        while True:
            text = text.lstrip(" \t\r\n,")
            if not begun and text:
                if text[0] != "[":
                    raise ValueError(f"{path} is not a list of records")
                begun, text = True, text[1:]
                continue
            if begun and text.startswith("]"):
                return
            try:
                record, end = decoder.raw_decode(text)
                if end < len(text):  # or it may be a number that goes on in the next piece
                    yield record
                    text = text[end:]
                    continue
            except ValueError as error:
                if ended:
                    raise ValueError(f"{path} is not JSON: {error}") from error
            more = file.read(1 << 20)
            ended = not more
            text += more or " "


def read_jsonl(path: Path) -> Iterator[Record]:
    """The objects of a file with one on each line."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}, is not JSON: {error}") from error


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file, a few at a time: they may hold pictures."""
    for batch in pq.ParquetFile(path).iter_batches(batch_size=64):
        yield from batch.to_pylist()


def read_tar(path: Path) -> Iterator[Record]:
    """The samples of a WebDataset shard: files that follow each other and share a name up to its first dot.

    A picture is named by its place in the shard, so that it can be read without unpacking.
    """
    with tarfile.open(path) as archive:
        files = (member for member in archive if member.isfile())
        for key, members in groupby(files, lambda m: os.path.join(os.path.dirname(m.name), _split(m.name)[0])):
            record: Record = {"images": []}
            for member in sorted(members, key=lambda m: m.name):
                ending = _split(member.name)[1]
                if ending == "json":
                    record = json.load(archive.extractfile(member)) | {"images": record["images"]}
                elif ending == "txt":
                    record["caption"] = archive.extractfile(member).read().decode("utf-8")
                else:
                    record["images"].append(f"{path.name}:{member.offset_data}:{member.size}")
            yield {"id": key} | record


def _split(name: str) -> tuple[str, str]:
    key, _, ending = os.path.basename(name).partition(".")
    return key, ending.lower()


READERS = {".json": read_json, ".jsonl": read_jsonl, ".parquet": read_parquet, ".tar": read_tar}


def load_records(data_path: str, image_dir: str | None = None) -> tuple[datasets.Dataset, Path | None]:
    """The records of a data set, and the folder or archive of its pictures, if it has one.

    The records are a table (see `FEATURES`) mapped from a file in the cache folder of `datasets`.

    The first opening reads everything, large files in a process of their own so that the memory they take is given
    back; it is repeated when a file changes. Records that cannot be used are in the table too, with their `fault`.

    Raises:
        OSError, ValueError: the data is not there or not in any format; the message names it.
    """
    files, pictures = find_records(data_path, image_dir)
    read = [*files, pictures] if is_archive(pictures) else files
    stamp = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in read]
    name = hashlib.sha256(repr((LAYOUT, data_path if not files else "", stamp)).encode()).hexdigest()[:24]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava" / name
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # one rank reads, the others wait for it
        if not cache.exists():
            if sum(file.stat().st_size for file in read) < LARGE:
                _write_table(data_path, files, pictures, cache)
            else:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    process.submit(_write_table, data_path, files, pictures, cache).result()
    return datasets.Dataset.from_file(str(cache / "records.arrow")), pictures


def _write_table(data_path: str, files: list[Path], pictures: Path | None, cache: Path) -> None:
    """Reads every record into `cache/records.arrow`."""
    schema = FEATURES.arrow_schema
    rows = iter(tqdm(table_rows(data_path, files, pictures), desc=f"reading {data_path}", unit=" records"))
    with (
        written_whole(str(cache)) as folder,
        pa.OSFile(str(folder / "records.arrow"), "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
    ):
        while batch := list(islice(rows, 256)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def table_rows(data_path: str, files: list[Path], pictures: Path | None) -> Iterator[dict[str, Any]]:
    """Every record as a row of the table."""
    members = zip_members(pictures) if is_archive(pictures) else None
    if files:
        records = (record for file in files for record in READERS[file.suffix](file))
    else:
        records = datasets.load_dataset(data_path, split="train", streaming=True).decode(False)
    for number, record in enumerate(records):
        yield table_row(record, number, members)


def table_row(record: Any, number: int, members: dict[str, str] | None) -> dict[str, Any]:
    """One record as a row of the table; what is wrong with it stands in `fault`."""
    row = dict.fromkeys(FEATURES) | {"id": str(number), "messages": "[]", "images": [], "image_bytes": [], "length": 0}
    if not isinstance(record, dict):
        return row | {"fault": "it is not an object"}
    row["id"] = str(record.get("id", number))
    row["language"] = record["language"] if isinstance(record.get("language"), str) else None
    answers = record.get("answers")
    row["answers"] = [answer for answer in answers if isinstance(answer, str)] if isinstance(answers, list) else []
    try:
        messages = to_messages(record)
        for picture in pictures_of(record):
            if isinstance(picture, dict):  # as `datasets` keeps one
                picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
            if isinstance(picture, bytes):
                row["image_bytes"].append(picture)
            elif not isinstance(picture, str):
                raise ValueError(f"a picture is named by {picture!r}")
            elif members is None:
                row["images"].append(picture)
            elif picture in members:
                row["images"].append(members[picture])
            else:
                raise ValueError(f"{picture} is not in the archive")
    except ValueError as error:
        return row | {"fault": str(error)}
    texts = [text_of(message) for message in messages]
    return row | {
        "messages": json.dumps(messages, ensure_ascii=False),
        "length": sum(map(len, map(str.encode, texts))),
    }
