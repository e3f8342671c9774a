"""A chat page for a LLaVA checkpoint, made with Gradio: pictures, questions, follow-ups, answers as they grow.

    python -m train_llava.web_demo --model_name_or_path output/run
    python -m train_llava.web_demo --model_name_or_path output/llava --adapter_name_or_path output/run

With an adapter the page shows two chats side by side: the model with it and the model without it. Its texts are
in English or Chinese, as the browser asks. Only this machine can open it, unless --host says otherwise. It loads
nothing from the network.
"""

import os
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock, Thread
from time import sleep
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import BITS_HELP, parse_arguments, parse_first, run_command

MAX_EXAMPLES = 10


@dataclass
class WebDemoArguments:
    model_name_or_path: str = HfArg(help="A LLaVA checkpoint, a folder or a hub id.")
    adapter_name_or_path: str | None = HfArg(default=None, help="A LoRA adapter trained on that model.")
    host: str = HfArg(default="127.0.0.1", help="0.0.0.0 serves the page to other machines, too.")
    port: int = HfArg(default=7860, help="The port of the page.")
    max_new_tokens: int = HfArg(default=256, help="The longest answer, in tokens.")
    bits: Literal[4, 8] | None = HfArg(default=None, help=BITS_HELP)
    examples: str | None = HfArg(default=None, help="A folder of pictures to choose from; default: held-out ones.")


if __name__ == "__main__":
    parse_first(WebDemoArguments)  # before the imports that take seconds

import torch
from peft import PeftModel
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from train_llava.chat import Processor, chat_of
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import answer_text, assistant_message, prepare, sampling, user_message
from train_llava.evaluation.web_look import Turn, drawing_of, example_pictures, lay_out, shown, style, translations
from train_llava.model import Llava
from train_llava.modeling.adapter import load_model
from train_llava.training.cards import ancestors, short_name

if find_spec("gradio"):
    import gradio as gr


def prompt(turns: list[Turn], column: int) -> list[dict[str, Any]]:
    """The messages of one chat, up to the last question. Pictures of unanswered ones move to the next."""
    messages, pictures = [], 0
    for turn in turns:
        pictures += len(turn.files)
        if turn.answers[column] or turn is turns[-1]:
            messages += [user_message(turn.text, pictures), assistant_message(turn.answers[column])]
            pictures = 0
    return messages[:-1]


def stream(
    model: Llava | PeftModel,
    processor: Processor,
    messages: list[dict[str, Any]],
    images: list[Image.Image],
    stop: Event,
    lock: Lock,
    with_adapter: bool = True,
    max_new_tokens: int = 256,
    **options: Any,
) -> Iterator[str]:
    """Yields the answer to a conversation as it grows, and at last the answer of `generate`; `stop` ends it.

    A ValueError says why the conversation cannot be answered; see `prepare`.
    """
    chat = chat_of(processor)
    inputs, options["max_new_tokens"] = prepare(chat, messages, images, max_new_tokens)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def is_stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), stop.is_set(), device=ids.device)

    options["stopping_criteria"] = StoppingCriteriaList([is_stopped])
    output = Future()

    def run() -> None:
        try:
            # The adapter is switched off for the whole model: only one answer may be generated at a time
            with lock, torch.inference_mode(), nullcontext() if with_adapter else model.disable_adapter():
                output.set_result(model.generate(**inputs, streamer=streamer, **options))
        except Exception as error:  # of any type: the page must not wait for ever
            output.set_exception(error)
            streamer.end()

    Thread(target=run, daemon=True).start()
    text = ""
    yield text  # from here on there is something to stop
    for words in streamer:
        text += words
        # The page shows words more slowly than a fast model writes them
        if words and streamer.text_queue.empty():
            yield text.strip()
    # Decoded as a whole, an answer can differ in a space, or in a character of several tokens
    yield answer_text(chat, output.result()[0, inputs["input_ids"].shape[1] :].tolist())


def answer(
    model: Llava | PeftModel, processor: Processor, turns: list[Turn], stop: Event, lock: Lock, **options: Any
) -> Iterator[None]:
    """Answers the last turn, in one chat after the other; yields whenever an answer has grown.

    A ValueError says which picture cannot be read, or why the question cannot be answered.
    """
    if not turns[-1].text:
        raise ValueError("there is no question yet")

    # Every picture of the conversation, in order
    images, chat = [], chat_of(processor)
    for turn in turns:
        for file in turn.files:
            try:
                images.append(open_image(file, min_side=chat.min_side))
            except (OSError, ValueError) as error:  # named without the folder of uploads
                raise ValueError(str(error).replace(file, Path(file).name)) from error

    # The first chat is the one with the adapter
    answers = turns[-1].answers
    try:
        for column in range(len(answers)):
            if stop.is_set():
                break
            messages, with_adapter = prompt(turns, column), column == 0
            for text in stream(model, processor, messages, images, stop, lock, with_adapter, **options):
                answers[column] = text
                yield
            # Boxes and points, on the last picture
            if images and (file := drawing_of(answers[column], images[-1], chat.seen_part(images[-1].size))):
                turns[-1].drawings[column] = file
                yield
    finally:
        stop.set()  # also when the page was closed meanwhile


