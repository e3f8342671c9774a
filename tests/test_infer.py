"""`infer`: each question gets its own answer, and bad input one clear line."""

import importlib
import io
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGES, QUESTIONS, user_message

from train_llava import evaluate, infer
from train_llava.chat import Chat
from train_llava.cli import run_command
from train_llava.evaluation import generation
from train_llava.evaluation.generation import generate
from train_llava.modeling.adapter import load_model

ROOT = Path(__file__).parent.parent


def test_batched_answers_equal_single_ones(opened):
    model, processor = opened
    together = generate(model, processor, QUESTIONS, IMAGES, 8)
    shares = [IMAGES[:1], [], IMAGES[1:]]
    alone = [generate(model, processor, [q], images, 8)[0] for q, images in zip(QUESTIONS, shares, strict=True)]
    assert together == alone
    assert len(set(together)) == 3


def test_questions_of_like_length_are_asked_together_and_answered_as_alone(opened, monkeypatch):
    """Every twelfth token is made an end, so that answers have 1 token to 40."""
    model, processor = opened
    chat, vocabulary = Chat(processor), len(processor.tokenizer)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, *range(1, vocabulary, 12)])
    texts = [f"What is {word}?" + " It is" * (i % 5) for i, word in enumerate("abcdefghijkl")]
    conversations = [user_message(*["<image>"] * (i % 3), text) for i, text in enumerate(texts)]
    pictures = [IMAGES[: i % 3] for i in range(len(texts))]
    prompts = [generation.prepare(chat, *each, 40) for each in zip(conversations, pictures, strict=True)]
    alone = [generation.generate_all(model, chat, [prompt], 1)[0] for prompt in prompts]
    calls, real = [], model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: calls.append(inputs) or real(**inputs))
    together = generation.generate_all(model, chat, prompts, 4)
    assert together == alone
    assert len({text for text, _ in alone}) > 6
    assert {cut for _, cut in alone} == {True, False}
    assert [len(inputs["input_ids"]) for inputs in calls] == [4, 4, 4]
    widths = [inputs["input_ids"].shape[1] for inputs in calls]
    lengths = sorted(inputs["input_ids"].shape[1] for inputs, _ in prompts)
    assert widths == lengths[3::4]
    ends = set(model.generation_config.eos_token_id)
    for (inputs, limit), (_, cut) in zip(prompts, alone, strict=True):
        (output,) = real(**inputs, max_new_tokens=limit, do_sample=False)
        assert cut == ends.isdisjoint(output[inputs["input_ids"].shape[1] :].tolist())


