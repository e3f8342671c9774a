"""An image is opened upright, whole and as small as it may be, and becomes the pixels of the image processor."""

import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from record_files import PNGS, RED, WHITE, encoded, reasons_of, small
from transformers import CLIPImageProcessorPil, LlavaImageProcessorPil, SiglipImageProcessorPil

from train_llava.dataset import images
from train_llava.dataset.images import matches_processor, open_image, picture_size, prepare_pictures


def deep_gray(kind: type, value: float) -> bytes:
    return encoded(Image.fromarray(np.full((6, 8), value, kind)), "TIFF")


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 6), 0)
    image.putpalette([10, 20, 30])
    return encoded(image, "PNG", transparency=0)


GOOD = {
    "gray": (encoded(small(77, "L"), "PNG"), (77, 77, 77)),
    "CMYK": (encoded(small((0, 255, 255, 0), "CMYK"), "JPEG"), RED),
    "palette, transparent": (transparent_palette(), WHITE),
    "RGBA on white": (encoded(small((255, 0, 0, 0), "RGBA"), "PNG"), WHITE),
    "LA on white": (encoded(small((0, 0), "LA"), "PNG"), WHITE),
    "1-bit": (encoded(small(1, "1"), "PNG"), WHITE),
    "16-bit gray": (deep_gray(np.uint16, 32896), (128, 128, 128)),
    "32-bit gray of 16 bits": (deep_gray(np.int32, 32896), (128, 128, 128)),
    "32-bit gray": (deep_gray(np.int32, 70000), (255, 255, 255)),
    "32-bit gray, unsigned": (deep_gray(np.uint32, 4_000_000_000), (255, 255, 255)),
    "gray of floats to 1": (deep_gray(np.float32, 0.5), (128, 128, 128)),
    "gray of floats to 255": (deep_gray(np.float32, 77), (77, 77, 77)),
    "GIF": (encoded(small("red"), "GIF", save_all=True, append_images=[small("blue")]), RED),
    "WebP": (encoded(small(RED, "RGB"), "WEBP", lossless=True), RED),
    "BMP": (encoded(small(RED, "RGB"), "BMP"), RED),
    "TIFF": (encoded(small(RED, "RGB"), "TIFF"), RED),
    "progressive JPEG": (encoded(small(WHITE, "RGB"), "JPEG", progressive=True), WHITE),
}


@pytest.mark.parametrize("name", GOOD)
def test_images_of_every_kind_become_rgb(name, tmp_path):
    content, color = GOOD[name]
    (tmp_path / "名 字.bin").write_bytes(content)
    for source in (content, tmp_path / "名 字.bin"):
        image = open_image(source, "x")
        assert (image.mode, image.size) == ("RGB", (8, 6))
        assert np.abs(np.subtract(image.getpixel((3, 3)), color)).max() <= 1


def test_deep_gray_is_scaled_without_overflow():
    content = encoded(Image.fromarray(np.arange(0, 200000, 2000, dtype=np.int32).reshape(10, 10)), "TIFF")
    gray = np.asarray(open_image(content, "x"))[..., 0].flatten()
    assert (np.diff(gray.astype(int)) >= 0).all()
    assert (gray[0], gray[-1]) == (0, 255)


