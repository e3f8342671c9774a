"""What is measured on a GPU, tried without one: rows of runs that train, fail or hang, and a tiny run for real."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

# Stands in for run_zero2.sh: LoRA has no memory, stage 3 hangs, and the others leave a log
STAND_IN = """
echo "memory: about 12.5 GB a rank (weights 8.5) for 2 x 640 tokens"
for output_dir; do :; done
case "$*" in
  *zero3*) sleep 600 & echo $! >"$(dirname "$0")/pid"; wait ;;
  *lora*) echo "error: no memory | none" >&2; echo "[rank0] goodbye"; exit 1 ;;
esac
mkdir "$output_dir"
cp "$(dirname "$0")/state.json" "$output_dir/trainer_state.json"
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "ON_GPU", False)
    monkeypatch.setattr(module.signal, "signal", lambda *_: None)  # pytest keeps its own
    return module


def ask(monkeypatch, gpu, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    gpu.main()


def table(path: Path) -> dict[str, list[str]]:
    """First cell -> the others, of every row of the tables."""
    rows = [line.strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in cells] for first, *cells in rows}


def test_a_part_that_fails_or_hangs_is_a_row_and_the_others_go_on(gpu, monkeypatch, tmp_path):
    (tmp_path / "run_zero2.sh").write_text(STAND_IN)
    steps = [(9.5, 5, 0.1, 3.0), (9.0, 1000, 0.2, 4.0), (8.0, 3000, 0.4, 5.26), (7.25, 2000, 0.3, 5.0)]
    names = ("loss", "tokens_per_second", "mfu", "memory_gb")
    log = [dict(zip(names, step, strict=True)) for step in steps]
    (tmp_path / "state.json").write_text(json.dumps({"log_history": [*log, {"train_loss": 8.4}]}))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(gpu, "PART_MINUTES", 5 / 60)
    monkeypatch.setattr(gpu, "make_apart", lambda geometry, folder: (folder / f"{geometry}-parts").mkdir())
    parts = ["lora-zero2", "full-zero3", "projector-zero2", "lora-flash"]
    ask(monkeypatch, gpu, "--geometry", "tiny", "--output", tmp_path / "gpu.md", "--parts", *parts)
    found = table(tmp_path / "gpu.md")
    assert list(found) == ["run", *(f"`{part}`" for part in parts)]
    assert found["`lora-zero2`"] == ["", "", "", "12.5", "", "error: no memory / none"]
    assert found["`full-zero3`"] == ["", "", "", "12.5", "", "not done after 5 seconds"]
    assert found["`projector-zero2`"] == ["2,000", "30%", "5.3", "12.5", "9.500 → 7.250", ""]
    assert found["`lora-flash`"][-1] == "flash_attn is not installed"
    pid = int((tmp_path / "pid").read_text())  # a process that was killed may wait for somebody to take note
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_where_no_time_is_left_nothing_is_started(gpu, tmp_path):
    row = gpu.training_row("lora-zero2", ["touch", tmp_path / "started"], tmp_path / "run", 0)
    assert row == "| `lora-zero2` |  |  |  |  |  | no time left |"
    assert gpu.speed_table("speed-4b", "tiny", tmp_path, -1) == "`speed-4b`: no time left"
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        ask(monkeypatch, gpu, *words)


@pytest.mark.slow
def test_the_command_measures_real_runs(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"CPU_RANKS": "1", "MASTER_PORT": port, "PATH": path}
    command = ["bash", ROOT / "benchmarks/gpu.sh", "--geometry", "tiny", "--output", tmp_path / "gpu.md"]
    command += ["--parts", "lora-zero2", "full-zero3", "speed-4b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = table(tmp_path / "gpu.md")
    for part in ("`lora-zero2`", "`full-zero3`"):
        tokens, share, measured, _, losses, failed = found[part]
        assert failed == ""
        assert float(tokens.replace(",", "")) > 0
        assert float(share.removesuffix("%")) > 0
        assert float(measured) > 0
        first, last = map(float, losses.split(" → "))
        assert first == pytest.approx(9, abs=0.3)  # of a random model: about the logarithm of the 8,000 tokens
        assert last < first
    assert float(re.match(r"[\d.]+", found["ours"][0])[0]) > 0  # seconds a step, by speed.py
    assert [file.name for file in tmp_path.iterdir()] == ["gpu.md"]
