"""Draws the loss curve and grids of samples."""

import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font

from train_llava.evaluation.metrics import METRICS, is_exact
from train_llava.records import IMAGE_TOKEN

FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei"]


def plot_loss(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draws the training loss, the held-out loss and the scores of held-out answers, what there is, over the steps."""
    losses = [("loss", "training", "-"), ("eval_loss", "held out", "o-")]
    scores = [(f"eval_{name}", label, "o-") for name, label in METRICS.items()]
    # losses fall and scores rise: the legend stands where there is room
    panels = [("loss per answer token", losses, "upper right"), ("score of held-out answers", scores, "upper left")]
    panels = panels if any(key in entry for entry in log_history for key, *_ in scores) else panels[:1]
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    axes_of_panels = figure.subplots(len(panels), squeeze=False, sharex=True).flat
    for axes, (ylabel, lines, free) in zip(axes_of_panels, panels, strict=True):
        for i, (key, label, style) in enumerate(lines):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                scale = axes.twinx() if key == "eval_cider" else axes  # it goes up to 10
                scale.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
                scale.legend(loc=free if scale is axes else "lower right")
                scale.set_ylabel(label)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=150)


def draw(drawing: Callable[[Path], None], path: Path) -> None:
    """Draws a picture into a file; where that fails, for whatever reason, says so and leaves the results alone."""
    try:
        drawing(path)
    except Exception as error:
        path.unlink(missing_ok=True)
        print(f"{path.name} could not be drawn: {error}", file=sys.stderr)


def draw_sample_grid(
    dataset: Any, predictions: list[dict[str, Any]], path: Path, shape: tuple[int, int], asked: bool = False
) -> None:
    """Draws pictures, evenly spread over the questions, in so many rows and columns: above each the reference (with
    `asked`, the question, too), below it the answer, green where they agree.

    Texts that the machine's fonts cannot write are left out of the sheet, and long ones are cut; they count in the
    metrics all the same. Which pictures stand there does not depend on the answers.
    """

    def cut(text: str) -> str:
        width = 12 if any(east_asian_width(character) in "WF" for character in text) else 24
        return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))

    installed = fontManager.get_font_names()
    fonts = [name for name in FONTS if name in installed]
    writable = {code for name in fonts for code in get_font(findfont(name)).get_charmap()} | {ord("\n")}
    fit = [p for p in predictions if set(map(ord, p["prompt"] + p["reference"])) <= writable and p["pictures"]]
    rows, columns = shape
    count = min(len(fit), rows * columns)
    chosen = [fit[i * len(fit) // count] for i in range(count)]
    titles, answers = [], []
    for p in chosen:
        above = [cut(p["prompt"].replace(IMAGE_TOKEN, "").strip())] * asked + [cut(p["reference"])]
        titles.append("\n".join(above))
        answers.append(cut("".join(c if ord(c) in writable else "\N{REPLACEMENT CHARACTER}" for c in p["prediction"])))
    # in inches: a column, a picture's side, the texts above and below it at their longest, and a row
    wide, side = 2.6, 2.1
    over, under = (0.19 * max((text.count("\n") + 1 for text in texts), default=0) for texts in (titles, answers))
    tall = over + side + under + 0.45
    width, height = wide * columns, tall * rows + 0.4
    with matplotlib.rc_context({"font.family": fonts, "font.size": 11, "text.parse_math": False}):
        figure = Figure(figsize=(width, height))
        for i, (p, title, answer) in enumerate(zip(chosen, titles, answers, strict=True)):
            row, column = divmod(i, columns)
            left, low = wide * column + (wide - side) / 2, height - 0.55 - tall * row - over - side
            axes = figure.add_axes((left / width, low / height, side / width, side / height))
            axes.axis("off")
            with suppress(OSError, ValueError):  # a picture that went away meanwhile
                axes.imshow(dataset[p["index"]]["images"][0], interpolation="bicubic")
            axes.set_title(title, fontsize=11)
            color = "green" if is_exact(p) else "firebrick"
            axes.text(0.5, -0.05, answer, transform=axes.transAxes, color=color, ha="center", va="top")
        above = "the question and the reference" if asked else "the reference"
        figure.suptitle(f"above each picture {above}, below it the model's answer", y=1 - 0.1 / height, fontsize=12)
        figure.savefig(path, dpi=110)
