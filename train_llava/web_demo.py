"""A chat page for a LLaVA checkpoint, made with Gradio: pictures, questions, follow-ups, answers as they come.

    python -m train_llava.web_demo --model_name_or_path output/run
    python -m train_llava.web_demo --model_name_or_path output/llava --adapter_name_or_path output/run --port 7861

With an adapter the page shows two chats side by side: the model with it, and the same model without it. The page is
in English or Chinese, as the browser asks; its texts and its looks are in web_look.py. It is served to this machine
alone, unless --host says otherwise, and takes nothing from the network.
"""

import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from html import escape
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock, Thread
from time import sleep
from typing import Any, Literal

from train_llava.cli import BITS_HELP, parse_arguments, parse_first, run_command
from train_llava.common.checks import check_number

MOST_EXAMPLES = 10


@dataclass
class WebDemoArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 serves the page to other machines, too."})
    port: int = field(default=7860, metadata={"help": "The port of the page."})
    max_new_tokens: int = field(default=256, metadata={"help": "The longest answer, in tokens."})
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": BITS_HELP})
    examples: str | None = field(
        default=None,
        metadata={
            "help": f"A folder of pictures to choose from; its first {MOST_EXAMPLES} are shown, under their names."
        },
    )

    def __post_init__(self) -> None:
        for name in ("port", "max_new_tokens"):
            check_number(name, getattr(self, name))


if __name__ == "__main__":
    parse_first(WebDemoArguments)  # before the imports that take seconds

import torch
from peft import PeftModel
from PIL import Image
from transformers import StoppingCriteriaList, TextIteratorStreamer

from train_llava.chat import Chat, Processor
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import assistant_message, prepare, sampling, user_message
from train_llava.evaluation.web_look import COPY, CSS, DOTS, TEXTS, header
from train_llava.model import Llava
from train_llava.modeling.adapter import load_model
from train_llava.training.cards import ancestors
from train_llava.training.cards import shown as short_name

# Pages that keep uploads in one folder delete each other's when they close. Gradio looks for its folder when imported
UPLOADS = tempfile.TemporaryDirectory(prefix="gradio-")
os.environ["GRADIO_TEMP_DIR"] = UPLOADS.name
if find_spec("gradio"):
    import gradio as gr

MOST_BYTES = 20 << 20  # of an uploaded picture
POLL = 0.3  # seconds between looks at the queue


@dataclass
class Turn:
    """A question with its pictures, and the answer of each chat on the page."""

    text: str
    files: list[str]
    answers: list[str]


def prompt(turns: list[Turn], column: int) -> list[dict[str, Any]]:
    """The messages of one chat, up to the last question.

    An earlier question that this chat was stopped before answering is left out; its pictures come with the next one.
    """
    messages, pictures = [], 0
    for turn in turns:
        pictures += len(turn.files)
        if turn.answers[column] or turn is turns[-1]:
            messages += [user_message(turn.text, pictures), assistant_message(turn.answers[column])]
            pictures = 0
    return messages[:-1]


def shown(turns: list[Turn], column: int, waiting: bool = False) -> list[dict[str, Any]]:
    """One chat as Gradio's Chatbot takes it, which renders every text as HTML, Markdown or not.

    While one is `waiting`, dots stand for an answer that has not begun.
    """
    messages = []
    for turn in turns:
        asked, answered = ({"type": "text", "text": escape(text)} for text in (turn.text, turn.answers[column]))
        if waiting and turn is turns[-1] and not turn.answers[column]:
            answered["text"] = DOTS
        messages.append({"role": "user", "content": [*({"path": file} for file in turn.files), asked]})
        messages.append({"role": "assistant", "content": [answered]})
    return messages


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
    """The answer to a conversation as it grows, and at last as `infer.generate` would give it; `stop` ends it.

    Raises:
        ValueError: the conversation cannot be asked; see `prepare`.
    """
    chat = Chat(processor)
    inputs, options["max_new_tokens"] = prepare(chat, messages, images, max_new_tokens)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options["stopping_criteria"] = StoppingCriteriaList(
        [lambda ids, scores, **_: torch.full((len(ids),), stop.is_set(), device=ids.device)]
    )
    output = Future()

    def run() -> None:
        try:
            # an adapter is switched off for the whole model, so nobody else may generate meanwhile
            with lock, torch.inference_mode(), nullcontext() if with_adapter else model.disable_adapter():
                output.set_result(model.generate(**inputs, streamer=streamer, **options))
        except Exception as error:  # whatever it is, it must not leave the page waiting
            output.set_exception(error)
            streamer.end()

    Thread(target=run, daemon=True).start()
    answered = ""
    yield answered  # there is something to stop
    for piece in streamer:
        answered += piece
        if piece and streamer.text_queue.empty():  # a page takes longer to show a word than a fast model to write it
            yield answered.strip()
    # what the streamer decodes piece by piece can differ from the whole in a space or a character of several tokens
    yield chat.answer(output.result()[0, inputs["input_ids"].shape[1] :].tolist())


