"""Weights in 4 or 8 bits, by bitsandbytes."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from train_llava.cli import device
from train_llava.modeling.kinds import PARTS


def quantization(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with which `from_pretrained` holds the language model in 8 bits or in 4.

    The methods are LLM.int8 (Dettmers et al., 2022) and QLoRA (2023). The vision tower, the projector and the
    output layer keep their precision.
    """
    if not is_bitsandbytes_available():
        raise ValueError(f"--bits {bits} needs a package that is not installed: pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=[*(f"model.{name}" for names in PARTS.values() for name in names), "lm_head"],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    # Quantised weights are made on the device where they stay; a GPU has a number
    place = "cpu" if device().type == "cpu" else torch.accelerator.current_device_index()
    return {"quantization_config": config, "device_map": {"": place}}
