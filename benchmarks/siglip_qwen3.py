"""Trains a small SigLIP with a small Qwen3, both from random weights, until they know descriptions of 200 of the
toy example's pictures by heart.

    PYTHONPATH=. python benchmarks/siglip_qwen3.py

`llamacpp.py` asks the outcome, output/siglip_qwen3/run, about the held-out pictures. It answers every question with a
description, seldom a right one, and most of them different. The pictures are those that `bash run_zero2.sh` left in
output/openmoji, the tokenizer is the example's.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from train_llava.build_model import BuildArguments, build_model

DATA = Path("output/openmoji/data/train")
OUTPUT = Path("output/siglip_qwen3")
TOKENIZER = Path("examples/openmoji/parts/qwen2")
SIDE, PATCH = 96, 16  # pixels, as the example's CLIP
PICTURES = 200


def make_parts(folder: Path) -> None:
    """Writes `siglip` and `qwen3` to a folder.

    Rows of 256 numbers and multiples of it are what llama.cpp's K-quants take; heads of 128 are not the 64 that 256
    over 4 heads would be, as in Qwen's own.
    """
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    SiglipVisionModel(vision).save_pretrained(folder / "siglip")
    size = {"height": SIDE, "width": SIDE}
    SiglipImageProcessorPil(size=size).save_pretrained(folder / "siglip")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    text = Qwen3Config(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=128, vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(text)
    model.generation_config = GenerationConfig.from_pretrained(TOKENIZER)
    model.save_pretrained(folder / "qwen3")
    tokenizer.save_pretrained(folder / "qwen3")


def take_records(folder: Path) -> None:
    """Writes `chat.json` of 200 questions and answers that lie evenly among those that describe a picture."""
    records = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))
    described = []
    for record in records:
        if record["kinds"][0] == "describe":  # other answers are the same for many pictures
            described.append(record | {"conversations": record["conversations"][:2]})
    taken = described[:: len(described) // PICTURES][:PICTURES]
    folder.mkdir(parents=True)
    (folder / "chat.json").write_text(json.dumps(taken, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    make_parts(OUTPUT / "parts")
    take_records(OUTPUT / "data")
    build_model(BuildArguments(str(OUTPUT / "parts/siglip"), str(OUTPUT / "parts/qwen3"), str(OUTPUT / "llava")))
    command = [sys.executable, "-m", "train_llava.train", "--train_type", "full", "--save_strategy", "no"]
    command += ["--model_name_or_path", OUTPUT / "llava", "--output_dir", OUTPUT / "run", "--preflight", "false"]
    command += ["--data_path", OUTPUT / "data", "--image_dir", DATA / "images_dl", "--logging_steps", 50]
    command += ["--per_device_train_batch_size", 25, "--max_steps", 600]
    command += ["--learning_rate", 1.5e-3, "--vision_learning_rate", 1e-3]
    subprocess.run([str(word) for word in command], check=True)


if __name__ == "__main__":
    main()
