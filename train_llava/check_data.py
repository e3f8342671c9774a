"""Goes through a data set before anyone trains on it: what is bad and why, how long, how large, and how it will look.

    python -m train_llava.check_data --data_path data --model_name_or_path output/llava --report report.json

Every record is read and, unless `--decode_pictures false`, every picture opened, in all processes the machine has; it
never stops at a fault. With a model, conversations are counted in its tokens and one is shown as it is trained on.
Exit code 1 where a record is bad.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

from train_llava.cli import parse_arguments, parse_first, run_command


@dataclass
class CheckArguments:
    data_path: list[str] = field(metadata={"help": "One or several data sets, as train takes them."})
    image_dir: str | None = field(default=None, metadata={"help": "The pictures' folder or .zip, as train takes it."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "A LLaVA checkpoint, to count its tokens."})
    max_length: int | None = field(default=None, metadata={"help": "Longest conversation in tokens, as train has it."})
    decode_pictures: bool = field(default=True, metadata={"help": "false: look at the records alone, much faster."})
    report: str | None = field(
        default=None, metadata={"help": "A .json file for the outcome; histograms go into a .png of the same name."}
    )
    num_proc: int = field(default=os.cpu_count() or 1, metadata={"help": "Processes to use."})


if __name__ == "__main__":
    parse_first(CheckArguments)  # before the imports that take seconds

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from train_llava.chat import IGNORE, Chat, chat_of
from train_llava.data import LlavaDataset, to_item, to_sample
from train_llava.model import load_processor
from train_llava.records import BadRecordError

CHUNK = 100  # records a process takes at once, which may hold pictures
EXAMPLES = 3  # of each fault


worker: dict[str, Any] = {}  # what a process opens once: the data set and, with a model, the chat


def open_data(arguments: CheckArguments) -> None:
    """Opens the data set, and the model's processor, in a process."""
    chat = None
    if arguments.model_name_or_path is not None:
        _, processor = load_processor(arguments.model_name_or_path)
        chat = chat_of(processor, arguments.max_length)
    worker["dataset"] = LlavaDataset(arguments.data_path, arguments.image_dir, decode=arguments.decode_pictures)
    worker["chat"] = chat


def rows(dataset: LlavaDataset, start: int, stop: int) -> Iterator[tuple[dict[str, Any], Path | None]]:
    """The rows from `start` to `stop` and their pictures' folders, at once, which takes a fraction of one by one."""
    for source, places in groupby(dataset.index[start:stop].tolist(), key=itemgetter(0)):
        columns = dataset.tables[source][[row for _, row in places]]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True)), dataset.image_dirs[source]


def scan(start: int, stop: int) -> dict[str, list]:
    """What the records from `start` to `stop` are like: their faults, and the sizes of the good ones."""
    dataset, chat = worker["dataset"], worker["chat"]
    findings: dict[str, list] = {"faults": [], "tokens": [], "characters": [], "sides": []}
    for row, image_dir in rows(dataset, start, stop):
        try:
            item = to_item(row, image_dir, None, dataset.decode, measure=chat is not None and chat.anyres)
            if chat is not None:
                findings["tokens"].append(len(to_sample(item, chat).input_ids))
            findings["characters"].append(
                sum(len(part.get("text", "")) for m in item["messages"] for part in m["content"])
            )
            findings["sides"] += [side for image in item["images"] for side in image.size]
        except BadRecordError as error:
            findings["faults"].append(error.args)
    return findings


def kind_of(reason: str) -> str:
    """A reason without the names and numbers of one record, so that like faults are counted together."""
    named = r"^.+?(?= (?:cannot be|does not|lies outside|is a folder|is an address|is not in the|is the name) )"
    return re.sub(rf"{named}|'[^']*'|<(?!image>|video>|audio>)[^>]*>|\S*[/.]\S+|\d+", "…", reason)


