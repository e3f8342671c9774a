"""The `extras` of a batch, which the trainer needs besides the model's inputs: added here, and taken out here."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from train_llava.chat import IGNORE
from train_llava.data import LlavaCollator, Sample


def with_extras(samples: list[Sample], collator: LlavaCollator) -> dict[str, Any]:
    """The collator's batch with `extras` for the trainer: values of each sample, and totals of the batch."""
    # Of each sample, then of the batch
    extras = {
        "ids": [sample.id for sample in samples],
        "supervised": torch.tensor([int((sample.labels[1:] != IGNORE).sum()) for sample in samples]),
        "is_replacement": torch.tensor([sample.is_replacement for sample in samples]),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "images": sum(len(sample.images) for sample in samples),
    }
    batch = collator(samples)
    extras["positions"] = batch["logits_to_keep"].flatten().nonzero().squeeze(1)  # in all rows, one after the other
    return batch | {"extras": extras}


def loss_sums(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Each sample's sum of losses and its number of supervised tokens, `(samples, 2)`; zeros of replacements."""
    extras, labels = inputs.pop("extras"), inputs.pop("shift_labels")
    del inputs["labels"]  # or the model would compute its own loss, too
    with torch.no_grad():
        losses = cross_entropy(model(**inputs).logits.float(), labels, reduction="none")
    sums = torch.stack([part.sum() for part in losses.split(extras["supervised"].tolist())])
    return torch.stack([sums, extras["supervised"]], dim=1) * ~extras["is_replacement"][:, None]
