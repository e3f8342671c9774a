"""Every format gives the same messages and pictures; what must load loads, what is bad is refused with its reason."""

import base64
import io
import json
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import turns
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from train_llava.chat import Chat
from train_llava.check_data import kind_of, show_sample
from train_llava.data import BadRecordError, CheckedDataset, LlavaCollator, LlavaDataset, to_item
from train_llava.dataset.bad_samples import log_bad_sample
from train_llava.dataset.images import matches_processor, open_image, prepare_pictures
from train_llava.dataset.readers import read_json
from train_llava.dataset.streaming import stream_items
from train_llava.dataset.table import load_records
from train_llava.records import table_row, text_of, to_messages
from train_llava.trainer import with_ids

ROOT = Path(__file__).parent.parent
COLORS = [(200, 30, 40), (30, 180, 60), (20, 40, 220)]
QUESTION, ANSWERS = "<image>\nWhat is this?", ["red", "green", "blue"]


def png(color) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


PICTURES = [png(color) for color in COLORS]
LLAVA = [{"id": i, "image": f"sub dir/图 {i}.png", "conversations": turns(QUESTION, ANSWERS[i])} for i in range(3)]


def write_files(folder: Path) -> None:
    (folder / "sub dir").mkdir(parents=True)
    for i, picture in enumerate(PICTURES):
        (folder / f"sub dir/图 {i}.png").write_bytes(picture)


def llava_folder(root: Path, pictures: str = "images_dl") -> str:
    write_files(root / pictures)
    (root / "chat.json").write_text(json.dumps(LLAVA))
    return str(root)


def llava_beside(root: Path) -> str:
    write_files(root)
    (root / "chat.json").write_text(json.dumps(LLAVA))
    return str(root)


def linked_pictures(root: Path) -> str:
    """As a hub cache has them: the folder is a link, and its files are links to somewhere else."""
    write_files(root / "blobs")
    (root / "snapshot" / "sub dir").mkdir(parents=True)
    for i in range(3):
        (root / "snapshot" / f"sub dir/图 {i}.png").symlink_to(root / f"blobs/sub dir/图 {i}.png")
    (root / "data").mkdir()
    (root / "data" / "images").symlink_to(root / "snapshot")
    (root / "data" / "chat.json").write_text(json.dumps(LLAVA))
    return str(root / "data")


def zipped(root: Path, method: int, prefix: str = "") -> str:
    (root / "chat.json").write_text(json.dumps(LLAVA))
    with zipfile.ZipFile(root / "images.zip", "w", method) as archive:
        for i, picture in enumerate(PICTURES):
            archive.writestr(f"{prefix}sub dir/图 {i}.png", picture)
    return str(root)


