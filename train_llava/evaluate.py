"""Asks a model every question of a data set and compares its answers with the references.

    python -m train_llava.evaluate --model_name_or_path output/run --data_path heldout --output_dir output/evaluation
    accelerate launch -m train_llava.evaluate --model_name_or_path …             (the same files, on every device)
    python -m train_llava.evaluate --compare output/evaluation other/evaluation --output_dir output/comparison

The first two write `metrics.json`, `predictions.jsonl` (id, prompt, reference, prediction) and `captions.png`, a
grid of pictures with reference and answer. A question that cannot be asked (a broken picture, a
conversation longer than the model reads) does not count; standard error and `bad` in `metrics.json` name it.
Answers go to `OUTPUT_DIR.answers.jsonl` as they come, and a killed run continues from there. The third compares
such folders in `comparison.md` and `comparison.png`.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import BATCH, BITS_HELP, CUT_BOXES_HELP, NEW_TOKENS, parse_arguments, parse_first, run_command
from train_llava.common.checks import CHOICES_HELP, check_name, check_number, split_choices
from train_llava.common.files import opening, written_whole


@dataclass
class EvaluateArguments:
    output_dir: str = HfArg(help="The folder to write; it must not exist yet.")
    model_name_or_path: str | None = HfArg(default=None, help="A LLaVA checkpoint, a folder or a hub id.")
    data_path: str | None = HfArg(default=None, help="Questions and answers, in any format of training.")
    compare: list[str] = HfArg(default_factory=list, help="Compare folders that this command wrote; ask no model.")
    adapter_name_or_path: str | None = HfArg(default=None, help="A LoRA adapter trained on that model.")
    image_dir: str | None = HfArg(default=None, help="Its pictures' folder; default: images_dl/ or images/ beside it.")
    text_path: str | None = HfArg(default=None, help="A plain text that the model and its base are to predict.")
    base: str | None = HfArg(default=None, help="With --text_path, the base; default: the model without its adapter.")
    blank_control: bool = HfArg(default=False, help="Ask again with blank pictures, to see what the pictures add.")
    other_control: bool = HfArg(default=False, help="Ask again with the pictures of other records.")
    choices: str | None = HfArg(default=None, help=f"{CHOICES_HELP} Default: each record's own `choices`.")
    keep_cut_boxes: bool = HfArg(default=False, help=CUT_BOXES_HELP)
    bits: Literal[4, 8] | None = HfArg(default=None, help=BITS_HELP)
    batch_size: int = HfArg(default=BATCH, help="Questions answered at once.")
    max_new_tokens: int = HfArg(default=NEW_TOKENS, help="The longest answer, in tokens.")

    def __post_init__(self) -> None:
        if bool(self.compare) == bool(self.model_name_or_path and self.data_path):
            raise ValueError("pass --model_name_or_path with --data_path, or --compare with evaluations")
        self.choices = split_choices(self.choices)
        if self.base is not None and self.text_path is None:
            raise ValueError("--base goes with --text_path")
        for name in ("batch_size", "max_new_tokens"):
            check_number(name, getattr(self, name))


if __name__ == "__main__":
    parse_first(EvaluateArguments)  # before the imports that take seconds

import torch
import transformers
from accelerate.utils import gather_object
from peft import PeftModel
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import train_llava
from train_llava.chat import chat_of
from train_llava.data import LlavaDataset
from train_llava.evaluation.answers import add_choices, predict, write_predictions
from train_llava.evaluation.comparison import compare
from train_llava.evaluation.generation import this_process
from train_llava.evaluation.metrics import (
    METRICS,
    by_group,
    most_frequent_answer,
    score_choices,
    score_exact,
    score_group,
)
from train_llava.evaluation.plots import draw, draw_calibration, draw_sample_grid
from train_llava.evaluation.questions import settings_of
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_model
from train_llava.modeling.kinds import Config
from train_llava.modeling.parts import load_language_model
from train_llava.records import IMAGE_TOKEN
from train_llava.training.cards import cell

WINDOW = 1024  # tokens of a text read at once
SAMPLE_GRID = (2, 4)  # rows and columns of captions.png


def table(metrics: dict[str, Any]) -> str:
    """The exact match of the model and of each control, then the model's other metrics, by language and by kind."""

    def cells(scores: dict[str, Any], metric: str = "exact_match") -> list[str]:
        return [cell(column, metric) for column in (*scores.get("by_language", {}).values(), scores)]

    def aligned(rows: list[list[str]], width: int) -> list[str]:
        return [f"{name:<22}{''.join(f'{text:>{width}}' for text in texts)}".rstrip() for name, *texts in rows]

    languages = metrics.get("by_language", {})
    rows = [["exact match", *languages, "all"], ["this model", *cells(metrics)], ["  95 % interval"]]
    for scores in (*languages.values(), metrics):
        low, high = scores["intervals"]["exact_match"]
        rows[-1].append(f"{low:.1%}-{high:.1%}")
    for name, control in metrics["controls"].items():
        rows.append([name.replace("_", " "), *cells(control)])
    # The other metrics
    rows.append(["this model's"])
    for metric, name in METRICS.items():
        if metric in metrics and metric != "exact_match":
            rows.append([f"  {name}", *cells(metrics, metric)])
    rows.append(["questions", *(f"{scores['n']:,}" for scores in (*languages.values(), metrics))])
    lines = aligned(rows, 14)
    if "by_kind" in metrics:
        controls = metrics["controls"]
        rows = [["exact match by kind", "this model", "95 % interval", *(name.replace("_", " ") for name in controls)]]
        for kind, scores in metrics["by_kind"].items():
            low, high = scores["intervals"]["exact_match"]
            others = [cell(control["by_kind"][kind], "exact_match") for control in controls.values()]
            rows.append([f"  {kind}", cell(scores, "exact_match"), f"{low:.1%}-{high:.1%}", *others])
        lines += ["", *aligned(rows, 22), ""]
    for metric, reason in metrics.get("undefined", {}).items():
        lines.append(f"{METRICS[metric]} is not defined: {reason}")
    # Lines that only some evaluations have
    if "cut_answers" in metrics:
        limit = metrics["settings"]["max_new_tokens"]
        lines.append(f"cut at --max_new_tokens {limit}: {metrics['cut_answers']:.1%}")
    if "choices" in metrics:
        scores = metrics["choices"]
        lines.append(f"likeliest choice right: {scores['accuracy']:.1%} of {scores['n']:,}; ")
        lines[-1] += f"AUROC {scores['auroc']:.3f}; " if "auroc" in scores else ""
        lines[-1] += f"expected calibration error {scores['calibration_error']:.3f}"
    if "text" in metrics:
        lines.append(f"loss per token of the text: {metrics['text']['loss']:.4f}")
        if "base_loss" in metrics["text"]:
            lines[-1] += f", {metrics['text']['base_loss']:.4f} before"
    return "\n".join(lines)


