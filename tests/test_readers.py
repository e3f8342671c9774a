"""Each way in which records and their pictures may be named, one by one: what is taken, and which goes first."""

import io
import json
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import turns
from PIL import Image
from test_records import PICTURES, faults, shown, tar

from train_llava.chat import Chat
from train_llava.data import CheckedDataset, LlavaDataset
from train_llava.dataset.images import open_image
from train_llava.dataset.readers import parse_json, pictures_of, read_json, read_jsonl
from train_llava.dataset.streaming import stream_items
from train_llava.records import table_row, text_of, to_messages

PART = {"type": "image", "image": "c"}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"images": ["a", None, "", "b"], "image": "c"}, ["a", "b"]),
        ({"images": [], "image": "a", "image_bytes": b"c"}, ["a"]),
        ({"images": [None], "image": None, "image_bytes": [b"c"]}, [b"c"]),
        ({"images": "a"}, ["a"]),
        ({"image": {"bytes": b"c", "path": "a"}}, [{"bytes": b"c", "path": "a"}]),
        ({"messages": [{"content": [PART, {"type": "text", "text": "?", "path": "x"}]}]}, ["c"]),
        ({"conversations": [{"content": [PART]}, {"content": "text"}, "no turn"]}, ["c"]),
        ({"prompt": [{"content": [PART, "no part", PART]}]}, ["c", "c"]),
        ({"prompt": "<image>"}, []),
        ({"images": ["a"], "messages": [{"content": [PART]}]}, ["a"]),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "u"}}, {"url": "v"}]}]}, ["u", "v"]),
        (
            {"messages": [{"content": [{"image": {"bytes": b"c"}}, {"path": "p", "image": None}]}]},
            [{"bytes": b"c"}, "p"],
        ),
        ({"messages": [{"content": [{"type": "image"}, {"type": "image", "image_url": None}]}]}, []),
    ],
)
def test_where_a_record_names_its_pictures(record, named):
    assert pictures_of(record) == named


@pytest.mark.parametrize(
    ("turn", "role", "text"),
    [
        ({"from": "human", "value": "a"}, "user", "a"),
        ({"from": None, "role": "user", "value": None, "content": "a"}, "user", "a"),
        ({"role": "user", "value": "a", "content": "b"}, "user", "a"),
        ({"from": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}, "user", "a\nb"),
        ({"from": "gpt", "value": "a"}, "assistant", "a"),
        ({"role": "assistant", "content": [{"type": "text", "text": "<b>"}]}, "assistant", "<b>"),
    ],
)
def test_how_a_turn_names_its_role_and_text(turn, role, text):
    other = {"from": "gpt", "value": "x"} if role == "user" else {"from": "human", "value": "x"}
    found = to_messages({"conversations": [turn, other] if role == "user" else [other, turn]})
    message = found[role == "assistant"]
    assert (message["role"], text_of(message)) == (role, text)


@pytest.mark.parametrize("key", ["language", "references", "answers"])
def test_half_of_a_character_anywhere_is_a_fault_of_its_record(key):
    row = table_row({"prompt": "a", "completion": "b", key: "\ud800"}, 3)
    assert (row["id"], row["error"]) == ("3", "it holds half of a surrogate pair, which is not Unicode")
    assert table_row({"id": "\ud800", "prompt": "a"}, 3)["id"] == "\\ud800"


@pytest.mark.parametrize(
    "content", [b'\xef\xbb\xbf{"a": 1}\r\n \r\n\t\n{"a": 2}\r\n', b'{"a": 1}\n\n{"a": 2}', b'{"a": 1}\n{"a": 2}\n\n\n']
)
def test_lines_may_end_and_begin_as_windows_writes_them(tmp_path, content):
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


def test_rows_of_any_size_are_read_whole_and_in_order(tmp_path):
    rows = [{"id": str(i), "prompt": "?", "completion": "x" * (i % 7)} for i in range(1, 100)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.PARQUET", row_group_size=40)
    pq.write_table(pa.Table.from_pylist(rows[:3]), tmp_path / "b.parquet")
    dataset = LlavaDataset(str(tmp_path))
    assert list(dataset.tables[0]["id"]) == [str(i) for i in range(1, 100)] + ["1", "2", "3"]
    assert sum(reason is not None for reason in faults(tmp_path).values()) == 14  # an answer of no letter


def test_a_null_of_a_samples_json_is_absent(tmp_path):
    record = {"id": None, "caption": None, "image": None, "conversations": turns("<image>\n?", "!")}
    tar(tmp_path / "a.tar", {"k.json": record, "k.png": PICTURES[1]})
    (item,) = LlavaDataset(str(tmp_path))
    assert (item["id"], shown(item)) == ("k", ["green"])


def picture_file(path, size) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.new("RGB", size).save(file, "JPEG", exif=exif)
    path.write_bytes(file.getvalue())


def test_what_an_item_holds_decoded_measured_and_neither(tmp_path):
    picture_file(tmp_path / "a.jpg", (400, 300))
    record = {"image": "a.jpg", "caption": ["red", "a red one"], "language": "en", "answers": ["x"]}
    (tmp_path / "chat.json").write_text(json.dumps([record]))
    whole, measured, bare = (
        LlavaDataset(str(tmp_path), **options)[0]
        for options in ({}, {"decode": False, "measure": True}, {"decode": False})
    )
    assert whole["image_sizes"] == measured["image_sizes"] == [(300, 400)]
    assert [image.size for image in whole["images"]] == [(300, 400)]
    assert (measured["images"], bare["images"], bare["image_sizes"]) == ([], [], [])
    assert (bare["language"], bare["answers"], bare["references"]) == ("en", ["x"], ["red", "a red one"])
    small = LlavaDataset(str(tmp_path), min_side=30)[0]
    assert small["images"][0].size == (75, 100) == open_image(tmp_path / "a.jpg", min_side=30).size


def test_a_stream_of_nothing_says_so(tmp_path, processor):
    (tmp_path / "chat.json").write_text("[]")
    log = tmp_path / "log"
    with pytest.raises(ValueError, match="gave a rank or worker nothing to read"):
        next(iter(stream_items(str(tmp_path), None, None, Chat(processor), log)))
    for weights, reason in (([-1], "from 0"), ([float("nan")], "from 0"), ([0], "from 0"), ([1, 1], "2 weights")):
        with pytest.raises(ValueError, match=reason):
            LlavaDataset(str(tmp_path), data_weights=weights)
        with pytest.raises(ValueError, match=reason):
            stream_items(str(tmp_path), None, weights, Chat(processor), log)


def test_a_streams_pictures_are_made_small_as_a_tables_are(tmp_path, processor):
    picture_file(tmp_path / "a.jpg", (400, 300))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "x"}))
    chat = Chat(processor)
    (item,) = islice(stream_items(str(tmp_path / "a.jsonl"), None, None, chat, tmp_path / "log"), 1)
    assert chat.min_side == 28
    assert item["images"][0].size == (75, 100)
    checked = CheckedDataset(LlavaDataset(str(tmp_path / "a.jsonl")), chat, tmp_path / "log")
    assert (checked[0]["stand_in"], checked[0]["images"][0].size) == (False, (300, 400))


def test_a_stand_in_says_that_it_is_one(tmp_path, processor):
    records = [{"prompt": "?", "completion": text} for text in ("", "!")]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    checked = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), tmp_path / "log", max_bad_fraction=1)
    assert [checked[i]["stand_in"] for i in (0, 1)] == [True, False]
