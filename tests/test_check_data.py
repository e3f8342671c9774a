"""`check_data` reports every error of a data set, its lengths, and a sample as the model is trained on it."""

import json

import numpy as np
import pytest
from conftest import turns
from PIL import Image

from train_llava import check_data
from train_llava.chat import Chat
from train_llava.check_data import kind_of, show_sample
from train_llava.data import LlavaDataset
from train_llava.dataset.findings import ending


def run(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    """Runs the command in this process; returns its exit code and its output."""
    monkeypatch.setattr("sys.argv", ["check_data", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        check_data.main()
    return end.value.code, capsys.readouterr().out


def test_check_data_reports_every_error(bad_data, llava, tmp_path, monkeypatch, capsys):
    root, reasons = bad_data
    arguments = ["--data_path", root, "--model_name_or_path", llava, "--max_length", "200", "--num_proc", "2"]
    code, output = run(monkeypatch, capsys, *arguments, "--report", tmp_path / "report.json")
    assert code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["records"], report["bad"]) == (2 * len(reasons), len(reasons))
    ids = [example["id"] for error in report["faults"].values() for example in error["examples"]]
    assert sum(error["count"] for error in report["faults"].values()) == len(reasons)
    assert set(ids) <= reasons.keys()
    kind = kind_of("page.jpg cannot be read as a picture: it is of no format that Pillow knows")
    assert report["faults"][kind]["count"] >= 1
    assert f"{2 * len(reasons)} records, {len(reasons)} bad" in output
    assert "⟦answer 0<|im_end|>⟧" in output
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_check_data_reports_a_data_set_without_a_good_record(tmp_path, monkeypatch, capsys):
    (tmp_path / "chat.json").write_text('[{"id": "empty", "conversations": []}]')
    report = tmp_path / "report.json"
    code, _ = run(monkeypatch, capsys, "--data_path", tmp_path, "--report", report, "--num_proc", "1")
    assert code == 1
    assert json.loads(report.read_text())["bad"] == 1


def test_held_out_data_is_compared_by_pictures_alone(corpus, monkeypatch):
    words = ["check_data", "--data_path", str(corpus), "--eval_data_path", str(corpus), "--decode_pictures", "false"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(
        ValueError, match="--eval_data_path compares pictures, which --decode_pictures false leaves out"
    ):
        check_data.main()


def test_check_data_finds_no_error_in_good_data(corpus, monkeypatch, capsys):
    code, output = run(monkeypatch, capsys, "--data_path", corpus, "--decode_pictures", "false")
    assert code == 0
    assert f"{corpus}: .json, files: 1\n16 records, 0 bad" in output


def test_check_data_tells_what_deserves_a_look(llava, tmp_path, monkeypatch, capsys):
    for folder in ("data", "eval"):
        (tmp_path / folder / "images").mkdir(parents=True)
    files = {"data/images/a.png": (0, 80), "data/images/wide.png": (1, 120), "eval/images/new.png": (2, 80)}
    files |= {"data/images/copy.png": (0, 80), "eval/images/same.png": (1, 120)}
    for name, (seed, width) in files.items():
        patches = np.random.default_rng(seed).integers(0, 250, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(patches).resize((width, 80)).save(tmp_path / name)
    bright = Image.open(tmp_path / "data/images/a.png").point(lambda level: level + 2)
    bright.save(tmp_path / "data/images/bright.png")
    long = "There is a long answer, which has a good many words in it and says"
    said = {"a": "红色的方块", "copy": "красный квадрат", "bright": f"{long} so.", "wide": f"{long} so."}
    records = [{"id": name, "image": f"{name}.png", "conversations": turns("<image>?", said[name])} for name in said]
    records += [{"id": "cut", "image": "wide.png", "conversations": turns("<image>?", long)}]
    records += [{"id": "comma", "image": "wide.png", "conversations": turns("<image>Where?", "left,", "And?", "no")}]
    (tmp_path / "data/chat.json").write_text(json.dumps(records))
    held_out = [{"id": i, "image": f"{i}.png", "conversations": turns("<image>?", "a")} for i in ("new", "same")]
    (tmp_path / "eval/chat.json").write_text(json.dumps(held_out))
    command = ["--data_path", tmp_path / "data", "--eval_data_path", tmp_path / "eval", "--num_proc", "1"]
    command += ["--model_name_or_path", llava, "--report", tmp_path / "data.json", "--global_batch_size", "4"]
    code, output = run(monkeypatch, capsys, *command)
    report = json.loads((tmp_path / "data.json").read_text())
    assert code == 0
    assert {name: (one["count"], one["examples"]) for name, one in report["findings"].items()} == {
        "cropped": (3, ["wide", "cut", "comma"]),
        "identical": (1, ["copy"]),
        "similar": (2, ["a", "bright"]),
        "in_eval_data": (1, []),
        "different_answers": (2, ["a", "copy", "wide"]),
        "cut_answers": (2, ["cut", "comma"]),
    }
    assert report["scripts"] == {"Latin": 4, "Han": 1, "Cyrillic": 1}
    assert report["steps"] == 6
    assert "        2  answers end in the middle of a sentence: complete them" in output
    assert "steps      6 of 4 records in 3 epochs, too few to learn much: set --num_train_epochs 20" in output
    with Image.open(tmp_path / "data.png") as picture:
        assert picture.width == 1360


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        ("a dog and", "short"),
        ("", "short"),
        ("(", "cut"),
        ("一只狗，", "cut"),
        ("word " * 20, "open"),
        ("word " * 20 + "end.", "closed"),
        ("狗" * 21, "open"),
        ("狗" * 21 + "。", "closed"),
    ],
)
def test_an_answer_ends_or_is_cut(answer, how):
    assert ending(answer) == how


@pytest.mark.parametrize(
    ("reasons", "kind"),
    [
        (["1 <image> tags for 2 pictures", "30 <image> tags for 4 pictures"], "… <image> tags for … pictures"),
        (["my dog 1.png does not exist", "a/b c.jpg does not exist"], "… does not exist"),
        (
            ["a b.jpg cannot be read as a picture: x", "picture 3 cannot be read as a picture: x"],
            "… cannot be read as a picture: x",
        ),
        (
            ["the control token <|im_end|> in a turn", "the control token <s> in a turn"],
            "the control token … in a turn",
        ),
        (["it has a <video> or <audio> tag"], "it has a <video> or <audio> tag"),
        (["900 tokens, --max_length is 200", "1001 tokens, --max_length is 200"], "… tokens, --max_length is …"),
    ],
)
def test_similar_errors_are_counted_together(reasons, kind):
    assert {kind_of(reason) for reason in reasons} == {kind}


def test_a_sample_is_shown_with_one_token_for_each_image(corpus, processor, tmp_path):
    texts = ("<image>\n1000 or 2211? aaa", "2211 and 1000")
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": "0.png", "conversations": turns(*texts)}]))
    sample = show_sample(LlavaDataset(str(tmp_path), str(corpus / "images_dl")), Chat(processor))
    assert "<image>\n1000 or 2211? aaa<|im_end|>" in sample
    assert "⟦2211 and 1000<|im_end|>⟧" in sample
    assert sample.count("<image>") == 1
