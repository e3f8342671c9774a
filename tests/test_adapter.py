"""Adapters: saved, opened on their own base, merged, and refused on another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import IMAGES, QUESTIONS, run_train
from safetensors.torch import load_file, save_file

from train_llava.adapter import load_model
from train_llava.chat import Chat
from train_llava.infer import generate
from train_llava.merge_lora import merge_lora
from train_llava.model import load_checkpoint


def test_an_adapter_saves_its_projector_and_changes_the_model(llava, adapter):
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert sum("multi_modal_projector" in name for name in names) == 4
    base, processor = load_model(str(llava))
    adapted, _ = load_model(str(llava), str(adapter))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    assert (adapted(**inputs).logits - base(**inputs).logits).abs().max() > 0.1


def test_a_merged_model_equals_base_and_adapter(llava, adapter, merged):
    adapted, processor = load_model(str(llava), str(adapter))
    plain, _ = load_model(str(merged))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    ours, theirs = plain(**inputs).logits, adapted(**inputs).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert generate(plain, processor, QUESTIONS, IMAGES, 8) == generate(adapted, processor, QUESTIONS, IMAGES, 8)


@pytest.fixture(scope="module")
def foreign_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with wider layers."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], dim=-1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def deeper_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with more layers, its shapes the same."""
    folder = tmp_path_factory.mktemp("deeper")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("names", [r"model\.language_model\..*", "list"])
def test_an_adapter_with_the_names_of_older_versions_is_the_same(llava, adapter, tmp_path, names):
    """Transformers before 4.52 held a whole language model where today its body and its head stand apart."""
    old = [("model.language_model.", "language_model.model."), ("model.multi_modal", "multi_modal")]
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        tail = name.removeprefix("base_model.model.")
        for today, before in old:
            tail = tail.replace(today, before)
        tensors[f"base_model.model.{tail}"] = tensor
    assert any(".language_model.model.layers.0." in name for name in tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    target = config["target_modules"]
    assert target.startswith(r"model\.language_model\..*")
    config["target_modules"] = (
        target.replace(r"model\.language_model", r"language_model\.model")
        if names != "list"
        else [f"language_model.model.layers.{i}.{part}" for i in range(2) for part in
              ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (ours, processor), (theirs, _) = load_model(str(llava), str(tmp_path)), load_model(str(llava), str(adapter))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.fixture(scope="module")
def trained_adapter(llava, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, llava, corpus, folder, "--max_steps", "1", "--preflight", "false", "--lora_r", "4")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_any_precision(llava, trained_adapter, tmp_path, dtype):
    model, processor = load_checkpoint(str(llava))
    model.to(dtype).save_pretrained(tmp_path / "same")
    processor.save_pretrained(tmp_path / "same")
    load_model(str(tmp_path / "same"), str(trained_adapter))
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 3] += 0.01
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained on another model than .*other"):
        load_model(str(tmp_path / "other"), str(trained_adapter))
    (trained := tmp_path / "elsewhere").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained_adapter / name, trained)
    load_model(str(tmp_path / "other"), str(trained))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_goes_on_its_base_in_few_bits(llava, trained_adapter, bits):
    load_model(str(llava), str(trained_adapter), bits=bits)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"nonsense", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"])
def test_a_broken_file_of_an_adapter_is_named(llava, trained_adapter, tmp_path, name, content):
    folder = shutil.copytree(trained_adapter, tmp_path / "run")
    (folder / name).write_bytes(content)
    if (name, content) == ("base_fingerprint.json", b"{}"):
        load_model(str(llava), str(folder))
        return
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        load_model(str(llava), str(folder))


def test_a_torn_adapter_is_named(llava, trained_adapter, tmp_path):
    folder = shutil.copytree(trained_adapter, tmp_path / "run")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_model(str(llava), str(folder))


@pytest.mark.parametrize("kind", ["foreign_adapter", "deeper_adapter"])
def test_an_adapter_of_another_model_is_refused(llava, tmp_path, kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="was trained on another model"):
        load_model(str(llava), str(folder))
    with pytest.raises(ValueError, match="was trained on another model"):
        merge_lora(str(llava), str(folder), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []
