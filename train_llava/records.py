"""Which shapes of record there are, and how each becomes chat messages and a row of one table on disk.

A record holds its conversation in the first of these that it has; null is absent:

- `conversations`: `[{"from": "human" | "gpt" | "system", "value": "<image>\\nWhat is this?"}, …]`, as LLaVA, with
  one tag for each picture; or the same as JSON in a text, or with `role` and `content`, as minimind-v
- `messages`: `[{"role": "user" | "assistant" | "system", "content": …}, …]`, as OpenAI and TRL; `content` is a text,
  or a list of `{"type": "image"}`, `{"type": "image_url", "image_url": …}` and `{"type": "text", "text": …}`
- `texts`: `[{"user": …, "assistant": …}, …]`, as FineVision and the Cauldron
- `prompt` and `completion`: two texts, or two lists of messages, as TRL
- `question` and `answer`: two texts; of `choices`, which follow the question, the answer may be the text, its number
  from 0 or its letter, as ScienceQA; without `answer`, the commonest of the `answers`, as VQAv2, TextVQA and DocVQA
- `caption`, or `text`: a text for one picture, or a list of them, of which the first is learnt

and names its pictures under `images`, `image`, `image_bytes` or `file_name`, one or a list, in the order of their
tags, or inside the messages: a file's name, the bytes, or a data URI. Where no tag is, but for `conversations`, the
pictures stand in front of the first question. A record may name its `language` and, for evaluation, `answers`: what
several people said to its last question, texts or VQA's objects of `answer`; and `references`: texts that are right
answers to it. It is called by the first of `id`, `question_id`, `questionId` and `image_id` that it has, or by its
number.
"""

import base64
import hashlib
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from string import ascii_uppercase
from typing import Any

import datasets
import msgspec
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from train_llava.common.files import written_whole
from train_llava.dataset.archives import ArchiveMember, is_archive, locate_picture, zip_members
from train_llava.dataset.readers import (
    BadRecordError,
    Record,
    find_records,
    parse_json,
    pictures_of,
    raw_records,
    texts_of,
)

IMAGE_TOKEN = "<image>"
CAPTION_QUESTION = f"{IMAGE_TOKEN}\nDescribe this picture."
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
UNSEEN = {"video", "videos", "audio", "audios"}  # what a record may hold that a LLaVA does not take in
ID_KEYS = ("id", "question_id", "questionId", "image_id")
BATCH_BYTES = 64 << 20  # of pictures that are written at once: Arrow counts a batch in 31 bits
CACHE_VERSION = 8  # of the table and of the rules below; another number makes every data set be read anew

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "messages": datasets.Value("string"),  # JSON
        "images": datasets.List(datasets.Value("string")),  # where each picture is: see `read_picture`
        "image_bytes": datasets.List(datasets.Value("binary")),  # or, where none is named, the pictures themselves
        "language": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "references": datasets.List(datasets.Value("string")),
        "fault": datasets.Value("string"),  # why the record cannot be used
    }
)
EMPTY_ROW = dict.fromkeys(FEATURES) | {"messages": "[]", "images": [], "image_bytes": []}


