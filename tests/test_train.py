"""What trains is exactly what the type says, and the loss does not depend on how a batch is split."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import logged, run_train, run_zero2, turns, zero2_command
from peft import PeftModel
from safetensors.torch import load_file
from transformers.utils import is_bitsandbytes_available

from train_llava import train
from train_llava.chat import Chat
from train_llava.cli import parse_arguments, run_command
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset.lengths import count_tokens
from train_llava.model import LoraArguments, count_parameters, load_checkpoint, part_of, set_trainable
from train_llava.modeling.adapter import load_model
from train_llava.train import TrainArguments
from train_llava.training.checkpointing import starting_point
from train_llava.training.options import LEARNING_RATES
from train_llava.training.preflight import longest_samples

ROOT = Path(__file__).parent.parent
PROJECTOR = {f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_projector_trains_the_projector_alone(model):
    assert trainable(set_trainable(model, "projector", LoraArguments())) == PROJECTOR


def test_freeze_vision_trains_all_but_the_tower(model):
    everything = {name for name, _ in model.named_parameters()}
    expected = {name for name in everything if not name.startswith("model.vision_tower.")}
    assert trainable(set_trainable(model, "freeze_vision", LoraArguments())) == expected
    assert "lm_head.weight" in expected


def test_full_trains_everything_that_has_an_effect(model, processor, corpus):
    everything = {name for name, _ in model.named_parameters()}
    behind = ("model.vision_tower.encoder.layers.2.", "model.vision_tower.post_layernorm.")
    expected = {name for name in everything if not name.startswith(behind)}
    assert trainable(set_trainable(model, "full", LoraArguments())) == expected
    model.requires_grad_(True)
    dataset = LlavaDataset(str(corpus))
    model(**LlavaCollator(processor)([dataset[i] for i in range(4)])).loss.backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected


def test_lora_trains_adapters_in_the_language_model_and_the_projector(model):
    adapted = set_trainable(model, "lora", LoraArguments(lora_r=4, lora_alpha=8))
    base = "base_model.model.model."
    expected = {
        f"{base}language_model.layers.{layer}.{name}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for name in LINEAR
        for matrix in "AB"
    }
    expected |= {
        name.replace("model.multi_modal_projector", f"{base}multi_modal_projector.modules_to_save.default")
        for name in PROJECTOR
    }
    assert trainable(adapted) == expected
    assert count_parameters(adapted)["projector"] == (2112, 2112)
    assert adapted.base_model.model.model.language_model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}


def test_lora_all_trains_adapters_in_the_towers_used_layers_too(model):
    arguments, base = LoraArguments(lora_r=4), "base_model.model.model."
    lora = trainable(set_trainable(deepcopy(model), "lora", arguments))
    linear = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    tower = {
        f"{base}vision_tower.encoder.layers.{layer}.{name}.lora_{matrix}.default.weight"
        for layer in (0, 1)
        for name in linear
        for matrix in "AB"
    }
    assert trainable(set_trainable(model, "lora_all", arguments)) == lora | tower


@pytest.mark.parametrize("part", ["vision tower", "projector"])
@pytest.mark.parametrize("train_type", ["lora", "lora_all", "full"])
def test_a_part_at_rate_0_is_frozen(model, tmp_path, train_type, part):
    rate = {"vision tower": "vision_learning_rate", "projector": "projector_learning_rate"}[part]
    args = TrainArguments(output_dir=str(tmp_path), train_type=train_type, **{rate: 0.0})
    whole = trainable(set_trainable(deepcopy(model), train_type, LoraArguments(lora_r=4)))
    frozen = set_trainable(model, train_type, LoraArguments(lora_r=4), args.frozen_parts)
    assert trainable(frozen) == {name for name in whole if part_of(name) != part}
    assert count_parameters(frozen)[part][0] == 0


@pytest.mark.parametrize(("given", "meant"), [("use_lora", "lora"), ("none", "full"), ("projector", "projector")])
def test_tutorial_names_and_learning_rates(given, meant, tmp_path):
    args = TrainArguments(output_dir=str(tmp_path), train_type=given)
    assert (args.train_type, args.learning_rate) == (meant, LEARNING_RATES[meant])
    assert TrainArguments(output_dir=str(tmp_path), train_type=given, learning_rate=0.5).learning_rate == 0.5


STEPS = ["--train_type", "full", "--learning_rate", "1e-3", "--max_steps", "20", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def half_pictured(corpus, tmp_path_factory) -> Path:
    """The corpus, every second record without its picture: of two ranks, one often has texts alone."""
    root = tmp_path_factory.mktemp("half")
    shutil.copytree(corpus / "images_dl", root / "images_dl")
    records = json.loads((corpus / "chat.json").read_text())
    for record in records[::2]:
        record.pop("image", None)
        record["conversations"] = turns("What is this?", "a red square")
    (root / "chat.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def one_rank_losses(llava, half_pictured, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        output = tmp_path_factory.mktemp("one") / "run"
        return run_train(patch, llava, half_pictured, output, *STEPS, "--per_device_train_batch_size", "4")


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_accumulation_does_not_change_the_loss(
    llava, half_pictured, tmp_path, monkeypatch, one_rank_losses, batch, accumulation
):
    split = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
    losses = run_train(monkeypatch, llava, half_pictured, tmp_path / "run", *STEPS, *split)
    assert len(losses) == 20
    assert losses == pytest.approx(one_rank_losses, abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_two_zero2_ranks_do_not_change_the_loss(llava, corpus, half_pictured, tmp_path, one_rank_losses):
    """Nor the held-out loss: 16 records by 2 ranks, 3 at a time, do not come out even, so some are seen twice."""
    batch = ["--per_device_train_batch_size", "2", "--eval_data_path", corpus, "--per_device_eval_batch_size", "3"]
    command, environment = zero2_command(llava, half_pictured, tmp_path / "run", *STEPS, *batch)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "run") == pytest.approx(one_rank_losses, abs=1e-4)
    assert not list(Path("/dev/shm").glob(f"*{environment['MASTER_PORT']}*"))  # nothing is left behind
    model, processor = load_checkpoint(str(tmp_path / "run"))
    dataset = LlavaDataset(str(corpus))
    expected = model(**LlavaCollator(processor)([dataset[i] for i in range(16)])).loss.item()
    assert logged(tmp_path / "run", "eval_loss")[-1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "train_type", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in LEARNING_RATES if name != "lora")]
)
def test_every_type_trains_in_bf16_on_two_ranks_that_skip_bad_records(llava, corpus, tmp_path, train_type):
    data, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus / "images_dl", data / "images_dl")
    (data / "images_dl" / "broken.png").write_bytes((data / "images_dl" / "0.png").read_bytes()[:50])
    good = json.loads((corpus / "chat.json").read_text())
    records = [good[i % 16] | {"id": f"record {i}"} for i in range(40)]
    records[9]["image"] = "broken.png"
    records[37]["conversations"] = []
    (data / "chat.json").write_text(json.dumps(records))
    done = run_zero2(
        llava, data, output, "--train_type", train_type, "--max_steps", "2", "--per_device_train_batch_size", "10",
        "--learning_rate", "1e-2", "--eval_data_path", str(data), "--eval_strategy", "steps", "--eval_steps", "1",
        "--bf16", "true", "--dataloader_num_workers", "2", "--max_bad_fraction", "0.1", "--eval_answers", "4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved, read back alike" in done.stdout
    assert f"train_type {train_type}, learning rate 0.01" in done.stdout
    assert (len(logged(output)), len(logged(output, "eval_loss"))) == (2, 2)
    for name in ("bad_samples.jsonl", "bad_eval_samples.jsonl"):
        log = [json.loads(line) for line in (output / name).read_text().splitlines()]
        assert sorted(entry["id"] for entry in log) == ["record 37", "record 9"]
    assert (output / "loss.png").stat().st_size > 5000
    before, _ = load_checkpoint(str(llava))
    after, _ = load_model(str(llava), str(output)) if "lora" in train_type else load_checkpoint(str(output))
    if isinstance(after, PeftModel):
        tensors = len(load_file(output / "adapter_model.safetensors"))
        assert (tensors == 2 * 7 * 2 + 4) == (train_type == "lora")
        after = after.merge_and_unload()
    changed = {
        name
        for (name, ours), theirs in zip(after.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(ours, theirs.to(ours.dtype))
    }
    parts = {re.match(r"(model\.)?(\w+)", name)[2] for name in changed}
    assert (
        parts
        == {
            "projector": {"multi_modal_projector"},
            "lora": {"multi_modal_projector", "language_model"},
            "lora_all": {"multi_modal_projector", "language_model", "vision_tower"},
            "freeze_vision": {"multi_modal_projector", "language_model", "lm_head"},
            "full": {"multi_modal_projector", "language_model", "lm_head", "vision_tower"},
        }[train_type]
    )
    for folder in (output, output / "checkpoint-2"):
        assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= set(os.listdir(folder))


def test_grouping_by_length_opens_no_picture(llava, corpus, tmp_path, monkeypatch):
    records = json.loads((corpus / "chat.json").read_text())
    for i, record in enumerate(records):
        record["conversations"][-1]["value"] = "a" * (i + 1)
    (tmp_path / "chat.json").write_text(json.dumps(records * 8))
    dataset = LlavaDataset(str(tmp_path), str(corpus / "images_dl"))
    _, processor = load_checkpoint(str(llava))
    collator = LlavaCollator(processor)
    args = TrainArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, train_sampling_strategy="group_by_length"
    )
    undecoded = LlavaDataset(str(tmp_path), str(corpus / "images_dl"), decode=False)
    texts = [undecoded[i]["messages"] for i in range(128)]
    monkeypatch.setattr(LlavaDataset, "read", None)
    trainer = train.LlavaTrainer(
        load_checkpoint(str(llava))[0],
        args,
        collator,
        CheckedDataset(dataset, collator.chat, tmp_path / "bad.jsonl"),
        learning_rates={},
        write_card=print,
    )
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    torch.manual_seed(5)  # what else a rank has drawn changes nothing
    assert list(sampler) == order
    trainer.state.epoch = 1.5
    assert list(sampler) != order
    assert sorted(order) == list(range(128))
    lengths = np.array([len(collator.chat.encode(texts[i])[0]) for i in order])
    assert np.ptp(lengths.reshape(-1, 4), axis=1).mean() < 4  # 12 in random order


@pytest.fixture(scope="module")
def uneven(corpus, tmp_path_factory) -> Path:
    """Long in tokens: twelve pictures, many Chinese characters, or more than a model takes; many letters are not."""
    root = tmp_path_factory.mktemp("uneven")
    (root / "images").mkdir()
    shutil.copy(corpus / "images_dl" / "0.png", root / "images")
    records = [{"id": str(i), "conversations": turns("What is this?", "a red square")} for i in range(80)]
    records[7] = {"id": "text", "conversations": turns("What is this?", "a red square " * 16)}
    records[11] = {"id": "pictures", "image": ["0.png"] * 12, "conversations": turns("<image>" * 12 + "?", "a")}
    records[13] = {"id": "Chinese", "conversations": turns("这是什么?", "天地玄黄宇宙洪荒" * 4)}
    records[17] = {"id": "too long", "conversations": turns("What is this?", "天地玄黄宇宙洪荒" * 90)}
    (root / "chat.json").write_text(json.dumps(records))
    return root


def test_lengths_count_tokens_with_those_of_pictures(uneven, processor):
    chat, dataset = Chat(processor), LlavaDataset(str(uneven))
    exact = np.array([len(chat.encode(dataset[i]["messages"])[0]) for i in range(80)])
    lengths = count_tokens(dataset, chat)[:, 0]
    assert lengths.tolist() == exact.tolist()
    order = np.argsort(-lengths, kind="stable")
    assert [dataset[i]["id"] for i in order[:4]] == ["too long", "pictures", "text", "Chinese"]
    assert exact[order[:4]].tolist() == sorted(exact, reverse=True)[:4]


def test_preflight_takes_the_longest_that_fit(uneven, processor, tmp_path):
    chat = Chat(processor, max_length=512)
    checked = CheckedDataset(LlavaDataset(str(uneven)), chat, tmp_path / "bad.jsonl", max_bad_fraction=0.02)
    trainer = SimpleNamespace(train_dataset=checked, args=SimpleNamespace(per_device_train_batch_size=3))
    assert [sample.id for sample in longest_samples(trainer)] == ["pictures", "text", "Chinese"]
    assert json.loads((tmp_path / "bad.jsonl").read_text())["id"] == "too long"


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    """Two WebDataset shards of eight records; the fourth of each has no answer."""
    shards = tmp_path_factory.mktemp("shards")
    for i in range(2):
        with tarfile.open(shards / f"{i}.tar", "w") as archive:
            for j in range(8):
                record = {
                    "id": f"{i}-{j}",
                    "conversations": turns("<image>\nWhat is this?", "a red square" * (j != 3)),
                }
                picture = (corpus / "images_dl" / f"{j}.png").read_bytes()
                for ending, content in (("png", picture), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{i}{j}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return shards


def test_a_stream_goes_on_where_it_stopped(llava, shards, tmp_path, monkeypatch):
    arguments = ("--streaming", "true", "--max_steps", "9", "--train_type", "full", "--save_steps", "5")
    arguments += ("--learning_rate", "1e-3", "--max_bad_fraction", "0.2")
    whole = run_train(monkeypatch, llava, shards, tmp_path / "run", *arguments)
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    again = run_train(monkeypatch, llava, shards, tmp_path / "run", *arguments, "--resume_from_checkpoint", "true")
    assert len(set(whole)) == 9
    assert again == whole


def test_streaming_trains_on_two_ranks(llava, shards, tmp_path):
    done = run_zero2(
        llava, shards, tmp_path / "run", "--streaming", "true", "--max_steps", "10", "--train_type", "projector",
        "--per_device_train_batch_size", "2", "--max_bad_fraction", "0.2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(logged(tmp_path / "run")) == 10
    log = [json.loads(line)["id"] for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(log) == ["0-3", "1-3"]


def test_bad_held_out_records_are_reported_before_the_first_step(llava, corpus, tmp_path, monkeypatch):
    records = json.loads((corpus / "chat.json").read_text())
    records[3]["conversations"] = []
    (tmp_path / "chat.json").write_text(json.dumps(records))
    arguments = ["--eval_data_path", tmp_path, "--eval_image_dir", corpus / "images_dl", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"1 of 16 records are bad, more than --max_bad_fraction: see .*bad_eval_"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", "--train_type", "projector", *arguments)
    assert not (tmp_path / "run" / "trainer_state.json").exists()


def test_too_many_bad_records_stop_the_run_with_one_line(llava, corpus, tmp_path, monkeypatch):
    """The preflight finds them; without it, a data-loading worker does, and ends with the run."""
    records = json.loads((corpus / "chat.json").read_text())
    records[3]["conversations"] = []
    (tmp_path / "chat.json").write_text(json.dumps(records))
    arguments = ["--image_dir", corpus / "images_dl", "--dataloader_num_workers", "1"]
    reason = "1 of 16 records are bad, more than --max_bad_fraction"
    with pytest.raises(ValueError, match=reason):
        run_train(monkeypatch, llava, tmp_path, tmp_path / "run", *arguments)
    command = [sys.executable, "-m", "train_llava.train", "--model_name_or_path", llava, "--data_path", tmp_path]
    command += ["--output_dir", tmp_path / "out", "--report_to", "none", "--preflight", "false", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"error: {reason}" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--data_path", "{llava}"], "holds no chat.json"),
        (["--model_name_or_path", "nowhere"], "nowhere is no folder"),
        (["--model_name_or_path", "{qwen2}"], "is a qwen2 model, not a LLaVA"),
        (["--eval_data_path", "nowhere"], "--data_path nowhere does not exist"),
        (["--output_dir", "{llava}"], "holds model.safetensors"),
    ],
)
def test_a_wrong_argument_ends_with_one_line(llava, parts, corpus, tmp_path, monkeypatch, arguments, message):
    words = [word.format(llava=llava, qwen2=parts["qwen2"]) for word in arguments]
    command = ["train", "--model_name_or_path", llava, "--data_path", corpus, "--output_dir", tmp_path / "out", *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(message)}.*$"):
        run_command(train.main)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp16", "true"], "--fp16 takes a GPU"),
        (["--train_type", "projector", "--projector_learning_rate", "0"], "--projector_learning_rate 0 freezes all"),
        (["--train_type", "lora_all", "--save_dtype", "float32"], "lora_all writes an adapter: leave it out"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor 0.1 is not supported: leave it out"),
        (["--remove_unused_columns", "true"], "--remove_unused_columns True is not supported"),
        (["--label_names", "labels"], "--label_names ['labels'] is not supported"),
        (["--fsdp", "full_shard"], "--fsdp True is not supported"),
        (["--data_weights", "0"], "--data_weights 0.0: weights are numbers from 0, one above it"),
        (["--data_weights", "1", "1"], "--data_weights names 2 weights for 1 data paths"),
        (
            ["--streaming", "true", "--max_steps", "9", "--train_sampling_strategy", "group_by_length"],
            "--streaming not with",
        ),
        (["--train_sampling_strategy", "batch_rebalance"], "not with --train_sampling_strategy batch_rebalance"),
        (["--eval_image_dir", "images"], "--eval_image_dir takes held-out data: set --eval_data_path"),
        (["--eval_on_start", "true"], "--eval_on_start takes held-out data: set --eval_data_path"),
        (["--save_strategy", "best"], "--save_strategy best takes held-out data: set --eval_data_path"),
        (
            ["--dataloader_persistent_workers", "true"],
            "--dataloader_num_workers 0, or what goes with it: persist",
        ),
        (["--optim_args", "foo"], "--optim adamw_torch_fused, or what goes with it: not enough values"),
        (["--torch_compile_mode", "foo"], "--torch_compile True, or what goes with it: Unrecognized mode=foo"),
        (["--lr_scheduler_kwargs", "{1"], "--lr_scheduler_kwargs {1 is no file, and no JSON object"),
        (["--accelerator_config", '{"a": 1}'], "an argument cannot be used: AcceleratorConfig.__init__() got"),
        (["--resume_from_checkpoint", "nowhere"], "--resume_from_checkpoint nowhere is not true, and no folder"),
        (["--metric_for_best_model", "bleu"], "--metric_for_best_model bleu: this run measures loss"),
        (["--metric_for_best_model", "eval_bleu", "--load_best_model_at_end", "true"], "requires the save and eval"),
        (["--eval_strategy", "steps"], "--eval_strategy takes held-out data: set --eval_data_path"),
        (["--eval_answers", "8"], "--eval_answers takes held-out data: set --eval_data_path"),
        (["--early_stopping_patience", "2"], "--early_stopping_patience takes held-out data: set --eval_data_path"),
        (["--streaming", "true"], "--streaming has no end: set --max_steps"),
        (["--optim", "adamw_8bit"], "bitsandbytes"),
        (["--optim", "lomo"], "You need to install `lomo_optim`"),
        (["--optim", "adamw_torch_8bit"], "torchao"),
        (["--report_to", "wandb"], "WandbCallback requires wandb to be installed"),
        (["--report_to", "mlflow"], "MLflowCallback requires mlflow"),
        (["--report_to", "nonsense"], "nonsense is not supported"),
        (["--use_liger_kernel", "true"], "pip install liger-kernel"),
        (["--attn_implementation", "flash_attention_2"], "package for FlashAttention2"),
        (["--attn_implementation", "nonsense"], "nonsense"),
        (["--lr_scheduler_type", "nonsense"], "nonsense is not a valid SchedulerType"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "min_lr"),
    ],
)
def test_an_impossible_option_is_refused_before_data_is_read(
    llava, corpus, tmp_path, monkeypatch, request, arguments, message
):
    command = ["train", "--model_name_or_path", llava, "--data_path", corpus, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, *arguments]])
    monkeypatch.setattr(train, "load_data", None)
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    is_bitsandbytes_available.cache_clear()
    request.addfinalizer(is_bitsandbytes_available.cache_clear)
    with pytest.raises(SystemExit, match=rf"^error: .*{re.escape(message)}.*$"):
        run_command(train.main)
    assert not (tmp_path / "out").exists()


def test_every_number_has_its_bounds(monkeypatch):
    """None of the numbers that training takes may be NaN, infinite or below 0; `given` are further limits."""
    dataclasses = (train.ModelArguments, LoraArguments, train.DataArguments, TrainArguments)
    outside = {"lora_dropout": ["1"], "adam_beta1": ["1"], "learning_rate": ["0", "2"], "max_bad_fraction": ["1.5"]}
    outside |= {"seed": ["4294967296"], "ddp_timeout": ["0", "9999999999999999"], "adam_epsilon": ["0"]}
    positive = (
        "gradient_accumulation_steps max_steps num_train_epochs per_device_train_batch_size save_steps eval_steps"
    )
    outside |= {name: ["0"] for name in [*positive.split(), "lora_r", "lora_alpha", "max_length", "save_total_limit"]}
    numbers = [
        field
        for part in dataclasses
        for field in fields(part)
        if re.search(r"\b(int|float|NumberOrAuto)\b", str(field.type))
    ]
    assert len(numbers) > 35
    assert outside.keys() < {field.name for field in numbers}
    for field in numbers:
        beyond = ["nan", "inf", "-inf", "-0.5"] if "float" in str(field.type) else ["-2"]
        for value in beyond + outside.get(field.name, []) if field.name != "bits" else []:
            words = ["--model_name_or_path", ".", "--data_path", ".", "--output_dir", "x", f"--{field.name}={value}"]
            monkeypatch.setattr(sys, "argv", ["train", *words])
            with pytest.raises(ValueError, match=rf"^--{field.name} \S+: it has to lie in [\[(]"):
                parse_arguments(*dataclasses)
    for name, value in (("max_steps", "-1"), ("warmup_steps", "0"), ("max_grad_norm", "0"), ("max_bad_fraction", "1")):
        monkeypatch.setattr(sys, "argv", ["train", *words[:-1], f"--{name}={value}"])
        assert getattr(parse_arguments(*dataclasses)[-1 if name[:6] != "max_ba" else 2], name) == float(value)


def test_data_arguments_reach_the_data_sets(llava, corpus, tmp_path, monkeypatch, processor):
    """Held-out pictures of a folder of their own; a part of the records that is spread; the order's own seed."""
    (tmp_path / "held").mkdir()
    shutil.copy(corpus / "chat.json", tmp_path / "held")
    shutil.copytree(corpus / "images_dl", tmp_path / "pictures")
    (tmp_path / "pictures" / "3.png").unlink()
    data = [str(corpus), str(tmp_path / "held" / "chat.json")]
    given = {"image_dir": str(corpus / "images_dl"), "data_weights": [0.5, 2.25], "max_bad_fraction": 0.5}
    given |= {"eval_data_path": str(tmp_path / "held"), "eval_image_dir": str(tmp_path / "pictures")}
    args = TrainArguments(output_dir=str(tmp_path / "run"), seed=1, data_seed=2)
    arguments = train.DataArguments(data, **given)
    training, held_out = train.load_data(arguments, args, Chat(processor))
    assert [i for i in range(16) if held_out.good_sample(i) is None] == [3]
    sources = [source for source, _ in training.records.index]
    assert (sources.count(0), sources.count(1)) == (8, 36)
    rows = [row for source, row in training.records.index if source == 0]
    assert len(set(rows)) == 8
    assert max(rows) > 8
    assert (training.limit, training.bad_samples, held_out.limit) == (22, "skip", 8)
    arguments = train.DataArguments(data, **given, streaming=True, bad_samples="error")
    seen = {}
    monkeypatch.setattr(train, "stream_items", lambda *given: seen.update(given=given))
    train.load_data(arguments, args, chat := Chat(processor))
    log = tmp_path / "run" / "bad_samples.jsonl"
    assert seen["given"] == (data, given["image_dir"], [0.5, 2.25], chat, log, "error", 0.5, 2)


