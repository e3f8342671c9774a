"""What a run tells of its pace: tokens and pictures a second, waiting for data, memory, how busy the device is."""

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

# What an entry of the log says of the steps since the last one
LOGGED = {
    "pictures_per_second": "pictures a second, on all devices",
    "tokens_per_second": "tokens a second, on all devices",
    "data_wait": "share of the time spent waiting for data",
    "mfu": "share of the device's multiplication rate",
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
    """The floating-point operations a second of the fastest of five products of two large square matrices."""
    side, times = 8192 if device.type == "cuda" else 512, []
    with torch.no_grad():
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        for _ in range(5):
            started = perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            times.append(perf_counter() - started)
    return 2 * side**3 / min(times)


class Throughput:
    """Counts what this process does between two entries of the log; the other processes do as much."""

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int):
        self.device, self.processes, self.rate = device, processes, matmul_peak(device, dtype)
        self.operations = 0.0  # of a token; 0: not known
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, None

    def learn_operations(self, config: Any, lora_arguments: LoraArguments, args: TrainingArguments) -> None:
        """Counts the operations of a token, where the model can be run without numbers."""
        with suppress(Exception):  # models raise anything there
            self.operations = flops_per_token(config, lora_arguments, args)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in it is spent waiting for data; the first wait is where the run starts."""
        begin = perf_counter()
        self.started = self.started or begin
        yield
        self.waited += perf_counter() - begin

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """The time in it does not count, as that of an evaluation."""
        begin = perf_counter()
        yield
        if self.started is not None:
            self.started += perf_counter() - begin

    def add(self, tokens: int, pictures: int) -> None:
        """Counts a batch."""
        self.tokens, self.pictures = self.tokens + tokens, self.pictures + pictures

    def read(self) -> dict[str, float]:
        """What `LOGGED` names, since it was last asked."""
        seconds = perf_counter() - self.started
        each = self.tokens / seconds
        read = {
            "pictures_per_second": self.processes * self.pictures / seconds,
            "tokens_per_second": self.processes * each,
            "data_wait": self.waited / seconds,
            "mfu": each * self.operations / self.rate,
            "memory_gb": peak_memory(self.device) / 1e9,
        }
        if not self.operations:
            del read["mfu"]
        self.tokens = self.pictures = 0
        self.waited, self.started = 0.0, perf_counter()
        return {name: float(f"{value:.3g}") for name, value in read.items()}


def read_throughput(log_history: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the entries of a log say of the pace, by the names of `LOGGED`; a name that none of them has is left out.

    The first entry is left out where there are more: it has the start in it.
    """
    entries = [entry for entry in log_history if "tokens_per_second" in entry]
    found = {name: [entry[name] for entry in entries[len(entries) > 1 :] if name in entry] for name in LOGGED}
    return {name: values for name, values in found.items() if values}


def describe_throughput(log_history: list[dict[str, Any]]) -> str:
    """A table of what `read_throughput` finds: medians and ranges; nothing where the log has none."""
    lines = []
    for name, values in read_throughput(log_history).items():
        shown = [
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"
            for value in (median(values), min(values), max(values))
        ]
        lines.append(f"{LOGGED[name]:<44}{shown[0]:>10}  ({shown[1]} to {shown[2]})")
    return "\n".join(lines)
