"""Finds the files that records name, in a folder, a zip archive or a tar shard, and reads them there."""

import base64
import os
import re
import reprlib
import struct
import tarfile
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from PIL import Image

from train_llava.dataset.hub import is_file, opened

LEADS_OUT = re.compile(r"(^|[/\\])\.\.($|[/\\])|\0")
ABSOLUTE = re.compile(r"[/\\]|[A-Za-z]:")


class ArchiveMember(NamedTuple):
    """Where a file lies in a tar or zip archive, so that it can be read without the list of all members.

    The table stores the fields as one text. NUL separates them, because no file name contains it.
    """

    archive: str
    name: str
    offset: int  # in bytes: of the content in a tar, of the member's header in a zip
    size: int  # as stored
    method: int = zipfile.ZIP_STORED
    unpacked_size: int = 0
    checksum: int = 0

    def __str__(self) -> str:
        return "\0".join(map(str, tuple(self)))


Members = dict[str, ArchiveMember | None]  # by name; None where several files share it


def is_archive(image_dir: PurePath | None) -> bool:
    """Whether images are read from a zip archive that is not extracted."""
    return image_dir is not None and image_dir.suffix.lower() == ".zip" and not os.path.isdir(image_dir)


def is_image(name: str) -> bool:
    """Whether a file's extension is one of Pillow's image formats, or HEIC."""
    extension = os.path.splitext(name)[1].lower()
    mime_type = Image.MIME.get(Image.registered_extensions().get(extension), "")
    return mime_type.startswith("image/") or extension in (".heic", ".heif", ".hif")


def is_hidden(name: str) -> bool:
    """Whether a file is hidden, or one of those that macOS and network disks add to folders and archives."""
    return os.path.basename(name).startswith(".") or not {"__MACOSX", "@eaDir"}.isdisjoint(name.split("/"))


def normal_path(name: str) -> str:
    """One spelling for a file's path in its folder: slashes, no empty parts, Unicode's composed form (NFC).

    Windows writes backslashes, and macOS separates accents from letters (NFD). `.\\a//b.png` → `a/b.png`.
    """
    parts = re.split(r"[/\\]+", unicodedata.normalize("NFC", name))
    return "/".join(part for part in parts if part not in ("", "."))


def candidate_names(name: str, top: str) -> list[str]:
    """What `name` may mean in the folder or archive `top`, the likeliest first: as it is, unescaped, without `top`."""
    names = [normal_path(name), normal_path(urllib.parse.unquote(name))]
    names += [candidate.removeprefix(f"{top}/") for candidate in names]
    return [candidate for candidate in names if not LEADS_OUT.search(candidate)]


