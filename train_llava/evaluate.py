"""Asks a model every question of a data set and compares its answers with the reference ones.

    python -m train_llava.evaluate --model_name_or_path output/run --data_path heldout --output_dir output/evaluation
    python -m train_llava.evaluate --compare output/evaluation other/evaluation --output_dir output/comparison

The first writes `metrics.json`, `predictions.jsonl` (id, prompt, reference, prediction) and `captions.png`, a sheet of
pictures with the reference and the model's answer under each. What cannot be asked (a broken picture, a conversation
longer than the model reads) counts for nothing and is named, on standard error and under `bad` in `metrics.json`. The
second puts such folders side by side, in `comparison.md` and `comparison.png`.
"""

import json
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from unicodedata import east_asian_width

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel

from train_llava.chat import Chat, Processor
from train_llava.cli import check_positive, parse_arguments, run_command, written_whole
from train_llava.data import LlavaDataset
from train_llava.infer import generate, load_model, room_for_answer
from train_llava.metrics import (
    METRICS,
    by_language,
    difference,
    is_exact,
    most_frequent_answer,
    read_metrics,
    score_exact,
    score_group,
)
from train_llava.model import BITS_HELP
from train_llava.readers import BadRecordError, read_jsonl
from train_llava.records import text_of
from train_llava.reports import cell, markdown

SHEET = (4, 6)  # rows and columns of captions.png
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei"]


