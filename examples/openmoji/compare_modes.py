"""Trains the example's LLaVA in every mode, on the same data for as many steps, and scores each on held-out pictures.

    python examples/openmoji/compare_modes.py                                  the table of what modes.json holds
    python examples/openmoji/compare_modes.py --results output/modes.json      measured anew, in an hour on two cores
    python examples/openmoji/compare_modes.py --results output/modes.json --modes "projector alone" --seeds 0

It starts from what `bash run_zero2.sh` left in output/openmoji: the assembled model and the data. Each run is one
process of one thread, two at a time. A mode is one stage or two; where it is two, the first trains the projector alone
and takes a quarter of the steps. What was measured goes into the file as each run ends: exact match on the held-out
pictures with the interval it lies in, the minutes and the memory training took, and the loss curve. A run that the
file holds already is not made again. The table at the end is that of docs/speed.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from threading import Lock

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
EXAMPLE = Path("output/openmoji")
STEPS, BATCH = 600, 32
RATE = 1.5e-3  # the example's parts are small; the 4B setup takes 2e-5


def full_at(rate: float) -> list[str]:
    """Training in full with one rate for every module; by itself the tower takes a tenth of the language model's."""
    rates = [f"--{module}learning_rate" for module in ("", "projector_", "vision_")]
    return ["--train_type", "full", *(word for name in rates for word in (name, f"{rate}"))]


ALIGN = ["--train_type", "projector", "--learning_rate", "5e-3"]
LORA = ["--train_type", "lora", "--lora_r", "16", "--lora_alpha", "32", "--learning_rate", f"{2 * RATE}"]
FREEZE_VISION = ["--train_type", "freeze_vision", "--learning_rate", f"{RATE}"]
FULL = ["--train_type", "full", "--learning_rate", f"{RATE}"]
MODES = {
    "full, all at 4e-4, one stage": [full_at(4e-4)],
    "full, all at 1.5e-3, one stage": [full_at(RATE)],
    "full, rates by module, one stage": [FULL],
    "full, rates by module, two stages": [ALIGN, FULL],
    "freeze_vision, one stage": [FREEZE_VISION],
    "freeze_vision, two stages": [ALIGN, FREEZE_VISION],
    "LoRA, one stage": [[*LORA, "--projector_learning_rate", f"{RATE}"]],
    "LoRA, two stages": [ALIGN, [*LORA, "--projector_learning_rate", f"{RATE}"]],
    "LoRA, projector left random": [[*LORA, "--projector_learning_rate", "0"]],
    "projector alone": [ALIGN],
}


@dataclass
class Comparison:
    """What is compared: modes of one or two stages, each the arguments of a training run, on an example's data."""

    folder: Path  # what the example's run has left: llava/ and the data
    train: list[str]  # data paths in it
    heldout: str
    modes: dict[str, list[list[str]]]
    steps: int
    batch: int
    arguments: list[str] = field(default_factory=list)  # of every training run
    evaluation: list[str] = field(default_factory=list)  # of every evaluation


OPENMOJI = Comparison(EXAMPLE, ["data/train"], "data/heldout", MODES, STEPS, BATCH)


def run(command: str, *arguments: str) -> None:
    """Runs a command of the package, or a module, in one thread."""
    command = [sys.executable, "-m", command if "." in command else f"train_llava.{command}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout.decode()[-2000:]}")


