"""The chat page answers as `infer` does, stops when asked to, keeps sessions apart and uses no network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import unescape
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from conftest import random_adapter
from PIL import Image, ImageChops

from train_llava import web_demo
from train_llava.chat import Chat
from train_llava.cli import run_command
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import assistant_message, generate, prepare, user_message
from train_llava.evaluation.web_look import DOTS, TEXTS, Turn, example_pictures, header, translations
from train_llava.modeling.adapter import load_model

pytest.importorskip("gradio", reason="the page needs gradio")
from gradio_client import Client, handle_file

ROOT = Path(__file__).parent.parent
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver") and find_spec("selenium")),
    reason="no browser here: apt-get install chromium chromium-driver, pip install selenium",
)
LONG = {"max_new_tokens": 300, "min_new_tokens": 300}  # long enough to be stopped


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory) -> Path:
    """A LoRA adapter of random matrices: it changes every answer, and with this seed its own have spaces."""
    return random_adapter(llava, tmp_path_factory.mktemp("adapter") / "run", seed=4)


@pytest.fixture(scope="module")
def pictures(corpus) -> list[str]:
    return [str(corpus / "images_dl" / f"{i}.png") for i in range(3)]


@pytest.fixture(scope="module")
def impostors(tmp_path_factory) -> tuple[Path, Path]:
    """A text file under its own name and under that of a picture."""
    folder = tmp_path_factory.mktemp("impostors")
    for name in ("notes.txt", "notes.png"):
        (folder / name).write_text("no picture")
    return folder / "notes.txt", folder / "notes.png"


def replies(model: Any, processor: Any, asked: list[tuple[str, list[str]]], **options: Any) -> list[str]:
    """The answers of `infer` to one question after another."""
    messages, images, found = [], [], []
    for text, files in asked:
        images += [open_image(file) for file in files]
        messages.append(user_message(text, len(files)))
        (said,) = generate(model, processor, [messages], images, **options)
        messages.append(assistant_message(said))
        found.append(said)
    return found


def finish(model: Any, processor: Any, turns: list[Turn], **options: Any) -> list[str]:
    """Answers the last turn; returns every text that the first chat showed meanwhile."""
    seen = []
    for _ in web_demo.answer(model, processor, turns, Event(), Lock(), **options):
        seen.append(turns[-1].answers[0])
    return seen


def is_beginning(part: str, whole: str) -> bool:
    """Whether an answer is the beginning of another, except for an incomplete last character."""
    return 0 < len(part) < len(whole) and whole.startswith(part.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_the_answers_equal_those_of_infer_with_and_without_the_adapter(llava, adapter, pictures):
    base, processor = load_model(str(llava))
    adapted, _ = load_model(str(llava), str(adapter))
    asked = [("What is this?", pictures[:1]), ("And these?", pictures[1:]), ("Where is Paris?", [])]
    ours, theirs = (replies(model, processor, asked, max_new_tokens=60) for model in (adapted, base))
    assert len({*ours, *theirs}) == 6
    turns, alone, seen = [], [], []
    for i, (text, files) in enumerate(asked):
        turns.append(Turn(text, files, ["", ""]))
        seen += finish(adapted, processor, turns, max_new_tokens=60)
        assert turns[-1].answers == [ours[i], theirs[i]]
        alone.append(Turn(text, files, [""]))
        finish(base, processor, alone, max_new_tokens=60)
        assert alone[-1].answers == [theirs[i]]
    assert any(is_beginning(part, whole) for part, whole in pairwise(seen))  # they grew word by word


def test_stop_ends_an_answer_and_the_next_question_works(llava, adapter, pictures):
    model, processor = load_model(str(llava), str(adapter))
    (whole,) = replies(model, processor, [("What is this?", pictures[:1])], **LONG)
    turns, stop, lock = [Turn("What is this?", pictures[:1], ["", ""])], Event(), Lock()
    growing = web_demo.answer(model, processor, turns, stop, lock, **LONG)
    while not turns[0].answers[0]:
        next(growing)
    stop.set()
    assert sum(1 for _ in growing) < 290
    assert is_beginning(turns[0].answers[0], whole)
    assert turns[0].answers[1] == ""
    assert not lock.locked()
    turns.append(Turn("Where is Paris?", [], ["", ""]))
    finish(model, processor, turns, max_new_tokens=8)
    images = [open_image(pictures[0])]
    first, said = user_message("What is this?", 1), turns[0].answers[0]
    asked = [
        [first, assistant_message(said), user_message("Where is Paris?", 0)],
        [user_message("Where is Paris?", 1)],
    ]
    for column, around in ((0, model), (1, load_model(str(llava))[0])):
        assert web_demo.prompt(turns, column) == asked[column]
        assert generate(around, processor, [asked[column]], images, 8) == [turns[1].answers[column]]
    assert [len(web_demo.shown(turns, column)) for column in (0, 1)] == [4, 4]
    answers = [message["content"][0]["text"] for message in web_demo.shown(turns, 1, waiting=True)[1::2]]
    assert answers == ["", turns[1].answers[1]]  # a stopped answer shows no dots
    turns.append(Turn("What?", [], ["a<b", ""]))
    answers = [web_demo.shown(turns, column, waiting=True)[-1]["content"][0]["text"] for column in (0, 1)]
    assert answers == ["a&lt;b", DOTS]


def test_an_answers_boxes_and_points_are_drawn_on_the_last_picture(llava, tmp_path, monkeypatch):
    """In what the model sees of a picture twice as wide as high, 0 to 1000 is the middle half of its width."""
    Image.new("RGB", (400, 200), "white").save(tmp_path / "wide.png")
    model, processor = load_model(str(llava))
    turns = [Turn("Where is the cat?", [str(tmp_path / "wide.png")], [""])]
    monkeypatch.setattr(web_demo, "stream", lambda *_, **__: iter(["At [0, 250, 500, 750], not [1200, 1]."]))
    finish(model, processor, turns)
    text, picture = web_demo.shown(turns, 0)[-1]["content"]
    assert text["text"] == turns[0].answers[0]
    drawing = open_image(picture["path"])
    red = ImageChops.invert(drawing.getchannel("G")).getbbox()
    shares = [end / drawing.size[i % 2] for i, end in enumerate(red)]
    assert shares == pytest.approx([0.25, 0.25, 0.5, 0.75], abs=0.06)  # the line's width, and the corners
    monkeypatch.setattr(web_demo, "stream", lambda *_, **__: iter(["In the years [1990, 2000]."]))
    turns.append(Turn("When?", [], [""]))
    finish(model, processor, turns)
    assert len(web_demo.shown(turns, 0)[-1]["content"]) == 1


def test_a_closed_page_ends_its_answer_and_frees_the_model(llava, pictures):
    model, processor = load_model(str(llava))
    stop, lock = Event(), Lock()
    growing = web_demo.answer(model, processor, [Turn("What?", pictures, [""])], stop, lock, **LONG)
    next(growing)
    assert lock.locked()
    growing.close()
    assert stop.is_set()
    assert lock.acquire(timeout=5)


def test_an_error_in_the_model_reaches_the_caller(llava, pictures, monkeypatch):
    model, processor = load_model(str(llava))
    monkeypatch.setattr(model, "generate", lambda **_: torch.zeros(1) @ torch.zeros(2))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        finish(model, processor, [Turn("What is this?", pictures[:1], [""])])


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        ("", [], "there is no question"),
        ("What is <image>?", [], "the control token <image>"),
        ("yes<|im_start|>", [], "the control token <|im_start|>"),
        ("What is this? " * 300, [], "tokens, pictures included, and the model reads 512"),
        ("What is this?", ["gone.png"], "gone.png does not exist"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_before_the_first_word(llava, text, files, message):
    model, processor = load_model(str(llava))
    with pytest.raises((OSError, ValueError)) as error:
        next(web_demo.answer(model, processor, [Turn(text, files, [""])], Event(), Lock()))
    assert message in str(error.value)


def test_an_answer_ends_when_the_context_is_full(llava):
    model, processor = load_model(str(llava))
    turns = [Turn(" ".join(["What is this?"] * 60), [], [""])]
    (whole,) = replies(model, processor, [(turns[0].text, [])], **LONG)
    finish(model, processor, turns, **LONG)
    assert turns[0].answers == [whole]
    prompt = [{"role": "user", "content": [{"type": "text", "text": turns[0].text}]}]
    assert prepare(Chat(processor), prompt, [], LONG["max_new_tokens"])[1] < LONG["max_new_tokens"]


@pytest.fixture
def page(llava) -> Iterator[Callable[[], Client]]:
    """The page, served; calling it opens a session."""
    model, processor = load_model(str(llava))
    built = web_demo.make_page(model, processor, "tiny", translations(model, "tiny", []), 8, [])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    _, address, _ = built.launch(server_port=port, prevent_thread_lock=True, quiet=True, share=False)
    yield lambda: Client(address, verbose=False, analytics_enabled=False)
    built.close()


def ask(client: Client, text: str, *files: str | Path, heat: float = 0, name: str = "/ask") -> list[str]:
    """Asks in a session; returns the whole conversation as texts, a picture as its file's name."""
    box = {"text": text, "files": [handle_file(file) for file in files]}
    *_, chat = client.predict(box, heat, api_name=name)
    parts = [part for message in chat for part in message["content"]]
    return [unescape(part["text"]) if part["type"] == "text" else Path(part["file"]).name for part in parts]


