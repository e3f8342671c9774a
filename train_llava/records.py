"""Turns records of every format into chat messages.

A record holds its conversation under the first of these keys that it has; null counts as absent:

- `conversations`: `[{"from": "human" | "gpt" | "system", "value": "<image>\\nWhat is this?"}, …]` as in LLaVA, with
  one tag for each image. Or the same as JSON in a text, or with `role` and `content`, as in minimind-v.
- `messages`: `[{"role": "user" | "assistant" | "system", "content": …}, …]` as in OpenAI and TRL. `content` is a
  text, or a list of `{"type": "image"}`, `{"type": "image_url", "image_url": …}`, `{"type": "text", "text": …}`.
- `texts`: `[{"user": …, "assistant": …}, …]`, as in FineVision and the Cauldron.
- `completion` with `prompt`: two texts, or two lists of messages, as in TRL.
- `question` and `answer`: two texts. With `choices` the answer is one of them, its number from 0, or its letter,
  as in ScienceQA. Without `answer` it is the most frequent of `answers`, as in VQAv2, TextVQA and DocVQA.
- `caption`, `text` or `answer` alone: a text for its images, or a list of them; the first is trained on.

Its images are under `images`, `image`, `image_bytes` or `file_name`, in the order of their tags, or inside the
messages: file names, bytes or data URIs. Without tags, images come before the first question, except in
`conversations`. A record may have a `language` and, for evaluation, `answers` (of several people to the last
question), `references` (correct texts), `choices` (of the last question), and `kinds` (a text for each
question: those of a kind are scored together).
Its id is the first of `id`, `question_id`, `questionId`, `image_id`.
An answer with `"weight": 0` (OpenAI), `"loss": false` (ms-swift) or `"train": false` (axolotl) is not learnt.
"""

import re
import reprlib
from collections import Counter
from collections.abc import Callable
from string import ascii_uppercase
from typing import Any

from train_llava.dataset.readers import Record, answers_of, images_of, parse_json, texts_of

IMAGE_TOKEN = "<image>"
CAPTION_QUESTION = "Describe this picture."
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _turns(record: Record, key: str) -> list[dict[str, Any]]:
    """A field that holds a list of objects, or such a list as JSON."""
    turns = record.get(key)
    if isinstance(turns, str):
        turns = parse_json(turns.encode(), f"the text of {key}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"it has no {key}")
    return turns


def _dialogue(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Turns from pairs of a question and its answer."""
    turns = []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _texts(record: Record) -> list[dict[str, Any]]:
    pairs = [(turn.get("user"), turn.get("assistant")) for turn in _turns(record, "texts")]
    return _dialogue(*pairs)


def _completion(record: Record) -> list[dict[str, Any]]:
    if isinstance(record["completion"], list) or isinstance(record.get("prompt"), list):
        return _turns(record, "prompt") + _turns(record, "completion")
    return _dialogue((record.get("prompt"), record["completion"]))


def _visual_question(record: Record) -> list[dict[str, Any]]:
    """A question and its answer, in one of the forms that the head of this file lists."""
    question, answer = record["question"], record.get("answer")
    choices = record.get("choices") or record.get("options")
    # Multiple choice: the choices follow the question, and the answer becomes the text of its choice
    if isinstance(choices, list):
        choices = texts_of(choices)
        question = "\n".join([*texts_of(record.get("hint") or None), str(question), *choices])
        answer = str(answer).strip()
        if answer not in choices:  # it is the number or the letter of a choice
            letter = answer if len(answer) == 1 else "?"
            number = int(answer) if answer.isdecimal() else ascii_uppercase.find(letter)
            if not 0 <= number < len(choices):
                raise ValueError(f"its answer {reprlib.repr(answer)} is none of its {len(choices)} choices")
            answer = choices[number]
    # The most frequent of several answers
    elif not isinstance(answer, str) and (answers := texts_of(answer) or answers_of(record)):
        answer = Counter(answers).most_common(1)[0][0]
    return _dialogue((question, answer))


def _caption(record: Record) -> list[dict[str, Any]]:
    caption = next(record[key] for key in ("caption", "text", "answer") if record.get(key) is not None)
    if isinstance(caption, list) and caption:
        caption = caption[0]
    tags = f"{IMAGE_TOKEN}\n" * max(len(images_of(record)), 1)  # without an image it is a bad record
    return _dialogue((tags + CAPTION_QUESTION, caption))


# Each record format by its key; the first key that a record has decides
RECORD_FORMATS: dict[str, Callable[[Record], list[dict[str, Any]]]] = {
    "conversations": lambda record: _turns(record, "conversations"),
    "messages": lambda record: _turns(record, "messages"),
    "texts": _texts,
    "completion": _completion,
    "question": _visual_question,
    "caption": _caption,
    "text": _caption,
    "answer": _caption,
}


def to_messages(record: Record) -> list[dict[str, Any]]:
    """A record's turns as chat messages, each a list of parts: images, and the texts around `<image>` tags.

    Texts stay as they are. Only a line break next to a tag is dropped, because the chat template writes one
    between parts, and so is white space alone. Example: `"<image>\\nWhat?"` → an image and the text `"What?"`.

    Raises:
        ValueError: the conversation is malformed; the message is the reason.
    """
    for key in ("video", "videos", "audio", "audios"):
        if record.get(key):
            raise ValueError(f"it has {key}, which the model cannot take in")
    key = next((key for key in RECORD_FORMATS if record.get(key) is not None), None)
    if key is None:
        raise ValueError(f"it has no {', no '.join(RECORD_FORMATS)}")
    # Questions and answers take turns, after or between system messages
    messages = [_message(turn) for turn in RECORD_FORMATS[key](record)]
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("questions and answers do not take turns, a question first and an answer last")

    # One tag for each image, or none: then the images come before the first question
    tags = sum(message["content"].count({"type": "image"}) for message in messages)
    images = len(images_of(record))
    if tags == 0 and record.get("conversations") is None:
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = [{"type": "image"}] * images + question["content"]
    elif tags != images:
        raise ValueError(f"{tags} {IMAGE_TOKEN} tags for {images} pictures")
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
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"a turn of role {role} has no text")

    # A part becomes several if its text has <image> tags: the pieces between them, and the images
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") or ("text" if part.keys() & {"text", "content"} else "image")
        if kind not in ("text", "image", "image_url"):
            raise ValueError(f"it has a part of type {reprlib.repr(kind)}, which the model cannot take in")
        text = part.get("text") if kind == "text" else IMAGE_TOKEN
        if not isinstance(text, str):
            raise ValueError(f"a turn of role {role} has no text")
        if "<video>" in text or "<audio>" in text:
            raise ValueError("it has a <video> or <audio> tag, which the model cannot take in")
        for i, piece in enumerate(re.split(rf"(?:\r?\n)?{IMAGE_TOKEN}(?:\r?\n)?", text)):
            if i > 0:
                parts.append({"type": "image"})
            if piece.strip():
                parts.append({"type": "text", "text": piece})
    if role != "user" and {"type": "image"} in parts:
        raise ValueError(f"{IMAGE_TOKEN} in a turn of role {role}")
    if not parts:
        raise ValueError(f"a turn of role {role} has no text")
    message = {"role": role, "content": parts}
    return message | {"train": False} if 0 in map(turn.get, ("weight", "loss", "train")) else message  # False is 0


def text_of(message: dict[str, Any]) -> str:
    """A message as the chat template writes it: one part on a line, `<image>` for an image."""
    return "\n".join(part.get("text", IMAGE_TOKEN) for part in message["content"])