def jsonl_messages(root: Path) -> str:
    write_files(root / "images")
    lines = []
    for i in range(3):
        content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWERS[i]}]
        lines.append(json.dumps({"id": f"{i}", "images": [f"sub dir/图 {i}.png"], "messages": messages}))
    (root / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(root / "data.jsonl")


def jsonl_inline_pictures(root: Path) -> str:
    write_files(root / "images")
    lines = []
    for i in range(3):
        content = [{"type": "image", "image": f"sub dir/图 {i}.png"}, {"type": "text", "text": "What is this?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWERS[i]}]
        lines.append(json.dumps({"id": f"{i}", "messages": messages}))
    (root / "data.jsonl").write_text("\n".join(lines))
    return str(root / "data.jsonl")


def parquet(root: Path, column: str) -> str:
    kept = [{"bytes": picture, "path": None} for picture in PICTURES]
    rows = [
        {
            "id": str(i),
            column: kept[i] if column == "image" else [kept[i]],
            "conversations": turns(QUESTION, ANSWERS[i]),
        }
        for i in range(3)
    ]
    for i, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), root / f"train-{i}.parquet")
    return str(root)


def hub_features(root: Path) -> str:
    """A data set with an Image feature, as `datasets` writes it."""
    rows = {"id": ["0", "1", "2"], "image": [Image.open(io.BytesIO(p)) for p in PICTURES], "caption": ANSWERS}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(root / "data.parquet")
    return str(root / "data.parquet")


def tar(path: Path, members: dict[str, bytes | dict]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards(root: Path) -> str:
    for name, numbers in (("a", (0, 1)), ("b", (2,))):
        records = {i: {"id": i, "image": "ignored.png", "conversations": turns(QUESTION, ANSWERS[i])} for i in numbers}
        tar(
            root / f"{name}.tar",
            {f"{i:05}.{e}": c for i in numbers for e, c in (("png", PICTURES[i]), ("json", records[i]))},
        )
    return str(root)


def shards_beside_pictures(root: Path) -> str:
    (root / "images").mkdir()
    return shards(root)


def messages(i: int, content) -> list[dict]:
    said = ANSWERS[i] if isinstance(content, str) else [{"type": "text", "text": ANSWERS[i]}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": said}]


PLAIN, TEXT = "What is this?", {"type": "text", "text": "What is this?", "image_url": None, "image": None}
URIS = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in PICTURES]
RECORD_FORMATS = {
    "minimind-v": lambda i: {"conversations": json.dumps(messages(i, QUESTION)), "image_bytes": PICTURES[i]},
    "FineVision": lambda i: {
        "images": [PICTURES[i]],
        "texts": [{"user": PLAIN, "assistant": ANSWERS[i], "source": ""}],
    },
    "TRL, plain": lambda i: {"images": [PICTURES[i]], "messages": messages(i, PLAIN)},
    "TRL, prompt and completion": lambda i: (
        {"image": PICTURES[i]} | dict(zip(("prompt", "completion"), ([m] for m in messages(i, PLAIN)), strict=True))
    ),
    "prompt and completion": lambda i: {"image": PICTURES[i], "prompt": PLAIN, "completion": ANSWERS[i]},
    "question and answer": lambda i: {"image": PICTURES[i], "question": PLAIN, "answer": ANSWERS[i]},
    "OpenAI, data URI": lambda i: {
        "messages": messages(i, [{"type": "image_url", "image_url": {"url": URIS[i]}}, TEXT]),
    },
    "nulls": lambda i: {
        **dict.fromkeys(("id", "conversations", "images", "video", "answers")),
        "messages": messages(i, [{"type": "image", "text": None}, TEXT]),
        "image": {"bytes": PICTURES[i], "path": None},
        "audio": [],
    },
}


def parquet_of(shape, root: Path) -> str:
    pq.write_table(pa.Table.from_pylist([shape(i) for i in range(3)]), root / "data.parquet")
    return str(root / "data.parquet")


FORMATS = {
    "LLaVA, images_dl": llava_folder,
    "LLaVA, images": lambda root: llava_folder(root, "images"),
    "LLaVA, beside": llava_beside,
    "LLaVA, stored zip": lambda root: zipped(root, zipfile.ZIP_STORED),
    "LLaVA, deflated zip in a folder": lambda root: zipped(root, zipfile.ZIP_DEFLATED, "images/"),
    "jsonl, messages": jsonl_messages,
    "jsonl, pictures inside the messages": jsonl_inline_pictures,
    "parquet, image": lambda root: parquet(root, "image"),
    "parquet, images": lambda root: parquet(root, "images"),
    "captions in parquet": hub_features,
    "WebDataset": shards,
    "WebDataset beside a folder images": shards_beside_pictures,
    "LLaVA, bzip2 zip": lambda root: zipped(root, zipfile.ZIP_BZIP2),
    "LLaVA, lzma zip": lambda root: zipped(root, zipfile.ZIP_LZMA),
    "LLaVA, linked": linked_pictures,
    **{name: partial(parquet_of, shape) for name, shape in RECORD_FORMATS.items()},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same(tmp_path, name):
    dataset = LlavaDataset(FORMATS[name](tmp_path))
    assert len(dataset) == 3
    for i, color in enumerate(COLORS):
        item = dataset[i]
        asked = "Describe this picture." if "caption" in name else "What is this?"
        assert item["id"] == str(i)
        assert [text_of(message) for message in item["messages"]] == [f"<image>\n{asked}", ANSWERS[i]]
        assert [image.getpixel((3, 3)) for image in item["images"]] == [color]
        assert item["images"][0].size == (8, 6)


def test_mixed_ids_and_text_only_records(tmp_path):
    records = [
        {"id": 7, "image": "coco/a.png", "conversations": turns(QUESTION, "red"), "model": ""},
        {"id": "x", "conversations": turns("Hello", "Hi", "Bye", "Bye.")},
        {"conversations": turns("No id", "none")},
    ]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(records, indent=1))
    dataset = LlavaDataset(str(tmp_path / "llava_v1_5_mix665k.json"))
    assert [dataset[i]["id"] for i in range(3)] == ["7", "x", "2"]
    assert [len(dataset[i]["images"]) for i in range(3)] == [1, 0, 0]


def test_weights_repeat_and_thin_out_a_source(tmp_path):
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


def test_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "chat.json"
    for answers in (["one"], ["one", "two"]):
        path.write_text(json.dumps([{"conversations": turns("?", answer)} for answer in answers]))
        assert len(load_records(str(path))[0]) == len(answers)


def test_no_records_are_refused(tmp_path):
    (tmp_path / "chat.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no records"):
        LlavaDataset(str(tmp_path))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("odd", [None, float("inf"), "\ud800", 1 << 70])
def test_a_json_list_is_read_as_python_reads_it(tmp_path, indent, odd):
    records = [{"a": "b" * i, "n": [i, 1.5, odd, "]},{"]} for i in range(30)]
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(records, indent=indent), encoding="utf-8")
    assert list(read_json(tmp_path / "list.json")) == records


@pytest.mark.parametrize("encoding", ["utf-16", "gbk"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_file_of_another_encoding_is_refused_by_name(tmp_path, encoding, ending):
    path = tmp_path / f"list.{ending}"
    text = json.dumps({"conversations": turns("什么?", "红色")}, ensure_ascii=False)
    path.write_text(f"[{text}]" if ending == "json" else text, encoding=encoding)
    with pytest.raises(ValueError, match=rf"{path} is not in UTF-8"):
        load_records(str(path))


def faults(data_path: Path, image_dir: Path | None = None) -> dict[str, str | None]:
    """What is wrong with each record, its picture included, by its id."""
    dataset, reasons = LlavaDataset(str(data_path), image_dir and str(image_dir)), {}
    for i in range(len(dataset)):
        try:
            reasons[dataset[i]["id"]] = None
        except BadRecordError as error:
            reasons[error.args[0]] = error.args[1]
    return reasons


def test_a_line_that_is_not_json_is_one_bad_record(tmp_path):
    good = json.dumps({"id": "a", "conversations": turns("?", "line\u2028separator")}, ensure_ascii=False)
    (tmp_path / "data.jsonl").write_text("\n".join([good, '{"id": ', good.replace('"a"', '"b"')]))
    reasons = faults(tmp_path / "data.jsonl")
    assert [reasons["a"], reasons["b"]] == [None, None]
    assert "data.jsonl, line 2, is not JSON" in reasons["line 2"]


COLOR_NAMES = dict(zip(COLORS, ANSWERS, strict=True))


def shown(item: dict) -> list[str]:
    return [COLOR_NAMES[image.getpixel((3, 3))] for image in item["images"]]


@pytest.mark.parametrize(
    ("members", "fields", "order"),
    [
        (["0.png", "1.png", "10.png", "2.png"], {}, [0, 1, 2, 0]),
        (["a.png", "b.png", "c.png"], {"images": ["c.png", "a.png", "b.png"]}, [2, 0, 1]),
        (["a.png", "b.png"], {"images": ["far/0.b.png", "far/0.a.png"]}, [1, 0]),
        (
            ["b.PNG", "a.png"],
            {"messages": [{"type": "image", "image": "a.png"}, {"type": "image", "image": "b.png"}]},
            [1, 0],
        ),
        (["0.png", "1.png", "10.png", "2.png"], {"images": ["x.jpg", "y.jpg", "z.jpg", "w.jpg"]}, [0, 1, 2, 0]),
    ],
)
def test_pictures_of_a_sample_in_the_order_of_its_json_or_of_their_numbers(tmp_path, members, fields, order):
    colors = {"0.png": 0, "1.png": 1, "2.png": 2, "10.png": 0, "a.png": 0, "b.png": 1, "c.png": 2, "b.PNG": 0}
    colors |= {"a.png": 1} if "b.PNG" in members else {}
    record = {"conversations": turns("<image>" * len(members) + "?", "!")} | fields
    if "messages" in fields:
        record = {"messages": messages(0, fields["messages"])}
    pictures = {f"0.{name}": PICTURES[colors[name]] for name in members}
    tar(tmp_path / "a.tar", pictures | {"0.json": record})
    assert shown(LlavaDataset(str(tmp_path))[0]) == [ANSWERS[i] for i in order]


def test_a_bad_sample_of_a_shard_is_one_bad_record(tmp_path):
    good = {"conversations": turns(QUESTION, "red")}
    bad = {
        "b.json": b"{",
        "c.json": [good],
        "d.json": b'{"a": "\xff"}',
        "e.txt": b"\xff",
        "f.json": good | {"images": ["f.png", "no.png"]},
    }
    samples = {"a.json": good, "a.png": PICTURES[0]}
    for name, content in bad.items():
        samples |= {name: content, f"{name[0]}.png": PICTURES[0]}
    tar(
        tmp_path / "x.tar",
        samples | {"g.json": good, "g.png": PICTURES[0][:50], "h.txt": b"red", "h.png": PICTURES[0]},
    )
    reasons = faults(tmp_path)
    assert [reasons["a"], reasons["h"]] == [None, None]
    for name, reason in {
        "b": "x.tar: b.json is not JSON",
        "c": "x.tar: c.json is not an object",
        "d": "x.tar: d.json is not in UTF-8",
        "e": "x.tar: e.txt is not in UTF-8",
        "f": "x.tar: no.png is not in the sample",
        "g": f"g.png in {tmp_path}/x.tar cannot be read as a picture",
    }.items():
        assert reason in reasons[name]


@pytest.mark.parametrize("cut", [0.5, 0.7, 0.9])
def test_a_truncated_shard_gives_what_it_has(tmp_path, cut):
    good = {"conversations": turns(QUESTION, "red")}
    tar(tmp_path / "x.tar", {f"{i}.{e}": c for i in range(9) for e, c in (("png", PICTURES[0]), ("json", good))})
    content = (tmp_path / "x.tar").read_bytes()[: 9 * 4 * 512]
    (tmp_path / "x.tar").write_bytes(content[: int(len(content) * cut)])
    *reasons, last = faults(tmp_path).values()
    assert reasons[: int(9 * cut)] == [None] * int(9 * cut)
    assert None not in reasons[int(9 * cut) :]
    assert "x.tar: the archive is broken in" in last
    (tmp_path / "x.tar").write_bytes(b"no archive" * 99)
    with pytest.raises(ValueError, match="is not an uncompressed tar"):
        faults(tmp_path)


def test_one_corrupt_member_of_an_archive_is_one_bad_record(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        root = tmp_path / str(method)
        root.mkdir()
        zipped(root, method)
        content = bytearray((root / "images.zip").read_bytes())
        with zipfile.ZipFile(root / "images.zip") as archive:
            member = archive.infolist()[1]
        begin = member.header_offset + 30 + len(member.filename.encode())
        content[begin + member.compress_size // 2] ^= 0xFF
        (root / "images.zip").write_bytes(content)
        reasons = faults(root)
        assert [reasons["0"], reasons["2"]] == [None, None]
        assert f"sub dir/图 1.png cannot be taken out of {root}/images.zip" in reasons["1"]
    (root / "images.zip").write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"images\.zip is not a whole zip archive"):
        LlavaDataset(str(root))


def test_members_of_one_name_are_told_apart_or_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, picture in (("x/a", 0), ("y/a", 1), ("x/b", 2), ("y/b", 2), ("c", 0), ("z/c", 1)):
            archive.writestr(f"{name}.png", PICTURES[picture])
    names = ["a.png", "y/a.png", "b.png", "c.png", "d.png"]
    records = [{"id": name, "image": name, "caption": "x"} for name in names]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    reasons, dataset = faults(tmp_path), LlavaDataset(str(tmp_path))
    assert reasons["a.png"] == "a.png is the name of several members of the archive"
    assert reasons["d.png"] == "d.png is not in the archive"
    assert [shown(dataset[i]) for i in (1, 2, 3)] == [["green"], ["blue"], ["red"]]


def test_pictures_inside_and_beside_a_record_keep_their_order(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PICTURES[1])
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in (URIS[0], "a.png", URIS[2])]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages(0, parts)}, {"messages": messages(0, [
        {"type": "image_url", "image_url": URIS[0][:-200]}])}]))  # fmt: skip
    assert shown(LlavaDataset(str(tmp_path))[0]) == ANSWERS
    assert len(faults(tmp_path)["1"]) < 250
    row = {"images": ["a.png", {"bytes": PICTURES[2], "path": None}], "messages": messages(0, "<image><image>")}
    (tmp_path / "rows").mkdir()
    item = to_item(table_row(row, 0), tmp_path / "images")
    assert shown(item) == ["green", "blue"]


