"""Counts the floating-point operations of a training step for the 4B setup, without loading or downloading anything.

    PYTHONPATH=. python benchmarks/flops.py

One sample: a picture of 576 tokens, a prompt of 32 more, an answer of 32. The model is on the meta device, where
operations have shapes and no numbers; PyTorch counts their matrix multiplications, forward and backward.
"""

import torch
from memory import CLIP, QWEN
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from train_llava.model import LoraArguments, set_trainable
from train_llava.training.options import LEARNING_RATES

PICTURE, PROMPT, ANSWER = 576, 32, 32


def step_flops(train_type: str, all_logits: bool, whole_tower: bool, checkpointing: bool) -> float:
    """Operations of one step, forward and backward.

    Args:
        all_logits: compute logits at every position, not at the answer's alone.
        whole_tower: run the tower's layers behind the one that the projector reads.
        checkpointing: recompute the language model's activations in the backward pass.
    """
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIP, text_config=QWEN)).train()
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
            # a mask given ready-made (none: causal) is not looked into, which a meta tensor would not allow
            inputs = {"inputs_embeds": embeds, "attention_mask": {"full_attention": None}, "use_cache": False}
            hidden = llava.language_model(**inputs).last_hidden_state
            logits = model.lm_head(hidden if all_logits else hidden[:, -ANSWER:])
            logits.sum().backward()
    return counter.get_total_flops()


def main() -> None:
    print(f"TFLOP a sample: {PICTURE} picture tokens, {PROMPT} of a prompt, {ANSWER} of an answer\n")
    print("| type | as trained here | with all logits | with the tower's last layer | with activation checkpointing |")
    print("|---|---:|---:|---:|---:|")
    for train_type in LEARNING_RATES:
        variants = [(False, False, False), (True, False, False), (False, True, False), (False, False, True)]
        counts = [step_flops(train_type, *variant) / 1e12 for variant in variants]
        print(f"| `{train_type}` | " + " | ".join(f"{count:.2f}" for count in counts) + " |")


if __name__ == "__main__":
    main()
