"""Generates answers, one at a time or in batches, and tells how likely given answers are."""

from copy import deepcopy
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from train_llava.chat import IGNORE, Chat, Processor, chat_of
from train_llava.cli import BATCH, NEW_TOKENS, device
from train_llava.model import Llava
from train_llava.modeling.templates import special_tokens
from train_llava.records import IMAGE_TOKEN

WINDOW = 4  # batches of questions that are prepared together and sorted by length

Messages = list[dict[str, Any]]
Inputs = dict[str, torch.Tensor]  # of the model, see `Chat.prompts`
Prompt = tuple[Inputs, int]  # see `prepare`


def this_process() -> PartialState:
    """This process among those that `accelerate launch` or `torchrun` started, or the only one."""
    return PartialState(cpu=device().type == "cpu")


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Arguments of `model.generate` that override a checkpoint's; at temperature 0, answers are greedy."""
    if temperature == 0:
        return {"do_sample": False}
    options = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    return options | {"top_k": 0, "min_p": 0.0, "typical_p": 1.0}


def user_message(text: str, pictures: int) -> dict[str, Any]:
    """A user's message: `pictures` images, then the text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def assistant_message(text: str) -> dict[str, Any]:
    """The model's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_and_images(message: dict[str, Any]) -> tuple[str, int]:
    """The text of a message, and how many images it has. Its content may be a text alone."""
    if isinstance(message["content"], str):
        return message["content"], 0
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    return "\n".join(texts), len(message["content"]) - len(texts)


def prepare(chat: Chat, messages: Messages, images: list[Image.Image], max_new_tokens: int = NEW_TOKENS) -> Prompt:
    """Turns a conversation that ends with a question into a prompt.

    It is the model's inputs (see `Chat.prompts`), a batch of one, and the most tokens that the answer may have:
    `max_new_tokens`, or fewer where the model's context ends before. A ValueError says that the context is full, that
    the chat template refuses the conversation, or that a text holds a control token. Such a token would end a turn,
    begin one, or be taken for a picture.
    """
    # An earlier answer may hold control tokens that are not special, such as </think>: the model wrote them
    special = special_tokens(chat.tokenizer) | {chat.processor.image_token}
    for message in messages:
        forbidden = special if message["role"] == "assistant" else special | chat.control_tokens
        text, _ = text_and_images(message)
        if matches := [token for token in forbidden if token in text]:
            raise ValueError(f"the control token {min(matches)} stands in a text: leave it out")
    inputs = dict(chat.prompts([messages], images))
    length, limit = inputs["input_ids"].shape[1], chat.tokenizer.model_max_length
    if length >= limit:
        raise ValueError(f"the conversation has {length} tokens, pictures included, and the model reads {limit}")
    return inputs, min(limit - length, max_new_tokens)


@torch.inference_mode()
def generate(
    model: Llava | PeftModel,
    processor: Processor,
    conversations: list[Messages],
    images: list[Image.Image],
    max_new_tokens: int = NEW_TOKENS,
    **options: Any,
) -> list[str]:
    """Answers conversations that end with a question. `images` are in the order of their `<image>` tokens.

    Answers are greedy by default; `options` go to `model.generate` (see `sampling`). A ValueError says which cannot
    be asked (see `prepare`), or that there are not as many images as tags.
    """
    tags = []
    for messages in conversations:
        tags.append(sum(text_and_images(message)[1] for message in messages))
    if sum(tags) != len(images):
        raise ValueError(f"{sum(tags)} {IMAGE_TOKEN} tags, {len(images)} pictures")
    # Each conversation takes as many of the images as it has tags
    chat, remaining, prompts = chat_of(processor), iter(images), []
    for messages, count in zip(conversations, tags, strict=True):
        prompts.append(prepare(chat, messages, list(islice(remaining, count)), max_new_tokens))
    return [answer for answer, _ in generate_all(model, chat, prompts, len(prompts), **options)]


@torch.inference_mode()
def generate_all(
    model: Llava | PeftModel, chat: Chat, prompts: list[Prompt], batch_size: int, **options: Any
) -> list[tuple[str, bool]]:
    """Answers any number of prompts (see `prepare`), `batch_size` at once, those of like length together.

    Beside each answer stands whether it was cut: it has as many tokens as it may, and no end.
    """
    answers: list[tuple[str, bool]] = [("", False)] * len(prompts)
    end_tokens = torch.tensor(model.generation_config.eos_token_id)
    order = sorted(range(len(prompts)), key=lambda i: prompts[i][0]["input_ids"].shape[1])
    while order:
        batch, order = order[:batch_size], order[batch_size:]
        # The batch stops when the first context is full
        limit = min(prompts[i][1] for i in batch)
        inputs = pad_left([prompts[i][0] for i in batch], chat.tokenizer.pad_token_id)
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        output = model.generate(**inputs, max_new_tokens=limit, **{"do_sample": False} | options).cpu()
        for i, tokens in zip(batch, output[:, inputs["input_ids"].shape[1] :], strict=True):
            # An answer ends with its first end token; padding follows
            ends = torch.isin(tokens, end_tokens).nonzero()
            tokens = tokens[: ends[0, 0] + 1] if len(ends) else tokens
            answers[i] = answer_text(chat, tokens.tolist()), not len(ends)
            # Its own context has room for a longer answer: it is asked again, after all others
            if not len(ends) and limit < prompts[i][1]:
                order.append(i)
    return answers


