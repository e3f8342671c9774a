"""Measures a run's throughput: tokens and pictures a second, waiting for data, memory, use of the matmul peak."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from statistics import median
from time import perf_counter
from typing import Any

import psutil
import torch
from transformers import TrainingArguments

from train_llava.model import LoraArguments
from train_llava.training.memory import flops_per_token

# Values of a log entry, for the steps since the one before, with their labels
LOGGED = {
    "pictures_per_second": "pictures a second, on all devices",
    "tokens_per_second": "tokens a second, on all devices",
    "data_wait": "share of the time spent waiting for data",
    "mfu": "share of the device's matmul peak",
    "memory_gb": "peak memory of a process, GB",
}


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
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        for _ in range(5):
            started = perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            times.append(perf_counter() - started)
    return 2 * side**3 / min(times)


class Throughput:
    """Counts the work of this process between two log entries. The other processes do as much."""

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int):
        self.device, self.processes, self.rate = device, processes, matmul_peak(device, dtype)
        self.operations = 0.0  # FLOPs per token; 0: unknown
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, None

    def learn_operations(self, config: Any, lora_arguments: LoraArguments, args: TrainingArguments) -> None:
        """Counts the FLOPs per token, if the model runs on the meta device."""
        with suppress(Exception):  # models raise errors of any type there
            self.operations = flops_per_token(config, lora_arguments, args)

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
            "mfu": tokens_per_second * self.operations / self.rate,
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        if not self.operations:
            del values["mfu"]
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, perf_counter()
        return {name: float(f"{value:.3g}") for name, value in values.items()}


def read_throughput(log_history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """The throughput in a log, by the names of `LOGGED`, without the first entry if there are more."""
    entries = [entry for entry in log_history if "tokens_per_second" in entry]
    throughput: dict[str, list[float]] = {}
    for entry in entries[1:] or entries:  # the first includes the start of the run
        for name in LOGGED.keys() & entry.keys():
            throughput.setdefault(name, []).append(entry[name])
    return {name: throughput[name] for name in LOGGED if name in throughput}


def describe_throughput(log_history: list[dict[str, Any]]) -> str:
    """A table of the `read_throughput` of a log: medians and ranges."""
    lines = []
    for name, values in read_throughput(log_history).items():
        texts = [
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
            for value in (median(values), min(values), max(values))
        ]
        lines.append(f"{LOGGED[name]:<44}{texts[0]:>10}  ({texts[1]} to {texts[2]})")
    return "\n".join(lines)
