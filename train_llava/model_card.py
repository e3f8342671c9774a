"""The model card, README.md in a model's folder: what it was made of, how it was trained, and what it is worth.

    python -m train_llava.model_card --model_name_or_path output/run --evaluation_dir output/evaluation

`build_model` and `train` write the card; this command adds what `evaluate` found, its sheet of answers included. With
`--push_to_hub true`, training uploads the card with the model; afterwards, `hf upload NAME output/run` does.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from train_llava.cli import parse_arguments, run_command
from train_llava.metrics import METRICS
from train_llava.reports import FILE, HELD_OUT, LICENCE, cell, markdown


@dataclass
class CardArguments:
    model_name_or_path: str = field(metadata={"help": "The folder of a model or an adapter that training wrote."})
    evaluation_dir: str = field(metadata={"help": "The folder that evaluate wrote for it."})


def add_evaluation(folder: Path, evaluation_dir: Path) -> None:
    """Puts the metrics and the sheet of answers of an evaluation into a model's card, in place of earlier ones.

    Raises:
        OSError, ValueError: one of the folders does not hold what it should.
    """
    if not (folder / FILE).exists():
        raise ValueError(f"--model_name_or_path {folder} holds no {FILE}: name a folder that training wrote")
    if not (evaluation_dir / "metrics.json").exists():
        raise ValueError(f"--evaluation_dir {evaluation_dir} holds no metrics.json: name a folder that evaluate wrote")
    metrics = json.loads((evaluation_dir / "metrics.json").read_text())
    card = ModelCard.load(folder / FILE)
    columns = {"all": metrics} | metrics.get("by_language", {})
    rows = [["", *columns]]
    for metric, name in METRICS.items():
        if metric in metrics:
            rows.append([name, *(cell(scores, metric) for scores in columns.values())])
    low, high = metrics["intervals"]["exact_match"]
    rows.append(["questions", *(f"{scores['n']:,}" for scores in columns.values())])
    note = f"The exact match of all lies between {low:.1%} and {high:.1%} (95 %)."
    before, licence, _ = card.text.partition("## Licence\n")
    before = before.partition(HELD_OUT)[0].strip()
    shutil.copy(evaluation_dir / "captions.png", folder / "captions.png")
    section = f"{HELD_OUT}\n{markdown(rows)}\n\n{note}\n\n![Held-out pictures, references and answers](captions.png)"
    card.text = "\n\n".join(["", before, section, LICENCE if licence else ""])
    result = {"task_type": "image-text-to-text", "dataset_type": "held-out", "dataset_name": "held-out pictures"}
    card.data.model_name = folder.absolute().name
    card.data.eval_results = [
        EvalResult(**result, metric_type=metric, metric_name=name, metric_value=round(metrics[metric], 4))
        for metric, name in METRICS.items()
        if metric in metrics
    ]
    card.save(folder / FILE)


def main() -> None:
    (arguments,) = parse_arguments(CardArguments)
    add_evaluation(Path(arguments.model_name_or_path), Path(arguments.evaluation_dir))
    print(f"written to {Path(arguments.model_name_or_path) / FILE}")


if __name__ == "__main__":
    run_command(main)
