"""Asks what stands in no caption, after a picture: does the answer agree with the one to the caption in words?

    python -m examples.smollm2.follow_ups --model_name_or_path output/smollm2/stage1 --output_dir output/follow_ups

What was fixed before anything was scored:
- The pictures: of those trained on that show no skin tone ("seen"), and of those held out ("held out"), the 60 each
  whose file name has the smallest SHA-256.
- The questions, which no record asks: `QUESTIONS`, each right behind the picture. Answers are greedy, of 40 tokens.
- The reference: what the language model said before any training, to the same question behind the caption's words.
- The score: token F1 of answer and reference; beside it two controls, the answer after a white picture against the
  same reference, and the answer after the picture against the reference of the next picture's caption. Intervals are
  95 % bootstraps over pictures; a difference is taken picture by picture.
- What there is to win: the untrained model's answer to the caption in words under another system turn, against the
  same reference. A projector that made of every picture what the caption says would come to about that.
- The conversations that are drawn: the first five pictures of each kind.

Writes follow_ups.json, answers.jsonl and conversations.png; and, among the data, the references for next time.
"""

import argparse
import hashlib
import json
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from examples.openmoji.make_data import emoji_of, tones
from examples.smollm2.make_data import SYSTEM
from train_llava.cli import run_command
from train_llava.common.files import replacing, written_whole
from train_llava.evaluation.generation import assistant_message, generate, user_message
from train_llava.evaluation.metrics import bootstrap, token_f1
from train_llava.evaluation.questions import weights_digest
from train_llava.modeling.adapter import load_model

EXAMPLE = Path("output/smollm2")
QUESTIONS = ["What is it used for?", "Where would you find one?"]
NAME = "What is in this picture?"  # opens the conversations that are drawn
EACH, DRAWN = 60, 5
NEW_TOKENS, BATCH = 40, 48


def chosen(records: list[dict], kind: str, folder: Path) -> list[dict[str, Any]]:
    """The pictures of a kind with their captions, by the SHA-256 of the file name."""
    pictures = [
        {"kind": kind, "file": folder / "images_dl" / record["image"], "caption": record["conversations"][-1]["value"]}
        for record in records
    ]
    if kind == "seen":
        pictures = [p for p in pictures if not tones(emoji_of(p["file"].name))]
    return sorted(pictures, key=lambda p: hashlib.sha256(p["file"].name.encode()).digest())[:EACH]


def load_pictures(data: Path) -> list[dict[str, Any]]:
    """All that is asked about."""
    train = json.loads((data / "train" / "captions.json").read_text(encoding="utf-8"))
    heldout = json.loads((data / "heldout" / "english.json").read_text(encoding="utf-8"))
    return chosen(train, "seen", data / "train") + chosen(heldout, "held out", data / "heldout")


def answer(model: Any, processor: Any, asked: list[tuple[list[dict], list[Image.Image]]], name: str) -> list[str]:
    """Greedy answers to conversations, each with its pictures."""
    answers = []
    for start in tqdm(range(0, len(asked), BATCH), desc=name):
        batch = asked[start : start + BATCH]
        images = [image for _, shown in batch for image in shown]
        answers += generate(model, processor, [messages for messages, _ in batch], images, NEW_TOKENS)
    return answers


def by_picture(answers: list[str]) -> list[list[str]]:
    """Answers to all `QUESTIONS` about one picture after the other, as a list for each picture."""
    return [answers[i : i + len(QUESTIONS)] for i in range(0, len(answers), len(QUESTIONS))]


def references(pictures: list[dict[str, Any]], untrained: Path, file: Path) -> list[list[list[str]]]:
    """What the model says to each caption before training, under its own system turn and under `SYSTEM`.

    Both are lists for each picture; they are kept in `file` for next time, with what was asked of which model.
    """
    model, processor = load_model(str(untrained))
    texts = [f"{p['caption']}\n{text}" for p in pictures for text in QUESTIONS]
    asked = {"model": weights_digest(model), "system": SYSTEM, "new_tokens": NEW_TOKENS, "texts": texts}
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"asked": None}
    if kept["asked"] != asked:
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
        answers = [
            answer(model, processor, [([*turn, user_message(text, 0)], []) for text in texts], name)
            for name, turn in (("captions in words", []), ("under another system turn", [system]))
        ]
        kept = {"asked": asked, "answers": answers}
        with replacing(file) as beside:
            beside.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return list(map(by_picture, kept["answers"]))


def agreement(answers: list[list[str]], right: list[list[str]]) -> list[float]:
    """The mean token F1 of each picture's answers."""
    return [
        mean(token_f1({"prediction": a, "reference": r}) for a, r in zip(said, wanted, strict=True))
        for said, wanted in zip(answers, right, strict=True)
    ]


