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
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from train_llava.evaluation.generation import assistant_message, generate, sampling, user_message
from train_llava.evaluation.plots import FONTS
from train_llava.modeling.adapter import load_model

ROOT = Path(__file__).parent.parent.parent
TALK = Path("output/openmoji/data/talk")
MODEL = "output/openmoji/stage2"
LINE = 0.31  # inches


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


def lines_of(conversation: Conversation, width: int) -> list[tuple[str, str]]:
    """The lines of a conversation, at most `width` letters long, each with its colour."""
    lines = []
    for question, answer, wanted in conversation.turns:
        lines += [(text, "#444444") for text in textwrap.wrap(question, width)]
        mark, color = ("✓", "#1a7f37") if answer == wanted else ("✗", "#cf222e")
        lines += [(text, color) for text in textwrap.wrap(f"{mark} {answer}", width)]
        if answer != wanted:
            lines += [(text, "#777777") for text in textwrap.wrap(f"({wanted})", width)]
    return lines


def draw(conversations: list[Conversation], columns: int, width: int, path: Path) -> None:
    """Scenes, beside each its questions in grey and the answers in green or red, in a row or more."""
    texts = [lines_of(conversation, width) for conversation in conversations]
    longest, rows = max(10, *map(len, texts)), len(conversations) // columns
    figure = Figure(figsize=(10 * columns, (LINE * longest + 0.3) * rows), facecolor="white")
    parts = figure.subfigures(rows, columns, squeeze=False).flat
    for part, conversation, lines in zip(parts, conversations, texts, strict=True):
        left, right = part.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.9], "wspace": 0.03})
        left.imshow(conversation.picture)
        left.set_anchor("N")
        for number, (text, color) in enumerate(lines):
            weight = "normal" if color == "#444444" else "bold"
            y = 1 - (number + 0.5) / longest
            right.text(0, y, text, fontsize=15, color=color, weight=weight, va="center", parse_math=False)
        for axes in (left, right):
            axes.axis("off")
    figure.savefig(path, dpi=110 // columns, bbox_inches="tight", pad_inches=0.15)


def main() -> None:
    matplotlib.rcParams["font.family"] = FONTS
    model, processor = load_model(MODEL)
    talk: dict[str, list[Conversation]] = {"en": [], "zh": []}
    for record in tqdm(json.loads((TALK / "chat.json").read_text(encoding="utf-8")), desc="asking"):
        talk[record["language"]].append(converse(model, processor, record))
    for code, name, width in (("en", "conversation.png", 44), ("zh", "conversation_zh.png", 22)):
        draw(talk[code][:1], 1, width, ROOT / "docs" / name)
        right = sum(conversation.right for conversation in talk[code])
        print(f"{code}: every answer right in {right} of {len(talk[code])} conversations")
    shown = [c for c in talk["en"] if c.right][:2] + [c for c in talk["en"] if not c.right][:2]
    draw(shown, 2, 44, ROOT / "examples/openmoji/conversations.png")


if __name__ == "__main__":
    main()
