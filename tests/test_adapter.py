"""Adapters: saved, opened on their own base, merged, and refused on another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import IMAGES, QUESTIONS, run_train
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from train_llava.build_model import BuildArguments, build_model
from train_llava.chat import Chat
from train_llava.evaluation.generation import generate
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.adapter import load_model


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
    with pytest.raises(ValueError, match=rf"{name} cannot be opened"):
        load_model(str(llava), str(folder))


def test_a_torn_adapter_is_named(llava, trained_adapter, tmp_path):
    folder = shutil.copytree(trained_adapter, tmp_path / "run")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be opened"):
        load_model(str(llava), str(folder))


@pytest.mark.parametrize("kind", ["foreign_adapter", "deeper_adapter"])
def test_an_adapter_of_another_model_is_refused(llava, tmp_path, kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="was trained on another model"):
        load_model(str(llava), str(folder))
    with pytest.raises(ValueError, match="was trained on another model"):
        merge_lora(str(llava), str(folder), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_goes_on_training(llava, corpus, trained_adapter, tmp_path, monkeypatch):
    """Four steps at once are two steps and, from their adapter, two more; its LoRA is the first run's."""
    arguments = ["--preflight", "false", "--lora_dropout", "0", "--optim", "sgd", "--lr_scheduler_type", "constant"]
    arguments += ["--warmup_steps", "0", "--max_grad_norm", "0", "--train_sampling_strategy", "sequential"]
    arguments += ["--per_device_train_batch_size", "4", "--learning_rate", "1"]
    lora = ["--lora_r", "4", "--lora_alpha", "3", "--use_rslora", "true"]
    halves = []
    for name, part in (("all", slice(16)), ("first", slice(8)), ("second", slice(8, 16))):
        data = tmp_path / "data" / name
        data.mkdir(parents=True)
        (data / "chat.json").write_text(json.dumps(json.loads((corpus / "chat.json").read_text())[part]))
        more = lora if name != "second" else ["--adapter_name_or_path", str(tmp_path / "first")]
        steps = ["--max_steps", "4" if name == "all" else "2", "--image_dir", str(corpus / "images_dl")]
        losses = run_train(monkeypatch, llava, data, tmp_path / name, *arguments, *steps, *more)
        halves.append(losses)
    assert halves[1] + halves[2] == pytest.approx(halves[0], abs=1e-6)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("second", "all"))
    assert ours.keys() == theirs.keys()
    assert any("multi_modal_projector" in name for name in ours)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    assert [config[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora")] == [4, 3, True, False]
    card = (tmp_path / "second" / "README.md").read_text()
    assert "lora_r 4, lora_alpha 3, lora_dropout 0.0, use_dora False, use_rslora True" in card
    assert "| goes on from | `first` |" in card
    assert f"adapter_name_or_path: {tmp_path}/first" in (tmp_path / "second" / "recipe.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_r", "8"], "--lora_r 8: {adapter}, which goes on training, has 4"),
        (["--use_dora", "true"], "--use_dora True: {adapter}, which goes on training, has False"),
        (["--train_type", "full"], "--adapter_name_or_path goes with --train_type lora"),
        (["--model_name_or_path", "{adapter}"], "is a LoRA adapter of .*, or merge_lora it"),
        (["--adapter_name_or_path", "{llava}"], "{llava} is no adapter folder"),
    ],
)
def test_arguments_that_contradict_an_adapter_are_refused(
    llava, corpus, adapter, tmp_path, monkeypatch, arguments, message
):
    places = {"adapter": adapter, "llava": llava}
    arguments = ["--adapter_name_or_path", str(adapter), *(word.format(**places) for word in arguments)]
    with pytest.raises(ValueError, match=message.format(**places)):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_lora_all_at_projector_rate_0_trains_merges_and_goes_on(llava, corpus, tmp_path, monkeypatch):
    """The adapter holds no projector: it goes on without one, and on its own base alone."""
    run, more = tmp_path / "run", tmp_path / "more"
    arguments = ["--train_type", "lora_all", "--max_steps", "2", "--learning_rate", "1e-2", "--lora_r", "4"]
    arguments += ["--vision_learning_rate", "1e-2", "--preflight", "false", "--warmup_steps", "0"]
    run_train(monkeypatch, llava, corpus, run, *arguments, "--projector_learning_rate", "0")
    tensors = load_file(run / "adapter_model.safetensors")
    assert json.loads((run / "adapter_config.json").read_text())["modules_to_save"] is None
    assert {name.split(".")[3] for name in tensors} == {"vision_tower", "language_model"}
    assert all(tensor.any() for name, tensor in tensors.items())  # lora_B begins at 0

    # Merged, it differs from its base in the linear layers alone
    merge_lora(str(llava), str(run), str(tmp_path / "merged"))
    base, merged = (load_checkpoint(str(folder))[0].state_dict() for folder in (llava, tmp_path / "merged"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {name[17:].rpartition(".lora_")[0] + ".weight" for name in tensors}

    # It goes on without a projector, and with the same parts
    arguments += ["--adapter_name_or_path", str(run)]
    with pytest.raises(ValueError, match=f"{run} holds no projector: take --projector_learning_rate 0, or merge it"):
        run_train(monkeypatch, llava, corpus, more, *arguments)
    arguments += ["--projector_learning_rate", "0"]
    with pytest.raises(
        ValueError, match=f"--train_type lora: {run}, which .*, has LoRA in the language model and the"
    ):
        run_train(monkeypatch, llava, corpus, more, *arguments, "--train_type", "lora")
    run_train(monkeypatch, llava, corpus, more, *arguments)
    further = load_file(more / "adapter_model.safetensors")
    assert further.keys() == tensors.keys()
    assert not any(torch.equal(further[name], tensor) for name, tensor in tensors.items())

    # Its base's projector belongs to the base
    model, processor = load_checkpoint(str(llava))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 3] += 0.01
    for saved in (model, processor):
        saved.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained on another model than .*other"):
        load_model(str(tmp_path / "other"), str(run))


def test_a_projector_that_an_adapter_holds_stays_as_it_is_at_rate_0(
    llava, corpus, trained_adapter, tmp_path, monkeypatch
):
    arguments = ["--max_steps", "2", "--learning_rate", "1e-2", "--preflight", "false", "--warmup_steps", "0"]
    arguments += ["--adapter_name_or_path", str(trained_adapter), "--projector_learning_rate", "0"]
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    ours, before = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "run", trained_adapter))
    assert {name for name in before if torch.equal(ours[name], before[name])} == {
        name for name in before if "multi_modal_projector" in name
    }


