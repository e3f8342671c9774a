"""The assembled checkpoint holds both models unchanged, opens with transformers alone, and fails cleanly."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    pipeline,
)

from train_llava.build_model import build_model, end_of_turn_token, with_structured_content


def test_weights_are_those_of_the_parts(parts, llava):
    saved = load_file(llava / "model.safetensors")
    for name, tensor in CLIPModel.from_pretrained(parts["clip"]).vision_model.state_dict().items():
        assert torch.equal(saved.pop(f"vision_tower.{name}" if f"vision_tower.{name}" in saved else
                                     f"model.vision_tower.{name}"), tensor)