def test_a_batch_of_the_table_is_of_not_too_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("train_llava.dataset.table.BATCH_BYTES", 1000)
    rows = [{"image": {"bytes": bytes(400), "path": None}, "caption": "x"} for _ in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    column = load_records(str(tmp_path))[0].data.column("image_bytes")
    assert [len(chunk) for chunk in column.chunks if len(chunk)] == [3, 3, 3, 1]


@pytest.mark.parametrize(
    ("data_path", "config", "split"),
    [
        ("a/b", None, "train"),
        ("a/b:c:validation", "c", "validation"),
        ("a/b::test", None, "test"),
        ("a/b:c", "c", "train"),
    ],
)
def test_a_hub_data_set_has_a_configuration_and_a_split(monkeypatch, data_path, config, split):
    asked = []

    def load_dataset(*args, **options):
        asked.append((*args, options["split"]))
        rows = [{"image": PICTURES[i], "caption": ANSWERS[i]} for i in range(3)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = LlavaDataset(data_path)
    assert [shown(dataset[i]) for i in range(3)] == [["red"], ["green"], ["blue"]]
    assert asked == [("a/b", config, split)]


def test_answers_and_references_are_kept(tmp_path):
    official = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}, {"answer": "no", "answer_id": 2}]
    records = [
        {"question": "?", "answer": "yes", "answers": answers} for answers in (official, ["yes", "no"], "yes", None)
    ]
    (tmp_path / "chat.json").write_text(json.dumps([*records, {"image": "a.png", "caption": ["red", "a red one"]}]))
    table = load_records(str(tmp_path))[0]
    assert table["answers"][:4] == [["yes", "no"], ["yes", "no"], ["yes"], []]
    assert table[4]["references"] == ["red", "a red one"]
    assert json.loads(table[4]["messages"])[1]["content"] == [{"type": "text", "text": "red"}]


