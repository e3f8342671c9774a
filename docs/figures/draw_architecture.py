"""Draws a LLaVA as one figure: how a picture and a question become an answer, and which parts train.

    PYTHONPATH=. python docs/figures/draw_architecture.py

writes docs/architecture.png and docs/architecture_zh.png. Picture, question and answer are the toy example's, from
output/openmoji, where `bash run_zero2.sh` leaves them. The sizes are counted from the configurations of the 4B setup.
The Chinese figure needs a font with Chinese characters.
"""

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from transformers import LlavaConfig

from benchmarks.memory import CLIP, QWEN
from train_llava.evaluation.plots import FONTS
from train_llava.model import LoraArguments, count_parameters
from train_llava.training.memory import empty_model

EXAMPLE = Path("output/openmoji")
GRID = 4  # the picture is drawn as 4 x 4 patches
WIDTH, HEIGHT = 10.0, 5.92  # inches
FROZEN, TRAINED, LATER, WORD, ANSWER = "#cfe0f1", "#fbd0ad", "#fdeadb", "#eeeeee", "#cbe8c8"
SIDE = 1.84  # of the picture

WORDS = {
    "en": {
        "picture": "{pixels} × {pixels} pixels,\n{patches} patches\n({drawn} are drawn)",
        "tower": "vision tower\nCLIP-L, {tower:.1f} B",
        "projector": "projector\n2 layers, {projector:.0f} M",
        "language": "language model: Qwen1.5-4B, {language:.1f} B",
        "seen": "{patches} vectors,\n{seen:,} wide",
        "read": "{patches} tokens, {read:,} wide",
        "row": "the picture's tokens among the words",
        "frozen": "frozen",
        "trained": "trained in stages 1 and 2",
        "later": "frozen in stage 1, LoRA or all of it trained in stage 2",
    },
    "zh": {
        "picture": "{pixels} × {pixels} 像素\n切成 {patches} 个图像块\n（图中画 {drawn} 个）",
        "tower": "视觉塔\nCLIP-L，{tower:.1f} B",
        "projector": "投影层\n两层，{projector:.0f} M",
        "language": "语言模型：Qwen1.5-4B，{language:.1f} B",
        "seen": "{patches} 个向量\n每个 {seen:,} 维",
        "read": "{patches} 个 token，每个 {read:,} 维",
        "row": "图像 token 与文字 token 排成一行",
        "frozen": "冻结",
        "trained": "第一、二阶段都训练",
        "later": "第一阶段冻结，第二阶段用 LoRA 或全量训练",
    },
}


def sizes() -> dict[str, float]:
    """Pixels, patches, widths and parameters of the 4B setup."""
    model = empty_model(LlavaConfig(vision_config=CLIP, text_config=QWEN), "full", LoraArguments(), torch.bfloat16)[1]
    parts = {name: total for name, (_, total) in count_parameters(model).items()}
    return {
        "pixels": CLIP.image_size,
        "drawn": GRID**2,
        "patches": (CLIP.image_size // CLIP.patch_size) ** 2,
        "seen": CLIP.hidden_size,
        "read": QWEN.hidden_size,
        "tower": parts["vision tower"] / 1e9,
        "projector": parts["projector"] / 1e6,
        "language": parts["language model"] / 1e9,
    }


def example(language: str) -> tuple[Image.Image, str, str]:
    """The shortest held-out question about a scene of four things, with its picture and the toy example's answer."""
    records = json.loads((EXAMPLE / "data/heldout/chat.json").read_text(encoding="utf-8"))
    full = [record for record in records if len(record["objects"]) == 4]
    english = [record for record in full if record["language"] == "en"]
    picture = min(english, key=lambda record: len(record["conversations"][0]["value"]))["image"]
    record = next(record for record in full if (record["image"], record["language"]) == (picture, language))
    for line in (EXAMPLE / "evaluation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines():
        answered = json.loads(line)
        if answered["id"] == record["id"]:
            picture = Image.open(EXAMPLE / "data/heldout/images_dl" / record["image"]).convert("RGB")
            return picture, answered["prompt"].removeprefix("<image>").strip(), answered["prediction"]
    raise SystemExit(f"draw_architecture: {EXAMPLE}/evaluation has no {record['id']}: run `bash run_zero2.sh` first")


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, text: str, size: float) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#555555")
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.3)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "lw": 2, "color": "#333333", "mutation_scale": 18})


def cut(picture: Image.Image) -> list[Image.Image]:
    """The picture's patches, row by row."""
    side = picture.width // GRID
    patches = []
    for i in range(GRID**2):
        row, column = divmod(i, GRID)
        patches.append(picture.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))
    return patches


