"""The variants of a training step that `gpu.py` measures: each is a function of a slot, and returns cells of a row.

A step is a run of `train_llava.train` with a variant's arguments, so that what is measured is what users get. Only the
model is made on the GPU, of random weights, and batches are collated and pinned beforehand.
"""

import argparse
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import speed
import torch
from memory import CLIP, QWEN
from PIL import Image
from speed import DTYPE, ON_GPU, wait
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, TrainerCallback

from train_llava import train
from train_llava.build_model import BuildArguments, build_model
from train_llava.chat import chat_of
from train_llava.cli import device
from train_llava.data import LlavaCollator, LlavaDataset, to_sample
from train_llava.model import LoraArguments, load_checkpoint, load_config, load_processor
from train_llava.trainer import LlavaTrainer
from train_llava.training.memory import flops_per_token
from train_llava.training.throughput import matmul_peak, peak_memory, published_peak

ROOT = Path(__file__).resolve().parent.parent
RATES = ["s a step (range)", "tokens/s", "records/s", "mfu", "hfu"]
COLUMNS = [*RATES, "peak GB", "kernels", "idle", "data wait", "loss, first → last", "note"]
# a token each for the tokenizer of examples/openmoji/parts: 16 to 47 of them make records of 600 to 631 tokens
WORDS = ["a", "dog", "red", "bird", "on", "the", "two", "blue"]
Row = dict[str, str]  # a cell by its column


class Slot(NamedTuple):
    """A folder for files, whether the model is the 4B setup or tiny, records a batch, and steps."""

    folder: Path
    real: bool
    records: int
    warm: int
    steps: int  # with those to warm up


# What is trained, made where it is first asked for


def data_of(slot: Slot) -> Path:
    """The folder of chat.json, and of mixed.json: every third record without its picture makes 30 % of it padding."""
    folder = slot.folder / "data"
    if folder.exists():
        return folder
    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for i in range(2 * slot.records * (slot.steps + 1)):
        colours = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((640, 480)).save(folder / "images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nWhat is in this picture?"}
        answer = {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(16, 48)))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "chat.json").write_text(json.dumps(records))
    for record in records[1::3]:
        del record["image"]
        record["conversations"][0]["value"] = "What is in this picture?"
    (folder / "mixed.json").write_text(json.dumps(records))
    return folder


def model_of(slot: Slot, pictures: str = "crop", weights: bool = False) -> str:
    """The folder of a model's configuration and processor and, if asked for, of its weights."""
    parts, folder = slot.folder / "parts", slot.folder / pictures
    if not parts.exists():
        speed.make_parts("tiny", parts)
    if not folder.exists():
        tiny = {"vision_model_name_or_path": parts / "clip", "language_model_name_or_path": parts / "qwen2"}
        tiny |= {"output_dir": folder, "image_aspect_ratio": pictures}
        build_model(BuildArguments(**{name: str(value) for name, value in tiny.items()}, skip_checks=True))
        (folder / "model.safetensors").unlink()
        config = load_config(str(folder))
        config.dtype = DTYPE
        if slot.real:
            config.vision_config, config.text_config = CLIP, QWEN
        config.save_pretrained(folder)
    if weights and not any(folder.glob("*.safetensors")):
        make_model(str(folder), DTYPE)[0].save_pretrained(folder)
    return str(folder)


def make_model(folder: str, dtype: torch.dtype, attention: str | None = None, bits: int | None = None) -> tuple:
    """In place of `load_checkpoint`: random weights, made on the GPU. For `bits`, files are needed all the same."""
    if bits:
        return load_checkpoint(folder, dtype, attention, bits)
    config, processor = load_processor(folder)
    torch.manual_seed(0)
    with device():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model, processor


# What a row is made of


@cache
def peak_rate() -> float:
    """FLOPs per second: the GPU's published peak; if that is unknown, the measured one."""
    name = torch.cuda.get_device_name() if ON_GPU else ""
    return published_peak(name) or matmul_peak(device(), DTYPE)


@cache
def token_flops(folder: str, train_type: str, recompute: bool) -> float:
    """FLOPs per token of a step; see `flops_per_token`."""
    args = argparse.Namespace(deepspeed=None, train_type=train_type, frozen_parts=())
    return flops_per_token(load_config(folder), LoraArguments(), args, recompute)