def summary(scores: list[float]) -> dict[str, Any]:
    return {"mean": mean(scores), "interval": bootstrap(scores), "n": len(scores)}


def compare(
    pictures: list[dict], said: list[list[str]], blank: list[str], right: list[list[str]], reworded: list[list[str]]
) -> dict[str, Any]:
    """Agreement with the own caption's reference, its two controls, and what there is to win; by kind and over all."""
    result = {}
    for kind in ("seen", "held out", "all"):
        rows = [i for i, picture in enumerate(pictures) if kind in (picture["kind"], "all")]
        own = [right[i] for i in rows]
        with_picture = agreement([said[i] for i in rows], own)
        controls = {
            "blank picture": agreement([blank for _ in rows], own),
            "another caption": agreement([said[i] for i in rows], own[1:] + own[:1]),
        }
        result[kind] = {"the picture": summary(with_picture)}
        for name, control in controls.items():
            less = [a - b for a, b in zip(with_picture, control, strict=True)]
            result[kind][name] = summary(control) | {"difference": summary(less)}
        result[kind]["caption in words"] = summary(agreement([reworded[i] for i in rows], own))
    return result


def talk(model: Any, processor: Any, picture: dict[str, Any]) -> list[tuple[str, str]]:
    """A conversation about a picture: its questions and answers."""
    image, messages, turns = Image.open(picture["file"]), [], []
    for text in (NAME, *QUESTIONS):
        messages.append(user_message(text, 0 if turns else 1))
        (said,) = generate(model, processor, [messages], [image], NEW_TOKENS)
        messages.append(assistant_message(said))
        turns.append((text, said))
    return turns


def draw(pictures: list[dict[str, Any]], conversations: list[list[tuple[str, str]]], path: Path) -> None:
    """The conversations as a sheet, two beside each other."""
    half = (len(pictures) + 1) // 2
    figure = Figure(figsize=(12.5, 1.75 * half), layout="constrained")
    grid = figure.subplots(half, 4, width_ratios=[1, 4, 1, 4], squeeze=False)
    for i, (picture, turns) in enumerate(zip(pictures, conversations, strict=True)):
        shown, said = grid[i % half][2 * (i // half) : 2 * (i // half) + 2]
        shown.imshow(Image.open(picture["file"]))
        lines = []
        for text, answered in turns:
            lines += [f"> {text}", *textwrap.wrap(answered, 72, max_lines=2, placeholder=" …")]
        said.text(0, 0.5, "\n".join(lines), va="center", fontsize=9, parse_math=False)
        for axes in (shown, said):
            axes.axis("off")
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """The Markdown table of the agreement."""
    lines = [
        "| pictures | after the picture | after a white one | another caption's reference | after the caption |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, scores in result.items():
        cells = [f"{s['mean']:.1%} ({s['interval'][0]:.1%} to {s['interval'][1]:.1%})" for s in scores.values()]
        lines.append(f"| {kind}, {scores['the picture']['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="The LLaVA that is asked.")
    parser.add_argument("--adapter_name_or_path", help="Its LoRA adapter.")
    parser.add_argument("--output_dir", required=True, help="Folder to write.")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "data", help="What make_data.py has written.")
    parser.add_argument("--untrained", type=Path, default=EXAMPLE / "llava", help="The LLaVA before any training.")
    args = parser.parse_args()
    with written_whole(args.output_dir) as folder:
        pictures = load_pictures(args.data)
        right, reworded = references(pictures, args.untrained, args.data / "references.json")
        model, processor = load_model(args.model_name_or_path, args.adapter_name_or_path)
        asked = [([user_message(text, 1)], [Image.open(p["file"])]) for p in pictures for text in QUESTIONS]
        white = Image.new("RGB", Image.open(pictures[0]["file"]).size, "white")
        answers = answer(model, processor, asked, "pictures")
        blank = answer(model, processor, [([user_message(text, 1)], [white]) for text in QUESTIONS], "a white picture")
        said = by_picture(answers)
        result = compare(pictures, said, blank, right, reworded)
        (folder / "follow_ups.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        with open(folder / "answers.jsonl", "w", encoding="utf-8") as file:
            for picture, own, wanted in zip(pictures, said, right, strict=True):
                line = picture | {"file": picture["file"].name, "answers": own, "references": wanted}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        drawn = pictures[:DRAWN] + pictures[EACH : EACH + DRAWN]
        draw(drawn, [talk(model, processor, picture) for picture in drawn], folder / "conversations.png")
    print(table(result))


if __name__ == "__main__":
    run_command(main)
