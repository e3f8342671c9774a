"""Writes the example's data: the toy example's scenes, with conversations in English.

    python -m examples.smollm2.make_data --output_dir output/smollm2/data

A scene of training has one conversation of TURNS questions: a picture takes as many tokens as two of them, and is
read once for all. Its records begin with a system turn of one word, since the default one of SmolLM2's template has
21 tokens. The held-out scenes and questions, and the conversations of talk/, are the toy example's in English.
"""

import argparse
import random
from pathlib import Path

from examples.openmoji.make_data import (
    conversation,
    held_out_conversations,
    talk_conversations,
    training_conversations,
    write,
)

TURNS = 6
SYSTEM = "Look."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder for train/ and heldout/.")
    args = parser.parse_args()

    # `rng` draws what the toy example draws, so that pictures and held-out questions are the same
    rng, questions = random.Random(0), random.Random(1)
    train = []
    for scene, _ in training_conversations(rng):
        train.append((scene, {"en": conversation(scene, "en", TURNS, questions)}))
    heldout = [(scene, {"en": texts["en"]}) for scene, texts in held_out_conversations(rng)]
    talk = [(scene, {"en": texts["en"]}) for scene, texts in talk_conversations(rng)]
    write(args.output_dir / "train", train, rng, SYSTEM)
    write(args.output_dir / "heldout", heldout, rng)
    write(args.output_dir / "talk", talk, rng)
    print(f"{len(train)} scenes to train on and {len(heldout)} held out, in {args.output_dir}")


if __name__ == "__main__":
    main()
