"""Measures a run's throughput: tokens and pictures a second, waiting for data, memory, use of the matmul peak."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainingArguments

from train_llava.model import LoraArguments
from train_llava.training.memory import flops_per_token

# Values of a log entry, for the steps since the one before, with their labels
LOGGED = {
    "pictures_per_second": "pictures a second, on all devices",
    "tokens_per_second": "tokens a second, on all devices",
    "data_wait": "share of the time spent waiting for data",
    "mfu": "share of the device's matmul peak",
    "hfu": "the same, with what is recomputed",
    "matmul_share": "share of the matmul peak measured here",
    "memory_gb": "peak memory of a process, GB",
}
# FLOPs per second of dense bf16 products with sums in fp32, by NVIDIA's data sheets. The first name that stands as a
# whole in a device's name counts
PUBLISHED_PEAKS = json.loads(Path(__file__).with_name("published_peaks.json").read_text())


def print_log(*callback: Any, logs: dict[str, Any], **_: Any) -> None:
    """Prints a log entry with its numbers as numbers, where `Trainer` has strings, on the first process."""
    if callback[2].is_world_process_zero:  # the callback itself, the arguments, the state
        texts = [f"'{name}': {value:.4g}" for name, value in logs.items() if name != "total_flos"]
        tqdm.write(f"{{{', '.join(texts)}}}")


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of the GPU, or, without one, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # here, since Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the fastest of five products of two large square matrices."""
    side, times = 8192 if device.type == "cuda" else 512, []
    with torch.no_grad():
        # Random numbers: a GPU multiplies ones faster. They are not the run's own
        generator = torch.Generator(device).manual_seed(0)
        matrix = torch.randn(side, side, generator=generator, device=device, dtype=dtype)
        for _ in range(5):
            started = perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            times.append(perf_counter() - started)
    return 2 * side**3 / min(times)


def published_peak(name: str) -> float | None:
    """The peak of a GPU with that name, in FLOPs per second; None if it is not in the table."""
    for model, peak in PUBLISHED_PEAKS.items():
        if re.search(rf"\b{model}\b(?! Laptop)", name):
            return peak
    return None


class Throughput:
    """Counts the work of this process between two log entries. The other processes do as much."""

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int):
        self.device, self.processes, self.measured_peak = device, processes, matmul_peak(device, dtype)
        self.published_peak = None
        if device.type == "cuda" and dtype != torch.float32:
            self.published_peak = published_peak(torch.cuda.get_device_name(device))
        # FLOPs per token of the model, and with what activation checkpointing recomputes; 0: unknown
        self.model_flops = self.all_flops = 0.0
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, None

    def count_flops(
        self, config: Any, lora_arguments: LoraArguments, args: TrainingArguments, recompute: bool
    ) -> None:
        """Counts the FLOPs per token, if the model runs on the meta device."""
        with suppress(Exception):  # models raise errors of any type there
            self.model_flops = flops_per_token(config, lora_arguments, args)
            if recompute:
                self.all_flops = flops_per_token(config, lora_arguments, args, recompute)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time in the block as waiting for data. The run starts with the first wait."""
        begin = perf_counter()
        self.started = self.started or begin
        yield
        self.waited += perf_counter() - begin

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leaves out the time in the block, such as that of an evaluation."""
        begin = perf_counter()
        yield
        if self.started is not None:
            self.started += perf_counter() - begin

    def add(self, tokens: int, pictures: int) -> None:
        """Counts a batch."""
        self.tokens, self.pictures = self.tokens + tokens, self.pictures + pictures

    def read(self) -> dict[str, float]:
        """The values of `LOGGED` since the last call."""
        seconds = perf_counter() - self.started
        tokens_per_second = self.tokens / seconds  # of this process
        values = {
            "pictures_per_second": self.processes * self.pictures / seconds,
            "tokens_per_second": self.processes * tokens_per_second,
            "data_wait": self.waited / seconds,
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        # Without a published peak, the measured one takes its place
        peak = self.published_peak or self.measured_peak
        if self.model_flops:
            values["mfu"] = tokens_per_second * self.model_flops / peak
            if self.all_flops:
                values["hfu"] = tokens_per_second * self.all_flops / peak
            if self.published_peak:
                values["matmul_share"] = tokens_per_second * self.model_flops / self.measured_peak
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, perf_counter()
        return {name: float(f"{value:.3g}") for name, value in values.items()}


def describe_throughput(log_history: list[dict[str, Any]]) -> str:
    """A table of the throughput in a log: medians and ranges."""
    entries = [entry for entry in log_history if "tokens_per_second" in entry]
    entries, lines = entries[1:] or entries, []  # the first includes the start of the run
    for name, label in LOGGED.items():
        if values := [entry[name] for entry in entries if name in entry]:
            texts = [f"{n:,.3g}" if n < 1000 else f"{n:,.0f}" for n in (median(values), min(values), max(values))]
            lines.append(f"{label:<44}{texts[0]:>10}  ({texts[1]} to {texts[2]})")
    return "\n".join(lines)