def test_an_adapter_in_place_of_a_model_is_named_as_one(llava, adapter, parts, tmp_path):
    for open_it in (
        lambda: load_model(str(adapter)),
        lambda: build_model(BuildArguments(str(parts["clip"]), str(adapter), str(tmp_path / "out"))),
    ):
        with pytest.raises(
            ValueError, match=f"^{adapter} is a LoRA adapter of {llava}: .* --model_name_or_path {llava}"
        ):
            open_it()


def adapted_layers(llava: Path, adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The base's weights of each adapted layer and, computed in float64 by the papers' formulas, the merged ones."""
    config, found = json.loads((adapter / "adapter_config.json").read_text()), {}
    tensors, model = load_file(adapter / "adapter_model.safetensors"), load_checkpoint(str(llava), torch.float32)[0]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    for name, a in tensors.items():
        if "lora_A" in name:
            base = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", "")).double()
            exact = base + scale * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
            if config["use_dora"]:
                magnitude = tensors[name.replace("lora_A.weight", "lora_magnitude_vector")]
                exact = exact * (magnitude.double() / exact.norm(dim=1))[:, None]
            found[name.removeprefix("base_model.model.").replace("lora_A.", "")] = (base.detach(), exact.detach())
    assert len(found) == 14
    return found


@pytest.mark.parametrize(
    ("kind", "from_dtype", "dtype"),
    [
        ("plain", "bfloat16", "auto"),
        ("dora", "bfloat16", "auto"),
        ("rslora", "bfloat16", "float32"),
        ("dora", "float32", "auto"),
        ("plain", "float32", "bfloat16"),
        ("plain", "bfloat16", "float16"),
    ],
)
def test_merging_says_how_much_of_the_change_is_rounded_away(llava, tmp_path, capsys, kind, from_dtype, dtype):
    """A small change; `auto` keeps the base's precision."""
    base, processor = load_checkpoint(str(llava), getattr(torch, from_dtype))
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    arguments = LoraArguments(lora_r=4, lora_alpha=8, use_dora=kind == "dora", use_rslora=kind == "rslora")
    adapted = set_trainable(base, "lora", arguments)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "linear_1" in name:
            torch.nn.init.normal_(parameter, std=2e-4)
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["use_rslora"]) == (kind == "dora", kind == "rslora")
    capsys.readouterr()
    merge_lora(str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "merged"), dtype)
    told = capsys.readouterr().out.strip().splitlines()[-1]
    merged, _ = load_checkpoint(str(tmp_path / "merged"))
    dtype = from_dtype if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in merged.parameters()} == {getattr(torch, dtype)}
    errors, changes = {}, {}
    for name, (before, exact) in adapted_layers(tmp_path / "base", tmp_path / "adapter").items():
        errors[name] = (merged.get_parameter(name).double() - exact).norm()
        changes[name] = (exact - before).norm()
    lost = (sum(e**2 for e in errors.values()) / sum(c**2 for c in changes.values())) ** 0.5
    worst = max(errors, key=lambda name: errors[name] / changes[name])
    assert {"float32": lost < 1e-3, "bfloat16": lost > 0.1, "float16": 0.01 < lost < 0.1}[dtype]
    assert f"took {lost:.1%} of the adapter's change" in told
    assert dtype == "float32" or f"{errors[worst] / changes[worst]:.1%} in {worst.removesuffix('.weight')}" in told
    assert ("; --dtype float32 loses nothing" in told) == (lost > 0.1)
    projector = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in projector if name.endswith("linear_1.weight"))
    assert torch.equal(merged.model.multi_modal_projector.linear_1.weight, projector[name].to(merged.dtype))


@pytest.mark.parametrize(("value", "remedy"), [(1e6, ": take --dtype float32"), (float("nan"), "$")])
def test_merging_refuses_weights_that_are_not_finite(llava, adapter, tmp_path, value, remedy):
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.1.mlp.up_proj.lora_B" in name)
    tensors[name][2] = value
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"layers\.1\.mlp\.up_proj is not finite in torch\.float16{remedy}"):
        merge_lora(str(llava), str(tmp_path / "adapter"), str(tmp_path / "merged"), "float16")
    assert not (tmp_path / "merged").exists()


def test_a_merged_model_that_is_not_saved_right_is_refused(llava, adapter, tmp_path, monkeypatch):
    save = LlavaForConditionalGeneration.save_pretrained

    def save_with_a_fault(self, folder, *args, **kwargs):
        with torch.no_grad():
            self.model.language_model.layers[1].mlp.up_proj.weight[3, 2] += 1
            save(self, folder, *args, **kwargs)
            self.model.language_model.layers[1].mlp.up_proj.weight[3, 2] -= 1

    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", save_with_a_fault)
    with pytest.raises(OSError, match=r"was not saved whole: .*layers\.1\.mlp\.up_proj\.weight is not saved"):
        merge_lora(str(llava), str(adapter), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []
