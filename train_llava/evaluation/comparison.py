"""Compares evaluations of the same questions, in a table and a plot."""

from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from train_llava.dataset.readers import read_jsonl
from train_llava.evaluation.metrics import METRICS, difference, read_metrics
from train_llava.evaluation.plots import draw
from train_llava.training.cards import cell, markdown


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The metrics and predictions of an evaluation's folder; an OSError or ValueError if it has none."""
    metrics, predictions = read_metrics(folder), list(read_jsonl(folder / "predictions.jsonl"))
    for prediction in predictions:
        if not (isinstance(prediction, dict) and {"id", "prompt", "reference", "prediction"} <= prediction.keys()):
            raise ValueError(f"{folder / 'predictions.jsonl'} was not written by evaluate: name another folder")
    return metrics, predictions


def compare(folders: list[Path | str], output_dir: Path) -> str:
    """Writes `comparison.md` and `comparison.png` into `output_dir` and returns the table.

    Each run is compared with the first one question by question, which tells more than two intervals. A line
    below the table names each setting that differs. An OSError or ValueError names a folder that is no evaluation,
    or was asked other questions than the first.
    """
    runs = {str(folder): read_run(Path(folder)) for folder in folders}
    first, (_, ours) = next(iter(runs.items()))
    scores_of_runs = {name: scores for name, (scores, _) in runs.items()}
    metrics = [name for name in METRICS if all(name in scores for scores in scores_of_runs.values())]
    with_text = all("text" in scores for scores in scores_of_runs.values())
    # A row for each run
    rows = [["run", *(METRICS[name] for name in metrics), f"exact match, less that of {first}"]]
    rows[0] += ["text loss"] * with_text
    for name, (scores, predictions) in runs.items():
        if [p | {"prediction": None} for p in predictions] != [p | {"prediction": None} for p in ours]:
            raise ValueError(f"{name} and {first} were asked different questions, or of other right answers")
        more, (low, high) = difference(predictions, ours)
        change = "" if name == first else f"{more:+.1%} ({low:+.1%} to {high:+.1%})"
        rows.append([name, *(cell(scores, metric) for metric in metrics), change])
        rows[-1] += [f"{scores['text']['loss']:.4f}"] if with_text else []
    text = "\n\n".join([markdown(rows), *_changed_settings(scores_of_runs)])
    footer = f"{len(ours):,} questions; intervals: 95 %."
    (output_dir / "comparison.md").write_text(f"{text}\n\n{footer}\n", encoding="utf-8")
    draw(lambda path: draw_comparison(scores_of_runs, metrics, path), output_dir / "comparison.png")
    return text


def _changed_settings(runs: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each setting that is not the same in all runs, from the metrics of each."""
    settings, lines = {run: scores.get("settings", {}) for run, scores in runs.items()}, []
    for name in dict.fromkeys(chain.from_iterable(settings.values())):
        values = {run: str(of_run.get(name, "unknown")) for run, of_run in settings.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} in {run}" for run, value in values.items())
            lines.append(f"{name} differs: {listed}")
    return lines


def draw_comparison(runs: dict[str, dict[str, Any]], metrics: list[str], path: Path) -> None:
    """Draws a panel for each metric with a bar for each run, and the intervals where there are some."""
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