PEOPLE = ["net", "nets", "net", "a net"]
SCIENCE = {"question": "Which?", "choices": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("record", "name", "asked", "answer", "answers"),
    [
        ({"question_id": 7, "image_id": "a1", "question": "?", "answers": PEOPLE}, "7", "?", "net", PEOPLE),
        ({"question_id": 7, "question": "?", "multiple_choice_answer": "net",
          "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(PEOPLE)]}, "7", "?", "net", PEOPLE),
        ({"questionId": "49", "question": "?", "answers": ["1", "one"]}, "49", "?", "1", ["1", "one"]),
        ({"image_id": "a1", "question": "?", "answer": ["b", "a", "b"]}, "a1", "?", "b", ["b", "a", "b"]),
        ({"question_id": 0, "question": "?", "answer": 3}, "0", "?", "3", []),
        ({"id": "x", "question_id": 7, "question": "?", "answer": "as it is", "answers": PEOPLE}, "x", "?", "as it is",
         PEOPLE),
        (SCIENCE | {"answer": 1, "hint": "It barks."}, "0", "It barks.\nWhich?\ncat\ndog", "dog", []),
        (SCIENCE | {"answer": 0, "hint": ""}, "0", "Which?\ncat\ndog", "cat", []),
        (SCIENCE | {"answer": "B"}, "0", "Which?\ncat\ndog", "dog", []),
        ({"question": "How many?", "options": ["2", "1"], "answer": "1"}, "0", "How many?\n2\n1", "1", []),
    ],
)  # fmt: skip
def test_records_of_visual_questions_are_read_as_published(record, name, asked, answer, answers):
    row = table_row(record, 0)
    assert row["error"] is None
    assert list(map(text_of, json.loads(row["messages"]))) == [asked, answer]
    assert (row["id"], row["answers"]) == (name, answers)


def test_several_turns_and_pictures_go_in_front_of_the_first_question():
    texts = [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": "2"}]
    asked = to_messages({"images": ["a", "b"], "texts": texts})
    assert list(map(text_of, asked)) == ["<image>\n<image>\nOne?", "1", "Two?", "2"]
    system = [{"role": "system", "content": "Be brief."}, *messages(0, "And <image>?")]
    assert list(map(text_of, to_messages({"image": "a", "messages": system})))[1] == "And \n<image>\n?"
    system[1]["content"] = "What?"
    assert list(map(text_of, to_messages({"image": "a", "messages": system})))[:2] == ["Be brief.", "<image>\nWhat?"]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": ', '[{"a": 1} {"b": 2,}]', "[1, 2", "nothing"])
def test_broken_json_is_refused(tmp_path, text):
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ValueError, match=r"list\.json is not"):
        list(read_json(tmp_path / "list.json"))


# pictures that must load -> the colour that one of their pixels must have
def saved(mode: str, color, ending: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 6), color).save(file, ending, **options)
    return file.getvalue()


def deep_gray(kind: type, value: float) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8), value, kind)).save(file, "TIFF")
    return file.getvalue()


def palette() -> bytes:
    image, file = Image.new("P", (8, 6), 0), io.BytesIO()
    image.putpalette([10, 20, 30])
    image.save(file, "PNG", transparency=0)
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    return file.getvalue()


