"""Measures how far the computed memory of a step is from a real one's, on the CPU, in two geometries.

    PYTHONPATH=. python benchmarks/memory_check.py > benchmarks/results/memory_check.md

Each step, forward and backward, in fp32 with random weights, is a process of its own: what it grows by from before the
model is made to the most it ever has (`ru_maxrss`), against the computed weights, gradients, activations and logits.
"""

import json
import os
import subprocess
import sys

import psutil
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from train_llava.model import LoraArguments, count_parameters, set_trainable
from train_llava.training.memory import activation_bytes, empty_model, model_state_bytes
from train_llava.training.throughput import peak_memory

TEXT, ANSWER, IMAGE = 64, 32, 0
GEOMETRIES = {"0.1B": (512, 12, 256, 12), "0.3B": (1024, 16, 512, 12)}  # width and layers, the tower's
LORA = LoraArguments(lora_r=64, lora_dropout=0.0)


def geometry(name: str) -> LlavaConfig:
    width, layers, tower_width, tower_layers = GEOMETRIES[name]
    tower = CLIPVisionConfig(
        hidden_size=tower_width,
        intermediate_size=4 * tower_width,
        num_hidden_layers=tower_layers,
        num_attention_heads=8,
        image_size=224,
        patch_size=14,
    )
    text = Qwen2Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)


def measured(name: str, train_type: str, recompute: bool, rows: int) -> int:
    """Bytes by which this process grows in a step of its own."""
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss
    llava = LlavaForConditionalGeneration(geometry(name)).train()
    model = set_trainable(llava, train_type, LORA)
    llava.model.language_model.config.use_cache = False
    if recompute:
        llava.model.language_model.activation_checkpointing_enable()
    input_ids = torch.randint(1, 32000, (rows, 256 + TEXT))
    input_ids[:, :256] = IMAGE
    attention_mask, keep = torch.ones_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    attention_mask[1:, -1] = 0  # padding, so that there is a mask
    keep[:, -ANSWER - 1 : -1] = True
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": keep, "labels": input_ids}
    inputs |= {"shift_labels": input_ids[:, -ANSWER:].flatten(), "pixel_values": torch.randn(rows, 3, 224, 224)}
    model(**inputs).loss.backward()
    return peak_memory(torch.device("cpu")) - before


def computed(name: str, train_type: str, recompute: bool, rows: int) -> tuple[float, int]:
    """The same bytes by train_llava/training/memory.py, and the model's parameters."""
    llava, model = empty_model(geometry(name), train_type, LORA, torch.float32)
    sizes = model_state_bytes(model, torch.float32)
    sizes |= activation_bytes(llava, rows, 256 + TEXT, rows, rows * ANSWER, recompute)
    return sum(sizes.values()) - sizes["optimizer"], sum(total for _, total in count_parameters(model).values())


def main() -> None:
    if len(sys.argv) > 1:
        print(measured(*json.loads(sys.argv[1])))
        return
    print("| geometry, type | checkpointing | rows | computed GB | measured GB | computed / measured |")
    print("|---|---|---:|---:|---:|---:|")
    for name in GEOMETRIES:
        for train_type in ("projector", "lora", "freeze_vision"):
            for recompute in (False, True):
                case = (name, train_type, recompute, 4)
                command = [sys.executable, __file__, json.dumps(case)]
                # what is freed goes back to the system at once, as it does to a GPU's allocator
                environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
                found = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
                size, parameters = computed(*case)
                ours = f"{size / 1e9:.2f} | {found / 1e9:.2f} | {size / found:.2f}"
                label = f"{parameters / 1e6:.0f} M, `{train_type}`"
                print(f"| {label} | {'with' if recompute else 'without'} | {case[-1]} | {ours} |", flush=True)


if __name__ == "__main__":
    main()