def test_sessions_do_not_see_each_other(page, llava, pictures):
    model, processor = load_model(str(llava))
    first, second = page(), page()
    said = replies(model, processor, [("What is this?", pictures[:1]), ("And this?", pictures[1:2])], max_new_tokens=8)
    other = replies(model, processor, [("And this?", [])], max_new_tokens=8)
    told = ["0.png", "What is this?", said[0]]
    assert ask(first, "What is this?", pictures[0]) == told
    assert ask(second, "And this?") == ["And this?", *other]
    assert ask(first, "And this?", pictures[1]) == [*told, "1.png", "And this?", said[1]]
    first.predict(api_name="/clear")
    assert ask(first, "And this?") == ["And this?", *other]


def test_a_bad_picture_does_not_change_the_conversation(page, pictures, impostors, monkeypatch):
    client, told = page(), []
    monkeypatch.setattr(web_demo.gr, "Warning", told.append)
    before = ask(client, "What is this?", pictures[0])
    assert ask(client, "And this?", impostors[1]) == before
    (line,) = told
    assert line == "notes.png cannot be read as a picture: it is of no format that Pillow knows"
    assert ask(client, "And this?", pictures[1])[:4] == [*before, "1.png"]


def test_retry_asks_the_last_question_again_and_can_sample(page, pictures):
    client = page()
    assert ask(client, "", name="/retry") == []  # there is none yet
    ask(client, "What is this?", pictures[0])
    greedy = ask(client, "And this?", pictures[1])
    assert ask(client, "", name="/retry") == greedy
    drawn = [ask(client, "", heat=2, name="/retry") for _ in range(3)]
    assert all(told[:-1] == greedy[:-1] for told in drawn)
    assert len({told[-1] for told in drawn}) > 1
    assert ask(client, "", name="/retry") == greedy


