"""What fewer tokens a picture change: computed for a large pair, and measured on the toy example's scenes.

    PYTHONPATH=. python benchmarks/pixel_shuffle.py computed                     for results/pixel_shuffle.md
    PYTHONPATH=. python benchmarks/pixel_shuffle.py measured --work_dir FOLDER   for results/pixel_shuffle_scenes.md

`computed` loads nothing: SigLIP 2 so400m/16-384 with Qwen1.5-4B-Chat is on the meta device. `measured` trains the
toy example's language model with a small SigLIP, both as `siglip_qwen3.py` and the example make them, in full: as a
LLaVA, and with 2 x 2 and 3 x 3 patches in a token. Each is trained for the same number of steps, and for as many as
take the time of the LLaVA's. A row is appended to FOLDER/runs.jsonl after each run; a run that is there is left out.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import torch
from memory import QWEN, largest_batch
from siglip_qwen3 import make_parts
from transformers import Idefics3Config, LlavaConfig, SiglipVisionConfig

from train_llava.build_model import BuildArguments, build_model
from train_llava.model import LoraArguments
from train_llava.training.memory import (
    ANSWER,
    TEXT,
    activation_bytes,
    empty_model,
    flops_per_token,
    model_state_bytes,
    picture_features,
)

# The published configuration of google/siglip2-so400m-patch16-384: 24 x 24 patches
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
}
FOLDS = {"LLaVA": None, "`--pixel_shuffle 2`": 2, "`--pixel_shuffle 3`": 3, "`--pixel_shuffle 4`": 4}
LANGUAGE_MODEL = "examples/openmoji/parts/qwen2"
SEEDS, STEPS = 3, 1500


def configuration(fold: int | None) -> LlavaConfig | Idefics3Config:
    """The large pair as a LLaVA or, with fewer tokens, as an Idefics3."""
    if fold is not None:
        return Idefics3Config(vision_config=SIGLIP, text_config=QWEN, scale_factor=fold)
    vision = SiglipVisionConfig(**SIGLIP, vision_use_head=False)
    return LlavaConfig(vision_config=vision, text_config=QWEN, vision_feature_select_strategy="full")


def print_computed() -> None:
    """Prints tokens, FLOPs and the largest batches with LoRA, for a record of one picture and `TEXT` tokens."""
    print(f"LoRA; a record has a picture, {TEXT - ANSWER} tokens of a prompt and {ANSWER} of an answer.\n")
    print("| | tokens a picture | tokens a record | TFLOP a record | records, 24 GB | records, 80 GB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, fold in FOLDS.items():
        config, lora = configuration(fold), LoraArguments()
        llava, model = empty_model(config, "lora", lora, torch.bfloat16)
        sizes, step = model_state_bytes(model, torch.bfloat16, zero=2)
        picture = len(picture_features(llava, 1))
        tokens = picture + TEXT + 3 * (fold is not None)  # with those around the picture
        batches = [(n, tokens, n, n * ANSWER) for n in (1, 2)]
        one, two = (sum(activation_bytes(llava, *batch, recompute=False).values()) for batch in batches)
        cards = [str(largest_batch(sum(sizes.values()), step, one, two, card)) for card in (24, 80)]
        args = SimpleNamespace(train_type="lora", frozen_parts=())
        flops = flops_per_token(config, lora, args) * (picture + TEXT)
        print(f"| {name} | {picture} | {tokens} | {flops / 1e12:.2f} | {' | '.join(cards)} |", flush=True)


def run(*command: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)


def one_run(work: Path, fold: int | None, seed: int, steps: int) -> dict[str, float]:
    """Trains a model for so many steps and asks it the 880 held-out questions."""
    model, output = work / f"model-{fold}", work / f"run-{fold}-{seed}-{steps}"
    if not model.exists():
        options = {"vision_feature_layer": -1} if fold is None else {"pixel_shuffle": fold}
        build_model(BuildArguments(str(work / "parts/siglip"), LANGUAGE_MODEL, str(model), **options))
    command = ["train_llava.train", "--train_type", "full", "--model_name_or_path", model, "--output_dir", output]
    command += ["--data_path", work / "data/train", "--max_steps", steps, "--seed", seed, "--save_strategy", "no"]
    command += ["--per_device_train_batch_size", 32, "--learning_rate", 1e-3, "--projector_learning_rate", 2e-3]
    run(*command, "--vision_learning_rate", 1e-3, "--preflight", "false", "--report_to", "none")
    score = ["train_llava.evaluate", "--model_name_or_path", output, "--data_path", work / "data/heldout"]
    run(*score, "--output_dir", output / "evaluation")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    seconds = next(entry["train_runtime"] for entry in log if "train_runtime" in entry)
    memory = max(entry["memory_gb"] for entry in log if "memory_gb" in entry)
    right = json.loads((output / "evaluation/metrics.json").read_text())["exact_match"]
    return {"seconds": seconds / steps, "memory": memory, "exact_match": right}


def print_measured(work: Path, seeds: int, steps: int) -> None:
    """Trains and asks all models, and prints the mean of the seeds with the lowest and the highest."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data").exists():
        run("examples.openmoji.make_data", "--output_dir", work / "data")
    if not (work / "parts").exists():
        make_parts(work / "parts")
    file, done = work / "runs.jsonl", {}
    if file.exists():
        done = {tuple(row["key"]): row for row in map(json.loads, file.read_text().splitlines())}

    def measured(fold: int | None, seed: int, steps: int) -> dict[str, float]:
        key = (fold, seed, steps)
        if key not in done:
            done[key] = {"key": key, **one_run(work, fold, seed, steps)}
            with file.open("a") as lines:
                lines.write(json.dumps(done[key]) + "\n")
        return done[key]

    rows = {}
    for name, fold in list(FOLDS.items())[:3]:
        rows[name, "steps"] = [measured(fold, seed, steps) for seed in range(seeds)]
        if fold is not None:
            seconds = [mean(run["seconds"] for run in rows[key, "steps"]) for key in ("LLaVA", name)]
            more = round(steps * seconds[0] / seconds[1])
            rows[name, "time"] = [measured(fold, seed, more) for seed in range(seeds)]
    print("| | steps | seconds a step | memory, GB | exact match, % |\n|---|---:|---:|---:|---:|")
    for (name, equal), runs in rows.items():
        cells = []
        for value, scale, digits in (("seconds", 1, 3), ("memory", 1, 2), ("exact_match", 100, 1)):
            numbers = [scale * run[value] for run in runs]
            cells.append(f"{mean(numbers):.{digits}f} ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})")
        print(f"| {name}, equal {equal} | {runs[0]['key'][2]} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["computed", "measured"])
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.what == "computed":
        print_computed()
    else:
        print_measured(arguments.work_dir, arguments.seeds, arguments.steps)


if __name__ == "__main__":
    main()
