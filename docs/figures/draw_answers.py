"""Draws the answers about a few held-out pictures over the steps of the toy example's stage 2.

    python docs/figures/draw_answers.py docs/answers.png

It reads output/openmoji, where `bash run_zero2.sh` leaves them. The questions are every
sixth one in English of those that were asked while the model trained.
"""

import argparse
import json
import textwrap
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

EXAMPLE = Path("output/openmoji")
EVERY, ROWS = 6, 5


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="The file to write.")
    args = parser.parse_args()
    files = sorted((EXAMPLE / "stage2" / "answers").glob("step-*.jsonl"))
    if not files:
        raise SystemExit(f"draw_answers: no answers in {EXAMPLE}/stage2: run `bash run_zero2.sh` first")
    heldout = json.loads((EXAMPLE / "data/heldout/chat.json").read_text())
    names = {record["id"]: record["image"] for record in heldout}
    steps = {int(path.stem.removeprefix("step-")): read_lines(path) for path in files}
    first_step = steps[min(steps)]
    english = [i for i, line in enumerate(first_step) if line["id"].endswith("-en")][::EVERY][:ROWS]

    # A row for each question: the picture, the question, an answer for each step, the right answer
    figure = Figure(figsize=(1.3 + 1.7 * (len(steps) + 2), 1.05 * ROWS + 0.3), layout="constrained", facecolor="white")
    for row, i in zip(figure.subplots(ROWS, len(steps) + 3, squeeze=False), english, strict=True):
        question, reference = first_step[i]["prompt"].removeprefix("<image>").strip(), first_step[i]["reference"]
        row[0].imshow(Image.open(EXAMPLE / "data/heldout/images_dl" / names[first_step[i]["id"]]))
        answers = [(f"step {step}", lines[i]["prediction"]) for step, lines in steps.items()]
        texts = [("question", question), *answers, ("right answer", reference)]
        for axes, (title, text) in zip(row[1:], texts, strict=True):
            color = "green" if text == reference else "firebrick"
            color = color if title.startswith("step") else "black"
            wrapped = "\n".join(textwrap.wrap(text, 20, max_lines=5, placeholder=" …"))
            axes.text(0.5, 0.5, wrapped, ha="center", va="center", fontsize=9, color=color, parse_math=False)
            axes.set_title(title if i == english[0] else "", fontsize=9, color="gray")
        for axes in row:
            axes.axis("off")
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
