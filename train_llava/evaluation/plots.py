"""Draws the loss curve, grids of samples, an explained answer, and a data set."""

import json
import logging
import random
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image

from train_llava.data import LlavaDataset
from train_llava.dataset.boxes import upright_shares
from train_llava.dataset.images import are_padded, levels, picture_size, stored_geometry
from train_llava.dataset.table import image_sources
from train_llava.evaluation.metrics import METRICS, is_exact, places_in
from train_llava.records import IMAGE_TOKEN, text_of

FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC"]
FONTS += ["Microsoft YaHei"]
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts without a normal weight
COLUMN, PICTURE, LINE = 2.6, 2.1, 0.19  # inches: a column's width, a picture's side, a line of text
RECORD, PANELS, LINES = 3.4, 3.4, 9  # of `draw_data`, inches: a column's width, the panels' height; lines of a record


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


def draw_sample_grid(dataset: Any, predictions: list[dict], path: Path, shape: tuple[int, int]) -> None:
    """Draws a grid of `shape` (rows, columns): pictures, question and reference above, the answer below each.

    Correct answers are green. The samples are spread evenly over the predictions. A sample is left out if the
    machine's fonts cannot write its texts, and long texts are cut; the metrics count them all.
    """
    # The samples that the fonts of this machine can write
    fonts, writable = _fonts()
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
        titles.append(f"{question}\n{reference}")
        answers.append(_cut(_written(sample["prediction"], writable)))

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
        title = "above each picture the question and the reference, below it the model's answer"
        figure.suptitle(title, y=1 - 0.1 / height, fontsize=12)
        figure.savefig(path, dpi=110)


def draw_explanation(image: Image.Image, metrics: dict[str, Any], path: Path) -> None:
    """Draws what `explain` found: where an answer comes from, how likely it is, and at which layer it appears."""
    (fonts, writable), count = _fonts(), len(metrics["probabilities"])
    title, tokens = "{prompt}  →  {answer}".format(**metrics), [_written(one, writable) for one in metrics["tokens"]]
    with matplotlib.rc_context({"font.family": fonts, "text.parse_math": False}):
        figure = Figure((14, 4), layout="constrained")
        figure.suptitle(_cut(_written(title, writable), 110, 2))
        where, much, when, looks = figure.subplots(1, 4, width_ratios=[4, 3, 4, 1.5])
        # The map over the picture in gray
        limit, frame = np.abs(metrics["map"]).max() or 1, (0, image.width, image.height, 0)
        where.imshow(image.convert("L"), "gray", extent=frame)
        shown = where.imshow(metrics["map"], "coolwarm", vmin=-limit, vmax=limit, alpha=0.6, extent=frame)
        figure.colorbar(shown, ax=where, shrink=0.8)
        where.set(title="where: log-probability lost if covered", xticks=[], yticks=[])
        # A bar for each kind of picture, of the base in gray
        names = [kind.replace(" ", "\n") for kind in metrics["log_probability"]]
        for key, color, shift in (("base_log_probability", "gray", 0.4), ("log_probability", "C0", 0)):
            for i, value in enumerate(metrics.get(key, {}).values()):
                much.bar(i + shift, np.exp(value), 0.4, color=color)
        much.set(title="how much: probability", ylim=(0, 1), xticks=range(len(names)), xticklabels=names)
        # The tokens' probabilities by layer, a line where each becomes the most likely; attention beside them
        frame = (-0.5, len(tokens) - 0.5, count + 0.5, 0.5)
        when.imshow(metrics["probabilities"], "Greens", vmin=0, vmax=1, aspect="auto", extent=frame)
        when.plot([layer or np.nan for layer in metrics["layers"]], "k_", markersize=20)
        when.set(title="when: the most likely from the line on", ylabel="layer")
        when.set_xticks(range(len(tokens)), tokens, rotation=90 if len(tokens) > 8 else 0)
        looks.barh(range(1, count + 1), metrics["attention"], color="C1")
        looks.set(title="attention on\nthe picture", ylim=(count + 0.5, 0.5))
        for axes in (when, looks):
            axes.locator_params(axis="y", integer=True)
        figure.savefig(path, dpi=110)


