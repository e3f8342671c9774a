"""What people read of a run: its curves, its sheet of answers, its model card, its tables."""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from torch import nn
from transformers import TrainerState, TrainingArguments
from yaml import YAMLError

from train_llava.evaluation.metrics import METRICS
from train_llava.evaluation.plots import plot_loss
from train_llava.model import LoraArguments, count_parameters, find_file
from train_llava.training.resume import changes_of

FILE = "README.md"
INTRO = "A LLaVA, which answers questions about pictures. `AutoModelForImageTextToText` and `AutoProcessor` open it."
PICTURES = """

Give it pictures that are upright, RGB with 8 bits, and on white where they were transparent: `pipeline`, llama.cpp and
others read other files otherwise than its training did. `python -m train_llava.prepare_picture` makes such files."""
ADAPTER = " It is a LoRA adapter: `PeftModel.from_pretrained` puts it on its base model."
LICENCE = """## Licence

The weights descend from the models and the data named above, and whatever their licences ask for holds here too. Look
them up before sharing this model.
"""


def cell(scores: dict[str, Any], metric: str) -> str:
    """A metric as people write it: in percent, but for CIDEr; nothing where the questions do not have it."""
    if metric not in scores:
        return ""
    return f"{scores[metric]:.2f}" if metric == "cider" else f"{scores[metric]:.1%}"


def markdown(rows: list[Sequence[str]]) -> str:
    """Rows as a table, the first of them as its head."""
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


def write_run_card(
    model_arguments: Any,
    lora_arguments: LoraArguments,
    data_arguments: Any,
    args: TrainingArguments,
    records: int | None,
    learning_rates: dict[str, float],
    state: TrainerState,
) -> None:
    """Writes the loss curve and the model card: what was trained on what, how and how far, and the losses."""
    folder, lora = Path(args.output_dir), args.train_type == "lora"
    plot_loss(state.log_history, folder / "loss.png")
    size, unit = args.tokens_per_batch or args.train_batch_size, " tokens" * bool(args.tokens_per_batch)
    batch = size * args.gradient_accumulation_steps * args.world_size
    settings = {
        "what trained": f"`{args.train_type}`",
        "learning rates": ", ".join(f"{part} {rate:g}" for part, rate in learning_rates.items()),
        "schedule": f"{args.lr_scheduler_type}, warm-up {args.warmup_steps:g}, weight decay {args.weight_decay:g}",
        "records": "streamed" if records is None else f"{records:,}",
        "batch": f"{batch}{unit} ({size} x {args.gradient_accumulation_steps} x {args.world_size} ranks)",
        "length": f"{state.global_step:,} of {state.max_steps:,} steps, {state.epoch or 0:.3g} epochs",
        "longest conversation": f"{data_arguments.max_length} tokens",
        "optimizer": args.optim,
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": str(args.seed),
    }
    if lora:
        given = vars(lora_arguments) | {"bits": model_arguments.bits}
        settings["LoRA"] = ", ".join(f"{name} {value}" for name, value in given.items())
        if model_arguments.adapter_name_or_path is not None:
            settings["goes on from"] = f"`{shown(model_arguments.adapter_name_or_path)}`"
    changes = changes_of(folder)
    if changes:
        settings["changed by a resume"] = "; ".join(changes)
    judged, which = state.log_history, "last"
    if args.load_best_model_at_end and state.best_model_checkpoint is not None:  # these weights are in the folder
        judged, which = (
            [entry for entry in judged if entry["step"] == state.best_global_step],
            "of the step that is kept",
        )
    losses = {
        "loss": "training loss, last",
        "train_loss": "training loss, mean",
        "eval_loss": f"held-out loss, {which}",
    }
    for key, name in losses.items():
        entries = judged if key == "eval_loss" else state.log_history
        values = [entry[key] for entry in entries if key in entry]
        if values:
            settings[name] = f"{values[-1]:.4f}"
    for metric, name in METRICS.items():
        values = [entry for entry in judged if f"eval_{metric}" in entry]
        if values:
            settings[f"held-out {name}, {which}"] = cell({metric: values[-1][f"eval_{metric}"]}, metric)
    sections = [f"## Training\n\n{markdown([('', ''), *settings.items()])}\n\n![Loss](loss.png)"]
    base, data = model_arguments.model_name_or_path, data_arguments.data_path
    write_card(folder, folder.absolute().name, ancestors(base), data, sections, adapter_of=base if lora else None)


