"""From records on disk to the tensors the model is trained on: records → messages → padded batch.

A data set in the LLaVA layout is a folder with `chat.json` and its pictures in `images_dl/`:

    [{"id": "GCC_000", "image": "GCC_000.jpg", "conversations": [
        {"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "a red bus"}]}, …]
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageOps
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from train_llava.build_model import IMAGE_TOKEN, end_of_turn_token

IGNORE = -100  # the label that cross entropy leaves out
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def find_records(data_path: str, image_dir: str | None = None) -> tuple[Path, Path]:
    """The file of records and the folder of pictures that `data_path` stands for.

    Raises:
        FileNotFoundError: one of them is not there; the message says what was looked for.
    """
    path = Path(data_path)
    if not path.exists():
        raise FileNotFoundError(f"--data_path {data_path} does not exist")
    if path.is_dir():
        path = path / "chat.json"
        if not path.exists():
            raise FileNotFoundError(f"--data_path {data_path} holds no chat.json")
    if image_dir is None:
        folders = (path.parent / "images_dl", path.parent / "images", path.parent)
        return path, next(folder for folder in folders if folder.is_dir())
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"--image_dir {image_dir} is not a folder")
    return path, Path(image_dir)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `.json` file, a list of objects.

    Raises:
        ValueError: it is not that; the message names the file.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} is not a list of records")
    return records


def picture_names(record: dict[str, Any]) -> list[str]:
    """The pictures a record names: none, one, or a list."""
    image = record.get("image")
    return [] if image is None else image if isinstance(image, list) else [image]


def to_messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A LLaVA record's turns as chat messages, each a list of parts: pictures, and the texts around `<image>` tags.

    White space around a part is dropped here, and the chat template writes one line break between parts, so a picture
    and its text look the same in training as in any later use.

    Raises:
        ValueError: the conversation is malformed; the message names the record and the fault.
    """

    def fault(reason: str) -> ValueError:
        return ValueError(f"record {record.get('id')!r}: {reason}")

    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise fault("it has no conversations")
    messages, tags = [], 0
    for turn in turns:
        role, text = ROLES.get(turn.get("from")), turn.get("value")
        if role is None:
            raise fault(f"unknown role {turn.get('from')!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(text, str) or not text.strip():
            raise fault(f"a {role} turn has no text")
        if role != "user" and IMAGE_TOKEN in text:
            raise fault(f"{IMAGE_TOKEN} in a turn of role {role}")
        pieces = [piece.strip() for piece in text.split(IMAGE_TOKEN)]
        content: list[dict[str, str]] = []
        for i, piece in enumerate(pieces):
            if i > 0:
                content.append({"type": "image"})
            if piece:
                content.append({"type": "text", "text": piece})
        tags += len(pieces) - 1
        messages.append({"role": role, "content": content})
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise fault("questions and answers do not take turns, beginning with a question and ending with an answer")
    if tags != len(picture_names(record)):
        raise fault(f"{tags} {IMAGE_TOKEN} tags for {len(picture_names(record))} pictures")
    return messages


def text_of(message: dict[str, Any]) -> str:
    """A message as the chat template writes it: its parts in order, one a line, `<image>` for a picture."""
    return "\n".join(part.get("text", IMAGE_TOKEN) for part in message["content"])


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture as people see it: turned as its EXIF says, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(path: Path | str) -> Image.Image:
    """Reads a picture file whole.

    Raises:
        OSError, ValueError: it is not a picture, or not a whole one; the message names the file.
    """
    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


class LlavaDataset(torch.utils.data.Dataset):
    """The records of a data set; `[i]` gives `{"id", "messages", "images", "language"}`, pictures opened then.

    The records are kept as JSON text in one Arrow table: a list of dicts takes several times the memory, and again in
    every data-loader worker that touches it. Every conversation is checked here, so that a malformed one ends a run
    before it starts; pictures are read when they are asked for.

    Raises:
        OSError, ValueError: see `find_records`, `read_records` and `to_messages`.
    """

    def __init__(self, data_path: str, image_dir: str | None = None):
        path, self.image_dir = find_records(data_path, image_dir)
        records = read_records(path)
        for record in records:
            to_messages(record)
        self.records = Dataset.from_dict({"record": [json.dumps(record) for record in records]})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = json.loads(self.records[index]["record"])
        return {
            "id": str(record.get("id", index)),
            "messages": to_messages(record),
            "images": [open_image(self._picture(record, name)) for name in picture_names(record)],
            "language": record.get("language"),
        }

    def _picture(self, record: dict[str, Any], name: str) -> Path:
        path = self.image_dir / name
        if not path.resolve().is_relative_to(self.image_dir.resolve()):
            raise ValueError(f"record {record.get('id')!r}: {name} lies outside the picture folder {self.image_dir}")
        return path


def answer_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], end_of_turn: str
) -> tuple[str, list[range]]:
    """A conversation as the chat template writes it, and the stretches of it the model has to say.

    A stretch begins where the template hands over to the assistant and ends with the end-of-turn token. Both are found
    by rendering, so any template will do that writes a longer conversation as a continuation of a shorter one.

    Returns:
        The text, and one `range` of character positions for each assistant turn.

    Raises:
        ValueError: the template rewrites earlier turns, so the stretches cannot be told.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        if not text.startswith(before):
            raise ValueError("the chat template writes a question differently once it is answered")
        answer = text_of(message)
        end = text.index(end_of_turn, text.index(answer, len(before)) + len(answer))
        spans.append(range(len(before), end + len(end_of_turn)))
    return text, spans


def encode(
    processor: LlavaProcessor, messages: list[dict[str, Any]], end_of_turn: str, picture_tokens: int
) -> tuple[list[int], list[int]]:
    """A conversation as token ids and labels, `(T,)` each; a label is its token's id where the assistant speaks.

    The text is tokenised once, with one `<image>` for each picture, and labelled by the tokens' own positions in it;
    then each `<image>` is repeated for the `picture_tokens` features it stands for.
    """
    text, spans = answer_spans(processor.tokenizer, messages, end_of_turn)
    encoding = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = []
    labels: list[int] = []
    for token_id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        if token_id == processor.image_token_id:
            input_ids += [token_id] * picture_tokens
            labels += [IGNORE] * picture_tokens
        else:
            input_ids.append(token_id)
            said = any(span.start <= start and end <= span.stop and start < end for span in spans)
            labels.append(token_id if said else IGNORE)
    return input_ids, labels


class LlavaCollator:
    """Turns items of a `LlavaDataset` into one batch. B conversations of at most T tokens, P pictures in all:

    - `input_ids`, `attention_mask` `(B, T)`: padded on the right; the mask is 0 on padding alone
    - `pixel_values` `(P, 3, H, W)`: the pictures in the order of their `<image>` tokens
    - `labels` `(B, T)`: the tokens the assistant says, -100 elsewhere
    - `logits_to_keep` `(B, T)`, bool: the positions whose next token has a label
    - `shift_labels` `(N,)`: the labels of those positions' next tokens, row by row

    With the last two the model computes logits at N positions instead of B x T, to the same loss and gradients.

    Raises:
        ValueError: a conversation is longer than `max_length` or has nothing to learn; the message names the record.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None = None):
        self.processor = processor
        self.max_length = max_length
        self.end_of_turn = end_of_turn_token(processor.tokenizer)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [image for item in items for image in item["images"]]
        blank = not images
        if blank:
            images = [Image.new("RGB", (32, 32))]
        pixel_values = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        # every picture has the same size by now, so the first one's count is everyone's
        tokens = self.processor.replace_image_token({"pixel_values": pixel_values}, 0)
        picture_tokens = tokens.count(self.processor.image_token)

        rows = []
        for item in items:
            input_ids, labels = encode(self.processor, item["messages"], self.end_of_turn, picture_tokens)
            if self.max_length is not None and len(input_ids) > self.max_length:
                raise ValueError(f"record {item['id']!r}: {len(input_ids)} tokens, --max_length is {self.max_length}")
            if all(label == IGNORE for label in labels):
                raise ValueError(f"record {item['id']!r}: no token to learn")
            rows.append((input_ids, [1] * len(input_ids), labels))
        if blank:
            # Without a picture the projector would get no gradient, and other ranks would wait for it forever. So one
            # blank picture follows the first row's last token, where no token can see it: its gradient is zero.
            input_ids, mask, labels = rows[0]
            pixels = [self.processor.image_token_id] * picture_tokens
            rows[0] = (input_ids + pixels, mask + [0] * picture_tokens, labels + [IGNORE] * picture_tokens)

        padding = (self.processor.tokenizer.pad_token_id, 0, IGNORE)
        input_ids, attention_mask, labels = (
            pad_sequence([torch.tensor(row[i]) for row in rows], batch_first=True, padding_value=padding[i])
            for i in range(3)
        )
        logits_to_keep = torch.zeros_like(labels, dtype=torch.bool)
        logits_to_keep[:, :-1] = labels[:, 1:] != IGNORE
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": pixel_values,
            "labels": labels,
            "logits_to_keep": logits_to_keep,
            "shift_labels": labels[:, 1:][logits_to_keep[:, :-1]],
        }


def encode_prompts(
    processor: LlavaProcessor, conversations: Iterable[list[dict[str, Any]]], images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """Conversations that end with a question, as a batch to generate from: padded on the left, pictures in order."""
    prompts = [
        processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in conversations
    ]
    return processor(
        images=images or None,
        text=prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,
        return_tensors="pt",
    )
