"""Data sets in every format, with the same three images and answers; a data set of bad records; and how they open."""

import base64
import io
import json
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import turns
from PIL import Image

from train_llava.data import BadRecordError, LlavaDataset

COLORS = [(200, 30, 40), (30, 180, 60), (20, 40, 220)]
QUESTION, ANSWERS = "<image>\nWhat is this?", ["red", "green", "blue"]
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, ending: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, ending, **options)
    return file.getvalue()


def small(color: Any, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (8, 6), color)


PNGS = [encoded(small(color), "PNG") for color in COLORS]
LLAVA = [{"id": i, "image": f"sub dir/图 {i}.png", "conversations": turns(QUESTION, ANSWERS[i])} for i in range(3)]


def write_images(folder: Path) -> None:
    (folder / "sub dir").mkdir(parents=True)
    for i, content in enumerate(PNGS):
        (folder / f"sub dir/图 {i}.png").write_bytes(content)


def llava_folder(root: Path, images: str = "images_dl") -> str:
    write_images(root / images)
    (root / "chat.json").write_text(json.dumps(LLAVA))
    return str(root)


def linked_images(root: Path) -> str:
    """As a hub cache has them: the folder is a link, and its files are links to somewhere else."""
    write_images(root / "blobs")
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
        for i, content in enumerate(PNGS):
            archive.writestr(f"{prefix}sub dir/图 {i}.png", content)
    return str(root)


def jsonl_messages(root: Path, inline: bool) -> str:
    """Messages in lines; their images are named inside them or under `images`."""
    write_images(root / "images")
    lines = []
    for i in range(3):
        name = f"sub dir/图 {i}.png"
        part = {"type": "image"} | ({"image": name} if inline else {})
        question = {"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}
        record = {"id": f"{i}", "messages": [question, {"role": "assistant", "content": ANSWERS[i]}]}
        lines.append(json.dumps(record if inline else record | {"images": [name]}))
    (root / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    return str(root / "data.jsonl")


def parquet(root: Path, column: str) -> str:
    rows = []
    for i, content in enumerate(PNGS):
        image = {"bytes": content, "path": None}
        images = image if column == "image" else [image]
        rows.append({"id": str(i), column: images, "conversations": turns(QUESTION, ANSWERS[i])})
    for i, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), root / f"train-{i}.parquet")
    return str(root)


def hub_features(root: Path) -> str:
    """A data set with an Image feature, as `datasets` writes it."""
    rows = {"id": ["0", "1", "2"], "image": [Image.open(io.BytesIO(p)) for p in PNGS], "caption": ANSWERS}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(root / "data.parquet")
    return str(root / "data.parquet")


