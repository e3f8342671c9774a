"""Data sets of every form are found and read whole, or refused by name."""

import json
from itertools import islice

import datasets
import pytest
from conftest import turns
from record_files import ANSWERS, FORMS, PNGS, TEXTS, VQA_FILES, coco, colors_of, reasons_of, vqa, write

from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.dataset.annotations import read_json
from train_llava.dataset.readers import BadRecordError, parse_json, read_jsonl
from train_llava.dataset.sources import find_records, form_of
from train_llava.dataset.streaming import stream_items
from train_llava.dataset.table import load_records
from train_llava.records import text_of


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
        with pytest.raises(ValueError, match=rf"{name} cannot be read|holds no records"):
            LlavaDataset(str(tmp_path / name))


def test_files_of_several_splits_are_not_read_as_one(tmp_path):
    for name in ("train-00000-of-00001", "train-00001-of-00002"):
        datasets.Dataset.from_list([{"conversations": turns("?", "!")}]).to_parquet(tmp_path / f"{name}.parquet")
    assert len(LlavaDataset(str(tmp_path))) == 2
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    assert len(LlavaDataset(str(tmp_path))) == len(LlavaDataset(f"{tmp_path}::test")) == 1
    (tmp_path / "train-00001-of-00002.parquet").rename(tmp_path / "val.parquet")
    with pytest.raises(ValueError, match=r"for test .* for validation .*::test"):
        LlavaDataset(str(tmp_path))


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_its_texts_and_pictures_and_names_what_is_wrong(tmp_path, name):
    make, form, faults = FORMS[name]
    (tmp_path / "my 数据").mkdir()
    data_path = str(make(tmp_path / "my 数据"))
    dataset, good, reasons = LlavaDataset(data_path), [], []
    for i in range(len(dataset)):
        try:
            good.append((text_of(dataset[i]["messages"][-1]), colors_of(dataset[i])))
        except BadRecordError as error:
            reasons.append(error.args[1])
    assert sorted(good) == sorted((text, [color]) for text, color in zip(TEXTS, ANSWERS, strict=True))
    assert len(reasons) == len(faults)
    assert all(fault in reason for fault, reason in zip(faults, reasons, strict=True)), reasons
    assert form_of(data_path, find_records(data_path)[0][0]) == form


def test_captions_are_references_and_people_answer(tmp_path):
    captions = load_records(str(coco(tmp_path / "a", True)))[0]
    assert captions[0]["references"] == [TEXTS[0], "again 0"]
    assert load_records(str(vqa(tmp_path / "c")))[0][1]["answers"] == [TEXTS[1], "other"]


JPG = {"cat.jpg": PNGS[0]}
PAIR = JPG | {"cat.txt": "red"}
ROW = '{"file_name": "cat.jpg", "text": "red"}'
PARQUET, SPLIT = "-00000-of-00001.parquet", {"train/metadata.csv": "file_name,text\na,b", "test/metadata.csv": "c"}


@pytest.mark.parametrize(
    ("files", "data_path", "reason"),
    [
        (PAIR | {"metadata.jsonl": ROW}, "", r"pictures with .* for train \(cat.jpg\) and metadata.jsonl for train"),
        (PAIR | {"a/captions.csv": "x"}, "", r"holds .csv for train \(a/captions.csv\) and pictures with texts"),
        ({"metadata.csv": "x", "metadata.jsonl": ROW}, "", r"metadata.csv for train .* and metadata.jsonl for train"),
        ({"a.parquet": b"", "b.tar": b""}, "", r".parquet for train \(a.parquet\) and .tar for train \(b.tar\)"),
        ({"a/b.csv": "x", "c/d.csv": "x"}, "", r".csv for train \(a/b.csv\) and .csv for train \(c/d.csv\): name"),
        (SPLIT, "::val", r"metadata.csv for test .* and metadata.csv for train .*: name the files "),
        ({f"{name}{PARQUET}": b"" for name in ("val", "testmini")}, "", "for testmini .* for validation .*::test"),
        (JPG, "", "holds no chat.json, and no other form .* or folder:PATH if its folders are classes"),
        ({"captions_val.json": "{}"}, "", "holds no chat.json, and no other form of docs/data.md: name the files"),
        ({"a.txt": "x"}, "folder:", "holds no chat.json"),
        (PAIR, "folder:nowhere", "nowhere does not exist"),
        ({"a.csv": "x"}, "/a.csv::test", "is no folder, and none of"),
        ({VQA_FILES[0]: {"questions": [{}]}}, f"/{VQA_FILES[0]}", "not VQA's file of questions"),
        ({VQA_FILES[1]: {"annotations": [{}]}}, f"/{VQA_FILES[1]}", "not VQA's file of questions"),
        ({"a.csv": "image,text\na.png,\"un\nb.png,c\n"}, "/a.csv", "line 3, cannot be read: unexpected end of data"),
        ({"a.tsv": "image\ttext\na\t红".encode("gbk")}, "/a.tsv", "a.tsv is not in UTF-8"),
        ({"a.arrow": b"x"}, "", "a.arrow cannot be read"),
    ],
)  # fmt: skip
def test_what_could_be_two_things_or_none_is_refused_by_name(tmp_path, files, data_path, reason):
    write(tmp_path, files)
    is_class = data_path.startswith("folder:")
    path = f"folder:{tmp_path}/{data_path[7:]}" if is_class else f"{tmp_path}{data_path}"
    with pytest.raises((OSError, ValueError), match=reason):
        LlavaDataset(path)


