r"""Asks a model the six questions of examples/smollm2/pictures, and prints its answers beside the right ones.

    python -m examples.smollm2.first_answers --model_name_or_path output/smollm2/eyes \
        --adapter_name_or_path examples/smollm2/adapter
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from train_llava.cli import run_command
from train_llava.evaluation.generation import generate, user_message
from train_llava.modeling.adapter import load_model

PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="The model to ask.")
    parser.add_argument("--adapter_name_or_path", help="Its LoRA adapter.")
    args = parser.parse_args()
    model, processor = load_model(args.model_name_or_path, args.adapter_name_or_path)

    right = 0
    records = json.loads((PICTURES / "chat.json").read_text(encoding="utf-8"))
    for record in records:
        question, wanted = (message["value"] for message in record["conversations"])
        question = question.removeprefix("<image>\n")
        picture = Image.open(PICTURES / "images_dl" / record["image"])
        (answer,) = generate(model, processor, [[user_message(question, pictures=1)]], [picture], 40)
        right += answer == wanted
        print(f"\nexamples/smollm2/pictures/images_dl/{record['image']}: {question}")
        print(f"  ✓ {answer}" if answer == wanted else f"  ✗ {answer}   (right: {wanted})")
    print(f"\n{right} of {len(records)} right. No two things of a scene were together in a training picture.")
    print("It knows 64 drawings and eleven kinds of question; examples/smollm2/README.md says how well.")


if __name__ == "__main__":
    run_command(main)