@dataclass
class EvaluateArguments:
    output_dir: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A LLaVA checkpoint, a folder or a hub id."}
    )
    data_path: str | None = field(default=None, metadata={"help": "Questions and answers, in any layout of training."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Folders that this command wrote, to be compared; no model is asked."}
    )
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    image_dir: str | None = field(
        default=None, metadata={"help": "The pictures' folder; default: images_dl/ or images/ beside the records."}
    )
    blank_control: bool = field(
        default=False, metadata={"help": "Ask everything again with blank pictures, to see what the pictures give."}
    )
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": BITS_HELP})
    batch_size: int = field(default=16, metadata={"help": "Questions answered at once."})
    max_new_tokens: int = field(default=128, metadata={"help": "The longest answer, in tokens."})

    def __post_init__(self) -> None:
        if bool(self.compare) == bool(self.model_name_or_path and self.data_path):
            raise ValueError(
                "pass --model_name_or_path with --data_path to ask a model, or --compare with finished runs"
            )
        check_positive(self, "batch_size", "max_new_tokens")


def questions(item: dict[str, Any]) -> list[dict[str, Any]]:
    """Every answer of a record as a question of its own, with all that came before it.

    `images` are the pictures shown up to that question, which may be fewer than the record's.
    """
    asked = []
    for i, message in enumerate(item["messages"]):
        if message["role"] == "assistant":
            before = item["messages"][:i]
            shown = sum(part["type"] == "image" for m in before for part in m["content"])
            question = {"messages": before, "images": item["images"][:shown], "pictures": shown}
            question |= {"prompt": text_of(before[-1]), "reference": text_of(message)}
            last = i == len(item["messages"]) - 1
            right = item["references"] if last else []
            question["answers"] = item["answers"] if last else []
            question["references"] = right if question["reference"] in right else [question["reference"], *right]
            asked.append(item | question)
    return asked


def predict(
    model: PreTrainedModel, processor: Processor, dataset: LlavaDataset, arguments: EvaluateArguments, blank: bool
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The model's answer to every question of a data set; with `blank`, each picture is replaced by a white one.

    Returns:
        The predictions, and the `id` and `reason` of each question that could not be asked.

    Raises:
        ValueError: no question could be asked.
    """
    predictions, bad, chat = [], [], Chat(processor)
    batches = range(0, len(dataset), arguments.batch_size)
    for start in tqdm(batches, desc="asking, pictures blank" if blank else "asking"):
        asked = []
        for i in range(start, min(start + arguments.batch_size, len(dataset))):
            try:
                item = dataset[i]
            except BadRecordError as error:
                bad.append({"id": error.args[0], "reason": error.args[1]})
                continue
            for question in questions(item):
                try:
                    room_for_answer(model, chat, question["messages"], question["images"])
                    asked.append(question | {"index": i})
                except ValueError as error:
                    bad.append({"id": item["id"], "reason": str(error)})
        if not asked:
            continue
        images = [image for question in asked for image in question["images"]]
        if blank:
            images = [Image.new("RGB", image.size, "white") for image in images]
        answers = generate(model, processor, [q["messages"] for q in asked], images, arguments.max_new_tokens)
        for question, answer in zip(asked, answers, strict=True):
            kept = {key: value for key, value in question.items() if key not in ("messages", "images")}
            predictions.append(kept | {"prediction": answer})
    if not predictions:
        raise ValueError(f"no question of {arguments.data_path} could be asked; {bad[0]['id']}: {bad[0]['reason']}")
    return predictions, bad


def table(metrics: dict[str, Any]) -> str:
    """The exact match of the model and of each control, then the model's other metrics, by language."""

    def line(name: str, words: list[str]) -> str:
        return f"{name:<22}" + "".join(f"{word:>14}" for word in words)

    def columns(scores: dict[str, Any]) -> list[dict[str, Any]]:
        return [*scores.get("by_language", {}).values(), scores]

    ours = columns(metrics)
    lines = [line("exact match", [*metrics.get("by_language", {}), "all"])]
    lines.append(line("this model", [cell(scores, "exact_match") for scores in ours]))
    bounds = [scores["intervals"]["exact_match"] for scores in ours]
    lines.append(line("  95 % interval", [f"{low:.1%}-{high:.1%}" for low, high in bounds]))
    for name, control in metrics["controls"].items():
        lines.append(line(name.replace("_", " "), [cell(scores, "exact_match") for scores in columns(control)]))
    lines.append("this model's")
    for metric in [name for name in METRICS if name in metrics and name != "exact_match"]:
        lines.append(line(f"  {METRICS[metric]}", [cell(scores, metric) for scores in ours]))
    return "\n".join([*lines, line("questions", [f"{scores['n']:,}" for scores in ours])])


def draw_sheet(dataset: LlavaDataset, predictions: list[dict[str, Any]], path: Path) -> None:
    """Draws pictures, evenly spread over the data set, with reference and answer under each: green where they agree.

    Texts that the machine's fonts cannot write are left out of the sheet, and long ones are cut; they count in the
    metrics all the same.
    """

    def cut(text: str) -> str:
        width = 13 if any(east_asian_width(character) in "WF" for character in text) else 26
        return "\n".join(textwrap.wrap(text, width, max_lines=4, placeholder=" …"))

    installed = fontManager.get_font_names()
    fonts = [name for name in FONTS if name in installed]
    writable = {code for name in fonts for code in get_font(findfont(name)).get_charmap()} | {ord("\n")}
    fit = [p for p in predictions if set(map(ord, p["reference"] + p["prediction"])) <= writable and p["pictures"]]
    rows, columns = SHEET
    chosen = fit[:: max(1, len(fit) // (rows * columns))][: rows * columns]
    with matplotlib.rc_context({"font.family": fonts, "font.size": 8, "text.parse_math": False}):
        figure = Figure(figsize=(2.3 * columns, 2.7 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns).flat:
            axes.axis("off")
        for axes, p in zip(figure.axes, chosen, strict=False):
            with suppress(OSError, ValueError):  # a picture that went away meanwhile
                axes.imshow(dataset[p["index"]]["images"][0])
            axes.set_title(cut(p["reference"]), fontsize=8)
            color = "green" if is_exact(p) else "firebrick"
            axes.text(0.5, -0.05, cut(p["prediction"]), transform=axes.transAxes, color=color, ha="center", va="top")
        figure.suptitle("above each picture the reference, below it the model's answer")
        figure.savefig(path, dpi=110)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics and predictions that an evaluation wrote.

    Raises:
        OSError, ValueError: the folder has none.
    """
    metrics, predictions = read_metrics(folder), list(read_jsonl(folder / "predictions.jsonl"))
    if not all(isinstance(p, dict) and {"id", "prompt", "reference", "prediction"} <= p.keys() for p in predictions):
        raise ValueError(f"{folder / 'predictions.jsonl'} is none that evaluate wrote")
    return metrics, predictions


def compare(folders: list[Path], output_dir: Path) -> str:
    """Writes `comparison.md` and `comparison.png` into `output_dir` and gives back the table.

    The first run is what the others are compared with, on the same questions one by one, which says more than two
    intervals side by side.

    Raises:
        OSError, ValueError: a folder is no evaluation, or was asked other questions than the first.
    """
    runs = {str(folder): read_run(folder) for folder in folders}
    (first, (_, ours)), *_ = runs.items()
    metrics = [name for name in METRICS if all(name in scores for scores, _ in runs.values())]
    head = ["run", *(METRICS[name] for name in metrics), f"exact match, less that of {first}"]
    rows = [head]
    for name, (scores, predictions) in runs.items():
        if [(p["id"], p["prompt"]) for p in predictions] != [(p["id"], p["prompt"]) for p in ours]:
            raise ValueError(f"{name} and {first} were asked different questions")
        more, (low, high) = difference(predictions, ours)
        beside = "" if name == first else f"{more:+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append([name, *(cell(scores, metric) for metric in metrics), beside])
    text = markdown(rows)
    (output_dir / "comparison.md").write_text(
        f"{text}\n\n{len(ours):,} questions; intervals: 95 %.\n", encoding="utf-8"
    )

    scores = {name: scores for name, (scores, _) in runs.items()}
    draw(lambda path: draw_comparison(scores, metrics, path), output_dir / "comparison.png")
    return text


def draw_comparison(runs: dict[str, dict[str, Any]], metrics: list[str], path: Path) -> None:
    """Draws a bar for each run in a panel for each metric, with the intervals where there are some."""
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(2.4 * len(metrics), 1.2 + 0.4 * len(runs)), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
            for i, scores in enumerate(runs.values()):
                axes.barh(i, scores[metric], color=f"C{i % 10}")
                if metric in scores["intervals"]:
                    axes.plot(scores["intervals"][metric], [i, i], color="black", linewidth=1.5)
                axes.text(0, i, f" {cell(scores, metric)}", va="center", color="white", fontweight="bold")
            axes.set_title(METRICS[metric])
            axes.set_xlim(0, None if metric == "cider" else 1)
            axes.set_yticks(range(len(runs)), runs)
        figure.axes[0].invert_yaxis()
        figure.savefig(path, dpi=110)


def draw(drawing: Callable[[Path], None], path: Path) -> None:
    """Draws a picture into a file; where that fails, for whatever reason, says so and leaves the results alone."""
    try:
        drawing(path)
    except Exception as error:
        path.unlink(missing_ok=True)
        print(f"{path.name} could not be drawn: {error}", file=sys.stderr)


def evaluate(arguments: EvaluateArguments, folder: Path) -> dict[str, Any]:
    """Asks every question, writes everything into `folder`, and gives back the metrics."""
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir)
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    predictions, bad = predict(model, processor, dataset, arguments, blank=False)
    for entry in bad[:10]:
        print(f"not asked: {entry['id']}: {entry['reason']}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} questions or records could not be asked: see bad in metrics.json", file=sys.stderr)
    controls = {"most_frequent_answer": most_frequent_answer(predictions)}
    if arguments.blank_control:
        controls["blank_pictures"] = predict(model, processor, dataset, arguments, blank=True)[0]
    metrics = by_language(predictions, score_group) | {"bad": bad}
    metrics["controls"] = {name: by_language(control, score_exact) for name, control in controls.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for prediction in predictions:
            kept = {key: prediction[key] for key in ("id", "prompt", "reference", "prediction")}
            if len(prediction["references"]) > 1:
                kept["references"] = prediction["references"]
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    draw(lambda path: draw_sheet(dataset, predictions, path), folder / "captions.png")
    return metrics


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments)
    with written_whole(arguments.output_dir) as folder:
        if arguments.compare:
            text, shown, picture = compare([Path(run) for run in arguments.compare], folder), "plot", "comparison.png"
        else:
            text, shown, picture = table(evaluate(arguments, folder)), "pictures and answers", "captions.png"
    print(text)
    if (Path(arguments.output_dir) / picture).exists():
        print(f"{shown}: {Path(arguments.output_dir) / picture}")


if __name__ == "__main__":
    run_command(main)
