"""A picture's file is found however a record spells its name, and comes upright, whole, and as small as it may be."""

import io
import json
import os
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from conftest import turns
from PIL import Image
from test_records import PICTURES, QUESTION, faults, shown
from transformers import CLIPImageProcessorPil

from train_llava.data import LlavaDataset
from train_llava.dataset import images as pictures
from train_llava.dataset.images import matches_processor, open_image, picture_size
from train_llava.dataset.table import load_records

NAME = "sub dir/né 图.PNG"


def folder(root: Path, prefix: str = "", change=str) -> str:
    path = root / "images" / change(f"{prefix}{NAME}")
    path.parent.mkdir(parents=True)
    path.write_bytes(PICTURES[1])
    return "images"


def archive(root: Path, prefix: str = "", change=str, **options) -> str:
    with zipfile.ZipFile(root / "images.zip", "w") as file:
        file.mkdir("sub dir")
        with file.open(zipfile.ZipInfo(change(f"{prefix}{NAME}")), "w", **options) as member:
            member.write(PICTURES[1])
        file.writestr("__MACOSX/sub dir/._né 图.PNG", b"")
    return "images.zip"


def nfd(name: str) -> str:
    return unicodedata.normalize("NFD", name)


def windows(name: str) -> str:
    return name.replace("/", "\\")


LAYOUTS = {
    "folder": folder,
    "folder from macOS": lambda root: folder(root, change=nfd),
    "zip": archive,
    "zip64": lambda root: archive(root, force_zip64=True),
    "zip with a top folder": lambda root: archive(root, "all of them/"),
    "zip with a top folder of its name": lambda root: archive(root, "images/"),
    "zip of ./": lambda root: archive(root, "./"),
    "zip from macOS": lambda root: archive(root, change=nfd),
    "zip from Windows": lambda root: archive(root, change=windows),
}
SPELLINGS = {
    "plain": lambda _: NAME,
    "./": lambda _: f"./{NAME}",
    "//": lambda _: NAME.replace("/", "//"),
    "/./": lambda _: NAME.replace("/", "/./"),
    "backslash": lambda _: windows(NAME),
    "accents apart": lambda _: nfd(NAME),
    "percent signs": lambda _: quote(NAME),
    "the folder's name": lambda _: f"images/{NAME}",
    "absolute": lambda root: f"{root}/images/{NAME}",
    "absolute, doubled": lambda root: f"{root}/images//./{NAME}",
    "file address": lambda root: f"file://{quote(str(root))}/images/{quote(NAME)}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_is_found_however_its_name_is_spelt(tmp_path, layout):
    image_dir = LAYOUTS[layout](tmp_path)
    records = [{"id": k, "image": spell(tmp_path), "caption": "x"} for k, spell in SPELLINGS.items()]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    assert faults(tmp_path, tmp_path / image_dir) == dict.fromkeys(SPELLINGS)
    dataset = LlavaDataset(str(tmp_path))
    assert [shown(dataset[i]) for i in range(len(records))] == [["green"]] * len(records)


def test_a_name_is_first_of_all_what_it_says(tmp_path):
    """Where several files could be meant, or the name holds what else is another spelling."""
    (tmp_path / "images" / "images").mkdir(parents=True)
    names = ["a%20b.png", "a b.png", "c\\d.png", "images/a b.png"]
    for i, name in enumerate(names[:3]):
        (tmp_path / "images" / name).write_bytes(PICTURES[i])
    (tmp_path / "images" / names[3]).write_bytes(PICTURES[2])
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    dataset = LlavaDataset(str(tmp_path))
    assert [shown(dataset[i]) for i in range(4)] == [["red"], ["green"], ["blue"], ["blue"]]


@pytest.mark.parametrize("layout", ["folder", "zip"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../outside.png", "lies outside the picture folder"),
        ("..\\outside.png", "lies outside the picture folder"),
        ("sub dir/../../outside.png", "lies outside the picture folder"),
        ("{root}/outside.png", "lies outside the picture folder"),
        ("{root}/images/../outside.png", "lies outside the picture folder"),
        ("{root}/none/outside.png", "lies outside the picture folder"),
        ("file://{root}/outside.png", "lies outside the picture folder"),
        ("file://{root}/images/%2e%2e/outside.png", "lies outside the picture folder"),
        ("C:\\outside.png", "lies outside the picture folder"),
        ("\\\\server\\outside.png", "lies outside the picture folder"),
        ("%2e%2e/outside.png", "does not exist"),
        ("%2e%2e%5coutside.png", "does not exist"),
        ("images/../outside.png", "lies outside the picture folder"),
        ("sub dir", "is a folder"),
        ("./", "is a folder"),
        ("s3://bucket/a.png", "is an address"),
    ],
)
def test_a_name_that_leads_out_is_refused(tmp_path, layout, name, reason):
    image_dir = tmp_path / LAYOUTS[layout](tmp_path)
    (tmp_path / "outside.png").write_bytes(PICTURES[0])
    if layout == "zip":
        image_dir = (tmp_path / "zips").mkdir() or image_dir.rename(tmp_path / "zips" / "images.zip")
        reason = "is not in the archive" if reason in ("does not exist", "is a folder") else reason
    name = name.format(root=tmp_path)
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": name, "caption": "x"}]))
    assert reason in faults(tmp_path / "chat.json", image_dir)["x"]


def test_an_absolute_name_is_inside_whichever_link_names_the_folder(tmp_path):
    """And a table is of its picture folder: the same records beside another one are judged anew."""
    folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "other").mkdir()
    records = [{"id": side, "image": f"{tmp_path}/{side}/images/{NAME}", "caption": "x"} for side in ("real", "link")]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for side in ("real", "link"):
        assert faults(tmp_path / "chat.json", tmp_path / side / "images") == {"real": None, "link": None}
    assert all("outside" in reason for reason in faults(tmp_path / "chat.json", tmp_path / "other").values())


