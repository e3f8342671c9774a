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

from train_llava.evaluation.metrics import METRICS, is_exact, places_in
from train_llava.records import IMAGE_TOKEN

FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC"]
FONTS += ["Microsoft YaHei"]
COLUMN, PICTURE, LINE = 2.6, 2.1, 0.19  # inches: a column's width, a picture's side, a line of text


def plot_loss(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draws the losses and, where there are any, the scores of held-out answers over the steps."""
    losses = {"loss": "training", "eval_loss": "held out"}
    scores = {f"eval_{name}": label for name, label in METRICS.items()}
    # Losses fall and scores rise: the legend is put where there is room
    panels = [("loss per answer token", losses, "upper right")]
    if not scores.keys().isdisjoint(set().union(*log_history)):
        panels.append(("score of held-out answers", scores, "upper left"))
    figure = Figure(figsize=(7, 4 * len(panels)), layout="constrained")
    axes_of_panels = figure.subplots(len(panels), squeeze=False, sharex=True).flat
    # One line for each loss or score that the log has
    for axes, (ylabel, lines, corner) in zip(axes_of_panels, panels, strict=True):
        for i, (key, label) in enumerate(lines.items()):
            steps = [entry["step"] for entry in log_history if key in entry]
            if not steps:
                continue
            values = [entry[key] for entry in log_history if key in entry]
            scale = axes.twinx() if key == "eval_cider" else axes  # it goes up to 10
            scale.plot(steps, values, "-" if key == "loss" else "o-", color=f"C{i}", label=label)
            scale.legend(loc=corner if scale is axes else "lower right")
            scale.set_ylabel(label)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    figure.savefig(path, dpi=150)


def draw(drawing: Callable[[Path], None], path: Path) -> None:
    """Draws a picture into a file. Where that fails for any reason, prints a line and leaves no file."""
    try:
        drawing(path)
    except Exception as error:
        path.unlink(missing_ok=True)
        print(f"{path.name} could not be drawn: {error}", file=sys.stderr)


def draw_sample_grid(
    dataset: Any, predictions: list[dict], path: Path, shape: tuple[int, int], with_question: bool = False
) -> None:
    """Draws a grid of `shape` (rows, columns): pictures, the references above and the answers below them.

    Correct answers are green. The samples are spread evenly over the predictions. A sample is left out if the
    machine's fonts cannot write its texts, and long texts are cut; the metrics count them all.
    """
    # The samples that the fonts of this machine can write
    installed = fontManager.get_font_names()
    fonts = [name for name in FONTS if name in installed]
    writable = {ord("\n")}
    for name in fonts:
        writable |= get_font(findfont(name)).get_charmap().keys()
    drawable = []
    for prediction in predictions:
        characters = set(map(ord, prediction["prompt"] + prediction["reference"]))
        if prediction["pictures"] and characters <= writable:
            drawable.append(prediction)
    rows, columns = shape
    count = min(len(drawable), rows * columns)
    samples = [drawable[i * len(drawable) // count] for i in range(count)]

    # The texts
    titles, answers = [], []
    for sample in samples:
        question = _cut(sample["prompt"].replace(IMAGE_TOKEN, "").strip())
        reference = _cut(sample["reference"])
        titles.append(f"{question}\n{reference}" if with_question else reference)
        characters = [c if ord(c) in writable else "\N{REPLACEMENT CHARACTER}" for c in sample["prediction"]]
        answers.append(_cut("".join(characters)))

    # In inches: the longest texts above and below a picture, a row, the figure
    above, below = (LINE * max((text.count("\n") + 1 for text in texts), default=0) for texts in (titles, answers))
    row_height = above + PICTURE + below + 0.45
    width, height = COLUMN * columns, row_height * rows + 0.4

    # One cell of the grid a sample
    with matplotlib.rc_context({"font.family": fonts, "font.size": 11, "text.parse_math": False}):
        figure = Figure((width, height))
        for i, (sample, title, answer) in enumerate(zip(samples, titles, answers, strict=True)):
            row, column = divmod(i, columns)
            left = COLUMN * column + (COLUMN - PICTURE) / 2
            bottom = height - 0.55 - row_height * row - above - PICTURE
            axes = figure.add_axes((left / width, bottom / height, PICTURE / width, PICTURE / height))
            axes.axis("off")
            with suppress(OSError, ValueError):  # a picture that went away meanwhile
                image = dataset[sample["index"]]["images"][0]
                axes.imshow(image, interpolation="bicubic")
                for key, line in ("reference", "w.-"), ("prediction", "r.-"):
                    for place in places_in(sample[key]) if sample.get("places") else []:
                        axes.plot(*outline(place, image.size, dataset.chat.seen_part(image.size)), line)
            axes.set_title(title, fontsize=11)
            color = "green" if is_exact(sample) else "firebrick"
            axes.text(0.5, -0.05, answer, transform=axes.transAxes, color=color, ha="center", va="top")
        texts = "the question and the reference" if with_question else "the reference"
        figure.suptitle(f"above each picture {texts}, below it the model's answer", y=1 - 0.1 / height, fontsize=12)
        figure.savefig(path, dpi=110)


def outline(place: list[float], size: tuple[int, int], seen: list[float]) -> tuple[list[float], list[float]]:
    """The corners of a box, or a point, in pixels of a picture: their x and their y. `seen`: see `seen_part`."""
    left, top, right, bottom = seen
    x1, x2 = (size[0] * (left + (right - left) * place[i] / 1000) for i in (0, -2))
    y1, y2 = (size[1] * (top + (bottom - top) * place[i] / 1000) for i in (1, -1))
    return [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]


def _cut(text: str) -> str:
    """A text in at most four short lines; Chinese characters are twice as wide."""
    width = 12 if any(east_asian_width(character) in "WF" for character in text) else 24
    return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))