def draw_calibration(bins: list[tuple[float, float, int]], path: Path) -> None:
    """Draws the accuracy over the share of the likeliest choice: a dot for each of `bins`, as large as its number."""
    shares, right, numbers = np.array(bins).T
    figure = Figure((4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="gray")
    axes.scatter(shares, right, s=20 + 400 * numbers / numbers.sum(), alpha=0.7)
    axes.set(
        xlabel="share of the likeliest choice", ylabel="share of these that are right", xlim=(0, 1.05), ylim=(0, 1.05)
    )
    figure.savefig(path, dpi=110)


def draw_data(dataset: LlavaDataset, facts: dict[str, list], scripts: dict[str, int], path: Path) -> None:
    """Draws the lengths, sizes and scripts of a data set, and sixteen of its records as the model sees them.

    `facts`: see `check_data.scan`. Without a `chat` of the data set, pictures are whole.
    """
    good, (fonts, writable), chat = facts["good"], _fonts(), dataset.chat
    samples = sorted(random.Random(0).sample(good, min(len(good), 16)))
    texts = [_lines_of(dataset.read(number, decode=False), writable) for number in samples]
    row_height = RECORD + LINE * max(map(len, texts))
    width, height = 4 * RECORD, PANELS + 0.4 + -(-len(samples) // 4) * row_height
    with matplotlib.rc_context({"font.family": fonts, "font.size": 11, "text.parse_math": False}):
        figure = Figure((width, height))
        # The panels
        bottom, size = 1 - (PANELS - 0.7) / height, (0.22, (PANELS - 1) / height)
        lengths, sizes, bars = (figure.add_axes((left, bottom, *size)) for left in (0.07, 0.39, 0.75))
        name = "tokens" if facts["tokens"] else "characters"
        lengths.hist(facts[name], bins=40)
        lengths.set(xlabel=f"{name} of a conversation", ylabel="records")
        if facts["tokens"] and chat.longest < np.inf:
            lengths.axvline(chat.longest, color="firebrick", label=f"at most {chat.longest:,}")
            lengths.legend()
        if facts["sizes"]:
            shapes, counts = np.unique(facts["sizes"], axis=0, return_counts=True)
            sizes.scatter(*shapes.T, s=20 + 400 * counts / counts.sum(), alpha=0.5)
        sizes.set(xlabel="width of a picture in pixels", ylabel="height")
        bars.barh(list(scripts)[:6], list(scripts.values())[:6])
        bars.set(xlabel="records with most letters in this script", ylim=(5.5, -0.5))
        # The records
        how = "" if chat is None else " as the model sees them"
        title = f"{len(samples)} of {len(good):,} records{how}: questions black, answers blue, objects red"
        figure.text(0.5, 1 - (PANELS + 0.2) / height, title, ha="center", va="center", fontsize=13)
        for i, (number, lines) in enumerate(zip(samples, texts, strict=True)):
            row, column = divmod(i, 4)
            bottom = height - PANELS - RECORD - row * row_height
            place = (RECORD * column + 0.3) / width, bottom / height, (RECORD - 0.6) / width, (RECORD - 0.7) / height
            axes = figure.add_axes(place)
            axes.axis("off")
            title = _written(_draw_picture(axes, dataset, number), writable)
            axes.set_title(_cut(title, 40, 1), fontsize=10, color="gray")
            for j, (line, color) in enumerate(lines):
                offset = (0, -6 - 72 * LINE * j)  # points
                axes.annotate(line, (0, 0), offset, "axes fraction", "offset points", color=color, va="top")
        figure.savefig(path, dpi=100)


def _draw_picture(axes: Axes, dataset: LlavaDataset, number: int) -> str:
    """Draws the first picture of a record with its objects; returns the record's id, and the picture's size."""
    item, (source, row_number), chat = dataset[number], dataset.index[number].tolist(), dataset.chat
    if not item["images"]:
        return item["id"]
    row, image = dataset.tables[source][row_number], item["images"][0]
    file = image_sources(row, dataset.image_dirs[source])[0]
    pixels, (left, top, right, bottom) = np.asarray(image), (0, 0, 1, 1)
    if chat is not None:
        pixels, (left, top, right, bottom) = levels(chat.processor.image_processor, image), chat.seen_part(image.size)
    height, width = pixels.shape[:2]
    if chat is not None and chat.anyres:
        if are_padded(chat.processor.image_processor):  # the picture lies in the middle of its tiles
            scale = 2 * min(width / image.width, height / image.height)
            right, bottom = 0.5 + width / scale / image.width, 0.5 + height / scale / image.height
            left, top = 1 - right, 1 - bottom
        axes.vlines(range(chat.side, width, chat.side), 0, height, color="white", linewidth=3)
        axes.hlines(range(chat.side, height, chat.side), 0, width, color="white", linewidth=3)
    axes.imshow(pixels.clip(0, 255).astype(np.uint8), interpolation="bicubic")
    axes.set(anchor="S", xlim=(0, width), ylim=(height, 0))
    for one in json.loads(row["objects"] or "[]"):
        if not one.get("image"):
            place = []
            for x, y in upright_shares(one, stored_geometry(*file)):
                place += [1000 * (x - left) / (right - left), 1000 * (y - top) / (bottom - top)]
            axes.plot(*outline(place, (width, height), [0, 0, 1, 1]), "r.-")
    more = f", 1 of {len(item['images'])}" if len(item["images"]) > 1 else ""
    return "{}  {} x {}{}".format(item["id"], *picture_size(*file), more)


def _lines_of(item: dict[str, Any], writable: set[int]) -> list[tuple[str, str]]:
    """The texts of a record in at most `LINES` lines, each with its color."""
    lines: list[tuple[str, str]] = []
    for message in item["messages"]:
        color = "tab:blue" if message["role"] == "assistant" else "black"
        text = _written(text_of(message).replace(IMAGE_TOKEN, "").strip(), writable)
        lines += [(line, color) for line in _cut(text, 36).split("\n")]
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], ("…", "gray")]


def _fonts() -> tuple[list[str], set[int]]:
    """The fonts of this machine, and the characters that they can write."""
    installed, writable = fontManager.get_font_names(), {ord("\n")}
    fonts = [name for name in FONTS if name in installed]
    for name in fonts:
        writable |= get_font(findfont(name)).get_charmap().keys()
    return fonts, writable


def _written(text: str, writable: set[int]) -> str:
    """A text with replacement characters for those that no font can write."""
    return "".join(c if ord(c) in writable else "\N{REPLACEMENT CHARACTER}" for c in text)


def outline(place: list[float], size: tuple[int, int], seen: list[float]) -> tuple[list[float], list[float]]:
    """The corners of a box, or a point, in pixels of a picture: their x and their y. `seen`: see `seen_part`."""
    left, top, right, bottom = seen
    x1, x2 = (size[0] * (left + (right - left) * place[i] / 1000) for i in (0, -2))
    y1, y2 = (size[1] * (top + (bottom - top) * place[i] / 1000) for i in (1, -1))
    return [x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1]


def _cut(text: str, width: int = 24, lines: int = 4) -> str:
    """A text in a few lines of at most so many letters; Chinese characters are twice as wide."""
    width = width // 2 if any(east_asian_width(character) in "WF" for character in text) else width
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
