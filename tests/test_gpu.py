"""What is measured on a GPU, tried without one: variants that fail, die or hang, and a tiny slot for real."""

import gc
import importlib
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from torch import nn
from transformers import LlavaForConditionalGeneration


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)  # pytest keeps its own
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command sets
    return module


def tiny_slot(gpu, folder):
    return gpu.Slot(folder, real=False, records=2, warm=1, steps=3)


def table(path: Path) -> dict[str, dict[str, str]]:
    """Of each variant its cells by column."""
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    columns, _, *rows = [[cell.strip() for cell in row] for row in rows]
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def measured(slot) -> dict[str, str]:
    return {"note": str(os.getpid())}


def failing(slot) -> dict[str, str]:
    raise ValueError("no | memory\nleft")


def dying(slot) -> dict[str, str]:
    os._exit(7)


def hanging(slot) -> dict[str, str]:
    (slot.folder / "pid").write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    time.sleep(600)


def has_ended(pid: int) -> bool:
    """A process that was killed may wait for somebody to take note."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_variant_that_fails_dies_or_hangs_is_a_row_and_the_others_go_on(gpu, monkeypatch, tmp_path):
    functions = (measured, failing, measured, dying, measured, hanging)
    monkeypatch.setattr(gpu, "VARIANTS", dict(zip("abcdef", functions, strict=True)))
    rows = gpu.rows_of("abcdef", tiny_slot(gpu, tmp_path), str(tmp_path / "log"), minutes=60)
    notes = []
    for i in range(5):
        name, row = next(rows)
        assert name == "abcde"[i]
        notes.append(row["note"])
    monkeypatch.setattr(gpu, "VARIANT_MINUTES", 0.1)  # the process is there, so that little is needed
    assert list(rows) == [("f", {"note": "not done after 6 seconds"})]
    assert notes[1] == "ValueError: no | memory\nleft"
    assert notes[3] == "the process ended with exit code 7"
    assert notes[0] == notes[2] != notes[4]  # one process for all, as long as it lasts
    pids = [notes[0], notes[4], (tmp_path / "pid").read_text()]  # the last is what a variant had started
    assert all(has_ended(int(pid)) for pid in pids)


def test_where_no_time_is_left_the_file_says_so_and_a_run_after_it_goes_on(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "VARIANTS", {"a": measured, "b": failing, "c": hanging})
    output = tmp_path / "some.md"

    def ask(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--geometry", "tiny", "--output", str(output), *words])
        gpu.main()

    ask("--variants", "a", "b")
    first = output.read_text()
    assert table(output)["b"]["note"] == "ValueError: no / memory left"
    for _ in range(2):
        ask("--minutes", "0")  # "a" and "b" have rows
        assert output.read_text() == f"{first}\nNo time was left for: c\n"
    output.write_text(first.replace(torch.__version__, "1.0"))
    with pytest.raises(SystemExit, match="remove it"):
        ask()


def is_llava(value) -> bool:
    return issubclass(type(value), LlavaForConditionalGeneration)  # a proxy may point to nothing


def test_memory_is_given_back_behind_a_variant(gpu, tmp_path):
    models, before = [], set(map(id, filter(is_llava, gc.get_objects())))

    def out_of_memory(slot):
        model = nn.Linear(2, 2)
        models.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory")

    slot = tiny_slot(gpu, tmp_path)
    assert gpu.measure(out_of_memory, slot) == ({"note": "OutOfMemoryError: CUDA out of memory"}, True)
    row, usable = gpu.measure(gpu.VARIANTS["no-dropout"], slot)
    assert usable
    assert float(row["tokens/s"].replace(",", "")) > 0
    assert models[0]() is None
    assert set(map(id, filter(is_llava, gc.get_objects()))) <= before


def test_kernels_that_overlap_are_busy_once(gpu):
    from gpu_variants import Watch

    watch = Watch(1)
    watch.kernels = [SimpleNamespace(start=a, end=b) for a, b in [(50, 60), (0, 10), (5, 20), (6, 8)]]
    assert watch.busy_seconds() == pytest.approx(30e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no GPU here"),
        (["--geometry", "tiny"], "does not write into benchmarks/results"),
        (["--geometry", "tiny", "--output", ROOT / "docs/../benchmarks/results/x.md"], "does not write into"),
        (["--geometry", "tiny", "--output", "nowhere/x.md"], "there is no folder .*nowhere"),
    ],
)
def test_figures_of_no_gpu_are_not_written_among_the_results(gpu, monkeypatch, words, message):
    monkeypatch.setattr(gpu, "ON_GPU", False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        gpu.main()


@pytest.mark.slow
def test_the_command_measures_every_variant(gpu, tmp_path):
    output, words = tmp_path / "gpu.md", ["--geometry", "tiny", "--minutes", "60"]
    command = ["bash", ROOT / "benchmarks/gpu.sh", *words, "--output", output]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}

    # Killed behind its first row, the command leaves it
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.kill()
    process.communicate()
    assert first.startswith("| matrix-products |")
    assert first in output.read_text()

    # The next one goes on behind it
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = table(output)
    assert list(rows) == list(gpu.VARIANTS)
    assert first in output.read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu.md", "gpu.md.log"]

    # What cannot run here says why; all others have a rate
    alone = {"matrix-products", "attention-cudnn", "attention-no-cudnn", "launches", "launches-again"}
    trained = {name: row for name, row in rows.items() if row["tokens/s"]}
    failed = rows.keys() - trained.keys() - alone
    assert failed <= {"liger", "trl", "trl-no-recomputation"}
    assert all(re.match("[A-Za-z]+Error: .*(not installed|trl)", rows[name]["note"]) for name in failed)
    assert all(re.search(r"\d (us|ms|TFLOP/s|of)", rows[name]["note"]) for name in alone)
    for row in trained.values():
        assert float(row["s a step (range)"].split()[0]) > 0
        assert float(row["tokens/s"].replace(",", "")) > 10 * float(row["records/s"])
        assert float(row["mfu"].removesuffix("%")) > 0
        assert float(row["peak GB"]) > 0

    # The first losses of what computes the same agree, and each run learns
    losses = {name: [float(loss) for loss in row["loss, first → last"].split(" → ")] for name, row in trained.items()}
    others = {"compiled-16", "mixed-padded", "mixed-packed", "anyres", "bits-4"}
    others |= {"zero2-accumulated", "zero2-accumulated-check"}
    same = {name: first for name, (first, _) in losses.items() if name not in others}
    assert same == pytest.approx(dict.fromkeys(same, same["before"]), abs=2e-3)
    assert losses["mixed-padded"] == pytest.approx(losses["mixed-packed"], abs=2e-3)
    assert losses["zero2-accumulated"] == pytest.approx(losses["zero2-accumulated-check"], abs=2e-3)
    assert losses["compiled"] == pytest.approx(losses["no-dropout"], abs=2e-3)
    assert all(last < first for first, last in losses.values())

    # The counts of operators tell what each variant leaves out
    kernels = {name: int(row["kernels"].replace(",", "")) for name, row in trained.items() if row["kernels"]}
    assert kernels["before"] > kernels["no-mask"] > kernels["no-recomputation"] > kernels["no-dropout"]
    assert {name for name, row in trained.items() if row["hfu"]} >= {"before", "no-mask", "zero3-offload-full"}
    padding = int(re.match(r"\d+", rows["mixed-padded"]["note"])[0])
    assert padding > 20 > int(re.match(r"\d+", rows["no-dropout"]["note"])[0])
    assert int(re.match(r"\d+", rows["mixed-packed"]["note"])[0]) < 5  # up to the next multiple of 64
    assert re.search(r"[12] graphs, 0 breaks", rows["compiled"]["note"])
