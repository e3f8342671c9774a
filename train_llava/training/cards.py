"""The model card, README.md in a model's folder: written for a run, copied by a merge."""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import TrainerState
from yaml import YAMLError

from train_llava.evaluation.metrics import METRICS
from train_llava.evaluation.plots import plot_loss
from train_llava.model import LORA_PARTS, find_file
from train_llava.training.resume import changes_of

FILE = "README.md"
ADAPTER = " It is a LoRA adapter: `PeftModel.from_pretrained` puts it on its base model."
CARD = Path(__file__).with_name("card.md").read_text(encoding="utf-8")  # with the places that `write_card` fills


def cell(scores: dict[str, Any], metric: str) -> str:
    """A metric in percent, except CIDEr; empty if the questions do not have it."""
    if metric not in scores:
        return ""
    return f"{scores[metric]:.2f}" if metric == "cider" else f"{scores[metric]:.1%}"


def markdown(rows: list[Sequence[str]]) -> str:
    """Rows as a table, the first of them as its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def write_run_card(
    arguments: tuple[Any, ...], records: int | None, learning_rates: dict[str, float], state: TrainerState
) -> None:
    """Writes the loss curve and the model card of a run with these `arguments`; `records` is None for a stream."""
    model_arguments, lora_arguments, data_arguments, args = arguments
    folder, base = Path(args.output_dir), model_arguments.model_name_or_path
    is_adapter = args.train_type in LORA_PARTS
    plot_loss(state.log_history, folder / "loss.png")

    # The settings of the run
    size, unit = args.tokens_per_batch or args.train_batch_size, " tokens" if args.tokens_per_batch else ""
    accumulated, ranks, decay = args.gradient_accumulation_steps, args.world_size, args.weight_decay
    table = {
        "what trained": f"`{args.train_type}`",
        "learning rates": ", ".join(f"{part} {rate:g}" for part, rate in learning_rates.items()),
        "schedule": f"{args.lr_scheduler_type}, warm-up {args.warmup_steps:g}, weight decay {decay:g}",
        "records": "streamed" if records is None else f"{records:,}",
        "batch": f"{size * accumulated * ranks}{unit} ({size} x {accumulated} x {ranks} ranks)",
        "length": f"{state.global_step:,} of {state.max_steps:,} steps, {state.epoch or 0:.3g} epochs",
        "longest conversation": f"{data_arguments.max_length} tokens",
        "optimizer": args.optim,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": str(args.seed),
    }
    if is_adapter:
        settings = vars(lora_arguments) | {"bits": model_arguments.bits}
        table["LoRA"] = ", ".join(f"{name} {value}" for name, value in settings.items())
        if model_arguments.adapter_name_or_path is not None:
            table["goes on from"] = f"`{short_name(model_arguments.adapter_name_or_path)}`"
    if changes := changes_of(folder):
        table["changed by a resume"] = "; ".join(changes)

    # The card
    best = state.best_global_step if args.load_best_model_at_end and state.best_model_checkpoint else None
    table |= losses_and_scores(state.log_history, best)
    section = f"## Training\n\n{markdown([('', ''), *table.items()])}\n\n![Loss](loss.png)"
    name, adapter_of = folder.absolute().name, base if is_adapter else ""
    write_card(folder, name, ancestors(base), data_arguments.data_path, [section], adapter_of)


def losses_and_scores(log_history: list[dict[str, Any]], best: int | None) -> dict[str, str]:
    """A run's last losses and scores; on held-out data those of the step `best`, whose weights were kept, if given."""
    which = "last" if best is None else "of the step that is kept"
    last, of_weights = {}, {}
    for entry in log_history:
        last |= entry
        if best in (None, entry["step"]):
            of_weights |= entry
    losses = {
        "training loss, last": last.get("loss"),
        "training loss, mean": last.get("train_loss"),
        f"held-out loss, {which}": of_weights.get("eval_loss"),
    }
    table = {name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None}
    for metric, name in METRICS.items():
        if f"eval_{metric}" in of_weights:
            table[f"held-out {name}, {which}"] = cell({metric: of_weights[f"eval_{metric}"]}, metric)
    return table


def hub_ids(names: list[str]) -> list[str]:
    """The models or data sets among `names` that lie on the hub, without a data set's configuration."""
    places = dict.fromkeys(name.partition(":")[0] for name in names)
    return [place for place in places if re.fullmatch(r"[\w.-]+/[\w.-]+", place) and not Path(place).exists()]


def short_name(name: str) -> str:
    """A name without this machine's folders: a hub id, or the last part of a path."""
    return name if hub_ids([name]) else Path(name).absolute().name


def ancestors(model_name_or_path: str) -> list[str]:
    """The models that a model was made of, by its card, the oldest first; itself at the end."""
    with suppress(OSError, ValueError):  # there is no such model, or its card has another form
        card = find_file(model_name_or_path, FILE)
        return [*(read_card(card).data.get("made_of", []) if card else []), model_name_or_path]
    return [model_name_or_path]


def read_card(path: Path) -> ModelCard:
    """Reads a model's card; an OSError or ValueError if there is none, or its head cannot be read."""
    try:
        return ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        raise ValueError(f"{path} has a head that cannot be read: {error}") from error


def write_card(
    folder: Path, name: str, made_of: list[str], data: list[str], sections: list[str], adapter_of: str = ""
) -> None:
    """Writes a model's card: sections of Markdown under a head that links the names of the hub."""
    # The head, which the hub reads
    models, sources = [short_name(model) for model in made_of], [short_name(source) for source in data]
    head = ModelCardData(
        library_name="peft" if adapter_of else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava"],
        base_model=hub_ids([adapter_of] if adapter_of else made_of) or None,
        datasets=hub_ids(data) or None,
        made_of=models,
    )

    # Lists of the models and the data, then the sections
    lists = []
    for title, names in (("Made of", models), ("Trained on", sources)):
        if names:
            lists.append("\n".join([f"## {title}\n", *(f"- `{name}`" for name in names)]))
    text = "\n\n".join([*lists, *sections])
    adapter = ADAPTER if adapter_of else ""
    ModelCard(CARD.format(head=head.to_yaml(), name=name, adapter=adapter, sections=text)).save(folder / FILE)


def copy_card(adapter: str, base: str, merged: Path, name: str) -> None:
    """Gives a merged model its adapter's card; a new one called `name` if that is PEFT's or missing."""
    path, card = find_file(adapter, FILE), None
    with suppress(ValueError):  # it has another form
        card = path and read_card(path)
    if card is None or "made_of" not in card.data:
        write_card(merged, name, ancestors(base), [], [])
        return

    # The adapter's card, without the sentence that says how to open an adapter, and its pictures
    card.data.library_name = "transformers"
    card.text = card.text.replace(ADAPTER, "")
    card.save(merged / FILE)
    for picture in ("loss.png", "captions.png"):
        if path := find_file(adapter, picture):
            shutil.copy(path, merged)
