"""Asks a model every question of a data set and compares its answers with the reference ones.

    python -m train_llava.evaluate --model_name_or_path output/run --data_path heldout --output_dir output/evaluation

Writes `metrics.json`, `predictions.jsonl` (id, prompt, reference, prediction) and `captions.png`, a sheet of pictures
with the reference and the model's answer under each.
"""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from PIL import Image
from tqdm import tqdm
from transformers import LlavaProcessor, PreTrainedModel

from train_llava.checkpoint import BITS_HELP
from train_llava.cli import parse_arguments, run_command, written_whole
from train_llava.data import LlavaDataset
from train_llava.infer import generate, load_model
from train_llava.records import text_of

SHEET = (4, 6)  # rows and columns of captions.png
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei"]


@dataclass
class EvaluateArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    data_path: str = field(metadata={"help": "A folder with chat.json, or a .json file of records."})
    output_dir: str = field(metadata={"help": "The folder to write; it must not exist yet."})
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
            asked.append(item | question | {"prompt": text_of(before[-1]), "reference": text_of(message)})
    return asked


def predict(
    model: PreTrainedModel, processor: LlavaProcessor, dataset: LlavaDataset, arguments: EvaluateArguments, blank: bool
) -> list[dict[str, Any]]:
    """The model's answer to every question of a data set; with `blank`, each picture is replaced by a white one."""
    predictions = []
    batches = range(0, len(dataset), arguments.batch_size)
    for start in tqdm(batches, desc="asking, pictures blank" if blank else "asking"):
        indices = range(start, min(start + arguments.batch_size, len(dataset)))
        asked = [question | {"index": i} for i in indices for question in questions(dataset[i])]
        images = [image for question in asked for image in question["images"]]
        if blank:
            images = [Image.new("RGB", image.size, "white") for image in images]
        answers = generate(model, processor, [q["messages"] for q in asked], images, arguments.max_new_tokens)
        for question, answer in zip(asked, answers, strict=True):
            kept = {key: question[key] for key in ("id", "prompt", "reference", "language", "index", "pictures")}
            predictions.append(kept | {"prediction": answer})
    return predictions


def is_exact(prediction: dict[str, Any]) -> bool:
    """Whether an answer equals its reference letter by letter."""
    return prediction["prediction"].strip() == prediction["reference"].strip()


def share(hits: list[bool]) -> dict[str, Any]:
    """The share of hits, and the 95 % interval in which it lies by the number of questions (Wilson, 1927)."""
    n, z = len(hits), NormalDist().inv_cdf(0.975)
    p = sum(hits) / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return {"exact_match": p, "interval": [max(0.0, centre - reach), min(1.0, centre + reach)], "n": n}


def exact_match(predictions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The share of exact answers, over all and, where the records say theirs, by `language`."""
    predictions = list(predictions)
    by_language: dict[str, list[bool]] = {}
    for p in predictions:
        by_language.setdefault(p["language"], []).append(is_exact(p))
    hits = [hit for group in by_language.values() for hit in group]
    scores = share(hits)
    if None not in by_language:
        scores["by_language"] = {language: share(group) for language, group in sorted(by_language.items())}
    return scores


def most_frequent_answer(predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """What one constant answer per language could score at most: the references' own most frequent one."""
    counts: dict[str, Counter] = {}
    for p in predictions:
        counts.setdefault(p["language"], Counter())[p["reference"]] += 1
    return exact_match(p | {"prediction": counts[p["language"]].most_common(1)[0][0]} for p in predictions)


def table(metrics: dict[str, Any]) -> str:
    """The exact match of the model and of each control, by language."""
    rows = {"this model": metrics} | {name.replace("_", " "): m for name, m in metrics["controls"].items()}
    languages = list(metrics.get("by_language", {}))
    cells = {name: [m["by_language"][language] for language in languages] + [m] for name, m in rows.items()}
    lines = {"exact match": [*languages, "all"]}
    for name, row in cells.items():
        lines[name] = [f"{cell['exact_match']:.1%}" for cell in row]
        if name == "this model":
            lines["  95 % interval"] = ["{:.1%}-{:.1%}".format(*cell["interval"]) for cell in row]
    lines["questions"] = [f"{cell['n']:,}" for cell in cells["this model"]]
    return "\n".join(f"{name:<22}" + "".join(f"{word:>14}" for word in words) for name, words in lines.items())


def draw_sheet(dataset: LlavaDataset, predictions: list[dict[str, Any]], path: Path) -> None:
    """Draws pictures, evenly spread over the data set, with reference and answer under each: green where they agree.

    Texts that the machine's fonts cannot write are left out of the sheet; they count in the metrics all the same.
    """
    installed = fontManager.get_font_names()
    fonts = [name for name in FONTS if name in installed]
    writable = {code for name in fonts for code in get_font(findfont(name)).get_charmap()} | {ord("\n")}
    fit = [p for p in predictions if set(map(ord, p["reference"] + p["prediction"])) <= writable and p["pictures"]]
    rows, columns = SHEET
    chosen = fit[:: max(1, len(fit) // (rows * columns))][: rows * columns]
    with matplotlib.rc_context({"font.family": fonts, "font.size": 8}):
        figure = Figure(figsize=(2.3 * columns, 2.7 * rows), layout="constrained")
        for axes in figure.subplots(rows, columns).flat:
            axes.axis("off")
        for axes, p in zip(figure.axes, chosen, strict=False):
            axes.imshow(dataset[p["index"]]["images"][0])
            axes.set_title(textwrap.fill(p["reference"], 26), fontsize=8)
            color = "green" if is_exact(p) else "firebrick"
            axes.text(0.5, -0.05, textwrap.fill(p["prediction"], 26), transform=axes.transAxes, color=color,
                      ha="center", va="top")  # fmt: skip
        figure.suptitle("above each picture the reference, below it the model's answer")
        figure.savefig(path, dpi=110)


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments)
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir)
    with written_whole(arguments.output_dir) as folder:
        model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
        predictions = predict(model, processor, dataset, arguments, blank=False)
        controls = {"most_frequent_answer": most_frequent_answer(predictions)}
        if arguments.blank_control:
            controls["blank_pictures"] = exact_match(predict(model, processor, dataset, arguments, blank=True))
        metrics = exact_match(predictions) | {"controls": controls}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
            for prediction in predictions:
                kept = {key: prediction[key] for key in ("id", "prompt", "reference", "prediction")}
                file.write(json.dumps(kept, ensure_ascii=False) + "\n")
        draw_sheet(dataset, predictions, folder / "captions.png")
    print(table(metrics))
    print(f"pictures and answers: {Path(arguments.output_dir) / 'captions.png'}")


if __name__ == "__main__":
    matplotlib.use("Agg")
    run_command(main)