def test_both_languages_have_the_same_texts():
    assert TEXTS["en"].keys() == TEXTS["zh"].keys()
    assert all(re.search("[\u4e00-\u9fff]", text) for text in TEXTS["zh"].values())
    assert not any(re.search("[\u4e00-\u9fff]|[{}]", text) for text in TEXTS["en"].values())


def test_the_header_names_the_model_and_its_parts(llava, adapter):
    model, _ = load_model(str(llava))
    text = header(model, "a<b {x}", ["clip", "qwen"], "en")
    assert text.startswith("<h1>a&lt;b &#123;x&#125;<small>a LLaVA: it answers questions about pictures")
    assert text.endswith("<p>Made of clip · qwen</p>")
    total = sum(float(number) for number in re.findall(r"([\d.]+) M<", text))
    assert total == pytest.approx(model.num_parameters() / 1e6, abs=0.016)  # three figures of two decimals
    assert "Vision tower <b>clip " in text
    assert text.count("<li>") == 3
    adapted, _ = load_model(str(llava), str(adapter))
    parts, (added,) = (
        text.split("</li>")[:3],
        re.findall("LoRA 权重 <b>r = 4, (.*) M<", header(adapted, "run", [], "zh")),
    )
    assert header(adapted, "a<b {x}", [], "en").split("</li>")[:3] == parts
    rows = sum(
        sum(m.weight.shape) for m in model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)
    )
    assert float(added) == pytest.approx(4 * rows / 1e6, abs=0.005)


