"""The table on disk: when it is written, what it holds, and the items that a data set makes of its rows."""

import json
import os
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import turns
from PIL import Image
from record_files import PNGS, encoded, reasons_of

from train_llava.data import LlavaDataset
from train_llava.dataset.images import open_image
from train_llava.dataset.table import load_records


def test_a_file_that_grew_is_read_again(tmp_path):
    path = tmp_path / "chat.json"
    for answers in (["one"], ["one", "two"]):
        path.write_text(json.dumps([{"conversations": turns("?", answer)} for answer in answers]))
        assert len(load_records(str(path))[0]) == len(answers)


@pytest.mark.parametrize("changed", ["chat.json", "images.zip"])
def test_a_file_that_changed_at_the_same_size_is_read_again(tmp_path, changed):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.PNG", PNGS[1])
    files = {"chat.json": json.dumps([{"image": "a.PNG", "caption": "red"}]).encode()}
    files["images.zip"] = (tmp_path / "images.zip").read_bytes()
    others = {"chat.json": files["chat.json"].replace(b"red", b"run")}
    others["images.zip"] = files["images.zip"].replace(b"PNG", b"png")
    seen = []
    for number, contents in enumerate((files, files | {changed: others[changed]})):
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
            os.utime(tmp_path / name, (number * (name == changed), 100 + number * (name == changed)))
        seen.append(load_records(str(tmp_path))[0][0])
    assert seen[0]["error"] is None
    assert seen[0] != seen[1]


def test_a_batch_of_the_table_has_a_limit_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("train_llava.dataset.table.BATCH_BYTES", 1000)
    rows = [{"image": {"bytes": bytes(400), "path": None}, "caption": "x"} for _ in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    column = load_records(str(tmp_path))[0].data.column("image_bytes")
    assert [len(chunk) for chunk in column.chunks if len(chunk)] == [3, 3, 3, 1]


def test_parquet_rows_of_any_size_are_read_whole_and_in_order(tmp_path):
    rows = [{"id": str(i), "prompt": "?", "completion": "x" * (i % 7)} for i in range(1, 100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.PARQUET", row_group_size=40)
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "b.parquet")
    dataset = LlavaDataset(str(tmp_path))
    assert list(dataset.tables[0]["id"]) == [str(i) for i in range(1, 100)] + ["1", "2", "3"]
    assert sum(reason is not None for reason in reasons_of(tmp_path).values()) == 14  # an answer of no letter


def test_a_data_set_without_records_is_refused(tmp_path):
    (tmp_path / "chat.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no records"):
        LlavaDataset(str(tmp_path))


def test_weights_repeat_or_thin_out_a_source(tmp_path):
    for name in ("a", "b"):
        records = [{"id": f"{name}{i}", "conversations": turns("?", "!")} for i in range(10)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    paths = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    ids = [LlavaDataset(paths, data_weights=[2, 0.5])[i]["id"] for i in range(25)]
    assert sorted(ids[:20]) == sorted([f"a{i}" for i in range(10)] * 2)
    assert len(set(ids[20:])) == 5
    assert len(LlavaDataset(paths)) == 20
    with pytest.raises(ValueError, match="1 weights for 2 data paths"):
        LlavaDataset(paths, data_weights=[1])


def test_an_item_holds_its_images_or_their_sizes_or_neither(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (400, 300)), "JPEG", exif=exif))
    record = {"image": "a.jpg", "caption": ["red", "a red one"], "language": "en", "answers": ["x"], "kinds": ["what"]}
    (tmp_path / "chat.json").write_text(json.dumps([record]))
    whole, bare = LlavaDataset(str(tmp_path))[0], LlavaDataset(str(tmp_path), decode=False)[0]
    dataset = LlavaDataset(str(tmp_path))
    dataset.chat = SimpleNamespace(anyres=True, min_side=30)
    measured = dataset.read(0, decode=False)
    assert whole["image_sizes"] == measured["image_sizes"] == [(300, 400)]
    assert [image.size for image in whole["images"]] == [(300, 400)]
    assert (measured["images"], bare["images"], bare["image_sizes"]) == ([], [], [])
    assert (bare["language"], bare["answers"], bare["references"]) == ("en", ["x"], ["red", "a red one"])
    assert bare["kinds"] == ["what"]
    assert dataset[0]["images"][0].size == (75, 100) == open_image(tmp_path / "a.jpg", min_side=30).size
