"""Asks a LLaVA checkpoint, with or without a LoRA adapter, about pictures.

    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --prompt "What is in this picture?"
    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --interactive true
    python -m train_llava.infer --model_name_or_path output/run --questions questions.jsonl --answers answers.jsonl

The first prints the answer alone. The second is a chat; `/image FILE` shows it another picture. The third answers a
file of questions (see questions.py) in batches and, run again, goes on where it stopped.
"""

import string
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import BATCH, BITS_HELP, NEW_TOKENS, parse_arguments, parse_first, run_command
from train_llava.common.checks import ADDRESSES, check_number


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
        for name in ("batch_size", "max_new_tokens", "temperature", "top_p"):
            check_number(name, getattr(self, name))


if __name__ == "__main__":
    parse_first(InferArguments)  # before the imports that take seconds

from peft import PeftModel
from PIL import Image
from transformers import TextStreamer

from train_llava.chat import Chat, Processor
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import assistant_message, generate, sampling, this_process, user_message
from train_llava.evaluation.questions import answer_questions, read_questions, settings_of
from train_llava.model import Llava
from train_llava.modeling.adapter import load_model

MAX_BYTES = 50 << 20  # of a picture from the network


def fetch_image(name: str, min_side: int | None = None) -> Image.Image:
    """The picture at a path, an http(s) address or in a data URI, or, for "-", on standard input.

    `min_side`: see `open_image`.

    Raises:
        OSError, ValueError: it is not there, or no picture.
    """
    if name == "-":
        return open_image(sys.stdin.buffer.read(), "the picture on standard input", min_side)
    if not name.startswith(ADDRESSES):
        return open_image(Path(name), min_side=min_side)
    short = name if len(name) < 200 else f"{name[:60]}…"
    try:
        # what an address cannot hold, such as Chinese, goes in percent signs
        with urllib.request.urlopen(urllib.parse.quote(name, safe=string.punctuation), timeout=30) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"{short} gives no picture: {error!r}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{short} is larger than {MAX_BYTES >> 20} MB")
    return open_image(content, short, min_side)


def chat(
    model: Llava | PeftModel,
    processor: Processor,
    images: list[Image.Image],
    **options: Any,
) -> None:
    """Questions from the terminal, answers as they come; the whole conversation is kept.

    "/image FILE" puts a picture before the next question, and "/image" alone takes back those that wait for it.
    """
    messages, new, min_side = [], len(images), Chat(processor).min_side
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
                images = [*images, fetch_image(text.removeprefix("/image ").strip(), min_side)]
                new += 1
                continue
            asked = [*messages, user_message(text, new)]
            streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
            (answer,) = generate(model, processor, [asked], images, streamer=streamer, **options)
            messages, new = [*asked, assistant_message(answer)], 0
        except Exception as error:  # whatever it is, the conversation stays as it was before
            print(f"error: {error}", file=sys.stderr)


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
        return asked[place].messages, [fetch_image(name, chat.min_side) for name in asked[place].pictures]

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
    images = [fetch_image(name, Chat(processor).min_side) for name in arguments.image]
    options = sampling(arguments.temperature, arguments.top_p) | {"max_new_tokens": arguments.max_new_tokens}
    if arguments.interactive:
        chat(model, processor, images, **options)
    elif arguments.questions is not None:
        paths, settings = (Path(arguments.questions), Path(arguments.answers)), settings_of(arguments, model)
        answer_file(model, processor, *paths, settings, arguments.batch_size)
    else:
        conversation = [user_message(arguments.prompt, len(images))]
        print(generate(model, processor, [conversation], images, **options)[0])


if __name__ == "__main__":
    run_command(main)
