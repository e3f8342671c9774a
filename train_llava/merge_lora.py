"""Writes a base model and its LoRA adapter as one plain checkpoint that needs no PEFT.

    python -m train_llava.merge_lora --model_name_or_path output/llava --adapter_name_or_path output/run \
        --output_dir output/merged
"""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from train_llava.cli import Dtype, parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class MergeArguments:
    model_name_or_path: str = HfArg(help="The LLaVA checkpoint the adapter was trained on.")
    adapter_name_or_path: str = HfArg(help="The adapter.")
    output_dir: str = HfArg(help="The checkpoint to write; it must not exist yet.")
    dtype: Dtype = HfArg(default="auto", help="The precision to write; auto: the base's, which may lose much.")


if __name__ == "__main__":
    parse_first(MergeArguments)  # before the imports that take seconds

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from train_llava.cli import device
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_adapter
from train_llava.modeling.weights import read_back, save_weights
from train_llava.training.cards import copy_card

TOLERATED = 0.1  # share of an adapter's change that rounding may take without advice


def merge_layers(model: PeftModel, dtype: torch.dtype) -> str:
    """Adds each layer's update to its weights in float32, and rounds once to `dtype`.

    Returns a line for the user: the share of the updates' norm that rounding took, and the layer that lost most.
    A ValueError names a weight that is not finite, or not in `dtype`.
    """
    lost, changed, worst = 0.0, 0.0, (0.0, "")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        # PEFT merges a copy in float32, whatever kind of layer it is (DoRA, …)
        exact, error, change = deepcopy(layer).float(), 0.0, 0.0
        exact.merge()
        weights = zip(layer.get_base_layer().parameters(), exact.get_base_layer().parameters(), strict=True)
        for weight, merged in weights:
            rounded = merged.data.to(dtype)
            if not rounded.isfinite().all():
                remedy = ": take --dtype float32" if merged.isfinite().all() else ""
                raise ValueError(f"{name} is not finite in {dtype}{remedy}")
            # Squared sums of what rounding took, and of the adapter's change
            error += (rounded.float() - merged).square().sum().item()
            change += (merged - weight.float()).square().sum().item()
            weight.data = rounded
        lost, changed = lost + error, changed + change
        share = (error / change) ** 0.5 if change else 0.0
        worst = max(worst, (share, name.removeprefix("base_model.model.")))
    share = (lost / changed) ** 0.5 if changed else 0.0
    remedy = "; --dtype float32 loses nothing" if share > TOLERATED else ""
    line = f"rounding to {dtype} took {share:.1%} of the adapter's change"
    return f"{line}, {worst[0]:.1%} in {worst[1]}{remedy}"


def merge_lora(model_name_or_path: str, adapter_name_or_path: str, output_dir: str, dtype: str = "auto") -> None:
    """Adds the adapter's updates to the weights, puts its projector in place, and saves the checkpoint.

    An OSError or ValueError says what cannot be opened, or that the saved checkpoint differs; no file is left.
    """
    with written_whole(output_dir) as folder:
        opened_in = torch.float32 if dtype == "float32" else "auto"
        model, processor = load_checkpoint(model_name_or_path, opened_in)
        model = load_adapter(model, adapter_name_or_path, model_name_or_path).to(device())
        precision = model.dtype if dtype == "auto" else getattr(torch, dtype)

        # Merge, save what no longer needs PEFT, and read it back
        outcome = merge_layers(model, precision)
        merged = model.unload()
        read_back(folder, save_weights(merged, folder))
        processor.save_pretrained(folder)
        if merged.dtype != precision:
            # Opened in that precision, each module has the one that its model wants
            opened, _ = load_checkpoint(str(folder), precision)
            read_back(folder, save_weights(opened, folder))
        copy_card(adapter_name_or_path, model_name_or_path, folder, Path(output_dir).name)
        print(outcome)


def main() -> None:
    (arguments,) = parse_arguments(MergeArguments)
    merge_lora(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
