"""Generates answers, one at a time or in batches."""

from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from train_llava.chat import Chat, Processor
from train_llava.cli import NEW_TOKENS, device
from train_llava.model import Llava
from train_llava.modeling.templates import special_tokens
from train_llava.records import IMAGE_TOKEN

WINDOW = 4  # batches of questions that are sorted by length, and whose long answers go on together


FIRST = 16  # tokens that each of several batches' answers gets before those that go on are put together


def this_process() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` has started, or the only one."""
    return PartialState(cpu=device().type == "cpu")


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """The arguments of `model.generate` for drawing an answer, or, at temperature 0, for the likeliest one.

    How a checkpoint would draw by itself gives way to them.
    """
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0, "min_p": 0.0, "typical_p": 1.0}


def _parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pictures and texts of a conversation; a message may be a text alone."""
    contents = [message["content"] for message in messages]
    return [part for c in contents for part in ([{"type": "text", "text": c}] if isinstance(c, str) else c)]


def room_for_answer(
    model: Llava | PeftModel, chat: Chat, messages: list[dict[str, Any]], images: list[Image.Image]
) -> int:
    """How many tokens the answer to a conversation may have before the model's context is full.

    Raises:
        ValueError: the context is full already, the chat template refuses the conversation, or a text in it holds a
            control token, which would end a turn, begin one, or stand for a picture.
    """
    special = special_tokens(chat.tokenizer) | {chat.processor.image_token}
    for message in messages:
        # what is no special token, as </think>, a model may have written in its own answer
        tokens = special if message["role"] == "assistant" else special | chat.control_tokens
        for part in _parts([message]):
            if found := min((token for token in tokens if token in part.get("text", "")), default=None):
                raise ValueError(f"the control token {found} stands in a text: leave it out")
    length = chat.prompts([messages], images, prepare=False)["input_ids"].shape[1]
    limit = chat.tokenizer.model_max_length
    if length >= limit:
        raise ValueError(f"the conversation has {length} tokens, pictures included, and the model reads {limit}")
    return limit - length


@torch.inference_mode()
def generate(
    model: Llava | PeftModel,
    processor: Processor,
    conversations: list[list[dict[str, Any]]],
    images: list[Image.Image],
    max_new_tokens: int = NEW_TOKENS,
    **options: Any,
) -> list[str]:
    """Answers to conversations that end with a question; `images` in the order of their `<image>` tokens.

    Greedy, unless `options`, which go to `model.generate`, say something else (see `sampling`).

    Raises:
        ValueError: one of them cannot be asked; see `room_for_answer`.
    """
    left, chat = iter(images), Chat(processor)
    tags = [sum(part["type"] == "image" for part in _parts(messages)) for messages in conversations]
    if sum(tags) != len(images):
        raise ValueError(f"{sum(tags)} {IMAGE_TOKEN} tags, {len(images)} pictures")
    prepared = [
        prepare(model, chat, messages, list(islice(left, number)), max_new_tokens)
        for messages, number in zip(conversations, tags, strict=True)
    ]
    return [answer for answer, _ in generate_all(model, chat, prepared, len(conversations), **options)]


def prepare(
    model: Llava | PeftModel,
    chat: Chat,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    max_new_tokens: int = NEW_TOKENS,
) -> tuple[dict[str, torch.Tensor], int]:
    """A conversation as `generate_all` takes it: its prompt (see `Chat.prompts`), and the most tokens of its answer.

    Raises:
        ValueError: it cannot be asked; see `room_for_answer`.
    """
    room = room_for_answer(model, chat, messages, images)
    return dict(chat.prompts([messages], images)), min(room, max_new_tokens)


@torch.inference_mode()
def generate_all(
    model: Llava | PeftModel,
    chat: Chat,
    prepared: list[tuple[dict[str, torch.Tensor], int]],
    batch_size: int,
    **options: Any,
) -> list[tuple[str, bool]]:
    """As `generate`, of any number of conversations (see `prepare`), so many at once.

    In several batches, those of like length stand together, and every answer first gets `FIRST` tokens; those that go
    on are put together anew and get twice as many, and so on, so that no short answer waits for a long one. To go on,
    the model reads the conversation again with what it has said, which is what it would have before it in one go. In
    half precision, where that can change a word, batches are those of the questions in their order, in one go.

    Returns:
        The answers, and whether each was cut: it has as many tokens as it may, and no end.
    """
    prompts, limits = [prompt for prompt, _ in prepared], [limit for _, limit in prepared]
    longest = max(limits, default=0)
    ends = torch.tensor(model.generation_config.eos_token_id)
    said = [prompt["input_ids"][0, :0] for prompt in prompts]
    unended, in_one_go, tokens = list(range(len(prompts))), [], longest
    if len(prompts) > batch_size and model.dtype == torch.float32:
        unended.sort(key=lambda i: prompts[i]["input_ids"].shape[1])
        tokens = FIRST
    while unended:
        batches = [unended[start : start + batch_size] for start in range(0, len(unended), batch_size)]
        unended = []
        for batch in batches:
            inputs = pad_left([prompts[i] for i in batch], [said[i] for i in batch], chat.tokenizer.pad_token_id)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            # whose context is full cuts nobody else's answer, who goes on
            most = min([tokens, *(limits[i] - len(said[i]) for i in batch)])
            output = model.generate(**inputs, max_new_tokens=most, **{"do_sample": False} | options)
            for i, more in zip(batch, output[:, inputs["input_ids"].shape[1] :].cpu(), strict=True):
                ended = torch.isin(more, ends).nonzero()
                said[i] = torch.cat([said[i], more[: ended[0, 0] + 1] if len(ended) else more])
                if len(ended) or len(said[i]) == limits[i]:
                    continue
                if chat.processor.image_token_id in said[i]:  # read again, it would ask for a picture
                    said[i] = said[i][:0]
                    in_one_go.append(i)
                else:
                    unended.append(i)
        tokens *= 2
        if not unended:
            unended, in_one_go, tokens = in_one_go, [], longest
    texts = [chat.answer(ids.tolist()) for ids in said]
    return [(text, not torch.isin(ids, ends).any()) for text, ids in zip(texts, said, strict=True)]


def pad_left(
    prompts: list[dict[str, torch.Tensor]], said: list[torch.Tensor], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Prompts (see `Chat.prompts`), each a batch of one, and what was said to it, as one batch, padded on the left."""
    rows = [torch.cat([prompt["input_ids"][0], more]) for prompt, more in zip(prompts, said, strict=True)]
    batch = {
        "input_ids": pad_sequence(rows, True, pad_token_id, "left"),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left"),
    }
    shown = [prompt for prompt in prompts if "pixel_values" in prompt]
    if shown:  # by tiles, a picture may have fewer than another
        batch["pixel_values"] = pad_sequence([p for prompt in shown for p in prompt["pixel_values"]], True)
    if shown and "image_sizes" in shown[0]:
        batch["image_sizes"] = torch.cat([prompt["image_sizes"] for prompt in shown])
    return batch


def user_message(text: str, pictures: int) -> dict[str, Any]:
    """A user's message with so many pictures in front of the text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant_message(text: str) -> dict[str, Any]:
    """The model's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