def _list_of_dicts(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = parse_json(value.encode(), f"the text of {name}")
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ValueError(f"it has no {name}")
    return value


def _pairs(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Questions and answers as turns."""
    return [turn for q, a in pairs for turn in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]


def _completion(prompt: Any, completion: Any) -> list[dict[str, Any]]:
    if isinstance(completion, list) or isinstance(prompt, list):
        return _list_of_dicts(prompt, "prompt") + _list_of_dicts(completion, "completion")
    return _pairs((prompt, completion))


def id_of(record: Record) -> Any:
    """What a record or a question is called; None where it has no name."""
    return next((record[key] for key in ID_KEYS if record.get(key) is not None), None)


def answers_of(record: Record) -> list[str]:
    """What several people said to a record's question."""
    return texts_of(record.get("answers")) or texts_of(
        record["answer"] if isinstance(record.get("answer"), list) else []
    )


def _visual_question(question: Any, record: Record) -> list[dict[str, Any]]:
    """A question with its answer; see above for which these may be."""
    answer, choices = record.get("answer"), record.get("choices") or record.get("options")
    if isinstance(choices, list):
        choices = texts_of(choices)
        parts = [*texts_of(record.get("hint") or None), str(question), *choices]
        question, answer = "\n".join(parts), str(answer).strip()
        if answer not in choices:
            number = int(answer) if answer.isdecimal() else ascii_uppercase.find(answer if len(answer) == 1 else "?")
            if not 0 <= number < len(choices):
                raise ValueError(f"its answer {reprlib.repr(answer)} is none of its {len(choices)} choices")
            answer = choices[number]
    elif not isinstance(answer, str) and (given := texts_of(answer) or answers_of(record)):
        answer = Counter(given).most_common(1)[0][0]
    return _pairs((question, answer))


# Each shape of record by the key that tells it, the first that a record has: from that key's value to the turns
RECORD_FORMATS: dict[str, Callable[[Any, Record], list[dict[str, Any]]]] = {
    "conversations": lambda turns, _: _list_of_dicts(turns, "conversations"),
    "messages": lambda turns, _: _list_of_dicts(turns, "messages"),
    "texts": lambda texts, _: _pairs(*((t.get("user"), t.get("assistant")) for t in _list_of_dicts(texts, "texts"))),
    "completion": lambda completion, record: _completion(record.get("prompt"), completion),
    "question": _visual_question,
    "caption": lambda text, _: _pairs((CAPTION_QUESTION, text[0] if isinstance(text, list) and text else text)),
    "text": lambda text, record: RECORD_FORMATS["caption"](text, record),
}


def to_messages(record: Record) -> list[dict[str, Any]]:
    """A record's turns as chat messages, each a list of parts: pictures, and the texts around `<image>` tags.

    Texts stay as they are, but for the line break on each side of a tag: the chat template writes one line break
    between parts, so a picture and its text look the same in training as in any later use. White space alone between
    two tags is no text.

    Raises:
        ValueError: the conversation is malformed; the message is the reason.
    """
    for key in UNSEEN & record.keys():
        if record[key]:
            raise ValueError(f"it has {key}, which the model cannot take in")
    shape = next((shape for shape in RECORD_FORMATS if record.get(shape) is not None), None)
    if shape is None:
        raise ValueError(f"it has no {', no '.join(RECORD_FORMATS)}")
    messages = [_message(turn) for turn in RECORD_FORMATS[shape](record[shape], record)]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("questions and answers do not take turns, a question first and an answer last")
    tags = sum(part["type"] == "image" for message in messages for part in message["content"])
    pictures = len(pictures_of(record))
    if tags == 0 and record.get("conversations") is None:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in range(pictures)] + first["content"]
    elif tags != pictures:
        raise ValueError(f"{tags} {IMAGE_TOKEN} tags for {pictures} pictures")
    return messages


def _message(turn: dict[str, Any]) -> dict[str, Any]:
    """One turn as a chat message, its content as parts."""
    name = turn.get("role") if turn.get("from") is None else turn["from"]
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    role = ROLES.get(str(name))
    if role is None:
        raise ValueError(f"unknown role {reprlib.repr(name)}")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"a turn of role {role} has no text")
    parts: list[dict[str, str]] = []
    for part in content:
        text = part.get("text")
        kind = part.get("type") or ("text" if part.keys() & {"text", "content"} else "image")
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"it has a part of type {reprlib.repr(kind)}, which the model cannot take in")
        text = text if kind == "text" else IMAGE_TOKEN
        if not isinstance(text, str):
            raise ValueError(f"a turn of role {role} has no text")
        if "<video>" in text or "<audio>" in text:
            raise ValueError("it has a <video> or <audio> tag, which the model cannot take in")
        for i, piece in enumerate(re.split(rf"(?:\r?\n)?{IMAGE_TOKEN}(?:\r?\n)?", text)):
            if i > 0:
                parts.append({"type": "image"})
            if piece.strip():
                parts.append({"type": "text", "text": piece})
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise ValueError(f"{IMAGE_TOKEN} in a turn of role {role}")
    if not parts:
        raise ValueError(f"a turn of role {role} has no text")
    return {"role": role, "content": parts}


