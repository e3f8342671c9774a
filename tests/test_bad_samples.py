"""A bad record is logged once and replaced by a good one, until there are too many."""

import json

import pytest
from conftest import turns

from train_llava.chat import Chat
from train_llava.data import BadRecordError, CheckedDataset, LlavaDataset
from train_llava.dataset.bad_samples import log_bad_sample


def test_a_good_record_replaces_a_bad_one_which_is_logged_once(bad_data, processor, tmp_path):
    root, reasons = bad_data
    checked = CheckedDataset(LlavaDataset(str(root)), Chat(processor, 200), tmp_path / "bad.jsonl", "skip", 1.0)
    passes = [[checked[i].id for i in range(len(checked))] for _ in range(2)]
    assert passes[0] == passes[1]
    assert passes[0][::2] == [f"good {i}" for i in range(len(reasons))]
    assert all(name.startswith("good") for name in passes[0])
    log = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in log} == reasons.keys()
    assert len(log) == len(reasons)


def test_too_many_bad_records_stop_a_run_and_one_stops_a_strict_run(bad_data, processor, tmp_path):
    dataset, chat = LlavaDataset(str(bad_data[0])), Chat(processor, 200)
    strict = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", bad_samples="error")
    with pytest.raises(BadRecordError, match=r"record 'truncated': truncated\.jpg"):
        strict[1]
    checked = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", max_bad_fraction=2.5 / len(dataset))
    assert checked[0].id == "good 0"
    with pytest.raises(ValueError, match=rf"3 of {len(dataset)} records are bad, more than --max_bad_fraction"):
        [checked[i] for i in (1, 3, 5)]


@pytest.mark.parametrize("record_id", [{"id": "one"}, {}, {"id": "a\u2028b\u0085c"}])
def test_bad_records_are_counted_whatever_their_ids(processor, tmp_path, record_id):
    records = [record_id | {"conversations": turns("?", "!") if i % 10 == 0 else []} for i in range(300)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    dataset, log = LlavaDataset(str(tmp_path)), tmp_path / "bad.jsonl"
    checked = CheckedDataset(dataset, Chat(processor), log, max_bad_fraction=0.9)
    for _ in range(2):
        assert {sample.messages[1]["content"][0]["text"] for sample in map(checked.__getitem__, range(300))} == {"!"}
    assert len(log.read_text().split("\n")) == 270 + 1
    with pytest.raises(ValueError, match="270 of 300 records are bad, more than --max_bad_fraction"):
        CheckedDataset(dataset, Chat(processor), log, max_bad_fraction=0.89)[1]


def test_bad_records_in_a_row_have_different_replacements(tmp_path, processor):
    bad, good = [{"conversations": []}] * 30, [{"id": f"{i}", "conversations": turns("?", "!")} for i in range(30)]
    (tmp_path / "chat.json").write_text(json.dumps(bad + good))
    log = tmp_path / "log.jsonl"
    checked = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), log, max_bad_fraction=1)
    replacements = [checked[i].id for i in range(30)]
    assert len(set(replacements)) > 10
    written = log.read_bytes()
    again = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), log, max_bad_fraction=1)
    assert [again[i].id for i in range(30)] == replacements
    assert log.read_bytes() == written
    assert len(written.splitlines()) == 30
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(written[:-9])
    assert log_bad_sample(torn, 70, "70", "?") == 30
    assert torn.read_bytes().endswith(b'\n{"record": 70, "id": "70", "reason": "?"}\n')


def test_a_replacement_is_marked(tmp_path, processor):
    records = [{"prompt": "?", "completion": text} for text in ("", "!")]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    checked = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), tmp_path / "log", max_bad_fraction=1)
    assert [checked[i].is_replacement for i in (0, 1)] == [True, False]
