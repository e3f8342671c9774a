"""WebDataset shards as people pack them: other files, links, names, hidden files, damage."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from conftest import turns
from PIL import Image
from record_files import ANSWERS, PNGS, QUESTION, colors_of, encoded, messages, reasons_of, tar

from train_llava.data import LlavaDataset
from train_llava.dataset.archives import is_image

RECORD = {"conversations": turns(QUESTION, "x")}


def colors(data_path: Path) -> dict[str, list[str] | str]:
    """The colors of the images of each record by its id, or why it cannot be used."""
    dataset, colors = LlavaDataset(str(data_path)), {}
    for i in range(len(dataset)):
        row = dataset.tables[0][i]
        colors[row["id"]] = row["error"] or colors_of(dataset[i])
    return colors


@pytest.mark.parametrize(
    "beside",
    [
        {"cls": b"3", "npy": b"\x93NUMPY", "url": b"https://x.org/a.png", "pth": b"", "mp4": b"", "pdf": b""},
        {"depth.npy": b"", "caption": b"a", "": b"no ending"},
        {"exr": b"", "h5": b"", "md5": b"0", "xml": b"<a/>", "html": b"", "csv": b"a,b", "safetensors": b""},
    ],
)
def test_a_file_without_an_image_extension_is_no_image(tmp_path, beside):
    members = {f"0.{ending}": content for ending, content in beside.items()}
    tar(tmp_path / "a.tar", members | {"0.json": RECORD, "0.JPEG": PNGS[2]})
    assert colors(tmp_path) == {"0": ["blue"]}
    tar(tmp_path / "a.tar", members | {"0.txt": b"blue"})
    assert "1 <image> tags for 0 pictures" in colors(tmp_path)["0"]


def test_an_image_is_recognised_by_its_extension():
    images = ["a.jpg", "a.JPEG", "a/b.png", "a.webp", "a.avif", "a.heic", "a.tif", "a.bmp", "a.jp2", "a.left.png"]
    assert [name for name in images if not is_image(name)] == []
    others = ["a", "png", "a.png.md5", "a.mp4", "a.wav", "a.txt", "a.json", "a.npz", "a.mpg", ".png", "a."]
    others += ["a.svg", "a.exr", "a.ps"]
    assert [name for name in others if is_image(name)] == []


def test_a_record_may_name_an_image_of_any_extension(tmp_path):
    record = RECORD | {"image": "images\\0.bin"}
    tar(tmp_path / "a.tar", {"0.png": PNGS[0], "0.bin": PNGS[1], "0.json": record})
    assert colors(tmp_path) == {"0": ["green"]}


def test_hidden_files_are_not_data(tmp_path):
    """As macOS writes them beside every file, into archives and folders."""
    apple_double = b"\0\5\x16\7"
    hidden = {"._0.png": apple_double, "._0.json": apple_double}
    hidden |= {"__MACOSX/0.png": b"", ".DS_Store": b"", "./.x.png": b""}
    tar(tmp_path / "a.tar", hidden | {"./0.png": PNGS[1], "./0.json": RECORD | {"id": 0}, ".//b//1.png": b""})
    tar(tmp_path / "._a.tar", {"9.txt": b"x"})
    (tmp_path / ".hidden.parquet").write_bytes(b"")
    found = colors(tmp_path)
    assert found.pop("b/1").startswith("it has no conversations")
    assert found == {"0": ["green"]}


def linked(path: Path, *members: tuple[str, bytes | str, bytes]) -> None:
    """A tar of files and links: names, contents or where they lead, and types."""
    with tarfile.open(path, "w") as archive:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, str):
                member.linkname, content = content, b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_a_link_in_a_shard_is_the_file_that_it_leads_to(tmp_path):
    hard, soft, file = tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.REGTYPE
    record = json.dumps(RECORD).encode()
    linked(
        tmp_path / "a.tar",
        ("pool/a.png", PNGS[0], file),
        ("pool/record.json", record, file),
        ("s/0.png", "pool/a.png", hard),
        ("s/0.json", record, file),
        ("s/1.json", "./pool/record.json", hard),
        ("s/1.png", "../pool/b.png", soft),  # which comes later
        ("s/2.json", record, file),
        ("s/2.png", "1.png", soft),
        ("s/3.json", record, file),
        ("s/3.png", "../../etc/passwd", soft),
        ("s/4.json", record, file),
        ("s/4.png", "4.png", soft),
        ("s/5.png", "s", hard),
        ("s/5.json", record, file),
        ("pool/b.png", PNGS[1], file),
        ("s", "", tarfile.DIRTYPE),
    )
    found = colors(tmp_path)
    assert [found[f"s/{i}"] for i in range(3)] == [["red"], ["green"], ["green"]]
    assert [found[f"s/{i}"] for i in (3, 4, 5)] == ["1 <image> tags for 0 pictures"] * 3


def test_a_shard_as_gnu_tar_and_pax_write_it(tmp_path):
    """With names longer than a header, and a file whose zeros are not stored."""
    name = "ä" * 120
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    (folder / f"{name}.png").write_bytes(PNGS[0])
    (folder / f"{name}.json").write_text(json.dumps(RECORD))
    with open(folder / "sparse.bmp", "wb") as file:
        file.write(bmp_of_zeros())
        file.truncate(1 << 20)
    (folder / "sparse.json").write_text(json.dumps(RECORD))
    for form in ("gnu", "pax", "posix"):
        shard = tmp_path / f"{form}.tar"
        subprocess.run(
            ["tar", "-C", str(tmp_path), "-S", f"--format={form}", "--sort=name", "-cf", str(shard), folder.name],
            check=True,
        )
        dataset = LlavaDataset(str(shard))
        assert len(dataset) == 2
        items = {dataset[i]["id"]: dataset[i] for i in range(2)}
        assert colors_of(items[f"{folder.name}/{name}"]) == ["red"]
        assert items[f"{folder.name}/sparse"]["images"][0].getpixel((3, 3)) == (0, 0, 0)


def bmp_of_zeros() -> bytes:
    return encoded(Image.new("RGB", (600, 500)), "BMP").rstrip(b"\0")


@pytest.mark.parametrize("damage", ["empty", "a byte", "cut in its first header", "cut in its end"])
def test_a_shard_needs_its_first_header_but_not_its_end(tmp_path, damage):
    tar(tmp_path / "a.tar", {"0.png": PNGS[0], "0.json": RECORD})
    content = (tmp_path / "a.tar").read_bytes()
    cut = {"empty": 0, "a byte": 1, "cut in its first header": 300, "cut in its end": 4 * 512 + 100}[damage]
    (tmp_path / "a.tar").write_bytes(content[:cut])
    if cut > 512:
        assert reasons_of(tmp_path)["0"] is None
    else:
        with pytest.raises(ValueError, match=r"is not an uncompressed tar archive|holds no records"):
            reasons_of(tmp_path)


@pytest.mark.parametrize("text", ["blue", "blue\n", "\ufeffblue\r\n"])
def test_a_caption_is_its_file_without_the_last_line_break(tmp_path, text):
    tar(tmp_path / "a.tar", {"0.png": PNGS[2], "0.txt": text.encode()})
    (item,) = LlavaDataset(str(tmp_path))
    assert item["messages"][1]["content"] == [{"type": "text", "text": "blue"}]
    assert (colors_of(item), ANSWERS[2]) == (["blue"], "blue")


def test_a_null_in_the_json_of_a_sample_is_absent(tmp_path):
    record = {"id": None, "caption": None, "image": None, "conversations": turns("<image>\n?", "!")}
    tar(tmp_path / "a.tar", {"k.json": record, "k.png": PNGS[1]})
    (item,) = LlavaDataset(str(tmp_path))
    assert (item["id"], colors_of(item)) == ("k", ["green"])


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
def test_images_of_a_sample_follow_its_json_or_their_numbers(tmp_path, members, fields, order):
    colors = {"0.png": 0, "1.png": 1, "2.png": 2, "10.png": 0, "a.png": 0, "b.png": 1, "c.png": 2, "b.PNG": 0}
    colors |= {"a.png": 1} if "b.PNG" in members else {}
    record = {"conversations": turns("<image>" * len(members) + "?", "!")} | fields
    if "messages" in fields:
        record = {"messages": messages(0, fields["messages"])}
    images = {f"0.{name}": PNGS[colors[name]] for name in members}
    tar(tmp_path / "a.tar", images | {"0.json": record})
    assert colors_of(LlavaDataset(str(tmp_path))[0]) == [ANSWERS[i] for i in order]


def test_a_bad_sample_of_a_shard_is_one_bad_record(tmp_path):
    good = {"conversations": turns(QUESTION, "red")}
    bad = {
        "b.json": b"{",
        "c.json": [good],
        "d.json": b'{"a": "\xff"}',
        "e.txt": b"\xff",
        "f.json": good | {"images": ["f.png", "no.png"]},
    }
    samples = {"a.json": good, "a.png": PNGS[0]}
    for name, content in bad.items():
        samples |= {name: content, f"{name[0]}.png": PNGS[0]}
    tar(
        tmp_path / "x.tar",
        samples | {"g.json": good, "g.png": PNGS[0][:50], "h.txt": b"red", "h.png": PNGS[0]},
    )
    reasons = reasons_of(tmp_path)
    assert [reasons["a"], reasons["h"]] == [None, None]
    for name, reason in {
        "b": "x.tar: b.json is not JSON",
        "c": "x.tar: c.json is not an object",
        "d": "x.tar: d.json is not in UTF-8",
        "e": "it is not in UTF-8 (save it anew with this encoding), or holds half of a surrogate pair",
        "f": "x.tar: no.png is not in the sample",
        "g": f"g.png in {tmp_path}/x.tar cannot be read as a picture",
    }.items():
        assert reason in reasons[name]


@pytest.mark.parametrize("cut", [0.5, 0.7, 0.9])
def test_a_truncated_shard_gives_its_whole_samples(tmp_path, cut):
    good = {"conversations": turns(QUESTION, "red")}
    tar(tmp_path / "x.tar", {f"{i}.{e}": c for i in range(9) for e, c in (("png", PNGS[0]), ("json", good))})
    content = (tmp_path / "x.tar").read_bytes()[: 9 * 4 * 512]
    (tmp_path / "x.tar").write_bytes(content[: int(len(content) * cut)])
    *reasons, last = reasons_of(tmp_path).values()
    assert reasons[: int(9 * cut)] == [None] * int(9 * cut)
    assert None not in reasons[int(9 * cut) :]
    assert "x.tar: the archive is broken in" in last
    (tmp_path / "x.tar").write_bytes(b"no archive" * 99)
    with pytest.raises(ValueError, match="is not an uncompressed tar"):
        reasons_of(tmp_path)
