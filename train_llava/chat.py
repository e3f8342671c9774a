"""All that is known of a model's chat template: what it takes, where answers begin and end, which tokens are learnt.

Nothing is known by name. A template is asked: it renders conversations whose texts are marks, and what stands between
the marks is what it writes around a text (see `pieces_of`).
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import count
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from train_llava.pictures import prepare_pictures
from train_llava.records import IMAGE_TOKEN, BadRecordError, text_of

IGNORE = -100  # the label that cross entropy leaves out
MARK = "\ue000{}\ue001"  # characters of Unicode's private use stand in no template
Form = tuple[tuple[str, tuple[str, ...]], ...]  # see `form_of`
QUESTION, ANSWER = ("user", ("text",)), ("assistant", ("text",))
TWO_TURNS = (QUESTION, ANSWER, QUESTION, ANSWER)
STRUCTURED_CONTENT, ENDED_ANSWERS = (
    Path(__file__).with_name(name).read_text(encoding="utf-8").strip()
    for name in ("structured_content.jinja", "ended_answers.jinja")
)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answer_next: bool = False) -> str:
    """A conversation as the chat template writes it; with `answer_next`, up to where the assistant's answer begins.

    Raises:
        ValueError: the template does not take such a conversation; the message is its reason.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except (TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses it: {error}") from error


def form_of(messages: list[dict[str, Any]]) -> Form:
    """The roles of a conversation, and of what kinds each message's parts are."""
    return tuple((message["role"], tuple(part["type"] for part in message["content"])) for message in messages)


def pieces_of(tokenizer: PreTrainedTokenizerBase, form: Form, answer_next: bool = False) -> list[str]:
    """What the chat template writes around the texts of a conversation: before the first, between two, after the last.

    Raises:
        ValueError: it does not take such a conversation, or does not write each text once, in order.
    """
    numbers, messages = count(), []
    for role, kinds in form:
        parts = [{"type": kind} | ({"text": MARK.format(next(numbers))} if kind == "text" else {}) for kind in kinds]
        messages.append({"role": role, "content": parts})
    text = render(tokenizer, messages, answer_next)
    written = re.findall(MARK.format(r"(\d+)"), text)
    if written != [str(i) for i in range(next(numbers))]:
        roles = ", ".join(role for role, _ in form)
        raise ValueError(f"the chat template does not write each text of a conversation of {roles} once, in order")
    return re.split(MARK.format(r"\d+"), text)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are no text: of these a template builds turns."""
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def end_of(tokenizer: PreTrainedTokenizerBase, piece: str) -> str | None:
    """The token that ends an answer: the first special one of what is written behind it; None where there is none."""
    found = re.search("|".join(map(re.escape, special_tokens(tokenizer))), piece)
    return found.group() if found else None


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that end an answer, where generation must stop: a new answer's first, then an earlier one's.

    Most templates end both by the same token.

    Raises:
        ValueError: the template ends an answer with no special token.
    """
    pieces = pieces_of(tokenizer, TWO_TURNS)
    ends = [end_of(tokenizer, pieces[4]), end_of(tokenizer, pieces[2])]
    if None in ends:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} ends an answer with no special token")
    return list(dict.fromkeys(ends))


