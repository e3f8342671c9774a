"""Train the two small pretrained models that a LLaVA is built of, a CLIP and a Qwen2 chat model, on the training split.

Both start from random weights and see the training split alone. The CLIP learns which caption, English or Chinese,
belongs to which picture. The chat model never sees a picture: it learns to answer the questions of the data from the
shuffled words of a caption, in the language of the question, so it restores word order and translates.
"""

import json
import math
import random
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTokenizer,
    get_cosine_schedule_with_warmup,
)

LANGUAGES = ("en", "zh")
VOCABULARY = 2560  # tokens in each tokenizer: nearly every English word and the commoner Chinese ones are one token

CLIP_EPOCHS, CLIP_BATCH, CLIP_LR = 100, 128, 1e-3
QWEN2_EPOCHS, QWEN2_BATCH, QWEN2_LR = 12, 32, 2e-3

# Words that tell apart the pictures of one motif: "man farmer dark skin tone" and "woman farmer" are both a "farmer".
VARYING = set(
    [
        "man",
        "men",
        "woman",
        "women",
        "person",
        "people",
        "skin",
        "tone",
        "light",
        "medium-light",
        "medium",
        "medium-dark",
        "dark",
    ]
)

# Qwen1.5's ChatML, with its default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_data(data_dir: Path) -> tuple[list[Path], dict[str, list[str]], dict[str, list[str]]]:
    """chat.json -> picture files, captions per language in the same order, and the distinct questions per language."""
    chat_file = data_dir / "chat.json"
    if not chat_file.is_file():
        raise SystemExit(f"make_parts: no {chat_file}; run make_data.py first and pass its train folder as --data_dir")
    records = json.loads(chat_file.read_text(encoding="utf-8"))
    captions = {language: {} for language in LANGUAGES}
    questions = {language: set() for language in LANGUAGES}
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        captions[record["language"]][record["image"]] = answer
        questions[record["language"]].add(question.replace("<image>", "").strip())
    images = list(captions["en"])
    return (
        [data_dir / "images_dl" / image for image in images],
        {language: [captions[language][image] for image in images] for language in LANGUAGES},
        {language: sorted(questions[language]) for language in LANGUAGES},
    )


def optimizer_and_schedule(model: torch.nn.Module, lr: float, steps: int):
    """AdamW that spares biases and norms its weight decay, with a short warmup and a cosine down to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=100, num_training_steps=steps)


def parameters_in_millions(model: torch.nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def augment(pixels: torch.Tensor) -> torch.Tensor:
    """Turn (8 degrees at most), scale (10 %) and shift (4 %) white-backed pictures; pixels [n, 3, h, w] in 0..1."""
    turn = (torch.rand(len(pixels)) * 2 - 1) * math.radians(8)
    scale = 1 + (torch.rand(len(pixels)) * 2 - 1) * 0.1
    shift = (torch.rand(len(pixels), 2) * 2 - 1) * 0.08  # the picture's sides are at -1 and 1
    cos, sin = scale * turn.cos(), scale * turn.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    # grid_sample pads with 0, so white is moved to 0 and back.
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def contrastive_batches(captions: list[str]) -> list[list[int]]:
    """One epoch of indices, each batch made of up to 16 pictures of one motif, then of the next, and so on.

    These are the hard negatives: only skin tone, gender and hair tell a motif's pictures apart, so the features have
    to hold them. Drawn at random from the whole split, such pictures would hardly ever meet in a batch.
    """
    motifs = defaultdict(list)
    for index, caption in enumerate(captions):
        motifs[" ".join(word for word in caption.split() if word not in VARYING)].append(index)
    runs = []
    for members in motifs.values():
        random.shuffle(members)
        runs += [members[start : start + 16] for start in range(0, len(members), 16)]
    random.shuffle(runs)
    order = [index for run in runs for index in run]
    return [order[start : start + CLIP_BATCH] for start in range(0, len(order) - CLIP_BATCH + 1, CLIP_BATCH)]


def train_clip(files: list[Path], captions: dict[str, list[str]], output_dir: Path) -> None:
    """Contrastive training from random weights; writes the model (fp16), image processor and tokenizer."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(
        [caption for language in LANGUAGES for caption in captions[language]], VOCABULARY, show_progress=False
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 72}, crop_size={"height": 72, "width": 72})
    pixels = processor([Image.open(file) for file in files], do_normalize=False, return_tensors="pt").pixel_values
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    texts = {l: tokenizer(captions[l], padding=True, return_tensors="pt") for l in LANGUAGES}

    text_config = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
