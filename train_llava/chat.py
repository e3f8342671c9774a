"""A model's conversations: from messages to token ids, what of them is learnt, and what generation begins from."""

import re
from collections.abc import Iterable
from datetime import date
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextProcessor, LlavaProcessor

from train_llava.dataset.images import is_anyres, prepare_pictures
from train_llava.modeling.templates import (
    TWO_TURNS,
    TurnStructure,
    end_of,
    opens_like,
    render,
    special_tokens,
    template_segments,
)
from train_llava.records import IMAGE_TOKEN, BadRecordError, text_of

Processor = LlavaProcessor | LlavaNextProcessor
IGNORE = -100  # the label that cross entropy leaves out


def turn_structure(messages: list[dict[str, Any]]) -> TurnStructure:
    """The roles of a conversation, and of what kinds each message's parts are."""
    return tuple((message["role"], tuple(part["type"] for part in message["content"])) for message in messages)


def image_size(processor: Processor) -> int:
    """How many pixels a side a picture, or a tile of one, has once it is prepared."""
    return prepare_pictures(processor.image_processor, [Image.new("RGB", (32, 32))])["pixel_values"].shape[-1]


def image_tokens(processor: Processor, side: int, size: tuple[int, int]) -> int:
    """How many `<image>` tokens the processor writes for a picture of that width and height.

    `side`: see `image_size`.
    """
    prepared = {"pixel_values": torch.empty(1, 3, side, side), "image_sizes": [size[::-1]]}
    return processor.replace_image_token(prepared, 0).count(processor.image_token)


def _end_of_text(written: str, content: str, begin: int, before: str, behind: str) -> int | None:
    """Where a text ends that a chat template writes, from `begin` on, between two pieces of its own.

    The template may strip the white space at the text's ends, all or some of it. None: it changes the text otherwise.
    """
    core = content.strip()
    leading, trailing = content.split(core, 1)
    starts = (leading[n:] + core for n in range(len(leading) + 1))
    start = next((start for start in starts if written.startswith(before + start, begin)), None)
    if start is None:
        return None
    end = begin + len(before) + len(start)
    lengths = range(len(trailing), -1, -1)
    return next((end + n for n in lengths if written.startswith(trailing[:n] + behind, end)), None)