def tar(path: Path, members: dict[str, bytes | dict | list]) -> None:
    """Writes a tar of members whose content is bytes or becomes JSON."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def shards(root: Path) -> str:
    for name, numbers in (("a", (0, 1)), ("b", (2,))):
        members = {}
        for i in numbers:
            record = {"id": i, "image": "ignored.png", "conversations": turns(QUESTION, ANSWERS[i])}
            members |= {f"{i:05}.png": PNGS[i], f"{i:05}.json": record}
        tar(root / f"{name}.tar", members)
    return str(root)


def shards_beside_images(root: Path) -> str:
    (root / "images").mkdir()
    return shards(root)


def messages(i: int, content: str | list) -> list[dict]:
    answer = ANSWERS[i] if isinstance(content, str) else [{"type": "text", "text": ANSWERS[i]}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


PLAIN, TEXT = "What is this?", {"type": "text", "text": "What is this?", "image_url": None, "image": None}
URIS = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in PNGS]
RECORDS = {
    "minimind-v": lambda i: {"conversations": json.dumps(messages(i, QUESTION)), "image_bytes": PNGS[i]},
    "FineVision": lambda i: {"images": [PNGS[i]], "texts": [{"user": PLAIN, "assistant": ANSWERS[i], "source": ""}]},
    "TRL, plain": lambda i: {"images": [PNGS[i]], "messages": messages(i, PLAIN)},
    "TRL, prompt and completion": lambda i: {
        "image": PNGS[i],
        "prompt": messages(i, PLAIN)[:1],
        "completion": messages(i, PLAIN)[1:],
    },
    "prompt and completion": lambda i: {"image": PNGS[i], "prompt": PLAIN, "completion": ANSWERS[i]},
    "question and answer": lambda i: {"image": PNGS[i], "question": PLAIN, "answer": ANSWERS[i]},
    "OpenAI, data URI": lambda i: {
        "messages": messages(i, [{"type": "image_url", "image_url": {"url": URIS[i]}}, TEXT]),
    },
    "nulls": lambda i: {
        **dict.fromkeys(("id", "conversations", "images", "video", "answers")),
        "messages": messages(i, [{"type": "image", "text": None}, TEXT]),
        "image": {"bytes": PNGS[i], "path": None},
        "audio": [],
    },
}


def parquet_of(record, root: Path) -> str:
    pq.write_table(pa.Table.from_pylist([record(i) for i in range(3)]), root / "data.parquet")
    return str(root / "data.parquet")


FORMATS = {
    "LLaVA, images_dl": llava_folder,
    "LLaVA, images": lambda root: llava_folder(root, "images"),
    "LLaVA, beside": lambda root: llava_folder(root, "."),
    "LLaVA, linked": linked_images,
    "LLaVA, stored zip": lambda root: zipped(root, zipfile.ZIP_STORED),
    "LLaVA, deflated zip in a folder": lambda root: zipped(root, zipfile.ZIP_DEFLATED, "images/"),
    "LLaVA, bzip2 zip": lambda root: zipped(root, zipfile.ZIP_BZIP2),
    "LLaVA, lzma zip": lambda root: zipped(root, zipfile.ZIP_LZMA),
    "jsonl, messages": lambda root: jsonl_messages(root, inline=False),
    "jsonl, images inside the messages": lambda root: jsonl_messages(root, inline=True),
    "parquet, image": lambda root: parquet(root, "image"),
    "parquet, images": lambda root: parquet(root, "images"),
    "captions in parquet": hub_features,
    "WebDataset": shards,
    "WebDataset beside a folder images": shards_beside_images,
    **{name: partial(parquet_of, record) for name, record in RECORDS.items()},
}


# Forms of whole data sets, each with three records of `TEXTS` and with what such folders also hold

TEXTS = [f'{answer}, "so" 图' for answer in ANSWERS]
NAMES = ["一 a.PNG", "sub dir/né 图.png", "sub dir/b%20.jpeg"]
CLUTTER = (
    ".DS_Store",
    "._一 a.PNG",
    "__MACOSX/x.png",
    "sub dir/Thumbs.db",
    "@eaDir/y.jpg",
    ".cache/huggingface/z.parquet",
)


def write(root: Path, files: dict[str, Any]) -> Path:
    """Writes files of bytes, text, or JSON, and returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else None if isinstance(content, bytes) else json.dumps(content)
        path.write_bytes(content if text is None else text.encode())
    return root


def pictures(root: Path, below: str = "") -> Path:
    return write(
        root, {f"{below}{name}": png for name, png in zip(NAMES, PNGS, strict=True)} | dict.fromkeys(CLUTTER, b"")
    )


def quoted(*cells: str, mark: str = ",", end: str = "\r\n") -> str:
    return mark.join('"' + cell.replace('"', '""') + '"' for cell in cells) + end


def csv_of(names: list[str], texts: list[str], head: str = "File_Name,Caption") -> str:
    """A table as Excel writes it, with an empty row, and a row whose picture is missing."""
    rows = [quoted(name, text) for name, text in zip(names, texts, strict=True)]
    return f"\ufeff{head}\r\n{''.join(rows)},\r\nmissing.png,x\r\n"


def imagefolder_csv(root: Path) -> Path:
    """In the folder and below it, where pictures are named from the file's own place."""
    files = {"metadata.csv": csv_of(NAMES[:1], TEXTS[:1])}
    return write(pictures(root), files | {"sub dir/metadata.csv": csv_of(["né 图.png", "b%20.jpeg"], TEXTS[1:])})


def imagefolder_jsonl(root: Path) -> Path:
    rows = [{"file_name": name, "text": text} for name, text in zip(NAMES, TEXTS, strict=True)]
    rows[1]["file_names"] = [rows[1].pop("file_name")]
    rows[2] = {"file_name": NAMES[2].replace("/", "\\"), "question": "What?", "answer": TEXTS[2]}
    return write(pictures(root, "train/"), {
        "train/metadata.jsonl": "\ufeff" + "\r\n".join(map(json.dumps, rows)),
        "test/metadata.jsonl": '{"file_name": "a.png", "text": "not this"}',
    })  # fmt: skip