def test_an_archive_may_lie_by_another_ending_and_be_empty(tmp_path):
    (tmp_path / "chat.JSON").write_text(json.dumps([{"id": "x", "image": "a.png", "caption": "x"}]))
    for names, reason in ((["a.png"], None), ([], "a.png is not in the archive")):
        with zipfile.ZipFile(tmp_path / "pictures.ZIP", "w") as file:
            for name in names:
                file.writestr(name, PICTURES[0])
        os.utime(tmp_path / "pictures.ZIP", (len(names), len(names)))
        assert faults(tmp_path / "chat.JSON", tmp_path / "pictures.ZIP") == {"x": reason}


@pytest.mark.parametrize("changed", ["chat.json", "images.zip"])
def test_a_file_changed_to_the_same_size_is_read_anew(tmp_path, changed):
    archive(tmp_path)
    files = {"chat.json": json.dumps([{"image": NAME, "caption": "red"}]).encode()}
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


def corners(orientation: int, ending: str) -> bytes:
    """A picture of 48 x 32 pixels with a red corner on top on the left, turned so that its EXIF turns it back."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Pillow's ways to turn, the one that EXIF undoes
    turned = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    more = {"MPO": {"save_all": True, "append_images": [Image.new("RGB", turned.size)]}}
    turned.save(file, ending, exif=exif, **more.get(ending, {}))
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO", "PNG, behind the pixels"])
def test_every_format_is_turned_and_measured_alike(ending, orientation):
    content = corners(orientation, ending.partition(",")[0])
    if "," in ending:
        begin = content.index(b"eXIf") - 4
        end = begin + 12 + struct.unpack(">I", content[begin : begin + 4])[0]
        content = content[:begin] + content[end:-12] + content[begin:end] + content[-12:]
    image = open_image(content, "x")
    assert image.size == picture_size(content, "x") == (48, 32)
    red = [np.subtract(image.getpixel(p), (255, 0, 0)) for p in ((7, 7), (40, 7), (7, 25), (40, 25))]
    assert [bool(np.abs(difference).max() < 60) for difference in red] == [True, False, False, False]


def picture(size: tuple[int, int], ending: str, **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, ending, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("ending", "size", "min_side", "expected"),
    [
        ("JPEG", (400, 300), None, (400, 300)),
        ("JPEG", (400, 300), 30, (100, 75)),
        ("PNG", (400, 300), 30, (80, 60)),
        ("PNG", (400, 300), 50, (134, 100)),
        ("PNG", (400, 300), 100, (400, 300)),
        ("TIFF", (400, 900), 50, (100, 225)),
        ("WEBP", (900, 60), 20, (900, 60)),
        ("JPEG", (2000, 2000), 10, (21, 21)),  # a twelfth of an eighth
        ("MPO", (400, 300), 30, (100, 75)),
    ],
)
def test_a_large_picture_comes_small(ending, size, min_side, expected):
    image = open_image(picture(size, ending), "x", min_side=min_side)
    assert image.size == expected
    assert min(image.size) >= min(2 * (min_side or 0), *size)
    assert np.abs(np.subtract(image.getpixel((5, 5)), (255, 0, 0))).max() < 3


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_too_many_pixels_is_decoded_at_a_half(monkeypatch, progressive):
    monkeypatch.setattr(pictures, "PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = picture((41, 30), "JPEG", progressive=progressive, exif=exif)
    assert open_image(content, "x").size == picture_size(content, "x") == (15, 21)
    assert open_image(picture((400, 7), "JPEG"), "x", min_side=9).size == (200, 4)
    for size, ending in (((41, 30), "PNG"), ((41, 30), "TIFF"), ((100, 31), "JPEG")):
        for look in (open_image, picture_size):
            with pytest.raises(ValueError, match=r"^x cannot be read as a picture: .*pixels"):
                look(picture(size, ending), "x")


def test_a_bomb_is_refused_by_its_head():
    """Of a thousand bytes: 30,000 x 30,000 pixels of a PNG, 65,000 x 65,000 of a JPEG."""
    png, jpeg = picture((8, 6), "PNG"), picture((8, 6), "JPEG")
    head = b"IHDR" + struct.pack(">II", 30000, 30000) + png[24:29]
    png = png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    jpeg = jpeg.replace(struct.pack(">HH", 6, 8), struct.pack(">HH", 65000, 65000), 1)
    for content in (png, jpeg):
        with pytest.raises(ValueError, match=r"x cannot be read as a picture: .*pixels"):
            open_image(content, "x", min_side=28)
    assert pictures.PIXELS == 90_000_000
    assert 2 * Image.MAX_IMAGE_PIXELS == 3 * pictures.PIXELS


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_heic_says_what_opens_it(tmp_path, brand):
    content = b"\0\0\0\x18ftyp" + brand + bytes(40)
    (tmp_path / "a.heic").write_bytes(content)
    try:
        import pillow_heif  # noqa: F401

        reason = "cannot be read as a picture"
    except ImportError:
        reason = "a.heic cannot be read as a picture: it is HEIC, which `pip install pillow-heif`"
    for source in (content, tmp_path / "a.heic"):
        with pytest.raises(ValueError, match=reason):
            open_image(source, "a.heic")
    with pytest.raises(ValueError, match="of no format that Pillow knows"):
        open_image(content.replace(b"ftyp" + brand, b"ftypmp42"), "a.mp4")


class Shifted(CLIPImageProcessorPil):
    """CLIP's, but some levels of 256 brighter."""

    levels = 0.0

    def preprocess(self, *args, **kwargs):
        prepared = super().preprocess(*args, **kwargs)
        prepared["pixel_values"] += self.levels * self.rescale_factor / min(self.image_std)
        return prepared


