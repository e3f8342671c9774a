"""From a conversation to token ids, and which of them are supervised; from a question to a prompt."""

import math
import re
from collections.abc import Iterable
from datetime import date
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from train_llava.dataset.images import is_anyres, prepare_pictures, seen_part
from train_llava.modeling import templates
from train_llava.modeling.kinds import Processor, picture_text
from train_llava.records import IMAGE_TOKEN, text_of

IGNORE = -100  # the label that cross entropy leaves out


def turn_structure(messages: list[dict[str, Any]]) -> templates.TurnStructure:
    """Each message's role, and the types of its parts."""
    structure = []
    for message in messages:
        structure.append((message["role"], tuple(part["type"] for part in message["content"])))
    return tuple(structure)


def image_size(processor: Processor) -> int:
    """The side in pixels of a prepared image, or of one tile."""
    return prepare_pictures(processor.image_processor, [Image.new("RGB", (32, 32))])["pixel_values"].shape[-1]


class Chat:
    """Turns the conversations of one model into token ids; a ValueError if its chat template was not patched.

    `keep_cut_boxes`: an object that the model sees in part keeps the part of its box; see `boxes.place_in`.
    """

    def __init__(self, processor: Processor, max_length: int | None = None, keep_cut_boxes: bool = False):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.keep_cut_boxes = keep_cut_boxes
        self.longest = min(max_length or math.inf, self.tokenizer.model_max_length)  # conversation in tokens
        self.side, self.anyres = image_size(processor), is_anyres(processor.image_processor)
        # A large JPEG may be decoded smaller, down to this side; not with tiles, which depend on its size
        self.min_side = None if self.anyres else self.side
        written = "".join(self.segments(templates.TWO_TURNS))
        # Added tokens that the template writes are control tokens, except for Gemma's line breaks
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        control_tokens = {content for content in added if content.strip() and content in written}
        self.control_tokens = (control_tokens | templates.special_tokens(self.tokenizer)) - {processor.image_token}

    @lru_cache(maxsize=4096)  # noqa: B019 - one a process
    def picture_ids(self, size: tuple[int, int] = (0, 0)) -> np.ndarray:
        """The token ids of a picture of this width and height, `(T,)`. Without tiles, all sizes have the same."""
        return self._tokens(picture_text(self.processor, self.side, size), [])[0]

    def image_tokens(self, size: tuple[int, int] = (0, 0)) -> int:
        """The number of `<image>` among them: one for each of the picture's features."""
        return int((self.picture_ids(size) == self.processor.image_token_id).sum())

    @lru_cache(maxsize=4096)  # noqa: B019 - one a process
    def seen_part(self, size: tuple[int, int]) -> list[float]:
        """See the function `seen_part`."""
        return seen_part(self.processor.image_processor, self.side, size)

    def segments(self, structure: templates.TurnStructure, answer_next: bool = False) -> list[str]:
        """See `template_segments`."""
        return self._segments(structure, answer_next, date.today())  # some templates write the date

    @lru_cache(maxsize=64)  # noqa: B019 - one a process
    def _segments(self, structure: templates.TurnStructure, answer_next: bool, _: date) -> list[str]:
        return templates.template_segments(self.tokenizer, structure, answer_next)

    def answer_spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[range, str]]]:
        """Renders a conversation, and locates each answer to learn in it: its characters, and the token at its end.

        An answer begins where the generation prompt ends. It ends with the token that ends its turn. For example,
        in `<u>What?<e><a>red<e>` the answer is `red<e>`: `(range(14, 20), "<e>")`. A ValueError says that the
        template refuses the conversation, or changes its texts.
        """
        text, structure, answers = templates.render(self.tokenizer, messages), turn_structure(messages), []
        segments = self.segments(structure)
        index, position = 0, 0  # of the segment before the next text: its index, and where it begins in `text`
        for i, message in enumerate(messages):
            first, begin = index, position
            # Step over the texts of this message
            for part in message["content"]:
                if part["type"] == "text":
                    position = templates.end_of_text(text, part["text"], position, *segments[index : index + 2])
                    if position is None:
                        raise ValueError(f"the chat template changes the text of a turn of role {message['role']}")
                    index += 1
            # An answer has to follow the same segments as one that is generated
            if message["role"] == "assistant" and message.get("train", True):
                *before, prompt = self.segments(structure[:i], answer_next=True)
                end = templates.end_of(self.tokenizer, segments[index])
                if before != segments[:first] or not templates.opens_like(segments[first], prompt) or end is None:
                    raise ValueError("the chat template writes an answer otherwise than one that is generated")
                stop = position + segments[index].index(end) + len(end)
                answers.append((range(begin + len(prompt), stop), end))
        return text, answers

    def tokenize(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's token ids, one `<image>` for each image, and which are supervised, `(T,)` each.

        The text is tokenised once. Each token belongs to the answer in which it begins. A ValueError says that a
        text holds a control token, or that an answer does not come out as a generated one would.
        """
        # A control token in a text would end a turn or begin one
        for message in messages:
            for token in self.control_tokens:
                if token in text_of(message):
                    raise ValueError(f"the control token {token} in a turn of role {message['role']}")
        text, answers = self.answer_spans(messages)
        token_ids, starts, stops = self._tokens(text, [])
        # Generation begins behind the prompt's last token. A token that joins prompt and answer is cut there
        cuts = [span.start for span, _ in answers if ((starts < span.start) & (span.start < stops)).any()]
        if cuts:
            whole = self.tokenizer.decode(token_ids)
            token_ids, starts, stops = self._tokens(text, cuts)
            if self.tokenizer.decode(token_ids) != whole:
                raise ValueError("an answer whose beginning is one token with what the chat template writes before it")
        # A token without characters belongs to no answer
        supervised = np.zeros(len(token_ids), dtype=bool)
        for span, end in answers:
            inside = (span.start <= starts) & (starts < span.stop) & (starts < stops)
            if not inside.any() or token_ids[inside][-1] != self.tokenizer.convert_tokens_to_ids(end):
                raise ValueError(f"an answer whose tokens do not end with {end}")
            supervised |= inside
        return token_ids, supervised

    def encode(
        self, messages: list[dict[str, Any]], sizes: Iterable[tuple[int, int]] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's token ids and labels, `(T,)` each. The tokens of a picture take the place of its `<image>`.

        `sizes` are the images' widths and heights, needed only with tiles. A ValueError is one of `tokenize`, or says
        that the conversation is too long, or has no supervised token.
        """
        token_ids, supervised = self.tokenize(messages)
        # Each <image> becomes the tokens of its picture
        is_image, repeats = token_ids == self.processor.image_token_id, np.ones_like(token_ids)
        sizes = sizes if self.anyres else [(0, 0)] * is_image.sum()
        pictures = [np.zeros(0, dtype=int), *(self.picture_ids(size) for size in sizes)]
        repeats[is_image] = [len(picture) for picture in pictures[1:]]
        input_ids, supervised = np.repeat(token_ids, repeats), np.repeat(supervised, repeats)
        input_ids[np.repeat(is_image, repeats)] = np.concatenate(pictures)
        if len(input_ids) > self.longest:
            limit = "--max_length is" if self.longest == self.max_length else "the model reads"
            raise ValueError(f"{len(input_ids)} tokens, {limit} {self.longest}")
        if not supervised.any():
            raise ValueError("no token to learn")
        return input_ids, np.where(supervised, input_ids, IGNORE)

    def _tokens(self, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A text's token ids, and where each begins and ends. The parts between `cuts` are tokenised apart."""
        # The tokenizer counts the characters of each part from 0; `begin` makes them places in the whole text
        bounds = [0, *cuts, len(text)]
        parts = [text[begin:end] for begin, end in pairwise(bounds)]
        encoding = self.tokenizer(parts, add_special_tokens=False, return_offsets_mapping=True)
        token_ids = np.concatenate([np.array(ids, dtype=int) for ids in encoding["input_ids"]])
        offsets = zip(encoding["offset_mapping"], bounds, strict=False)
        places = np.concatenate([np.array(part, dtype=int).reshape(-1, 2) + begin for part, begin in offsets])
        starts, stops = places.T
        # Some tokenizers place a token of spaces at its end. It begins where the token before it ended
        starts[1:] = np.where(starts[1:] < stops[1:], starts[1:], stops[:-1])
        return token_ids, starts, stops

    def prompts(
        self, conversations: Iterable[list[dict[str, Any]]], images: list[Image.Image]
    ) -> dict[str, torch.Tensor]:
        """Conversations that end with a question, prepared as in training: one batch, padded on the left."""
        # Each <image> becomes the tokens of its picture
        texts = [templates.render(self.tokenizer, messages, answer_next=True) for messages in conversations]
        pictures = (picture_text(self.processor, self.side, image.size) for image in images)
        texts = [re.sub(IMAGE_TOKEN, lambda _: next(pictures), text) for text in texts]
        options = {"padding": True, "padding_side": "left", "return_token_type_ids": False}
        batch = self.tokenizer(texts, add_special_tokens=False, return_tensors="pt", **options)
        if images:
            batch.update(prepare_pictures(self.processor.image_processor, images))
        return batch


@lru_cache(maxsize=8)
def chat_of(processor: Processor, max_length: int | None = None, keep_cut_boxes: bool = False) -> Chat:
    """The `Chat` of a processor, made once: it renders templates and prepares an image."""
    return Chat(processor, max_length, keep_cut_boxes)
