"""What all commands share: the device they ask for, the names they are given, and errors in one line."""

import json
import sys

import pytest
import torch
from conftest import random_adapter, run_train

from train_llava import evaluate, infer, merge_lora
from train_llava.cli import device


@pytest.fixture
def cuda_build(monkeypatch):
    """A CUDA build of torch on a machine without a GPU, which PyPI gives to Linux: `cuda` is named, but not there."""
    named = lambda check_available=False: None if check_available else torch.device("cuda")  # noqa: E731
    monkeypatch.setattr(torch.accelerator, "current_accelerator", named)
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
    asked = f"--model_name_or_path {llava} --max_new_tokens 4"
    run(monkeypatch, f"infer {asked} --prompt hi --image {corpus}/images_dl/0.png")
    run(monkeypatch, f"infer {asked} --prompt hi --bits 4 --adapter_name_or_path {adapter}")
    run(monkeypatch, f"evaluate {asked} --data_path {corpus} --output_dir {tmp_path}/scores")
    run(
        monkeypatch,
        f"merge_lora --model_name_or_path {llava} --adapter_name_or_path {adapter} --output_dir {tmp_path}/merged",
    )
    assert json.loads((tmp_path / "scores" / "metrics.json").read_text())["n"] == 17
    run_train(monkeypatch, llava, corpus, tmp_path / "run", "--max_steps", "1", "--bits", "4")