RED, WHITE = (255, 0, 0), (255, 255, 255)
GOOD = {
    "gray": (saved("L", 77, "PNG"), (77, 77, 77)),
    "CMYK": (saved("CMYK", (0, 255, 255, 0), "JPEG"), RED),
    "palette, transparent": (palette(), WHITE),
    "RGBA on white": (saved("RGBA", (255, 0, 0, 0), "PNG"), WHITE),
    "LA on white": (saved("LA", (0, 0), "PNG"), WHITE),
    "1-bit": (saved("1", 1, "PNG"), WHITE),
    "16-bit gray": (deep_gray(np.uint16, 32896), (128, 128, 128)),
    "32-bit gray of 16 bits": (deep_gray(np.int32, 32896), (128, 128, 128)),
    "32-bit gray": (deep_gray(np.int32, 70000), (255, 255, 255)),
    "32-bit gray, unsigned": (deep_gray(np.uint32, 4_000_000_000), (255, 255, 255)),
    "gray of floats to 1": (deep_gray(np.float32, 0.5), (128, 128, 128)),
    "gray of floats to 255": (deep_gray(np.float32, 77), (77, 77, 77)),
    "GIF": (animated(), RED),
    "WebP": (saved("RGB", RED, "WEBP", lossless=True), RED),
    "BMP": (saved("RGB", RED, "BMP"), RED),
    "TIFF": (saved("RGB", RED, "TIFF"), RED),
    "progressive JPEG": (saved("RGB", WHITE, "JPEG", progressive=True), WHITE),
}


@pytest.mark.parametrize("name", GOOD)
def test_pictures_that_must_load(name, tmp_path):
    content, color = GOOD[name]
    (tmp_path / "名 字.bin").write_bytes(content)
    for source in (content, tmp_path / "名 字.bin"):
        image = open_image(source, "x")
        assert (image.mode, image.size) == ("RGB", (8, 6))
        assert np.abs(np.subtract(image.getpixel((3, 3)), color)).max() <= 1


IMAGE_PROCESSORS = {
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "crop of more": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
    "crop, Lanczos": CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=1
    ),
    "pad": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_pad=True, do_center_crop=False),
    "stretch": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_strips_reach_the_model(name):
    """Where the processor itself can take them, its pixels; where it would need gigabytes, little memory."""
    image_processor, rng = IMAGE_PROCESSORS[name], np.random.default_rng(3)
    sizes = ((1, 1), (3, 400), (401, 3), (7, 100), (333, 40), (40, 301), (1, 5))
    images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]
    ours = prepare_pictures(image_processor, images)["pixel_values"]
    theirs = image_processor(images, return_tensors="pt")["pixel_values"]
    assert ours.shape == (len(sizes), 3, 28, 28)
    # what is padded is made small before, so a line is wider by a pixel; else the rounding to 256 levels differs
    difference = (ours - theirs).abs().flatten(1)
    assert difference.mean(1).max() < (0.3 if name == "pad" else 0.02)
    tracemalloc.start()
    for size in ((60000, 1), (1, 60000)):
        assert prepare_pictures(image_processor, [Image.new("RGB", size, "red")])["pixel_values"].isfinite().all()
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_the_fast_path_gives_the_processors_pixels(processor):
    assert matches_processor(processor.image_processor)
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in ((28, 28, 3), (90, 41, 3), (33, 257, 3))
    ]
    difference = (
        prepare_pictures(processor.image_processor, images)["pixel_values"]
        - processor.image_processor(images, return_tensors="pt")["pixel_values"]
    ).abs()
    level = 1 / 255 / 0.26  # of 256, divided by the deviation
    assert difference.max() < 8 * level  # noise is the worst case
    assert difference.mean() < 0.2 * level


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    rng = np.random.default_rng(2)
    smooth = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize(
        (1800, 1200), Image.Resampling.BICUBIC
    )
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=95)
    small = open_image(file.getvalue(), "x", min_side=56)
    assert small.size == (225, 150)
    whole = open_image(file.getvalue(), "x")
    assert whole.size == (1800, 1200)
    seen = [np.asarray(image.resize((84, 56), Image.Resampling.BICUBIC)).astype(float) for image in (small, whole)]
    assert np.abs(seen[0] - seen[1]).mean() < 1.5


def test_deep_gray_is_scaled_and_does_not_wrap():
    file = io.BytesIO()
    Image.fromarray(np.arange(0, 200000, 2000, dtype=np.int32).reshape(10, 10)).save(file, "TIFF")
    gray = np.asarray(open_image(file.getvalue(), "x"))[..., 0].flatten()
    assert (np.diff(gray.astype(int)) >= 0).all()
    assert (gray[0], gray[-1]) == (0, 255)


@pytest.mark.parametrize(
    "error", [RuntimeError, struct.error, EOFError, MemoryError, KeyError, zlib.error, SyntaxError]
)
def test_whatever_a_decoder_raises_is_the_records_reason(tmp_path, monkeypatch, error):
    def fail(_):
        raise error("damaged")

    (tmp_path / "a.png").write_bytes(PICTURES[0])
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": "a.png", "caption": "red"}]))
    monkeypatch.setattr("train_llava.dataset.images.upright_rgb", fail)
    assert "a.png cannot be read as a picture" in faults(tmp_path)["x"]


