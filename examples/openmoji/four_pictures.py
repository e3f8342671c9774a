"""Measures the value of tiles: a sheet of four pictures, read at the size of one (`crop`) or in tiles (`anyres`).

    PYTHONPATH=. python examples/openmoji/four_pictures.py --results output/four_pictures.json   measures anew
    PYTHONPATH=. python examples/openmoji/four_pictures.py                                      prints the file's table

It starts from the data that `bash run_zero2.sh` left in output/openmoji. A sheet holds four of these pictures
in full size. The question is "What is in each of the four?", and the answer has a line for each caption. The
same parts are assembled twice, and trained on the same sheets with the same settings. `crop` is trained for
as many steps as `anyres`, and once more for as much time. Held-out sheets show only held-out pictures. Their
pairs of motif and skin tone are on no training sheet. A picture is right if its line of the answer equals its
caption. Each run is a process of one thread; two run at a time. After each run `--results` gets its result.
Runs that the file has already are skipped.
"""

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image
from tqdm import tqdm

from examples.openmoji.compare_modes import EXAMPLE, keep, run
from train_llava.chat import Chat
from train_llava.model import load_processor

HERE = Path(__file__).parent
QUESTION = "What is in each of the four?"
STEPS, BATCH, RATE = 700, 32, "1.5e-3"
PASSES = {"train": 8, "heldout": 2}  # number of sheets that show each picture
RUNS = ("crop, as many steps", "crop, as much time", "anyres")


def make_sheets(split: str, folder: Path) -> None:
    """Writes sheets of a split's English records, shuffled with a fixed seed, and the records of the sheets."""
    source = EXAMPLE / "data" / split
    singles = [record for record in json.loads((source / "chat.json").read_text()) if record["language"] == "en"]
    rng, records = np.random.default_rng(0), []
    (folder / "images_dl").mkdir(parents=True)
    for number in range(PASSES[split]):
        order = rng.permutation(len(singles))
        for start in range(0, len(order) - 3, 4):
            # the sheet: two rows of two pictures
            four = [singles[i] for i in order[start : start + 4]]
            pictures = [Image.open(source / "images_dl" / record["image"]) for record in four]
            side = pictures[0].width
            sheet = Image.new("RGB", (2 * side, 2 * side))
            for place, picture in enumerate(pictures):
                sheet.paste(picture, (place % 2 * side, place // 2 * side))

            # its record: the four captions, a line each
            name = f"{number}-{start}"
            sheet.save(folder / "images_dl" / f"{name}.png")
            captions = "\n".join(record["conversations"][1]["value"] for record in four)
            conversation = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": captions}]
            records.append({"id": name, "image": f"{name}.png", "conversations": conversation})
    (folder / "chat.json").write_text(json.dumps(records, indent=1))


def right_of_four(prediction: dict[str, str]) -> int:
    """The number of a sheet's four captions that their line of the answer equals."""
    ours, theirs = (prediction[key].split("\n") for key in ("prediction", "reference"))
    return sum(a == b for a, b in zip(ours, theirs, strict=False))


def measure(name: str, seed: int, steps: int, work: Path) -> dict:
    """Assembles, trains and scores one run."""
    output = work / f"{name}-{seed}".replace(" ", "-")
    base = work / name.partition(",")[0]
    training = ["--train_type", "freeze_vision", "--model_name_or_path", str(base), "--data_path", str(work / "train")]
    training += ["--output_dir", str(output), "--per_device_train_batch_size", str(BATCH), "--seed", str(seed)]
    training += ["--max_steps", str(steps), "--learning_rate", RATE, "--save_strategy", "no", "--preflight", "false"]
    run("train", *training, "--disable_tqdm", "true")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    questions = ["--model_name_or_path", str(output), "--data_path", str(work / "heldout"), "--batch_size", "32"]
    run("evaluate", *questions, "--output_dir", str(output / "scores"), "--max_new_tokens", "96")
    lines = (output / "scores" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    right = [right_of_four(json.loads(line)) for line in lines]
    return {
        "run": name,
        "seed": seed,
        "steps": steps,
        "right": float(np.mean(right)) / 4,
        "pictures": 4 * len(right),
        "token_f1": json.loads((output / "scores" / "metrics.json").read_text())["token_f1"],
        "tokens": Chat(load_processor(str(base))[1]).image_tokens((144, 144)),
        "seconds_a_step": history[-1]["train_runtime"] / steps,
        "loss": [entry["loss"] for entry in history if "loss" in entry][-1],
    }


def table(results: list[dict]) -> str:
    """The results as a Markdown table: medians over the seeds, and ranges."""
    lines = [
        "| four pictures | tokens a sheet | steps | seconds a step | seeds | named right | range | token F1 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in RUNS:
        runs = sorted((result for result in results if result["run"] == name), key=lambda result: result["right"])
        if runs:
            steps, seconds, right, f1 = (
                median(r[key] for r in runs) for key in ("steps", "seconds_a_step", "right", "token_f1")
            )
            lines.append(
                f"| {name} | {runs[0]['tokens']} | {steps:,.0f} | {seconds:.2f} | {len(runs)} | {right:.1%} | "
                f"{runs[0]['right']:.1%} to {runs[-1]['right']:.1%} | {f1:.1%} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=HERE / "four_pictures.json", help="The file to write.")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else []
    done = {(result["run"], result["seed"]): result for result in results}
    # the run "as much time" is the last of a seed, as it needs the time of the others
    missing = [(name, seed) for seed in args.seeds for name in (RUNS[0], RUNS[2], RUNS[1]) if (name, seed) not in done]
    if missing and not (EXAMPLE / "data").is_dir():
        raise SystemExit(f"four_pictures: no {EXAMPLE}/data: run `bash run_zero2.sh` first")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if missing:
            for split in PASSES:
                make_sheets(split, work / split)
            for ratio in ("crop", "anyres"):
                build = ["--vision_model_name_or_path", str(HERE / "parts/clip"), "--output_dir", str(work / ratio)]
                build += ["--language_model_name_or_path", str(HERE / "parts/qwen2"), "--dtype", "float32"]
                run("build_model", *build, "--image_aspect_ratio", ratio)
        bar = tqdm(total=len(missing), desc="runs", disable=not missing)

        def measure_seed(seed: int) -> None:
            for name in [name for name, missing_seed in missing if missing_seed == seed]:
                steps = STEPS
                if name == RUNS[1]:
                    anyres, crop = done["anyres", seed], done[RUNS[0], seed]
                    steps = round(STEPS * anyres["seconds_a_step"] / crop["seconds_a_step"])
                done[name, seed] = measure(name, seed, steps, work)
                ordered = sorted(done.values(), key=lambda result: (RUNS.index(result["run"]), result["seed"]))
                keep(ordered, args.results)
                bar.update()

        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(measure_seed, args.seeds))
    print(table(list(done.values())))


if __name__ == "__main__":
    main()
