"""Evaluation: every question is asked and counted, and nothing costs the numbers."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import turns
from PIL import Image

from train_llava import answers, evaluate, reports
from train_llava.adapter import load_model
from train_llava.data import LlavaDataset
from train_llava.infer import generate


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

    def answer_by_heart(model, chat, conversations, images, *_):
        """Tells the pictures apart by their height, and is right for the English ones."""
        asked.extend(conversations)
        answers = []
        for conversation, shown in zip(conversations, images, strict=True):
            assert len(shown) == sum(part["type"] == "image" for part in conversation[0]["content"])
            picture = shown[0] if shown else None
            blank = picture is None or picture.getextrema() == ((255, 255),) * 3
            answers.append("a red square" if blank else heights[picture.height])
        return answers

    monkeypatch.setattr(answers, "generate_all", answer_by_heart)
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


def write_data(folder: Path, corpus: Path, *records: dict) -> Path:
    """A data set of these records, with the corpus's pictures."""
    folder.mkdir()
    shutil.copytree(corpus / "images_dl", folder / "images_dl")
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("text", ["$5 and $\\frac{", "$^$", "long " * 400, "红" * 400, "a\u2028b\x85c $", "\x07"])
def test_no_text_costs_an_evaluation(merged, corpus, tmp_path, monkeypatch, text):
    record = {"id": "0", "image": "0.png", "caption": text}
    data = write_data(tmp_path / "data", corpus, *[record] * 3)
    monkeypatch.setattr(answers, "generate_all", lambda model, chat, conversations, *_: [text] * len(conversations))
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "$out$")
    assert (metrics["n"], metrics["exact_match"], metrics["bad"]) == (3, 1, [])
    assert Image.open(tmp_path / "$out$" / "captions.png").width == 1144
    (tmp_path / "compared").mkdir()
    evaluate.compare([tmp_path / "$out$"], tmp_path / "compared")
    assert (tmp_path / "compared" / "comparison.png").exists()


def test_what_cannot_be_asked_is_named_and_counts_for_nothing(merged, corpus, tmp_path, monkeypatch, capsys):
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
    assert not (tmp_path / "none").exists()


def test_a_sheet_that_cannot_be_drawn_costs_no_numbers(merged, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "findfont", lambda name: 1 / 0)
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
    monkeypatch.setattr(answers, "generate_all", lambda model, chat, asked, *_: [next(said) for _ in asked])
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out")
    assert (metrics["exact_match"], metrics["vqa_accuracy"]) == (0.75, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line.get("references") for line in lines] == [["a cat", "one cat", "a cat"], None, ["here", "there"], None]
    evaluate.compare([tmp_path / "out"], tmp_path)  # reads them back


@pytest.mark.parametrize("content", ["{}", "[]", "null", "nonsense"])
def test_what_is_no_evaluation_is_not_compared(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no metrics.json that evaluate wrote"):
        evaluate.compare([tmp_path], tmp_path)
    (tmp_path / "metrics.json").write_text('{"n": 1, "exact_match": 1, "intervals": {"exact_match": [0, 1]}}')
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"predictions.jsonl"):
        evaluate.compare([tmp_path], tmp_path)