# records that must be refused -> a part of the reason
def bad_records(root: Path) -> dict[str, tuple[dict, str]]:
    images = root / "images"
    images.mkdir()
    whole = saved("RGB", RED, "JPEG")
    (images / "good.png").write_bytes(PICTURES[0])
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").touch()
    (images / "page.jpg").write_text("<html>not found</html>")
    (images / "folder.jpg").mkdir()
    (root / "outside.png").write_bytes(PICTURES[0])
    Image.new("1", (10000, 10000)).save(images / "bomb.png")

    def shown(name) -> dict:
        return {"image": name, "conversations": turns(QUESTION, "red")}

    return {
        "truncated": (shown("truncated.jpg"), "truncated.jpg cannot be read as a picture"),
        "empty": (shown("empty.jpg"), "empty.jpg cannot be read as a picture"),
        "html": (shown("page.jpg"), "page.jpg cannot be read as a picture"),
        "missing": (shown("none.jpg"), "none.jpg does not exist"),
        "directory": (shown("folder.jpg"), "folder.jpg is a folder"),
        "parent": (shown("../outside.png"), "lies outside the picture folder"),
        "absolute": (shown(str(root / "outside.png")), "lies outside the picture folder"),
        "parent inside": (shown("a/../good.png"), "lies outside the picture folder"),
        "address": (shown("https://x.org/a.png"), "is an address"),
        "place": (shown("\0/etc/passwd\0x\x000\x009"), "lies outside the picture folder"),
        "video": (shown("good.png") | {"video": "a.mp4"}, "it has video, which the model cannot take in"),
        "audio": (shown("good.png") | {"audio": ["a.wav"]}, "it has audio, which the model cannot take in"),
        "video tag": ({"conversations": turns("<video>\nWhat?", "a")}, "it has a <video> or <audio> tag"),
        "audio part": (
            {"messages": messages(0, [{"type": "audio", "audio": "a.wav"}, TEXT])},
            "a part of type 'audio'",
        ),
        "unknown part": ({"messages": messages(0, [{"type": "tool"}])}, "a part of type 'tool'"),
        "role is a list": ({"messages": [{"role": ["user"], "content": "?"}]}, "unknown role ['user']"),
        "picture is a list": (shown([[1, 2]]), "a picture is named by [1, 2]"),
        "name not Unicode": (shown("\ud800.png"), "is not Unicode"),
        "not JSON inside": ({"conversations": "[{"}, "the text of conversations is not JSON"),
        "no completion": ({"prompt": "a", "completion": ""}, "a turn of role assistant has no text"),
        "system alone": (
            {"messages": [{"role": "system", "content": "a"}]},
            "questions and answers do not take turns",
        ),
        "bomb": (shown("bomb.png"), "10000 x 10000 pixels are too many"),
        "not a name": (shown(5), "a picture is named by 5"),
        "no conversations": ({}, "it has no conversations"),
        "empty conversations": ({"conversations": []}, "it has no conversations"),
        "no answer": ({"conversations": turns("Hello?")}, "an answer last"),
        "answer first": ({"conversations": turns("a", "b")[::-1]}, "a question first"),
        "empty answer": ({"conversations": turns("a", " ")}, "a turn of role assistant has no text"),
        "messages before a text": (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
            "the text of completion is not JSON",
        ),
        "part of no type": (
            {"messages": [{"role": "user", "content": [{"content": "a"}]}, {"role": "assistant", "content": "b"}]},
            "a turn of role user has no text",
        ),
        "no such choice": (SCIENCE | {"answer": 2}, "its answer '2' is none of its 2 choices"),
        "no choice": (SCIENCE | {"answer": None}, "its answer 'None' is none of its 2 choices"),
        "nobody's answer": ({"question": "?", "answers": []}, "a turn of role assistant has no text"),
        "null answer": ({"conversations": turns("a", None)}, "a turn of role assistant has no text"),
        "number": ({"conversations": turns("a", 5)}, "a turn of role assistant has no text"),
        "not Unicode": ({"conversations": turns("a", "b\ud800")}, "is not Unicode"),
        "unknown role": ({"conversations": [{"from": "cat", "value": "?"}]}, "unknown role 'cat'"),
        "more tags": ({"image": "good.png", "conversations": turns("<image><image>", "a")}, "2 <image> tags for 1"),
        "fewer tags": ({"image": "good.png", "conversations": turns("a", "b")}, "0 <image> tags for 1 pictures"),
        "tag in an answer": ({"conversations": turns("a", "<image>")}, "<image> in a turn of role assistant"),
        "control token": ({"conversations": turns("a", "b<|im_end|>")}, "the control token <|im_end|>"),
        "too long": ({"conversations": turns("a", "b" * 300)}, "tokens, --max_length is 200"),
        "not an object": ("text", "it is not an object"),
    }


@pytest.fixture(scope="module")
def dirty(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A data set with bad records between good ones, and each bad one's id with its reason."""
    root = tmp_path_factory.mktemp("dirty")
    bad = bad_records(root)
    records, reasons = [], {}
    for i, (name, (record, reason)) in enumerate(bad.items()):
        good = {"id": f"good {i}", "image": "good.png", "conversations": turns(QUESTION, f"answer {i}")}
        records += [good, record | {"id": name} if isinstance(record, dict) else record]
        reasons[name if isinstance(record, dict) else str(len(records) - 1)] = reason
    (root / "chat.json").write_text(json.dumps(records))
    return root, reasons


def test_every_bad_record_is_refused_with_its_reason(dirty, processor):
    root, reasons = dirty
    dataset, collator = LlavaDataset(str(root)), LlavaCollator(processor, max_length=200)
    refused = {}
    for i in range(len(dataset)):
        try:
            collator.chat.labelled(dataset[i])
        except BadRecordError as error:
            refused[error.args[0]] = error.args[1]
    assert refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in refused[name], name


def test_a_bad_record_gives_its_place_to_a_good_one_and_is_logged_once(dirty, processor, tmp_path):
    root, reasons = dirty
    checked = CheckedDataset(LlavaDataset(str(root)), Chat(processor, 200), tmp_path / "bad.jsonl", "skip", 1.0)
    passes = [[checked[i]["id"] for i in range(len(checked))] for _ in range(2)]
    assert passes[0] == passes[1]
    assert passes[0][::2] == [f"good {i}" for i in range(len(reasons))]
    assert all(name.startswith("good") for name in passes[0])
    log = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in log} == reasons.keys()
    assert len(log) == len(reasons)


