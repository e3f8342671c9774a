"""The toy example from end to end, and the notebooks that use its output."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from conftest import free_port
from nbclient import NotebookClient

from examples.openmoji.compare_modes import Comparison, by_mode, compare
from examples.openmoji.wordings import LANGUAGES, WORDINGS

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path.name for path in ROOT.glob("code*.ipynb"))
CHINESE = "[\u4e00-\u9fff]"


@pytest.mark.slow
def test_the_default_run_answers_questions_about_held_out_scenes(default_run):
    metrics = json.loads((default_run / "evaluation" / "metrics.json").read_text())
    assert metrics["by_kind"].keys() == WORDINGS.keys()
    assert metrics["by_language"].keys() == LANGUAGES.keys()
    for language, scores in metrics["by_language"].items():
        assert scores["n"] == 440
        assert scores["exact_match"] >= 0.8
        for control in metrics["controls"].values():
            assert control["by_language"][language]["exact_match"] < 0.4
    assert (default_run / "evaluation" / "captions.png").stat().st_size > 100_000


def test_an_example_skips_finished_stages(tmp_path):
    for name, step in {"finished": 9, "stopped": 4}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 9}))
    (tmp_path / "begun").mkdir()  # killed before it wrote a file
    script = f"""source {ROOT}/examples/stages.sh
    for run in finished stopped begun nothing; do trained $run && echo $run is trained; done
    train finished recipe.yaml
    for file in finished nothing; do if missing $file; then echo make $file; fi; done"""
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    kept = "finished exists from an earlier start and is kept; to make it anew, remove it and everything made from it"
    assert done.stdout.splitlines() == ["finished is trained", kept, kept, "make nothing"]

    # Only a run that was begun is resumed
    (tmp_path / "run_zero2.sh").write_text('echo "$@"; mkdir -p new; cp finished/trainer_state.json $RUN')
    script = f"""source {ROOT}/examples/stages.sh
    export RUN=new; train new a.yaml --bf16 true; RUN=stopped; train stopped b.yaml; stage One 一"""
    environment = os.environ | {"LC_ALL": "zh_CN.UTF-8"}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    *lines, title = done.stdout.splitlines()
    assert lines == ["a.yaml --bf16 true", "b.yaml --resume_from_checkpoint true", ""]
    assert title.startswith("== 一 (0:0")


def test_an_evaluation_that_is_there_is_shown(tmp_path):
    scores = {"exact_match": 0.5, "n": 8, "intervals": {"exact_match": [0.25, 0.75]}}
    (tmp_path / "evaluation").mkdir()
    metrics = tmp_path / "evaluation" / "metrics.json"
    metrics.write_text(json.dumps(scores | {"controls": {"blank_pictures": {"exact_match": 0.125}}}))
    for path in (metrics.parent, metrics):
        script = f"source {ROOT}/examples/stages.sh; missing {path} || echo kept"
        done = subprocess.run(["bash", "-ec", script], cwd=ROOT, capture_output=True, text=True, check=True)
        _, _, _, model, interval, control, *_, pictures, last = done.stdout.splitlines()
        assert [model.split()[-1], interval.split()[-1], control.split()[-1]] == ["50.0%", "25.0%-75.0%", "12.5%"]
        assert (pictures, last) == (f"pictures and answers: {metrics.parent}/captions.png", "kept")


def test_a_comparison_keeps_its_results_and_stops_at_a_failure(tmp_path, monkeypatch):
    compared = Comparison(
        tmp_path, ["train"], "heldout", {name: [] for name in "abc"}, 600, 1, [], ["--text_path", "text"]
    )
    measured, results = [], tmp_path / "new" / "modes.json"

    def measure(compared, mode, seed, folder):
        measured.append((mode, seed))
        if (mode, seed) == ("b", 0):
            raise SystemExit("train failed")
        time.sleep(0.01)
        return {"mode": mode, "seed": seed, "steps": compared.steps}

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["compare_modes", *map(str, words)])
        return compare("", compared, measure, [0, 1], tmp_path / "committed.json")

    monkeypatch.chdir(tmp_path)
    for name in ("llava", "train", "heldout", "text"):
        with pytest.raises(SystemExit, match=rf"{name} is missing: finish"):
            command("--results", results)
        (tmp_path / name).mkdir()
    (tmp_path / "committed.json").write_text('[{"mode": "a", "seed": 7}]')
    assert command() == [{"mode": "a", "seed": 7}]
    assert not measured
    with pytest.raises(SystemExit, match="--steps 39: take 40 or more"):
        command("--results", results, "--steps", 39)
    few = command("--results", results, "--modes", "c", "a", "--seeds", 1, "--steps", 40)
    assert [(result["seed"], result["steps"]) for result in few] == [(1, 40), (1, 40)]
    assert [r["steps"] for r in command("--results", results, "--modes", "a", "--seeds", 1)] == [40, 600, 40]
    short, long = ({"mode": "a", "steps": steps, "exact_match": 1} for steps in (40, 600))
    assert by_mode(dict.fromkeys("abc"), [short, long]) == {"a": [long]}
    with pytest.raises(SystemExit, match="train failed"):
        command("--results", results, "--seeds", 0, *range(2, 40))
    assert len(measured) < 40
    kept = {(run["mode"], run["seed"]) for run in json.loads(results.read_text())}
    assert kept == set(measured) - {("b", 0)}  # also the run that was under way at the failure
    (tmp_path / "other.json").write_text('[{"mode": "z", "seed": 0, "steps": 600}]')
    with pytest.raises(SystemExit, match=r"other\.json has the unknown mode z"):
        command("--results", "other.json")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(default_run, name, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", free_port())
    notebook = nbformat.read(ROOT / name, as_version=4)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_with_its_outputs(name):
    cells = [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_markdown_cell_is_in_both_languages(name):
    cells = [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "markdown"]
    assert cells
    for cell in cells:
        prose = re.sub(r"`[^`]*`|\(.*?\)|^    .*$", "", cell.source, flags=re.MULTILINE)  # without code and links
        paragraphs = prose.split("\n\n")
        if prose.startswith("#"):
            heading = paragraphs.pop(0)
            assert re.search(f"[A-Za-z]{{2}}.*{CHINESE}", heading), heading
        assert any(re.search(CHINESE, text) for text in paragraphs), f"no Chinese in: {prose}"
        english = [text for text in paragraphs if not re.search(CHINESE, text)]
        assert any(len(re.findall("[A-Za-z]{2,}", text)) > 3 for text in english), f"no English in: {prose}"
