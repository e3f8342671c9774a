"""Files of JSON, JSON Lines, CSV and Parquet are read whole, or refused by name."""

import json

import datasets
import pytest
from conftest import turns
from record_files import reasons_of

from train_llava.data import LlavaDataset
from train_llava.dataset.readers import parse_json, read_json, read_jsonl
from train_llava.dataset.table import load_records


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("odd", [None, float("inf"), "\ud800", 1 << 70])
def test_a_json_list_is_read_as_python_reads_it(tmp_path, indent, odd):
    records = [{"a": "b" * i, "n": [i, 1.5, odd, "]},{"]} for i in range(30)]
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(records, indent=indent), encoding="utf-8")
    assert list(read_json(tmp_path / "list.json")) == records


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": ', '[{"a": 1} {"b": 2,}]', "[1, 2", "nothing"])
def test_broken_json_is_refused(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=r"list\.json is not"):
        list(read_json(tmp_path / "list.json"))


@pytest.mark.parametrize("encoding", ["utf-16", "gbk"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_file_in_another_encoding_is_refused_by_name(tmp_path, encoding, ending):
    path = tmp_path / f"list.{ending}"
    text = json.dumps({"conversations": turns("什么?", "红色")}, ensure_ascii=False)
    path.write_text(f"[{text}]" if ending == "json" else text, encoding=encoding)
    with pytest.raises(ValueError, match=rf"{path} is not in UTF-8"):
        load_records(str(path))


def test_a_line_that_is_not_json_is_one_bad_record(tmp_path):
    good = json.dumps({"id": "a", "conversations": turns("?", "line\u2028separator")}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text("\n".join([good, '{"id": ', good.replace('"a"', '"b"')]))
    reasons = reasons_of(tmp_path / "data.jsonl")
    assert [reasons["a"], reasons["b"]] == [None, None]
    assert "data.jsonl, line 2, is not JSON" in reasons["line 2"]


@pytest.mark.parametrize(
    "content", [b'\xef\xbb\xbf{"a": 1}\r\n \r\n\t\n{"a": 2}\r\n', b'{"a": 1}\n\n{"a": 2}', b'{"a": 1}\n{"a": 2}\n\n\n']
)
def test_lines_may_begin_and_end_as_windows_writes_them(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [{"a": 1}, {"a": 2}]
    assert parse_json(b"\xef\xbb\xbf[Infinity]", "x") == [float("inf")]


def test_an_empty_file_is_refused_by_name(tmp_path):
    (tmp_path / "a.json").touch()
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        list(read_json(tmp_path / "a.json"))
    for name in ("a.jsonl", "a.parquet"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"{name} cannot be read as Parquet|holds no records"):
            LlavaDataset(str(tmp_path / name))


def test_files_of_several_splits_are_not_read_as_one(tmp_path):
    for name in ("train-00000-of-00001", "train-00001-of-00002"):
        datasets.Dataset.from_list([{"conversations": turns("?", "!")}]).to_parquet(tmp_path / f"{name}.parquet")
    assert len(LlavaDataset(str(tmp_path))) == 2
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(FileNotFoundError, match="has files of test and train side by side: name the files"):
        LlavaDataset(str(tmp_path))