def text_of(message: dict[str, Any]) -> str:
    """A message as the chat template writes it: its parts in order, one a line, `<image>` for a picture."""
    return "\n".join(part.get("text", IMAGE_TOKEN) for part in message["content"])


def load_records(data_path: str, image_dir: str | None = None) -> tuple[datasets.Dataset, PurePath | None]:
    """The records of a data set as a table, and the folder or archive of its pictures, if it has one.

    The table is mapped from a file in the cache folder of `datasets`. The first opening writes it, and the first after
    a file has changed. Records that cannot be used are in it too, with their `fault`.

    Raises:
        OSError, ValueError: the data is not there or not in any format; the message names it.
    """
    files, images = find_records(data_path, image_dir)
    read = [*files, images] if is_archive(images) else files
    stamp = [
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns)
        if isinstance(file, Path)
        else (data_path, str(file))  # on the hub, of one commit
        for file in read
    ]
    # by absolute names of pictures, a table is of its folder
    named = str(images.absolute() if isinstance(images, Path) else images)
    name = hashlib.sha256(repr((CACHE_VERSION, named, stamp)).encode()).hexdigest()[:24]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava" / name
    cache.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{cache}.lock"):  # one rank reads, the others wait for it
        if not cache.exists():
            rows = tqdm(table_rows(data_path, files, images), desc=f"reading {data_path}", unit=" records")
            remedy = "make room on its disk, or set HF_DATASETS_CACHE to a folder on another one"
            with written_whole(str(cache), remedy) as folder:
                _write_table(rows, folder / "records.arrow")
    return datasets.Dataset.from_file(str(cache / "records.arrow")), images


def _write_table(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes rows, in batches of at most 256 and of not too many bytes."""
    batch, size, schema = [], 0, FEATURES.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            batch.append(row)
            size += sum(map(len, row["image_bytes"] or row["images"]))
            if len(batch) == 256 or size > BATCH_BYTES:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch, size = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))


def table_rows(data_path: str, files: list[PurePath], image_dir: PurePath | None) -> Iterator[dict[str, Any]]:
    """Every record of a data set as a row of the table."""
    members = zip_members(image_dir) if is_archive(image_dir) else None
    for number, record in enumerate(raw_records(data_path, files)):
        yield table_row(record, number, image_dir, members)


def table_row(
    record: Any, number: int, image_dir: Path | None = None, members: dict[str, ArchiveMember | None] | None = None
) -> dict[str, Any]:
    """One record as a row of the table; what is wrong with it stands in `fault`."""
    row = EMPTY_ROW | {"id": str(number)}
    try:
        if not isinstance(record, dict):
            raise record if isinstance(record, BadRecordError) else ValueError("it is not an object")
        if (name := id_of(record)) is not None:
            row["id"] = _printable(name)
        messages = to_messages(record)
        pictures = [locate_picture(picture, image_dir, members) for picture in pictures_of(record)]
        language = record["language"] if isinstance(record.get("language"), str) else None
        answers, references = answers_of(record), texts_of(record.get("references"))
        if isinstance(record.get("caption"), list):
            references = references or texts_of(record["caption"])
        names = [picture for picture in pictures if isinstance(picture, str)]
        if names and len(names) < len(pictures):  # bytes among names: all as text, as they have an order
            names = [p if isinstance(p, str) else f"data:;base64,{base64.b64encode(p).decode()}" for p in pictures]
        "".join([*names, *answers, *references, language or ""]).encode()
        row["images"], row["image_bytes"] = names, [] if names else pictures
        row["language"], row["answers"], row["references"] = language, answers, references
        return row | {"messages": msgspec.json.encode(messages).decode()}
    except BadRecordError as error:
        return row | {"id": _printable(error.args[0]), "fault": _printable(error.args[1])}
    except UnicodeEncodeError:
        return row | {"fault": "it holds half of a surrogate pair, which is not Unicode"}
    except ValueError as error:
        return row | {"fault": _printable(error)}


def _printable(value: Any) -> str:
    """As a text that a file can hold."""
    return str(value).encode("utf-8", "backslashreplace").decode()