def read_text(path: str) -> str:
    """The text of `--text_path`; a ValueError if it cannot be read, is empty, or has an image tag."""
    with opening(path):
        text = Path(path).read_text(encoding="utf-8")
    if not text.strip():
        raise ValueError(f"--text_path {path} is empty")
    if IMAGE_TOKEN in text:
        raise ValueError(f"--text_path {path} has {IMAGE_TOKEN} in it, where a picture would stand")
    return text


@torch.inference_mode()
def text_loss(model: PreTrainedModel | PeftModel, input_ids: list[int]) -> float:
    """The mean loss of a text's next tokens, in pieces of `WINDOW` tokens that the processes share."""
    # Each process reads its share of the windows
    state, total, count = this_process(), 0.0, 0
    window = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW))
    pieces = [piece for piece in torch.tensor(input_ids).split(window) if len(piece) > 1]
    share = pieces[state.process_index :: state.num_processes]
    for piece in tqdm(share, "reading the text", disable=not state.is_main_process):
        logits = model(input_ids=piece[None].to(model.device)).logits[0, :-1].float()
        total += cross_entropy(logits, piece[1:].to(model.device), reduction="sum").item()
        count += len(piece) - 1
    totals, counts = zip(*gather_object([(total, count)]), strict=True)
    return sum(totals) / sum(counts)


def compare_text_loss(
    model: PreTrainedModel | PeftModel, tokenizer: Any, text: str, base: str | None
) -> dict[str, Any]:
    """The `loss` of a text, its number of `tokens`, and the `base_loss` of the model before training.

    This model is `base`, or the model without its adapter. Without either, there is no `base_loss`. A ValueError
    says that the base cannot be opened or splits the text into other tokens, or that the text has one token.
    """
    input_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(input_ids) < 2:
        raise ValueError("--text_path has a text of one token: there is no next one to predict")
    result = {"loss": text_loss(model, input_ids), "tokens": len(input_ids)}
    # The model before training, which has to have the same tokens
    if base is not None:
        with opening(base):
            is_llava = isinstance(AutoConfig.from_pretrained(base), Config)
            base_tokenizer = AutoTokenizer.from_pretrained(base)
            base_ids = base_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if base_ids != input_ids:
            raise ValueError(f"--base {base} splits the text into other tokens than the model: name its base")
        base_model = load_checkpoint(base)[0] if is_llava else load_language_model(base, "auto")
        result["base_loss"] = text_loss(base_model.to(model.device), input_ids)
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            result["base_loss"] = text_loss(model, input_ids)
    return result


