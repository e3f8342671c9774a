"""The assembled checkpoint holds both models unchanged, opens with transformers alone, and fails cleanly."""

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPModel,
)


def test_weights_are_those_of_the_parts(parts, llava):
    saved = load_file(llava / "model.safetensors")
    for name, tensor in CLIPModel.from_pretrained(parts["clip"]).vision_model.state_dict().items():
        assert torch.equal(
            saved.pop(f"vision_tower.{name}" if f"vision_tower.{name}" in saved else f"model.vision_tower.{name}"),
            tensor,
        )
