"""Asking, evaluating and merging: the right answers to the right questions, and one clear line for bad input."""

import io
import json
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import random_adapter
from PIL import Image
from safetensors.torch import load_file, save_file

from train_llava import evaluate, infer
from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.infer import generate, load_model
from train_llava.merge_lora import merge_lora

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory) -> Path:
    """A LoRA adapter for the tiny LLaVA whose matrices and projector are random, so that it changes every answer."""
    return random_adapter(llava, tmp_path_factory.mktemp("adapter") / "run", seed=1)


@pytest.fixture(scope="module")
def merged(llava, adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_lora(str(llava), str(adapter), str(folder))
    return folder


def question(*texts: str) -> list[dict]:
    parts = [{"type": "image"} if text == "<image>" else {"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": parts}]


QUESTIONS = [
    question("<image>", "What is this?"),
    question("Where is Paris?"),
    question("<image>", "<image>", "这是?"),
]
IMAGES = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]


def test_an_adapter_saves_its_projector_and_changes_the_model(llava, adapter):
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert sum("multi_modal_projector" in name for name in names) == 4
    base, processor = load_model(str(llava))
    adapted, _ = load_model(str(llava), str(adapter))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    assert (adapted(**inputs).logits - base(**inputs).logits).abs().max() > 0.1


def test_a_merged_model_equals_base_and_adapter(llava, adapter, merged):
    adapted, processor = load_model(str(llava), str(adapter))
    plain, _ = load_model(str(merged))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    ours, theirs = plain(**inputs).logits, adapted(**inputs).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert generate(plain, processor, QUESTIONS, IMAGES, 8) == generate(adapted, processor, QUESTIONS, IMAGES, 8)


def test_batched_answers_equal_single_ones(merged):
    model, processor = load_model(str(merged))
    together = generate(model, processor, QUESTIONS, IMAGES, 8)
    shares = [IMAGES[:1], [], IMAGES[1:]]
    alone = [generate(model, processor, [q], images, 8)[0] for q, images in zip(QUESTIONS, shares, strict=True)]
    assert together == alone
    assert len(set(together)) == 3


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


