"""Finds images in folders and in zip and tar archives."""

import base64
import os
import re
import reprlib
import struct
import unicodedata
import urllib.parse
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import Image

from train_llava.dataset.hub import is_file, opened

LEADS_OUT = re.compile(r"(^|[/\\])\.\.($|[/\\])|\0")


class ArchiveMember(NamedTuple):
    """Where a picture lies in a tar or zip archive, in bytes, so that it is read without the list of all members.

    In the table it is one text; the NUL characters between its fields stand in no file's name.
    """

    archive: str
    member: str
    offset: int  # of the picture in a tar; of the member's header in a zip
    size: int  # as it is stored
    method: int = zipfile.ZIP_STORED
    unpacked_size: int = 0
    checksum: int = 0

    def __str__(self) -> str:
        return "\0".join(map(str, tuple(self)))


def is_archive(image_dir: PurePath | None) -> bool:
    """Whether pictures are read out of an unextracted archive."""
    return image_dir is not None and image_dir.suffix.lower() == ".zip"


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its name's ending: one of Pillow's formats of pictures, or HEIC."""
    ending = os.path.splitext(name)[1].lower()
    kind = Image.MIME.get(Image.registered_extensions().get(ending), "")
    return kind.startswith("image/") or ending in (".heic", ".heif", ".hif")


def plain(name: str) -> str:
    """A file's path from its folder in one spelling: `/` between its parts, none empty or `.`, in Unicode's NFC.

    Windows writes backslashes, and macOS takes letters from their accents (NFD).
    """
    parts = re.split(r"[/\\]+", unicodedata.normalize("NFC", name))
    return "/".join(part for part in parts if part not in ("", "."))


def candidate_names(name: str, top: str) -> list[str]:
    """What a file that a record names may be called in its folder, or archive, `top`; the likeliest comes first.

    A record may escape a name as addresses do, or write `top` in front of it.
    """
    names = [plain(name), plain(urllib.parse.unquote(name))]
    names += [spelt.removeprefix(f"{top}/") for spelt in names]
    return [spelt for spelt in names if not LEADS_OUT.search(spelt)]


def zip_members(archive: Path) -> dict[str, ArchiveMember | None]:
    """Where each file of an archive lies, by its `plain` name; None where several that differ have this name.

    Some archives hold one folder with everything in it, which records do not name: names without it count, too. So do
    names as those meant them who wrote them in UTF-8 or Chinese Windows' code, and did not say so.

    Raises:
        ValueError: it is not a whole zip archive; the message names it.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            members = file.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a whole zip archive: {error}") from error
    path = str(archive.absolute())
    full: dict[str, ArchiveMember | None] = {}
    short: dict[str, ArchiveMember | None] = {}
    for m in members:
        if m.filename.endswith(("/", "\\")):  # a folder
            continue
        place = ArchiveMember(path, m.filename, m.header_offset, m.compress_size, m.compress_type, m.file_size, m.CRC)
        for spelt in map(plain, name_spellings(m)):
            for names, name in ((full, spelt), (short, spelt.partition("/")[2])):
                other = names.setdefault(name, place)
                if other is None or other[-2:] != place[-2:]:  # another size or checksum
                    names[name] = None
    return short | full


def name_spellings(member: zipfile.ZipInfo) -> list[str]:
    """What a file of an archive is called: as `zipfile` reads it and, where that was a guess, as it may be meant."""
    found = [member.filename]
    if not member.flag_bits & 0x800 and not member.filename.isascii():  # not said to be UTF-8, read as cp437
        for encoding in ("utf-8", "gb18030"):
            with suppress(UnicodeError):
                return [*found, member.filename.encode("cp437").decode(encoding)]
    return found


@lru_cache(maxsize=4096)
def _is_same_folder(folder: PurePath, other: Path) -> bool:
    return os.path.isdir(folder) and os.path.samefile(folder, other)


def locate_picture(
    picture: Any, image_dir: Path | None = None, members: dict[str, ArchiveMember | None] | None = None
) -> str | bytes:
    """A picture as a raw record names it: its bytes, or what `read_picture` takes; `members` are an archive's.

    A name must not lead out of the picture folder, the one that an archive lies in; where links in the folder lead is
    the user's affair.

    Raises:
        ValueError: it is no name, or not one of a file in the folder or archive.
    """
    if isinstance(picture, dict):  # as `datasets` keeps one
        picture = picture["bytes"] if picture.get("bytes") else picture.get("path")
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, ArchiveMember):
        return str(picture)
    if not isinstance(picture, str):
        raise ValueError(f"a picture is named by {reprlib.repr(picture)}")
    if picture.startswith("data:"):
        return picture
    if picture.startswith("file://"):
        picture = urllib.parse.unquote(picture.removeprefix("file://"))
    if "://" in picture:
        raise ValueError(f"{label(picture)} is an address: download the pictures and name the files")
    path, inside = PurePath(picture), not LEADS_OUT.search(picture)
    if inside and path.is_absolute():
        folder = image_dir.parent if is_archive(image_dir) else image_dir
        parent = next((p for p in path.parents if folder and _is_same_folder(p, folder)), None)
        inside, picture = parent is not None, path.relative_to(parent).as_posix() if parent else picture
    if not inside or re.match(r"[/\\]|[A-Za-z]:", picture):
        raise ValueError(f"{label(picture)} lies outside the picture folder")
    if members is None:
        return picture
    name = next((name for name in candidate_names(picture, image_dir.stem) if name in members), None)
    if name is None or members[name] is None:
        fault = "is not in the archive" if name is None else "is the name of several members of the archive"
        raise ValueError(f"{label(picture)} {fault}")
    return str(members[name])


def label(name: str) -> str:
    """What messages call a picture of the table: its name, shortened, and the archive that it is in."""
    archive, _, rest = name.partition("\0")
    name = f"{rest.partition(chr(0))[0]} in {archive}" if rest else archive
    return name if len(name) <= 200 else f"{name[:40]}…"


def read_picture(image_dir: PurePath, name: str) -> bytes | Path:
    """A picture named in the table: a file in `image_dir`, a place in a shard or archive, or a data URI.

    Raises:
        ValueError: it is a folder, or it cannot be taken out of the archive.
    """
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2])
    if "\0" in name:
        return _read_member(name)
    path = image_dir / name
    if not is_file(path):
        names = candidate_names(name, image_dir.name)
        paths = [image_dir / unicodedata.normalize(form, spelt) for spelt in names for form in ("NFC", "NFD")]
        path = next(filter(is_file, paths), path)
        if isinstance(path, Path) and path.is_dir():
            raise ValueError(f"{name} is a folder")
    if not isinstance(path, Path):
        with opened(path) as file:
            return file.read()
    return path


def _read_member(text: str) -> bytes:
    archive, member, *numbers = text.split("\0")
    place = ArchiveMember(archive, member, *map(int, numbers))
    try:
        with open(archive, "rb") as file:
            file.seek(place.offset)
            if not is_archive(Path(archive)):
                return file.read(place.size)
            header = file.read(30)
            file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # the name and the extra field
            info = zipfile.ZipInfo(member)
            info.compress_type, info.compress_size = place.method, place.size
            info.file_size, info.CRC = place.unpacked_size, place.checksum
            with zipfile.ZipExtFile(file, "r", info) as packed:
                return packed.read()
    except Exception as error:  # each way of packing has errors of its own
        raise ValueError(f"{member} cannot be taken out of {archive}: {error}") from error