def make_page(
    model: Llava | PeftModel,
    processor: Processor,
    title: str,
    words: "gr.I18n",
    max_new_tokens: int,
    examples: list[str],
) -> "gr.Blocks":
    """The page. Each session has its own conversation. All share the model, which gives one answer at a time."""
    lock, queue = Lock(), []  # the events that stop the questions, in order; the first is being answered
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        turns, running = gr.State([]), gr.State(None)
        two_chats = isinstance(model, PeftModel)
        chats, status, box, stop, retry, clear, temperature, pictures = lay_out(words, two_chats, examples)

        def show(history: list[Turn], waiting: bool = False) -> dict[Any, Any]:
            return {status: ""} | {chat: shown(history, column, waiting) for column, chat in enumerate(chats)}

        def ask(history: list[Turn], message: dict, heat: float, again: bool = False) -> Iterator[dict]:
            """Answers the question in the box, or the last one `again`. An error leaves everything as it was."""
            # The conversation with a turn that has no answer yet
            again = again and bool(history)
            earlier = history[:-1] if again else history
            question = history[-1] if again else Turn(message["text"].strip(), message["files"], [])
            new_history = [*earlier, Turn(question.text, question.files, [""] * len(chats))]
            stopped = Event()
            started = {running: stopped, stop: gr.update(interactive=True)} | ({} if again else {box: None})
            # Generation refuses an int, which the slider gives for a whole number
            options = sampling(float(heat), 1.0) | {"max_new_tokens": max_new_tokens}
            queue.append(stopped)
            try:
                # Wait until this question is the first in the queue
                while (ahead := queue.index(stopped)) and not stopped.is_set():
                    yield show(new_history, waiting=True) | started | {status: f"<p>{words('waiting')}{ahead}</p>"}
                    sleep(0.3)
                for _ in answer(model, processor, new_history, stopped, lock, **options):
                    yield show(new_history, waiting=True) | started
                yield show(new_history) | {turns: new_history}
            except (OSError, ValueError, RuntimeError) as error:
                gr.Warning(escape(str(error), quote=False))
                yield show(history) | ({} if again else {box: message})
            finally:
                queue.remove(stopped)

        def enable(idle: bool, history: list[Turn]) -> list[Any]:
            has_turns = gr.update(interactive=idle and bool(history))
            return [gr.update(interactive=idle), has_turns, has_turns, gr.update(interactive=False)]

        def add_example(path: str, message: dict[str, Any]) -> dict[str, Any]:
            return message | {"files": [*message["files"], path]}

        # What each control does; while a question is answered, only `stop` is enabled
        everything = [turns, running, box, stop, status, *chats]
        at_once = {"queue": False, "show_progress": "hidden"}
        enabling = {"inputs": turns, "outputs": [box, retry, clear, stop], "api_visibility": "private"} | at_once
        asking = {"inputs": [turns, box, temperature], "outputs": everything, "concurrency_limit": None}
        for event, name, function in ((box.submit, "ask", ask), (retry.click, "retry", partial(ask, again=True))):
            disabled = event(partial(enable, False), **enabling)
            answered = disabled.then(function, **asking, show_progress="hidden", api_name=name)
            answered.then(partial(enable, True), **enabling)
        stop.click(lambda stopped: stopped and stopped.set(), running, queue=False, api_name="stop")
        cleared = clear.click(lambda: {turns: [], box: None} | show([]), None, everything, api_name="clear", **at_once)
        cleared.then(partial(enable, True), **enabling)
        for path, picture in zip(examples, pictures, strict=True):
            picture.click(partial(add_example, path), box, box, api_visibility="private", **at_once)
    return page


def main() -> None:
    (arguments,) = parse_arguments(WebDemoArguments)
    if find_spec("gradio") is None:
        raise ValueError("the page needs a package that is not installed: pip install gradio")

    # A port in use is reported before the model is loaded
    socket.create_server((arguments.host, arguments.port)).close()
    name = arguments.adapter_name_or_path or arguments.model_name_or_path
    examples = example_pictures(arguments.examples, name)[:MAX_EXAMPLES]
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)

    # An adapter without a card has at least its base model
    base = [short_name(arguments.model_name_or_path)] if arguments.adapter_name_or_path else []
    words = translations(model, short_name(name), ancestors(name)[:-1] or base)
    page = make_page(model, processor, short_name(name), words, arguments.max_new_tokens, examples)

    # Gradio asks its own page for an answer, which no proxy can give
    for variable in ("no_proxy", "NO_PROXY"):
        hosts = [os.environ.get(variable), "localhost", "127.0.0.1", arguments.host]
        os.environ[variable] = ",".join(filter(None, hosts))
    print(f"http://{arguments.host}:{arguments.port}", flush=True)
    settings = {"share": False, "quiet": True, "ssr_mode": False, "enable_monitoring": False, "footer_links": []}
    settings |= {"max_file_size": 20 << 20, "allowed_paths": examples, "i18n": words}  # 20 MB a picture
    page.launch(server_name=arguments.host, server_port=arguments.port, **settings, **style())


if __name__ == "__main__":
    run_command(main)