def test_a_waiting_question_shows_how_many_come_first(page, llava, monkeypatch):
    """And all are answered in the end."""
    go_on, first, second, third = Event(), page(), page(), page()

    def slow(model, processor, messages, images, stop, *_, **__):
        while not go_on.wait(0.05):
            yield "word"
        yield "said"

    monkeypatch.setattr(web_demo, "stream", slow)
    box = {"text": "What?", "files": []}
    jobs = []
    for client, ahead in ((first, 0), (second, 1), (third, 2)):
        jobs.append(client.submit(box, 0, api_name="/ask"))
        until(lambda: jobs[-1].outputs())
        status, chat = jobs[-1].outputs()[0][-2:]
        assert (ahead == 0) == (status == "")
        assert status.endswith(f"{ahead}</p>" if ahead else "")
        if ahead:
            assert chat[-1]["content"][0]["text"] == DOTS
    go_on.set()
    for job in jobs:
        status, chat = job.result(timeout=60)[-2:]
        assert (status, chat[-1]["content"][0]["text"]) == ("", "said")


# the page with a model that repeats the question word by word and counts its answers
ECHO = """
from itertools import count
from train_llava import web_demo
times = count(1)
def echo(model, processor, messages, *_, **__):
    words = messages[-1]["content"][-1]["text"].split(" ") + [str(next(times))]
    yield from (" ".join(words[:i]) for i in range(len(words) + 1))
web_demo.stream = echo
web_demo.main()
"""


def command(*arguments: str | Path, code: str | None = None) -> list[str]:
    begin = ["-m", "train_llava.web_demo"] if code is None else ["-c", code]
    return [sys.executable, *begin, *map(str, arguments)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--port {taken}", "Address already in use"),
        ("--port 70000", "it has to lie in [1, 65535]"),
        ("--examples {corpus}", "--examples {corpus} has no picture in it"),
        ("--examples nowhere", "No such file or directory"),
    ],
)
def test_a_bad_argument_ends_the_start_with_a_message(llava, corpus, monkeypatch, arguments, message):
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {"taken": server.getsockname()[1], "corpus": corpus}
        words = f"--model_name_or_path {llava} {arguments}".format(**names).split()
        monkeypatch.setattr(sys, "argv", ["web_demo", *words])
        with pytest.raises((OSError, ValueError), match=re.escape(message.format(**names))):
            web_demo.main()