def test_a_split_is_chosen_as_on_the_hub(tmp_path):
    for split in ("train", "testdev", "valid"):
        write(tmp_path, {f"{split}-00000-of-00001.jsonl": json.dumps({"prompt": "?", "completion": split})})
    found = {name: load_records(f"{tmp_path}{name}")[0][0]["messages"] for name in ("", "::testdev", "::validation")}
    assert [json.loads(text)[1]["content"][0]["text"] for text in found.values()] == ["train", "testdev", "valid"]


def test_a_row_with_more_cells_is_one_bad_record_and_lines_may_be_of_unix(tmp_path):
    write(tmp_path, {"a.csv": 'questionId, Question, answer\nq, "What, now?", red\nr,a,b,c\ns,a,b,\n'})
    assert reasons_of(tmp_path / "a.csv") == {
        "q": None, "s": None, "line 3": "more cells than the header: put a text with ',' in it between double quotes"
    }  # fmt: skip


def test_a_column_of_file_names_may_have_other_names_and_blank_lines_may_come_first(tmp_path):
    for head in ("filename,question,answer", "Image_Path,question,answer", "img path,question,answer"):
        write(tmp_path, {"a.csv": f"\n\n{head}\na.png,?,red\n", "a.png": PNGS[0]})
        assert colors_of(LlavaDataset(str(tmp_path / "a.csv"))[0]) == ["red"]


def test_classes_and_texts_of_one_folder_are_two_tables(tmp_path):
    write(
        tmp_path, {"cat/a.png": PNGS[0], "cat/a.txt": "red", "cat/b.png/c.txt": "", "dog/b.png": PNGS[1], "b.zip": b""}
    )
    found = [reasons_of(tmp_path), reasons_of(f"folder:{tmp_path}")]
    assert found == [
        {"cat/a.png": None, "dog/b.png": "no text of its name is beside it"},
        {"cat/a.png": None, "dog/b.png": None},
    ]


def test_a_category_without_a_name_is_not_learnt(tmp_path):
    notes = [{"image_id": 1, "category_id": 7}, {"image_id": 1, "category_id": "8"}, {"image_id": 2}]
    images = [{"id": i, "file_name": "a.png"} for i in (1, 2)]
    content = {"images": images, "annotations": notes, "categories": [{"id": 8, "name": "cat"}]}
    rows, _ = load_records(str(write(tmp_path, {"a.json": content}) / "a.json"))
    assert json.loads(rows[0]["messages"])[1]["content"] == [{"type": "text", "text": "cat"}]
    assert rows[1]["error"] == "a turn of role assistant has no text"


def test_a_table_is_written_anew_when_a_text_or_the_other_file_of_vqa_changes(tmp_path):
    write(tmp_path, PAIR)
    assert [text_of(m) for m in LlavaDataset(str(tmp_path))[0]["messages"]][1] == "red"
    write(tmp_path, {"cat.txt": "blue"})
    assert [text_of(m) for m in LlavaDataset(str(tmp_path))[0]["messages"]][1] == "blue"
    path = vqa(tmp_path / "b")
    assert load_records(str(path))[0][0]["error"] is None
    write(path.parent, {VQA_FILES[1]: {"annotations": [{"question_id": 1}]}})
    assert load_records(str(path))[0][0]["error"] == "a turn of role assistant has no text"


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "far", PAIR)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "far")
    (tmp_path / "far" / "loop").symlink_to(tmp_path / "data")
    assert len(LlavaDataset(str(tmp_path / "data"))) == 1


@pytest.mark.parametrize(
    "name", ["imagefolder, csv", "tsv", "COCO captions", "VQA", "pairs", "classes", "save_to_disk, splits"]
)
def test_forms_can_be_streamed(tmp_path, processor, name):
    stream = stream_items(str(FORMS[name][0](tmp_path)), None, None, Chat(processor), tmp_path / "log", "skip", 0.9)
    assert {text_of(sample.messages[-1]) for sample in islice(stream, 3)} == set(TEXTS)


def test_pictures_may_lie_in_another_folder_than_their_texts(tmp_path):
    write(tmp_path, PAIR | {"other/cat.jpg": PNGS[1]})
    assert colors_of(LlavaDataset(str(tmp_path), str(tmp_path / "other"))[0]) == ["green"]


def test_files_without_the_name_of_a_split_are_for_training(tmp_path):
    for i, names in enumerate((("test/metadata.csv", "metadata.csv"), ("test.csv", "sft.csv"))):
        write(tmp_path / str(i), dict.fromkeys(names, "question,answer\na,b\n"))
        assert find_records(str(tmp_path / str(i)))[0] == [tmp_path / str(i) / names[1]]