def draw_patch(axes: Axes, patch: Image.Image, left: float, top: float, side: float, color: str) -> None:
    axes.imshow(patch, extent=(left, left + side, top - side, top), interpolation="lanczos")
    axes.add_patch(Rectangle((left, top - side), side, side, fill=False, ec=color, lw=1.2))


def draw_patches(axes: Axes, picture: Image.Image, x: float, y: float, gap: float) -> None:
    """The picture cut into its patches; (x, y) is the lower left corner."""
    side = (SIDE - gap * (GRID - 1)) / GRID
    for i, patch in enumerate(cut(picture)):
        row, column = divmod(i, GRID)
        draw_patch(axes, patch, x + column * (side + gap), y + SIDE - row * (side + gap), side, "#999999")


def draw_row(axes: Axes, picture: Image.Image, question: str, language: str, y: float) -> None:
    """The tokens that the language model reads: one for each patch, then the question's words."""
    side, gap, x = 0.34, 0.045, 0.1
    for patch in cut(picture):
        draw_patch(axes, patch, x, y + side, side, "#d9742b")
        x += side + gap
    words = question.replace("?", " ?").split() if language == "en" else list(question)
    lengths = [len(word) + 1.2 if language == "en" else 1 for word in words]
    unit = (WIDTH - 0.1 - x - gap * (len(words) - 1)) / sum(lengths)
    for word, length in zip(words, lengths, strict=True):
        box(axes, x, y, unit * length, side, WORD, "", 13)
        axes.text(x + unit * length / 2, y + 0.11, word, ha="center", va="baseline", fontsize=13)
        x += unit * length + gap


def draw(language: str, counted: dict[str, float], path: Path) -> None:
    words = {name: text.format(**counted) for name, text in WORDS[language].items()}
    picture, question, answer = example(language)
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    # The lower edges of the upper row, of the tokens, and of the language model
    top, row, model = 3.95, 2.45, 1.0
    middle, under = top + SIDE / 2, top + 0.22

    # The upper row: the picture, the tower, the projector
    draw_patches(axes, picture, 0.1, top, 0.07)
    axes.text(0.1 + SIDE / 2, top - 0.12, words["picture"], ha="center", va="top", fontsize=14)
    arrow(axes, (2.05, middle), (2.55, middle))
    box(axes, 2.6, middle - 0.55, 2.3, 1.1, FROZEN, words["tower"], 16)
    axes.text(3.75, under, words["frozen"], ha="center", va="top", fontsize=14, color="#2f6ca8", weight="bold")
    arrow(axes, (4.95, middle), (6.55, middle))
    axes.text(5.72, middle + 0.1, words["seen"], ha="center", va="bottom", fontsize=13)
    box(axes, 6.6, middle - 0.55, 2.4, 1.1, TRAINED, words["projector"], 16)
    axes.text(7.8, under, words["trained"], ha="center", va="top", fontsize=14, color="#c25a10", weight="bold")

    # Down to the tokens
    turn = row + 1.05
    axes.plot([9.0, 9.5, 9.5, 3.2], [middle, middle, turn, turn], lw=2, color="#333333", solid_joinstyle="miter")
    axes.text(6.35, turn - 0.1, words["read"], ha="center", va="top", fontsize=13)
    arrow(axes, (3.2, turn), (3.2, row + 0.42))
    draw_row(axes, picture, question, language, row)

    # The language model and its answer
    arrow(axes, (5.0, row - 0.06), (5.0, model + 0.86))
    axes.text(5.15, row - 0.33, words["row"], ha="left", va="center", fontsize=13)
    box(axes, 0.1, model, WIDTH - 0.2, 0.8, LATER, "", 16)
    axes.text(5.0, model + 0.55, words["language"], ha="center", va="center", fontsize=16)
    axes.text(5.0, model + 0.22, words["later"], ha="center", va="center", fontsize=14, color="#c25a10", weight="bold")
    arrow(axes, (5.0, model - 0.04), (5.0, 0.58))
    box(axes, 2.4, 0.1, 5.2, 0.44, ANSWER, answer, 15)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    figure.savefig(path, dpi=150)


def main() -> None:
    counted, installed = sizes(), fontManager.get_font_names()
    fonts = [name for name in FONTS if name in installed]
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}):
        draw("en", counted, Path("docs/architecture.png"))
        draw("zh", counted, Path("docs/architecture_zh.png"))


if __name__ == "__main__":
    main()
