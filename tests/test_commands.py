"""All commands share a device, checks of names and errors in one line; also the two shell scripts and env.sh."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_adapter, run_train, run_zero2
from huggingface_hub import constants

from train_llava import evaluate, infer, merge_lora
from train_llava.cli import device, run_command
from train_llava.common import checks
from train_llava.common.checks import check_name

# as env.sh finds out
WITHOUT_GPU = sys.platform == "linux" and not any(
    [os.path.exists("/dev/nvidiactl"), os.path.exists("/proc/driver/nvidia"), shutil.which("nvidia-smi")]
)


@pytest.fixture
def cuda_build(monkeypatch):
    """A CUDA build of torch on a machine without a GPU, which PyPI gives to Linux: `cuda` is named, but not there."""
    cuda = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", cuda)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def run(monkeypatch, command: str) -> None:
    """Runs a command in this process."""
    name, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    {"evaluate": evaluate, "infer": infer, "merge_lora": merge_lora}[name].main()


def test_a_cuda_build_without_a_gpu_computes_on_the_cpu(cuda_build, llava, corpus, tmp_path, monkeypatch, capsys):
    assert device() == torch.device("cpu")
    adapter = random_adapter(llava, tmp_path / "adapter", seed=0)
    options = f"--model_name_or_path {llava} --max_new_tokens 4"
    run(monkeypatch, f"infer {options} --prompt hi --image {corpus}/images_dl/0.png")
    run(monkeypatch, f"infer {options} --prompt hi --bits 4 --adapter_name_or_path {adapter}")
    run(monkeypatch, f"evaluate {options} --data_path {corpus} --output_dir {tmp_path}/scores")
    run(
        monkeypatch,
        f"merge_lora --model_name_or_path {llava} --adapter_name_or_path {adapter} --output_dir {tmp_path}/merged",
    )
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["n"] == 17
    run_train(monkeypatch, llava, corpus, tmp_path / "run", "--max_steps", "1", "--bits", "4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no name on the hub"),
        ("../nowhere", "no name on the hub"),
        ("/nowhere", "no name on the hub"),
        ("~/nowhere", "no name on the hub"),
        ("output/run/nowhere", "no name on the hub"),
        ("nowhere/", "no name on the hub"),
        (r"C:\models\nowhere", "no name on the hub"),
        ("模型", "no name on the hub"),
        ("", "no name on the hub"),
        ("README.md", "is a file: name the folder"),
    ],
)
def test_a_name_that_cannot_be_on_the_hub_is_refused_without_asking_it(monkeypatch, name, message):
    monkeypatch.setattr(checks, "hub_answers", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=f"^--model .*{message}"):
        check_name(f"--model {name}", name)
    check_name("--model tests", "tests")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch, tmp_path):
    requests = []

    class Unplugged:
        def head(self, address: str, timeout: float) -> None:
            requests.append(address)
            raise RuntimeError("no route to host")

    monkeypatch.setattr(checks, "get_session", Unplugged)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(ValueError, match=r"^--model owner/name is no folder here, and .* cannot be reached"):
        check_name("--model owner/name", "owner/name")
    assert requests == [constants.ENDPOINT]
    assert constants.is_offline_mode()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    cached = tmp_path / "models--owner--name"
    (cached / "snapshots" / "1").mkdir(parents=True)
    (cached / "snapshots" / "1" / "config.json").touch()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1")
    check_name("--model owner/name", "owner/name")


# Runs all commands but training in one process
MISSPELT = """
import runpy, sys
commands = sys.argv[1:]
for command in commands:
    sys.argv = [command, "--model_name_or_pth", "x"]
    try:
        runpy.run_module(f"train_llava.{command}", run_name="__main__")
    except SystemExit as end:
        print(end.code)