def imagefolder_parquet(root: Path) -> Path:
    pictures(root)
    names = [str(root / NAMES[0]), f"file://{root}/{NAMES[1]}", f"./{NAMES[2]}"]
    pq.write_table(pa.table({"file_name": names, "answer": TEXTS}), root / "metadata.parquet")
    return root


def pairs(root: Path) -> Path:
    """With an empty text, one in another encoding, a picture without a text, and a text alone."""
    files = {str(Path(name).with_suffix(".txt")): f"\ufeff{text}\r\n" for name, text in zip(NAMES, TEXTS, strict=True)}
    files["sub dir/b%20.TXT"] = files.pop("sub dir/b%20.txt")
    files |= {"e.png": PNGS[0], "e.txt": " \n", "g.png": PNGS[0], "g.txt": "红".encode("gbk"), "no.png": PNGS[0]}
    return write(pictures(root), files | {"LICENSE.txt": "MIT"})


def table(root: Path, name: str, mark: str, head: str) -> Path:
    rows = [quoted("", picture, text, mark=mark) for picture, text in zip(NAMES, TEXTS, strict=True)]
    pictures(root, "images/")
    return write(root, {name: f"{head}\r\n{''.join(rows)}{mark}missing.png{mark}x\r\n"})


def coco(root: Path, captions: bool, start: str = "") -> Path:
    """Ids of pictures are numbers here and texts there, and one picture has no annotation."""
    images = [{"id": i, "file_name": name} for i, name in enumerate([*NAMES, "none.png"])]
    notes = []
    for i, text in enumerate(TEXTS):
        notes += (
            [{"image_id": str(i), "caption": f"{text} \n"}, {"image_id": i, "caption": f"again {i}"}]
            if captions
            else [
                {
                    "image_id": i,
                    "category_id": i,
                    "bbox": [1, 2, 3, 4.5],
                    "segmentation": [[1, 2]],
                    "area": float("nan"),
                }
            ]
            * 2
        )
    labels = [{"id": i, "name": text} for i, text in enumerate(TEXTS)]
    content = {"info": {}, "images": images, "annotations": [*notes, {"image_id": 9, "caption": "x"}]}
    write(
        pictures(root, "images/"),
        {"a.json": start + json.dumps(content | ({} if captions else {"categories": labels}))},
    )
    return root / "a.json"


VQA_FILES = ("v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json")


def vqa(root: Path) -> Path:
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    questions = [{"image_id": i, "question": "What?", "question_id": 10 + i} for i in range(4)]
    notes = [{"question_id": 10 + i, "image_id": i, "multiple_choice_answer": text,
              "answers": [{"answer": text, "answer_id": 1}, {"answer": "other", "answer_id": 2}]}
             for i, text in enumerate(TEXTS)]  # fmt: skip
    write(root, {f"images/COCO_val2014_{i:012}.jpg": png for i, png in enumerate(PNGS)})
    write(root, {VQA_FILES[0]: head | {"questions": questions}, VQA_FILES[1]: head | {"annotations": notes}})
    return root / VQA_FILES[0]


def classes(root: Path) -> str:
    files = {f"train/{text}/一 a.PNG": png for text, png in zip(TEXTS, PNGS, strict=True)}
    return (
        f"folder:{write(root, files | {'test/cat/t.png': PNGS[0], 'train/red/notes.txt': 'x', 'train/n/.x.png': b''})}"
    )


def on_disk(root: Path, splits: bool) -> Path:
    rows = {"image": [{"bytes": png, "path": None} for png in PNGS], "caption": TEXTS}
    train = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    whole = datasets.DatasetDict({"train": train, "test": train.select([0])}) if splits else train
    whole.save_to_disk(root, num_shards={"train": 2, "test": 1} if splits else 2)
    return root


def downloaded(root: Path) -> Path:
    """As `hf download --local-dir` leaves it."""
    (root / "data").mkdir()
    rows = {"image": [{"bytes": png, "path": "x.png"} for png in PNGS], "text": TEXTS}
    for i in range(3):
        part = datasets.Dataset.from_dict(rows).select([i])
        part.to_parquet(root / "data" / f"train-{i:05}-of-00003.parquet")
        part.to_parquet(root / "data" / f"testdev-{i:05}-of-00003.parquet")
    return write(root, {".cache/huggingface/download/a.parquet": b"", "README.md": "# It", ".gitattributes": ""})


