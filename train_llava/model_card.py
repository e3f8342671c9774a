"""The model card, README.md in a model's folder: what it was made of, how it was trained, and what it is worth.

    python -m train_llava.model_card --model_name_or_path output/run --evaluation_dir output/evaluation

`build_model` and `train` write the card; this command adds what `evaluate` found, its sheet of answers included. With
`--push_to_hub true`, training uploads the card with the model; afterwards, `hf upload NAME output/run` does.
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from train_llava.cli import parse_arguments, run_command
from train_llava.metrics import METRICS, cell, markdown

FILE = "README.md"
HELD_OUT = "## Held-out answers\n"
INTRO = "A LLaVA, which answers questions about pictures. `AutoModelForImageTextToText` and `AutoProcessor` open it."
ADAPTER = " It is a LoRA adapter: `PeftModel.from_pretrained` puts it on its base model."
LICENCE = """## Licence

The weights descend from the models and the data named above, and whatever their licences ask for holds here too. Look
them up before sharing this model.
"""


@dataclass
class CardArguments:
    model_name_or_path: str = field(metadata={"help": "The folder of a model or an adapter that training wrote."})
    evaluation_dir: str = field(metadata={"help": "The folder that evaluate wrote for it."})


def is_hub_id(name: str) -> bool:
    """Whether a model or a data set was named by its place on the hub."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def shown(name: str) -> str:
    """A name as strangers may see it: a hub id, or the last part of a path on this machine."""
    return name if is_hub_id(name) else Path(name).absolute().name


def ancestors(model_name_or_path: str) -> list[str]:
    """What a model was made of, by its card, the oldest first; itself at the end."""
    card = Path(model_name_or_path) / FILE
    known = ModelCard.load(card).data.get("made_of", []) if card.exists() else []
    return [*known, model_name_or_path]


def write_card(
    folder: Path, name: str, made_of: list[str], data: list[str], sections: list[str], adapter_of: str | None = None
) -> None:
    """Writes a model's card: sections of Markdown under a head that the hub reads.

    `made_of` and `data` are names as given, and those of them that are hub ids are linked there; an adapter's base
    model is `adapter_of`.
    """
    bases = [adapter_of] if adapter_of else made_of
    made_of_shown, data_shown = list(map(shown, made_of)), list(map(shown, data))
    head = ModelCardData(
        library_name="peft" if adapter_of else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava"],
        base_model=[name for name in bases if is_hub_id(name)] or None,
        datasets=[name for name in data if is_hub_id(name)] or None,
        made_of=made_of_shown,
    )
    lists = {"Made of": made_of_shown, "Trained on": data_shown}
    listed = [
        f"## {title}\n\n" + "\n".join(f"- `{name}`" for name in names) for title, names in lists.items() if names
    ]
    body = "\n\n".join([f"# {name}", INTRO + ADAPTER * bool(adapter_of), *listed, *sections, LICENCE])
    ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}").save(folder / FILE)


def carry_card(adapter: Path, merged: Path) -> None:
    """Gives a merged model the card that its adapter has, if it has one."""
    if (adapter / FILE).exists():
        card = ModelCard.load(adapter / FILE)
        card.data.library_name = "transformers"
        card.text = card.text.replace(ADAPTER, "")
        card.save(merged / FILE)
        for picture in adapter.glob("*.png"):
            shutil.copy(picture, merged)


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
