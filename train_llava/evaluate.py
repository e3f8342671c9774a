"""Asks a model every question of a data set and compares its answers with the reference ones.

    python -m train_llava.evaluate --model_name_or_path output/run --data_path heldout --output_dir output/evaluation
    accelerate launch -m train_llava.evaluate --model_name_or_path …                    the same files, on every device
    python -m train_llava.evaluate --compare output/evaluation other/evaluation --output_dir output/comparison

The first two write `metrics.json`, `predictions.jsonl` (id, prompt, reference, prediction) and `captions.png`, a sheet
of pictures with the reference and the model's answer under each. What cannot be asked (a broken picture, or a
conversation longer than the model reads) counts for nothing and is named, on standard error and under `bad` in
`metrics.json`. Answers are written to `OUTPUT_DIR.answers.jsonl` as they come, by which a killed run goes on.
The third puts such folders side by side, in `comparison.md` and `comparison.png`.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from train_llava.cli import BATCH, BITS_HELP, NEW_TOKENS, parse_arguments, parse_first, run_command
from train_llava.common.checks import check_name, check_number
from train_llava.common.files import opening, written_whole


@dataclass
class EvaluateArguments:
    output_dir: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A LLaVA checkpoint, a folder or a hub id."}
    )
    data_path: str | None = field(default=None, metadata={"help": "Questions and answers, in any layout of training."})
    compare: list[str] = field(
        default_factory=list, metadata={"help": "Folders that this command wrote, to be compared; no model is asked."}
    )
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    image_dir: str | None = field(
        default=None, metadata={"help": "The pictures' folder; default: images_dl/ or images/ beside the records."}
    )
    text_path: str | None = field(
        default=None, metadata={"help": "A plain text: how well the model predicts it, and what it was made of."}
    )
    base: str | None = field(
        default=None,
        metadata={"help": "With text_path, the model before training; default: the model without its adapter."},
    )
    blank_control: bool = field(
        default=False, metadata={"help": "Ask everything again with blank pictures, to see what the pictures give."}
    )
    bits: Literal[4, 8] | None = field(default=None, metadata={"help": BITS_HELP})
    batch_size: int = field(default=BATCH, metadata={"help": "Questions answered at once."})
    max_new_tokens: int = field(default=NEW_TOKENS, metadata={"help": "The longest answer, in tokens."})

    def __post_init__(self) -> None:
        if bool(self.compare) == bool(self.model_name_or_path and self.data_path):
            raise ValueError(
                "pass --model_name_or_path with --data_path to ask a model, or --compare with finished runs"
            )
        if self.base is not None and self.text_path is None:
            raise ValueError("--base goes with --text_path")
        for name in ("batch_size", "max_new_tokens"):
            check_number(name, getattr(self, name))


if __name__ == "__main__":
    parse_first(EvaluateArguments)  # before the imports that take seconds

import matplotlib
import torch
import transformers
from accelerate.utils import gather_object
from matplotlib.figure import Figure
from peft import PeftModel
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import train_llava
from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.dataset.readers import read_jsonl
from train_llava.evaluation.answers import predict, write_predictions
from train_llava.evaluation.generation import this_process
from train_llava.evaluation.metrics import (
    METRICS,
    by_language,
    difference,
    most_frequent_answer,
    read_metrics,
    score_exact,
    score_group,
)
from train_llava.evaluation.plots import draw, draw_sample_grid
from train_llava.evaluation.questions import settings_of
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_model
from train_llava.modeling.parts import load_language_model
from train_llava.records import IMAGE_TOKEN
from train_llava.training.cards import cell, markdown

WINDOW = 1024  # tokens of a text read at once
SHEET = (2, 4)  # rows and columns of captions.png


def table(metrics: dict[str, Any]) -> str:
    """The exact match of the model and of each control, then the model's other metrics, by language."""

    def line(name: str, words: list[str]) -> str:
        return f"{name:<22}" + "".join(f"{word:>14}" for word in words)

    def columns(scores: dict[str, Any]) -> list[dict[str, Any]]:
        return [*scores.get("by_language", {}).values(), scores]

    ours = columns(metrics)
    lines = [line("exact match", [*metrics.get("by_language", {}), "all"])]
    lines.append(line("this model", [cell(scores, "exact_match") for scores in ours]))
    bounds = [scores["intervals"]["exact_match"] for scores in ours]
    lines.append(line("  95 % interval", [f"{low:.1%}-{high:.1%}" for low, high in bounds]))
    for name, control in metrics["controls"].items():
        lines.append(line(name.replace("_", " "), [cell(scores, "exact_match") for scores in columns(control)]))
    lines.append("this model's")
    for metric in [name for name in METRICS if name in metrics and name != "exact_match"]:
        lines.append(line(f"  {METRICS[metric]}", [cell(scores, metric) for scores in ours]))
    lines.append(line("questions", [f"{scores['n']:,}" for scores in ours]))
    lines += [f"{METRICS[metric]} is not defined: {reason}" for metric, reason in metrics.get("undefined", {}).items()]
    if "cut_answers" in metrics:
        lines.append(f"cut at --max_new_tokens {metrics['settings']['max_new_tokens']}: {metrics['cut_answers']:.1%}")
    if "text" in metrics:
        before = f", {metrics['text']['base_loss']:.4f} before" if "base_loss" in metrics["text"] else ""
        lines.append(f"loss per token of the text: {metrics['text']['loss']:.4f}{before}")
    return "\n".join(lines)


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics and predictions that an evaluation wrote.

    Raises:
        OSError, ValueError: the folder has none.
    """
    metrics, predictions = read_metrics(folder), list(read_jsonl(folder / "predictions.jsonl"))
    if not all(isinstance(p, dict) and {"id", "prompt", "reference", "prediction"} <= p.keys() for p in predictions):
        raise ValueError(f"{folder / 'predictions.jsonl'} is none that evaluate wrote")
    return metrics, predictions


def asked(prediction: dict[str, Any]) -> dict[str, Any]:
    """What a prediction answers, and what is right."""
    return {key: value for key, value in prediction.items() if key != "prediction"}


def differences(settings: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each setting that is not the same in all runs."""
    lines = []
    for name in dict.fromkeys(name for given in settings.values() for name in given):
        values = {run: given.get(name, "unknown") for run, given in settings.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{name} differs: " + ", ".join(f"{value} in {run}" for run, value in values.items()))
    return lines


def compare(folders: list[Path], output_dir: Path) -> str:
    """Writes `comparison.md` and `comparison.png` into `output_dir` and gives back the table.

    The first run is what the others are compared with, on the same questions one by one, which says more than two
    intervals side by side. Settings that differ are named below it.

    Raises:
        OSError, ValueError: a folder is no evaluation, or was asked other questions than the first.
    """
    runs = {str(folder): read_run(folder) for folder in folders}
    (first, (_, ours)), *_ = runs.items()
    metrics = [name for name in METRICS if all(name in scores for scores, _ in runs.values())]
    head = ["run", *(METRICS[name] for name in metrics), f"exact match, less that of {first}"]
    texts = all("text" in scores for scores, _ in runs.values())
    rows = [[*head, *["text loss"] * texts]]
    for name, (scores, predictions) in runs.items():
        if list(map(asked, predictions)) != list(map(asked, ours)):
            raise ValueError(f"{name} and {first} were asked different questions, or of other right answers")
        more, (low, high) = difference(predictions, ours)
        beside = "" if name == first else f"{more:+.1%} ({low:+.1%} to {high:+.1%})"
        kept = [f"{scores['text']['loss']:.4f}"] if texts else []
        rows.append([name, *(cell(scores, metric) for metric in metrics), beside, *kept])
    text = markdown(rows)
    for line in differences({name: scores.get("settings", {}) for name, (scores, _) in runs.items()}):
        text += f"\n\n{line}"
    (output_dir / "comparison.md").write_text(
        f"{text}\n\n{len(ours):,} questions; intervals: 95 %.\n", encoding="utf-8"
    )

    scores = {name: scores for name, (scores, _) in runs.items()}
    draw(lambda path: draw_comparison(scores, metrics, path), output_dir / "comparison.png")
    return text


def draw_comparison(runs: dict[str, dict[str, Any]], metrics: list[str], path: Path) -> None:
    """Draws a bar for each run in a panel for each metric, with the intervals where there are some."""
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(2.4 * len(metrics), 1.2 + 0.4 * len(runs)), layout="constrained")
        for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
            for i, scores in enumerate(runs.values()):
                axes.barh(i, scores[metric], color=f"C{i % 10}")
                if metric in scores["intervals"]:
                    axes.plot(scores["intervals"][metric], [i, i], color="black", linewidth=1.5)
                axes.text(0, i, f" {cell(scores, metric)}", va="center", color="white", fontweight="bold")
            axes.set_title(METRICS[metric])
            axes.set_xlim(0, None if metric == "cider" else 1)
            axes.set_yticks(range(len(runs)), runs)
        figure.axes[0].invert_yaxis()
        figure.savefig(path, dpi=110)


