"""Puts what ask.sh needs into the repository, after run.sh: the adapter in bfloat16, and six held-out questions.

    python -m examples.smollm2.publish

The questions are the first held-out ones of six kinds, in the order of the data.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from train_llava.cli import run_command

HERE, OUTPUT = Path(__file__).parent, Path("output/smollm2")
KINDS = ["what", "is there", "ground", "at", "count", "list"]


def publish_adapter(adapter: Path, folder: Path) -> None:
    """Writes the adapter, its weights in bfloat16."""
    folder.mkdir(exist_ok=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    halved = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(halved, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copy(adapter / "adapter_config.json", folder)


def publish_questions(heldout: Path, folder: Path) -> None:
    """Copies the first question of each kind, with its picture."""
    records = json.loads((heldout / "chat.json").read_text(encoding="utf-8"))
    chosen = [next(record for record in records if record["kinds"] == [kind]) for kind in KINDS]
    (folder / "images_dl").mkdir(parents=True, exist_ok=True)
    for record in chosen:
        shutil.copy(heldout / "images_dl" / record["image"], folder / "images_dl")
    (folder / "chat.json").write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    publish_adapter(OUTPUT / "lora", HERE / "adapter")
    publish_questions(OUTPUT / "data/heldout", HERE / "pictures")


if __name__ == "__main__":
    run_command(main)
