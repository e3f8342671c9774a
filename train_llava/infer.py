"""Asks a LLaVA checkpoint, with or without a LoRA adapter, about pictures.

    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --prompt "What is in this picture?"
    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --interactive true
    python -m train_llava.infer --model_name_or_path output/run --questions questions.jsonl --answers answers.jsonl

The first prints the answer alone. The second is a chat; `/image FILE` shows it another picture. The third answers a
file of questions (see questions.py) in batches and, run again, goes on where it stopped.
"""

import hashlib
import json
import os
import string
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import (
    ADDRESSES,
    BATCH,
    BITS_HELP,
    NEW_TOKENS,
    check_positive,
    device,
    parse_arguments,
    parse_first,
    run_command,
)


@dataclass
class InferArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    prompt: str | None = field(default=None, metadata={"help": "What to ask."})
    image: list[str] = field(
        default_factory=list,
        metadata={"help": "One or more pictures the question is about: files, http(s) addresses, or - for stdin."},
    )
    interactive: bool = field(
        default=False,
        metadata={
            "help": "Chat in the terminal: /image FILE adds a picture, /image takes it back; an empty line ends it."
        },
    )
    questions: str | None = field(
        default=None, metadata={"help": "A .jsonl file of questions; pictures are named relative to it."}
    )
    answers: str | None = field(default=None, metadata={"help": "The .jsonl file to write their answers to."})
    batch_size: int = field(default=BATCH, metadata={"help": "Questions answered at once."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": BITS_HELP})
    max_new_tokens: int = field(default=NEW_TOKENS, metadata={"help": "The longest answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest answer; above: draw one."})
    top_p: float = field(default=1.0, metadata={"help": "Draw among the likeliest tokens that sum up to this."})

    def __post_init__(self) -> None:
        if [self.prompt is not None, self.interactive, self.questions is not None].count(True) != 1:
            raise ValueError("give one of --prompt, --interactive true and --questions")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty")
        if (self.questions is None) != (self.answers is None):
            raise ValueError("--questions and --answers go together")
        if self.questions is not None and self.image:
            raise ValueError("--image goes with --prompt or --interactive: a file of questions names its own pictures")
        check_positive(self, "batch_size", "max_new_tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("--temperature is 0 or above, and --top_p above 0 and at most 1")


if __name__ == "__main__":
    parse_first(InferArguments)  # before the imports that take seconds

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import TextStreamer

from train_llava.adapter import load_model
from train_llava.chat import Chat, Processor
from train_llava.model import Llava
from train_llava.pictures import open_image
from train_llava.questions import answered_before, locked, read_questions
from train_llava.records import IMAGE_TOKEN
from train_llava.run_folder import first_numbers
from train_llava.template import special_tokens

MAX_BYTES = 50 << 20  # of a picture from the network
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
            inputs = side_by_side([prompts[i] for i in batch], [said[i] for i in batch], chat.tokenizer.pad_token_id)
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


def side_by_side(
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


def fetch_image(name: str, at_least: int | None = None) -> Image.Image:
    """The picture at a path, an http(s) address or in a data URI, or, for "-", on standard input.

    `at_least`: see `open_image`.

    Raises:
        OSError, ValueError: it is not there, or no picture.
    """
    if name == "-":
        return open_image(sys.stdin.buffer.read(), "the picture on standard input", at_least)
    if not name.startswith(ADDRESSES):
        return open_image(Path(name), at_least=at_least)
    short = name if len(name) < 200 else f"{name[:60]}…"
    try:
        # what an address cannot hold, such as Chinese, goes in percent signs
        with urllib.request.urlopen(urllib.parse.quote(name, safe=string.punctuation), timeout=30) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"{short} gives no picture: {error!r}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{short} is larger than {MAX_BYTES >> 20} MB")
    return open_image(content, short, at_least)


def question(text: str, pictures: int) -> dict[str, Any]:
    """A user's message with so many pictures in front of the text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def reply(text: str) -> dict[str, Any]:
    """The model's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat(
    model: Llava | PeftModel,
    processor: Processor,
    images: list[Image.Image],
    **options: Any,
) -> None:
    """Questions from the terminal, answers as they come; the whole conversation is kept.

    "/image FILE" puts a picture before the next question, and "/image" alone takes back those that wait for it.
    """
    messages, new, at_least = [], len(images), Chat(processor).at_least
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        except UnicodeDecodeError as error:  # half of a character, as a terminal may leave of one that was deleted
            print(f"error: {error}", file=sys.stderr)
            if not sys.stdin.isatty():  # a file gives the same again
                return
            continue
        if not text:
            return
        try:
            if text == "/image":
                images, new = images[: len(images) - new], 0
                continue
            if text.startswith("/image "):
                images = [*images, fetch_image(text.removeprefix("/image ").strip(), at_least)]
                new += 1
                continue
            asked = [*messages, question(text, new)]
            streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = generate(model, processor, [asked], images, streamer=streamer, **options)
            messages, new = [*asked, reply(answer)], 0
        except Exception as error:  # whatever it is, the conversation stays as it was before
            print(f"error: {error}", file=sys.stderr)


def weights_digest(model: torch.nn.Module) -> str:
    """By what a model, with its adapter, is told from another: the first numbers of its tensors."""
    numbers = list(first_numbers(model).values())
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def shares(number: int, batch_size: int) -> list[range]:
    """This process's share of each window of so many questions or records, as their numbers; the last may be empty."""
    state = this_process()
    share = max(1, min(WINDOW * batch_size, -(-number // state.num_processes)))
    windows = range(share * state.process_index, number + share * state.process_index, share * state.num_processes)
    return [range(min(start, number), min(start + share, number)) for start in windows]


def settings_of(arguments: Any, model: torch.nn.Module) -> dict[str, Any]:
    """What decides a model's answers: the arguments of `infer` or `evaluate`, and its weights."""
    names = ("model_name_or_path", "adapter_name_or_path", "data_path", "image_dir", "bits", "max_new_tokens")
    settings = {
        name: getattr(arguments, name) for name in (*names, "temperature", "top_p") if hasattr(arguments, name)
    }
    return settings | {"weights": weights_digest(model)}


def answer_questions(
    model: Llava | PeftModel,
    chat: Chat,
    asked: list[dict[str, Any]],
    open_question: Callable[[int], tuple[list[dict[str, Any]], list[Image.Image]]],
    path: Path,
    settings: dict[str, Any],
    batch_size: int,
    description: str | None = None,
) -> tuple[list[dict[str, Any] | None], list[dict[str, Any]]]:
    """Answers questions, every process its share, and writes each answer to a file as it comes (see `questions`).

    Those that the file answers already are not asked again. `open_question` gives the messages and the pictures of one
    by its place in `asked`; no more pictures are kept than it has.

    Returns:
        Each question's line of the file, None where it could not be asked; and the `id` and `reason` of these.

    Raises:
        OSError, ValueError: the file cannot be gone on with; see `locked` and `answered_before`.
    """
    state, bad, limit = this_process(), [], settings["max_new_tokens"]
    options = sampling(settings.get("temperature", 0), settings.get("top_p", 1))
    writes = state.is_main_process
    with locked(path) if writes else nullcontext():
        with state.main_process_first():  # which cuts off what a kill has torn
            lines = answered_before(path, asked, settings)
        state.wait_for_everyone()
        left = [place for place, line in enumerate(lines) if line is None]
        bar = tqdm(total=len(asked), initial=len(asked) - len(left), desc=description, disable=not writes)
        with open(path if writes else os.devnull, "ab") as file, bar:
            for share in shares(len(left), batch_size):
                places, prepared, refused = [], [], []
                for place in left[share.start : share.stop]:
                    try:
                        prepared.append(prepare(model, chat, *open_question(place), limit))
                        places.append(place)
                    except (OSError, ValueError) as error:
                        refused.append({"id": asked[place]["id"], "reason": str(error)})
                replies = generate_all(model, chat, prepared, batch_size, **options)
                for answered, unasked in gather_object([(list(zip(places, replies, strict=True)), refused)]):
                    for place, (answer, cut) in answered:
                        named = {key: asked[place][key] for key in ("id", "prompt", "number") if key in asked[place]}
                        line = lines[place] = named | {"answer": answer, "cut": bool(cut), "settings": settings}
                        # a half of a surrogate pair, which only an id can hold, is written as it was: escaped
                        file.write(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
                    bad += unasked
                    bar.update(len(answered) + len(unasked))
                file.flush()
    return lines, bad


def answer_file(
    model: Llava | PeftModel,
    processor: Processor,
    questions: Path,
    answers: Path,
    settings: dict[str, Any],
    batch_size: int = BATCH,
) -> None:
    """Answers a file of questions; those that the file of answers has already are not asked again.

    A question that cannot be asked is named, and does not keep the others from their answers.

    Raises:
        OSError, ValueError: a file or a line cannot be read, and nothing was asked; or some questions could not be
            asked, and all others are answered.
    """
    asked, chat = read_questions(questions), Chat(processor)
    if answers.exists() and answers.samefile(questions):
        raise ValueError(f"--answers {answers} is the file of the questions: choose another")

    def open_question(place: int) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        return asked[place].messages, [fetch_image(name, chat.at_least) for name in asked[place].pictures]

    named = [{"id": question.id, "prompt": question.prompt} for question in asked]
    lines, bad = answer_questions(model, chat, named, open_question, answers, settings, batch_size)
    cut, refused = sum(line["cut"] for line in lines if line), [f"question {b['id']!r}: {b['reason']}" for b in bad]
    notes = [f"{cut} of {len(asked)} answers were cut at --max_new_tokens {settings['max_new_tokens']}"] * bool(cut)
    if this_process().is_main_process and notes + refused:
        print(*notes, *refused, sep="\n", file=sys.stderr)
    if refused:
        raise ValueError(f"{len(refused)} of {len(asked)} questions could not be asked; {refused[0]}")


def main() -> None:
    (arguments,) = parse_arguments(InferArguments)
    this_process()  # before the model is opened: each process has a device of its own
    if arguments.answers is not None:
        Path(arguments.answers).absolute().parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    images = [fetch_image(name, Chat(processor).at_least) for name in arguments.image]
    options = sampling(arguments.temperature, arguments.top_p) | {"max_new_tokens": arguments.max_new_tokens}
    if arguments.interactive:
        chat(model, processor, images, **options)
    elif arguments.questions is not None:
        paths, settings = (Path(arguments.questions), Path(arguments.answers)), settings_of(arguments, model)
        answer_file(model, processor, *paths, settings, arguments.batch_size)
    else:
        conversation = [question(arguments.prompt, len(images))]
        print(generate(model, processor, [conversation], images, **options)[0])


if __name__ == "__main__":
    run_command(main)