def answer(
    model: Llava | PeftModel,
    processor: Processor,
    turns: list[Turn],
    stop: Event,
    lock: Lock,
    **options: Any,
) -> Iterator[None]:
    """Answers the last turn in one chat after the other; yields whenever there is more to read.

    Raises:
        OSError, ValueError: a picture or the question cannot be read.
    """
    turn, images, min_side = turns[-1], [], Chat(processor).min_side
    if not turn.text:
        raise ValueError("there is no question yet")
    for file in [file for turn in turns for file in turn.files]:
        try:
            images.append(open_image(file, min_side=min_side))
        except (OSError, ValueError) as error:  # named as the user knows it, without the folder of uploads
            raise ValueError(str(error).replace(file, Path(file).name)) from error
    try:
        for column in range(len(turn.answers)):
            if stop.is_set():
                break
            asked = prompt(turns, column)
            for answered in stream(model, processor, asked, images, stop, lock, with_adapter=column == 0, **options):
                turn.answers[column] = answered
                yield
    finally:
        stop.set()  # who has closed the page needs no answer


def example_pictures(folder: str) -> list[str]:
    """The first pictures of a folder, by name.

    Raises:
        OSError, ValueError: there is no such folder, or no picture in it.
    """
    kinds = Image.registered_extensions()
    paths = sorted(str(path) for path in Path(folder).absolute().iterdir() if path.suffix.lower() in kinds)
    if not paths:
        raise ValueError(f"--examples {folder} has no picture in it")
    return paths[:MOST_EXAMPLES]