def summary(values: list[int]) -> dict[str, float]:
    """The spread of a list of sizes."""
    at = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: float(np.percentile(values, q)) for name, q in at.items()} if values else {}


def draw_histograms(findings: dict[str, list], path: Path) -> None:
    """Draws how long the conversations are and how large the pictures, one panel each."""
    names = {"tokens": "tokens a conversation", "characters": "characters a conversation", "sides": "pixels a side"}
    panels = [(label, findings[name]) for name, label in names.items() if findings[name]]
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axes, (label, values) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        axes.hist(values, bins=40)
        axes.set(xlabel=label, ylabel="number")
    figure.savefig(path, dpi=120)


def show_sample(dataset: LlavaDataset, chat: Chat) -> str:
    """The first good record as the model is trained on it; what it has to say stands between ⟦ and ⟧."""
    for i in range(len(dataset)):
        try:
            sample = to_sample(dataset.read(i, dataset.decode, measure=chat.anyres), chat)
        except BadRecordError:
            continue
        input_ids, labels = sample.input_ids, sample.labels
        image_token_id, tokenizer, pieces = chat.processor.image_token_id, chat.processor.tokenizer, []
        for learnt, group in groupby(zip(input_ids, labels, strict=True), lambda pair: pair[1] != IGNORE):
            runs = groupby(token_id for token_id, _ in group)
            ids = [i for token_id, run in runs for i in ([token_id] if token_id == image_token_id else run)]
            pieces.append(f"⟦{tokenizer.decode(ids)}⟧" if learnt else tokenizer.decode(ids))
        return f"record {sample.id!r}, {len(input_ids)} tokens:\n" + "".join(pieces)
    return "no record is good"


def main() -> None:
    (arguments,) = parse_arguments(CheckArguments)
    if arguments.report is not None:
        Path(arguments.report).absolute().parent.mkdir(parents=True, exist_ok=True)
    open_data(arguments)
    total = len(worker["dataset"])
    findings: dict[str, list] = {"faults": [], "tokens": [], "characters": [], "sides": []}
    starts = range(0, total, CHUNK)
    # texts alone are looked at sooner than another process has started
    alone = arguments.num_proc == 1 or not (arguments.decode_pictures or arguments.model_name_or_path)
    processes = partial(ProcessPoolExecutor, arguments.num_proc, get_context("spawn"), open_data, (arguments,))
    with nullcontext() if alone else processes() as pool:
        parts = (map if alone else pool.map)(scan, starts, [min(start + CHUNK, total) for start in starts])
        for part in tqdm(parts, total=len(starts), desc="looking", unit=f" x {CHUNK} records"):
            for name, values in part.items():
                findings[name] += values

    kinds: dict[str, list] = {}
    for record_id, reason in findings["faults"]:
        kinds.setdefault(kind_of(reason), []).append({"id": record_id, "reason": reason})
    report = {
        "records": total,
        "bad": len(findings["faults"]),
        "faults": {kind: {"count": len(bad), "examples": bad[:EXAMPLES]} for kind, bad in kinds.items()},
        **{name: summary(findings[name]) for name in ("tokens", "characters", "sides") if findings[name]},
    }
    print(f"{total:,} records, {report['bad']:,} bad")
    for kind, bad in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(bad):>9,}  {kind}")
        for example in bad[:EXAMPLES]:
            print(f"{'':11}{example['id']}: {example['reason']}")
    for name in ("tokens", "characters", "sides"):
        if findings[name]:
            print(f"{name:<11}" + "  ".join(f"{key} {value:,.0f}" for key, value in report[name].items()))
    if worker["chat"] is not None:
        print(show_sample(worker["dataset"], worker["chat"]))
    if arguments.report is not None:
        path = Path(arguments.report)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {path}")
        if findings["characters"]:
            draw_histograms(findings, path.with_suffix(".png"))
            print(f"written to {path.with_suffix('.png')}")
    sys.exit(1 if findings["faults"] else 0)


if __name__ == "__main__":
    run_command(main)
