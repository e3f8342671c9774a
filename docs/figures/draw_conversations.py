"""Draws conversations about held-out scenes with the toy example's model, each answer with ✓ or ✗.

    PYTHONPATH=. python docs/figures/draw_conversations.py

writes docs/conversation.png and docs/conversation_zh.png, the first scene of data/talk in each language, and
examples/openmoji/conversations.png, in English: the first two scenes in which every answer is right, and the first two
in which one is wrong. It reads output/openmoji, where `bash run_zero2.sh` leaves model and scenes. The model sees its
own answers, not the right ones, before the next question.
"""

import json
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from tqdm import tqdm

from train_llava.evaluation.generation import assistant_message, generate, sampling, user_message
from train_llava.evaluation.plots import FONTS
from train_llava.modeling.adapter import load_model

ROOT = Path(__file__).parent.parent.parent
TALK = Path("output/openmoji/data/talk")
MODEL = "output/openmoji/stage2"


class Conversation(NamedTuple):
    picture: Image.Image
    turns: list[tuple[str, str, str]]  # the question, the model's answer and the right one

    @property
    def right(self) -> bool:
        return all(answer == wanted for _, answer, wanted in self.turns)


def converse(model, processor, record: dict) -> Conversation:
    """Asks a record's questions one after the other."""
    picture = Image.open(TALK / "images_dl" / record["image"]).convert("RGB")
    messages, turns, texts = [], [], [message["value"] for message in record["conversations"]]
    for question, wanted in zip(texts[::2], texts[1::2], strict=True):
        question = question.removeprefix("<image>\n")
        messages.append(user_message(question, pictures=0 if messages else 1))
        (answer,) = generate(model, processor, [messages], [picture], **sampling(0, 1), max_new_tokens=48)
        messages.append(assistant_message(answer))
        turns.append((question, answer, wanted))
    return Conversation(picture, turns)


def draw(figure: Figure | SubFigure, conversation: Conversation, width: int) -> None:
    """A scene, and beside it the questions in grey and the answers in green or red; `width` in letters a line."""
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.9], "wspace": 0.03})
    left.imshow(conversation.picture)
    lines = []
    for question, answer, wanted in conversation.turns:
        lines += [(text, "#444444") for text in textwrap.wrap(question, width)]
        mark, color = ("✓", "#1a7f37") if answer == wanted else ("✗", "#cf222e")
        lines += [(text, color) for text in textwrap.wrap(f"{mark} {answer}", width)]
        if answer != wanted:
            lines += [(text, "#777777") for text in textwrap.wrap(f"   ({wanted})", width)]
    for number, (text, color) in enumerate(lines):
        weight = "normal" if color == "#444444" else "bold"
        y = 1 - (number + 0.5) / max(len(lines), 8)
        right.text(0, y, text, fontsize=15, color=color, weight=weight, va="center", parse_math=False)
    for axes in (left, right):
        axes.axis("off")


def main() -> None:
    matplotlib.rcParams["font.family"] = FONTS
    model, processor = load_model(MODEL)
    talk: dict[str, list[Conversation]] = {"en": [], "zh": []}
    for record in tqdm(json.loads((TALK / "chat.json").read_text(encoding="utf-8")), desc="asking"):
        talk[record["language"]].append(converse(model, processor, record))
    for code, name, width in (("en", "conversation.png", 44), ("zh", "conversation_zh.png", 22)):
        figure = Figure(figsize=(10, 3.4), facecolor="white")
        draw(figure, talk[code][0], width)
        figure.savefig(ROOT / "docs" / name, dpi=110, bbox_inches="tight", pad_inches=0.15)
        right = sum(conversation.right for conversation in talk[code])
        print(f"{code}: every answer right in {right} of {len(talk[code])} conversations")
    shown = [c for c in talk["en"] if c.right][:2] + [c for c in talk["en"] if not c.right][:2]
    figure = Figure(figsize=(20, 7), facecolor="white")
    for part, conversation in zip(figure.subfigures(2, 2).flat, shown, strict=False):
        draw(part, conversation, 44)
    figure.savefig(ROOT / "examples/openmoji/conversations.png", dpi=60, bbox_inches="tight", pad_inches=0.15)


if __name__ == "__main__":
    main()