@pytest.mark.parametrize(("levels", "same"), [(0, True), (3, False), (20, False), (40, False)])
def test_the_fast_way_is_taken_within_two_levels_alone(monkeypatch, levels, same):
    monkeypatch.setattr(Shifted, "levels", levels)
    shifted = Shifted(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    matches_processor.cache_clear()
    assert matches_processor(shifted) is same


@pytest.mark.parametrize(
    ("record", "pictures", "reason"),
    [
        ({"images": [None, "a.png", None]}, 1, None),
        ({"images": [None], "image": "a.png"}, 1, None),
        ({"images": None, "image": ["a.png"]}, 1, None),
        ({"images": [None, None]}, 1, "1 <image> tags for 0 pictures"),
        ({"image": "a.png", "conversations": turns(f"{QUESTION} <audio>", "x")}, 1, "a <video> or <audio> tag"),
        ({"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}, *turns("?", "x")]}, 1,
         "<image> in a turn of role system"),
    ],
)  # fmt: skip
def test_nulls_and_what_no_record_may_hold(tmp_path, record, pictures, reason):
    (tmp_path / "a.png").write_bytes(PICTURES[0])
    record = {"id": 0, "conversations": turns(QUESTION, "x")} | record
    (tmp_path / "chat.json").write_text(json.dumps([{"id": None, "caption": "x"}, record]))
    (row,) = load_records(str(tmp_path))[0].select([1])
    assert row["id"] == "0"
    assert (reason is None and row["error"] is None) or reason in row["error"]
    assert len(row["images"]) == (pictures if reason is None else 0)
