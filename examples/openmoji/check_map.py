"""Counts in how many held-out scenes the map of `explain` is highest in the quarter that is asked about.

    python -m examples.openmoji.check_map                  the model of `bash run_zero2.sh`, and random weights

It asks the held-out questions of the kinds "where" and "at" in both languages about scenes of four things, so that
chance is right in a quarter of them. The trained model's map counts where it answers right. With random weights, drawn
three times, the map of the right answer counts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.openmoji.wordings import LANGUAGES
from train_llava.chat import Processor, chat_of
from train_llava.dataset.images import open_image
from train_llava.evaluation.generation import generate, log_probabilities, user_message
from train_llava.explain import BLOCKS, occlusion_map
from train_llava.modeling.adapter import load_model


def quarter_of(map_: torch.Tensor) -> int:
    """The quarter of a map's highest block, in reading order."""
    row, column = divmod(int(map_.argmax()), BLOCKS)
    return 2 * (row >= BLOCKS // 2) + (column >= BLOCKS // 2)


def asked_quarter(record: dict) -> int:
    """The quarter that a question is about, by the place in its text or its answer."""
    language, (question, answer) = LANGUAGES[record["language"]], (turn["value"] for turn in record["conversations"])
    text = question if record["kinds"] == ["at"] else answer
    (place,) = (number for number, name in enumerate(language.places) if name in text)
    return place


def asked(folder: Path) -> list[dict]:
    """The records of the two kinds with a thing in each quarter."""
    records = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    return [record for record in records if record["kinds"] in (["where"], ["at"]) and len(record["objects"]) == 4]


def check(model: Any, processor: Processor, records: list[dict], folder: Path, only_right: bool) -> list[bool]:
    """Whether each map is highest in the right quarter."""
    chat, hits = chat_of(processor), []
    for record in tqdm(records, disable=None):
        image = open_image(folder / "images_dl" / record["image"])
        question, answer = (turn["value"] for turn in record["conversations"])
        messages = [user_message(question.removeprefix("<image>\n"), 1)]
        if only_right and generate(model, processor, [messages], [image], 16) != [answer]:
            continue

        def score(images: list, messages: list = messages, answer: str = answer) -> torch.Tensor:
            return log_probabilities(model, chat, messages, [[one] for one in images], [answer])[:, 0]

        hits.append(quarter_of(occlusion_map(score, image)) == asked_quarter(record))
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="output/openmoji/stage2")
    parser.add_argument("--data_path", type=Path, default=Path("output/openmoji/data/heldout"))
    args = parser.parse_args()
    records = asked(args.data_path)
    model, processor = load_model(args.model_name_or_path)
    hits = check(model, processor, records, args.data_path, only_right=True)
    print(f"answered right: {len(hits)} of {len(records)}; highest in the right quarter: {sum(hits)} of {len(hits)}")
    hits = []
    for seed in range(3):
        torch.manual_seed(seed)
        random_model = type(model)(model.config).eval()
        hits += check(random_model, processor, records, args.data_path, only_right=False)
    print(f"random weights; highest in the right quarter: {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    main()