print(*sys.modules)
"""


def test_a_wrong_argument_is_refused_before_the_slow_imports():
    commands = ["build_model", "check_data", "evaluate", "export_gguf", "infer"]
    commands += ["merge_lora", "model_card", "prepare_picture", "web_demo"]
    words = [sys.executable, "-c", MISSPELT, *commands]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    *errors, modules = done.stdout.splitlines()
    assert len(errors) == len(commands)
    for command, error in zip(commands, errors, strict=True):
        message = "error: --model_name_or_pth is not known: the nearest that is known is --"
        assert error.startswith(message), command
    assert "yaml" in modules.split()
    assert not set(modules.split()) & {"torch", "peft", "datasets", "matplotlib", "accelerate", "gradio"}


def test_an_error_is_printed_by_the_first_rank_that_meets_it(monkeypatch, tmp_path):
    def fail(message: str) -> str | int:
        def main() -> None:
            raise ValueError(message)

        with pytest.raises(SystemExit) as end:
            run_command(main)
        return end.value.code

    monkeypatch.setenv("ERROR_DIR", str(tmp_path))
    assert [fail("no model"), fail("no model"), fail("no data")] == ["error: no model", 1, "error: no data"]
    monkeypatch.setenv("ERROR_DIR", str(tmp_path / "gone"))
    assert [fail("no model"), fail("no model")] == ["error: no model"] * 2


def test_an_error_of_all_ranks_is_one_line_and_the_launcher_adds_none(corpus, tmp_path):
    done = run_zero2(Path("./nowhere"), corpus, tmp_path / "run", "--train_type", "fulll")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert len(lines) == 1, done.stderr
    assert "invalid choice: 'fulll'" in lines[0]
    assert "exits with return code" not in done.stdout + done.stderr
    assert "usage" not in done.stdout + done.stderr


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def bash(folder: Path, command: str, *programs: Path) -> subprocess.CompletedProcess:
    """Runs a command in a folder, with the tests' Python and, before everything else, the programs of some folders."""
    path = ":".join([*map(str, programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "DEVICE_LOOKED_UP": "1", "MASTER_PORT": "1"}
    return subprocess.run(
        ["/bin/bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_run_zero2_takes_paths_relative_to_the_callers_folder(tmp_path):
    write_program(tmp_path / "bin" / "deepspeed", 'pwd; echo "$PYTHONPATH"; printf "%s\\n" "$@"; ls -d "$ERROR_DIR"')
    (tmp_path / "a b").mkdir()
    words = "--data_path data --deepspeed ds_own.json 'x y'"
    done = bash(tmp_path / "a b", f"bash {ROOT}/run_zero2.sh {words}", tmp_path / "bin")
    folder, path, *arguments, errors = done.stdout.splitlines()
    assert folder == str(tmp_path / "a b")
    assert path.split(":")[0] == str(ROOT)
    assert arguments[arguments.index("train_llava.train") + 1 :] == [
        *(f"--deepspeed={ROOT}/ds_zero2_no_offload.json", "--data_path", "data", "--deepspeed", "ds_own.json", "x y"),
    ]
    assert not Path(errors).exists()
    write_program(tmp_path / "bin" / "deepspeed", "exit 247")  # what the launcher makes of a killed rank
    done = bash(tmp_path, f"bash {ROOT}/run_zero2.sh --data_path data", tmp_path / "bin")
    assert (done.returncode, done.stderr.startswith("error: a rank was killed (signal 9)")) == (247, True)
    write_program(tmp_path / "bin" / "deepspeed", "exit 241")
    done = bash(tmp_path, f"bash {ROOT}/run_zero2.sh --data_path data", tmp_path / "bin")
    assert (done.returncode, done.stderr) == (241, "stopped by SIGTERM\n")
    done = bash(tmp_path, f"LC_ALL=zh_CN.UTF-8 bash {ROOT}/run_zero2.sh --data_path data", tmp_path / "bin")
    assert done.stderr.endswith("收到 SIGTERM，已停止\n")  # bash may warn that it lacks this locale
    done = bash(tmp_path, f"HOSTFILE=nothing bash {ROOT}/run_zero2.sh --data_path data", tmp_path / "bin")
    assert (done.returncode, done.stderr) == (1, "error: HOSTFILE=nothing does not exist\n")


def test_a_command_of_a_python_without_the_packages_says_so_in_one_line():
    command = [sys.executable, "-S", "-m", "train_llava.infer", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "lacks the packages: source .venv/bin/activate" in done.stderr


def test_warnings_that_are_no_fault_are_not_printed(caplog):
    for name in ("DeepSpeed", "torch.utils.cpp_extension", "transformers.modeling_utils"):
        for text in (
            "No CUDA runtime is found, using CUDA_HOME='/x'",
            "Setting accelerator to CPU.",
            f"{name} is told",
        ):
            with caplog.at_level("WARNING", name):
                logging.getLogger(name).warning(text)
    assert {record.message for record in caplog.records} <= {
        *("DeepSpeed is told", "torch.utils.cpp_extension is told", "transformers.modeling_utils is told")
    }
    assert "torch.utils.cpp_extension is told" in caplog.text


@pytest.mark.parametrize(
    ("words", "tests"),
    [
        ("", [f"{ROOT}/tests"]),
        ("test_own.py", []),
        ("own -k own", []),
        ("-x test_own.py::test_own", []),
        ("-k own", [f"{ROOT}/tests"]),  # a name, though there is such a folder
    ],
)
def test_run_tests_takes_paths_relative_to_the_callers_folder(tmp_path, words, tests):
    (tmp_path / "own").mkdir()
    (tmp_path / "test_own.py").touch()
    pytest_alone = f'[ "$2" = pytest ] || exec {sys.executable} "$@"; pwd; printf "%s\\n" "$@"'
    write_program(tmp_path / "bin" / "python3", pytest_alone)
    done = bash(tmp_path, f"bash {ROOT}/run_tests.sh {words}", tmp_path / "bin")
    expected = [str(tmp_path), "-m", "pytest", "-c", f"{ROOT}/pyproject.toml", "-n", "2", *words.split(), *tests]
    assert done.stdout.split() == expected


@pytest.mark.parametrize("kind", ["old", "missing", "old .venv"])
def test_an_unfit_python_is_refused_before_anything_is_downloaded(tmp_path, kind):
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")
    old = f'echo "$@" >> {tmp_path}/calls\n[ "$1" = --version ] && echo "Python 3.10.13"'
    if kind == "missing":
        write_program(tmp_path / "bin" / "dirname", f'{shutil.which("dirname")} "$@"')
        command, message = f"PATH={tmp_path}/bin; source env.sh requirements.txt", "python3 is not there"
    else:
        folder = tmp_path / "bin" if kind == "old" else tmp_path / ".venv" / "bin"
        folder.mkdir(parents=True)
        write_program(folder / ("python3" if kind == "old" else "python"), old)
        command = "source env.sh requirements.txt"
        message = "python3 is Python 3.10.13" if kind == "old" else f"{folder}/python is Python 3.10.13: remove"
    done = bash(tmp_path, command, tmp_path / "bin")
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python 3.11, 3.12 or 3.13 is needed, and ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert kind == "old .venv" or not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(("minor", "fits"), [(10, False), (11, True), (13, True), (14, False)])
def test_a_fitting_python_makes_a_whole_environment_or_none(tmp_path, minor, fits):
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==0.0.1\n")
    python = f"""case "$1 $2" in
    --version*) echo "Python 3.{minor}.0" ;;
    "-c "*) exec {sys.executable} -c "import sys; sys.version_info = 3, {minor}, 0; exec(sys.argv[1])" "$2" ;;
    "-m venv") mkdir -p "$3/bin"; exit 1 ;; # the disk is full
    *) exit 1 ;;
    esac"""
    write_program(tmp_path / "bin" / "python3", python)
    done = bash(tmp_path, "source env.sh requirements.txt", tmp_path / "bin")
    assert done.returncode == 1
    assert done.stdout == f"making {tmp_path}/.venv with Python 3.{minor}.0\n" * fits
    assert ("Python 3.11, 3.12 or 3.13 is needed" in done.stderr) != fits
    assert not (tmp_path / ".venv").exists()


def test_an_environment_with_the_pinned_packages_is_used_as_it_is(tmp_path):
    shutil.copy(ROOT / "env.sh", tmp_path)
    pins = (ROOT / "requirements.txt").read_text()
    (tmp_path / "requirements.txt").write_text(
        f"--prefer-binary\n{pins}\npillow[fpx] >= 12 # as it is\nnothing==1; python_version < '3'\n-r more.txt\n"
    )
    (tmp_path / "more.txt").write_text("packaging\n")
    done = bash(tmp_path, "source env.sh requirements.txt; command -v python3")
    assert (done.stdout, done.stderr) == (f"{Path(sys.executable).parent}/python3\n", "")


@pytest.mark.parametrize(
    ("build", "used"), [("2.13.0+cpu", True), ("2.13.0+cu130", True), ("2.13.0", True), ("2.12.1+cpu", False)]
)
def test_either_build_of_torch_is_the_pinned_one(tmp_path, build, used):
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\n")
    # the folder of env.sh is first in PYTHONPATH, so that this is the torch that is installed
    write_wheel(tmp_path / "torch.whl", "torch", build)
    zipfile.ZipFile(tmp_path / "torch.whl").extractall(tmp_path)
    (tmp_path / ".venv").mkdir()
    write_program(tmp_path / ".venv" / "bin" / "python", "echo an old one; exit 1")
    done = bash(tmp_path, "source env.sh requirements.txt")
    assert (done.returncode == 0, done.stderr == "") == (used, used)


def write_wheel(path: Path, name: str, version: str, needs: str = "") -> None:
    """A package of no code, as pip takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = f"{name}-{version}.dist-info"
    needed = f"Requires-Dist: {needs}\n" if needs else ""
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}")
        wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{folder}/RECORD", f"{folder}/METADATA,,\n{folder}/WHEEL,,\n{folder}/RECORD,,\n")


@pytest.fixture
def install(tmp_path):
    """An env.sh of its own with an empty .venv, beside package indexes that are served: `cpu`, `pypi` and `own`.

    Yields a function that sources it with some settings. It returns what env.sh says of torch, the packages that .venv
    then has, and what `cpu` has been asked for so far.
    """
    for index, name, version, needs in [
        ("cpu", "torch", "0.0.1+cpu", "filelock"),
        ("cpu", "filelock", "9.9", ""),
        ("own", "torch", "0.0.1+cu130", "filelock"),
        ("pypi", "torch", "0.0.1", "filelock"),
        ("pypi", "filelock", "3.0", ""),
        ("pypi", "added", "1.0", ""),
    ]:
        write_wheel(tmp_path / index / name / f"{name}-{version}-py3-none-any.whl", name, version, needs)
    (tmp_path / "empty" / "torch").mkdir(parents=True)
    shutil.copy(ROOT / "env.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch==0.0.1 # as it is\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    site = next(tmp_path.glob(".venv/lib/python*/site-packages"))
    for name in ("pip", "packaging"):  # found, not imported: a process that imports pip gets the old distutils
        (site / name).symlink_to(distribution(name).locate_file(name))
    requests = []

    class Indexes(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=tmp_path)

        def log_message(self, *_):
            requests.extend([self.path] if self.path.startswith("/cpu/") else [])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Indexes)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def source(settings: str = "TORCH_INDEX=$url/cpu") -> tuple[str, list[str], list[str]]:
        lines = [
            f"set -eu; unset ${{!PIP_@}}; url=http://127.0.0.1:{server.server_port}",
            "export no_proxy=127.0.0.1 PIP_CONFIG_FILE=/dev/null PIP_INDEX_URL=$url/pypi",
            f"{settings}; source env.sh requirements.txt",
        ]
        done = bash(tmp_path, "\n".join(lines), tmp_path / "bin")
        assert done.returncode == 0, done.stderr
        message = [line for line in done.stdout.splitlines() if "PyPI" in line]
        return "\n".join(message), sorted(path.stem for path in site.glob("*.dist-info")), list(requests)

    yield source
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not WITHOUT_GPU, reason="on Linux without an NVIDIA GPU")
def test_without_an_nvidia_gpu_only_torch_is_the_cpu_build(install, tmp_path):
    message, packages, requests = install("TORCH_INDEX=$url/cpu; export PIP_EXTRA_INDEX_URL=$url/own")
    assert "CPU build" in message
    assert len(message.splitlines()) == 1
    assert packages == ["filelock-3.0", "torch-0.0.1+cpu"]
    assert {path.split("/")[2] for path in requests} == {"torch"}
    with open(tmp_path / "requirements.txt", "a") as file:
        file.write("added==1.0\n")
    assert install() == ("", ["added-1.0", *packages], requests)
    assert install() == ("", ["added-1.0", *packages], requests)


@pytest.mark.skipif(not WITHOUT_GPU, reason="on Linux without an NVIDIA GPU")
@pytest.mark.parametrize("index", ["http://127.0.0.1:9", "$url/nowhere", "$url/empty", "silent"])
def test_torch_comes_from_pypi_if_the_index_of_cpu_builds_fails(install, index):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = index.replace("silent", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        message, packages, _ = install(f"TORCH_INDEX={url}")
    assert time.monotonic() - before < 30
    assert len(message.splitlines()) == 2
    assert message.endswith("torch comes from PyPI instead, whose CUDA build computes on the CPU as well")
    assert packages == ["filelock-3.0", "torch-0.0.1"]


@pytest.mark.parametrize("why", ["GPU", "macOS", "asked"])
def test_the_index_of_cpu_builds_is_used_on_linux_without_an_nvidia_gpu_only(install, tmp_path, why):
    if why == "GPU":
        write_program(tmp_path / "bin" / "nvidia-smi", "exit 0")
    if why == "macOS":
        write_program(tmp_path / "bin" / "uname", "echo Darwin")
    settings = "TORCH_INDEX=" if why == "asked" else "TORCH_INDEX=$url/cpu"
    assert install(settings) == ("", ["filelock-3.0", "torch-0.0.1"], [])
