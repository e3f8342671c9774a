"""A file of questions to a model, and the file of their answers, which a killed run goes on writing.

A question is a line `{"id", "image", "prompt"}`; `image` or `images` are files, addresses or data URIs, one or a list.
Ids are those of records (see `records`), and `question` or `text` may stand for `prompt`. A conversation that ends
with a question may stand under `messages`. An answer is a line
`{"id", "prompt", "answer", "asked", "model"}`: the last two tell by what it was asked, and of which model.
"""

import hashlib
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from train_llava.cli import ADDRESSES, replacing
from train_llava.readers import BadRecordError, read_jsonl
from train_llava.records import IMAGE_TOKEN, Record, id_of, pictures_of, text_of, to_messages


class Question(NamedTuple):
    """A line of a file of questions."""

    id: Any
    prompt: str
    messages: list[dict[str, Any]]
    pictures: list[str]  # paths, addresses, data URIs

    def fingerprint(self) -> str | None:
        """What is asked, about which pictures: by their content, where they are files; None where one is not there."""
        digest = hashlib.sha256(json.dumps(self.messages).encode())
        for name in self.pictures:
            is_file = not name.startswith(ADDRESSES)
            if is_file and not Path(name).is_file():
                return None
            digest.update(hashlib.sha256(Path(name).read_bytes() if is_file else name.encode()).digest())
        return digest.hexdigest()[:16]


def read_question(record: Record, number: int, folder: Path) -> Question:
    """A line of a file of questions; pictures are named relative to `folder`.

    Raises:
        ValueError: it is no question; the message is the reason.
    """
    if not isinstance(record, dict):
        raise record if isinstance(record, BadRecordError) else ValueError("it is no object")
    pictures = pictures_of(record)
    if not all(isinstance(name, str) for name in pictures):
        raise ValueError("a picture is neither a file nor an address")
    prompt = next((record[key] for key in ("prompt", "question", "text") if isinstance(record.get(key), str)), None)
    if isinstance(prompt, str):
        tags = "" if IMAGE_TOKEN in prompt else f"{IMAGE_TOKEN}\n" * len(pictures)
        turns = [{"role": "user", "content": tags + prompt}]
    elif isinstance(record.get("messages"), list):
        turns = record["messages"]
    else:
        raise ValueError("it has no prompt")
    answered = [*turns, {"role": "assistant", "content": "?"}]
    messages = to_messages({"messages": answered, "images": pictures})[:-1]
    if all(part["type"] == "image" for part in messages[-1]["content"]):
        raise ValueError("its prompt is empty")
    if not isinstance(prompt, str):
        prompt = text_of(messages[-1])
    names = [name if name.startswith(ADDRESSES) else str(folder / name) for name in pictures]
    name = id_of(record)
    return Question(str(number) if name is None else name, prompt, messages, names)


def read_questions(path: Path) -> list[Question]:
    """The questions of a .jsonl file.

    Raises:
        OSError, ValueError: it is not there, or a line of it is no question.
    """
    questions = []
    for number, record in enumerate(read_jsonl(path)):
        try:
            questions.append(read_question(record, number, path.parent))
        except ValueError as error:
            raise ValueError(f"{path}, question {number + 1}: {error}") from error
    return questions


def read_answers(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file of answers, each with what it says; without a last one that a kill has torn.

    Raises:
        OSError, ValueError: it cannot be read, or another program wrote it.
    """
    *lines, torn = path.read_bytes().split(b"\n")
    read = []
    for number, line in enumerate([*lines, torn], 1):
        try:
            content = json.loads(line)
        except ValueError:
            # where a kill cut it, a line still begins as all do
            if number > len(lines) and (line.startswith(b'{"id": ') or b'{"id": '.startswith(line)):
                break
            content = None
        if not (isinstance(content, dict) and {"id", "prompt", "answer"} <= content.keys()):
            raise ValueError(f"--answers {path}, line {number}, is no answer of this command: choose another file")
        read.append((line + b"\n", content))
    return read


def unanswered(questions: list[Question], answers: Path, digest: str) -> list[Question]:
    """The questions that a file of answers lacks, which are asked of the model of that `weights_digest`.

    A line that a kill has torn is cut off it. Answers to what is asked otherwise now, or about another picture, are
    moved to a file beside it; all else stays as it is, answers about a picture that is not there now included.

    Raises:
        OSError, ValueError: see `read_answers`; or another model gave the answers.
    """
    if not answers.exists():
        return questions
    lines = read_answers(answers)
    if any(content.get("model", digest) != digest for _, content in lines):
        raise ValueError(f"--answers {answers} has answers of another model: choose another file")
    waiting = defaultdict(list)
    for asked in questions:
        waiting[str(asked.id)].append(asked)
    ids, kept, moved = set(waiting), [], []
    for line, content in lines:
        same = [
            asked
            for asked in waiting[str(content["id"])]
            if asked.prompt == content["prompt"]
            and (None in (told := content.get("asked"), now := asked.fingerprint()) or told == now)
        ]
        if same:
            waiting[str(content["id"])].remove(same[0])
        (kept if same or str(content["id"]) not in ids else moved).append(line)
    if moved:
        earlier = answers.with_name(f"{answers.stem}.earlier.jsonl")
        with open(earlier, "ab") as file:
            file.write(b"".join(moved))
        print(f"{len(moved)} lines of {answers} answer what was asked before: moved to {earlier}", file=sys.stderr)
    if b"".join(kept) != answers.read_bytes():
        with replacing(answers) as file:
            file.write_bytes(b"".join(kept))
            shutil.copymode(answers, file)
    return [asked for asked in questions if any(asked is other for other in waiting[str(asked.id)])]
