"""Turns image files into `pixel_values`: decodes them upright, then prepares them as the image processor does."""

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
from transformers.image_processing_utils import select_best_resolution

with suppress(ImportError):  # an optional package, for HEIC
    import pillow_heif

    pillow_heif.register_heif_opener()

PIXELS = 90_000_000  # the most that are decoded, so that no image takes more than 1.4 GB
Image.MAX_IMAGE_PIXELS = 3 * PIXELS // 2  # Pillow refuses twice as many; larger JPEGs are decoded at a half
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image as people see it: turned by its EXIF, on white where it is transparent, in RGB with 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # gray of 16 or 32 bits, which `convert` would clip
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    """Scales gray of 16 or 32 bits, integers or floats, to 8 bits; white is the end of its range of values."""
    ends = (1, 255, 65535) if gray.dtype.kind == "f" else (65535,)
    # Pillow reads unsigned 32 bits as signed. It shows at values beyond 16 bits, or where all are black or white
    if gray.dtype == np.int32 and (gray.min() < -32768 or (gray.min(), gray.max()) == (-1, 0)):
        gray = gray.view(np.uint32)
    gray = np.nan_to_num(gray.astype(np.float64)).clip(0)
    white = next((end for end in ends if gray.max() <= end), gray.max())
    return (gray * (255 / white)).round().astype(np.uint8)


