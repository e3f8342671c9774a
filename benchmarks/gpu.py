"""Measures a training step of the 4B setup on one GPU (80 GB) in many variants, in a slot of 15 minutes.

    bash benchmarks/gpu.sh                                                  all, in the order of `VARIANTS`
    bash benchmarks/gpu.sh --variants no-dropout compiled --output some.md  these alone
    bash benchmarks/gpu.sh --geometry tiny --output tiny.md                 a trial, on any machine

The file gets a row after each variant, so that a command that is ended leaves what it has measured. The same command
goes on behind the rows that are there; remove the file to begin anew. What the runs print is in `FILE.log`.

Five steps warm up, fifteen are timed, and one runs under PyTorch's profiler. `idle` is the share of the median step in
which no kernel ran. With `zero` in its name, a variant is a run of `run_zero2.sh` from a checkpoint. The first losses
of variants that compute the same agree.
"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import date
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from gpu_variants import COLUMNS, ROOT, VARIANTS, Row, Slot
from speed import ON_GPU

RESULTS, VARIANT_MINUTES = ROOT / "benchmarks/results", 5


def measure(variant: Callable[..., Row], slot: Slot) -> tuple[Row, bool]:
    """The row of a variant, and whether this process can measure another one."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    usable = True
    try:
        row = variant(slot=slot)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        row, usable = {"note": f"{type(error).__name__}: {error}"}, not isinstance(error, torch.AcceleratorError)
    gc.collect()
    if ON_GPU and usable:
        torch.cuda.empty_cache()
        usable = torch.cuda.memory_allocated() < 1e9
    return row, usable and "liger_kernel" not in sys.modules  # which replaces functions of transformers


def work(connection: Connection, slot: Slot, log: str) -> None:
    """Measures the variants that come, for as long as it can; what they print goes to a file."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    usable = True
    while usable:
        name, variant = connection.recv()
        print(f"\n== {name}", flush=True)
        row, usable = measure(variant, slot)
        connection.send((row, usable))


def end(process: Any) -> None:
    """Ends a process and all that it has started, DeepSpeed's ranks included."""
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        for each in [*root.children(recursive=True), root]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.join()


def rows_of(names: list[str], slot: Slot, log: str, minutes: float) -> Iterator[tuple[str, Row]]:
    """The rows of variants while there is time, each as soon as it is there, from processes that last as they can."""
    deadline, process = time.monotonic() + 60 * minutes, None
    try:
        for name in names:
            if process is None:
                connection, theirs = Pipe()
                process = get_context("spawn").Process(target=work, args=(theirs, slot, log))
                process.start()
                theirs.close()  # or its end would not be noticed
            connection.send((name, VARIANTS[name]))
            seconds, usable = min(60 * VARIANT_MINUTES, deadline - time.monotonic()), False
            if connection.poll(max(0, seconds)):
                try:
                    row, usable = connection.recv()
                except EOFError:
                    process.join()
                    row = {"note": f"the process ended with exit code {process.exitcode}"}
            elif time.monotonic() < deadline:
                row = {"note": f"not done after {seconds:.0f} seconds"}
            else:
                return
            if not usable:
                end(process)
                process = None
            yield name, row
    finally:
        if process is not None:
            end(process)


def head(geometry: str, slot: Slot) -> str:
    """The machine, the versions and what is measured, and the table's first lines."""
    where = "CPU, operators in place of kernels"
    if ON_GPU:  # torch, asked for a name, would take memory of the GPU for as long as this process runs
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
        where = f"{subprocess.run(ask, capture_output=True, text=True).stdout.strip()} (name, memory, driver)"
    what = f"geometry {geometry}, random weights, {slot.records} records a batch"
    return (
        f"{where}; torch {torch.__version__}; {date.today()}; {what}, {slot.steps - slot.warm} steps timed\n\n"
        f"| variant | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}---|\n"
    )


def main() -> None:
    # The arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=["4b", "tiny"], default="4b", help="tiny: a trial, on any machine.")
    parser.add_argument("--output", type=Path, help="Default: benchmarks/results/gpu_steps.md")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Default: all.")
    parser.add_argument("--minutes", type=float, default=15, help="What is not done by then is left out.")
    arguments = parser.parse_args()
    geometry, output = arguments.geometry, (arguments.output or RESULTS / "gpu_steps.md").resolve()
    if geometry == "tiny" and output.parent == RESULTS:
        sys.exit("error: a trial does not write into benchmarks/results: give --output FILE")
    if geometry != "tiny" and not ON_GPU:
        sys.exit("error: no GPU here: --geometry tiny --output FILE tries the command without one")
    if not output.parent.is_dir():
        sys.exit(f"error: --output: there is no folder {output.parent}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))  # by way of `finally`, or a process would go on
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]

    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        # The table as far as it is
        sizes = (8, 5, 20) if geometry == "4b" else (2, 1, 3)
        slot = Slot(Path(folder), geometry == "4b", *sizes)
        text = head(geometry, slot)
        if output.exists():
            found = output.read_text(encoding="utf-8")
            if not found.startswith(text):
                sys.exit(f"error: {output} is of another machine, version or day: remove it to measure anew")
            text = found.partition("\nNo time")[0]
        left = [name for name in arguments.variants if f"\n| {name} |" not in text]

        # The rows that it lacks
        output.write_text(text, encoding="utf-8")
        with output.open("a", encoding="utf-8") as file:
            for name, row in rows_of(list(left), slot, f"{output}.log", arguments.minutes):
                cells = [" ".join(row.get(column, "").split()).replace("|", "/") for column in COLUMNS]
                line = f"| {name} | {' | '.join(cells)} |"
                print(line, flush=True)
                print(line, file=file, flush=True)
                left.remove(name)
            if left:
                print(f"\nNo time was left for: {', '.join(left)}", file=file)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
