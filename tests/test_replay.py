"""`--replay`: the model's own answers to texts are part of each pass."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import run_train

from train_llava.chat import chat_of
from train_llava.data import LlavaDataset
from train_llava.dataset import replay
from train_llava.evaluation import questions
from train_llava.evaluation.generation import generate, user_message
from train_llava.model import load_checkpoint
from train_llava.records import text_of

TEXTS = ["Where is Paris?", "Name a red thing.", "1 + 1?"]


@pytest.fixture(scope="module")
def short(llava, tmp_path_factory):
    """The tiny LLaVA with many end tokens, so that its answers have an end."""
    folder = shutil.copytree(llava, tmp_path_factory.mktemp("short") / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [*range(0, 300, 6)]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def question_file(tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS))
    return tmp_path / "questions.jsonl"


def added(short, corpus, output, share, file=None):
    """The data set with its replay, and the model."""
    model, processor = load_checkpoint(str(short))
    records = LlavaDataset(str(corpus))
    args = SimpleNamespace(output_dir=str(output), device=torch.device("cpu"), process_index=0, world_size=1)
    replay.add_replay(records, share, file and str(file), model, chat_of(processor), args)
    return records, model, processor


def test_the_untouched_model_answers_each_question_once(short, corpus, tmp_path, question_file, monkeypatch, capsys):
    records, model, processor = added(short, corpus, tmp_path / "run", 0.6, question_file)
    answers = generate(model, processor, [[user_message(text, 0)] for text in TEXTS], [])
    kept = [(text, answer.strip()) for text, answer in zip(TEXTS, answers, strict=True) if answer.strip()]
    assert len(kept) > 1
    assert len(records) == 16 + 24  # six tenths
    new = [records[i] for i in range(16, 40)]
    assert all(not record["images"] for record in new)
    counts = Counter((text_of(one["messages"][0]), text_of(one["messages"][1]).strip()) for one in new)
    assert counts.keys() == set(kept)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert f"replay: 24 records a pass, of {len(kept)} questions" in capsys.readouterr().out
    # A resume takes the same answers, and asks nothing
    monkeypatch.setattr(questions, "generate_all", lambda *_, **__: iter(()))
    again, _, _ = added(short, corpus, tmp_path / "run", 0.6, question_file)
    assert [again[i]["messages"] for i in range(40)] == [records[i]["messages"] for i in range(40)]


def test_without_a_file_the_questions_are_those_of_the_data_without_pictures(short, corpus, tmp_path):
    records, _, _ = added(short, corpus, tmp_path / "run", 0.2)
    asked = [json.loads(line) for line in (tmp_path / "run/replay.answers.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in asked} == {"What is this?", "这是什么?"}
    assert len(records) == 16 + 4


def test_a_run_trains_on_them(short, corpus, tmp_path, question_file, monkeypatch, capsys):
    words = ["--train_type", "freeze_vision", "--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
    words += ["--save_strategy", "no", "--preflight", "false", "--replay", "0.5", "--replay_questions", question_file]
    losses = run_train(monkeypatch, short, corpus, tmp_path / "run", *words)
    assert len(losses) == 8
    assert "16 records, 0 held out\nreplay: 16 records a pass" in capsys.readouterr().out


def test_cut_answers_are_left_out(llava, corpus, tmp_path, question_file):
    """The tiny model does not end an answer."""
    with pytest.raises(ValueError, match="none of 3 questions gets an answer below 128 tokens"):
        added(llava, corpus, tmp_path / "run", 0.5, question_file)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--replay", "0.5", "--streaming", "true", "--max_steps", "1"], "--replay not with --streaming"),
        (["--replay_questions", "q.jsonl"], "--replay_questions goes with --replay"),
        (["--replay", "1"], r"--replay 1.0: it has to lie in \(0, 1\)"),
    ],
)
def test_what_cannot_be_replayed_is_refused(llava, corpus, tmp_path, monkeypatch, words, reason):
    with pytest.raises(ValueError, match=reason):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()