@torch.inference_mode()
def text_loss(model: PreTrainedModel | PeftModel, input_ids: list[int]) -> float:
    """The mean loss of a text's next tokens, in pieces of `WINDOW` tokens; every process reads its share of them."""
    window = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW))
    pieces = [piece for piece in torch.tensor(input_ids).split(window) if len(piece) > 1]
    state, total, count = this_process(), 0.0, 0
    mine = pieces[state.process_index :: state.num_processes]
    for piece in tqdm(mine, "reading the text", disable=not state.is_main_process):
        logits = model(input_ids=piece[None].to(model.device)).logits[0, :-1].float()
        total += cross_entropy(logits, piece[1:].to(model.device), reduction="sum").item()
        count += len(piece) - 1
    totals, counts = zip(*gather_object([(total, count)]), strict=True)
    return sum(totals) / sum(counts)


def text_loss_change(
    model: PreTrainedModel | PeftModel, tokenizer: Any, text: str, base: str | None
) -> dict[str, Any]:
    """How well the model predicts a text, and how well what it was made of does: `base`, or it without its adapter.

    Raises:
        ValueError: the base cannot be opened, or splits the text into other tokens; or there is nothing to predict.
    """
    input_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(input_ids) < 2:
        raise ValueError("--text_path has a text of one token: there is no next one to predict")
    kept = {"loss": text_loss(model, input_ids), "tokens": len(input_ids)}
    if base is not None:
        with opening(base):
            is_llava = AutoConfig.from_pretrained(base).model_type.startswith("llava")
            theirs = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False, verbose=False)["input_ids"]
        if theirs != input_ids:
            raise ValueError(f"--base {base} splits the text into other tokens than the model: it was not made of it")
        before = load_checkpoint(base)[0] if is_llava else load_language_model(base, "auto")
        kept["base_loss"] = text_loss(before.to(model.device), input_ids)
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            kept["base_loss"] = text_loss(model, input_ids)
    return kept