def train_and_score(compared: Comparison, mode: str, seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Trains one mode with one seed; returns its scores on the held-out pictures, and the arguments that open it."""
    base, adapter, seconds, memory, curve = compared.folder / "llava", [], 0.0, [], []
    stages = compared.modes[mode]
    for number, stage in enumerate(stages):
        share = 1.0 if len(stages) == 1 else (0.25, 0.75)[number]
        output = folder / f"stage{number + 1}"
        arguments = [*stage, *compared.arguments, "--model_name_or_path", str(base)]
        arguments += ["--data_path", *(str(compared.folder / path) for path in compared.train)]
        arguments += ["--output_dir", str(output), "--per_device_train_batch_size", str(compared.batch)]
        arguments += ["--seed", str(seed), "--max_steps", str(round(compared.steps * share))]
        arguments += ["--save_strategy", "no", "--preflight", "false"]
        run("train", *arguments, "--disable_tqdm", "true")
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        memory += [entry["memory_gb"] for entry in history if "memory_gb" in entry]
        seconds += history[-1]["train_runtime"]
        before = curve[-1][0] if curve else 0
        curve += [[before + entry["step"], entry["loss"]] for entry in history if "loss" in entry]
        if "lora" in stage:
            adapter = ["--adapter_name_or_path", str(output)]
        else:
            base = output
    opened = ["--model_name_or_path", str(base), *adapter]
    asked = ["--data_path", str(compared.folder / compared.heldout), "--output_dir", str(folder / "scores")]
    run("evaluate", *opened, *asked, "--batch_size", "64", "--max_new_tokens", "32", *compared.evaluation)
    metrics = json.loads((folder / "scores/metrics.json").read_text())
    english = metrics["by_language"]["en"]
    scores = {
        "mode": mode,
        "seed": seed,
        "exact_match": english["exact_match"],
        "interval": english["intervals"]["exact_match"],
        "n": english["n"],
        "steps": compared.steps,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "minutes": seconds / 60,
        "peak_gb": max(memory),
        "loss": curve,
    }
    return scores, opened


def measure(compared: Comparison, mode: str, seed: int, folder: Path) -> dict:
    """Trains and scores one mode with one seed."""
    scores, _ = train_and_score(compared, mode, seed, folder)
    chinese = json.loads((folder / "scores/metrics.json").read_text())["by_language"]["zh"]
    return scores | {"exact_match_zh": chinese["exact_match"]}


def keep(results: list[dict], file: Path) -> None:
    """Writes what was measured so far; the file is never half."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(beside, file)


def by_mode(modes: dict, results: list[dict]) -> dict[str, list[dict]]:
    """Of each mode the runs of most steps by rising exact match, so that the median run stands in the middle."""
    runs: dict[str, list[dict]] = {}
    for result in sorted(results, key=lambda r: (list(modes).index(r["mode"]), r["exact_match"])):
        runs.setdefault(result["mode"], []).append(result)
    return {mode: [r for r in found if r["steps"] == max(r["steps"] for r in found)] for mode, found in runs.items()}


def table(results: list[dict]) -> str:
    """The Markdown table of what was measured."""
    lines = [
        "| mode | seeds | English, median | range | 95 % of that run | Chinese | minutes | peak GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, runs in by_mode(MODES, results).items():
        middle = runs[len(runs) // 2]
        scores = " to ".join(f"{r['exact_match']:.1%}" for r in (runs[0], runs[-1]))
        interval = " to ".join(f"{bound:.1%}" for bound in middle["interval"])
        chinese, minutes, memory = (median(r[key] for r in runs) for key in ("exact_match_zh", "minutes", "peak_gb"))
        lines.append(
            f"| {mode} | {len(runs)} | {middle['exact_match']:.1%} | {scores} | {interval} | {chinese:.1%} | "
            f"{minutes:.1f} | {memory:.2f} |"
        )
    return "\n".join(lines)


def compare(
    doc: str, compared: Comparison, measure: Callable[[Comparison, str, int, Path], dict], seeds: list[int], file: Path
) -> list[dict]:
    """The results in `file`; with `--results` those in that file, where the runs that it lacks are made, two at once.

    Raises:
        SystemExit: what the runs start from is not there, or a run fails; those that wait are not begun.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", default=list(compared.modes), choices=compared.modes, help="Default: all."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument(
        "--steps", type=int, default=compared.steps, help="40 or more, which tell time and memory; default: all."
    )
    parser.add_argument("--results", type=Path, help="The file of what is measured, or was.")
    args = parser.parse_args()
    if args.results is None:
        return json.loads(file.read_text())
    if args.steps < 40:
        raise SystemExit(f"compare_modes: --steps {args.steps}: take 40 or more, of which a first stage has a quarter")
    compared = replace(compared, steps=args.steps)
    needed = [compared.folder / name for name in ("llava", *compared.train, compared.heldout)]
    needed += [Path(word) for word in compared.evaluation if not word.startswith("--")]
    for path in needed:
        if not path.exists():
            raise SystemExit(f"compare_modes: no {path}, which this starts from: let the example's run end first")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text()) if args.results.exists() else []
    done = {(result["mode"], result["seed"], result["steps"]) for result in results}
    if other := {mode for mode, *_ in done} - compared.modes.keys():
        raise SystemExit(f"compare_modes: {args.results} has {other.pop()}, no mode of this: choose another file")
    left = [(mode, seed) for seed in args.seeds for mode in args.modes if (mode, seed, args.steps) not in done]
    lock = Lock()

    def measure_and_keep(mode: str, seed: int, folder: Path) -> None:
        result = measure(compared, mode, seed, folder)
        with lock:
            results.append(result)
            results.sort(key=lambda result: (list(compared.modes).index(result["mode"]), result["seed"]))
            keep(results, args.results)

    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(measure_and_keep, *each, Path(work) / f"{i}") for i, each in enumerate(left)]
        try:
            for finished in tqdm(as_completed(running), total=len(left), desc="runs", disable=not left):
                finished.result()
        except BaseException:  # Ctrl-C is one: what waits would still be trained, for hours
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


if __name__ == "__main__":
    print(table(compare(__doc__, OPENMOJI, measure, [0, 1, 2], HERE / "modes.json")))
