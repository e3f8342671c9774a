"""The task that gives the toy example's held-out pictures to lmms-eval."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from train_llava.records import text_of, to_messages

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "lmms_eval"
PYTHON = Path(os.environ.get("LMMS_EVAL_PYTHON", ROOT / ".venv-lmms" / "bin" / "python"))


@pytest.fixture
def task(monkeypatch, corpus):
    spec = importlib.util.spec_from_file_location("openmoji", FOLDER / "openmoji.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PICTURES", corpus / "images_dl")
    return module


@pytest.mark.parametrize("question", ["<image>\nWhat is this?", "这是什么?\n<image>"])
def test_the_task_asks_what_evaluate_asks(task, question):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "红色的方块"}]
    record = {"image": "3.png", "language": "zh", "conversations": turns}
    (message,) = task.messages(record)
    ours = to_messages(record)[0]
    assert [part["type"] for part in message["content"]] == [part["type"] for part in ours["content"]]
    assert text_of(message) == text_of(ours)
    picture = next(part["url"] for part in message["content"] if part["type"] == "image")
    assert isinstance(picture, Image.Image)
    assert picture.size == (40, 33)
    assert task.exact_match(record, ["红色的方块 "]) == {"exact_match": 1, "exact_match_zh": 1}
    assert task.exact_match(record, ["红色"]) == {"exact_match": 0, "exact_match_zh": 0}


def test_the_task_names_functions_that_are_there(task):
    named = re.findall(r"!function openmoji\.(\w+)", (FOLDER / "openmoji.yaml").read_text())
    assert len(named) == 5
    assert all(callable(getattr(task, name)) for name in named)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="no environment with lmms-eval: see benchmarks/README.md")
def test_lmms_eval_scores_as_evaluate_does(default_run, tmp_path):
    options = f"pretrained={default_run / 'stage2'},device=cpu,device_map=cpu"
    command = [PYTHON, "-m", "lmms_eval", "--model", "llava_hf", "--model_args", options, "--tasks", "openmoji",
               "--include_path", FOLDER, "--batch_size", "1", "--output_path", tmp_path, "--limit", "60"]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    (file,) = tmp_path.rglob("*_results.json")
    scores = json.loads(file.read_text())["results"]["openmoji"]
    lines = (default_run / "evaluation" / "predictions.jsonl").read_text().splitlines()[:60]
    hits = [answer["prediction"].strip() == answer["reference"] for answer in map(json.loads, lines)]
    assert scores["exact_match,none"] == pytest.approx(sum(hits) / 60, abs=1 / 60)
