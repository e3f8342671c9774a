"""`--torch_compile`: the decoder layers in one graph, to the losses of the plain run."""

import pytest
import torch
from conftest import run_train

COMPILE = ["--torch_compile", "true", "--torch_compile_backend", "aot_eager"]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_layers_are_compiled_in_one_graph_for_all_lengths(llava, corpus, tmp_path, monkeypatch, checkpointing):
    from torch._dynamo.utils import counters  # here: it imports distutils, and setuptools must come first

    arguments = ["--train_type", "lora", "--lora_dropout", "0", "--activation_checkpointing", checkpointing]
    arguments += ["--max_steps", "5", "--per_device_train_batch_size", "3", "--preflight", "false"]
    plain = run_train(monkeypatch, llava, corpus, tmp_path / "plain", *arguments)
    torch.compiler.reset()
    counters.clear()
    compiled = run_train(monkeypatch, llava, corpus, tmp_path / "compiled", *arguments, *COMPILE)
    assert compiled == pytest.approx(plain, rel=1e-6)
    assert sum(counters["graph_break"].values()) == 0
    assert counters["stats"]["unique_graphs"] in (1, 2)  # the first length, then any
