"""Computes memory and FLOPs of the 4B setup (CLIP-L/14-336 + Qwen1.5-4B), and measures the error of the memory.

    PYTHONPATH=. python benchmarks/memory.py          what fits a GPU, for results/memory.md
    PYTHONPATH=. python benchmarks/memory.py flops    FLOPs of a training step, for results/flops.md
    PYTHONPATH=. python benchmarks/memory.py check    computed against measured memory, for results/memory_check.md

Nothing is loaded or downloaded: the 4B setup is on the meta device, where tensors have shapes and no numbers.
"""

import json
import os
import subprocess
import sys

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, Qwen2Config

from train_llava.model import LoraArguments, count_parameters, set_trainable
from train_llava.training.memory import (
    ANSWER,
    TEXT,
    activation_bytes,
    empty_model,
    model_state_bytes,
    picture_features,
)
from train_llava.training.options import LEARNING_RATES
from train_llava.training.throughput import peak_memory

# The published configurations of openai/clip-vit-large-patch14-336 and Qwen/Qwen1.5-4B-Chat
CLIP = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
QWEN = Qwen2Config(
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=40,
    num_attention_heads=20,
    num_key_value_heads=20,
    vocab_size=151936,
    tie_word_embeddings=False,
)
CONFIGS = {
    "crop": LlavaConfig(vision_config=CLIP, text_config=QWEN),
    "anyres": LlavaNextConfig(
        vision_config=CLIP,
        text_config=QWEN,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    ),
}
GPUS, CARDS = (1, 8), (24, 40, 80)
PICTURE, PROMPT = 576, TEXT - ANSWER  # tokens of the sample whose FLOPs are counted

# Small models that a step is measured of: width and layers of the language model, then of the tower
GEOMETRIES = {"0.1B": (512, 12, 256, 12), "0.3B": (1024, 16, 512, 12)}
ROWS, IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY = 4, 0, 256, 32000
LORA = LoraArguments(lora_r=64, lora_dropout=0.0)


