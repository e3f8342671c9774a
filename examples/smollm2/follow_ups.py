"""Asks questions about a picture that its caption does not answer: do the answers agree with those to the caption?

    python -m examples.smollm2.follow_ups --model_name_or_path output/smollm2/stage1 --output_dir output/follow_ups

These choices were fixed before anything was scored:
- The pictures: 60 training pictures without a skin tone ("seen") and 60 held-out pictures ("held out"), those with the
  smallest SHA-256 of the file name.
- The questions: `QUESTIONS`, each directly after the picture. No record asks them. Answers are greedy, of 40 tokens.
- The reference: the untrained model's answer to the same question after the caption in words.
- The score: token F1 of answer and reference. Two controls: the answer after a white picture with the same reference,
  and the answer after the picture with the reference of the next picture. Intervals are 95 % bootstraps over pictures.
  Differences are taken picture by picture.
- The upper bound: the untrained model's answer to the caption under another system turn, with the same reference. A
  projector that turns every picture into its caption would come close to it.
- The drawn conversations: those of the first five pictures of each kind.

Writes follow_ups.json, answers.jsonl and conversations.png, and keeps the references beside the data.
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

from examples.smollm2.draw_emoji import emoji_of, tones
from examples.smollm2.make_data import SYSTEM
from train_llava.cli import run_command
from train_llava.common.files import replacing, written_whole
from train_llava.evaluation.generation import assistant_message, generate, user_message
from train_llava.evaluation.metrics import bootstrap, token_f1
from train_llava.evaluation.questions import weights_digest
from train_llava.modeling.adapter import load_model

EXAMPLE = Path("output/smollm2")
QUESTIONS = ["What is it used for?", "Where would you find one?"]
NAME = "What is in this picture?"  # the first question of a drawn conversation
EACH, DRAWN = 60, 5
NEW_TOKENS, BATCH = 40, 48


def chosen(records: list[dict], kind: str, folder: Path) -> list[dict[str, Any]]:
    """The pictures of a kind with their captions: those with the smallest SHA-256 of the file name."""
    pictures = []
    for record in records:
        file, caption = folder / "images_dl" / record["image"], record["conversations"][-1]["value"]
        if kind != "seen" or not tones(emoji_of(file.name)):
            pictures.append({"kind": kind, "file": file, "caption": caption})
    return sorted(pictures, key=lambda p: hashlib.sha256(p["file"].name.encode()).digest())[:EACH]


def load_pictures(data: Path) -> list[dict[str, Any]]:
    """All pictures that the questions are about."""
    train = json.loads((data / "train" / "captions.json").read_text(encoding="utf-8"))
    heldout = json.loads((data / "heldout" / "english.json").read_text(encoding="utf-8"))
    return chosen(train, "seen", data / "train") + chosen(heldout, "held out", data / "heldout")


def answer(model: Any, processor: Any, conversations: list[tuple[list[dict], list[Any]]], name: str) -> list[str]:
    """Greedy answers to conversations, each with its pictures."""
    answers = []
    for start in tqdm(range(0, len(conversations), BATCH), desc=name):
        batch = conversations[start : start + BATCH]
        images = [image for _, pictures in batch for image in pictures]
        answers += generate(model, processor, [messages for messages, _ in batch], images, NEW_TOKENS)
    return answers


def by_picture(answers: list[str]) -> list[list[str]]:
    """Groups the answers to all `QUESTIONS` about all pictures: a list for each picture."""
    return [answers[i : i + len(QUESTIONS)] for i in range(0, len(answers), len(QUESTIONS))]


def references(pictures: list[dict[str, Any]], untrained: Path, file: Path) -> list[list[list[str]]]:
    """The untrained model's answers to each caption, under its own system turn and under `SYSTEM`.

    Both are a list for each picture. `file` keeps them for next time, together with the model and the questions.
    """
    model, processor = load_model(str(untrained))
    texts = [f"{p['caption']}\n{text}" for p in pictures for text in QUESTIONS]
    request = {"model": weights_digest(model), "system": SYSTEM, "new_tokens": NEW_TOKENS, "texts": texts}
    saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"asked": None}
    if saved["asked"] != request:
        system = {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
        own_turn = [([user_message(text, 0)], []) for text in texts]
        another_turn = [([system, user_message(text, 0)], []) for text in texts]
        answers = [
            answer(model, processor, own_turn, "captions in words"),
            answer(model, processor, another_turn, "under another system turn"),
        ]
        saved = {"asked": request, "answers": answers}
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    return list(map(by_picture, saved["answers"]))


def agreement(answers: list[list[str]], right: list[list[str]]) -> list[float]:
    """The mean token F1 of each picture's answers."""
    scores = []
    for predictions, picture_references in zip(answers, right, strict=True):
        pairs = zip(predictions, picture_references, strict=True)
        scores.append(mean(token_f1({"prediction": ours, "reference": theirs}) for ours, theirs in pairs))
    return scores


def summary(scores: list[float]) -> dict[str, Any]:
    return {"mean": mean(scores), "interval": bootstrap(scores), "n": len(scores)}


def compare(
    pictures: list[dict], said: list[list[str]], blank: list[str], right: list[list[str]], reworded: list[list[str]]
) -> dict[str, Any]:
    """Agreement with the references, its two controls and the upper bound, for each kind of picture and for all."""
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
    """Draws the conversations as a grid, two in a row."""
    half = (len(pictures) + 1) // 2
    figure = Figure(figsize=(12.5, 1.75 * half), layout="constrained")
    grid = figure.subplots(half, 4, width_ratios=[1, 4, 1, 4], squeeze=False)
    for i, (picture, turns) in enumerate(zip(pictures, conversations, strict=True)):
        left, right = grid[i % half][2 * (i // half) : 2 * (i // half) + 2]
        left.imshow(Image.open(picture["file"]))
        lines = []
        for question, reply in turns:
            lines += [f"> {question}", *textwrap.wrap(reply, 72, max_lines=2, placeholder=" …")]
        right.text(0, 0.5, "\n".join(lines), va="center", fontsize=9, parse_math=False)
        for axes in (left, right):
            axes.axis("off")
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> str:
    """The agreement as a Markdown table."""
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
    parser.add_argument("--model_name_or_path", required=True, help="The LLaVA to ask.")
    parser.add_argument("--adapter_name_or_path", help="Its LoRA adapter.")
    parser.add_argument("--output_dir", required=True, help="The folder to write.")
    parser.add_argument("--data", type=Path, default=EXAMPLE / "data", help="The output of make_data.py.")
    parser.add_argument("--untrained", type=Path, default=EXAMPLE / "llava", help="The LLaVA before any training.")
    args = parser.parse_args()
    with written_whole(args.output_dir) as folder:
        # the answers of the untrained model to the captions, then of the trained one to the pictures
        pictures = load_pictures(args.data)
        right, reworded = references(pictures, args.untrained, args.data / "references.json")
        model, processor = load_model(args.model_name_or_path, args.adapter_name_or_path)
        questions = []
        for picture in pictures:
            questions += [([user_message(text, 1)], [Image.open(picture["file"])]) for text in QUESTIONS]
        white = Image.new("RGB", Image.open(pictures[0]["file"]).size, "white")
        answers = answer(model, processor, questions, "pictures")
        blank = answer(model, processor, [([user_message(text, 1)], [white]) for text in QUESTIONS], "a white picture")

        # the scores, every answer, and some conversations
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
