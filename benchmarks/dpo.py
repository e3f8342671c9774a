"""Trains a checkpoint of this repo by TRL's DPOTrainer, as it is, to prefer the right answer to another picture's.

    pip install -r benchmarks/requirements.txt
    PYTHONPATH=. python benchmarks/dpo.py --model_name_or_path output/openmoji/stage2 \
        --data_path output/openmoji/data/train --output_dir output/dpo --learning_rate 3e-4

The last answer of a record is the chosen one. The rejected one is the last answer of another record in the same
language, to a question of the same kind. Prints how far the two lie apart as training goes on, and writes a checkpoint
that every command here opens.
"""

import argparse
from typing import Any

from datasets import Dataset
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from trl import DPOConfig, DPOTrainer

from train_llava.data import LlavaDataset
from train_llava.model import LoraArguments, load_checkpoint, set_trainable


def preferences(items: list[dict[str, Any]]) -> Dataset:
    """Rows of `images`, and of `prompt`, `chosen` and `rejected` as messages; an item without a match is left out.

    The messages keep their parts, so that the chat template writes the prompt of training: TRL fills the pictures in.
    """
    rows = []
    for i, item in enumerate(items):
        *prompt, chosen = item["messages"]
        rejected = None
        for other in items[i + 1 :] + items[:i]:
            alike = other["language"] == item["language"] and other["kinds"][-1:] == item["kinds"][-1:]
            if rejected is None and alike and other["messages"][-1] != chosen:
                rejected = other["messages"][-1]
        if rejected is not None:
            rows.append({"images": item["images"], "prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
    return Dataset.from_list(rows)


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pairs: Dataset,
    output_dir: str,
    learning_rate: float,
    steps: int,
) -> list[dict[str, float]]:
    """Trains projector and language model, writes the checkpoint, and returns what was logged at every step.

    `rewards/margins` is by how much more than the model it began as it prefers the chosen answers, times `beta`.
    """
    arguments = DPOConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=learning_rate,
        beta=0.1,
        max_length=None,  # a cut could go through a picture's tokens
        gradient_checkpointing=False,  # TRL's default is true
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    set_trainable(model, "freeze_vision", LoraArguments())
    trainer = DPOTrainer(model, args=arguments, train_dataset=pairs, processing_class=processor)
    trainer.train()
    trainer.save_model(output_dir)
    return [entry for entry in trainer.state.log_history if "rewards/margins" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model_name_or_path", "--data_path", "--output_dir"):
        parser.add_argument(name, required=True)
    parser.add_argument("--learning_rate", type=float, default=5e-6, help="The example's small model takes 3e-4.")
    parser.add_argument("--records", type=int, default=200, help="How many of the data's records are taken.")
    parser.add_argument("--max_steps", type=int, default=20, help="Steps of eight pairs each.")
    given = parser.parse_args()
    model, processor = load_checkpoint(given.model_name_or_path)
    dataset = LlavaDataset(given.data_path)
    pairs = preferences([dataset[i] for i in range(min(given.records, len(dataset)))])
    logged = train(model, processor, pairs, given.output_dir, given.learning_rate, given.max_steps)
    print("| step | loss | margin | chosen preferred |\n|---:|---:|---:|---:|")
    for entry in logged:
        margin, share = entry["rewards/margins"], entry["rewards/accuracies"]
        print(f"| {entry['step']} | {entry['loss']:.3f} | {margin:.3f} | {share:.0%} |")


if __name__ == "__main__":
    main()