NO_ANSWER = ["a turn of role assistant has no text"]
MISSING = ["missing.png does not exist"]
FORMS = {  # what writes it, its name, and why its other records are bad
    "imagefolder, csv": (imagefolder_csv, "imagefolder (metadata.csv)", MISSING * 2),
    "imagefolder, jsonl": (imagefolder_jsonl, "imagefolder (metadata.jsonl)", []),
    "imagefolder, parquet": (imagefolder_parquet, "imagefolder (metadata.parquet)", []),
    "pairs": (pairs, "pictures with texts of the same name", [
        "a turn of role assistant has no text", "it is not in UTF-8 (save it anew with this encoding)",
        "no text of its name is beside it"]),
    "csv": (lambda root: table(root, "a.CSV", ",", "\ufeffID, IMAGE, Caption"), ".csv", MISSING),
    "csv of Excel in Europe": (lambda root: table(root, "a.csv", ";", "id;File Name;text"), ".csv", MISSING),
    "tsv": (lambda root: table(root, "a.tsv", "\t", "Id\timage\tAnswer"), ".tsv", MISSING),
    "COCO captions": (lambda root: coco(root, True, "\ufeff\r\n"), "COCO", NO_ANSWER),
    "COCO instances": (lambda root: coco(root, False), "COCO", NO_ANSWER),
    "VQA": (vqa, "VQA", NO_ANSWER),
    "classes": (classes, "a folder for each class", []),
    "save_to_disk": (lambda root: on_disk(root, False), ".arrow", []),
    "save_to_disk, splits": (lambda root: on_disk(root, True), ".arrow", []),
    "hf download": (downloaded, ".parquet", []),
}  # fmt: skip


def colors_of(item: dict[str, Any]) -> list[str]:
    """The images of an item by the names of their colors."""
    return [ANSWERS[COLORS.index(image.getpixel((3, 3)))] for image in item["images"]]


def reasons_of(data_path: Path, image_dir: Path | None = None) -> dict[str, str | None]:
    """Why each record or its image cannot be used, by its id; None for a good one."""
    dataset, reasons = LlavaDataset(str(data_path), image_dir and str(image_dir)), {}
    for i in range(len(dataset)):
        try:
            reasons[dataset[i]["id"]] = None
        except BadRecordError as error:
            reasons[error.args[0]] = error.args[1]
    return reasons


SCIENCE = {"question": "Which?", "choices": ["cat", "dog"]}


def bad_records(root: Path) -> dict[str, tuple[Any, str]]:
    """Records that must be refused, by what is wrong with them, and a part of the reason."""
    images = root / "images"
    images.mkdir()
    whole = encoded(small(RED), "JPEG")
    (images / "good.png").write_bytes(PNGS[0])
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").touch()
    (images / "page.jpg").write_text("<html>not found</html>")
    (images / "folder.jpg").mkdir()
    (root / "outside.png").write_bytes(PNGS[0])
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
        "name not Unicode": (shown("\ud800.png"), "half of a surrogate pair"),
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
        "not Unicode": ({"conversations": turns("a", "b\ud800")}, "half of a surrogate pair"),
        "unknown role": ({"conversations": [{"from": "cat", "value": "?"}]}, "unknown role 'cat'"),
        "more tags": ({"image": "good.png", "conversations": turns("<image><image>", "a")}, "2 <image> tags for 1"),
        "fewer tags": ({"image": "good.png", "conversations": turns("a", "b")}, "0 <image> tags for 1 pictures"),
        "tag in an answer": ({"conversations": turns("a", "<image>")}, "<image> in a turn of role assistant"),
        "control token": ({"conversations": turns("a", "b<|im_end|>")}, "the control token <|im_end|>"),
        "too long": ({"conversations": turns("a", "b" * 300)}, "tokens, --max_length is 200"),
        "not an object": ("text", "it is not an object"),
    }


def write_bad_data(root: Path) -> dict[str, str]:
    """Writes a data set with bad records between good ones; returns the reason of each bad one by its id."""
    records, reasons = [], {}
    for i, (name, (record, reason)) in enumerate(bad_records(root).items()):
        good = {"id": f"good {i}", "image": "good.png", "conversations": turns(QUESTION, f"answer {i}")}
        is_dict = isinstance(record, dict)
        records += [good, record | {"id": name} if is_dict else record]
        reasons[name if is_dict else str(len(records) - 1)] = reason
    (root / "chat.json").write_text(json.dumps(records))
    return reasons
