"""Trains the toy example in every mode, with the same data and number of steps, and scores it on held-out pictures.

    python examples/openmoji/compare_modes.py                                  prints the table of modes.json
    python examples/openmoji/compare_modes.py --results output/modes.json      measures on the scenes
    python examples/openmoji/compare_modes.py --results output/modes.json --modes "projector alone" --seeds 0

It starts from the assembled model and the data that `bash run_zero2.sh` left in output/openmoji. Each run is
a process of one thread; two run at a time. A mode has one stage or two. With two, the first trains the
projector alone and takes a quarter of the steps. After each run the file gets its result: the exact match
with its interval, the minutes, the memory and the loss curve. Runs that the file has already are skipped.
docs/speed.md shows the table. The runs in modes.json were made on the example's former data, captions of emoji.
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
from statistics import mean, median
from threading import Lock

import torch
from tqdm import tqdm

HERE = Path(__file__).parent
EXAMPLE = Path("output/openmoji")
STEPS, BATCH = 600, 32
RATE = 1.5e-3  # for small models; the 4B setup takes 2e-5


def full_at(rate: float) -> list[str]:
    """Full training with one rate for every module. By default the tower's is a tenth of the language model's."""
    arguments = ["--train_type", "full"]
    for module in ("", "projector_", "vision_"):
        arguments += [f"--{module}learning_rate", f"{rate}"]
    return arguments


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
    """The modes of an example. A mode is a list of one or two stages, a stage a list of training arguments."""

    folder: Path  # the output of the example's run, with llava/ and the data
    train: list[str]  # data paths in that folder
    heldout: str
    modes: dict[str, list[list[str]]]
    steps: int
    batch: int
    arguments: list[str] = field(default_factory=list)  # of every training run
    evaluation: list[str] = field(default_factory=list)  # of every evaluation


OPENMOJI = Comparison(EXAMPLE, ["data/train"], "data/heldout", MODES, STEPS, BATCH)


def run(command: str, *arguments: str) -> None:
    """Runs a command of the package, or another module, in one thread."""
    command = [sys.executable, "-m", command if "." in command else f"train_llava.{command}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout.decode()[-2000:]}")


def thinned(curve: list[list[float]], points: int = 20, window: int = 5) -> list[list[float]]:
    """At most `points` of a loss curve, evenly spaced; each is the mean of the `window` logged losses up to it."""
    first, last = min(window, len(curve)) - 1, len(curve) - 1
    thin = []
    for i in sorted({round(first + (last - first) * k / (points - 1)) for k in range(points)}):
        step, _ = curve[i]
        thin.append([step, round(mean(loss for _, loss in curve[max(0, i - window + 1) : i + 1]), 6)])
    return thin


def train_and_score(compared: Comparison, mode: str, seed: int, folder: Path) -> tuple[dict, list[str]]:
    """Trains one mode with one seed; returns its scores on held-out pictures and the arguments that load it."""
    base, adapter, seconds, memory, curve = compared.folder / "llava", [], 0.0, [], []
    stages = compared.modes[mode]
    for number, stage in enumerate(stages):
        # the stage's training run
        share = 1.0 if len(stages) == 1 else (0.25, 0.75)[number]
        output = folder / f"stage{number + 1}"
        arguments = [*stage, *compared.arguments, "--model_name_or_path", str(base)]
        arguments += ["--data_path", *(str(compared.folder / path) for path in compared.train)]
        arguments += ["--output_dir", str(output), "--per_device_train_batch_size", str(compared.batch)]
        arguments += ["--seed", str(seed), "--max_steps", str(round(compared.steps * share))]
        arguments += ["--save_strategy", "no", "--preflight", "false"]
        run("train", *arguments, "--disable_tqdm", "true")

        # its time, memory and losses; steps count on from the stage before
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        memory += [entry["memory_gb"] for entry in history if "memory_gb" in entry]
        seconds += history[-1]["train_runtime"]
        first_step = curve[-1][0] if curve else 0
        curve += [[first_step + entry["step"], entry["loss"]] for entry in history if "loss" in entry]
        if "lora" in stage:
            adapter = ["--adapter_name_or_path", str(output)]
        else:
            base = output

    # the answers to held-out questions
    model = ["--model_name_or_path", str(base), *adapter]
    questions = ["--data_path", str(compared.folder / compared.heldout), "--output_dir", str(folder / "scores")]
    run("evaluate", *model, *questions, "--batch_size", "64", "--max_new_tokens", "48", *compared.evaluation)
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
        "loss": thinned(curve),
    }
    return scores, model


def measure(compared: Comparison, mode: str, seed: int, folder: Path) -> dict:
    """Trains and scores one mode with one seed."""
    scores, _ = train_and_score(compared, mode, seed, folder)
    chinese = json.loads((folder / "scores/metrics.json").read_text())["by_language"]["zh"]
    return scores | {"exact_match_zh": chinese["exact_match"]}


def keep(results: list[dict], file: Path) -> None:
    """Writes the results so far; the file is never half-written."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, file)


