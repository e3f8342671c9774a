"""Asks a LLaVA checkpoint, with or without a LoRA adapter, about pictures.

    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --prompt "What is in this picture?"
    python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --interactive true
    python -m train_llava.infer --model_name_or_path output/run --questions questions.jsonl --answers answers.jsonl

The first prints the answer alone. The second is a chat; `/image FILE` shows it another picture. The third answers a
file of `{"id", "image", "prompt"}` lines in batches and, run again, goes on where it stopped.
"""

import json
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TextStreamer

from train_llava.chat import Chat
from train_llava.cli import device, parse_arguments, run_command
from train_llava.model import BITS_HELP, load_checkpoint
from train_llava.pictures import open_image
from train_llava.records import read_jsonl

MOST_BYTES = 50 << 20  # of a picture from the network


@dataclass
class InferArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    prompt: str | None = field(default=None, metadata={"help": "What to ask."})
    image: list[str] = field(
        default_factory=list,
        metadata={"help": "One or more pictures the question is about: files, http(s) addresses, or - for stdin."},
    )
    interactive: bool = field(default=False, metadata={"help": "Chat in the terminal; an empty line ends it."})
    questions: str | None = field(
        default=None, metadata={"help": "A .jsonl file of questions; pictures are named relative to it."}
    )
    answers: str | None = field(default=None, metadata={"help": "The .jsonl file to write their answers to."})
    batch_size: int = field(default=16, metadata={"help": "Questions answered at once."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": BITS_HELP})
    max_new_tokens: int = field(default=128, metadata={"help": "The longest answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest answer; above: draw one."})
    top_p: float = field(default=1.0, metadata={"help": "Draw among the likeliest tokens that sum up to this."})

    def __post_init__(self) -> None:
        if [self.prompt is not None, self.interactive, self.questions is not None].count(True) != 1:
            raise ValueError("give one of --prompt, --interactive true and --questions")
        if (self.questions is None) != (self.answers is None):
            raise ValueError("--questions and --answers go together")


def load_model(
    model_name_or_path: str, adapter_name_or_path: str | None = None, bits: int | None = None
) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """Opens a checkpoint, and an adapter on top of it, on the accelerator where there is one.

    Raises:
        ValueError: either cannot be opened, or the adapter is not one of this model's.
    """
    model, processor = load_checkpoint(model_name_or_path, bits=bits)
    if adapter_name_or_path is not None:
        model = load_adapter(model, adapter_name_or_path, model_name_or_path)
    if not bits:
        model = model.to(device())
    return model.eval(), processor


def load_adapter(model: LlavaForConditionalGeneration, adapter_name_or_path: str, model_name: str) -> PeftModel:
    """Puts a LoRA adapter on a model, and makes sure that every tensor of it found its place there."""
    try:
        saved = load_peft_weights(adapter_name_or_path, device="cpu")
    except (OSError, ValueError) as error:
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub") from error
    try:
        adapted = PeftModel.from_pretrained(model, adapter_name_or_path)
        fits = get_peft_model_state_dict(adapted).keys() == saved.keys()
    except (RuntimeError, ValueError):  # shapes that differ; names that are not there
        fits = False
    if not fits:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
    return adapted


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """The arguments of `model.generate` for drawing an answer, or, at temperature 0, for the likeliest one."""
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p}


@torch.inference_mode()
def generate(
    model: LlavaForConditionalGeneration | PeftModel,
    processor: LlavaProcessor,
    conversations: list[list[dict[str, Any]]],
    images: list[Image.Image],
    max_new_tokens: int = 128,
    **options: Any,
) -> list[str]:
    """Answers to conversations that end with a question; `images` in the order of their `<image>` tokens.

    Greedy, unless `options`, which go to `model.generate`, say something else (see `sampling`).
    """
    inputs = Chat(processor).prompts(conversations, images).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False} | options)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def fetch_image(name: str) -> Image.Image:
    """The picture at a path or an http(s) address, or, for "-", on standard input.

    Raises:
        OSError, ValueError: it is not there, or no picture.
    """
    if name == "-":
        return open_image(sys.stdin.buffer.read(), "the picture on standard input")
    if name.startswith(("http://", "https://")):
        with urllib.request.urlopen(name, timeout=30) as response:
            content = response.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"{name} is larger than {MOST_BYTES >> 20} MB")
        return open_image(content, name)
    return open_image(Path(name))


def question(text: str, pictures: int) -> dict[str, Any]:
    """A user's message with so many pictures in front of the text."""
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def reply(text: str) -> dict[str, Any]:
    """The model's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def chat(
    model: LlavaForConditionalGeneration | PeftModel,
    processor: LlavaProcessor,
    images: list[Image.Image],
    **options: Any,
) -> None:
    """Questions from the terminal, answers as they come; the whole conversation is kept."""
    messages, new = [], len(images)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            text = ""
        if not text:
            return
        if text.startswith("/image "):
            try:
                images.append(fetch_image(text.removeprefix("/image ").strip()))
                new += 1
            except (OSError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
            continue
        messages.append(question(text, new))
        new = 0
        (answer,) = generate(model, processor, [messages], images, streamer=streamer, **options)
        messages.append(reply(answer))


def answer_file(
    model: LlavaForConditionalGeneration | PeftModel,
    processor: LlavaProcessor,
    questions: Path,
    answers: Path,
    batch_size: int,
    **options: Any,
) -> None:
    """Answers a file of questions; those that the file of answers has already are not asked again.

    Raises:
        OSError, ValueError: a file, a line or a picture cannot be read; what was answered before is kept.
    """
    asked = []
    for number, line in enumerate(read_jsonl(questions)):
        if not isinstance(line.get("prompt"), str):
            raise ValueError(f"{questions}, question {number + 1}, has no prompt")
        named = line.get("image", [])
        asked.append((str(line.get("id", number)), line["prompt"], [named] if isinstance(named, str) else named))
    done = set()
    if answers.exists():
        whole = answers.read_text(encoding="utf-8").rpartition("\n")[0]  # a line without its end was cut off by a kill
        answers.write_text(whole + "\n" if whole else "", encoding="utf-8")
        done = {line["id"] for line in read_jsonl(answers)}
    left = [entry for entry in asked if entry[0] not in done]
    with open(answers, "a", encoding="utf-8") as file, tqdm(total=len(asked), initial=len(asked) - len(left)) as bar:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            images = [open_image(questions.parent / name) for _, _, names in batch for name in names]
            conversations = [[question(prompt, len(names))] for _, prompt, names in batch]
            found = generate(model, processor, conversations, images, **options)
            for (question_id, prompt, _), answer in zip(batch, found, strict=True):
                line = {"id": question_id, "prompt": prompt, "answer": answer}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(batch))


def main() -> None:
    (arguments,) = parse_arguments(InferArguments)
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