def make_page(
    model: Llava | PeftModel,
    processor: Processor,
    title: str,
    max_new_tokens: int,
    examples: list[str],
    made_of: list[str] | None = None,
) -> tuple["gr.Blocks", "gr.I18n"]:
    """The page, and its texts in the languages it speaks, which `launch` takes.

    A conversation lives in its session's state; the sessions share the model, one answer at a time.
    """
    lock, queue = Lock(), []  # of the questions that wait for the model, the first is being answered
    heads = {language: {"model_header": header(model, title, made_of or [], language)} for language in TEXTS}
    words = gr.I18n(**{language: texts | heads[language] for language, texts in TEXTS.items()})
    labels = ["with_adapter", "without_adapter"] if isinstance(model, PeftModel) else ["chat"]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        turns, running = gr.State([]), gr.State(None)
        gr.HTML(words("model_header"), elem_id="model", padding=False)
        with gr.Row(elem_id="chats"):
            look = {"height": f"calc(100dvh - {400 if examples else 300}px)", "min_height": 240, "buttons": ["copy"]}
            plain = {"render_markdown": False, "latex_delimiters": [], "placeholder": words("nothing_yet")}
            plain["show_label"] = len(labels) > 1
            chats = [gr.Chatbot(label=words(label), **plain, **look) for label in labels]
        status = gr.HTML(elem_id="waiting", padding=False)
        box = gr.MultimodalTextbox(
            placeholder=words("ask_here"),
            file_count="multiple",
            file_types=["image"],
            max_plain_text_length=1 << 20,  # what is pasted beyond it would become a file, and be refused
            show_label=False,
            autofocus=True,
            elem_id="box",
        )
        with gr.Row(elem_id="controls"):
            stop = gr.Button(words("stop"), interactive=False)
            retry, clear = gr.Button(words("retry")), gr.Button(words("clear"))
            temperature = gr.Slider(0, 2, 0, step=0.1, label=words("temperature"), elem_id="temperature")
        with gr.Row(elem_id="examples", visible=bool(examples)):
            pictures = [gr.Button(Path(path).stem.replace("_", " "), icon=path) for path in examples]

        def switch(idle: bool) -> list[Any]:
            return [gr.update(interactive=idle)] * 3 + [gr.update(interactive=False)]

        def show(history: list[Turn], waiting: bool = False) -> dict[Any, Any]:
            return {status: ""} | {chat: shown(history, column, waiting) for column, chat in enumerate(chats)}

        def ask(history: list[Turn], asked: dict[str, Any], heat: float, again: bool = False) -> Iterator[dict]:
            """Answers what is in the box, or the last question, if any, again; a failure leaves all as it was."""
            again = again and bool(history)
            before, turn = (history[:-1], history[-1]) if again else (history, Turn(asked["text"], asked["files"], []))
            grown, event = [*before, Turn(turn.text.strip(), turn.files, [""] * len(chats))], Event()
            # the slider gives whole numbers as such, which generation refuses
            options = sampling(float(heat), 1.0) | {"max_new_tokens": max_new_tokens}
            taken = {running: event, stop: gr.update(interactive=True)} | ({} if again else {box: None})
            queue.append(event)
            try:
                while (ahead := queue.index(event)) and not event.is_set():
                    yield show(grown, True) | taken | {status: f"<p>{words('waiting')}{ahead}</p>"}
                    sleep(POLL)
                for _ in answer(model, processor, grown, event, lock, **options):
                    yield show(grown, True) | taken
                yield show(grown) | {turns: grown}
            except (OSError, ValueError, RuntimeError) as error:
                gr.Warning(escape(str(error), quote=False))
                yield show(history) | ({} if again else {box: asked})
            finally:
                queue.remove(event)

        everything = [turns, running, box, stop, status, *chats]
        quick = {"outputs": [box, retry, clear, stop], "queue": False, "show_progress": "hidden"}
        queued = {"concurrency_limit": None, "show_progress": "hidden"}
        for trigger, name, function in ((box.submit, "ask", ask), (retry.click, "retry", partial(ask, again=True))):
            asked = trigger(partial(switch, False), **quick, api_visibility="private").then(
                function, [turns, box, temperature], everything, **queued, api_name=name
            )
            asked.then(partial(switch, True), **quick, api_visibility="private")
        stop.click(lambda event: event and event.set(), running, queue=False, api_name="stop")
        clear.click(lambda: {turns: [], box: None} | show([]), None, everything, queue=False, api_name="clear")
        for path, picture in zip(examples, pictures, strict=True):
            picture.click(
                lambda asked, path=path: asked | {"files": [*asked["files"], path]},
                box,
                box,
                queue=False,
                show_progress="hidden",
                api_visibility="private",
            )
    return page, words


def main() -> None:
    (arguments,) = parse_arguments(WebDemoArguments)
    if find_spec("gradio") is None:
        raise ValueError("the page needs a package that is not installed: pip install gradio")
    # a port in use is told before a large model has been opened for nothing
    socket.create_server((arguments.host, arguments.port)).close()
    examples = example_pictures(arguments.examples) if arguments.examples is not None else []
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    name = arguments.adapter_name_or_path or arguments.model_name_or_path
    base = [short_name(arguments.model_name_or_path)] if arguments.adapter_name_or_path else []
    made_of = ancestors(name)[:-1] or base  # an adapter without a card has at least its base
    page, words = make_page(model, processor, short_name(name), arguments.max_new_tokens, examples, made_of)
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own page for an answer, which no proxy can give
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1", arguments.host]))
    print(f"http://{arguments.host}:{arguments.port}", flush=True)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=False,
        quiet=True,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=MOST_BYTES,
        allowed_paths=examples,
        footer_links=[],
        css=CSS,
        js=COPY,
        i18n=words,
        theme=gr.themes.Base(
            primary_hue="indigo",
            neutral_hue="slate",
            radius_size="lg",
            font=[gr.themes.Font("system-ui"), gr.themes.Font("sans-serif")],
            font_mono=[gr.themes.Font("monospace")],
        ),
    )


if __name__ == "__main__":
    run_command(main)
