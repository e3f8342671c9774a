"""From picture files to `pixel_values`: decoded, upright, RGB, and prepared as the model's image processor would."""

import base64
import io
import os
import re
import reprlib
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import nn
from transformers import BaseImageProcessor


class Place(NamedTuple):
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


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture as people see it: turned as its EXIF says, transparency on white, 16 and 32 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # deep gray, which `convert` would clip
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    """Gray of 16 or 32 bits, integers or floats, in 8 bits; white is the end of the range that its values lie in."""
    ranges = (1, 255, 65535) if gray.dtype.kind == "f" else (65535,)
    # Pillow keeps unsigned numbers of 32 bits as signed ones: seen where they exceed 16 bits, or are black and white
    if gray.dtype == np.int32 and (gray.min() < -32768 or (gray.min(), gray.max()) == (-1, 0)):
        gray = gray.view(np.uint32)
    gray = np.nan_to_num(gray.astype(np.float64)).clip(0)
    white = next((end for end in ranges if gray.max() <= end), gray.max())
    return (gray * (255 / white)).round().astype(np.uint8)


@contextmanager
def _opened(source: Path | str | bytes, name: str) -> Iterator[Image.Image]:
    """A picture whose head is read; what is wrong with it, now or when it is decoded, is an error that names it."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except UnidentifiedImageError:  # its text is the name once more
        raise ValueError(f"{name} cannot be read as a picture: it is of no format that Pillow knows") from None
    except Exception as error:  # decoders raise anything: RuntimeError, struct.error, EOFError, MemoryError, …
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def open_image(source: Path | str | bytes, name: str | None = None, at_least: int | None = None) -> Image.Image:
    """Reads a picture, from a file or from its bytes, whole: a truncated one is an error.

    With `at_least`, a large JPEG is decoded at a half, a quarter or an eighth of its size, as long as its shorter side
    stays twice that many pixels: the picture is made that small anyway, and decoding small is several times faster.

    Raises:
        OSError, ValueError: it is not a picture, not a whole one, or one of so many pixels that it must be an attack;
            the message names it.
    """
    with _opened(source, name or str(source)) as image:
        if at_least is not None and image.format == "JPEG":
            image.draft(None, (2 * at_least, 2 * at_least))
        return upright_rgb(image)


def picture_size(source: Path | str | bytes, name: str) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it, by its head alone; raises what that does."""
    with _opened(source, name) as image:
        exif = Image.Image.getexif(image)  # a PNG's own would decode it, for what may stand behind its pixels
        lies = exif.get(ExifTags.Base.Orientation, 1) >= 5  # on one of its sides
        return image.size[::-1] if lies else image.size


def is_anyres(image_processor: BaseImageProcessor) -> bool:
    """Whether pictures are cut into tiles by their sizes, as LLaVA-NeXT does (`--image_aspect_ratio anyres`)."""
    return hasattr(image_processor, "image_grid_pinpoints")


