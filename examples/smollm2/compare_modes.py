"""Trains SmolLM2 with eyes in every mode, with the same data and number of steps, and scores it on held-out scenes.

    python -m examples.smollm2.compare_modes                                       prints the table of modes.json
    python -m examples.smollm2.compare_modes --results output/smollm2/modes.json   measures anew, in hours

It starts from the assembled model, the data and the text that examples/smollm2/run.sh left in output/smollm2.
Two runs go at a time, each in one thread, on a GPU if there is one. The file gets each result when its run
ends, so you may stop and continue.

It also scores the loss on a text, compared with SmolLM2's own. The runs in modes.json were made on the example's
former data, captions of emoji, from a random projector.
"""

import json
from pathlib import Path
from statistics import median

from examples.openmoji.compare_modes import Comparison, by_mode, compare, train_and_score

HERE = Path(__file__).parent
EXAMPLE = Path("output/smollm2")
STEPS, BATCH = 640, 8
RATE = "2e-4"  # of the whole language model; the tower takes half of it
LORA_RATE, ALIGN_RATE, PROJECTOR_RATE = "1e-3", "1e-2", "5e-3"

ALIGN = ["--train_type", "projector", "--learning_rate", ALIGN_RATE]
LORA = ["--train_type", "lora", "--lora_r", "32", "--lora_alpha", "64", "--learning_rate", LORA_RATE]
FREEZE_VISION = ["--train_type", "freeze_vision", "--learning_rate", RATE, "--projector_learning_rate", PROJECTOR_RATE]
FULL = ["--train_type", "full", "--learning_rate", RATE, "--vision_learning_rate", "1e-4"]
FULL += ["--projector_learning_rate", PROJECTOR_RATE]
MODES = {
    "projector alone": [ALIGN],
    "LoRA, two stages": [ALIGN, [*LORA, "--projector_learning_rate", PROJECTOR_RATE]],
    "LoRA, one stage": [[*LORA, "--projector_learning_rate", PROJECTOR_RATE]],
    "LoRA, projector left random": [[*LORA, "--projector_learning_rate", "0"]],
    "freeze_vision, one stage": [FREEZE_VISION],
    "full, rates by module, one stage": [FULL],
}
CPU = Path("/proc/cpuinfo")  # on Linux
BF16 = CPU.exists() and any(flag in CPU.read_text() for flag in ("avx512_bf16", "amx_bf16"))
SMOLLM2 = Comparison(
    folder=EXAMPLE,
    train=["data/train"],
    heldout="data/heldout",
    modes=MODES,
    steps=STEPS,
    batch=BATCH,
    arguments=["--attn_implementation", "eager", *(["--bf16", "true"] if BF16 else [])],  # as in run.sh
    evaluation=["--text_path", str(EXAMPLE / "text.txt"), "--base", str(EXAMPLE / "llava")],
)


def measure(compared: Comparison, mode: str, seed: int, folder: Path) -> dict:
    """Trains and scores one mode with one seed."""
    scores, _ = train_and_score(compared, mode, seed, folder)
    metrics = json.loads((folder / "scores/metrics.json").read_text())
    text_loss = [metrics["text"]["base_loss"], metrics["text"]["loss"]]
    f1 = metrics["by_language"]["en"]["token_f1"]
    return scores | {"token_f1": f1, "text_loss": text_loss}


def table(results: list[dict]) -> str:
    """The results as a Markdown table of medians over the seeds.

    Scores come from the longest runs. Time and memory come from the runs on CPUs, if there are any.
    """
    lines = [
        "| mode | seeds | exact match | range | token F1 | text loss, before -> after | s a step, CPU | peak GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, runs in by_mode(MODES, results).items():
        timed = [run for run in results if (run["mode"], run["device"]) == (mode, "CPU")] or runs
        seconds = median(60 * run["minutes"] / run["steps"] for run in timed)
        memory = median(run["peak_gb"] for run in timed)
        exact, f1 = (median(run[key] for run in runs) for key in ("exact_match", "token_f1"))
        before, after = (median(run["text_loss"][i] for run in runs) for i in (0, 1))
        lines.append(
            f"| {mode} | {len(runs)} | {exact:.1%} | {runs[0]['exact_match']:.1%} to {runs[-1]['exact_match']:.1%} | "
            f"{f1:.1%} | {before:.2f} -> {after:.2f} | "
            f"{seconds:.1f} | {memory:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compare(__doc__, SMOLLM2, measure, [0, 1], HERE / "modes.json")))