def largest_batch(model_states: float, optimizer_step: float, one: float, two: float, card: int) -> int:
    """The number of samples that fit a card of `card` GB; 0 where the optimizer step alone does not.

    `one`, `two`: the activations' bytes with one sample and with two.
    """
    free = card * 1e9 - model_states
    return 0 if optimizer_step > free else max(0, int((free - one) // (two - one)) + 1)


def print_memory() -> None:
    """Prints the model states by training type under ZeRO-2 in bf16, then the largest batches.

    Behind a plus is what the optimizer step adds. 24 GB are 24 x 10^9 bytes. A card has 7 % more, which is left to
    CUDA, to DeepSpeed's buffers and to gaps between tensors.
    """
    print("| type | trainable | " + " | ".join(f"GB a GPU, {n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|---:|" + "---:|" * len(GPUS))
    lines = []
    for train_type in LEARNING_RATES:
        for pictures, config in CONFIGS.items():
            llava, model = empty_model(config, train_type, LoraArguments(), torch.bfloat16)
            estimates = [model_state_bytes(model, torch.bfloat16, n, zero=2) for n in GPUS]
            states = [(sum(sizes.values()), step) for sizes, step in estimates]
            if pictures == "crop":
                trained = sum(trained for trained, _ in count_parameters(model).values())
                sizes = " | ".join(f"{state / 1e9:.1f} + {step / 1e9:.1f}" for state, step in states)
                print(f"| `{train_type}` | {trained / 1e6:,.0f} M | {sizes} |")

            # With activation checkpointing and without it: the activations of one sample, and of two
            tokens, activations = len(picture_features(llava, 1)) + TEXT, []
            for recompute in (True, False):
                batches = [(n, tokens, n, n * ANSWER) for n in (1, 2)]
                sizes = [activation_bytes(llava, *batch, recompute=recompute) for batch in batches]
                activations.append([sum(size.values()) for size in sizes])

            cells = []
            for card in CARDS:
                for state, step in states:
                    fit = [largest_batch(state, step, *pair, card) or "–" for pair in activations]
                    cells.append(" / ".join(map(str, fit)))
            lines.append(f"| `{train_type}`, `{pictures}`, {tokens:,} tokens | {' | '.join(cells)} |")
    columns = [f"{card} GB, {n} GPU{'s' * (n > 1)}" for card in CARDS for n in GPUS]
    print(f"\n| with / without checkpointing | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns), *lines, sep="\n")

    print_switches()


def print_switches() -> None:
    """Prints what switches change: GB a GPU with eight records, each with one picture, under ZeRO-2 in bf16."""
    print("\n| eight records of 640 tokens | 1 GPU | 8 GPUs |\n|---|---:|---:|")
    runs = {
        "`lora`": ("lora", False, None, 2, False),
        "`lora`, `--activation_checkpointing true`": ("lora", True, None, 2, False),
        "`lora`, `--activation_checkpointing true --bits 8`": ("lora", True, 8, 2, False),
        "`lora`, `--activation_checkpointing true --bits 4`": ("lora", True, 4, 2, False),
        "`full`, `--activation_checkpointing true`": ("full", True, None, 2, False),
        "the same, `--deepspeed ds_zero3.json`": ("full", True, None, 3, False),
        "the same, `--deepspeed ds_zero3_offload.json`": ("full", True, None, 3, True),
    }
    for name, (train_type, recompute, bits, zero, offload) in runs.items():
        llava, model = empty_model(CONFIGS["crop"], train_type, LoraArguments(), torch.bfloat16)
        activations = sum(activation_bytes(llava, 8, PICTURE + TEXT, 8, 8 * ANSWER, recompute=recompute).values())
        cells = []
        for gpus in GPUS:
            sizes, step = model_state_bytes(model, torch.bfloat16, gpus, zero, offload, bits)
            states = sum(sizes.values())
            cells.append(f"{max(states + activations, states + step) / 1e9:.1f}")
        print(f"| {name} | {' | '.join(cells)} |")


def step_flops(
    train_type: str, all_logits: bool = False, whole_tower: bool = False, checkpointing: bool = False
) -> float:
    """FLOPs of one training step, forward and backward, for one sample.

    Args:
        all_logits: compute logits at every position, not only at the answer's.
        whole_tower: also run the tower's layers behind the one that the projector reads.
        checkpointing: recompute the language model's activations in the backward pass.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(CONFIGS["crop"]).train()
        llava = model.model
        forward = [layer.forward for layer in llava.vision_tower.encoder.layers]
        set_trainable(model, train_type, LoraArguments(lora_dropout=0.0))
        if whole_tower:
            for layer, run in zip(llava.vision_tower.encoder.layers, forward, strict=True):
                layer.forward = run
        if checkpointing:
            llava.language_model.activation_checkpointing_enable()
        text = torch.empty(1, PROMPT + ANSWER, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            features = llava.get_image_features(torch.empty(1, 3, 336, 336)).pooler_output[0]
            embeds = torch.cat([features[None], llava.get_input_embeddings()(text)], dim=1)
            # a mask that is ready-made (None: causal) is taken as it is
            inputs = {"inputs_embeds": embeds, "attention_mask": {"full_attention": None}, "use_cache": False}
            hidden = llava.language_model(**inputs).last_hidden_state
            logits = model.lm_head(hidden if all_logits else hidden[:, -ANSWER:])
            logits.sum().backward()
    return counter.get_total_flops()


def print_flops() -> None:
    """Prints the FLOPs of a step by training type, and what three options make of them."""
    print(f"TFLOP a sample: {PICTURE} picture tokens, {PROMPT} of a prompt, {ANSWER} of an answer\n")
    print("| type | as trained here | with all logits | with the tower's last layer | with activation checkpointing |")
    print("|---|---:|---:|---:|---:|")
    for train_type in LEARNING_RATES:
        variants = [{}, {"all_logits": True}, {"whole_tower": True}, {"checkpointing": True}]
        counts = [f"{step_flops(train_type, **variant) / 1e12:.2f}" for variant in variants]
        print(f"| `{train_type}` | {' | '.join(counts)} |")


def geometry(name: str) -> LlavaConfig:
    """The configuration of a small model."""
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
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN)


def measured_bytes(name: str, train_type: str, recompute: bool) -> int:
    """The bytes by which this process grows in a step, forward and backward, in fp32 with random weights."""
    torch.manual_seed(0)
    before = psutil.Process().memory_info().rss
    llava = LlavaForConditionalGeneration(geometry(name)).train()
    model = set_trainable(llava, train_type, LORA)
    llava.model.language_model.config.use_cache = False
    if recompute:
        llava.model.language_model.activation_checkpointing_enable()
    input_ids = torch.randint(1, VOCABULARY, (ROWS, IMAGE_TOKENS + TEXT))
    input_ids[:, :IMAGE_TOKENS] = IMAGE_TOKEN
    attention_mask, keep = torch.ones_like(input_ids), torch.zeros_like(input_ids, dtype=torch.bool)
    attention_mask[1:, -1] = 0  # padding, so that there is a mask
    keep[:, -ANSWER - 1 : -1] = True
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": keep, "labels": input_ids}
    inputs |= {"shift_labels": input_ids[:, -ANSWER:].flatten(), "pixel_values": torch.randn(ROWS, 3, 224, 224)}
    model(**inputs).loss.backward()
    return peak_memory(torch.device("cpu")) - before


def computed_bytes(name: str, train_type: str, recompute: bool) -> tuple[float, int]:
    """The same bytes by train_llava/training/memory.py, and the model's parameters."""
    llava, model = empty_model(geometry(name), train_type, LORA, torch.float32)
    sizes, _ = model_state_bytes(model, torch.float32)
    sizes |= activation_bytes(llava, ROWS, IMAGE_TOKENS + TEXT, ROWS, ROWS * ANSWER, recompute=recompute)
    return sum(sizes.values()) - sizes["optimizer"], sum(total for _, total in count_parameters(model).values())


def print_check() -> None:
    """Prints computed and measured memory of steps on the CPU. Each step is a process of its own."""
    print("| geometry, type | checkpointing | rows | computed GB | measured GB | computed / measured |")
    print("|---|---|---:|---:|---:|---:|")
    # Freed memory goes back to the system at once, as it does to a GPU's allocator
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in GEOMETRIES:
        for train_type in ("projector", "lora", "freeze_vision"):
            for recompute in (False, True):
                case = (name, train_type, recompute)
                command = [sys.executable, __file__, "measure", json.dumps(case)]
                measured = int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
                computed, parameters = computed_bytes(*case)
                label = f"{parameters / 1e6:.0f} M, `{train_type}` | {'with' if recompute else 'without'} | {ROWS}"
                sizes = f"{computed / 1e9:.2f} | {measured / 1e9:.2f} | {computed / measured:.2f}"
                print(f"| {label} | {sizes} |", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            print_memory()
        case ["flops"]:
            print_flops()
        case ["check"]:
            print_check()
        case ["measure", arguments]:
            print(measured_bytes(*json.loads(arguments)))
        case _:
            sys.exit(f"error: {' '.join(sys.argv[1:])}: give nothing, flops or check")
