"""Times a training step padded, grouped by length and packed to a budget of tokens, on conversations of mixed lengths.

    PYTHONPATH=. python benchmarks/packing.py > benchmarks/results/packing.md

The set is made by a fixed rule: of 16 records nine are captions of a picture, six conversations of 4 to 14 turns about
one, and one is a long conversation without. All is half as large as with CLIP-L/14-336 and a language model of 0.5B:
lengths (256 tokens a picture), budgets, and the widths of the two models, of which two layers each are run, so that
attention weighs in a layer what it weighs there; random weights, fp32, LoRA of rank 8, the projector in full.

Padding is that of a whole pass, as the trainer's own sampler has it. Of its batches some are timed, from the smallest
to the largest: forward, backward and AdamW, by processor time of one thread, the ways in turn. Samples a second are
those of a pass at the mean of these steps.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from speed import CHATML, EXAMPLE, LORA, configurations
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel, Qwen2ForCausalLM

from train_llava.build_model import BuildArguments, build_model
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset.lengths import count_tokens
from train_llava.dataset.packing import PackedDataset
from train_llava.model import load_checkpoint, set_trainable
from train_llava.train import TrainArguments
from train_llava.trainer import LlavaTrainer

SIDE, RECORDS, BATCH = 224, 1024, 4
WORDS = ["a", "dog", "red", "bird", "on", "the", "two", "blue"]  # a token each
WAYS = {  # settings of the trainer
    "padding": {},
    "`--train_sampling_strategy group_by_length`": {"train_sampling_strategy": "group_by_length"},
    "`--packing true`": {},
    **{f"`--packing true --tokens_per_batch {n}`": {"tokens_per_batch": n} for n in (1024, 2048, 4096)},
}


class Batch(NamedTuple):
    records: list[int]
    tokens: int  # the conversations'
    numbers: int  # of `input_ids`, padding and a blank picture included


def words(number: int) -> str:
    return " ".join(WORDS[i % len(WORDS)] for i in range(number))


def record(i: int) -> dict:
    """The i-th record of the mixed set."""
    kind, turn = i % 16, [{"from": "human", "value": words(8)}, {"from": "gpt", "value": words(20)}]
    if kind < 9:
        turns = [{"from": "human", "value": words(4)}, {"from": "gpt", "value": words(12 + 7 * i % 29)}]
    else:
        turns = json.loads(json.dumps(turn * (4 + 5 * i % 11 if kind < 15 else 12 + i // 16 % 8)))
    if kind == 15:
        return {"id": str(i), "conversations": turns}
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": str(i), "image": f"{i % 8}.jpg", "conversations": turns}


def make_data(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(8):
        picture = Image.effect_mandelbrot((SIDE, SIDE), (-2, -1.5, 1, 1.5), 20 + i).convert("RGB")
        picture.save(folder / "images" / f"{i}.jpg")
    (folder / "chat.json").write_text(json.dumps([record(i) for i in range(RECORDS)]))
    return folder


def make_model(folder: Path) -> Path:
    vision, text = configurations((3, 512), (2, 512), 8000)
    vision.image_size = SIDE
    CLIPVisionModel(vision).save_pretrained(folder / "clip")
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder / "clip")
    Qwen2ForCausalLM(text).save_pretrained(folder / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "qwen2")
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table
        build_model(
            BuildArguments(str(folder / "clip"), str(folder / "qwen2"), str(folder / "llava"), skip_checks=True)
        )
    return folder / "llava"


def batches_of(trainer: LlavaTrainer, counts: np.ndarray, blank: int) -> list[Batch]:
    """The batches of a pass, the smallest first."""
    packing, found = trainer.data_collator.keywords["collator"].packing, []
    for numbers in trainer.get_train_dataloader().batch_sampler:
        if isinstance(trainer.train_dataset, PackedDataset):
            numbers = [int(i) for row in numbers for i in trainer.train_dataset.rows[row]]
        tokens, of_pictures = counts[numbers].T
        lengths = tokens.copy()
        lengths[0] += 0 if of_pictures.any() else blank
        laid_out = lengths.sum() if packing else len(lengths) * lengths.max()
        found.append(Batch(numbers, int(tokens.sum()), int(laid_out)))
    return sorted(found, key=lambda batch: batch.numbers)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> float:
    """Seconds of a step, by processor time."""
    start = time.process_time()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="How often each way has its turn.")
    parser.add_argument("--steps", type=int, default=5, help="Steps of a turn.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stderr):
        folder = Path(temporary)
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        model, processor = load_checkpoint(str(make_model(folder)), torch.float32)
        model = set_trainable(model, "lora", LORA).train()
        model.config.text_config.use_cache = False
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        data = LlavaDataset(str(make_data(folder / "data")))
        collators = {way: LlavaCollator(processor, packing="packing" in way) for way in WAYS}
        chat = collators["padding"].chat
        checked = CheckedDataset(data, chat, folder / "bad.jsonl")
        counts, blank = count_tokens(data, chat), chat.image_tokens((chat.side, chat.side))
        passes, timed = {}, {}
        for way, settings in WAYS.items():
            args = TrainArguments(output_dir=str(folder / "run"), per_device_train_batch_size=BATCH, **settings)
            budget = settings.get("tokens_per_batch")
            dataset = checked if budget is None else PackedDataset(checked, budget)
            trainer = LlavaTrainer(model, args, collators[way], dataset, learning_rates={}, write_card=print)
            passes[way] = batches_of(trainer, counts, blank)
            assert sorted(i for batch in passes[way] for i in batch.records) == list(range(RECORDS))
            places = (np.arange(arguments.steps) + 0.5) / arguments.steps * len(passes[way])
            timed[way] = [passes[way][int(place)] for place in places]
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for number in range(-1, arguments.rounds):  # the first is not counted: it warms up
            for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
                chosen = timed[way] if number >= 0 else timed[way][:1]
                batches = [collators[way]([data[i] for i in batch.records]) for batch in chosen]
                assert [batch["input_ids"].numel() for batch in batches] == [batch.numbers for batch in chosen]
                seconds = [step(model, optimizer, batch) for batch in batches]
                if number >= 0:
                    rates[way].append(RECORDS / (len(passes[way]) * statistics.mean(seconds)))
                print(f"round {number + 1}: {way} {[round(s, 3) for s in seconds]}", file=sys.stderr, flush=True)
    print("| | padding | records a step | tokens a step | samples a second (range) | times padding |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, batches in passes.items():
        numbers, records = [batch.numbers for batch in batches], [len(batch.records) for batch in batches]
        padding = 1 - sum(batch.tokens for batch in batches) / sum(numbers)
        ratio = statistics.median(a / b for a, b in zip(rates[way], rates["padding"], strict=True))
        print(
            f"| {way} | {padding:.0%} | {min(records)} to {max(records)} | {min(numbers):,} to {max(numbers):,} | "
            f"{statistics.median(rates[way]):.2f} ({min(rates[way]):.2f} to {max(rates[way]):.2f}) | {ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