def test_the_order_of_records_has_a_seed_of_its_own(llava, corpus, tmp_path, monkeypatch):
    orders, compute_loss = [], train.LlavaTrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        orders[-1] += inputs["extras"]["ids"]
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(train.LlavaTrainer, "compute_loss", note)
    arguments = ["--train_type", "projector", "--max_steps", "1", "--preflight", "false", "--save_strategy", "no"]
    for more in (["--seed", "3"], ["--seed", "4", "--data_seed", "3"], ["--seed", "4"]):
        orders.append([])
        run_train(monkeypatch, llava, corpus, tmp_path / str(len(orders)), *arguments, *more)
    assert len(orders[0]) == 8
    assert orders[0] == orders[1] != orders[2]


def test_preflight_finds_one_number_of_a_gradient_that_is_not_finite(llava, corpus, tmp_path, monkeypatch):
    compute_loss = train.LlavaTrainer.compute_loss

    def spoil(self, model, *args, **kwargs):
        bias = model.model.multi_modal_projector.linear_2.bias
        bias.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([5]), torch.nan))
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(train.LlavaTrainer, "compute_loss", spoil)
    with pytest.raises(ValueError, match=r"^preflight: .*linear_2\.bias gets a gradient that is not finite"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", "--train_type", "projector", "--max_steps", "1")


def test_a_batch_that_is_dropped_leaves_something(llava, corpus, tmp_path, monkeypatch):
    arguments = ["--train_type", "projector", "--max_steps", "1", "--preflight", "false"]
    arguments += ["--dataloader_drop_last", "true"]
    with pytest.raises(ValueError, match="leaves nothing of 16 records: a step takes 17"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments, "--per_device_train_batch_size", "17")
    held_out = ["--eval_data_path", corpus, "--learning_rate", "1e-20", "--eval_answers", "0", "--save_strategy", "no"]
    for batch in ("16", "10"):  # of held-out records none is dropped
        each = ["--per_device_eval_batch_size", batch]
        run_train(monkeypatch, llava, corpus, tmp_path / batch, *arguments, *held_out, *each)
    assert logged(tmp_path / "10", "eval_loss") == pytest.approx(logged(tmp_path / "16", "eval_loss"), abs=1e-6)


@pytest.mark.parametrize("word", ["True", "TRUE", "yes"])
def test_true_may_be_written_as_python_writes_it(tmp_path, word, capsys):
    args = TrainArguments(output_dir=str(tmp_path), resume_from_checkpoint=word)
    assert starting_point(args) is None
    assert "no checkpoint was finished: training from the start" in capsys.readouterr().out
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rng_state.pth").touch()
    assert starting_point(args) == str(folder)
    args.resume_from_checkpoint = str(folder)
    assert starting_point(args) == str(folder)
    args.resume_from_checkpoint = "False"
    with pytest.raises(ValueError, match=r"holds checkpoint-3: choose another, or --resume_from_checkpoint true"):
        starting_point(args)


def test_a_log_of_an_earlier_run_does_not_count(llava, corpus, tmp_path, monkeypatch):
    """A run that is resumed keeps it: the records that it names are not read again as new ones."""
    records = json.loads((corpus / "chat.json").read_text())
    records[3]["conversations"] = []
    (tmp_path / "chat.json").write_text(json.dumps(records))
    arguments = ["--image_dir", str(corpus / "images_dl"), "--train_type", "projector", "--max_bad_fraction", "0.07"]
    arguments += ["--save_steps", "8", "--num_train_epochs", "1", "--per_device_train_batch_size", "1"]
    log = tmp_path / "run" / "bad_samples.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"record": i, "id": str(i), "reason": "?"}) + "\n" for i in range(9)))
    run_train(monkeypatch, llava, tmp_path, tmp_path / "run", *arguments)
    ours = [{"record": 3, "id": "3", "reason": "it has no conversations"}]
    assert [json.loads(line) for line in log.read_text().splitlines()] == ours
    shutil.rmtree(tmp_path / "run" / "checkpoint-16")
    run_train(monkeypatch, llava, tmp_path, tmp_path / "run", *arguments, "--resume_from_checkpoint", "True")
    assert [json.loads(line) for line in log.read_text().splitlines()] == ours


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_data_without_a_good_record_ends_the_run(llava, tmp_path, monkeypatch, streaming):
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": []}] * 3))
    arguments = ["--streaming", streaming, "--max_steps", "3", "--max_bad_fraction", "1", "--train_type", "projector"]
    for more in ([], ["--preflight", "false"]):
        with pytest.raises(ValueError, match=r"no record (of .* )?is good"):
            run_train(monkeypatch, llava, tmp_path, tmp_path / "run", *arguments, *more)


def test_data_that_ends_before_the_last_step_is_an_error(llava, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "stream_items", lambda *_: datasets.IterableDataset.from_generator(lambda: iter(())))
    arguments = ["--streaming", "true", "--max_steps", "3", "--train_type", "projector", "--preflight", "false"]
    with pytest.raises(ValueError, match="the data ended after 0 of 3 steps"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)


def test_out_of_memory_ends_with_a_line_that_says_what_needs_less():
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …")

    with pytest.raises(SystemExit, match=r"^error: CUDA out of memory: a smaller batch needs less, .*--bits 4"):
        run_command(main)
