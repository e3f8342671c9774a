"""Trains the real shapes with random weights on a GPU, in every way; writes throughput, memory and loss to a table.

    bash benchmarks/gpu.sh

Each part is a run of its own: `bash run_zero2.sh` for some steps, in bf16, on 256 records of pictures and words drawn
by chance; then `benchmarks/speed.py`. A part that fails is a row with its error. The file is written anew at the end
of each part, so that a run that is stopped leaves what it has measured. The checkpoints, 26 GB, go to a temporary
folder (`TMPDIR`).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from PIL import Image
from speed import ON_GPU, make_apart
from transformers.utils import is_flash_attn_2_available

from train_llava.training.throughput import read_throughput

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
STEPS, RECORDS, MINUTES, PART_MINUTES = 12, 256, 28, 8
BATCH = {"4b": 8, "tiny": 2}  # records a device
CHECKPOINTED, ZERO3 = ["--activation_checkpointing", "true"], ["--deepspeed", "ds_zero3.json"]
PARTS = {  # what train_llava.train is told; nothing: the geometry that speed.py is asked for stands in the name
    "lora-zero2": ["--train_type", "lora", *CHECKPOINTED],
    "projector-zero2": ["--train_type", "projector", *CHECKPOINTED],
    "freeze_vision-zero2": ["--train_type", "freeze_vision", *CHECKPOINTED],
    "full-zero2": ["--train_type", "full", *CHECKPOINTED],
    "lora-zero3": ["--train_type", "lora", *CHECKPOINTED, *ZERO3],
    "full-zero3": ["--train_type", "full", *CHECKPOINTED, *ZERO3],
    "lora-flash": ["--train_type", "lora", *CHECKPOINTED, "--attn_implementation", "flash_attention_2"],
    "lora-packing": ["--train_type", "lora", *CHECKPOINTED, "--packing", "true"],
    "lora-bits4": ["--train_type", "lora", *CHECKPOINTED, "--bits", "4"],
    "lora-all-activations": ["--train_type", "lora"],
    "speed-4b": [],
    "speed-0.5b": [],
}
# a token each for the tokenizer of examples/openmoji/parts, so that a record has at most memory.py's 640
WORDS = ["a", "small", "red", "square", "on", "white", "with", "blue"]


def make_data(folder: Path) -> Path:
    """Writes records of a picture, a question and an answer of 16 to 47 words."""
    rng, records = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for i in range(RECORDS):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        colours.resize((640, 480)).save(folder / "images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nWhat is in this picture?"}
        answer = {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(16, 48)))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def end(process: subprocess.Popen) -> None:
    """Ends a command and all that it has started, DeepSpeed's ranks included."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def run(command: list, seconds: float) -> tuple[str, str]:
    """What a command prints, and in one line why it failed, or nothing. None of its processes is left, whatever ends
    this one."""
    if seconds <= 0:
        return "", "no time left"
    late = False
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                end(process)
        printed.seek(0)
        text = printed.read()
    if late:
        return text, f"not done after {seconds:.0f} seconds"
    if process.returncode == 0:
        return text, ""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()] or [f"exit {process.returncode}"]
    return text, ([line for line in lines if "rror: " in line] or lines)[-1]


def training_row(name: str, command: list, output_dir: Path, seconds: float) -> str:
    """Trains, and returns the row of it: medians of the throughput and the largest memory behind the first step."""
    text, error = run([*command, "--output_dir", output_dir], seconds)
    estimate = re.search(r"memory: about ([\d.]+) GB", text)
    cells = [""] * 3 + [estimate[1] if estimate else "", ""]
    if not error:
        log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
        rates, losses = read_throughput(log), [entry["loss"] for entry in log if "loss" in entry]
        cells[0] = f"{median(rates['tokens_per_second']):,.0f}"
        cells[1] = f"{100 * median(rates['mfu']):.2g}%" if "mfu" in rates else ""
        cells[2] = f"{max(rates['memory_gb']):.1f}"
        cells[4] = f"{losses[0]:.3f} → {losses[-1]:.3f}"
    shutil.rmtree(output_dir, ignore_errors=True)
    return f"| `{name}` | {' | '.join(cells)} | {error.replace('|', '/')} |"


