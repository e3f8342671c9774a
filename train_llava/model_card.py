"""Adds an evaluation to the model card, README.md in the model's folder.

    python -m train_llava.model_card --model_name_or_path output/run --evaluation_dir output/evaluation

`build_model` and `train` write the card; this command adds the metrics of `evaluate` and its sample grid.
`--push_to_hub true` uploads the card with the model after training; later, `hf upload NAME output/run` does.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import replacing


@dataclass
class CardArguments:
    model_name_or_path: str = HfArg(help="A folder with a model or an adapter of training.")
    evaluation_dir: str = HfArg(help="The folder that evaluate wrote for it.")


if __name__ == "__main__":
    parse_first(CardArguments)  # before the imports that take seconds

from huggingface_hub import EvalResult

from train_llava.evaluation.metrics import METRICS, read_metrics
from train_llava.training.cards import FILE, cell, markdown, read_card

LICENCE = "## Licence\n"  # the last section of a card
# This command's section of a card, and how the table and the two lines in it begin
HELD_OUT = "## Held-out answers"
TABLE = "|  | all |"
INTERVAL = "The exact match of all"
SAMPLE_GRID = "![Held-out pictures, references and answers]"
DATASET = "held-out"  # of the results in the card's head


def add_evaluation(folder: Path, evaluation_dir: Path) -> None:
    """Puts an evaluation's metrics and sample grid into a model's card; an error names a folder without the files."""
    if not (folder / FILE).exists():
        raise ValueError(f"--model_name_or_path {folder} holds no {FILE}: name a folder that training wrote")
    card, metrics = read_card(folder / FILE), read_metrics(evaluation_dir)

    # A table of the metrics by language, and results for the hub
    columns = {"all": metrics} | metrics.get("by_language", {})  # as `TABLE` begins
    rows = [["", *columns]]
    results = [result for result in card.data.eval_results or [] if result.dataset_type != DATASET]
    for metric, name in METRICS.items():
        if metric in metrics:
            rows.append([name, *(cell(scores, metric) for scores in columns.values())])
            value = round(metrics[metric], 4)
            task = ("image-text-to-text", DATASET, "held-out pictures")
            results.append(EvalResult(*task, metric, value, metric_name=name))
    rows.append(["questions", *(f"{scores['n']:,}" for scores in columns.values())])
    low, high = metrics["intervals"]["exact_match"]
    section = [HELD_OUT, markdown(rows), f"{INTERVAL} lies between {low:.1%} and {high:.1%} (95 %)."]
    if (evaluation_dir / "captions.png").exists():
        section.append(f"{SAMPLE_GRID}(captions.png)")
        shutil.copy(evaluation_dir / "captions.png", folder / "captions.png")

    # The card, in place of the one before
    card.text = put_section(card.text, "\n\n".join(section))
    card.data.model_name = card.data.model_name or folder.absolute().name
    card.data.eval_results = results
    with replacing(folder / FILE) as file:
        card.save(file)


def put_section(text: str, section: str) -> str:
    """Puts this command's section into a card's text, in place of an earlier one or in front of the licence.

    Only the table and the lines that this command writes are replaced. Notes that people added to them stay.
    """
    # Without an earlier section
    heading = re.search(rf"^{re.escape(HELD_OUT)}[ \t\r]*$", text, re.MULTILINE)
    if heading is None:
        before, licence, after = text.partition(LICENCE)
        return f"{before.rstrip()}\n\n{section}\n\n{licence}{after}"

    # Remove this command's own lines from the earlier one; the rest are notes
    earlier, later = re.split(r"^(?=##? )|\Z", text[heading.end() :], maxsplit=1, flags=re.MULTILINE)
    for ours in (rf"{re.escape(TABLE)}.*\n(\|.*\n?)*", rf"({re.escape(INTERVAL)}|{re.escape(SAMPLE_GRID)}).*\n?"):
        earlier = re.sub(rf"^{ours}", "", earlier, flags=re.MULTILINE)
    notes = re.sub(r"\n{3,}", "\n\n", earlier).strip()
    return text[: heading.start()] + "\n\n".join([section, notes, later] if notes else [section, later])


def main() -> None:
    (arguments,) = parse_arguments(CardArguments)
    add_evaluation(Path(arguments.model_name_or_path), Path(arguments.evaluation_dir))
    print(f"written to {Path(arguments.model_name_or_path) / FILE}")


if __name__ == "__main__":
    run_command(main)