def previous_answers(output_dir: str) -> dict[str, Path]:
    """The files of answers until the folder is complete: to a question's own pictures, to blank and to other ones."""
    target, names = Path(os.path.realpath(output_dir)), {"own": "", "blank": "blank-", "other": "other-"}
    return {pictures: target.with_name(f"{target.name}.{name}answers.jsonl") for pictures, name in names.items()}


def evaluate(arguments: EvaluateArguments, folder: Path | None) -> dict[str, Any]:
    """Asks every question and returns the metrics. The first process writes all files into `folder`."""
    # The text, the data and the model
    if arguments.base is not None:
        check_name(f"--base {arguments.base}", arguments.base)
    text = None if arguments.text_path is None else read_text(arguments.text_path)
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir)
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    dataset.chat = chat_of(processor, None, arguments.keep_cut_boxes)  # as training opens pictures
    # The loss of the text, the answers, and those of the controls
    text_scores = text and compare_text_loss(model, processor.tokenizer, text, arguments.base)
    settings, files = settings_of(arguments, model), previous_answers(arguments.output_dir)
    predictions, bad = predict(model, processor, dataset, files["own"], settings, arguments.batch_size)
    if not predictions:
        files["own"].unlink(missing_ok=True)
        raise ValueError(f"no question of the data could be asked; {bad[0]['id']}: {bad[0]['reason']}")
    controls = {"most_frequent_answer": most_frequent_answer(predictions)}
    for pictures, is_asked in (("blank", arguments.blank_control), ("other", arguments.other_control)):
        if is_asked:
            asked_again = model, processor, dataset, files[pictures], settings, arguments.batch_size, pictures
            controls[f"{pictures}_pictures"], _ = predict(*asked_again)
    chosen = add_choices(model, processor, dataset, predictions, arguments.choices)
    if arguments.choices and not chosen:
        raise ValueError(f"--choices {','.join(arguments.choices)}: no right answer is among them")
    # The scores
    versions = {module.__name__: module.__version__ for module in (train_llava, transformers, torch)}
    metrics = by_group(predictions, score_group) | {"cut_answers": mean(p["cut"] for p in predictions)}
    metrics |= {"settings": settings | versions, "bad": bad}
    if text_scores:
        metrics["text"] = text_scores
    metrics["controls"] = {name: by_group(control, score_exact) for name, control in controls.items()}
    if chosen:
        metrics["choices"] = score_choices(chosen)
    if folder is None:
        return metrics
    # The report and the files
    for entry in bad[:10]:
        print(f"not asked: {entry['id']}: {entry['reason']}", file=sys.stderr)
    if bad:
        print(f"{len(bad)} questions or records could not be asked: see bad in metrics.json", file=sys.stderr)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_predictions(predictions, folder / "predictions.jsonl")
    draw(lambda path: draw_sample_grid(dataset, predictions, path, SAMPLE_GRID), folder / "captions.png")
    if chosen:
        draw(lambda path: draw_calibration(metrics["choices"]["bins"], path), folder / "calibration.png")
    return metrics


def main() -> None:
    (arguments,) = parse_arguments(EvaluateArguments)
    if not this_process().is_main_process:
        if not arguments.compare:
            evaluate(arguments, None)
        return
    with written_whole(arguments.output_dir) as folder:
        if arguments.compare:
            text, shown, picture = compare(arguments.compare, folder), "plot", "comparison.png"
        else:
            text, shown, picture = table(evaluate(arguments, folder)), "pictures and answers", "captions.png"
    # The folder is complete: the files of answers are no longer needed
    if not arguments.compare:
        for file in previous_answers(arguments.output_dir).values():
            file.unlink(missing_ok=True)
    print(text)
    if (Path(arguments.output_dir) / picture).exists():
        print(f"{shown}: {Path(arguments.output_dir) / picture}")


if __name__ == "__main__":
    run_command(main)