def by_mode(modes: dict, results: list[dict]) -> dict[str, list[dict]]:
    """The longest runs of each mode, sorted by exact match, so that the median run is in the middle."""
    longest: dict[str, list[dict]] = {}
    for mode in modes:
        runs = [result for result in results if result["mode"] == mode]
        most_steps = max((run["steps"] for run in runs), default=0)
        if runs:
            runs = [run for run in runs if run["steps"] == most_steps]
            longest[mode] = sorted(runs, key=lambda run: run["exact_match"])
    return longest


def table(results: list[dict]) -> str:
    """The results as a Markdown table."""
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
    """The results in `file`, or with `--results` those of that file after the missing runs were made, two at a time.

    Raises:
        SystemExit: a file that the runs start from is missing, or a run fails; then no other run starts.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", default=list(compared.modes), choices=compared.modes, help="Default: all."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=seeds)
    parser.add_argument(
        "--steps", type=int, default=compared.steps, help="40 or more; 40 are enough for time and memory."
    )
    parser.add_argument("--results", type=Path, help="The file to read, add to and write.")
    args = parser.parse_args()
    if args.results is None:
        return json.loads(file.read_text())
    if args.steps < 40:
        raise SystemExit(f"compare_modes: --steps {args.steps}: take 40 or more, as a first stage takes a quarter")
    compared = replace(compared, steps=args.steps)

    # the example's run has to be complete
    needed = [compared.folder / name for name in ("llava", *compared.train, compared.heldout)]
    needed += [Path(word) for word in compared.evaluation if not word.startswith("--")]
    for path in needed:
        if not path.exists():
            raise SystemExit(f"compare_modes: {path} is missing: finish the example's run first")

    # the runs that the file lacks
    args.results.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.results.read_text()) if args.results.exists() else []
    done = {(result["mode"], result["seed"], result["steps"]) for result in results}
    if unknown := {mode for mode, *_ in done} - compared.modes.keys():
        raise SystemExit(f"compare_modes: {args.results} has the unknown mode {unknown.pop()}: choose another file")
    missing = [(mode, seed) for seed in args.seeds for mode in args.modes if (mode, seed, args.steps) not in done]
    lock = Lock()

    def measure_and_keep(mode: str, seed: int, folder: Path) -> None:
        result = measure(compared, mode, seed, folder)
        with lock:
            results.append(result)
            results.sort(key=lambda result: (list(compared.modes).index(result["mode"]), result["seed"]))
            keep(results, args.results)

    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(max_workers=2) as pool:
        running = [pool.submit(measure_and_keep, *each, Path(work) / f"{i}") for i, each in enumerate(missing)]
        try:
            for finished in tqdm(as_completed(running), total=len(missing), desc="runs", disable=not missing):
                finished.result()
        except BaseException:  # also after Ctrl-C, or the waiting runs would go on for hours
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return results


if __name__ == "__main__":
    print(table(compare(__doc__, OPENMOJI, measure, [0, 1, 2], HERE / "modes.json")))