def complete_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Makes a tokenizer's chat template fit for a LLaVA, in place, and says what it lacked.

    Afterwards it takes structured content, ends every answer with a special token, and writes the same in front of an
    answer that was given, now or earlier, and of one that is to be generated.

    Raises:
        ValueError: there is no chat template, or none that this can be done to; the message says which and why.
    """
    template, lacked = tokenizer.chat_template, []
    if isinstance(template, dict):  # `default` beside others, such as `tool_use`
        template = template.get("default")
    if not template:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template: take the model's chat version")
    tokenizer.chat_template = template
    picture = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        takes_parts = IMAGE_TOKEN in render(tokenizer, [{"role": "user", "content": picture}])
    except ValueError:  # a template that adds strings
        takes_parts = False
    if not takes_parts:
        tokenizer.chat_template = STRUCTURED_CONTENT + template
        lacked.append("a chat template that takes pictures")
    try:
        end_of_turn_tokens(tokenizer)
    except ValueError:
        if not tokenizer.eos_token:
            raise
        tokenizer.chat_template = ENDED_ANSWERS + tokenizer.chat_template
        end_of_turn_tokens(tokenizer)
        lacked.append("an end of the answers in its chat template")
    if _unify_openings(tokenizer):
        lacked.append("the same opening of earlier, new and generated answers")
    return lacked


def _unify_openings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Has the chat template open every answer alike, whether it did not.

    A template with a thinking switch opens a new answer with a thought, if only an empty one, and an earlier answer
    without; or it begins a thought in the generation prompt that no answer it renders has. Generation would then go on
    from what training never saw. The longest opening is taken for all; a thought that is left open in it is closed.
    """
    pieces = pieces_of(tokenizer, TWO_TURNS)
    openings = [pieces[1], pieces[3], pieces_of(tokenizer, (QUESTION,), answer_next=True)[1]]
    common = commonprefix(openings)  # noqa: RUF071 - of texts
    extras = [opening.removeprefix(common) for opening in openings]
    if not any(extra.strip() for extra in extras):
        return False
    longest = max(extras, key=len)
    for tag in re.findall(r"<(\w+)>", longest):
        if f"</{tag}>" not in longest:
            longest += f"\n</{tag}>\n\n"
    if not any(token.content in common for token in tokenizer.added_tokens_decoder.values()):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} opens answers differently ({longest!r} for one), and no "
            "special token tells where"
        )
    changes = [(common + extra, common) for extra in sorted(set(extras), key=len, reverse=True) if extra.strip()]
    filters = "".join(
        f" | replace({json.dumps(old, ensure_ascii=False)}, {json.dumps(new, ensure_ascii=False)})"
        for old, new in [*changes, (common, common + longest)]
    )
    tokenizer.chat_template = (
        f"{{%- set rendered +%}}{tokenizer.chat_template}{{%- endset -%}}{{{{- rendered{filters} -}}}}"
    )
    return True


def image_side(processor: LlavaProcessor) -> int:
    """How many pixels a side a picture has once it is prepared."""
    return prepare_pictures(processor.image_processor, [Image.new("RGB", (32, 32))]).shape[-1]


def image_tokens(processor: LlavaProcessor) -> int:
    """How many `<image>` tokens the processor writes for a picture."""
    blank = torch.empty(1, 3, image_side(processor), image_side(processor))
    return processor.replace_image_token({"pixel_values": blank}, 0).count(processor.image_token)


