"""Scans a data set before training: bad records, what deserves a look, lengths, sizes, samples, and the steps.

    python -m train_llava.check_data --data_path data --model_name_or_path output/llava --report data.json

Every record is read, and every picture is opened unless `--decode_pictures false`. With a model, conversations
are counted in its tokens, and one is shown as it is trained on. `data.png` shows 16 records as the model sees them.
The exit code is 1 if a record is bad.
"""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from math import ceil
from pathlib import Path

from transformers.hf_argparser import HfArg

from train_llava.cli import CUT_BOXES_HELP, parse_arguments, parse_first, run_command


@dataclass
class CheckArguments:
    data_path: list[str] = HfArg(help="One or several data sets, as in train.")
    image_dir: str | None = HfArg(default=None, help="The pictures' folder or .zip, as in train.")
    model_name_or_path: str | None = HfArg(default=None, help="A LLaVA checkpoint, to count its tokens.")
    max_length: int | None = HfArg(default=None, help="Longest conversation in tokens, as in train.")
    keep_cut_boxes: bool = HfArg(default=False, help=CUT_BOXES_HELP)
    decode_pictures: bool = HfArg(default=True, help="false: read the records alone, much faster.")
    eval_data_path: list[str] | None = HfArg(default=None, help="Held-out data: its pictures are looked for.")
    eval_image_dir: str | None = HfArg(default=None, help="The held-out pictures' folder or .zip, as in train.")
    eval_fraction: float | None = HfArg(default=None, help="Tell what this fraction keeps apart, as in train.")
    report: str | None = HfArg(default=None, help="A .json file for the results; a .png beside it shows the data.")
    global_batch_size: int = HfArg(default=16, help="Records of a step, to count the steps; as in the recipe.")
    num_train_epochs: float = HfArg(default=3, help="Passes over the data, to count the steps; as in the recipe.")
    num_proc: int = HfArg(default=os.cpu_count() or 1, help="Processes to use.")


if __name__ == "__main__":
    parse_first(CheckArguments)  # before the imports that take seconds

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from train_llava.chat import IGNORE, Chat, chat_of
from train_llava.data import LlavaDataset, to_item, to_sample
from train_llava.dataset.apart import keep_apart
from train_llava.dataset.findings import FINDINGS, facts_of, find
from train_llava.dataset.readers import BadRecordError
from train_llava.dataset.sources import find_records, form_of
from train_llava.evaluation.plots import draw, draw_data
from train_llava.model import load_processor

CHUNK = 100  # records that a process takes at once, since they may hold pictures
EXAMPLES = 3  # of each kind of error
ENOUGH = 40  # steps: six records were learnt in as many, and not in 3


def scan(indices: list[int], dataset: LlavaDataset, chat: Chat | None) -> dict[str, list]:
    """The errors of some records, and the facts of the good ones. A data-loading worker calls it."""
    results: dict[str, list] = defaultdict(list)
    for source, group in groupby(indices, key=lambda number: dataset.index[number, 0]):
        # Rows are read at once, several times faster than one by one
        numbers = list(group)
        rows = dataset.tables[source].__getitems__(dataset.index[numbers, 1].tolist())
        for number, row in zip(numbers, rows, strict=True):
            try:
                item = to_item(row, dataset.image_dirs[source], chat, dataset.decode)
                if chat is not None:
                    results["tokens"].append(len(to_sample(item, chat).input_ids))
            except BadRecordError as error:
                results["errors"].append(error.args)
                results["tokens"] += map(int, re.findall(r"^(\d+) tokens, ", error.args[1]))  # of one that is too long
                continue
            parts = chain.from_iterable(message["content"] for message in item["messages"])
            results["characters"].append(sum(len(part.get("text", "")) for part in parts))
            for name, values in facts_of(number, row, item, dataset.image_dirs[source]).items():
                results[name] += values
    return results


def scan_all(dataset: LlavaDataset, chat: Chat | None, num_proc: int) -> dict[str, list]:
    """The results of `scan` for all records. Without pictures and a model, one process is the fastest."""
    workers = num_proc if num_proc > 1 and (dataset.decode or chat is not None) else 0
    scan_chunk = partial(scan, dataset=dataset, chat=chat)
    loader = DataLoader(range(len(dataset)), CHUNK, num_workers=workers, collate_fn=scan_chunk)
    results: dict[str, list] = defaultdict(list)
    for part in tqdm(loader, "scanning", unit=f" x {CHUNK} records"):
        for name, values in part.items():
            results[name] += values
    return results


def kind_of(reason: str) -> str:
    """A reason without the names and numbers of one record, so that similar errors are counted together.

    For example, "my dog 1.png does not exist" becomes "… does not exist".
    """
    name = r"^.+?(?= (?:cannot be|does not|lies outside|is a folder|is an address|is not in the|is the name) )"
    return re.sub(rf"{name}|'[^']*'|<(?!image>|video>|audio>)[^>]*>|\S*[/.]\S+|\d+", "…", reason)


def summary(values: list[int]) -> dict[str, float]:
    """The distribution of a list of sizes."""
    quantiles = {"min": 0, "median": 50, "p95": 95, "p99": 99, "max": 100}
    return {name: float(np.percentile(values, q)) for name, q in quantiles.items()}


