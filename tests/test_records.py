"""Every format gives the same messages and pictures; what must load loads, what is bad is refused with its reason."""

import io
import json
import subprocess
import sys
import tarfile
import zipfile
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

from train_llava.chat import Chat
from train_llava.check_data import kind_of
from train_llava.data import BadRecordError, CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.pictures import agrees, open_image, prepare_pictures
from train_llava.records import load_records, read_json, text_of
from train_llava.stream import stream_items
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


def shards(root: Path) -> str:
    for name, numbers in (("a", (0, 1)), ("b", (2,))):
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for i in numbers:
                record = {"id": i, "image": "ignored.png", "conversations": turns(QUESTION, ANSWERS[i])}
                for ending, content in (("png", PICTURES[i]), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{i:05}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return str(root)


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


@pytest.mark.parametrize("size", [1 << 20, 17, 1])
def test_a_json_list_is_read_in_pieces(tmp_path, monkeypatch, size):
    records = [{"a": "b" * i, "n": [i, 1.5, None, "]},{"]} for i in range(30)]
    (tmp_path / "list.json").write_text("\ufeff \n" + json.dumps(records, indent=size % 3), encoding="utf-8")
    real_open = open

    class Slow(io.TextIOWrapper):
        def read(self, _=-1):
            return super().read(size)

    monkeypatch.setattr("builtins.open", lambda p, encoding: Slow(real_open(p, "rb"), encoding=encoding))
    assert list(read_json(tmp_path / "list.json")) == records


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


def deep_gray() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8), 32896, np.uint16)).save(file, "PNG")
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
    "16-bit gray": (deep_gray(), (128, 128, 128)),
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


def test_odd_shapes_reach_the_model(processor):
    images = [Image.new("RGB", size, "red") for size in ((1, 1), (3, 2000), (2000, 3))]
    ours = prepare_pictures(processor.image_processor, images)
    theirs = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    assert ours.shape == (3, 3, 28, 28)
    assert (ours - theirs).abs().max() < 1e-5


def test_the_fast_path_gives_the_processors_pixels(processor):
    assert agrees(processor.image_processor)
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in ((28, 28, 3), (90, 41, 3), (33, 257, 3))
    ]
    difference = (
        prepare_pictures(processor.image_processor, images)
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
    small = open_image(file.getvalue(), "x", at_least=56)
    assert small.size == (225, 150)
    whole = open_image(file.getvalue(), "x")
    assert whole.size == (1800, 1200)
    seen = [np.asarray(image.resize((84, 56), Image.Resampling.BICUBIC)).astype(float) for image in (small, whole)]
    assert np.abs(seen[0] - seen[1]).mean() < 1.5


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
    (images / "link.png").symlink_to(root / "outside.png")
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
        "symlink": (shown("link.png"), "lies outside the picture folder"),
        "bomb": (shown("bomb.png"), "10000 x 10000 pixels are too many"),
        "not a name": (shown(5), "a picture is named by 5"),
        "no conversations": ({}, "it has no conversations"),
        "empty conversations": ({"conversations": []}, "it has no conversations"),
        "no answer": ({"conversations": turns("Hello?")}, "an answer last"),
        "answer first": ({"conversations": turns("a", "b")[::-1]}, "a question first"),
        "empty answer": ({"conversations": turns("a", " ")}, "a turn of role assistant has no text"),
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
    """A data set with 25 bad records between good ones, and each bad one's id with its reason."""
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


def test_a_bad_record_gives_its_place_to_the_next_good_one_and_is_logged_once(dirty, processor, tmp_path):
    root, reasons = dirty
    checked = CheckedDataset(LlavaDataset(str(root)), Chat(processor, 200), tmp_path / "bad.jsonl", "skip", 1.0)
    for _ in range(2):
        ids = [checked[i]["id"] for i in range(len(checked))]
        assert ids == [f"good {(i + 1) // 2 % 25}" for i in range(50)]
    log = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {entry["id"] for entry in log} == reasons.keys()
    assert len(log) == len(reasons)


def test_too_many_bad_records_or_a_strict_run_stop(dirty, processor, tmp_path):
    dataset, chat = LlavaDataset(str(dirty[0])), Chat(processor, 200)
    strict = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", bad_samples="error")
    with pytest.raises(BadRecordError, match=r"record 'truncated': truncated\.jpg"):
        strict[1]
    checked = CheckedDataset(dataset, chat, tmp_path / "bad.jsonl", max_bad_fraction=0.05)
    assert checked[1]["id"] == "good 1"
    with pytest.raises(ValueError, match="3 of 50 records are bad, more than --max_bad_fraction"):
        [checked[i] for i in (3, 5)]


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
    ids = first(stream_items(*sources, seed=1), 75)
    passes = [ids[:25], ids[25:50], ids[50:]]
    assert [sorted(ids) for ids in passes] == [sorted(f"good {i}" for i in range(25))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert first(stream_items(*sources, seed=1), 75) == ids
    assert first(stream_items(*sources, seed=2), 75) != ids
    log = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in log) == sorted(reasons)


def test_a_stream_shuffles_shards_too(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("train_llava.stream.BUFFER", 5)
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
    with pytest.raises(ValueError, match="a weight is a number from 0"):
        stream_items(paths, None, [1, -1], chat, log)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("error", 1.0), "^record "), (("skip", 0.4), r"25 of 50 records are bad, more than --max_bad_fraction")],
)
def test_a_stream_stops_where_a_table_would(dirty, processor, tmp_path, settings, message):
    stream = stream_items(str(dirty[0]), None, None, Chat(processor, 200), tmp_path / "bad.jsonl", *settings)
    with pytest.raises(ValueError, match=message):
        first(stream, 30)


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
    assert (report["records"], report["bad"]) == (50, 25)
    named = [example["id"] for fault in report["faults"].values() for example in fault["examples"]]
    assert sum(fault["count"] for fault in report["faults"].values()) == 25
    assert set(named) <= reasons.keys()
    assert (
        report["faults"][kind_of("page.jpg cannot be read as a picture: cannot identify image file 'x'")]["count"] >= 1
    )
    assert "50 records, 25 bad" in done.stdout
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