def prepare_pictures(image_processor: BaseImageProcessor, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """RGB pictures as the model takes them: the fast way where it agrees, else the image processor's own.

    Returns:
        `pixel_values` `(P, 3, H, W)`. With tiles (see `is_anyres`) it is `(P, N, 3, H, W)`, the whole picture, its
        tiles, and zeros where another picture has more of them; and there are `image_sizes` `(P, 2)`, heights and
        widths.
    """
    if is_anyres(image_processor):
        return dict(image_processor(images, return_tensors="pt"))
    images = [shortened_strip(image_processor, image) for image in images]
    if matches_processor(image_processor):
        return {"pixel_values": prepare_fast(image_processor, images)}
    return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"]}


def shortened_strip(image_processor: BaseImageProcessor, image: Image.Image) -> Image.Image:
    """What the image processor keeps of a picture more than four times as long as wide; any other as it is.

    Of 60,000 x 1 pixels, one that resizes the shorter side first makes 38 billion and then crops the middle, and one
    that pads first makes 3.6 billion. Here the part that the crop keeps is resized alone, to the same pixels, and what
    will be padded is made small before.
    """
    long, short = max(image.size), min(image.size)
    size = image_processor.size
    if long <= 4 * short:
        return image
    if getattr(image_processor, "do_pad", False):
        limit = 4 * (size.shortest_edge or max(size.height, size.width))
        image = image.copy()
        image.thumbnail((limit, limit))
    elif size.shortest_edge and image_processor.do_center_crop:
        shortest, crop = size.shortest_edge, image_processor.crop_size
        length = int(shortest * long / short)  # of the longer side once resized
        start = (length - max(shortest, crop.height, crop.width)) // 2  # as much is cut off at both ends
        ends = (start * long / length, (length - start) * long / length)
        if image.width == long:
            target, box = (length - 2 * start, shortest), (ends[0], 0, ends[1], short)
        else:
            target, box = (shortest, length - 2 * start), (0, ends[0], short, ends[1])
        image = image.resize(target, image_processor.resample, box=box)
    return image


def prepare_fast(image_processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """`pixel_values` `(P, 3, H, W)` of RGB pictures, as CLIP's image processor makes them, in a third of the time.

    PyTorch resizes bytes as Pillow does, several times faster and straight into the order of channels the model takes
    (a pixel in a hundred is rounded to another of the 256 levels); all pictures are normalised at once.
    `matches_processor` tells whether the outcome is that of a given image processor.
    """
    height, width = image_processor.crop_size["height"], image_processor.crop_size["width"]
    shortest = image_processor.size["shortest_edge"]
    pixels = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    for i, image in enumerate(images):
        short = min(image.size)
        w, h = (shortest if side == short else int(shortest * side / short) for side in image.size)
        left, top = (w - width) // 2, (h - height) // 2
        picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = nn.functional.interpolate(picture, (h, w), mode="bicubic", antialias=True)[0]
        pixels[i] = resized[:, top : top + height, left : left + width]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return pixels.float().mul_(image_processor.rescale_factor / std).sub_(mean / std)


@lru_cache
def matches_processor(image_processor: BaseImageProcessor) -> bool:
    """Whether `prepare_fast` gives what this image processor gives, tried on a wide and a tall noise picture."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((50, 161, 3), (133, 64, 3))]
    if not (image_processor.crop_size and image_processor.size.shortest_edge and image_processor.do_center_crop):
        return False
    ours = prepare_fast(image_processor, noise)
    theirs = image_processor(noise, return_tensors="pt")["pixel_values"]
    level = image_processor.rescale_factor / min(image_processor.image_std)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 2.01 * level)


def is_archive(image_dir: Path | None) -> bool:
    """Whether pictures are read out of an unextracted archive."""
    return image_dir is not None and image_dir.suffix == ".zip"


def zip_members(archive: Path) -> dict[str, Place | None]:
    """Where each file of an archive lies, by its name; None where several that differ have this name.

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
    full: dict[str, Place | None] = {}
    short: dict[str, Place | None] = {}
    for m in members:
        place = Place(path, m.filename, m.header_offset, m.compress_size, m.compress_type, m.file_size, m.CRC)
        for spelt in spellings(m):
            for names, name in ((full, spelt), (short, spelt.partition("/")[2])):
                other = names.setdefault(name, place)
                if other is None or other[-2:] != place[-2:]:  # another size or checksum
                    names[name] = None
    return short | full


def spellings(member: zipfile.ZipInfo) -> list[str]:
    """What a file of an archive is called: as `zipfile` reads it and, where that was a guess, as it may be meant."""
    found = [member.filename]
    if not member.flag_bits & 0x800 and not member.filename.isascii():  # not said to be UTF-8, read as cp437
        for encoding in ("utf-8", "gb18030"):
            with suppress(UnicodeError):
                return [*found, member.filename.encode("cp437").decode(encoding)]
    return found


def locate_picture(picture: Any, members: dict[str, Place | None] | None = None) -> str | bytes:
    """A picture as a raw record names it: its bytes, or what `read_picture` takes; `members` are an archive's.

    A name must not lead out of the picture folder; where links in the folder lead is the user's affair.

    Raises:
        ValueError: it is no name, or not one of a file in the folder or archive.
    """
    if isinstance(picture, dict):  # as `datasets` keeps one
        picture = picture["bytes"] if picture.get("bytes") else picture.get("path")
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Place):
        return str(picture)
    if not isinstance(picture, str):
        raise ValueError(f"a picture is named by {reprlib.repr(picture)}")
    if picture.startswith("data:"):
        return picture
    if "://" in picture:
        raise ValueError(f"{label(picture)} is an address: download the pictures and name the files")
    if re.search(r"^([/\\]|[A-Za-z]:)|(^|[/\\])\.\.($|[/\\])|\0", picture):
        raise ValueError(f"{label(picture)} lies outside the picture folder")
    if members is None:
        return picture
    if members.get(picture) is None:
        fault = "is the name of several members of the archive" if picture in members else "is not in the archive"
        raise ValueError(f"{label(picture)} {fault}")
    return str(members[picture])


def label(name: str) -> str:
    """What messages call a picture of the table: its name, shortened, and the archive that it is in."""
    archive, _, rest = name.partition("\0")
    name = f"{rest.partition(chr(0))[0]} in {archive}" if rest else archive
    return name if len(name) <= 200 else f"{name[:40]}…"


def read_picture(image_dir: Path, name: str) -> bytes | Path:
    """A picture named in the table: a file in `image_dir`, a place in a shard or archive, or a data URI.

    Raises:
        ValueError: it is a folder, or it cannot be taken out of the archive.
    """
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2])
    if "\0" in name:
        return _read_place(name)
    path = image_dir / name
    if path.is_dir():
        raise ValueError(f"{name} is a folder")
    return path


def _read_place(text: str) -> bytes:
    archive, member, *numbers = text.split("\0")
    place = Place(archive, member, *map(int, numbers))
    try:
        with open(archive, "rb") as file:
            file.seek(place.offset)
            if not archive.endswith(".zip"):
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
