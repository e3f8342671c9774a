"""Compares the time that a run prints before its first step with that of its steps.

    PYTHONPATH=. python benchmarks/run_time.py > benchmarks/results/run_time.md     after the two examples have run

Each row is a run in a process of its own, on one rank of one thread. It prints its `time:` for 10,000 times its steps,
so that the line has enough digits, and stops behind its steps. All times are processor time, which other work on the
machine changes little. Steps are whole, with data and the update of the weights.
"""

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time

from transformers import TrainerCallback

TOY = "recipes/openmoji-stage{}.yaml"
PACKED = ["--packing", "true", "--tokens_per_batch", "1600"]
RUNS = {  # name: steps, arguments
    "toy example, stage 1": (60, [TOY.format(1)]),
    "toy example, stage 2": (60, [TOY.format(2)]),
    "toy example, stage 2, packed": (60, [TOY.format(2), *PACKED]),
    "SmolLM2 (LoRA)": (12, ["recipes/smollm2.yaml"]),
}
LONGER = 10_000


class Timer(TrainerCallback):
    """Notes when the first step begins, and ends the run behind the last."""

    def __init__(self, steps: int):
        self.steps, self.times = steps, []

    def on_step_begin(self, args, state, control, **_):
        self.times += [] if self.times else [time.process_time()]

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.steps:
            self.times.append(time.process_time())
            raise KeyboardInterrupt


def measure(name: str) -> None:
    """Prints the seconds a step, foretold and measured, as JSON."""
    import torch

    from train_llava import train
    from train_llava.trainer import LlavaTrainer
    from train_llava.training import throughput

    torch.set_num_threads(1)
    throughput.perf_counter = time.process_time
    (steps, words), printed, timer, begin = RUNS[name], io.StringIO(), None, LlavaTrainer.__init__
    timer = Timer(steps)

    def begin_with_timer(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.add_callback(timer)

    LlavaTrainer.__init__ = begin_with_timer
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--max_steps", steps * LONGER, "--output_dir", folder, "--eval_strategy", "no"]
        words += ["--eval_answers", 0, "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1000"]
        sys.argv = ["train", *map(str, words)]
        with contextlib.redirect_stdout(printed), contextlib.suppress(KeyboardInterrupt):
            train.main()
    hours = float(re.search(r"^time: about ([\d.]+) h ", printed.getvalue(), re.MULTILINE)[1])
    print(json.dumps([hours * 3600 / steps / LONGER, (timer.times[1] - timer.times[0]) / steps]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--measure", choices=RUNS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    print("| run | a step by `time:` | measured | off by |\n|---|---:|---:|---:|")
    for name in args.runs:
        command = [sys.executable, __file__, "--measure", name]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        foretold, measured = json.loads(done.stdout.splitlines()[-1])
        print(f"| {name} | {foretold:.3g} s | {measured:.3g} s | {foretold / measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