def test_too_many_bad_records_or_a_strict_run_stop(dirty, processor, tmp_path):
    dataset, chat = LlavaDataset(str(dirty[0])), Chat(processor, 200)
    strict = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", bad_samples="error")
    with pytest.raises(BadRecordError, match=r"record 'truncated': truncated\.jpg"):
        strict[1]
    checked = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", max_bad_fraction=2.5 / len(dataset))
    assert checked[0]["id"] == "good 0"
    with pytest.raises(ValueError, match=rf"3 of {len(dataset)} records are bad, more than --max_bad_fraction"):
        [checked[i] for i in (1, 3, 5)]


@pytest.mark.parametrize("given", [{"id": "one"}, {}, {"id": "a\u2028b\u0085c"}])
def test_bad_records_are_counted_whatever_their_ids(processor, tmp_path, given):
    records = [given | {"conversations": turns("?", "!") if i % 10 == 0 else []} for i in range(300)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    dataset, log = LlavaDataset(str(tmp_path)), tmp_path / "bad.jsonl"
    checked = CheckedDataset(dataset, Chat(processor), log, max_bad_fraction=0.9)
    for _ in range(2):
        assert {item["messages"][1]["content"][0]["text"] for item in map(checked.__getitem__, range(300))} == {"!"}
    assert len(log.read_text().split("\n")) == 270 + 1
    with pytest.raises(ValueError, match="270 of 300 records are bad, more than --max_bad_fraction"):
        CheckedDataset(dataset, Chat(processor), log, max_bad_fraction=0.89)[1]


def first(stream, number: int) -> list[str]:
    return [item["id"] for item in islice(stream, number)]


def test_a_stream_gives_every_good_record_in_another_order_each_pass(dirty, processor, tmp_path):
    root, reasons = dirty
    sources = (str(root), None, None, Chat(processor, 200), tmp_path / "bad.jsonl", "skip", 0.6)
    good = len(reasons)
    ids = first(stream_items(*sources, seed=1), 3 * good)
    passes = [ids[:good], ids[good : 2 * good], ids[2 * good :]]
    assert [sorted(ids) for ids in passes] == [sorted(f"good {i}" for i in range(good))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert first(stream_items(*sources, seed=1), 3 * good) == ids
    assert first(stream_items(*sources, seed=2), 3 * good) != ids
    log = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in log) == sorted(reasons)


def test_a_stream_shuffles_shards_too(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("train_llava.dataset.streaming.BUFFER", 5)
    for i in range(9):
        lines = [json.dumps({"id": f"{i}{j}", "conversations": turns("?", "!")}) for j in range(10)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / f"{i}.jsonl") for i in range(9)]
    ids = first(stream_items(sources, None, None, Chat(processor), tmp_path / "bad.jsonl"), 90)
    assert sorted(ids) == [f"{i:02}" for i in range(90)]
    shards = [int(name[0]) for name in ids[::10]]
    assert shards != sorted(shards)
    assert len({name[0] for name in ids[10:20]}) > 1
    ranks = [
        first(stream_items(sources, None, None, Chat(processor), tmp_path / "log").shard(2, i), 90) for i in (0, 1)
    ]
    assert not set(ranks[0]) & set(ranks[1])
    assert set(ranks[0]) | set(ranks[1]) == set(ids)


def test_every_rank_has_its_part_of_every_source(tmp_path, processor):
    for name, size in (("a", 40), ("b", 4)):
        (tmp_path / name).mkdir()
        for i in range(4):
            rows = [{"id": f"{name}{i}{j}", "conversations": turns("?", "!")} for j in range(size // 4)]
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / f"{i}.parquet")
    stream = stream_items([str(tmp_path / name) for name in "ab"], None, None, Chat(processor), tmp_path / "log")
    ranks = [first(stream.shard(2, i), 22) for i in (0, 1)]
    assert [sum(name[0] == "b" for name in ids) for ids in ranks] == [2, 2]
    assert len({*ranks[0], *ranks[1]}) == 44
    workers = [item["id"] for item in islice(DataLoader(stream, None, num_workers=2), 44)]
    assert len(set(workers)) == 44
    assert [sum(name[0] == "b" for name in workers[i::2]) for i in (0, 1)] == [2, 2]


def test_a_worker_reads_all_that_it_streams_from_the_hub(processor, tmp_path, monkeypatch):
    """`datasets` would give a data-loading worker, which has its share already, a share of it."""

    def load_dataset(*_, **__):
        rows = [{"id": f"{i}", "prompt": "?", "completion": "!"} for i in range(40)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = stream_items(["a/b", "c/d"], None, None, Chat(processor), tmp_path / "log")
    loader = DataLoader(stream, None, num_workers=2, multiprocessing_context="fork")
    ids = [item["id"] for item in islice(loader, 80)]
    assert sorted(ids) == sorted([f"{i}" for i in range(40)] * 2)


def test_splits_side_by_side_are_not_read_as_one(tmp_path):
    for name in ("train-00000-of-00001", "train-00001-of-00002"):
        datasets.Dataset.from_list([{"conversations": turns("?", "!")}]).to_parquet(tmp_path / f"{name}.parquet")
    assert len(LlavaDataset(str(tmp_path))) == 2
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(FileNotFoundError, match="has files of test and train side by side: name the files"):
        LlavaDataset(str(tmp_path))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8"])
def test_names_in_an_archive_that_does_not_say_their_encoding(tmp_path, encoding):
    """As Windows' and macOS' own packers write them."""
    name = "红色 方块.png"
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "conversations": turns("<image>\n?", "!")}]))
    stored = "x" * len(name.encode(encoding))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(f"pictures/{stored}", PICTURES[0])
    content = (tmp_path / "images.zip").read_bytes()
    assert content.count(stored.encode()) == 2
    (tmp_path / "images.zip").write_bytes(content.replace(stored.encode(), name.encode(encoding)))
    assert len(LlavaDataset(str(tmp_path))[0]["images"]) == 1