def zip_members(archive: Path) -> Members:
    """The files of a zip archive by `normal_path`, with and without the top folder; a ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(archive) as file:
            infos = file.infolist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is not a whole zip archive: {error}") from error
    path = str(archive.absolute())
    full: Members = {}  # by the whole path
    short: Members = {}  # without the top folder
    for info in infos:
        if info.filename.endswith(("/", "\\")):  # a folder
            continue
        stored = (info.header_offset, info.compress_size, info.compress_type, info.file_size, info.CRC)
        member = ArchiveMember(path, info.filename, *stored)
        # A name that different files share leads to none of them
        for name in map(normal_path, _decoded_names(info)):
            for members, key in ((full, name), (short, name.partition("/")[2])):
                other = members.setdefault(key, member)
                if other is None or other[-2:] != member[-2:]:  # another size or checksum
                    members[key] = None
    return short | full


def _decoded_names(info: zipfile.ZipInfo) -> list[str]:
    """The name as `zipfile` reads it, and if its encoding is not stated, as UTF-8 or as Chinese Windows'."""
    if info.filename.isascii() or info.flag_bits & 0x800:  # marked as UTF-8
        return [info.filename]
    for encoding in ("utf-8", "gb18030"):
        with suppress(UnicodeError):
            return [info.filename, info.filename.encode("cp437").decode(encoding)]
    return [info.filename]


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar archive under their `normal_path`, without hidden files.

    A link becomes the file that it leads to, under the link's name. If the archive is damaged, a last member
    follows, of size -1; its name says where the damage is.
    """
    files: dict[str, tarfile.TarInfo] = {}  # those read so far, until a link needs all
    all_read, damage = False, None
    try:
        for member in archive:
            name, target = normal_path(member.name), member
            files.setdefault(name, member)
            # Follow the links: a link may lead to a link, or to a file that comes later
            for _ in range(9):
                if target is None or not (target.islnk() or target.issym()):
                    break
                folder = os.path.dirname(normal_path(target.name)) if target.issym() else ""
                target_name = normal_path(os.path.normpath(os.path.join(folder, target.linkname)))
                if target_name not in files and not all_read:
                    files, all_read = {normal_path(other.name): other for other in archive.getmembers()}, True
                target = files.get(target_name)
            if target is not None and target.isfile() and not is_hidden(name):
                found = copy(target)  # `replace` is missing in Debian 12's Python, 3.11.2
                found.name = name
                yield found
        # `tarfile` stops without an error at a block that is no header: a whole archive has zeros there
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            damage = f"what follows {member.name}"
    except (tarfile.TarError, OSError):  # after the first member, whose header `tarfile.open` has read
        damage = member.name
    if damage is not None:
        broken = tarfile.TarInfo(damage)
        broken.size = -1
        yield broken


@lru_cache(maxsize=4096)
def _is_same_folder(folder: PurePath, other: Path) -> bool:
    return os.path.isdir(folder) and os.path.samefile(folder, other)


def locate_image(image: Any, image_dir: Path | None = None, members: Members | None = None) -> str | bytes:
    """An image of a raw record as its bytes, or as the text that `read_image` takes.

    `members` are those of the archive `image_dir`. A name must not lead out of the image folder, or of the
    archive's folder. Links in the folder may lead anywhere. A ValueError says that it is not a name, leads out, or is
    not in the archive.
    """
    # The image itself, or a name that needs no folder
    if isinstance(image, dict):  # as `datasets` stores one
        image = image.get("bytes") or image.get("path")
    if isinstance(image, ArchiveMember):
        return str(image)
    if isinstance(image, bytes) or (isinstance(image, str) and image.startswith("data:")):
        return image
    if not isinstance(image, str):
        raise ValueError(f"a picture is named by {reprlib.repr(image)}")

    # A path inside the image folder: an absolute one is made relative
    if image.startswith("file://"):
        image = urllib.parse.unquote(image.removeprefix("file://"))
    if "://" in image:
        raise ValueError(f"{label(image)} is an address: download the pictures and name the files")
    path = PurePath(image)
    if path.is_absolute() and image_dir is not None and not LEADS_OUT.search(image):
        folder = image_dir.parent if is_archive(image_dir) else image_dir
        parents = (parent for parent in path.parents if _is_same_folder(parent, folder))
        image = next((path.relative_to(parent).as_posix() for parent in parents), image)
    if LEADS_OUT.search(image) or ABSOLUTE.match(image):
        raise ValueError(f"{label(image)} lies outside the picture folder")
    if members is None:
        return image

    # A member of the archive
    name = next((name for name in candidate_names(image, image_dir.stem) if name in members), None)
    if name is None:
        raise ValueError(f"{label(image)} is not in the archive")
    if members[name] is None:
        raise ValueError(f"{label(image)} is the name of several members of the archive")
    return str(members[name])


def data_uri(image: bytes) -> str:
    """An image as a text for the table, which `read_image` takes."""
    return f"data:;base64,{base64.b64encode(image).decode()}"


def label(name: str) -> str:
    """An image's name for messages, shortened. A member of an archive has the archive's name, too."""
    archive, *fields = name.split("\0")
    name = f"{fields[0]} in {archive}" if fields else name
    return name if len(name) <= 200 else f"{name[:40]}…"


def read_image(image_dir: PurePath, name: str) -> bytes | Path:
    """An image of the table: a file in `image_dir`, a member of an archive, or a data URI; or a ValueError."""
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2])
    if "\0" in name:
        return _read_member(name)
    # A file in the folder, in the first of these spellings that exists
    spellings = [name]
    for candidate in candidate_names(name, image_dir.name):
        spellings += [candidate, unicodedata.normalize("NFD", candidate)]
    paths = [image_dir / spelling for spelling in spellings]
    path = next(filter(is_file, paths), paths[0])
    if not isinstance(path, Path):  # on the hub
        with opened(path) as file:
            return file.read()
    if path.is_dir():
        raise ValueError(f"{name} is a folder")
    return path


def _read_member(text: str) -> bytes:
    """The content of an `ArchiveMember`, from its text in the table."""
    archive, name, *numbers = text.split("\0")
    member = ArchiveMember(archive, name, *map(int, numbers))
    try:
        with open(archive, "rb") as file:
            file.seek(member.offset)
            if not is_archive(Path(archive)):
                return file.read(member.size)
            # A zip member begins with a header; the lengths of its name and extra field are at its end
            header = file.read(30)
            file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
            info = zipfile.ZipInfo(name)
            info.compress_type, info.compress_size = member.method, member.size
            info.file_size, info.CRC = member.unpacked_size, member.checksum
            with zipfile.ZipExtFile(file, "r", info) as unpacked:
                return unpacked.read()
    except Exception as error:  # each compression method has errors of its own
        raise ValueError(f"{name} cannot be taken out of {archive}: {error}") from error