def corners(orientation: int, ending: str) -> bytes:
    """An image of 48 x 32 pixels with a red corner at the top left, turned so that its EXIF turns it back."""
    upright = Image.new("RGB", (48, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the `Transpose` that EXIF undoes
    turned = upright.transpose(Image.Transpose(back[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [Image.new("RGB", turned.size)]} if ending == "MPO" else {}
    return encoded(turned, ending, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO", "PNG, behind the pixels"])
def test_every_format_is_turned_and_measured_by_its_exif(ending, orientation):
    content = corners(orientation, ending.partition(",")[0])
    if "," in ending:
        begin = content.index(b"eXIf") - 4
        end = begin + 12 + struct.unpack(">I", content[begin : begin + 4])[0]
        content = content[:begin] + content[end:-12] + content[begin:end] + content[-12:]
    image = open_image(content, "x")
    assert image.size == picture_size(content, "x") == (48, 32)
    red = [np.subtract(image.getpixel(p), (255, 0, 0)) for p in ((7, 7), (40, 7), (7, 25), (40, 25))]
    assert [bool(np.abs(difference).max() < 60) for difference in red] == [True, False, False, False]


def red(size: tuple[int, int], ending: str, **options) -> bytes:
    return encoded(Image.new("RGB", size, "red"), ending, **options)


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
def test_a_large_image_is_opened_small(ending, size, min_side, expected):
    image = open_image(red(size, ending), "x", min_side=min_side)
    assert image.size == expected
    assert min(image.size) >= min(2 * (min_side or 0), *size)
    assert np.abs(np.subtract(image.getpixel((5, 5)), (255, 0, 0))).max() < 3


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    rng = np.random.default_rng(2)
    smooth = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize(
        (1800, 1200), Image.Resampling.BICUBIC
    )
    content = encoded(smooth, "JPEG", quality=95)
    reduced, whole = open_image(content, "x", min_side=56), open_image(content, "x")
    assert (reduced.size, whole.size) == ((225, 150), (1800, 1200))
    resized = [np.asarray(image.resize((84, 56), Image.Resampling.BICUBIC)) for image in (reduced, whole)]
    assert np.abs(np.subtract(*resized, dtype=float)).mean() < 1.5


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_too_many_pixels_is_decoded_at_half_size(monkeypatch, progressive):
    monkeypatch.setattr(images, "PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = red((41, 30), "JPEG", progressive=progressive, exif=exif)
    assert open_image(content, "x").size == picture_size(content, "x") == (15, 21)
    assert open_image(red((400, 7), "JPEG"), "x", min_side=9).size == (200, 4)
    for size, ending in (((41, 30), "PNG"), ((41, 30), "TIFF"), ((100, 31), "JPEG")):
        for look in (open_image, picture_size):
            with pytest.raises(ValueError, match=r"^x cannot be read as a picture: .*pixels"):
                look(red(size, ending), "x")


def test_a_decompression_bomb_is_refused_by_its_header():
    """Of a thousand bytes: 30,000 x 30,000 pixels of a PNG, 65,000 x 65,000 of a JPEG."""
    png, jpeg = red((8, 6), "PNG"), red((8, 6), "JPEG")
    head = b"IHDR" + struct.pack(">II", 30000, 30000) + png[24:29]
    png = png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    jpeg = jpeg.replace(struct.pack(">HH", 6, 8), struct.pack(">HH", 65000, 65000), 1)
    for content in (png, jpeg):
        with pytest.raises(ValueError, match=r"x cannot be read as a picture: .*pixels"):
            open_image(content, "x", min_side=28)
    assert images.PIXELS == 90_000_000
    assert 2 * Image.MAX_IMAGE_PIXELS == 3 * images.PIXELS


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1", b"hevc"])
def test_the_error_of_a_heic_names_the_package_that_opens_it(tmp_path, brand):
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


@pytest.mark.parametrize(
    "error", [RuntimeError, struct.error, EOFError, MemoryError, KeyError, zlib.error, SyntaxError]
)
def test_any_error_of_a_decoder_becomes_the_reason_of_its_record(tmp_path, monkeypatch, error):
    def fail(_):
        raise error("damaged")

    (tmp_path / "a.png").write_bytes(PNGS[0])
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "x", "image": "a.png", "caption": "red"}]))
    monkeypatch.setattr("train_llava.dataset.images.upright_rgb", fail)
    assert "a.png cannot be read as a picture" in reasons_of(tmp_path)["x"]


IMAGE_PROCESSORS = {
    "crop": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    "crop of more": CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
    "crop, Lanczos": CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=1
    ),
    "pad": LlavaImageProcessorPil(size={"height": 28, "width": 28}, do_pad=True, do_center_crop=False),
    "stretch": SiglipImageProcessorPil(size={"height": 28, "width": 28}),
}


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_long_strips_need_little_memory_and_keep_their_pixels(name):
    """The pixels of the processor where it can take a strip, and little memory where it would need gigabytes."""
    image_processor, rng = IMAGE_PROCESSORS[name], np.random.default_rng(3)
    sizes = ((1, 1), (3, 400), (401, 3), (7, 100), (333, 40), (40, 301), (1, 5))
    images = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]
    ours = prepare_pictures(image_processor, images)["pixel_values"]
    theirs = image_processor(images, return_tensors="pt")["pixel_values"]
    assert ours.shape == (len(sizes), 3, 28, 28)
    # A padded image is made small before, so a line is wider by a pixel. Otherwise the rounding to 256 levels differs
    difference = (ours - theirs).abs().flatten(1)
    assert difference.mean(1).max() < (0.3 if name == "pad" else 0.02)
    tracemalloc.start()
    for size in ((60000, 1), (1, 60000)):
        assert prepare_pictures(image_processor, [Image.new("RGB", size, "red")])["pixel_values"].isfinite().all()
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_the_fast_path_gives_the_pixels_of_the_processor(processor):
    assert matches_processor(processor.image_processor)
    rng = np.random.default_rng(1)
    images = [
        Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in ((28, 28, 3), (90, 41, 3), (33, 257, 3))
    ]
    difference = (
        prepare_pictures(processor.image_processor, images)["pixel_values"]
        - processor.image_processor(images, return_tensors="pt")["pixel_values"]
    ).abs()
    level = 1 / 255 / 0.26  # of 256, divided by the deviation
    assert difference.max() < 8 * level  # noise is the worst case
    assert difference.mean() < 0.2 * level


class Shifted(CLIPImageProcessorPil):
    """CLIP's image processor, but some of 256 levels brighter."""

    levels = 0.0

    def preprocess(self, *args, **kwargs):
        prepared = super().preprocess(*args, **kwargs)
        prepared["pixel_values"] += self.levels * self.rescale_factor / min(self.image_std)
        return prepared


@pytest.mark.parametrize(("levels", "same"), [(0, True), (3, False), (20, False), (40, False)])
def test_the_fast_path_is_taken_only_within_two_levels(monkeypatch, levels, same):
    monkeypatch.setattr(Shifted, "levels", levels)
    shifted = Shifted(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    matches_processor.cache_clear()
    assert matches_processor(shifted) is same