def row_of(
    model: str,
    seconds: list[float],
    tokens: float,
    records: int,
    losses: list[float],
    train_type: str = "lora",
    recompute: bool = False,
) -> Row:
    """The cells of a run, from its timed steps' seconds, the tokens and records of one, and the losses of all."""
    middle = median(seconds)
    row = {"s a step (range)": f"{middle:.3f} ({min(seconds):.3f} to {max(seconds):.3f})"}
    row |= {"tokens/s": f"{tokens / middle:,.0f}", "records/s": f"{records / middle:.1f}"}
    for name, again in [("mfu", False), ("hfu", True)][: 1 + recompute]:
        row[name] = f"{token_flops(model, train_type, again) * tokens / middle / peak_rate():.1%}"
    return row | {"loss, first → last": f"{losses[0]:.4f} → {losses[-1]:.4f}"}


class Watch(TrainerCallback):
    """The seconds of every step, from the end of one to that of the next, and the kernels of the last."""

    def __init__(self, steps: int):
        self.steps, self.seconds, self.kernels = steps, [], []
        # on a CPU, operators stand in for kernels
        self.profiler = profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU])

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        wait()
        self.seconds.append(time.perf_counter() - self.end)
        if state.global_step == self.steps:
            self.profiler.start()
        elif state.global_step > self.steps:
            self.profiler.stop()
            kind, events = DeviceType.CUDA if ON_GPU else DeviceType.CPU, self.profiler.events()
            self.kernels = [e.time_range for e in events if e.device_type == kind and not e.is_user_annotation]
        self.end = time.perf_counter()

    def busy_seconds(self) -> float:
        """The time in which at least one kernel of the last step ran."""
        busy = end = 0.0
        for kernel in sorted(self.kernels, key=lambda kernel: kernel.start):
            busy += max(0.0, kernel.end - max(kernel.start, end))
            end = max(end, kernel.end)
        return busy / 1e6


class MeasuredTrainer(LlavaTrainer):
    """Trains as users do, on batches made beforehand if no other processes make them; saves nothing."""

    def __init__(self, watch: Watch, **settings: Any):
        with patch("train_llava.trainer.base_tensors", lambda _: {}):  # there are no files of them
            super().__init__(**settings)
        self.add_callback(watch)
        self.steps, self.tokens, self.places = watch.steps, [], []

    def get_train_dataloader(self) -> DataLoader:
        if self.args.dataloader_num_workers:
            return super().get_train_dataloader()
        records, pin = self.args.per_device_train_batch_size, self.args.dataloader_pin_memory
        loader = DataLoader(self.train_dataset, records, collate_fn=self.data_collator, pin_memory=pin)
        batches = list(islice(loader, self.steps + 1))
        self.places = [batch["input_ids"].numel() for batch in batches]
        return self.accelerator.prepare(DataLoader(batches, collate_fn=itemgetter(0)))

    def log(self, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs:
            self.tokens.append(self.throughput.tokens)  # of this step, before they are set to 0
        super().log(logs, *args)

    def save_model(self, *_: Any, **__: Any) -> None:
        pass

    def create_model_card(self, *_: Any, **__: Any) -> None:
        pass


# The variants, each a function of the slot that returns its row


def matrix_products(slot: Slot) -> Row:
    """The rate of large products of random numbers."""
    measured, peak = matmul_peak(device(), DTYPE), peak_rate()
    return {"note": f"{measured / 1e12:,.3g} TFLOP/s, {measured / peak:.0%} of {peak / 1e12:,.3g}"}


def attention(slot: Slot, cudnn: bool) -> Row:
    """Attention alone, forward and backward: the first call with a new length, and the second."""
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    heads, width, lengths = (20, 128, range(600, 632)) if slot.real else (1, 64, range(60, 63))
    notes = []
    for kind in ("causal", "with a mask"):
        calls: dict[str, list[float]] = {"first": [], "second": []}
        for length in lengths:
            # In a model's layout: (rows, T, heads, width), transposed
            shape, mask = (slot.records, length, heads, width), None
            states = [torch.randn(shape, dtype=DTYPE, device=device()).transpose(1, 2) for _ in range(4)]
            inputs = [each.requires_grad_() for each in states[:3]]
            if kind != "causal":
                mask = torch.ones(slot.records, 1, length, length, dtype=torch.bool, device=device()).tril()
            for seconds in calls.values():
                wait()
                start = time.perf_counter()
                outputs = scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=mask is None)
                torch.autograd.grad(outputs, inputs, states[3])
                wait()
                seconds.append(time.perf_counter() - start)
        times = ", ".join(f"{call} call {1e3 * median(seconds):.2f} ms" for call, seconds in calls.items())
        notes.append(f"{kind}: {times}")
    return {"note": "; ".join(notes)}