def test_bad_records_in_a_row_have_a_stand_in_each(tmp_path, processor):
    bad, good = [{"conversations": []}] * 30, [{"id": f"{i}", "conversations": turns("?", "!")} for i in range(30)]
    (tmp_path / "chat.json").write_text(json.dumps(bad + good))
    log = tmp_path / "log.jsonl"
    checked = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), log, max_bad_fraction=1)
    taken = [checked[i]["id"] for i in range(30)]
    assert len(set(taken)) > 10
    written = log.read_bytes()
    again = CheckedDataset(LlavaDataset(str(tmp_path)), Chat(processor), log, max_bad_fraction=1)
    assert [again[i]["id"] for i in range(30)] == taken
    assert log.read_bytes() == written
    assert len(written.splitlines()) == 30
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(written[:-9])
    assert log_bad_sample(torn, 70, "70", "?") == 30
    assert torn.read_bytes().endswith(b'\n{"record": 70, "id": "70", "reason": "?"}\n')


def test_a_stream_takes_as_much_of_each_source_as_its_weight_says(tmp_path, processor):
    for name in ("a", "b"):
        lines = [json.dumps({"id": f"{name}{i}", "conversations": turns("?", "!")}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths, chat, log = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")], Chat(processor), tmp_path / "log"
    ids = first(stream_items(paths, None, [2, 0.5], chat, log), 400)
    part = len({name for name in ids if name[0] == "b"})
    assert 14 <= part <= 26  # of 40, always the same
    of_one_pass = ids[: 80 + part]
    assert sorted(name for name in of_one_pass if name[0] == "a") == sorted([f"a{i}" for i in range(40)] * 2)
    with pytest.raises(ValueError, match="1 weights for 2 data paths"):
        stream_items(paths, None, [1], chat, log)
    with pytest.raises(ValueError, match="weights are numbers from 0"):
        stream_items(paths, None, [1, -1], chat, log)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("error", 1.0), "^record "), (("skip", 0.4), r"(\d+) of \d+ records are bad, more than --max_bad_fraction")],
)
def test_a_stream_stops_where_a_table_would(dirty, processor, tmp_path, settings, message):
    stream = stream_items(str(dirty[0]), None, None, Chat(processor, 200), tmp_path / "bad.jsonl", *settings)
    with pytest.raises(ValueError, match=message):
        first(stream, len(dirty[1]) + 1)


def test_a_stream_without_a_good_record_stops(processor, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": []}] * 3))
    stream = stream_items(str(tmp_path), None, None, Chat(processor), tmp_path / "bad.jsonl", "skip", 1.0)
    with pytest.raises(ValueError, match=r"no record of .* is good"):
        first(stream, 1)


def test_workers_started_anew_read_a_stream_and_a_table(dirty, processor, tmp_path):
    """As macOS and Windows start them: everything that a worker needs is pickled."""
    collator, log = LlavaCollator(processor, 200), tmp_path / "bad.jsonl"
    stream = stream_items(str(dirty[0]), None, None, collator.chat, log, "skip", 0.6)
    checked = CheckedDataset(LlavaDataset(str(dirty[0])), collator.chat, log, "skip", 0.6)
    for data in (stream, checked):
        loader = DataLoader(
            data, 4, num_workers=1, multiprocessing_context="spawn", collate_fn=partial(with_ids, collator=collator)
        )
        batch = next(iter(loader))
        assert len(batch["ids"]) == 4
        assert all(name.startswith("good") for name in batch["ids"])


def test_check_data_reports_every_fault(dirty, llava, tmp_path):
    root, reasons = dirty
    command = [sys.executable, "-m", "train_llava.check_data", "--data_path", root, "--model_name_or_path", llava]
    command += ["--max_length", "200", "--report", tmp_path / "report.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["records"], report["bad"]) == (2 * len(reasons), len(reasons))
    named = [example["id"] for fault in report["faults"].values() for example in fault["examples"]]
    assert sum(fault["count"] for fault in report["faults"].values()) == len(reasons)
    assert set(named) <= reasons.keys()
    kind = kind_of("page.jpg cannot be read as a picture: it is of no format that Pillow knows")
    assert report["faults"][kind]["count"] >= 1
    assert f"{2 * len(reasons)} records, {len(reasons)} bad" in done.stdout
    assert "⟦answer 0<|im_end|>⟧" in done.stdout
    assert (tmp_path / "report.png").stat().st_size > 5000


def test_check_data_reports_where_no_record_is_good(tmp_path):
    (tmp_path / "chat.json").write_text('[{"id": "empty", "conversations": []}]')
    command = [sys.executable, "-m", "train_llava.check_data", "--data_path", tmp_path]
    command += ["--report", tmp_path / "report.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["bad"] == 1


def test_check_data_finds_nothing_wrong_with_good_data(corpus, tmp_path):
    command = [sys.executable, "-m", "train_llava.check_data", "--data_path", corpus, "--decode_pictures", "false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "16 records, 0 bad" in done.stdout


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
def test_like_faults_are_of_one_kind(reasons, kind):
    assert {kind_of(reason) for reason in reasons} == {kind}


def test_a_sample_is_shown_as_it_is_but_for_repeated_picture_tokens(corpus, processor, tmp_path):
    texts = ("<image>\n1000 or 2211? aaa", "2211 and 1000")
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": "0.png", "conversations": turns(*texts)}]))
    sample = show_sample(LlavaDataset(str(tmp_path), str(corpus / "images_dl")), Chat(processor))
    assert "<image>\n1000 or 2211? aaa<|im_end|>" in sample
    assert "⟦2211 and 1000<|im_end|>⟧" in sample
    assert sample.count("<image>") == 1
