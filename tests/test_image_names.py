"""An image is found in its folder or archive however a record spells its name, and nothing outside is read."""

import json
import os
import unicodedata
import zipfile
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import turns
from record_files import PNGS, colors_of, reasons_of, zipped

from train_llava.data import LlavaDataset

NAME = "sub dir/né 图.PNG"


def folder(root: Path, prefix: str = "", change=str) -> str:
    path = root / "images" / change(f"{prefix}{NAME}")
    path.parent.mkdir(parents=True)
    path.write_bytes(PNGS[1])
    return "images"


def archive(root: Path, prefix: str = "", change=str, **options) -> str:
    with zipfile.ZipFile(root / "images.zip", "w") as file:
        file.mkdir("sub dir")
        with file.open(zipfile.ZipInfo(change(f"{prefix}{NAME}")), "w", **options) as member:
            member.write(PNGS[1])
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
def test_an_image_is_found_in_every_spelling_of_its_name(tmp_path, layout):
    image_dir = LAYOUTS[layout](tmp_path)
    records = [{"id": k, "image": spell(tmp_path), "caption": "x"} for k, spell in SPELLINGS.items()]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    assert reasons_of(tmp_path, tmp_path / image_dir) == dict.fromkeys(SPELLINGS)
    dataset = LlavaDataset(str(tmp_path))
    assert [colors_of(dataset[i]) for i in range(len(records))] == [["green"]] * len(records)


def test_the_exact_name_goes_before_other_spellings(tmp_path):
    """Several files may fit a name, and a file's own name may look like another spelling."""
    (tmp_path / "images" / "images").mkdir(parents=True)
    names = ["a%20b.png", "a b.png", "c\\d.png", "images/a b.png"]
    for i, name in enumerate(names[:3]):
        (tmp_path / "images" / name).write_bytes(PNGS[i])
    (tmp_path / "images" / names[3]).write_bytes(PNGS[2])
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    dataset = LlavaDataset(str(tmp_path))
    assert [colors_of(dataset[i]) for i in range(4)] == [["red"], ["green"], ["blue"], ["blue"]]


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
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, layout, name, reason):
    image_dir = tmp_path / LAYOUTS[layout](tmp_path)
    (tmp_path / "outside.png").write_bytes(PNGS[0])
    if layout == "zip":
        image_dir = (tmp_path / "zips").mkdir() or image_dir.rename(tmp_path / "zips" / "images.zip")
        reason = "is not in the archive" if reason in ("does not exist", "is a folder") else reason
    name = name.format(root=tmp_path)
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": name, "caption": "x"}]))
    assert reason in reasons_of(tmp_path / "chat.json", image_dir)["x"]


def test_an_absolute_name_may_go_through_a_link_to_the_folder(tmp_path):
    """And a table belongs to its image folder: the same records with another folder are checked again."""
    folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "other").mkdir()
    records = [{"id": side, "image": f"{tmp_path}/{side}/images/{NAME}", "caption": "x"} for side in ("real", "link")]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    for side in ("real", "link"):
        assert reasons_of(tmp_path / "chat.json", tmp_path / side / "images") == {"real": None, "link": None}
    assert all("outside" in reason for reason in reasons_of(tmp_path / "chat.json", tmp_path / "other").values())


def test_an_archive_may_end_in_capitals_and_may_be_empty(tmp_path):
    (tmp_path / "chat.JSON").write_text(json.dumps([{"id": "x", "image": "a.png", "caption": "x"}]))
    for names, reason in ((["a.png"], None), ([], "a.png is not in the archive")):
        with zipfile.ZipFile(tmp_path / "images.ZIP", "w") as file:
            for name in names:
                file.writestr(name, PNGS[0])
        os.utime(tmp_path / "images.ZIP", (len(names), len(names)))
        assert reasons_of(tmp_path / "chat.JSON", tmp_path / "images.ZIP") == {"x": reason}


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
        reasons = reasons_of(root)
        assert [reasons["0"], reasons["2"]] == [None, None]
        assert f"sub dir/图 1.png cannot be taken out of {root}/images.zip" in reasons["1"]
    (root / "images.zip").write_bytes(content[:-50])
    with pytest.raises(ValueError, match=r"images\.zip is not a whole zip archive"):
        LlavaDataset(str(root))


def test_different_members_of_the_same_name_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, image in (("x/a", 0), ("y/a", 1), ("x/b", 2), ("y/b", 2), ("c", 0), ("z/c", 1)):
            archive.writestr(f"{name}.png", PNGS[image])
    names = ["a.png", "y/a.png", "b.png", "c.png", "d.png"]
    records = [{"id": name, "image": name, "caption": "x"} for name in names]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    reasons, dataset = reasons_of(tmp_path), LlavaDataset(str(tmp_path))
    assert reasons["a.png"] == "a.png is the name of several members of the archive"
    assert reasons["d.png"] == "d.png is not in the archive"
    assert [colors_of(dataset[i]) for i in (1, 2, 3)] == [["green"], ["blue"], ["red"]]


@pytest.mark.parametrize("encoding", ["gb18030", "utf-8"])
def test_names_of_unmarked_encoding_in_an_archive_are_found(tmp_path, encoding):
    """Windows and macOS write such archives."""
    name = "红色 方块.png"
    (tmp_path / "chat.json").write_text(json.dumps([{"image": name, "conversations": turns("<image>\n?", "!")}]))
    stored = "x" * len(name.encode(encoding))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(f"images/{stored}", PNGS[0])
    content = (tmp_path / "images.zip").read_bytes()
    assert content.count(stored.encode()) == 2
    (tmp_path / "images.zip").write_bytes(content.replace(stored.encode(), name.encode(encoding)))
    assert len(LlavaDataset(str(tmp_path))[0]["images"]) == 1