@contextmanager
def _opened(source: Path | str | bytes, name: str, min_side: int | None = None) -> Iterator[Image.Image]:
    """Reads an image's header. Errors of the block, which may decode the image, become errors that name it.

    A JPEG has the size at which it will be decoded; for `min_side` see `open_image`.
    """
    # A large JPEG is decoded smaller; any other image has to be small enough
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            if isinstance(image, JpegImagePlugin.JpegImageFile):  # so is the MPO of a phone
                factor = 2 if width * height > PIXELS else 1
                if min_side:
                    factor = max(factor, min(image.size) // (2 * min_side))
                image.draft(None, (max(width // factor, 1), max(height // factor, 1)))
            if image.width * image.height > PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many: make it smaller, or a JPEG")
            yield image
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except Exception as error:  # decoders raise anything: struct.error, EOFError, MemoryError, …
        # What kind of file it is, if Pillow does not know it
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):  # its text is only the name
            reason = "it is of no format that Pillow knows"
            head = source[:12] if isinstance(source, bytes) else Path(source).read_bytes()[:12]
            if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"msf"):
                reason = "it is HEIC, which `pip install pillow-heif` opens"
        raise ValueError(f"{name} cannot be read as a picture: {reason}") from error


def open_image(source: Path | str | bytes, name: str | None = None, min_side: int | None = None) -> Image.Image:
    """Decodes an image from a file or from its bytes, with `upright_rgb`.

    `min_side` makes a large image smaller by a whole factor, as long as its shorter side keeps twice as many
    pixels. A JPEG is decoded at a half, a quarter or an eighth, several times faster. If it has more than `PIXELS`
    pixels, at most three times as many, it is decoded at a half in any case. An OSError or ValueError names a file
    that is no image, is truncated, or has too many pixels.
    """
    with _opened(source, name or str(source), min_side) as image:
        upright = upright_rgb(image)
        factor = min(upright.size) // (2 * min_side) if min_side else 1
        return upright.reduce(factor) if factor > 1 else upright


def picture_size(source: Path | str | bytes, name: str) -> tuple[int, int]:
    """Width and height of an image as `open_image` gives it, from its header; raises the same errors."""
    width, height, turn = stored_geometry(source, name)
    return (height, width) if turn >= 5 else (width, height)


def stored_geometry(source: Path | str | bytes, name: str) -> tuple[int, int, int]:
    """Width and height of an image as its file has it, and its EXIF orientation, 1 to 8; 5 and more turn by a quarter.

    Raises the errors of `open_image`. Pillow turns a TIFF by itself: it counts as stored like that.
    """
    with _opened(source, name) as image:
        if image.format == "TIFF":
            return *image.size, 1
        getexif = Image.Image.getexif
        if image.format == "PNG":
            # EXIF may follow the pixels of a PNG, and its `getexif` decodes them: only where there is some
            start = image.fp.tell()
            if re.search(rb"eXIf|iTXt|Raw profile type exif", image.fp.read()):
                getexif = type(image).getexif
            image.fp.seek(start)
        turn = getexif(image).get(ExifTags.Base.Orientation, 1)
        return *image.size, turn if turn in range(1, 9) else 1


def is_anyres(image_processor: BaseImageProcessor) -> bool:
    """Whether images are cut into tiles by their sizes (`--image_aspect_ratio anyres`)."""
    return are_padded(image_processor) or getattr(image_processor, "do_image_splitting", False)


def are_padded(image_processor: BaseImageProcessor) -> bool:
    """Whether the tiles are LLaVA-NeXT's, with padding around the image. An Idefics3's are stretched."""
    return hasattr(image_processor, "image_grid_pinpoints")


def prepare_pictures(image_processor: BaseImageProcessor, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """RGB images as the model takes them, by `prepare_fast` where that gives the same.

    Returns:
        `pixel_values` `(P, 3, H, W)`. With tiles (see `is_anyres`) `(P, N, 3, H, W)`: the whole image, its
        tiles, and zeros where another image has more; and `image_sizes` `(P, 2)`, heights and widths. An Idefics3
        takes `(P, N, 3, H, W)` alone: the tiles, the whole image, and zeros; without tiles, N is 1.
    """
    if hasattr(image_processor, "max_image_size"):  # an Idefics3's
        batch = image_processor([[image] for image in images], return_tensors="pt")
        return {"pixel_values": batch["pixel_values"]}
    if is_anyres(image_processor):
        return dict(image_processor(images, return_tensors="pt"))
    images = [shortened_strip(image_processor, image) for image in images]
    if matches_processor(image_processor):
        return {"pixel_values": prepare_fast(image_processor, images)}
    return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"]}


def levels(image_processor: BaseImageProcessor, image: Image.Image) -> np.ndarray:
    """An RGB image as the model sees it, cropped or padded, or its tiles: `(H, W, 3)`, levels from 0 to 255."""
    (pixels,) = prepare_pictures(image_processor, [image])["pixel_values"]
    pixels, tiles = whole_and_tiles(image_processor, pixels, image.size)
    if tiles is not None:
        pixels = tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    pixels = pixels.permute(1, 2, 0).numpy()
    return (pixels * image_processor.image_std + image_processor.image_mean) / image_processor.rescale_factor


def whole_and_tiles(
    image_processor: BaseImageProcessor, pixels: torch.Tensor, size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An image's `pixel_values` as the whole image, `(3, H, W)`, and its tiles, `(rows, columns, 3, H, W)`, if any."""
    if pixels.ndim == 3:
        return pixels, None
    if hasattr(image_processor, "max_image_size"):  # an Idefics3's
        _, *grid = image_processor.get_number_of_image_patches(*size[::-1])
        *tiles, whole = pixels
    else:
        best = select_best_resolution(size[::-1], image_processor.image_grid_pinpoints)
        grid = [length // pixels.shape[-1] for length in best]
        whole, *tiles = pixels
    return whole, torch.stack(tiles).unflatten(0, grid) if tiles else None


def seen_part(image_processor: BaseImageProcessor, side: int, size: tuple[int, int]) -> list[float]:
    """The part of an image that the model sees: left, top, right and bottom in shares of its width and height.

    A center crop sees less than 0 to 1, padding more. It is measured on an image of these proportions whose red and
    green tell the place; beside it a black and a white one tell what is padding. `side`: see `chat.image_size`.
    """
    factor = min(side / min(size), 4096 / max(size))  # so that it is hardly resized
    width, height = (max(round(side * factor), 1) for side in size)
    ramp = np.zeros((3, height, width, 3), dtype=np.uint8)
    ramp[0, :, :, 0] = np.rint(255 * (np.arange(width) + 0.5) / width)
    ramp[0, :, :, 1] = np.rint(255 * (np.arange(height) + 0.5) / height)[:, None]
    ramp[2] = 255
    pixels = prepare_pictures(image_processor, [Image.fromarray(one) for one in ramp])["pixel_values"]
    places, black, white = (whole_and_tiles(image_processor, one, (width, height))[0] for one in pixels)
    ends = []
    for channel in (0, 1):
        contrast = white[channel] - black[channel]  # little where padding is mixed in
        shares = (places[channel] - black[channel]) / contrast
        line = shares.where(contrast > 0.99 * contrast.max(), torch.nan).nanmean(dim=channel).numpy()
        at = (np.arange(len(line)) + 0.5) / len(line)
        inside = (line > 0.03) & (line < 0.97)
        slope, start = np.polyfit(at[inside], line[inside], 1)
        ends.append((start, start + slope))
    return [round(float(end), 4) for pair in zip(*ends, strict=True) for end in pair]


def shortened_strip(image_processor: BaseImageProcessor, image: Image.Image) -> Image.Image:
    """Shortens an image whose sides differ by more than a factor of 4; returns any other unchanged.

    A line of 60,000 x 1 pixels would be resized to 38 billion and then center-cropped, or padded to 3.6 billion.
    So the part that the crop keeps is resized alone, to the same pixels. An image to be padded is made smaller.
    """
    long, short = max(image.size), min(image.size)
    size = image_processor.size
    if long <= 4 * short:
        return image
    # To be padded: made smaller
    if getattr(image_processor, "do_pad", False):
        limit = 4 * (size.shortest_edge or max(size.height, size.width))
        image = image.copy()
        image.thumbnail((limit, limit))
    # To be cropped: the middle alone, resized
    elif size.shortest_edge and image_processor.do_center_crop:
        crop = image_processor.crop_size
        length = int(size.shortest_edge * long / short)  # the longer side after resizing
        cut = (length - max(size.shortest_edge, crop.height, crop.width)) // 2  # off each end
        start, end = cut * long / length, (length - cut) * long / length
        target, box = (length - 2 * cut, size.shortest_edge), (start, 0, end, short)
        if image.height == long:
            target, box = target[::-1], (0, start, short, end)
        image = image.resize(target, image_processor.resample, box=box)
    return image


def prepare_fast(image_processor: BaseImageProcessor, images: list[Image.Image]) -> torch.Tensor:
    """`pixel_values` `(P, 3, H, W)` of RGB images as CLIP's image processor makes them, in a third of the time.

    PyTorch resizes bytes like Pillow, but several times faster, and into the model's order of channels. One pixel
    in a hundred is rounded to another of the 256 levels. All images are normalised at once.
    """
    height, width = image_processor.crop_size["height"], image_processor.crop_size["width"]
    shortest = image_processor.size["shortest_edge"]
    pixels = torch.empty((len(images), 3, height, width), dtype=torch.uint8)
    for i, image in enumerate(images):
        # Resize the shorter side, then crop the center
        short = min(image.size)
        w, h = (shortest if side == short else int(shortest * side / short) for side in image.size)
        left, top = (w - width) // 2, (h - height) // 2
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        resized = nn.functional.interpolate(levels, (h, w), mode="bicubic", antialias=True)[0]
        pixels[i] = resized[:, top : top + height, left : left + width]
    mean = torch.tensor(image_processor.image_mean).view(3, 1, 1)
    std = torch.tensor(image_processor.image_std).view(3, 1, 1)
    return pixels.float().mul_(image_processor.rescale_factor / std).sub_(mean / std)


@lru_cache
def matches_processor(image_processor: BaseImageProcessor) -> bool:
    """Whether `prepare_fast` gives the pixels of this image processor, tried on two images of noise."""
    has_crop = image_processor.do_center_crop and image_processor.crop_size
    if not (has_crop and image_processor.size.shortest_edge):
        return False
    # The pixels of both may differ by two of the 256 levels
    rng = np.random.default_rng(0)
    shapes = ((50, 161, 3), (133, 64, 3))  # one is wide, one is tall
    noise = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    ours = prepare_fast(image_processor, noise)
    theirs = image_processor(noise, return_tensors="pt")["pixel_values"]
    level = image_processor.rescale_factor / min(image_processor.image_std)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 2.01 * level)