def previous_answers(output_dir: str) -> list[Path]:
    """Where an evaluation keeps its answers until its folder is whole: those of the model, and of blank pictures."""
    target = Path(os.path.realpath(output_dir))
    return [target.with_name(f"{target.name}.{kind}.jsonl") for kind in ("answers", "blank-answers")]


def evaluate(arguments: EvaluateArguments, folder: Path | None) -> dict[str, Any]:
    """Asks every question, writes everything into `folder`, where there is one, and gives back the metrics."""
    text = None
    if arguments.base is not None:
        check_name(f"--base {arguments.base}", arguments.base)
    if arguments.text_path is not None:
        with opening(arguments.text_path):
            text = Path(arguments.text_path).read_text(encoding="utf-8")
        if not text.strip():
            raise ValueError(f"--text_path {arguments.text_path} is empty")
        if IMAGE_TOKEN in text:
            raise ValueError(f"--text_path {arguments.text_path} has {IMAGE_TOKEN} in it, where a picture would stand")
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir)
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    kept = None if text is None else text_loss_change(model, processor.tokenizer, text, arguments.base)
    dataset.min_side = Chat(processor).min_side  # as training opens pictures
    settings, files = settings_of(arguments, model), previous_answers(arguments.output_dir)
    predictions, bad = predict(model, processor, dataset, files[0], settings, arguments.batch_size)
    if not predictions:
        files[0].unlink(missing_ok=True)
        raise ValueError(f"no question of {arguments.data_path} could be asked; {bad[0]['id']}: {bad[0]['reason']}")
    controls = {"most_frequent_answer": most_frequent_answer(predictions)}
    if arguments.blank_control:
        controls["blank_pictures"] = predict(
            model, processor, dataset, files[1], settings, arguments.batch_size, blank=True
        )[0]
    settings |= {"train_llava": train_llava.__version__} | {m.__name__: m.__version__ for m in (transformers, torch)}
    metrics = by_language(predictions, score_group) | {"cut_answers": mean(p["cut"] for p in predictions)}
    metrics |= {"settings": settings, "bad": bad}
    if kept is not None:
        metrics["text"] = kept
    metrics["controls"] = {name: by_language(control, score_exact) for name, control in controls.items()}
    if folder is None:
        return metrics
    for entry in bad[:10]:
        print(f"not asked: {entry['id']}: {entry['reason']}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} questions or records could not be asked: see bad in metrics.json", file=sys.stderr)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_predictions(predictions, folder / "predictions.jsonl")
    draw(lambda path: draw_sample_grid(dataset, predictions, path, SHEET), folder / "captions.png")
    return metrics


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments)
    state = this_process()
    if not state.is_main_process:
        if not arguments.compare:
            evaluate(arguments, None)
        return
    files = [] if arguments.compare else previous_answers(arguments.output_dir)[: 1 + arguments.blank_control]
    with written_whole(arguments.output_dir) as folder:
        if arguments.compare:
            text, shown, picture = compare([Path(run) for run in arguments.compare], folder), "plot", "comparison.png"
        else:
            text, shown, picture = table(evaluate(arguments, folder)), "pictures and answers", "captions.png"
    for file in files:
        file.unlink()
    print(text)
    if (Path(arguments.output_dir) / picture).exists():
        print(f"{shown}: {Path(arguments.output_dir) / picture}")


if __name__ == "__main__":
    run_command(main)
