"""Computes what fits a GPU for the 4B setup, without loading or downloading anything.

    PYTHONPATH=. python benchmarks/memory.py

First what each training type keeps of the model under ZeRO-2 in bf16, weights, gradients and optimizer state, and
behind a plus what the optimizer's update takes beside it for a moment. Then, with what a pass keeps
(train_llava/training/memory.py), the largest batch a GPU. 24 GB are 24 x 10^9 bytes; a card has 7 % more, left to
CUDA, to DeepSpeed's buffers and to gaps between tensors.
"""

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaNextConfig, Qwen2Config

from train_llava.model import LoraArguments, count_parameters
from train_llava.training.memory import (
    ANSWER,
    TEXT,
    activation_bytes,
    empty_model,
    model_state_bytes,
    optimizer_step_bytes,
    picture_features,
)
from train_llava.training.options import LEARNING_RATES

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
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
GPUS, CARDS = (1, 8), (24, 40, 80)


def largest_batch(state: float, update: float, one: float, two: float, card: int) -> int:
    """How many records fit a card of so many GB beside the model, by the bytes of a pass with one and with two; none
    where the update does not."""
    free = card * 1e9 - state
    return 0 if update > free else max(0, int((free - one) // (two - one)) + 1)


def main() -> None:
    configs = {
        "crop": LlavaConfig(vision_config=CLIP, text_config=QWEN),
        "anyres": LlavaNextConfig(vision_config=CLIP, text_config=QWEN, image_grid_pinpoints=PINPOINTS),
    }
    print("| type | trainable | " + " | ".join(f"GB a GPU, {n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|---:|" + "---:|" * len(GPUS))
    batches = []
    for train_type in LEARNING_RATES:
        for pictures, config in configs.items():
            llava, model = empty_model(config, train_type, LoraArguments(), torch.bfloat16)
            states = [sum(model_state_bytes(model, torch.bfloat16, n, zero=2).values()) for n in GPUS]
            updates = [optimizer_step_bytes(model, torch.bfloat16, n, zero=2) for n in GPUS]
            if pictures == "crop":
                trainable = sum(trained for trained, _ in count_parameters(model).values())
                pairs = zip(states, updates, strict=True)
                sizes = " | ".join(f"{state / 1e9:.1f} + {update / 1e9:.1f}" for state, update in pairs)
                print(f"| `{train_type}` | {trainable / 1e6:,.0f} M | {sizes} |")
            tokens = len(picture_features(llava, 1)) + TEXT
            cells = []
            steps = {
                recompute: [sum(activation_bytes(llava, n, tokens, n, n * ANSWER, recompute).values()) for n in (1, 2)]
                for recompute in (True, False)
            }
            for card in CARDS:
                for state, update in zip(states, updates, strict=True):
                    fit = [largest_batch(state, update, *step, card) or "–" for step in steps.values()]
                    cells.append(" / ".join(map(str, fit)))
            batches.append(f"| `{train_type}`, `{pictures}`, {tokens:,} tokens | " + " | ".join(cells) + " |")
    columns = [f"{card} GB, {n} GPU{'s' * (n > 1)}" for card in CARDS for n in GPUS]
    print(f"\n| with / without checkpointing | {' | '.join(columns)} |")
    print("|---|" + "---:|" * len(columns))
    print("\n".join(batches))


if __name__ == "__main__":
    main()
