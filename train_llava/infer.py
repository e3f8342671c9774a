"""Asks a LLaVA checkpoint, with or without a LoRA adapter, about pictures.

    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --prompt "What is in this picture?"
    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --interactive true
    python -m train_llava.infer --model_name_or_path output/run --questions questions.jsonl --answers answers.jsonl

The first prints the answer alone. The second is a chat; `/image FILE` adds a picture, an empty line ends it. The
third answers a file of questions (see questions.py) in batches. Run again, it continues where it stopped.
"""

import string
import sys
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import BATCH, BITS_HELP, NEW_TOKENS, parse_arguments, parse_first, run_command
from train_llava.common.checks import ADDRESSES, CHOICES_HELP, check_number, split_choices


@dataclass
class InferArguments:
    model_name_or_path: str = HfArg(help="A LLaVA checkpoint, a folder or a hub id.")
    prompt: str | None = HfArg(default=None, help="The question.")
    image: list[str] = HfArg(default_factory=list, help="Its pictures: files, http(s) addresses, or - for stdin.")
    interactive: bool = HfArg(default=False, help="Chat; /image FILE adds a picture, /image alone takes it back.")
    choices: str | None = HfArg(default=None, help=f"With --prompt. {CHOICES_HELP}")
    questions: str | None = HfArg(default=None, help="A .jsonl file of questions; its pictures are relative to it.")
    answers: str | None = HfArg(default=None, help="The .jsonl file to write their answers to.")
    batch_size: int = HfArg(default=BATCH, help="Questions answered at once.")
    adapter_name_or_path: str | None = HfArg(default=None, help="A LoRA adapter trained on that model.")
    bits: Literal[4, 8] | None = HfArg(default=None, help=BITS_HELP)
    max_new_tokens: int = HfArg(default=NEW_TOKENS, help="The longest answer, in tokens.")
    temperature: float = HfArg(default=0.0, help="0: the greedy answer; above 0: sample one.")
    top_p: float = HfArg(default=1.0, help="Sample from the most likely tokens up to this probability.")

    def __post_init__(self) -> None:
        if [self.prompt is not None, self.interactive, self.questions is not None].count(True) != 1:
            raise ValueError("give one of --prompt, --interactive true and --questions")
        self.choices = split_choices(self.choices)
        if self.choices and self.prompt is None:
            raise ValueError("--choices goes with --prompt")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("--prompt is empty")
        if (self.questions is None) != (self.answers is None):
            raise ValueError("--questions and --answers go together")
        if self.questions is not None and self.image:
            raise ValueError("--image goes with --prompt or --interactive: questions name their own pictures")
        for name in ("batch_size", "max_new_tokens", "temperature", "top_p"):
            check_number(name, getattr(self, name))


if __name__ == "__main__":
    parse_first(InferArguments)  # before the imports that take seconds

from peft import PeftModel
from PIL import Image
from transformers import TextStreamer

from train_llava.chat import Processor, chat_of
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import assistant_message, choose, generate, sampling, this_process, user_message
from train_llava.evaluation.questions import answer_questions, read_questions, settings_of
from train_llava.model import Llava
from train_llava.modeling.adapter import load_model

MAX_BYTES = 50 << 20  # of a picture from the network


def fetch_image(name: str, min_side: int | None = None) -> Image.Image:
    """The picture at a path, at an http(s) address, in a data URI or, for "-", on standard input.

    `min_side`: see `open_image`. An OSError or ValueError says that it is not there, or no picture.
    """
    if name == "-":
        return open_image(sys.stdin.buffer.read(), "the picture on standard input", min_side)
    if not name.startswith(ADDRESSES):
        return open_image(Path(name), min_side=min_side)
    # From the network; characters that an address cannot hold, such as Chinese, become percent codes
    short = name if len(name) < 200 else f"{name[:60]}…"  # for messages
    address = urllib.parse.quote(name, safe=string.punctuation)
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"{short} gives no picture: {error!r}") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"{short} is larger than {MAX_BYTES >> 20} MB")
    return open_image(content, short, min_side)


def chat(model: Llava | PeftModel, processor: Processor, images: list[Image.Image], **options: Any) -> None:
    """Answers questions from the terminal word by word, with the whole conversation before each.

    "/image FILE" adds a picture to the next question. "/image" alone takes back the pictures added to it.
    """
    messages, new, min_side = [], len(images), chat_of(processor).min_side  # `new`: images of the next question
    while True:
        try:
            # One line of the terminal: a command, or a question
            text = input("> ").strip()
            if not text:
                return
            if text == "/image":
                images, new = images[: len(images) - new], 0
            elif text.startswith("/image "):
                images = [*images, fetch_image(text.removeprefix("/image ").strip(), min_side)]
                new += 1
            else:
                conversation = [*messages, user_message(text, new)]
                streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
                (answer,) = generate(model, processor, [conversation], images, streamer=streamer, **options)
                messages, new = [*conversation, assistant_message(answer)], 0
        except EOFError:
            return
        except Exception as error:  # of any kind: the conversation stays as it was
            print(f"error: {error}", file=sys.stderr)
            # Deleting a character in a terminal may leave half of it; a file would give the same line again
            if isinstance(error, UnicodeDecodeError) and not sys.stdin.isatty():
                return


def answer_file(
    model: Llava | PeftModel,
    processor: Processor,
    questions: Path,
    answers: Path,
    settings: dict[str, Any],
    batch_size: int = BATCH,
) -> None:
    """Answers a file of questions, except those that the file of answers has already.

    An OSError or ValueError says that a file or a line cannot be read, before any question is asked; or that some
    questions cannot be asked, after all others are answered.
    """
    records, chat = read_questions(questions), chat_of(processor)
    if answers.exists() and answers.samefile(questions):
        raise ValueError(f"--answers {answers} is the file of the questions: choose another")

    def open_question(question: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
        return question["messages"], [fetch_image(name, chat.min_side) for name in question["pictures"]]

    lines, refused = answer_questions(model, chat, records, open_question, answers, settings, batch_size)
    # One line for all answers that were cut, one for each question that could not be asked
    cut, limit = sum(line["cut"] for line in lines if line), settings["max_new_tokens"]
    notes = [f"{cut} of {len(records)} answers were cut at --max_new_tokens {limit}"] if cut else []
    reasons = [f"question {entry['id']!r}: {entry['reason']}" for entry in refused]
    if (notes or reasons) and this_process().is_main_process:
        print(*notes, *reasons, sep="\n", file=sys.stderr)
    if refused:
        raise ValueError(f"{len(refused)} of {len(records)} questions could not be asked; {reasons[0]}")


def main() -> None:
    (arguments,) = parse_arguments(InferArguments)
    this_process()  # before the model is opened: each process has a device of its own
    if arguments.answers is not None:
        Path(arguments.answers).absolute().parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    # A chat, a file of questions, or one question
    images = [fetch_image(name, chat_of(processor).min_side) for name in arguments.image]
    options = sampling(arguments.temperature, arguments.top_p) | {"max_new_tokens": arguments.max_new_tokens}
    if arguments.interactive:
        chat(model, processor, images, **options)
    elif arguments.questions is not None:
        files = Path(arguments.questions), Path(arguments.answers)
        answer_file(model, processor, *files, settings_of(arguments, model), arguments.batch_size)
    else:
        conversation = [user_message(arguments.prompt, len(images))]
        print(generate(model, processor, [conversation], images, **options)[0])
        if arguments.choices:
            for choice, share in choose(model, chat_of(processor), conversation, images, arguments.choices).items():
                print(f"{share:.1%}  {choice}")


if __name__ == "__main__":
    run_command(main)