def speed_table(name: str, geometry: str, folder: Path, seconds: float) -> str:
    """What speed.py prints, its progress left out."""
    few = ["--rounds", "1", "--steps", "2"] if geometry == "tiny" else ["--rounds", "2", "--steps", "8"]
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # of several, Trainer alone would take all
    command = ["env", f"CUDA_VISIBLE_DEVICES={one}", sys.executable, ROOT / "benchmarks/speed.py"]
    text, error = run([*command, "--work_dir", folder, "--geometry", geometry, *few], seconds)
    table = [line for line in text.splitlines() if line.startswith(("geometry ", "|"))]
    if error:
        return f"`{name}`: {error}"
    return "\n".join([f"`{name}`, {table[0]}", "", *table[1:]])


def head(geometry: str) -> str:
    """The machine, the versions and what is run."""
    where = "CPU"
    if ON_GPU:  # torch, asked for a name, would take memory of the GPU for as long as this program runs
        ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
        told = subprocess.run(ask, check=False, capture_output=True, text=True).stdout.strip()
        where = f"{torch.cuda.device_count()} x {told} (name, memory, driver)"
    return (
        f"{where}; torch {torch.__version__}; {date.today()}; geometry {geometry}, random weights, bf16, "
        f"{STEPS} steps of {BATCH[geometry]} records of up to 640 tokens a device\n\n"
        "| run | tokens/s | of the matmul peak | GB measured | GB estimated | loss, first → last | failed |\n"
        "|---|---:|---:|---:|---:|---:|---|"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=BATCH, default="4b", help="tiny: a trial, on any machine.")
    parser.add_argument("--output", type=Path, help="Default: benchmarks/results/gpu.md")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all, in this order.")
    arguments = parser.parse_args()
    geometry, output = arguments.geometry, (arguments.output or RESULTS / "gpu.md").resolve()
    if geometry == "tiny" and output.parent == RESULTS:
        sys.exit("error: a trial does not write into benchmarks/results: give --output FILE")
    if geometry != "tiny" and not ON_GPU:
        sys.exit("error: no GPU here: --geometry tiny --output FILE tries the command without one")
    if not output.parent.is_dir():
        sys.exit(f"error: --output: there is no folder {output.parent}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped"))  # by way of run, or what it started would go on
    end_time = time.monotonic() + 60 * MINUTES
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        print(f"making a model of random weights, geometry {geometry}", flush=True)
        data, model = make_data(folder / "data"), make_apart(geometry, folder)
        shutil.rmtree(folder / f"{geometry}-parts")
        train = ["bash", ROOT / "run_zero2.sh", "--model_name_or_path", model, "--data_path", data]
        train += ["--max_steps", STEPS, "--per_device_train_batch_size", BATCH[geometry], "--logging_steps", "1"]
        train += ["--bf16", "true", "--save_strategy", "no", "--report_to", "none"]
        train += ["--dataloader_num_workers", "8" if ON_GPU else "0"]
        rows, tables = [], []
        for i, name in enumerate(arguments.parts):
            left = end_time - time.monotonic()
            print(f"{i + 1} of {len(arguments.parts)}: {name}, {left / 60:.0f} minutes left", flush=True)
            seconds = min(left, 60 * PART_MINUTES)
            if name.startswith("speed-"):
                asked = "tiny" if geometry == "tiny" else name.removeprefix("speed-")
                told, written = tables, speed_table(name, asked, folder, seconds)
            elif name == "lora-flash" and not is_flash_attn_2_available():
                told, written = rows, f"| `{name}` |  |  |  |  |  | flash_attn is not installed |"
            else:
                told, written = rows, training_row(name, [*train, *PARTS[name]], folder / "run", seconds)
            told.append(written)
            print(written, flush=True)
            whole = output.with_name(output.name + ".part")
            whole.write_text("\n\n".join(["\n".join([head(geometry), *rows]), *tables]) + "\n", encoding="utf-8")
            whole.replace(output)
    print(f"written to {output}")


if __name__ == "__main__":
    main()
