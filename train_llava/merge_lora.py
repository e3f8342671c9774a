"""Writes a base model and its LoRA adapter as one plain checkpoint that needs no PEFT.

    python -m train_llava.merge_lora --model_name_or_path output/llava --adapter_name_or_path output/run \
        --output_dir output/merged
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_llava.cli import parse_arguments, parse_first, run_command, written_whole


@dataclass
class MergeArguments:
    model_name_or_path: str = field(metadata={"help": "The LLaVA checkpoint the adapter was trained on."})
    adapter_name_or_path: str = field(metadata={"help": "The adapter."})
    output_dir: str = field(metadata={"help": "The checkpoint to write; it must not exist yet."})


if __name__ == "__main__":
    parse_first(MergeArguments)  # before the imports that take seconds

import torch

from train_llava.adapter import load_model
from train_llava.model import load_checkpoint
from train_llava.reports import carry_card


def merge_lora(*arguments: Any, **named: Any) -> None:
    """Adds the adapter's low-rank updates to the weights, puts its projector in place, and saves the outcome.

    Takes what `MergeArguments` takes.

    Raises:
        OSError, ValueError: an input cannot be opened or the saved checkpoint differs; nothing is left behind.
    """
    given = MergeArguments(*arguments, **named)
    with written_whole(given.output_dir) as folder:
        model, processor = load_model(given.model_name_or_path, given.adapter_name_or_path)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        carry_card(given.adapter_name_or_path, given.model_name_or_path, folder, Path(given.output_dir).name)
        saved, _ = load_checkpoint(str(folder))
        for (name, ours), theirs in zip(saved.named_parameters(), merged.parameters(), strict=True):
            if not torch.equal(ours, theirs.to("cpu")):
                raise ValueError(f"the merged checkpoint was not saved right: {name} differs")


def main() -> None:
    (arguments,) = parse_arguments(MergeArguments)
    merge_lora(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
