"""What lmms-eval calls for the task in openmoji.yaml: a record's picture, question, answer and score.

Paths are those of `bash run_zero2.sh`, seen from the repository's root.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from train_llava.records import to_messages

PICTURES = Path("output/openmoji/data/heldout/images_dl")


def picture(record: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(PICTURES / record["image"]).convert("RGB")]


def question(record: dict[str, Any]) -> str:
    return record["conversations"][0]["value"]


def messages(record: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The question as a chat message, the picture where its `<image>` tag stands, before or behind the text."""
    asked, _ = to_messages(record)
    parts = [{"type": "image", "url": picture(record)[0]} if p["type"] == "image" else p for p in asked["content"]]
    return [asked | {"content": parts}]


def answer(record: dict[str, Any]) -> str:
    return record["conversations"][1]["value"]


def exact_match(record: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 for the very words of the reference, over all and for the language of the question."""
    hit = float(answers[0].strip() == answer(record))
    return {"exact_match": hit, f"exact_match_{record['language']}": hit}