class Chat:
    """A model's conversations, from messages to token ids: what is learnt of them, and what generation begins from.

    A picture stands for `image_tokens` tokens.

    Raises:
        ValueError: the processor's chat template is not one of `complete_template`'s.
    """

    def __init__(self, processor: LlavaProcessor, max_length: int | None = None):
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.side, self.image_tokens = image_side(processor), image_tokens(processor)
        self.end_of_turn_tokens = end_of_turn_tokens(self.tokenizer)
        written = "".join(self.pieces(TWO_TURNS))
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        self.control_tokens = {token for token in added if token in written} | set(self.tokenizer.all_special_tokens)
        self.control_tokens -= {processor.image_token}

    @lru_cache(maxsize=64)  # noqa: B019 - there is one of these a process
    def pieces(self, form: Form, answer_next: bool = False) -> list[str]:
        """See `pieces_of`."""
        return pieces_of(self.tokenizer, form, answer_next)

    def answer_spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[range], list[str]]:
        """A conversation as the chat template writes it, and what the model has to say of it.

        An answer begins where the generation prompt ends, and ends with the token that ends its turn.

        Returns:
            The text and, for each answer, its character positions and the token that ends it.

        Raises:
            ValueError: the template refuses the conversation, or writes something else than its texts.
        """
        text, form = render(self.tokenizer, messages), form_of(messages)
        pieces, place, last = (
            self.pieces(form),
            0,
            0,
        )  # the piece in front of the next text, and where that piece begins
        spans, ends = [], []
        for i, message in enumerate(messages):
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            opening, begin = pieces[last], place
            for content in texts:
                if not text.startswith(pieces[last] + content, place):
                    raise ValueError(f"the chat template changes the text of a turn of role {message['role']}")
                place, last = place + len(pieces[last]) + len(content), last + 1
            if message["role"] == "assistant":
                prompt = self.pieces(form[:i], answer_next=True)[-1]
                end = end_of(self.tokenizer, pieces[last])
                if not opening.startswith(prompt) or end is None:
                    raise ValueError("the chat template writes an answer otherwise than one that is generated")
                # what is left of the opening is white space, which the model has to say
                stop = place + pieces[last].index(end) + len(end)
                spans.append(range(begin + len(prompt), stop))
                ends.append(end)
        return text, spans, ends

    def encode(self, messages: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """A conversation's token ids and labels, `(T,)` each; a label is its token's id where the assistant speaks.

        The text is tokenised once, with one `<image>` for each picture, and labelled by the tokens' own positions in
        it: a token belongs to the span that it begins in. Then each `<image>` is repeated for the features it stands
        for.

        Raises:
            ValueError: it is longer than `max_length`, has nothing to learn, does not come out as it should, or a
                text in it holds a control token, which would end a turn or begin one; the message is the reason.
        """
        for message in messages:
            text = text_of(message)
            for token in self.control_tokens:
                if token in text:
                    raise ValueError(f"the control token {token} in a turn of role {message['role']}")
        text, spans, ends = self.answer_spans(messages)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        token_ids = np.array(encoding["input_ids"])
        starts, stops = np.array(encoding["offset_mapping"]).T
        learnt = np.zeros(len(token_ids), dtype=bool)
        for span, end in zip(spans, ends, strict=True):
            inside = (span.start <= starts) & (starts < span.stop) & (starts < stops)
            if not inside.any() or token_ids[inside][-1] != self.tokenizer.convert_tokens_to_ids(end):
                raise ValueError(f"an answer whose tokens do not end with {end}")
            learnt |= inside
        repeats = np.where(token_ids == self.processor.image_token_id, self.image_tokens, 1)
        input_ids = np.repeat(token_ids, repeats)
        labels = np.repeat(np.where(learnt, token_ids, IGNORE), repeats)
        if self.max_length is not None and len(input_ids) > self.max_length:
            raise ValueError(f"{len(input_ids)} tokens, --max_length is {self.max_length}")
        if not learnt.any():
            raise ValueError("no token to learn")
        return input_ids, labels

    def labelled(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item with its `input_ids` and `labels` (see `encode`); one that has them is left as it is.

        Raises:
            BadRecordError: it cannot be trained on.
        """
        if "labels" in item:
            return item
        try:
            input_ids, labels = self.encode(item["messages"])
        except ValueError as error:
            raise BadRecordError(item["id"], str(error)) from error
        return item | {"input_ids": input_ids, "labels": labels}

    def prompts(
        self, conversations: Iterable[list[dict[str, Any]]], images: list[Image.Image]
    ) -> dict[str, torch.Tensor]:
        """Conversations that end with a question, as a batch to generate from: padded on the left, pictures in order.

        Texts and pictures go the way that they go in training.
        """
        texts = [
            render(self.tokenizer, messages, answer_next=True).replace(
                IMAGE_TOKEN, self.processor.image_token * self.image_tokens
            )
            for messages in conversations
        ]
        batch = self.tokenizer(
            texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        if images:
            batch["pixel_values"] = prepare_pictures(self.processor.image_processor, images)
        return batch
