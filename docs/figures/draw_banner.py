"""Draws the banner of both READMEs, docs/banner.png: the patches of a scene turn into the project's name.

PYTHONPATH=. python docs/figures/draw_banner.py
"""

import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from examples.openmoji.scenes import Scene, names, paint

WIDTH, HEIGHT, MARGIN = 1600, 190, 110
SIDE, PATCHES = 150, 6  # of the picture, and the patches along it
NAVY, WHITE, GOLD = "#152238", "#ffffff", "#f7b84b"
THINGS = ("dog", "balloon", "tractor", "sunflower")
NAME = "train_llava"
FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"


def scene_picture() -> Image.Image:
    """A scene of four things, large."""
    motifs = [names("en").index(name) for name in THINGS]
    picture, _ = paint(Scene(4, tuple(motifs)), random.Random(3))
    return picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def main() -> None:
    banner = Image.new("RGBA", (WIDTH, HEIGHT))
    pen = ImageDraw.Draw(banner)
    pen.rounded_rectangle((0, 0, WIDTH - 1, HEIGHT - 1), 36, fill=NAVY)

    # The picture's columns of patches: the further to the right, the further apart, and the smaller
    picture, size, top = scene_picture(), SIDE // PATCHES, (HEIGHT - SIDE) // 2
    x = MARGIN
    for column in range(PATCHES):
        for row in range(PATCHES):
            patch = picture.crop((column * size, row * size, (column + 1) * size, (row + 1) * size))
            side = size - 2 * column
            patch = patch.resize((side, side), Image.Resampling.LANCZOS)
            banner.paste(patch, (x, top + row * size + (size - side) // 2))
        x += size + 1 + 3 * column

    # They become tokens, a line of small squares, and the tokens become letters
    middle = HEIGHT // 2
    for token in range(13):
        x += 12
        pen.rounded_rectangle((x, middle - 9, x + 18, middle + 9), 4, fill=GOLD if token % 3 else WHITE)
        x += 18
    font = ImageFont.truetype(str(FONTS / "DejaVuSansMono-Bold.ttf"), 104)
    pen.text((x + 44, middle), NAME, font=font, fill=WHITE, anchor="lm")
    banner.save("docs/banner.png", optimize=True)


if __name__ == "__main__":
    main()