def show_sample(dataset: LlavaDataset, chat: Chat) -> str:
    """The first good record as the model is trained on it, the supervised tokens between ⟦ and ⟧."""
    for i in range(len(dataset)):
        try:
            sample = to_sample(dataset.read(i, dataset.decode), chat)
        except BadRecordError:
            continue
        # Of consecutive image tokens, only the first is printed
        is_image = sample.input_ids == chat.processor.image_token_id
        printed = ~is_image | ~np.append(False, is_image[:-1])
        input_ids, supervised = sample.input_ids[printed], sample.labels[printed] != IGNORE
        borders, text = np.flatnonzero(np.diff(supervised)) + 1, ""
        for ids, flags in zip(np.split(input_ids, borders), np.split(supervised, borders), strict=True):
            part = chat.tokenizer.decode(ids)
            text += f"⟦{part}⟧" if flags[0] else part
        return f"record {sample.id!r}, {len(sample.input_ids)} tokens:\n{text}"
    return "no record is good"


def main() -> None:
    (arguments,) = parse_arguments(CheckArguments)
    if arguments.eval_data_path is not None and not arguments.decode_pictures:
        raise ValueError(
            "--eval_data_path compares pictures, which --decode_pictures false leaves out: drop one of them"
        )
    if arguments.report is not None:
        Path(arguments.report).absolute().parent.mkdir(parents=True, exist_ok=True)

    # Scan the records, and the held-out ones
    dataset = LlavaDataset(arguments.data_path, arguments.image_dir, decode=arguments.decode_pictures)
    chat = None
    if arguments.model_name_or_path is not None:
        processor = load_processor(arguments.model_name_or_path)[1]
        chat = dataset.chat = chat_of(processor, arguments.max_length, arguments.keep_cut_boxes)
    results, held_out = scan_all(dataset, chat, arguments.num_proc), defaultdict(list)
    if arguments.eval_data_path is not None:
        held_out = scan_all(LlavaDataset(arguments.eval_data_path, arguments.eval_image_dir), chat, arguments.num_proc)

    # Put similar errors together, the most frequent first in print
    errors, scripts = results["errors"], dict(Counter(results["scripts"]).most_common())
    results["sides"] = list(chain.from_iterable(results["sizes"]))
    sizes = {name: results[name] for name in ("tokens", "characters", "sides") if results[name]}
    kinds: dict[str, list] = {}
    for record_id, reason in errors:
        kinds.setdefault(kind_of(reason), []).append({"id": record_id, "reason": reason})
    report = {
        "records": len(dataset),
        "bad": len(errors),
        "faults": {kind: {"count": len(bad), "examples": bad[:EXAMPLES]} for kind, bad in kinds.items()},
        **{name: summary(values) for name, values in sizes.items()},
        "findings": {},
        "scripts": scripts,
    }
    for name, (count, numbers) in find(results, held_out, chat).items():
        if count:
            examples = [dataset.read(number, decode=False)["id"] for number in dict.fromkeys(numbers[:EXAMPLES])]
            report["findings"][name] = {"count": count, "examples": examples}

    # Print the report, and write it
    for path in arguments.data_path:
        files, _ = find_records(path, arguments.image_dir)
        print(f"{path}: {form_of(path, files[0])}, files: {len(files):,}")
    print(f"{len(dataset):,} records, {len(errors):,} bad")
    for kind, bad in sorted(kinds.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(bad):>9,}  {kind}")
        for example in bad[:EXAMPLES]:
            print(f"{'':11}{example['id']}: {example['reason']}")
    for name, finding in report["findings"].items():
        print(f"{finding['count']:>9,}  {FINDINGS[name]}", *(f"({one})" for one in finding["examples"]))
    for name in sizes:
        print(f"{name:<11}" + "  ".join(f"{key} {value:,.0f}" for key, value in report[name].items()))
    print("languages  " + ", ".join(f"{script} {count:,}" for script, count in scripts.items()))
    trained = len(results["good"])
    if arguments.eval_fraction is not None:
        apart = keep_apart(dataset, arguments.eval_fraction, 42)  # train's --seed
        print(f"--eval_fraction {arguments.eval_fraction} keeps {len(apart):,} of the records apart")
        trained -= len(apart)
    batch, epochs = arguments.global_batch_size, arguments.num_train_epochs
    in_epoch = max(ceil(trained / batch), 1)  # the last one may be smaller
    report["steps"] = ceil(epochs * in_epoch)
    steps = f"steps      {report['steps']:,} of {batch} records in {epochs:g} epochs"
    if report["steps"] < ENOUGH:
        steps += f", too few to learn much: set --num_train_epochs {ceil(ENOUGH / in_epoch)}"
    print(steps)
    if chat is not None:
        print(show_sample(dataset, chat))
    if arguments.report is not None:
        path = Path(arguments.report)
        path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if results["good"]:
            draw(partial(draw_data, dataset, results, scripts), path.with_suffix(".png"))
        print("written to", *filter(os.path.exists, (path, path.with_suffix(".png"))))
    sys.exit(1 if errors else 0)


if __name__ == "__main__":
    run_command(main)