def test_every_argument_reaches_the_page(llava, adapter, corpus, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "cba":
        for i in range(4):
            shutil.copy(corpus / "images_dl" / "0.png", folder / f"{name}{i}.png")
    launched, opened, made = {}, [], []
    page = SimpleNamespace(launch=lambda **settings: launched.update(settings))
    monkeypatch.setattr(web_demo, "load_model", lambda *given: opened.append(given) or ("model", "processor"))
    monkeypatch.setattr(web_demo, "make_page", lambda *given: made.append(given) or page)
    monkeypatch.setattr(web_demo, "translations", lambda *given: given)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    with socket.create_server(("127.0.0.3", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--model_name_or_path", llava, "--adapter_name_or_path", adapter, "--host", "127.0.0.3",
                 "--port", port, "--max_new_tokens", 7, "--bits", 4, "--examples", folder]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["web_demo", *map(str, arguments)])
    web_demo.main()
    examples = [str(folder / f"{name}{i}.png") for name in "abc" for i in range(4)][:10]
    assert opened == [(str(llava), str(adapter), 4)]
    words = ("model", adapter.name, [llava.name])
    assert made == [("model", "processor", adapter.name, words, 7, examples)]
    expected = {
        "server_name": "127.0.0.3", "server_port": port, "share": False, "enable_monitoring": False,
        "max_file_size": 20 << 20, "allowed_paths": examples, "i18n": words, "footer_links": [],
    }  # fmt: skip
    assert {name: launched[name] for name in expected} == expected
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,localhost,127.0.0.1,127.0.0.3"
    assert capsys.readouterr().out == f"http://127.0.0.3:{port}\n"


def test_the_examples_are_the_held_out_pictures_of_the_run(corpus, tmp_path):
    assert example_pictures(None, str(tmp_path)) == []
    pictures = example_pictures(str(corpus / "images_dl"), str(tmp_path))
    for data, shown in ((corpus, pictures), (tmp_path, []), ("gone", []), ("null", [])):
        (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: m\neval_data_path: {data}\n")
        assert example_pictures(None, str(tmp_path)) == shown


@pytest.mark.parametrize(
    ("words", "message"),
    [("--port 0", "[1, 65535]"), ("--port 65536", "[1, 65535]"), ("--max_new_tokens 0", "[1, inf)")],
)
def test_a_number_outside_its_interval_is_refused(llava, monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["web_demo", "--model_name_or_path", str(llava), *words.split()])
    with pytest.raises(ValueError, match=re.escape(message)):
        web_demo.main()


def test_a_port_in_use_ends_the_command_in_one_line(llava, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["web_demo", "--model_name_or_path", str(llava), "--port", str(port)])
        with pytest.raises(SystemExit) as exit_info:
            run_command(web_demo.main)
    assert capsys.readouterr() == ("", "")
    (line,) = exit_info.value.code.splitlines()  # Python prints it and exits with code 1
    assert line.startswith("error: [Errno 98] Address already in use")


def test_without_gradio_the_message_names_the_remedy(llava, monkeypatch):
    monkeypatch.setattr(web_demo, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["web_demo", "--model_name_or_path", str(llava)])
    with pytest.raises(ValueError, match="pip install gradio"):
        web_demo.main()


@contextmanager
def served(*arguments: str | Path, code: str | None = None) -> Iterator[str]:
    """The command, running; gives the page's address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = command(*arguments, "--port", port, code=code)
    nowhere = os.environ | {"http_proxy": "http://127.0.0.1:9"}  # the page asks itself, past any proxy
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=nowhere) as process:
        address = process.stdout.readline().strip()
        try:
            for _ in range(600):  # it is printed a moment before it is served
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
    assert address == f"http://127.0.0.1:{port}"


@contextmanager
def browser(address: str, language: str = "en-US") -> Iterator[Any]:
    """A new browser with the page open."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,900"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(address)
        until(lambda: find(driver, "textarea"))
        yield driver
    finally:
        driver.quit()


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Waits until a condition is true; returns its value."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def find(driver: Any, selector: str) -> list[Any]:
    return driver.find_elements("css selector", selector)


def button(driver: Any, key: str) -> Any:
    """A button by its key; its label is in the browser's language."""
    language = "zh" if driver.execute_script("return navigator.language").startswith("zh") else "en"
    (found,) = driver.find_elements("xpath", f"//button[normalize-space()='{TEXTS[language][key]}']")
    return found


def texts_of(driver: Any, role: str, column: int = 0) -> list[str]:
    """The texts of one role in a chat on the page, letter by letter."""
    script = """
        const chat = document.querySelectorAll('[role=log]')[arguments[1]];
        const texts = chat ? chat.querySelectorAll(`[data-testid=${arguments[0]}] .message-content`) : [];
        return [...texts].map(text => text.textContent)"""
    return driver.execute_script(script, role, column)


def type_in(driver: Any, text: str, *files: str | Path) -> None:
    """Uploads pictures, types a question and sends it."""
    if files:
        (chooser,) = find(driver, "input[type=file]")
        driver.execute_script("arguments[0].value = ''", chooser)  # or those of the last time are sent again
        chooser.send_keys("\n".join(map(str, files)))
        until(lambda: len(find(driver, ".thumbnail-item")) == len(files))
    (box,) = find(driver, "textarea")
    box.send_keys(text)
    find(driver, "[data-testid=submit-button]")[0].click()


def warnings(driver: Any) -> list[str]:
    return [line for toast in find(driver, "[data-testid=toast-body]") for line in toast.text.splitlines()[-1:]]


def hosts(driver: Any) -> set[str]:
    """The hosts of all requests of the page."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname for url in sent if not url.startswith(("data:", "blob:"))}


def idle(driver: Any, answers: int) -> bool:
    """Whether this many answers are there and complete."""
    return len(texts_of(driver, "bot")) == answers and button(driver, "retry").is_enabled()


@needs_browser
def test_a_browser_chats_and_shows_errors(llava, pictures, impostors):
    model, processor = load_model(str(llava))
    asked = [("What is this?", pictures[:1]), ("And these?", pictures[1:]), ("Where is Paris?", [])]
    said = replies(model, processor, asked, max_new_tokens=12)
    with served("--model_name_or_path", llava, "--max_new_tokens", "12") as address, browser(address) as driver:
        for i, (text, files) in enumerate(asked[:2]):
            type_in(driver, text, *files)
            until(lambda i=i: idle(driver, i + 1))
            assert texts_of(driver, "bot") == said[: i + 1]
        assert texts_of(driver, "user") == ["What is this?", "And these?"]
        assert len(find(driver, "[role=log] img")) == 3
        button(driver, "retry").click()
        until(lambda: idle(driver, 2))
        assert texts_of(driver, "bot") == said[:2]
        with browser(address) as other:
            assert texts_of(other, "user") == []
            assert not any(button(other, key).is_enabled() for key in ("retry", "clear", "stop"))
            assert "0.png" not in other.page_source
            type_in(other, "Where is Paris?")
            until(lambda: idle(other, 1))
            assert texts_of(other, "bot") == replies(model, processor, asked[2:], max_new_tokens=12)
        find(driver, "input[type=file]")[0].send_keys(str(impostors[0]))
        until(lambda: warnings(driver) == ["Invalid file type: notes.txt. Only image allowed."])
        driver.refresh()  # which begins a conversation
        until(lambda: find(driver, "textarea"))
        type_in(driver, *asked[2][:1])
        until(lambda: idle(driver, 1))
        type_in(driver, "What is this?", impostors[1])
        line = "notes.png cannot be read as a picture: it is of no format that Pillow knows"
        until(lambda: warnings(driver) == [line])
        until(lambda: idle(driver, 1))
        assert texts_of(driver, "bot") == replies(model, processor, asked[2:], max_new_tokens=12)
        button(driver, "clear").click()
        until(lambda: texts_of(driver, "user") == [] and not find(driver, ".thumbnail-item"))
        until(lambda: not any(button(driver, key).is_enabled() for key in ("retry", "clear")))
        type_in(driver, *asked[0][:1], *pictures[:1])
        until(lambda: idle(driver, 1))
        assert texts_of(driver, "bot") == said[:1]
        assert hosts(driver) == {"127.0.0.1"}


@needs_browser
def test_a_browser_shows_both_chats_and_stops_them(llava, adapter, pictures):
    adapted, processor = load_model(str(llava), str(adapter))
    base, _ = load_model(str(llava))
    ours, theirs = (replies(m, processor, [("Where is Paris?", [])], max_new_tokens=200)[0] for m in (adapted, base))
    arguments = ["--model_name_or_path", llava, "--adapter_name_or_path", adapter, "--max_new_tokens", "200"]
    examples = Path(pictures[0]).parent
    with served(*arguments, "--examples", examples) as address, browser(address) as driver:
        type_in(driver, "Where is Paris?")
        until(lambda: idle(driver, 1))
        assert [texts_of(driver, "bot", column) for column in (0, 1)] == [[ours], [theirs]]
        for width in (
            500,
            390,
        ):  # nothing is wider than the page; the chats stand side by side, or one above the other
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            left, right = (chat.rect for chat in find(driver, "#chats > .block"))
            assert driver.execute_script("return document.documentElement.scrollWidth") == width
            assert left["width"] == right["width"] > 230
            assert (left["y"] == right["y"]) == (width == 500)
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        button(driver, "retry").click()
        until(lambda: "".join(texts_of(driver, "bot")) not in ("", ours))
        button(driver, "stop").click()
        until(lambda: idle(driver, 1))
        (part,) = texts_of(driver, "bot")
        assert is_beginning(part, ours)
        assert "".join(texts_of(driver, "bot", 1)) == ""
        button(driver, "clear").click()
        until(lambda: texts_of(driver, "user") == [])
        find(driver, "#examples button")[0].click()  # an example joins the question
        until(lambda: find(driver, ".thumbnail-item"))
        type_in(driver, "Where is Paris?")
        until(lambda: idle(driver, 1))
        expected = [
            replies(m, processor, [("Where is Paris?", pictures[:1])], max_new_tokens=200) for m in (adapted, base)
        ]
        assert [texts_of(driver, "bot", column) for column in (0, 1)] == expected


@needs_browser
def test_leaving_the_page_leaves_the_queue(page, monkeypatch):
    def endless(model, processor, messages, *_, **__):
        while messages[-1]["content"][-1]["text"] == "endless":
            yield "word"
            time.sleep(0.05)
        yield "said"

    monkeypatch.setattr(web_demo, "stream", endless)
    client = page()
    with browser(client.src) as answered:
        type_in(answered, "endless")
        until(lambda: texts_of(answered, "bot") == ["word"])
        with browser(client.src) as waiting:
            type_in(waiting, "endless")
            until(lambda: find(waiting, "#waiting p"))
    job = client.submit({"text": "What?", "files": []}, 0, api_name="/ask")
    assert job.result(timeout=60)[-1][-1]["content"][0]["text"] == "said"


@pytest.fixture(scope="module")
def echo(llava) -> Iterator[str]:
    """The address of a page with a model that repeats the question."""
    with served("--model_name_or_path", llava, code=ECHO) as address:
        yield address


@needs_browser
@pytest.mark.parametrize("language", ["en-US", "zh-CN", "de", "ja"])
def test_a_browser_shows_texts_unchanged_and_hides_harmful_buttons(echo, pictures, language):
    texts = [
        'a<b and 3   <img src="http://127.0.0.2/x.png"> <script>1</script> <!-- -->',
        '&lt; &amp;lt; $$x^2$$ \\(y\\) **bold** `code` <b>bold</b> src="/file',
    ]
    with browser(echo, language) as driver:
        assert driver.execute_script("return navigator.language") == language
        words = TEXTS["zh" if language == "zh-CN" else "en"]
        assert f"{words['made_of']}clip · qwen2" in find(driver, "#model")[0].text
        for i, text in enumerate(texts):
            type_in(driver, text, *pictures[:i])
            until(lambda i=i: idle(driver, i + 1))
        before = texts_of(driver, "bot")
        button(driver, "retry").click()
        until(lambda: texts_of(driver, "bot")[1].startswith(texts[1] + " ") and texts_of(driver, "bot") != before)
        until(lambda: idle(driver, 2))
        said = texts_of(driver, "bot")
        assert [answer.rpartition(" ")[0] for answer in said] == texts
        assert texts_of(driver, "user") == texts
        visible = [element.text for element in find(driver, ".message-content")]
        assert visible == [texts[0], said[0], texts[1], said[1]]
        buttons = [element for element in find(driver, ".block:has([role=log]) button") if element.is_displayed()]
        script = "return arguments[0].filter(button => !button.closest('a, .image-container'))"
        copies = driver.execute_script(script, buttons)
        assert len(copies) == 3  # of the first question and of both answers
        assert len(buttons) == 6  # a picture is shown larger by two, and downloaded by one
        (box,) = find(driver, "textarea")
        for copy, text in zip(copies, [texts[0], *said], strict=True):
            copy.click()
            box.clear()
            box.send_keys("\ue009v\ue009")  # Control and v
            until(lambda text=text: box.get_attribute("value") == text)
        assert hosts(driver) == {"127.0.0.1"}
