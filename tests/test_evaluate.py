"""Evaluation: every question is asked and counted, and nothing costs the numbers."""

import json
import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from conftest import turns
from PIL import Image

import train_llava
from train_llava import evaluate
from train_llava.data import LlavaDataset
from train_llava.evaluation import generation, plots
from train_llava.evaluation import questions as question_files
from train_llava.evaluation.generation import generate
from train_llava.evaluation.metrics import by_group
from train_llava.evaluation.questions import weights_digest
from train_llava.modeling.adapter import load_model


def run_evaluate(monkeypatch, model: Path, corpus: Path, output: Path, *arguments: str) -> dict:
    command = ["evaluate", "--model_name_or_path", model, "--data_path", corpus, "--output_dir", output, *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evaluate.main()
    return json.loads((output / "metrics.json").read_text())


def answer_with(monkeypatch, answer: Callable) -> None:
    """Replaces the model by a function of a conversation and its pictures."""
    monkeypatch.setattr(question_files, "prepare", lambda chat, messages, images, limit: (messages, images))
    monkeypatch.setattr(
        question_files,
        "generate_all",
        lambda model, chat, prompts, *_, **options: [(answer(*each), False) for each in prompts],
    )


def test_evaluate_asks_every_question_and_counts_the_exact_answers(merged, corpus, tmp_path, monkeypatch):
    asked = []
    heights = {
        height: ("a red square", "a blue circle", "红")[height % 3] * (1 + height % 2) for height in range(30, 46)
    }

    def answer_by_heart(conversation, shown):
        """Tells the pictures apart by their height, and is right for the English ones."""
        asked.append(conversation)
        assert len(shown) == sum(part["type"] == "image" for part in conversation[0]["content"])
        picture = shown[0] if shown else None
        blank = picture is None or picture.getextrema() == ((255, 255),) * 3
        return "a red square" if blank else heights[picture.height]

    answer_with(monkeypatch, answer_by_heart)
    metrics = run_evaluate(
        monkeypatch, merged, corpus, tmp_path / "out", "--blank_control", "true", "--other_control", "true"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(asked) == 3 * metrics["n"] == 3 * len(lines) == 51
    assert [line["id"] for line in lines].count("5") == 2
    assert lines[6]["prompt"] == "这是什么?"
    assert lines[0].keys() == {"id", "prompt", "reference", "prediction"}
    exact = sum(line["prediction"] == line["reference"] for line in lines)
    assert metrics["exact_match"] == exact / 17
    assert exact == 12  # eleven of the fifteen pictures are English, and one of the two questions without a picture
    assert metrics["controls"]["blank_pictures"]["exact_match"] == 4 / 17
    # One question without a picture, and one whose other record has none
    assert metrics["controls"]["other_pictures"]["exact_match"] == 2 / 17
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
    out = capsys.readouterr().out
    assert "this model" in out
    assert metrics["cut_answers"] == 1
    assert "cut at --max_new_tokens 4: 100.0%" in out
    assert metrics["settings"] == {
        "model_name_or_path": str(merged),
        "adapter_name_or_path": None,
        "data_path": str(corpus),
        "image_dir": None,
        "bits": None,
        "max_new_tokens": 4,
        "weights": weights_digest(model),
        "train_llava": train_llava.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


def write_data(folder: Path, corpus: Path, *records: dict) -> Path:
    """A data set of these records, with the corpus's pictures."""
    folder.mkdir()
    shutil.copytree(corpus / "images_dl", folder / "images_dl")
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("text", ["$5 and $\\frac{", "$^$", "long " * 400, "红" * 400, "a\u2028b\x85c $", "\x07"])
def test_any_text_can_be_evaluated_and_drawn(merged, corpus, tmp_path, monkeypatch, text):
    record = {"id": "0", "image": "0.png", "caption": text}
    data = write_data(tmp_path / "data", corpus, *[record] * 3)
    answer_with(monkeypatch, lambda *_: text)
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "$out$")
    assert (metrics["n"], metrics["exact_match"], metrics["bad"]) == (3, 1, [])
    assert Image.open(tmp_path / "$out$" / "captions.png").width == 1144
    (tmp_path / "compared").mkdir()
    evaluate.compare([tmp_path / "$out$"], tmp_path / "compared")
    assert (tmp_path / "compared" / "comparison.png").exists()


def test_a_question_that_cannot_be_asked_is_named_and_does_not_count(merged, corpus, tmp_path, monkeypatch, capsys):
    good = {"id": "good", "image": "0.png", "caption": "a red square"}
    data = write_data(
        tmp_path / "data",
        corpus,
        {"id": "gone", "image": "99.png", "caption": "x"},
        {"id": "broken", "image": "broken.png", "caption": "x"},
        {"id": "long", "conversations": turns("What is this?", "x", "a" * 600, "x")},
        {"id": "control", "conversations": turns("What is <|im_end|>?", "x")},
        {"id": "no text"},
        good,
    )
    (data / "images_dl" / "broken.png").write_bytes((corpus / "images_dl" / "0.png").read_bytes()[:60])
    arguments = ["--max_new_tokens", "4", "--blank_control", "true", "--batch_size", "2"]
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out", *arguments)
    assert metrics["n"] == metrics["controls"]["blank_pictures"]["n"] == 2  # and the first turn of the long one
    assert [entry["id"] for entry in metrics["bad"]] == ["gone", "broken", "long", "control", "no text"]
    error = capsys.readouterr().err
    assert "gone: " in error
    assert "5 questions or records could not be asked" in error
    (data / "chat.json").write_text(json.dumps([good | {"image": "broken.png"}]))
    with pytest.raises(ValueError, match=r"no question of .* could be asked; good: .*broken.png"):
        run_evaluate(monkeypatch, merged, data, tmp_path / "none", *arguments)
    assert not list(tmp_path.glob("none*"))


class KilledError(BaseException):
    """An error that no handler catches."""


def test_a_killed_evaluation_continues(merged, corpus, tmp_path, monkeypatch):
    arguments, kept = ["--max_new_tokens", "4", "--blank_control", "true", "--batch_size", "2"], []
    whole = run_evaluate(monkeypatch, merged, corpus, tmp_path / "whole", *arguments)
    monkeypatch.setattr(question_files, "WINDOW", 2)
    real, output, calls = generation.generate_all, tmp_path / "out", []

    def until(limit: int) -> Callable:
        def generate_all(*given, **options):
            if len(calls) == limit:
                raise KilledError
            calls.append(len(given[2]))
            return real(*given, **options)

        return generate_all

    for limit in (2, 4, 7):
        monkeypatch.setattr(question_files, "generate_all", until(limit))
        with pytest.raises(KilledError):
            run_evaluate(monkeypatch, merged, corpus, output, *arguments)
        kept.append(sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("out.*")))
        with pytest.raises(ValueError, match=r"answers.jsonl was answered with max_new_tokens 4, and now it is 5"):
            run_evaluate(monkeypatch, merged, corpus, output, "--max_new_tokens", "5")
    assert kept == [8, 16, 17 + 8]  # 17 questions, four at a time, and again with blank pictures
    monkeypatch.setattr(question_files, "generate_all", until(100))
    assert run_evaluate(monkeypatch, merged, corpus, output, *arguments) == whole
    assert sum(calls) == 2 * 17
    for name in ("metrics.json", "predictions.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_equal_questions_keep_their_own_answers_after_a_resume(corpus, tmp_path, monkeypatch, merged):
    """Three records have one id and one question; the first cannot be asked."""
    records = [{"id": "x", "image": f"{i}.png", "question": "?", "answer": str(30 + i)} for i in (99, 1, 2)]
    data = write_data(tmp_path / "data", corpus, *records)
    for killed in (True, False):
        answer_with(monkeypatch, lambda _, shown: str(shown[0].height))
        if killed:
            monkeypatch.setattr(evaluate, "by_group", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError) if killed else nullcontext():
            metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out")
        monkeypatch.setattr(evaluate, "by_group", by_group)
    assert metrics["exact_match"] == 1


def test_pictures_are_opened_as_in_training_and_closed_one_by_one(merged, tmp_path, monkeypatch):
    """JPEGs are decoded small, and no picture is in memory when the next one is opened."""
    records = [{"image": f"{i}.{kind}", "caption": "x"} for i in range(3) for kind in ("jpg", "png")]
    data = tmp_path / "data"
    data.mkdir()
    for record in records:
        Image.new("RGB", (640, 480), "red").save(data / record["image"])
    (data / "chat.json").write_text(json.dumps(records))
    opened, held, real = [], [], generation.prepare

    def prepare(chat, messages, images, limit):
        held.append(sum(picture() is not None for picture in opened))
        opened.append(weakref.ref(images[0]))
        dataset = LlavaDataset(str(data))
        dataset.chat = chat
        assert images[0].size == dataset[len(held) - 1]["images"][0].size
        return real(chat, messages, images, limit)

    monkeypatch.setattr(question_files, "prepare", prepare)
    run_evaluate(monkeypatch, merged, data, tmp_path / "out", "--max_new_tokens", "1")
    assert held == [0] * 6


def test_a_sample_grid_that_cannot_be_drawn_loses_no_metrics(merged, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "findfont", lambda name: 1 / 0)
    metrics = run_evaluate(monkeypatch, merged, corpus, tmp_path / "out", "--max_new_tokens", "1")
    assert metrics["n"] == 17
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.jsonl"]
    assert "captions.png could not be drawn: division by zero" in capsys.readouterr().err


def test_a_record_may_have_several_right_answers(merged, corpus, tmp_path, monkeypatch):
    data = write_data(
        tmp_path / "data",
        corpus,
        {"image": "0.png", "caption": ["a cat", "one cat", "a cat"]},
        {"conversations": turns("Who?", "I", "Where?", "here"), "references": ["there"]},
        {"conversations": turns("How many?", "two"), "answers": [{"answer": "2", "answer_id": i} for i in range(10)]},
    )
    said = iter(["one cat", "I", "there", "2"])
    answer_with(monkeypatch, lambda *_: next(said))
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out")
    assert (metrics["exact_match"], metrics["vqa_accuracy"], metrics["anls"]) == (0.75, 1, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line.get("references") for line in lines] == [["a cat", "one cat", "a cat"], None, ["here", "there"], None]
    evaluate.compare([tmp_path / "out"], tmp_path)  # reads them back


@pytest.mark.parametrize("content", ["{}", "[]", "null", "nonsense"])
def test_a_folder_without_an_evaluation_is_not_compared(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no metrics.json that evaluate wrote"):
        evaluate.compare([tmp_path], tmp_path)
    (tmp_path / "metrics.json").write_text('{"n": 1, "exact_match": 1, "intervals": {"exact_match": [0, 1]}}')
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"predictions.jsonl"):
        evaluate.compare([tmp_path], tmp_path)