def launches(slot: Slot) -> Row:
    """The time of the smallest kernel."""
    number, count = torch.zeros(1, device=device()), 20_000
    for _ in range(2):  # first to warm up
        wait()
        start = time.perf_counter()
        for _ in range(count):
            number.add_(1)
        launched = time.perf_counter() - start
        wait()
        done = time.perf_counter() - start
    return {"note": f"{1e6 * launched / count:.1f} us a kernel on the host, {1e6 * done / count:.1f} us until done"}


def common_arguments(slot: Slot, model: str, data: str, records: int, steps: int) -> list[str]:
    """Arguments of `train_llava.train`; later ones override them."""
    shutil.rmtree(slot.folder / "run", ignore_errors=True)
    given = {"model_name_or_path": model, "data_path": data_of(slot) / data, "output_dir": slot.folder / "run"}
    given |= {"max_steps": steps, "per_device_train_batch_size": records, "train_sampling_strategy": "sequential"}
    given |= {"bf16": ON_GPU, "lora_dropout": 0, "preflight": False, "logging_steps": 1, "disable_tqdm": True}
    given |= {"save_strategy": "no", "report_to": "none"}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def step(
    *arguments: str,
    slot: Slot,
    times: float = 1,
    data: str = "chat.json",
    pictures: str = "crop",
    before: bool = False,
    cudnn: bool = False,
) -> Row:
    """A run of `train_llava.train` in this process.

    Args:
        times: how many times the slot's records are in a batch.
        before: with an attention mask, lengths that are not rounded up, and packed rows computed in a loop; otherwise
            as `train` does it on a GPU.
        cudnn: with attention by cuDNN.
    """
    from torch._dynamo.utils import counters  # here: it takes a second

    # The run, with what stands in for parts of it
    watch, records, trainer = Watch(slot.steps), max(1, int(times * slot.records)), None
    model = model_of(slot, pictures, weights="--bits" in arguments)

    def make_trainer(**settings: Any) -> MeasuredTrainer:
        nonlocal trainer
        trainer = MeasuredTrainer(watch, **settings | ({"packed_model": None} if before else {}))
        return trainer

    def make_collator(processor: Any, max_length: int, packing: bool, *_: Any) -> LlavaCollator:
        return LlavaCollator(processor, max_length, packing, padding_mask=before, multiple=1 if before else 64)

    stand_ins = {"load_checkpoint": make_model, "LlavaTrainer": make_trainer, "LlavaCollator": make_collator}
    stand_ins |= dict.fromkeys(["verify_for_training", "padding_is_invisible"], lambda *_: True)
    torch.compiler.reset()
    counters.clear()
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    sys.argv = ["train", *common_arguments(slot, model, data, records, slot.steps + 1)]
    sys.argv += ["--dataloader_num_workers", "0", *arguments]
    with patch.multiple(train, **stand_ins), patch("torch.backends.cuda.enable_cudnn_sdp"):
        train.main()

    # Its row
    timed, log = slice(slot.warm, slot.steps), [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds, tokens, losses = watch.seconds[timed], trainer.tokens[timed], [entry["loss"] for entry in log]
    row = row_of(model, seconds, mean(tokens), records, losses[: slot.steps], recompute=RECOMPUTE[0] in arguments)
    row["peak GB"] = f"{peak_memory(device()) / 1e9:.1f}"
    if watch.kernels:  # not every machine lets a profiler look
        row["kernels"] = f"{len(watch.kernels):,}"
        row["idle"] = f"{max(0, 1 - watch.busy_seconds() / median(seconds)):.0%}"
    row["data wait"] = f"{median(entry['data_wait'] for entry in log[timed]):.1%}"
    notes = [f"{1 - sum(tokens) / sum(trainer.places[timed]):.0%} padding"] if trainer.places else []
    if COMPILE[0] in arguments:
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        notes.append(f"{graphs} graphs, {breaks} breaks, first step {watch.seconds[0]:.0f} s")
    return row | {"note": ", ".join(notes)}


def script(*arguments: str, slot: Slot, train_type: str = "lora", accumulate: int = 1, check: bool = False) -> Row:
    """A run of `run_zero2.sh`, of five steps at most where more than LoRA trains.

    Args:
        accumulate: batches a step.
        check: with DeepSpeed's search for overflow.
    """
    # The run, in other processes
    zero2 = json.loads((ROOT / "ds_zero2_no_offload.json").read_text())
    zero2["bf16"]["check_grad_overflow"] = check
    (slot.folder / "zero2.json").write_text(json.dumps(zero2))
    warm, steps = (slot.warm, slot.steps) if train_type == "lora" else (min(2, slot.warm), min(5, slot.steps))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment = {"CPU_RANKS": "1"} | os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    model = model_of(slot, weights=True)
    gc.collect()
    torch.cuda.empty_cache()  # for the run
    command = ["bash", ROOT / "run_zero2.sh", "--deepspeed", slot.folder / "zero2.json", "--train_type", train_type]
    command += common_arguments(slot, model, "chat.json", slot.records, steps)
    command += ["--gradient_accumulation_steps", str(accumulate), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit {done.returncode}"]
        raise RuntimeError(([line for line in lines if "rror: " in line] or lines)[-1])

    # Its row. A record has one picture, so that pictures a second are records a second
    log = json.loads((slot.folder / "run/trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    records, losses, timed = slot.records * accumulate, [entry["loss"] for entry in log], log[warm:]
    seconds = [records / entry["pictures_per_second"] for entry in timed]
    tokens = mean(records * entry["tokens_per_second"] / entry["pictures_per_second"] for entry in timed)
    row = row_of(model, seconds, tokens, records, losses, train_type, RECOMPUTE[0] in arguments)
    row["peak GB"] = f"{log[-1]['memory_gb']:.1f}"
    return row | {"data wait": f"{median(entry['data_wait'] for entry in timed):.1%}"}


def other_code(contender: str, slot: Slot) -> Row:
    """The same model and records in other code; see `speed.py`."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # as it is there
    model, dataset = model_of(slot), LlavaDataset(str(data_of(slot) / "chat.json"))
    items = [dataset[i] for i in range(slot.records * slot.steps)]
    lora = LoraArguments(lora_dropout=0)
    with patch.object(speed, "load_checkpoint", make_model):
        found = speed.run(contender, model, slot.folder / "run", slot.steps, items, slot.records, lora)
    chat = chat_of(load_processor(model)[1])
    tokens = slot.records * mean(len(to_sample(item, chat).input_ids) for item in items)
    row = row_of(model, found["seconds"][slot.warm :], tokens, slot.records, found["losses"])
    return row | {"peak GB": f"{found['peak_gb']:.1f}"}


RECOMPUTE, DROPOUT = ["--activation_checkpointing", "true"], ["--lora_dropout", "0.05"]
PACKING, COMPILE = ["--packing", "true"], ["--torch_compile", "true"]
COMPILE += ["--torch_compile_backend", "inductor" if ON_GPU else "aot_eager"]
OFFLOAD = ["--deepspeed", str(ROOT / "ds_zero3_offload.json"), *RECOMPUTE]
BEFORE = partial(step, *RECOMPUTE, *DROPOUT, before=True)
VARIANTS: dict[str, Callable[..., Row]] = {
    "matrix-products": matrix_products,
    "attention-cudnn": partial(attention, cudnn=True),
    "attention-no-cudnn": partial(attention, cudnn=False),
    "launches": launches,
    "before": partial(BEFORE, cudnn=True),
    "before-packed": partial(BEFORE, *PACKING, cudnn=True),
    # From here to no-dropout, each time one thing more is left out
    "no-cudnn": BEFORE,
    "no-cudnn-packed": partial(BEFORE, *PACKING),
    "no-mask": partial(step, *RECOMPUTE, *DROPOUT),
    "no-recomputation": partial(step, *DROPOUT),
    "no-dropout": step,
    "launches-again": launches,  # the profiler has run, which must not make them slower
    "compiled": partial(step, *COMPILE),
    "compiled-16": partial(step, *COMPILE, times=2),
    "mixed-padded": partial(step, data="mixed.json"),
    "mixed-packed": partial(step, *PACKING, data="mixed.json"),
    "four-workers": partial(step, "--dataloader_num_workers", "4"),
    "zero2": script,
    "zero2-check": partial(script, check=True),
    "zero2-accumulated": partial(script, accumulate=4),
    "zero2-accumulated-check": partial(script, accumulate=4, check=True),
    "liger": partial(step, "--use_liger_kernel", "true"),
    "zero3-offload-full": partial(script, *OFFLOAD, train_type="full"),
    "zero3-offload-freeze-vision": partial(script, *OFFLOAD, train_type="freeze_vision"),
    "bits-4": partial(step, "--bits", "4"),
    "anyres": partial(step, "--max_length", "4096", pictures="anyres", times=1 / 4),
    "trl": partial(other_code, "TRL"),
    "trl-no-recomputation": partial(other_code, "TRL, no checkpointing"),
    "plain-transformers": partial(other_code, "plain transformers"),
}
