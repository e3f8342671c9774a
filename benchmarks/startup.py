"""Times what every command takes for `--help` and for a wrong argument, beside `python -c "import torch"`.

    PYTHONPATH=. python benchmarks/startup.py > benchmarks/results/startup.md

Processor time, user and system, of a process of its own each, which other work on the machine changes little; all take
turns in every round.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
COMMANDS = ["train", "build_model", "infer", "evaluate", "merge_lora", "check_data", "web_demo", "export_gguf"]
WORDS = ("--help", "--no_such_argument")


def seconds(words: list[str], code: int) -> float:
    """The processor time of Python with these words, which has to end with that exit code."""
    before = os.times()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    after = os.times()
    if done.returncode != code:
        raise ValueError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr}")
    return after.children_user + after.children_system - before.children_user - before.children_system


def row(name: str, times: list[float], torch_times: list[float]) -> str:
    """A line of the table: the median and range of the times, and of their ratio to torch's of the same round."""
    ratios = [mine / torch for mine, torch in zip(times, torch_times, strict=True)]
    cells = [f"{statistics.median(v):.2f} ({min(v):.2f}-{max(v):.2f})" for v in (times, ratios)]
    return f"| {name} | {cells[0]} | {cells[1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch_times: list[float] = []
    times: dict[str, list[float]] = {f"`{name} {word}`": [] for name in COMMANDS for word in WORDS}
    for _ in tqdm(range(rounds), desc="rounds"):
        torch_times.append(seconds(["-c", "import torch"], 0))
        for name in COMMANDS:
            for word in WORDS:
                taken = seconds(["-m", f"train_llava.{name}", word], int(word != "--help"))
                times[f"`{name} {word}`"].append(taken)
    print("| | seconds of a processor | times `import torch` |\n|---|---:|---:|")
    print(row('`python -c "import torch"`', torch_times, torch_times))
    for name, values in times.items():
        print(row(name, values, torch_times))
    print(f"\n{rounds} rounds; median and range.")


if __name__ == "__main__":
    main()
