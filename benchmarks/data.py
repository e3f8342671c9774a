"""Measures the data path: samples a second beside two yardsticks, and memory at the size of LLaVA-CC3M.

    PYTHONPATH=. python benchmarks/data.py

The data is made in a temporary folder: 224-pixel JPEGs for a 336-pixel tower, and 595,375 records of captions. All
times are of the processor, in alternating rounds of one run; samples a second are of one thread.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.modeling.templates import patch_chat_template
from train_llava.records import IMAGE_TOKEN

QWEN2 = Path(__file__).parent.parent / "examples/openmoji/parts/qwen2"
PICTURES, BATCH, ROUNDS = 128, 16, 7
RECORDS, OPENINGS = 595_375, 3
CHECK = "`check_data`, pictures left out, first opening included"
CAPTION = "a red double decker bus drives down a wet street between old houses"


def make_processor() -> LlavaProcessor:
    """A 336-pixel CLIP's image processor beside the toy example's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(QWEN2)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    patch_chat_template(tokenizer)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaProcessor(image_processor, tokenizer, 14, "default", tokenizer.chat_template, IMAGE_TOKEN, 1)


def record(i: int) -> dict:
    turns = [{"from": "human", "value": f"{IMAGE_TOKEN}\nRender a brief description of the picture."}]
    return {
        "id": f"GCC_{i:09}",
        "image": f"{i}.jpg",
        "conversations": [*turns, {"from": "gpt", "value": f"{CAPTION} {i}"}],
    }


def throughput(folder: Path) -> None:
    """Prints samples a second: the processor sample by sample, this repo, and Pillow's decoding and resizing alone."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        noise = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        noise.resize((224, 224), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.jpg", quality=90)
    (folder / "chat.json").write_text(json.dumps([record(i) for i in range(PICTURES)]))
    processor = make_processor()
    dataset, texts = LlavaDataset(str(folder)), LlavaDataset(str(folder), decode=False)
    collator = LlavaCollator(processor)
    files = [folder / "images" / f"{i}.jpg" for i in range(PICTURES)]

    def one_by_one() -> None:
        for i in range(PICTURES):
            item = texts[i]
            with Image.open(files[i]) as image:
                text = processor.apply_chat_template(item["messages"])
                processor(images=image.convert("RGB"), text=text, return_tensors="pt")

    def ours() -> None:
        for start in range(0, PICTURES, BATCH):
            collator([dataset[i] for i in range(start, start + BATCH)])

    def pillow() -> None:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB").resize((336, 336), Image.Resampling.BICUBIC)

    ways: dict[str, Callable[[], None]] = {
        "processor, one by one": one_by_one,
        "this repo": ours,
        "Pillow alone": pillow,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in tqdm(range(ROUNDS), desc="rounds"):
        for name, way in ways.items():
            start = time.process_time()
            way()
            rates[name].append(PICTURES / (time.process_time() - start))
    ours_rate = rates["this repo"]
    print("| samples a second, one thread | median | range | this repo / it |\n|---|---:|---:|---:|")
    for name, values in rates.items():
        ratio = statistics.median(o / v for o, v in zip(ours_rate, values, strict=True))
        print(f"| {name} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} | {ratio:.2f} |")


def private_mb() -> float:
    return psutil.Process().memory_full_info().uss / 1e6


def walk(dataset: LlavaDataset, queue: multiprocessing.Queue) -> None:
    """A data-loader worker's pass over all records."""
    before = private_mb()
    for i in range(len(dataset)):
        dataset[i]
    queue.put(private_mb() - before)


def seconds(call: Callable[[], Any]) -> float:
    """The processor time that a call takes, in this process and in those that it starts and waits for."""
    before = sum(os.times()[:4])
    call()
    return sum(os.times()[:4]) - before


def scale(folder: Path) -> None:
    """Prints the time and the memory that half a million records take, beside `json.load` of their file."""
    path = folder / "large.json"
    with open(path, "w", encoding="utf-8") as file:
        file.write("[" + ",\n".join(json.dumps(record(i)) for i in range(RECORDS)) + "]")
    command = [sys.executable, "-m", "train_llava.check_data", "--data_path", str(path), "--decode_pictures", "false"]
    memory, times = [], {"`json.load`": [], "first opening": [], "second opening": [], CHECK: []}
    for i in range(OPENINGS):
        datasets.config.HF_DATASETS_CACHE = folder / f"opened{i}"
        before = private_mb()
        times["first opening"].append(seconds(lambda: LlavaDataset(str(path))))
        times["second opening"].append(seconds(lambda: LlavaDataset(str(path))))
        memory.append(private_mb() - before)
        times["`json.load`"].append(seconds(lambda: json.loads(path.read_text(encoding="utf-8"))))
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"checked{i}")}
        check = partial(subprocess.run, command, check=True, env=environment, stdout=sys.stderr)
        times[CHECK].append(seconds(check))
    dataset = LlavaDataset(str(path), decode=False)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=walk, args=(dataset, queue))
    worker.start()
    grown = queue.get()
    worker.join()
    print(f"\n| {RECORDS:,} records | processor time | times `json.load` |\n|---|---:|---:|")
    for name, values in times.items():
        ratios = [value / loaded for value, loaded in zip(values, times["`json.load`"], strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"| {name} | {statistics.median(values):.2f} s | {statistics.median(ratios):.2f} ({spread}) |")
    print(f"\n| memory | |\n|---|---:|\n| the process grows by | {memory[0]:.0f} MB |")
    print(f"| a worker grows by, in a pass over all | {grown:.0f} MB |")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        throughput(Path(folder))
        scale(Path(folder))


if __name__ == "__main__":
    main()
