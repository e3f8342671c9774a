"""From picture files to `pixel_values`: decoded, upright, RGB, and prepared as the model's image processor would."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, UnidentifiedImageError
from torch import nn
from transformers import BaseImageProcessor

with suppress(ImportError):  # who has it can read HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()

PIXELS = 90_000_000  # decoded at most; no picture, large JPEGs included, takes more than 1.4 GB
Image.MAX_IMAGE_PIXELS = 3 * PIXELS // 2  # Pillow refuses twice that; large JPEGs are decoded at a half
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


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
def _opened(source: Path | str | bytes, name: str, min_side: int | None = None) -> Iterator[Image.Image]:
    """A picture whose head is read; what is wrong with it, now or when it is decoded, is an error that names it.

    A JPEG's size is then the one it will be decoded at; `min_side`: see `open_image`.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if isinstance(image, JpegImagePlugin.JpegImageFile):  # a phone's MPO is one, too
                shrink = max(2 if width * height > PIXELS else 1, min(image.size) // (2 * min_side) if min_side else 1)
                image.draft(None, (max(width // shrink, 1), max(height // shrink, 1)))
            if image.width * image.height > PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many: make it smaller, or a JPEG")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except UnidentifiedImageError:  # its text is the name once more
        head = source[:12] if isinstance(source, bytes) else Path(source).read_bytes()[:12]
        heic = head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf")
        reason = (
            "it is HEIC, which `pip install pillow-heif` opens" if heic else "it is of no format that Pillow knows"
        )
        raise ValueError(f"{name} cannot be read as a picture: {reason}") from None
    except Exception as error:  # decoders raise anything: RuntimeError, struct.error, EOFError, MemoryError, …
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def open_image(source: Path | str | bytes, name: str | None = None, min_side: int | None = None) -> Image.Image:
    """Reads a picture, from a file or from its bytes, whole: a truncated one is an error.

    With `min_side`, a large picture comes at a half, a third, … of its size, as long as its shorter side stays twice
    that many pixels: it is made that small anyway. A JPEG is decoded at a half, a quarter or an eighth, which is
    several times faster; and at a half where it has more than `PIXELS`, up to three times as many.

    Raises:
        OSError, ValueError: it is not a picture, not a whole one, or one of so many pixels that it must be an attack;
            the message names it.
    """
    with _opened(source, name or str(source), min_side) as image:
        upright = upright_rgb(image)
        factor = min(upright.size) // (2 * min_side) if min_side else 1
        return upright.reduce(factor) if factor > 1 else upright


def picture_size(source: Path | str | bytes, name: str) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it, by its head alone; raises what that does."""
    with _opened(source, name) as image:
        if image.format == "TIFF":  # which Pillow itself turns
            return image.size
        getexif = Image.Image.getexif
        if image.format == "PNG":  # its own decodes it, for what stands behind its pixels: only where there is some
            place = image.fp.tell()
            if re.search(rb"eXIf|iTXt|Raw profile type exif", image.fp.read()):
                getexif = type(image).getexif
            image.fp.seek(place)
        lies = getexif(image).get(ExifTags.Base.Orientation, 1) >= 5  # on one of its sides
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