@torch.inference_mode()
def log_probabilities(
    model: Any, chat: Chat, messages: Messages, pictures: list[list[Image.Image]], answers: list[str]
) -> torch.Tensor:
    """The log-probability of C answers to a conversation with each of P lists of pictures of one size, `(P, C)`.

    Prompts are computed once, and `BATCH` answers at once behind them. A ValueError is one of `Chat.encode`.
    """
    earlier, tokens_of, results = [message | {"train": False} for message in messages], [], []
    for answer in answers:  # its tokens with its end, as training learns them
        token_ids, labels = chat.encode([*earlier, assistant_message(answer)], [image.size for image in pictures[0]])
        tokens_of.append(torch.from_numpy(token_ids[labels != IGNORE]))
    inputs = chat.prompts([messages] * len(pictures), list(chain.from_iterable(pictures)))
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    prompts = model(**inputs, use_cache=True, logits_to_keep=1)
    for start in range(0, len(answers), BATCH):
        tokens = pad_sequence(tokens_of[start : start + BATCH], True, IGNORE).to(model.device)
        count, tokens, cache = len(tokens), tokens.repeat(len(pictures), 1), deepcopy(prompts.past_key_values)
        cache.batch_repeat_interleave(count)
        mask = torch.cat([inputs["attention_mask"].repeat_interleave(count, 0), tokens != IGNORE], dim=1)
        behind = model(input_ids=tokens.clamp(min=0), attention_mask=mask, past_key_values=cache).logits[:, :-1]
        logits = torch.cat([prompts.logits.repeat_interleave(count, 0), behind], dim=1).float()
        results.append(-cross_entropy(logits.transpose(1, 2), tokens, reduction="none").sum(1).view(-1, count).cpu())
    return torch.cat(results, dim=1)


def choose(
    model: Llava | PeftModel, chat: Chat, messages: Messages, images: list[Image.Image], choices: list[str]
) -> dict[str, float]:
    """How likely each choice is as the answer to a conversation, if it is one of them; the likeliest first."""
    shares = log_probabilities(model, chat, messages, [images], choices)[0].softmax(0).tolist()
    return dict(sorted(zip(choices, shares, strict=True), key=lambda pair: -pair[1]))


def pad_left(inputs: list[Inputs], pad_token_id: int) -> Inputs:
    """One batch, padded on the left, from the inputs of several prompts (see `prepare`)."""
    batch = {
        "input_ids": pad_sequence([one["input_ids"][0] for one in inputs], True, pad_token_id, "left"),
        "attention_mask": pad_sequence([one["attention_mask"][0] for one in inputs], True, 0, "left"),
    }
    # Pictures of all prompts, one after the other; with anyres, one may have fewer tiles than another
    pictures, sizes = [], []
    for one in inputs:
        pictures.extend(one.get("pixel_values", ()))
        sizes.extend(one.get("image_sizes", ()))
    if pictures:
        batch["pixel_values"] = pad_sequence(pictures, True)
    if sizes:
        batch["image_sizes"] = torch.stack(sizes)
    return batch


def answer_text(chat: Chat, token_ids: list[int]) -> str:
    """The text of an answer's tokens. Its own indentation stays; the template's white space does not."""
    text, prefix = decode(chat, token_ids).rstrip(), answer_prefix(chat)
    return text.lstrip() if prefix is None else text.removeprefix(prefix)


@lru_cache(maxsize=8)
def answer_prefix(chat: Chat) -> str | None:
    """The white space before an answer, measured on one; None if no answer can be supervised."""
    try:
        token_ids, supervised = chat.tokenize([user_message("red", 0), assistant_message("red")])
    except ValueError:
        return None
    return decode(chat, token_ids[supervised].tolist()).partition("red")[0]


def decode(chat: Chat, token_ids: list[int]) -> str:
    """Tokens as text without special tokens. They are decoded behind an "a": first in a text, a space is lost."""
    before = chat.tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *token_ids])]
    return texts[1].removeprefix(texts[0])
