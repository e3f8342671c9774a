"""Writes a base model and its LoRA adapter as one plain checkpoint that needs no PEFT.

    python -m train_llava.merge_lora --model_name_or_path output/llava --adapter_name_or_path output/run \
        --output_dir output/merged
"""

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class MergeArguments:
    model_name_or_path: str = field(metadata={"help": "The LLaVA checkpoint the adapter was trained on."})
    adapter_name_or_path: str = field(metadata={"help": "The adapter."})
    output_dir: str = field(metadata={"help": "The checkpoint to write; it must not exist yet."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "The precision to write; auto: the base's, which may round much away."}
    )


if __name__ == "__main__":
    parse_first(MergeArguments)  # before the imports that take seconds

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from train_llava.cli import device
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_adapter
from train_llava.training.cards import copy_card

MUCH = 0.1  # of an adapter's change, if so much is lost to rounding


def merge_layers(model: PeftModel, dtype: torch.dtype) -> str:
    """Puts each layer's update into its weights, added in float32 and rounded once to `dtype`.

    Returns how much of the updates is rounded away, by their norms, and where most of it.

    Raises:
        ValueError: a weight is not finite, or not in `dtype`.
    """
    lost, changed, worst = 0.0, 0.0, (0.0, "")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        exact, error, change = deepcopy(layer).float(), 0.0, 0.0
        exact.merge()  # as PEFT does it, for DoRA and whatever else a layer may be
        for held, sum_ in zip(layer.get_base_layer().parameters(), exact.get_base_layer().parameters(), strict=True):
            written = sum_.data.to(dtype)
            if not written.isfinite().all():
                remedy = ": take --dtype float32" * bool(sum_.isfinite().all())
                raise ValueError(f"{name} is not finite in {dtype}{remedy}")
            error += (written.float() - sum_).square().sum().item()
            change += (sum_ - held.float()).square().sum().item()
            held.data = written
        lost, changed = lost + error, changed + change
        worst = max(worst, ((error / change) ** 0.5 if change else 0.0, name.removeprefix("base_model.model.")))
    part = (lost / changed) ** 0.5 if changed else 0.0
    remedy = "; --dtype float32 loses nothing" if part > MUCH else ""
    return f"rounding to {dtype} took {part:.1%} of the adapter's change, {worst[0]:.1%} in {worst[1]}{remedy}"


def merge_lora(*arguments: Any, **named: Any) -> None:
    """Adds the adapter's low-rank updates to the weights, puts its projector in place, and saves the outcome.

    Takes what `MergeArguments` takes.

    Raises:
        OSError, ValueError: an input cannot be opened or the saved checkpoint differs; nothing is left behind.
    """
    given = MergeArguments(*arguments, **named)
    with written_whole(given.output_dir) as folder:
        exact = {"dtype": torch.float32} if given.dtype == "float32" else {}
        model, processor = load_checkpoint(given.model_name_or_path, **exact)
        model = load_adapter(model, given.adapter_name_or_path, given.model_name_or_path).to(device())
        dtype = model.dtype if given.dtype == "auto" else getattr(torch, given.dtype)
        outcome = merge_layers(model, dtype)
        merged = model.unload()
        merged.save_pretrained(folder)
        processor.save_pretrained(folder)
        if merged.dtype != dtype:  # opened in it, all has the precision that its model wants
            load_checkpoint(str(folder), dtype)[0].save_pretrained(folder)
        copy_card(given.adapter_name_or_path, given.model_name_or_path, folder, Path(given.output_dir).name)
        saved, _ = load_checkpoint(str(folder))
        for (name, ours), theirs in zip(saved.named_parameters(), merged.parameters(), strict=True):
            if not torch.equal(ours, theirs.to("cpu", ours.dtype)):
                raise ValueError(f"the merged checkpoint was not saved right: {name} differs")
        print(outcome)


def main() -> None:
    (arguments,) = parse_arguments(MergeArguments)
    merge_lora(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
