"""Weights in 4 and 8 bits: what is held in them, how near the answers stay, and that LoRA trains on top."""

import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from conftest import run_train
from safetensors.torch import load_file

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model import count_parameters, load_checkpoint
from train_llava.modeling.adapter import load_model

KINDS = {4: Params4bit, 8: Int8Params}


@pytest.mark.parametrize("bits", KINDS)
def test_only_the_language_model_is_held_in_few_bits(llava, processor, corpus, bits):
    whole, _ = load_model(str(llava))
    model, _ = load_model(str(llava), bits=bits)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        linear = "language_model.layers." in name and theirs.ndim == 2
        assert isinstance(ours, KINDS[bits]) == linear, name
        assert linear or torch.equal(ours, theirs), name
    assert count_parameters(model)["language model"][1] == count_parameters(whole)["language model"][1]
    dataset = LlavaDataset(str(corpus))
    batch = LlavaCollator(processor)([dataset[i] for i in range(8)])
    with torch.no_grad():
        near, true = model(**batch).logits.float(), whole(**batch).logits
    apart = ((near - true).norm() / true.norm()).item()
    assert 1e-5 < apart < {4: 0.3, 8: 0.03}[bits]


def test_lora_trains_on_a_model_in_4_bits(llava, corpus, tmp_path, monkeypatch, capsys):
    arguments = ["--train_type", "lora", "--bits", "4", "--max_steps", "30", "--learning_rate", "1e-2"]
    losses = run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert losses[-1] < losses[0] - 0.1  # the tiny embedding lets it fall no further
    assert "read back alike" in capsys.readouterr().out
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    adapted, processor = load_model(str(llava), str(tmp_path / "run"), bits=4)
    base, _ = load_model(str(llava), bits=4)
    dataset = LlavaDataset(str(corpus))
    batch = LlavaCollator(processor)([dataset[i] for i in range(8)])
    with torch.no_grad():
        assert adapted(**batch).loss < base(**batch).loss - 0.1


def test_unsupported_uses_of_few_bits_are_refused_in_one_line(llava, corpus, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--bits goes with --train_type lora"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", "--train_type", "full", "--bits", "4")
    monkeypatch.setattr("train_llava.modeling.quantization.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        load_checkpoint(str(llava), bits=8)
    assert not (tmp_path / "run").exists()
