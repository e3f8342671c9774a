"""From picture files to `pixel_values`: decoded, upright, RGB, and prepared as the model's image processor would."""

import io
import os
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from transformers import BaseImageProcessor


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture as people see it: turned as its EXIF says, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which `convert` would clip
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def open_image(source: Path | str | bytes, name: str | None = None, at_least: int | None = None) -> Image.Image:
    """Reads a picture, from a file or from its bytes, whole: a truncated one is an error.

    With `at_least`, a large JPEG is decoded at a half, a quarter or an eighth of its size, as long as its shorter side
    stays twice that many pixels: the picture is made that small anyway, and decoding small is several times faster.

    Raises:
        OSError, ValueError: it is not a picture, not a whole one, or one of so many pixels that it must be an attack;
            the message names it.
    """
    name = name or str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            if at_least is not None and image.format == "JPEG":
                image.draft(None, (2 * at_least, 2 * at_least))
            return upright_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def prepare_pictures(image_processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """`pixel_values` `(P, 3, H, W)` of RGB pictures: the fast way where it agrees, else the image processor's own."""
    if agrees(image_processor):
        return prepare_fast(image_processor, images)
    return image_processor(images, return_tensors="pt")["pixel_values"]


def prepare_fast(image_processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """`pixel_values` `(P, 3, H, W)` of RGB pictures, as CLIP's image processor makes them, in a third of the time.

    PyTorch resizes bytes as Pillow does, several times faster and straight into the order of channels the model takes
    (a pixel in a hundred is rounded to another of the 256 levels); all pictures are normalised at once. `agrees` tells
    whether the outcome is that of a given image processor.
    """
    height, width = image_processor.crop_size["height"], image_processor.crop_size["width"]
    shortest = image_processor.size["shortest_edge"]
    pixels = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    for i, image in enumerate(images):
        short = min(image.size)
        w, h = (shortest if side == short else int(shortest * side / short) for side in image.size)
        left, top = (w - width) // 2, (h - height) // 2
        if max(w, h) <= 4 * shortest:
            picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            resized = nn.functional.interpolate(picture, (h, w), mode="bicubic", antialias=True)[0]
            pixels[i] = resized[:, top : top + height, left : left + width]
        else:  # of a strip, the part that the crop keeps is resized alone
            across, down = image.width / w, image.height / h
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            part = image.resize((width, height), image_processor.resample, box=box)
            pixels[i] = torch.from_numpy(np.array(part)).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image_processor.image_mean, image_processor.image_std))
    return pixels.float().mul_(image_processor.rescale_factor / std).sub_(mean / std)


@lru_cache
def agrees(image_processor: BaseImageProcessor) -> bool:
    """Whether `prepare_fast` gives what this image processor gives, tried on a wide and a tall noise picture."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((50, 161, 3), (133, 64, 3))]
    if not (image_processor.crop_size and image_processor.size.shortest_edge and image_processor.do_center_crop):
        return False
    ours = prepare_fast(image_processor, noise)
    theirs = image_processor(noise, return_tensors="pt")["pixel_values"]
    level = image_processor.rescale_factor / min(image_processor.image_std)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 2.01 * level)


def is_archive(pictures: Path | None) -> bool:
    """Whether pictures are read out of an unextracted archive."""
    return pictures is not None and pictures.suffix == ".zip"


def zip_members(archive: Path) -> dict[str, str]:
    """Where each file of an archive lies: name -> "offset:size:method", so that one is read without the whole list."""
    with zipfile.ZipFile(archive) as file:
        members = {m.filename: f"{m.header_offset}:{m.compress_size}:{m.compress_type}" for m in file.infolist()}
    # some archives hold one folder with everything in it, which records do not name
    return {name.partition("/")[2]: place for name, place in members.items() if "/" in name} | members


def read_picture(pictures: Path, name: str) -> bytes | Path:
    """A picture named in the table: a file in the folder `pictures`, or the bytes at a place in a shard or archive.

    Raises:
        OSError, ValueError: it is not there, or its path leads out of the folder.
    """
    if is_archive(pictures):
        offset, size, method = map(int, name.split(":"))
        with open(pictures, "rb") as file:
            file.seek(offset)
            header = file.read(30)
            file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)  # the name and the extra field
            packed = file.read(size)
        return packed if method == zipfile.ZIP_STORED else zlib.decompress(packed, -zlib.MAX_WBITS)
    shard, _, place = name.partition(".tar:")
    if place:
        offset, size = map(int, place.split(":"))
        with open(pictures / f"{shard}.tar", "rb") as file:
            file.seek(offset)
            return file.read(size)
    path = pictures / name
    if not path.resolve().is_relative_to(_resolved(pictures)):
        raise ValueError(f"{name} lies outside the picture folder {pictures}")
    if path.is_dir():
        raise ValueError(f"{name} is a folder")
    return path


@lru_cache
def _resolved(folder: Path) -> Path:
    return folder.resolve()
