"""What a run saves is whole, as it is in memory, and what it has not trained is to the bit as it was read."""

import json
import shutil
from functools import partialmethod

import peft.peft_model
import pytest
import torch
import transformers.modeling_utils
from conftest import CHATML, NARROW, run_train
from safetensors.torch import load_file, save_file
from test_families import LM, QWEN, save_family
from torch import nn
from transformers import (
    ApertusConfig,
    DeepseekV32Config,
    Ernie4_5_MoeConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    MixtralConfig,
    Qwen2Config,
    RadioConfig,
    RadioModel,
    SiglipImageProcessorPil,
)

from train_llava import train
from train_llava.build_model import BuildArguments, build_model
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.weights import base_tensors, differing_tensor, save_weights
from train_llava.train import TrainArguments
from train_llava.trainer import LlavaTrainer
from train_llava.training.preflight import parameters_without_gradient

STEP = ["--max_steps", "2", "--save_steps", "1", "--learning_rate", "1e-2", "--warmup_steps", "0", "--lora_r", "4"]
MIXTURE = NARROW | {"num_hidden_layers": 2, "max_position_embeddings": 256, "moe_intermediate_size": 16}
# persistent buffers; a parameter that its class excludes; one that only chooses; other names and shapes in files; ties
LANGUAGE_MODELS = {
    "Apertus": ApertusConfig(**LM),
    "ERNIE 4.5 MoE": Ernie4_5_MoeConfig(
        **MIXTURE, num_key_value_heads=1, moe_num_experts=4, moe_k=2, moe_layer_start_index=1
    ),
    "DeepSeek-V3.2": DeepseekV32Config(
        **MIXTURE, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        head_dim=8, index_topk=256, index_n_heads=2, index_head_dim=16,
    ),
    "Mixtral": MixtralConfig(**LM, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2, tied": Qwen2Config(**NARROW, num_hidden_layers=2, num_key_value_heads=1, tie_word_embeddings=True),
}  # fmt: skip


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def unlike(ours, theirs) -> set[str]:
    """The names of the tensors that differ, in type or value."""
    assert ours.keys() == theirs.keys()
    return {n for n in ours if ours[n].dtype != theirs[n].dtype or not torch.equal(ours[n], theirs[n])}


@pytest.fixture(scope="module")
def half(llava, tmp_path_factory):
    """The tiny LLaVA in float16, whose numbers bfloat16 cannot hold."""
    folder = tmp_path_factory.mktemp("half") / "model"
    model, processor = load_checkpoint(str(llava), torch.float16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_every_kind_of_tensor_is_saved_under_its_name(parts, corpus, tmp_path, monkeypatch, capsys, name):
    save_family(tmp_path / "lm", LANGUAGE_MODELS[name], QWEN, CHATML, "<|im_end|>", "<|endoftext|>")
    build_model(
        BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava"), "float16", verbose=True)
    )
    before = tensors_of(tmp_path / "llava")
    assert f"opened and saved again    {len(before)} tensors" in capsys.readouterr().out
    run_train(monkeypatch, tmp_path / "llava", corpus, tmp_path / "run", *STEP, "--train_type", "full")
    out, after = capsys.readouterr().out, tensors_of(tmp_path / "run")
    changed = unlike(after, before)
    assert {"multi_modal_projector.linear_1.weight"} < {name.removeprefix("model.") for name in changed}
    assert not any("indexer" in name or "correction_bias" in name for name in changed)
    assert ("not trained, since the language model" in out) == (name == "DeepSeek-V3.2")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    model, _ = load_checkpoint(str(tmp_path / "run"))
    assert model.dtype == torch.float16
    held = tmp_path / "run" / "checkpoint-2"
    in_float32, _ = load_checkpoint(str(held), torch.float32)
    differ = unlike(
        {n: t.half() for n, t in in_float32.state_dict().items()}, {n: t.half() for n, t in model.state_dict().items()}
    )
    assert differ == set()
    assert {tensor.dtype for n, tensor in tensors_of(held).items() if n in changed} == {torch.float32}


def test_a_tower_with_persistent_buffers_is_saved(parts, corpus, tmp_path, monkeypatch):
    torch.manual_seed(0)
    RadioModel(
        RadioConfig(**NARROW, num_hidden_layers=3, image_size=28, patch_size=7, max_img_size=56)
    ).save_pretrained(tmp_path / "radio")
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "radio")
    build_model(BuildArguments(str(tmp_path / "radio"), str(parts["qwen2"]), str(tmp_path / "llava")))
    run_train(monkeypatch, tmp_path / "llava", corpus, tmp_path / "run", *STEP, "--train_type", "full")
    assert unlike(tensors_of(tmp_path / "run"), tensors_of(tmp_path / "llava"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "lora"])
def test_frozen_weights_stay_bit_for_bit(half, corpus, tmp_path, monkeypatch, train_type, precision):
    """Also where the run computes in another precision, and the model that it began with is removed meanwhile."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(half, base)
    before = tensors_of(base)
    preflight = train.preflight
    if train_type != "lora":
        monkeypatch.setattr(train, "preflight", lambda trainer: (shutil.rmtree(base), preflight(trainer)))
    run_train(monkeypatch, base, corpus, run, *STEP, "--train_type", train_type, "--bf16", precision == "bfloat16")
    modes = {path.name: path.stat().st_mode for path in run.iterdir() if path.suffix in (".json", ".safetensors")}
    assert len(set(modes.values())) == 1, modes  # safetensors makes files private
    if train_type == "lora":
        merge_lora(str(base), str(run), str(tmp_path / "merged"))
        run = tmp_path / "merged"
    after = tensors_of(run)
    changed = unlike(after, before)
    assert changed
    kept = {
        "projector": ("multi_modal_projector",),
        "freeze_vision": ("multi_modal_projector", "language_model", "lm_head"),
    }
    kept["lora"] = ("multi_modal_projector", "_proj.weight")
    assert all(any(part in name for part in kept[train_type]) for name in changed)
    assert {tensor.dtype for tensor in after.values()} == {torch.float16}
    assert json.loads((run / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("save_dtype", ["float32", "bfloat16"])
def test_save_dtype_sets_the_precision_of_the_outcome(half, corpus, tmp_path, monkeypatch, save_dtype):
    arguments = [*STEP, "--train_type", "projector", "--save_dtype", save_dtype]
    run_train(monkeypatch, half, corpus, tmp_path / "run", *arguments)
    after = tensors_of(tmp_path / "run")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, save_dtype)}
    assert load_checkpoint(str(tmp_path / "run"))[0].dtype == getattr(torch, save_dtype)
    frozen = "language_model.model.embed_tokens.weight"
    assert torch.equal(after[frozen], tensors_of(half)[frozen].to(after[frozen].dtype))


def test_a_value_too_large_for_the_base_is_kept(half, tmp_path, capsys):
    model, processor = load_checkpoint(str(half), torch.float32)
    model.model.multi_modal_projector.linear_1.weight.data[0, 0] = -1e6
    save_weights(model, tmp_path, base=base_tensors(str(half)), dtype=torch.float16, write_in="base")
    processor.save_pretrained(tmp_path)
    assert "linear_1.weight holds 1e+06, too large for torch.float16" in capsys.readouterr().out
    again, _ = load_checkpoint(str(tmp_path))
    assert again.model.multi_modal_projector.linear_1.weight[0, 0] == -1e6
    kept = tensors_of(tmp_path)["language_model.model.embed_tokens.weight"]
    assert kept.dtype == torch.float16


def test_tensors_of_equal_values_are_written_each_by_itself(half, tmp_path):
    """Norms begin as ones. Under ZeRO-3 the files have other names than the base's, so values find what was read."""
    model, _ = load_checkpoint(str(half), torch.float32)
    base = {f"other.{name}": tensor for name, tensor in base_tensors(str(half)).items()}
    save_weights(model, tmp_path, base=base, dtype=torch.float16)
    assert unlike(tensors_of(tmp_path), tensors_of(half)) == set()


def slip(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    name = next((name for name in tensors if "layers.1" in name), None)
    if name is None:  # another shard's
        return tensors
    tensor = tensors.pop(name)
    more = {"left out": {}, "other name": {f"x.{name}": tensor}, "other value": {name: tensor + 1}}
    return tensors | (more | {"other type": {name: tensor.double()}})[kind]


@pytest.mark.parametrize("kind", ["left out", "other name", "other value", "other type"])
@pytest.mark.parametrize("train_type", ["lora", "full", "shards"])
def test_a_checkpoint_that_reads_back_otherwise_is_removed(llava, corpus, tmp_path, monkeypatch, train_type, kind):
    written = []

    def save_with_a_slip(tensors, path, **more):
        written.append(path)
        late = any("checkpoint-2" in str(path) for path in written)
        save_file(slip(dict(tensors), kind) if late else tensors, path, **more)

    for module in (transformers.modeling_utils, peft.peft_model):
        monkeypatch.setattr(module, "safe_save_file", save_with_a_slip)
    if train_type == "shards":
        save = partialmethod(LlavaForConditionalGeneration.save_pretrained, max_shard_size="50KB")
        monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", save)
    arguments = [*STEP, "--preflight", "false", "--train_type", {"shards": "full"}.get(train_type, train_type)]
    with pytest.raises(ValueError, match=r"checkpoint-2 could not be written .*layers\.1.* not saved as it is in mem"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (train_type != "shards") or len(tensors_of(tmp_path / "run" / "checkpoint-1")) > 80


def test_the_index_of_shards_is_read_back(llava, tmp_path, monkeypatch):
    model, _ = load_checkpoint(str(llava))
    save = partialmethod(LlavaForConditionalGeneration.save_pretrained, max_shard_size="50KB")
    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", save)
    tensors = save_weights(model, tmp_path)
    assert differing_tensor(tmp_path, tensors) is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "00002-of", 1))
    assert differing_tensor(tmp_path, tensors) == index.name


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_tensor_that_deepspeed_did_not_gather_whole_is_named(llava, tmp_path, train_type):
    model, processor = load_checkpoint(str(llava))
    model = set_trainable(model, train_type, LoraArguments(lora_r=4))
    args = TrainArguments(output_dir=str(tmp_path / "run"), train_type=train_type)
    trainer = LlavaTrainer(model, args, processing_class=processor, learning_rates={}, write_card=print)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer._save(str(tmp_path / "whole"), whole)
    name = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    for fault in ({}, {n: t for n, t in whole.items() if n != name}, whole | {name: torch.empty(0)}):
        with pytest.raises(OSError, match="was not gathered whole"):
            trainer._save(str(tmp_path / "torn"), fault)


def test_a_parameter_without_gradient_is_an_error_or_an_expert_or_untrained_by_design(model, processor):
    language_model = model.model.language_model
    layer = language_model.layers[0]
    layer.unread, layer.expert = nn.Linear(32, 32), nn.Linear(32, 32)

    def route(module, inputs, output):  # an expert that short texts do not reach
        return output + module.expert(output) if output.shape[1] > 100 else output

    layer.register_forward_hook(route)
    set_trainable(model, "freeze_vision", LoraArguments())
    ids = torch.tensor([[5, 6, 7, 8]])

    def check(*names: str) -> set[str]:
        without = {f"model.language_model.layers.0.{n}": layer.get_parameter(n) for n in names}
        return parameters_without_gradient(model, without, lambda: model(input_ids=ids, labels=ids).loss)

    assert check("unread.weight", "expert.weight") == {"model.language_model.layers.0.unread.weight"}
    assert all(parameter.grad is None for parameter in model.parameters())
    layer.mlp.up_proj.register_forward_hook(lambda module, inputs, output: output.detach())
    kept = layer.mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight gets no gradient"):
        check("unread.weight", "mlp.up_proj.weight")
    assert torch.equal(layer.mlp.up_proj.weight, kept)


def test_a_part_that_gets_no_gradient_is_refused(llava, corpus, tmp_path, monkeypatch):
    features = LlavaModel.get_image_features

    def frozen(self, *args, **kwargs):
        output = features(self, *args, **kwargs)
        output.pooler_output = [tensor.detach() for tensor in output.pooler_output]
        return output

    monkeypatch.setattr(LlavaModel, "get_image_features", frozen)
    with pytest.raises(ValueError, match=r"preflight: model\.multi_modal_projector\S+ gets no gradient"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *STEP, "--train_type", "freeze_vision")
