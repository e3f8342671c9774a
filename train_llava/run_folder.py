"""What is on disk of a run: what is finished, what it can go on from, and whether what was saved is whole."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from train_llava.model import count_parameters

UNFINISHED = "unfinished"  # a file that a checkpoint holds while it is being written


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    return (checkpoint / "trainer_state.json").exists() and not (checkpoint / UNFINISHED).exists()


def finished_checkpoint(output_dir: str) -> str | None:
    """The last checkpoint of a run that was written to its end; None if there is none."""
    whole = [folder for folder in Path(output_dir).glob("checkpoint-*") if is_finished(folder)]
    return str(max(whole, key=lambda folder: int(folder.name.split("-")[1]))) if whole else None


def check_resumable(checkpoint: Path, ranks: int) -> None:
    """Refuses what a run of so many ranks cannot go on from.

    Raises:
        ValueError: the checkpoint is not whole, or was written by another number of ranks, each of which keeps a part
            of the optimizer's state.
    """
    if not is_finished(checkpoint):
        raise ValueError(f"{checkpoint} is no checkpoint that was written to its end")
    written_by = len(list(checkpoint.glob("rng_state*.pth")))
    if written_by == 0:
        raise ValueError(f"{checkpoint} holds the model only (--save_only_model): a run cannot go on from it")
    if written_by != ranks:
        raise ValueError(f"{checkpoint} was written by {written_by} ranks and this run has {ranks}: take as many")


def read_back(folder: Path, model: nn.Module) -> None:
    """Looks at the weights just saved: as many numbers as the model has (an adapter: as many as train), none missing.

    Raises:
        ValueError: they are not all there.
    """
    counts = count_parameters(model).values()
    expected = sum(trainable if isinstance(model, PeftModel) else total for trainable, total in counts)
    numbers = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            numbers |= {name: torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys()}  # noqa: SIM118
    if model.config.get_text_config().tie_word_embeddings:  # DeepSpeed writes the one tensor under both names
        numbers = {name: number for name, number in numbers.items() if not name.endswith("lm_head.weight")}
    empty = [name for name, number in numbers.items() if number == 0]
    if empty or sum(numbers.values()) != expected or not any("multi_modal_projector" in name for name in numbers):
        what = f"{empty[0]} is empty" if empty else f"{sum(numbers.values()):,} numbers in place of {expected:,}"
        raise ValueError(f"{folder} was not saved whole: {what}")


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Refuses a folder that holds a model or checkpoints already, unless they are what the run resumes from."""
    folder = Path(output_dir)
    holds = [*folder.glob("checkpoint-*"), *folder.glob("*.safetensors")]
    if holds and not resume:
        raise ValueError(
            f"--output_dir {output_dir} holds {holds[0].name}: choose another, or --resume_from_checkpoint true"
        )