def write_questions(corpus: Path, folder: Path) -> Path:
    names = [f"{corpus}/images_dl/{i}.png" for i in range(3)]
    lines = [
        {"id": "one", "image": names[0], "prompt": "What is this?"},
        {"prompt": "Where is Paris?"},
        {"id": 7, "image": names[1:], "prompt": "这是?"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "questions.jsonl"


def test_a_file_of_questions_is_answered_and_gone_on_with(merged, corpus, tmp_path, monkeypatch):
    questions, answers = write_questions(corpus, tmp_path), tmp_path / "answers.jsonl"
    model, processor = load_model(str(merged))
    infer.answer_file(model, processor, questions, answers, batch_size=2, max_new_tokens=8)
    whole = answers.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == ["one", "1", "7"]
    images = [infer.open_image(corpus / "images_dl" / f"{i}.png") for i in range(3)]
    assert [line["answer"] for line in lines] == generate(model, processor, QUESTIONS, images, 8)
    answers.write_text(whole[: whole.index("\n") + 9])  # killed while it wrote the second answer
    asked = []
    monkeypatch.setattr(infer, "generate", lambda *args, **kw: asked.append(len(args[2])) or generate(*args, **kw))
    infer.answer_file(model, processor, questions, answers, batch_size=16, max_new_tokens=8)
    assert (answers.read_text(), asked) == (whole, [2])


def test_a_chat_keeps_the_conversation_and_takes_pictures_on_the_way(merged, corpus, monkeypatch, capsys):
    typed = iter(["What is this?", f"/image {corpus}/images_dl/1.png", "/image nothing.png", "And this?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
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
    assert messages[0] == json.loads(first)[0] == question("<image>", "What is this?")[0]
    assert messages[2] == question("<image>", "And this?")[0]
    assert messages[1]["content"][0]["text"] in shown.out
    assert "nothing.png does not exist" in shown.err


def test_a_picture_may_come_from_the_network_or_standard_input(merged, corpus, monkeypatch):
    path = corpus / "images_dl" / "3.png"
    expected = infer.open_image(path).tobytes()
    handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/3.png"
        assert infer.fetch_image(address).tobytes() == expected
        monkeypatch.setattr(infer, "MOST_BYTES", 10)
        with pytest.raises(ValueError, match="is larger than"):
            infer.fetch_image(address)
        with pytest.raises(OSError, match="404"):
            infer.fetch_image(address.replace("3.png", "99.png"))
        server.shutdown()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert infer.fetch_image("-").tobytes() == expected


def test_sampling_draws_other_answers_and_is_off_by_default(merged):
    model, processor = load_model(str(merged))
    assert infer.sampling(0, 1) == {"do_sample": False}
    greedy = generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8)
    drawn = {generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8, **infer.sampling(5.0, 1.0))[0] for _ in range(4)}
    assert len(drawn | set(greedy)) > 2


def run_evaluate(monkeypatch, model: Path, corpus: Path, output: Path, *arguments: str) -> dict:
    command = ["evaluate", "--model_name_or_path", model, "--data_path", corpus, "--output_dir", output, *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evaluate.main()
    return json.loads((output / "metrics.json").read_text())


def test_evaluate_asks_every_question_and_counts_the_exact_answers(merged, corpus, tmp_path, monkeypatch):
    asked = []

    heights = {
        height: ("a red square", "a blue circle", "红")[height % 3] * (1 + height % 2) for height in range(30, 46)
    }

    def answer_by_heart(model, processor, conversations, images, max_new_tokens):
        """Tells the pictures apart by their height, and is right for the English ones."""
        asked.extend(conversations)
        shown = iter(images)
        answers = []
        for conversation in conversations:
            picture = next(shown) if any(part["type"] == "image" for part in conversation[0]["content"]) else None
            blank = picture is None or picture.getextrema() == ((255, 255),) * 3
            answers.append("a red square" if blank else heights[picture.height])
        return answers

    monkeypatch.setattr(evaluate, "generate", answer_by_heart)
    metrics = run_evaluate(
        monkeypatch, merged, corpus, tmp_path / "out", "--blank_control", "true", "--batch_size", "5"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(asked) == 2 * metrics["n"] == 2 * len(lines) == 34
    assert [line["id"] for line in lines].count("5") == 2
    assert lines[6]["prompt"] == "这是什么?"
    assert lines[0].keys() == {"id", "prompt", "reference", "prediction"}
    exact = sum(line["prediction"] == line["reference"] for line in lines)
    assert metrics["exact_match"] == exact / 17
    assert exact == 12  # eleven of the fifteen pictures are English, and one of the two questions without a picture
    assert metrics["controls"]["blank_pictures"]["exact_match"] == 4 / 17
    assert metrics["controls"]["most_frequent_answer"]["exact_match"] == pytest.approx(4 / 17)
    assert Image.open(tmp_path / "out" / "captions.png").size[0] > 1000


def test_evaluate_runs_a_real_model(merged, corpus, tmp_path, monkeypatch, capsys):
    metrics = run_evaluate(monkeypatch, merged, corpus, tmp_path / "out", "--max_new_tokens", "4")
    assert metrics["n"] == 17
    low, high = metrics["intervals"]["token_f1"]
    assert 0 <= low <= metrics["token_f1"] <= high <= 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model, processor = load_model(str(merged))
    item = LlavaDataset(str(corpus))[3]
    assert lines[3]["prediction"] == generate(model, processor, [item["messages"][:1]], item["images"], 4)[0]
    assert "this model" in capsys.readouterr().out


@pytest.fixture(scope="module")
def foreign_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with wider layers."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], dim=-1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def deeper_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with more layers, its shapes the same."""
    folder = tmp_path_factory.mktemp("deeper")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["foreign_adapter", "deeper_adapter"])
def test_an_adapter_of_another_model_is_refused(llava, tmp_path, kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="was trained on another model"):
        load_model(str(llava), str(folder))
    with pytest.raises(ValueError, match="was trained on another model"):
        merge_lora(str(llava), str(folder), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("infer --model_name_or_path nowhere --prompt hi", "nowhere is no folder"),
        ("infer --model_name_or_path {qwen2} --prompt hi", "is a qwen2 model, not a LLaVA"),
        ("infer --model_name_or_path {llava} --prompt hi --image {corpus}/chat.json", "cannot be read as a picture"),
        ("infer --model_name_or_path {llava} --prompt hi --image nothing.png", "nothing.png does not exist"),
        ("infer --model_name_or_path {llava} --prompt hi --adapter_name_or_path {corpus}", "is no adapter folder"),
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
def test_bad_input_ends_with_one_line_and_leaves_nothing(llava, parts, corpus, tmp_path, command, message):
    names = {"llava": llava, "qwen2": parts["qwen2"], "corpus": corpus, "tmp": tmp_path}
    done = subprocess.run(
        [sys.executable, "-m", *f"train_llava.{command}".format(**names).split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message.format(**names) in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