class Chat:
    """A model's conversations, from messages to token ids: what is learnt of them, and what generation begins from.

    Raises:
        ValueError: the processor's chat template is not one of `patch_chat_template`'s.
    """

    def __init__(self, processor: Processor, max_length: int | None = None):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.side, self.anyres = image_size(processor), is_anyres(processor.image_processor)
        # a JPEG may be decoded smaller, down to this; by its tiles a picture has as many tokens as its size says
        self.min_side = None if self.anyres else self.side
        written = "".join(self.pieces(TWO_TURNS))
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        added = {content for content in added if content.strip() and content in written}  # Gemma's has line breaks
        self.control_tokens = (added | special_tokens(self.tokenizer)) - {processor.image_token}

    @lru_cache(maxsize=4096)  # noqa: B019 - there is one of these a process
    def image_tokens(self, size: tuple[int, int] = (0, 0)) -> int:
        """How many `<image>` tokens a picture of that width and height has; without tiles, all have the same."""
        return image_tokens(self.processor, self.side, size)

    def count_image_tokens(self, sizes: Iterable[tuple[int, int]], pictures: int) -> list[int]:
        """The `image_tokens` of so many pictures, whose `sizes` need not be known where there are no tiles."""
        return [self.image_tokens(size) for size in sizes] if self.anyres else [self.image_tokens()] * pictures

    def pieces(self, form: TurnStructure, answer_next: bool = False) -> list[str]:
        """See `template_segments`."""
        return self._pieces(form, answer_next, date.today())  # which some templates write

    @lru_cache(maxsize=64)  # noqa: B019 - there is one of these a process
    def _pieces(self, form: TurnStructure, answer_next: bool, _: date) -> list[str]:
        return template_segments(self.tokenizer, form, answer_next)

    def answer_spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[range], list[str]]:
        """A conversation as the chat template writes it, and what the model has to say of it.

        An answer begins where the generation prompt ends, and ends with the token that ends its turn.

        Returns:
            The text and, for each answer, its character positions and the token that ends it.

        Raises:
            ValueError: the template refuses the conversation, or writes something else than its texts.
        """
        text, form = render(self.tokenizer, messages), turn_structure(messages)
        pieces, place, spans, ends = self.pieces(form), 0, [], []
        after = 0  # the number of the piece that the next text comes behind; `place` is where that piece begins
        for i, message in enumerate(messages):
            first, begin = after, place
            for content in (part["text"] for part in message["content"] if part["type"] == "text"):
                place = _end_of_text(text, content, place, *pieces[after : after + 2])
                if place is None:
                    raise ValueError(f"the chat template changes the text of a turn of role {message['role']}")
                after += 1
            if message["role"] == "assistant":
                *before, prompt = self.pieces(form[:i], answer_next=True)
                end = end_of(self.tokenizer, pieces[after])
                if before != pieces[:first] or not opens_like(pieces[first], prompt) or end is None:
                    raise ValueError("the chat template writes an answer otherwise than one that is generated")
                spans.append(range(begin + len(prompt), place + pieces[after].index(end) + len(end)))
                ends.append(end)
        return text, spans, ends

    def encode(
        self, messages: list[dict[str, Any]], sizes: Iterable[tuple[int, int]] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's token ids and labels, `(T,)` each; a label is its token's id where the assistant speaks.

        `sizes` are the pictures' widths and heights, which a model without tiles does not need.

        The text is tokenised once, with one `<image>` for each picture, and labelled by the tokens' own positions in
        it: a token belongs to the span that it begins in. Then each `<image>` is repeated for the features it stands
        for.

        Raises:
            ValueError: it is longer than `max_length`, has nothing to learn, does not come out as it should, or a
                text in it holds a control token, which would end a turn or begin one; the message is the reason.
        """
        for message in messages:
            for token in self.control_tokens:
                if token in text_of(message):
                    raise ValueError(f"the control token {token} in a turn of role {message['role']}")
        text, spans, ends = self.answer_spans(messages)
        token_ids, starts, stops = self._tokens(text, [])
        # where an answer's white space joins what is in front of it: apart, as generation goes on from its prompt
        cuts = [span.start for span in spans if ((starts < span.start) & (span.start < stops)).any()]
        if cuts:
            whole = self.tokenizer.decode(token_ids)
            token_ids, starts, stops = self._tokens(text, cuts)
            if self.tokenizer.decode(token_ids) != whole:
                raise ValueError("an answer whose beginning is one token with what the chat template writes before it")
        learnt = np.zeros(len(token_ids), dtype=bool)
        for span, end in zip(spans, ends, strict=True):
            inside = (span.start <= starts) & (starts < span.stop) & (starts < stops)
            if not inside.any() or token_ids[inside][-1] != self.tokenizer.convert_tokens_to_ids(end):
                raise ValueError(f"an answer whose tokens do not end with {end}")
            learnt |= inside
        is_image, repeats = token_ids == self.processor.image_token_id, np.ones_like(token_ids)
        repeats[is_image] = self.count_image_tokens(sizes, is_image.sum())
        input_ids, labels = (np.repeat(ids, repeats) for ids in (token_ids, np.where(learnt, token_ids, IGNORE)))
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise ValueError(f"{len(input_ids)} tokens, --max_length is {self.max_length}")
        if len(input_ids) > self.tokenizer.model_max_length:
            raise ValueError(f"{len(input_ids)} tokens, the model reads {self.tokenizer.model_max_length}")
        if not learnt.any():
            raise ValueError("no token to learn")
        return input_ids, labels

    def _tokens(self, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A text's token ids, and where each begins and ends in it; what stands between `cuts` is tokenised apart."""
        bounds = [0, *cuts, len(text)]
        parts = [text[begin:end] for begin, end in pairwise(bounds)]
        encoding = self.tokenizer(parts, add_special_tokens=False, return_offsets_mapping=True)
        token_ids = np.concatenate([np.array(ids, dtype=int) for ids in encoding["input_ids"]])
        offsets = zip(encoding["offset_mapping"], bounds, strict=False)
        places = np.concatenate([np.array(part, dtype=int).reshape(-1, 2) + begin for part, begin in offsets])
        starts, stops = places.T
        # a token of spaces, which some tokenizers place where it ends, begins where the one before it ended
        starts[1:] = np.where(starts[1:] < stops[1:], starts[1:], stops[:-1])
        return token_ids, starts, stops

    def answer(self, token_ids: list[int]) -> str:
        """The text of an answer's tokens. Its indentation stays; the template's own white space does not."""
        text = self._decode(token_ids).rstrip()
        return text.lstrip() if self._opening is None else text.removeprefix(self._opening)

    @cached_property
    def _opening(self) -> str | None:
        """The white space in front of an answer that the template or the tokenizer writes, as measured on one.

        None: the template writes no answer that could be trained on.
        """
        messages = [{"role": role, "content": [{"type": "text", "text": "red"}]} for role in ("user", "assistant")]
        try:
            input_ids, labels = self.encode(messages)
        except ValueError:
            return None
        return self._decode(input_ids[labels != IGNORE].tolist()).partition("red")[0]

    def _decode(self, token_ids: list[int]) -> str:
        """Tokens as text without special ones. Decoded first in a text, some tokens would lose their space."""
        before = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *token_ids])]
        return texts[1].removeprefix(texts[0])

    def count_tokens(self, messages: list[dict[str, Any]]) -> int:
        """About how many tokens a conversation has, one for a picture, whether it can be trained on or not."""
        try:
            text = render(self.tokenizer, messages)
        except ValueError:  # the template refuses it
            text = "\n".join(map(text_of, messages))
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def labelled(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item with its `input_ids` and `labels` (see `encode`); one that has them is left as it is.

        Raises:
            BadRecordError: it cannot be trained on.
        """
        if "labels" in item:
            return item
        try:
            sizes = item.get("image_sizes") or [image.size for image in item["images"]]
            input_ids, labels = self.encode(item["messages"], sizes)
        except ValueError as error:
            raise BadRecordError(item["id"], str(error)) from error
        return item | {"input_ids": input_ids, "labels": labels}

    def prompts(
        self, conversations: Iterable[list[dict[str, Any]]], images: list[Image.Image], prepare: bool = True
    ) -> dict[str, torch.Tensor]:
        """Conversations that end with a question, as a batch to generate from: padded on the left, pictures in order.

        Texts and pictures go the way that they go in training. Without `prepare`, the texts alone.
        """
        texts = [render(self.tokenizer, messages, answer_next=True) for messages in conversations]
        pictures = sum(text.count(IMAGE_TOKEN) for text in texts)
        counts = iter(self.count_image_tokens([image.size for image in images], pictures))
        batch = self.tokenizer(
            [re.sub(IMAGE_TOKEN, lambda _: self.processor.image_token * next(counts), text) for text in texts],
            padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        if images and prepare:
            batch.update(prepare_pictures(self.processor.image_processor, images))
        return batch