def test_infer_prints_the_answer_alone(merged, corpus):
    picture = corpus / "images_dl" / "0.png"
    command = [sys.executable, "-m", "train_llava.infer", "--model_name_or_path", merged, "--image", picture]
    done = subprocess.run(
        [*command, "--prompt", "What is this?", "--max_new_tokens", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    model, processor = load_model(str(merged))
    assert done.stdout == generate(model, processor, QUESTIONS[:1], [infer.open_image(picture)], 8)[0] + "\n"


def test_no_answer_exceeds_the_context_of_the_model(opened):
    model, processor = opened
    length = Chat(processor).prompts([user_message("hi")], [])["input_ids"].shape[1]
    fits = user_message("hi" + "z" * (512 - length - 2))  # one token each
    assert generation.prepare(Chat(processor), fits, [])[1] == 2
    together = generate(model, processor, [fits, *QUESTIONS[:1]], IMAGES[:1], 8)
    assert together[1] == generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8)[0]
    with pytest.raises(ValueError, match="has 512 tokens, pictures included, and the model reads 512"):
        generate(model, processor, [user_message("hi" + "z" * (512 - length))], [], 8)


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|im_start|>"])
def test_a_control_token_in_a_prompt_is_refused(opened, token):
    with pytest.raises(ValueError, match=re.escape(f"the control token {token} stands in a text")):
        generate(*opened, [user_message(f"What is {token} this?")], [], 4)


def test_earlier_answers_may_hold_tokens_that_questions_may_not(opened):
    """A reasoning model writes </think>. A question must not have this token, but later turns keep the answer."""
    chat = Chat(opened[1])
    chat.control_tokens = chat.control_tokens | {"</think>"}
    (user,), (again,) = user_message("What is this?"), user_message("And this?")
    assert generation.prepare(chat, [user, generation.assistant_message("red</think>"), again], [])
    for messages in ([user, generation.assistant_message("red<|im_end|>"), again], user_message("red</think>")):
        with pytest.raises(ValueError, match="stands in a text"):
            generation.prepare(chat, messages, [])


def test_a_chat_survives_any_error_of_a_turn(opened, monkeypatch, capsys):
    typed = iter(["What is this?", "a" * 1000, "<image>", "/image nothing.png", "out of memory", "And this?", ""])
    asked = []

    def fail_once(model, processor, conversations, images, **options):
        asked.append(conversations[0])
        if "out of memory" in str(conversations):
            raise torch.OutOfMemoryError("no memory")
        return generate(model, processor, conversations, images, **options)

    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(infer, "generate", fail_once)
    infer.chat(*opened, [IMAGES[0]], max_new_tokens=4)
    assert capsys.readouterr().err.count("error: ") == 4
    assert [message["role"] for message in asked[-1]] == ["user", "assistant", "user"]


def test_a_chat_keeps_the_conversation_and_accepts_pictures_between_questions(merged, corpus, monkeypatch, capsys):
    picture = f"/image {corpus}/images_dl/1.png"
    taken_back = [picture, picture, "/image"]
    typed = iter(["What is this?", *taken_back, picture, "/image nothing.png", b"\xe5", "And this?", ""])
    monkeypatch.setattr("builtins.input", lambda _: text.decode() if isinstance(text := next(typed), bytes) else text)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    asked = []

    def remember(model, processor, conversations, images, **options):
        asked.append((json.dumps(conversations[0]), len(images)))
        return generate(model, processor, conversations, images, **options)

    monkeypatch.setattr(infer, "generate", remember)
    model, processor = load_model(str(merged))
    infer.chat(model, processor, [IMAGES[0]], max_new_tokens=8)
    shown = capsys.readouterr()
    (first, one), (second, two) = asked
    assert (one, two) == (1, 2)
    messages = json.loads(second)
    assert messages[0] == json.loads(first)[0] == user_message("<image>", "What is this?")[0]
    assert messages[2] == user_message("<image>", "And this?")[0]
    assert messages[1]["content"][0]["text"] in shown.out
    assert "nothing.png does not exist" in shown.err
    assert "can't decode byte 0xe5" in shown.err


def test_a_picture_may_come_from_the_network_or_standard_input(merged, corpus, monkeypatch):
    path = corpus / "images_dl" / "3.png"
    expected = infer.open_image(path).tobytes()
    handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/3.png"
        assert infer.fetch_image(address).tobytes() == expected
        monkeypatch.setattr(infer, "MAX_BYTES", 10)
        with pytest.raises(ValueError, match="is larger than"):
            infer.fetch_image(address)
        with pytest.raises(OSError, match=r"99.png gives no picture.*404"):
            infer.fetch_image(address.replace("3.png", "99.png"))
        monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", lambda handler: handler.wfile.write(b"\0nonsense\r\n"))
        for nonsense in (address, "http://[", "http://no host/", "data:nothing", "http://127.0.0.1:1/图.png"):
            with pytest.raises(OSError, match=re.escape(nonsense)):
                infer.fetch_image(nonsense)
        server.shutdown()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert infer.fetch_image("-").tobytes() == expected


def test_sampling_gives_other_answers_and_is_off_by_default(merged):
    model, processor = load_model(str(merged))
    assert generation.sampling(0, 1) == {"do_sample": False}
    greedy = generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8)
    high = generation.sampling(temperature=5.0, top_p=1.0)
    drawn = {generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8, **high)[0] for _ in range(4)}
    assert len(drawn | set(greedy)) > 2


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_have_to_be_above_0(name, number):
    for make in (partial(infer.InferArguments, "m", prompt="?"), partial(evaluate.EvaluateArguments, "o", "m", "d")):
        with pytest.raises(ValueError, match=rf"--{name} {number}: it has to lie in \[1, inf"):
            make(**{name: number})


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("infer --model_name_or_path nowhere --prompt hi", "nowhere is no folder"),
        ("infer --model_name_or_path {qwen2} --prompt hi", "is a qwen2 model, not a LLaVA"),
        ("infer --model_name_or_path {llava} --prompt hi --image {corpus}/chat.json", "cannot be read as a picture"),
        ("infer --model_name_or_path {llava} --prompt hi --image nothing.png", "nothing.png does not exist"),
        ("infer --model_name_or_path {llava} --prompt hi --image {corpus}", "{corpus} is a folder"),
        ("infer --model_name_or_path {llava} --prompt hi --adapter_name_or_path {corpus}", "is no adapter folder"),
        ("infer --model_name_or_path {llava} --prompt= --image {corpus}/images_dl/0.png", "--prompt is empty"),
        ("infer --model_name_or_path {llava}", "one of --prompt, --interactive true and --questions"),
        ("infer --model_name_or_path {llava} --questions {corpus}/chat.json", "--questions and --answers go together"),
        ("infer --model_name_or_path {llava} --questions no.jsonl --answers {tmp}/a.jsonl", "no.jsonl"),
        ("evaluate --model_name_or_path {llava} --data_path {llava} --output_dir {tmp}/out", "holds no chat.json"),
        ("evaluate --model_name_or_path nowhere --data_path {corpus} --output_dir {tmp}/out", "nowhere is no folder"),
        ("evaluate --model_name_or_path {llava} --data_path {corpus} --output_dir {llava}", "exists already"),
        ("evaluate --model_name_or_path {llava} --output_dir {tmp}/out", "pass --model_name_or_path with --data_path"),
        ("evaluate --compare {corpus} --output_dir {tmp}/out", "{corpus} holds no metrics.json"),
        ("merge_lora --model_name_or_path {llava} --adapter_name_or_path no --output_dir {tmp}/out", "no is no f"),
        ("build_model --vision_model_name_or_path {corpus} --language_model_name_or_path {qwen2} "
         "--output_dir {tmp}/out", "{corpus}"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_leaves_nothing(
    llava, parts, corpus, tmp_path, monkeypatch, command, message
):
    names = {"llava": llava, "qwen2": parts["qwen2"], "corpus": corpus, "tmp": tmp_path}
    name, *words = command.format(**names).split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as stopped:
        run_command(importlib.import_module(f"train_llava.{name}").main)
    line = stopped.value.code
    assert line.startswith("error: ")
    assert "\n" not in line
    assert message.format(**names) in line
    assert list(tmp_path.iterdir()) == []


def test_a_command_prints_its_error_and_exits_with_1():
    """A wrong argument is found before the imports that take seconds."""
    command = [sys.executable, "-m", "train_llava.infer", "--model_name_or_path", "m", "--prompt="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: --prompt is empty\n")
