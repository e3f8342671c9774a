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
from train_llava.questions import read_questions, unanswered
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
    left = iter(images)
    tags = [sum(part["type"] == "image" for part in _parts(messages)) for messages in conversations]
    if sum(tags) != len(images):
        raise ValueError(f"{sum(tags)} {IMAGE_TOKEN} tags, {len(images)} pictures")
    shown = [list(islice(left, number)) for number in tags]
    return generate_all(model, Chat(processor), conversations, shown, len(conversations), max_new_tokens, **options)


@torch.inference_mode()
def generate_all(
    model: Llava | PeftModel,
    chat: Chat,
    conversations: list[list[dict[str, Any]]],
    images: list[list[Image.Image]],
    batch_size: int,
    max_new_tokens: int = NEW_TOKENS,
    **options: Any,
) -> list[str]:
    """As `generate`, of any number of conversations, each with its `images`, so many at once.

    In several batches, those of like length stand together, and every answer first gets `FIRST` tokens; those that go
    on are put together anew and get twice as many, and so on, so that no short answer waits for a long one. To go on,
    the model reads the conversation again with what it has said, which is what it would have before it in one go. In
    half precision, where that can change a word, batches are those of the questions in their order, in one go.

    Raises:
        ValueError: see `generate`.
    """
    asked = list(zip(conversations, images, strict=True))
    limits = [min(room_for_answer(model, chat, *each), max_new_tokens) for each in asked]
    prompts = [dict(chat.prompts([messages], shown)) for messages, shown in asked]
    ends = torch.tensor(model.generation_config.eos_token_id)
    said = [prompt["input_ids"][0, :0] for prompt in prompts]
    unended, in_one_go, tokens = list(range(len(asked))), [], max_new_tokens
    if len(asked) > batch_size and model.dtype == torch.float32:
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
            unended, in_one_go, tokens = in_one_go, [], max_new_tokens
    return [chat.processor.decode(ids, skip_special_tokens=True).strip() for ids in said]


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


def fetch_image(name: str) -> Image.Image:
    """The picture at a path, an http(s) address or in a data URI, or, for "-", on standard input.

    Raises:
        OSError, ValueError: it is not there, or no picture.
    """
    if name == "-":
        return open_image(sys.stdin.buffer.read(), "the picture on standard input")
    if not name.startswith(ADDRESSES):
        return open_image(Path(name))
    short = name if len(name) < 200 else f"{name[:60]}…"
    try:
        # what an address cannot hold, such as Chinese, goes in percent signs
        with urllib.request.urlopen(urllib.parse.quote(name, safe=string.punctuation), timeout=30) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"{short} gives no picture: {error!r}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{short} is larger than {MAX_BYTES >> 20} MB")
    return open_image(content, short)


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
    messages, new = [], len(images)
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
                images = [*images, fetch_image(text.removeprefix("/image ").strip())]
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


def answer_file(
    model: Llava | PeftModel,
    processor: Processor,
    questions: Path,
    answers: Path,
    batch_size: int,
    **options: Any,
) -> None:
    """Answers a file of questions; those that the file of answers has already are not asked again.

    A question that cannot be asked is named, and does not keep the others from their answers.

    Raises:
        OSError, ValueError: a file or a line cannot be read, and nothing was asked; or some questions could not be
            asked, and all others are answered.
    """
    asked = read_questions(questions)
    if answers.exists() and answers.samefile(questions):
        raise ValueError(f"--answers {answers} is the file of the questions: choose another")
    digest, state, refused, chat = weights_digest(model), this_process(), [], Chat(processor)
    with state.main_process_first():  # which mends the file
        left = unanswered(asked, answers, digest)
    state.wait_for_everyone()
    settings = {"total": len(asked), "initial": len(asked) - len(left), "disable": not state.is_main_process}
    with open(answers if state.is_main_process else os.devnull, "ab") as file, tqdm(**settings) as bar:
        for share in shares(len(left), batch_size):
            entries, images, unasked, lines = [], [], [], []
            for entry in left[share.start : share.stop]:
                try:
                    shown = [fetch_image(name) for name in entry.pictures]
                    room_for_answer(model, chat, entry.messages, shown)
                    images.append(shown)
                    entries.append(entry)
                except (OSError, ValueError) as error:
                    unasked.append(f"question {entry.id!r}: {error}")
            conversations = [entry.messages for entry in entries]
            replies = generate_all(model, chat, conversations, images, batch_size, **options)
            for entry, answer in zip(entries, replies, strict=True):
                line = {"id": entry.id, "prompt": entry.prompt, "answer": answer}
                line |= {"asked": entry.fingerprint(), "model": digest}
                # a half of a surrogate pair, which only an id can hold, is written as it was: escaped
                lines.append(json.dumps(line, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            for written, named in gather_object([(lines, unasked)]):
                file.writelines(written)
                bar.update(len(written))
                refused += named
            file.flush()
    if refused:
        if state.is_main_process:
            print(*refused, sep="\n", file=sys.stderr)
        raise ValueError(f"{len(refused)} of {len(asked)} questions could not be asked; {refused[0]}")


def main() -> None:
    (arguments,) = parse_arguments(InferArguments)
    this_process()  # before the model is opened: each process has a device of its own
    if arguments.answers is not None:
        Path(arguments.answers).absolute().parent.mkdir(parents=True, exist_ok=True)
    images = [fetch_image(name) for name in arguments.image]
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    options = sampling(arguments.temperature, arguments.top_p) | {"max_new_tokens": arguments.max_new_tokens}
    if arguments.interactive:
        chat(model, processor, images, **options)
    elif arguments.questions is not None:
        paths = Path(arguments.questions), Path(arguments.answers)
        answer_file(model, processor, *paths, arguments.batch_size, **options)
    else:
        conversation = [question(arguments.prompt, len(images))]
        print(generate(model, processor, [conversation], images, **options)[0])


if __name__ == "__main__":
    run_command(main)
