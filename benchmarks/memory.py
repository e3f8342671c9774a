"""Computes what each training type keeps on a GPU for the real pair, without loading or downloading anything.

    python benchmarks/memory.py

Counted are weights, gradients and optimizer state under ZeRO-2 in bf16. Activations come on top: they depend on the
batch, the length of the conversations and activation checkpointing.
"""

import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from train_llava.model import LoraArguments, count_parameters, set_trainable
from train_llava.train import LEARNING_RATES

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
WEIGHT, GRADIENT = 2, 2  # bytes a parameter in bf16
OPTIMIZER = 4 + 4 + 4  # the fp32 copy and AdamW's two moments
GPUS = (1, 8)


def kept(config: LlavaConfig, train_type: str, gpus: int, stage: int = 2) -> tuple[int, float]:
    """How many numbers train, and the GB that a GPU keeps.

    ZeRO-2 shares gradients and optimizer state out among the GPUs, each of which holds all weights; ZeRO-3 shares the
    weights out, too.
    """
    with torch.device("meta"):
        model = set_trainable(LlavaForConditionalGeneration(config), train_type, LoraArguments())
    trainable, total = (sum(column) for column in zip(*count_parameters(model).values(), strict=True))
    weights = total * WEIGHT / (gpus if stage == 3 else 1)
    return trainable, (weights + trainable * (GRADIENT + OPTIMIZER) / gpus) / 1e9


def main() -> None:
    print("| type | trainable | " + " | ".join(f"GB a GPU, {n} GPU{'s' * (n > 1)}" for n in GPUS) + " |")
    print("|---|---:|" + "---:|" * len(GPUS))
    config = LlavaConfig(vision_config=CLIP, text_config=QWEN)
    for train_type in LEARNING_RATES:
        (trainable, _), *_ = sizes = [kept(config, train_type, n) for n in GPUS]
        columns = " | ".join(f"{size:.1f}" for _, size in sizes)
        print(f"| `{train_type}` | {trainable / 1e6:,.0f} M | {columns} |")


if __name__ == "__main__":
    main()