def hub_ids(names: list[str]) -> list[str]:
    """The models or data sets that were named by their place on the hub, without a data set's configuration."""
    places = {name: name.partition(":")[0] for name in names if not Path(name).exists()}
    return list(dict.fromkeys(place for place in places.values() if re.fullmatch(r"[\w.-]+/[\w.-]+", place)))


def shown(name: str) -> str:
    """A name as strangers may see it: one of the hub, or the last part of a path on this machine."""
    return name if hub_ids([name]) else Path(name).absolute().name


def ancestors(model_name_or_path: str) -> list[str]:
    """What a model was made of, by its card, the oldest first; itself at the end."""
    with suppress(OSError, ValueError):  # there is no such model, or somebody else has written its card
        card = find_file(model_name_or_path, FILE)
        return [*(read_card(card).data.get("made_of", []) if card else []), model_name_or_path]
    return [model_name_or_path]


def read_card(path: Path) -> ModelCard:
    """A model's card.

    Raises:
        OSError, ValueError: it is not there, or its head cannot be read.
    """
    try:
        return ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        raise ValueError(f"{path} has a head that cannot be read: {error}") from error


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
        base_model=hub_ids(bases) or None,
        datasets=hub_ids(data) or None,
        made_of=made_of_shown,
    )
    lists = {"Made of": made_of_shown, "Trained on": data_shown}
    listed = [
        f"## {title}\n\n" + "\n".join(f"- `{name}`" for name in names) for title, names in lists.items() if names
    ]
    body = "\n\n".join([f"# {name}", INTRO + ADAPTER * bool(adapter_of) + PICTURES, *listed, *sections, LICENCE])
    ModelCard(f"---\n{head.to_yaml()}\n---\n\n{body}").save(folder / FILE)


def copy_card(adapter: str, base: str, merged: Path, name: str) -> None:
    """Gives a merged model of that name its adapter's card; a card of its own, where that has none of training's.

    PEFT writes one of another kind into each checkpoint.
    """
    path, card = find_file(adapter, FILE), None
    with suppress(ValueError):  # somebody else has written it
        card = path and read_card(path)
    if card is None or "made_of" not in card.data:
        write_card(merged, name, ancestors(base), [], [])
        return
    card.data.library_name = "transformers"
    card.text = card.text.replace(ADAPTER, "")
    card.save(merged / FILE)
    for picture in ("loss.png", "captions.png"):
        if found := find_file(adapter, picture):
            shutil.copy(found, merged)


def describe_trainable(model: nn.Module, learning_rates: dict[str, float]) -> str:
    """A table of what trains: each part's trainable parameters, all it has, and its learning rate."""
    lines = [f"{'':<16}{'trainable':>16}{'of':>16}{'learning rate':>16}"]
    for part, (trainable, total) in count_parameters(model).items():
        rate = f"{learning_rates[part]:g}" if trainable else ""
        lines.append(f"{part:<16}{trainable:>16,}{total:>16,}{rate:>16}".rstrip())
    if isinstance(model, PeftModel):
        layers = model.base_model.model.model.language_model.layers
        bare = {name.partition(".")[2] for name, p in layers.named_parameters() if p.ndim > 2 and "lora_" not in name}
        if bare:
            lines.append(f"no adapter on {', '.join(sorted(bare))}: no linear layers")
        if any(name.endswith("image_newline") for name, _ in model.named_parameters()):
            lines.append("image_newline stays as it is: PEFT saves modules, and this is none")
    return "\n".join(lines)
