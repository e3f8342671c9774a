"""`--choices`: how likely each of a few answers is, and the scores of these shares."""

import json
import sys
from math import exp

import pytest
from conftest import IMAGES, turns
from test_evaluate import run_evaluate
from test_explain import PROMPT, by_hand

from train_llava import infer
from train_llava.chat import chat_of
from train_llava.common.checks import split_choices
from train_llava.data import LlavaDataset
from train_llava.evaluation.generation import choose, user_message
from train_llava.evaluation.metrics import score_choices

CHOICES = ["a red square", "a blue circle", "红色的方块"]


def shares_by_hand(model, processor, image, choices=CHOICES):
    """The shares by the losses of transformers, the largest first."""
    likely = {choice: exp(by_hand(model, processor, image, choice)[0]) for choice in choices}
    shares = {choice: value / sum(likely.values()) for choice, value in likely.items()}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def test_a_share_is_the_probability_among_the_choices(opened):
    model, processor = opened
    for image in IMAGES:
        ours = choose(model, chat_of(processor), [user_message(PROMPT, 1)], [image], CHOICES)
        wanted = shares_by_hand(model, processor, image)
        assert list(ours) == list(wanted)
        assert ours == pytest.approx(wanted, rel=1e-3)


def test_infer_prints_the_choices_behind_the_answer(opened, merged, tmp_path, monkeypatch, capsys):
    model, processor = opened
    IMAGES[0].save(tmp_path / "red.png")
    words = ["infer", "--model_name_or_path", merged, "--image", tmp_path / "red.png", "--prompt", PROMPT]
    words += ["--max_new_tokens", 4, "--choices", " a red square,a blue circle , 红色的方块"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    infer.main()
    wanted = [f"{share:.1%}  {choice}" for choice, share in shares_by_hand(model, processor, IMAGES[0]).items()]
    assert capsys.readouterr().out.splitlines()[-3:] == wanted


def test_evaluate_scores_the_choices_that_hold_the_right_answer(opened, merged, corpus, tmp_path, monkeypatch, capsys):
    """The corpus has answers that are none of the two choices, and one record without a picture."""
    model, processor = opened
    words = ["--max_new_tokens", "2", "--choices", "a red square,a blue circle"]
    metrics = run_evaluate(monkeypatch, merged, corpus, tmp_path / "out", *words)["choices"]
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["reference"] in CHOICES[:2]]
    assert [line for line in lines if "choices" in line] == chosen
    assert metrics["n"] == len(chosen) == 6
    assert metrics["accuracy"] == sum(next(iter(line["choices"])) == line["reference"] for line in chosen) / 6
    # The shares of a record with its own question
    (record,) = [record for record in LlavaDataset(str(corpus)) if record["id"] == "0"]
    monkeypatch.setattr("test_explain.PROMPT", "What is this?")
    wanted = shares_by_hand(model, processor, record["images"][0], CHOICES[:2])
    assert lines[0]["choices"] == pytest.approx(wanted, rel=1e-3)
    assert (tmp_path / "out/calibration.png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert f"likeliest choice right: {metrics['accuracy']:.1%} of 6; AUROC {metrics['auroc']:.3f}; " in printed


def test_a_record_brings_its_own_choices(merged, tmp_path, monkeypatch):
    """They belong to its last question; those without the right answer do not count."""
    asked = turns(PROMPT, "a red square", "And this?", "yes")
    records = [{"id": "1", "conversations": asked, "choices": ["yes", "no", "yes"]}]
    records += [{"id": "2", "conversations": turns(PROMPT, "maybe"), "choices": ["yes", "no"]}]
    records += [{"id": "3", "question": "Which?", "choices": ["cat", "dog", "cow"], "answer": 1}]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    metrics = run_evaluate(monkeypatch, merged, tmp_path, tmp_path / "out", "--max_new_tokens", "2")
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [(line["id"], set(line.get("choices", ()))) for line in lines] == [
        ("1", set()),
        ("1", {"yes", "no"}),
        ("2", set()),
        ("3", {"cat", "dog", "cow"}),
    ]
    assert metrics["choices"]["n"] == 2
    assert "auroc" not in metrics["choices"]
    with pytest.raises(ValueError, match="--choices red,green: no right answer is among them"):
        run_evaluate(
            monkeypatch, merged, tmp_path, tmp_path / "none", "--max_new_tokens", "2", "--choices", "red,green"
        )
    assert not (tmp_path / "none").exists()


def likely(share, reference):
    """A prediction in which "yes" has this share."""
    shares = dict(sorted({"yes": share, "no": 1 - share}.items(), key=lambda pair: -pair[1]))
    return {"likely": shares, "reference": reference}


def test_scores_of_choices_by_hand():
    predictions = [likely(0.95, "yes"), likely(0.93, "no"), likely(0.6, "yes"), likely(0.2, "no"), likely(0.2, "yes")]
    scores = score_choices(predictions)
    assert scores["accuracy"] == 3 / 5
    # Of the six pairs of a right yes and a right no: 0.95 is above both, 0.6 above one, 0.2 above none and like one
    assert scores["auroc"] == pytest.approx((2 + 1 + 0.5) / 6)
    assert [number for _, _, number in scores["bins"]] == [1, 2, 2]  # 0.6, two of 0.8, and two above 0.9
    wanted = abs(0.6 - 1) / 5 + 2 / 5 * abs(0.8 - 0.5) + 2 / 5 * abs(0.94 - 0.5)
    assert scores["calibration_error"] == pytest.approx(wanted)
    assert "auroc" not in score_choices(predictions[:1])


@pytest.mark.parametrize("text", ["yes", "yes,", ",", "yes,yes"])
def test_fewer_than_two_choices_are_refused(text):
    with pytest.raises(ValueError, match="name two answers or more, with a comma between them"):
        split_choices(text)
