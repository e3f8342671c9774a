"""The estimate of a step's memory, against steps computed with numbers and counts by hand."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, free_port, run_train
from PIL import Image
from torch.optim import AdamW
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from train_llava import train
from train_llava.build_model import BuildArguments, build_model
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.model import (
    TRAIN_TYPES,
    LoraArguments,
    count_parameters,
    load_checkpoint,
    load_config,
    set_trainable,
)
from train_llava.training import memory
from train_llava.training.memory import (
    SavedTensors,
    activation_bytes,
    empty_model,
    forward_bytes,
    model_state_bytes,
    picture_features,
)

LORA = LoraArguments(lora_r=4, lora_dropout=0.0)
SHAPE = (2, 30, 2, 12)  # rows, tokens of each; pictures, supervised tokens


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_the_activations_are_those_of_a_real_step(llava, corpus, train_type, recompute):
    llava_model, processor = load_checkpoint(str(llava), torch.float32)
    batch = LlavaCollator(processor)([LlavaDataset(str(corpus))[i] for i in range(2, 6)])
    model = set_trainable(llava_model, train_type, LORA).train()
    llava_model.model.language_model.config.use_cache = False
    empty, _ = empty_model(load_config(str(llava)), train_type, LORA, torch.float32)
    if recompute:
        llava_model.model.language_model.activation_checkpointing_enable()
        empty.model.language_model.activation_checkpointing_enable()
    with (saved := SavedTensors(model)):
        model(**batch, num_items_in_batch=4)
    shape = (*batch["input_ids"].shape, len(batch["pixel_values"]), len(batch["shift_labels"]))
    # A real step finds its labels by a mask, a byte a token; on the meta device two indices a label do
    indices, mask = 2 * 8 * len(batch["shift_labels"]), batch["logits_to_keep"].nbytes
    assert forward_bytes(empty, *shape)[0] - indices == saved.nbytes - mask


def longer(llava, layers: int, train_type: str = "freeze_vision"):
    config = load_config(str(llava))
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    return empty_model(config, train_type, LORA, torch.bfloat16)[0]


def test_activation_checkpointing_keeps_only_the_input_of_each_layer(llava):
    rows, tokens, width = *SHAPE[:2], 32
    plain, layer, logits = forward_bytes(longer(llava, 2), *SHAPE)
    rotary = 2 * tokens * 16 * 2  # sines and cosines of a head's width, which all layers share, counted at the first
    assert forward_bytes(longer(llava, 5), *SHAPE)[0] - plain == 3 * (layer - rotary)
    short, long = (activation_bytes(longer(llava, n), *SHAPE, recompute=True)["activations"] for n in (2, 5))
    assert long - short == 3 * rows * tokens * width * 2
    assert logits == SHAPE[3] * 320 * (2 + 4)  # in bf16, and in fp32


def test_activations_grow_linearly_with_the_rows(llava):
    for recompute in (False, True):
        two, three, five = (
            activation_bytes(longer(llava, 2, "lora"), n, 30, n, 6 * n, recompute=recompute)["activations"]
            for n in (2, 3, 5)
        )
        assert five == two + 3 * (three - two)


def test_dropout_keeps_a_mask_of_a_byte_a_number(llava):
    config, dropout = load_config(str(llava)), LoraArguments(lora_r=4, lora_dropout=0.1)
    without, with_it = (
        forward_bytes(empty_model(config, "lora", arguments, torch.bfloat16)[0], *SHAPE)[1]
        for arguments in (LORA, dropout)
    )
    # seven linear layers' inputs: their masks, and each one's own dropped-out copy in place of the input itself, which
    # q, k and v share, gate and up, too; the output projection's is attention's result, kept anyway
    inputs, shared = 6 * 32 + 64, 32 + 32 + 64
    assert with_it - without == SHAPE[0] * SHAPE[1] * (inputs + 2 * (inputs - shared))


def test_the_model_states_are_those_of_a_real_step(llava):
    model = set_trainable(load_checkpoint(str(llava), torch.float32)[0], "freeze_vision", LORA)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer = AdamW(p for p in model.parameters() if p.requires_grad)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    empty = empty_model(load_config(str(llava)), "freeze_vision", LORA, torch.float32)[1]
    assert model_state_bytes(empty, torch.float32)[0] == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(x.nbytes for x in moments),
    }


def test_zero_divides_the_model_states_by_its_stage(llava):
    empty = empty_model(load_config(str(llava)), "full", LORA, torch.bfloat16)[1]
    alone, _ = model_state_bytes(empty, torch.bfloat16, 1, zero=2)
    shares = [model_state_bytes(empty, torch.bfloat16, 8, zero=stage)[0] for stage in (0, 1, 2, 3)]
    divided = [[name for name in alone if share[name] == alone[name] / 8] for share in shares]
    assert divided == [[], ["optimizer"], ["gradients", "optimizer"], ["weights", "gradients", "optimizer"]]
    assert sum(model_state_bytes(empty, torch.bfloat16, 8, zero=3, offload=True)[0].values()) == 0
    total = sum(trained for trained, _ in count_parameters(empty).values())
    updates = [model_state_bytes(empty, torch.bfloat16, 8, zero=stage)[1] for stage in (None, 1, 2, 3)]
    assert updates == [0, *[total / 8 * (2 + 4)] * 3]
    assert model_state_bytes(empty, torch.bfloat16, 1, zero=2, offload=True)[1] == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_shrinks_the_frozen_linear_layers_of_the_language_model(llava, bits):
    empty = empty_model(load_config(str(llava)), "lora", LORA, torch.bfloat16)[1]
    whole, few = (model_state_bytes(empty, torch.bfloat16, 1, zero=2, bits=given)[0] for given in (None, bits))
    attention, mlp = 32 * (32 + 16 + 16 + 32), 3 * 32 * 64
    assert whole.pop("weights") - few.pop("weights") == 2 * (attention + mlp) * (2 - bits / 8)
    assert whole == few


def test_offload_moves_optimizer_and_gradients_and_under_zero_3_the_weights(llava):
    empty = empty_model(load_config(str(llava)), "lora", LORA, torch.bfloat16)[1]
    for stage in (1, 2, 3):
        sizes, _ = model_state_bytes(empty, torch.bfloat16, 2, zero=stage)
        kept = {"weights": sizes["weights"]} if stage < 3 else {}
        offloaded, _ = model_state_bytes(empty, torch.bfloat16, 2, zero=stage, offload=True)
        assert offloaded == dict.fromkeys(sizes, 0) | kept


def test_without_deepspeed_trained_weights_have_a_copy_in_half_precision(llava):
    empty = empty_model(load_config(str(llava)), "projector", LORA, torch.bfloat16)[1]
    trained, total = (sum(column) for column in zip(*count_parameters(empty).values(), strict=True))
    sizes = {"weights": total * 2 + trained * 4, "gradients": trained * 4, "optimizer": trained * 8}
    assert model_state_bytes(empty, torch.bfloat16) == (sizes, 0)


def test_zero_3_updates_one_group_at_a_time(llava, monkeypatch):
    monkeypatch.setattr(memory, "SUB_GROUP", 100)
    empty = empty_model(load_config(str(llava)), "full", LORA, torch.bfloat16)[1]
    assert model_state_bytes(empty, torch.bfloat16, 2, zero=3)[1] == 100 * (2 + 4)


# For each run that differs from two samples of 16 + 64 tokens on one rank: its options, model states, step and note
STEP = (2, 80, 2, 64, False)
NOTE = "2 x 80 tokens, a picture in each"
OFFLOADED = "; ZeRO-2 divides optimizer, gradients by 4; what is offloaded is not counted"
ESTIMATES = [
    ({}, {}, STEP, NOTE),
    ({"train_type": "full", "learning_rate": 1e-5}, {}, STEP, NOTE),
    ({"train_type": "lora_all", "projector_learning_rate": 0.0}, {}, STEP, NOTE),
    ({"bits": 4}, {"bits": 4}, STEP, NOTE),
    ({"max_length": 40}, {}, (2, 40, 2, 64, False), NOTE.replace("80", "40")),
    ({"packing": True}, {}, (1, 160, 2, 64, False), NOTE),
    ({"packing": True, "tokens_per_batch": 250}, {}, (1, 250, 3, 96, False), "a row of 250 tokens, 3 pictures in it"),
    ({"activation_checkpointing": True}, {}, (*STEP[:4], True), NOTE),
    ({"per_device_train_batch_size": 5}, {}, (5, 80, 5, 160, False), NOTE.replace("2 x", "5 x")),
    ({"zero": (2, False), "world_size": 4, "gradient_accumulation_steps": 3}, {"zero": 2, "world_size": 4}, STEP,
     NOTE + OFFLOADED.partition("; what")[0]),
    ({"zero": (2, True), "world_size": 4}, {"zero": 2, "world_size": 4, "offload": True}, STEP, NOTE + OFFLOADED),
    ({"zero": (3, False), "world_size": 1}, {"zero": 3}, STEP, NOTE),
]  # fmt: skip


@pytest.mark.parametrize(("run", "state", "step", "note"), ESTIMATES)
def test_the_estimate_follows_the_arguments_of_the_run(llava, monkeypatch, run, state, step, note):
    own = {"bits": None, "packing": False, "max_length": None, "zero": (None, False), "world_size": 1} | run
    monkeypatch.setattr(memory, "zero_of", lambda _: own["zero"])
    monkeypatch.setattr(train.TrainArguments, "world_size", own["world_size"])
    given = {"per_device_train_batch_size": 2} | {name: value for name, value in run.items() if name not in (
        "bits", "packing", "max_length", "zero", "world_size")}  # fmt: skip
    arguments = train.TrainArguments(output_dir="run", report_to="none", **given)
    config = load_config(str(llava))
    frozen = ["projector"] if "projector_learning_rate" in run else []
    whole, model = empty_model(config, arguments.train_type, LORA, torch.float32, frozen)
    sizes, update = model_state_bytes(model, torch.float32, **state)
    sizes |= activation_bytes(whole, *step[:4], recompute=step[4])
    if run.get("gradient_accumulation_steps"):
        sizes["accumulated gradients"] = sizes["gradients"]
    estimate = memory.estimate_memory(config, LORA, arguments, own["bits"], own["packing"], own["max_length"])
    assert estimate == (sizes, update, note)


def test_precision_and_zero_stage_are_read_from_the_run():
    for bf16, fp16, dtype in (
        (True, False, torch.bfloat16),
        (False, True, torch.float16),
        (False, False, torch.float32),
    ):
        assert memory.precision(SimpleNamespace(bf16=bf16, fp16=fp16)) == dtype
    for name, found in (
        ("ds_zero2_no_offload.json", (2, False)), ("ds_zero3.json", (3, False)), ("ds_zero3_offload.json", (3, True)),
    ):  # fmt: skip
        config = HfDeepSpeedConfig(str(ROOT / name))
        assert memory.zero_of(SimpleNamespace(deepspeed=name, hf_deepspeed_config=config)) == found
    unset_hf_deepspeed_config()
    assert memory.zero_of(SimpleNamespace(deepspeed=None)) == (None, False)


UPDATE = """
import json, os, sys, threading, time
import deepspeed, psutil, torch
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
deepspeed.init_distributed("gloo")
resident, peak = psutil.Process().memory_info, 0
def watch():
    global peak
    while True:
        peak = max(peak, resident().rss)
        time.sleep(0.0005)
model = torch.nn.Sequential(*[torch.nn.Linear(4096, 4096, bias=False) for _ in range(4)])
size = sum(parameter.numel() for parameter in model.parameters())
config = json.load(open("ds_zero2_no_offload.json")) | {"gradient_clipping": 1.0, "bf16": {"enabled": True}}
config |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1}
del config["fp16"]
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
for step in range(2):  # the moments are there from the second step on
    engine.backward(engine(torch.randn(1, 4096, dtype=torch.bfloat16)).float().pow(2).mean())
    before = peak = resident().rss
    if step == 1:
        threading.Thread(target=watch, daemon=True).start()
    engine.step()
    time.sleep(0.01)
print((peak - before) / size)
"""


@pytest.mark.slow
def test_the_optimizer_step_takes_what_deepspeed_takes():
    """On one rank a group's gradients are copied into a row, and the row to fp32."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", UPDATE, free_port()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(2 + 4, rel=0.1)


@pytest.mark.parametrize(("stage", "batches", "kept"), [(2, 4, True), (2, 1, False), (1, 4, False), (None, 4, False)])
def test_only_zero_2_keeps_accumulated_gradients_beside_the_next(llava, monkeypatch, stage, batches, kept):
    """ZeRO-2 partitions them at once; elsewhere the next gradients are added in place."""
    monkeypatch.setattr(memory, "zero_of", lambda _: (stage, False))
    run = SimpleNamespace(bf16=True, world_size=1, gradient_accumulation_steps=batches)
    sizes, _ = memory.state_bytes(empty_model(load_config(str(llava)), "full", LORA, torch.bfloat16)[1], run)
    assert sizes.get("accumulated gradients") == (sizes["gradients"] if kept else None)


def test_a_picture_in_tiles_counts_with_the_most_tokens(parts, tmp_path):
    build_model(
        BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "model"), image_aspect_ratio="anyres")
    )
    model, processor = load_checkpoint(str(tmp_path / "model"), torch.float32)
    empty, _ = empty_model(model.config, "lora", LORA, torch.bfloat16)
    pictures = [Image.new("RGB", (28 * w, 28 * h)) for w in range(1, 5) for h in range(1, 5)]
    collator = LlavaCollator(processor)
    assert len(picture_features(empty, 1)) == max(collator.chat.image_tokens(picture.size) for picture in pictures)


def test_the_estimate_is_printed_before_anything_is_loaded(llava, corpus, tmp_path, monkeypatch, capsys):
    class LoadedError(Exception):
        pass

    def load(*_):
        raise LoadedError

    monkeypatch.setattr(train, "load_checkpoint", load)
    arguments = ["--train_type", "projector", "--per_device_train_batch_size", "4", "--max_length", "60"]
    with pytest.raises(LoadedError):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    out = capsys.readouterr().out
    assert (
        "memory: about 0.0 GB a rank (weights 0.0, gradients 0.0, optimizer 0.0, activations 0.0, logits 0.0)" in out
    )
    assert "for 4 x 60 tokens, a picture in each" in out
    assert "this GPU" not in out

    card = type("Card", (), {"total_memory": 1e6})
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    with pytest.raises(LoadedError):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert (
        "memory: this GPU has 0.0 GB. Less takes: --activation_checkpointing true; a smaller"
        in capsys.readouterr().out
    )
    card.total_memory = 1e9
    with pytest.raises(LoadedError):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert "this GPU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("activations", "update", "said"),
    [
        (6e9, 23e9, ["91.0 GB", "the optimizer step adds 23.0 to the first three", "85.0 GB"]),
        (24e9, 23e9, ["92.0", "85"]),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_helps(llava, monkeypatch, capsys, activations, update, said):
    sizes = {"weights": 8e9, "gradients": 9e9, "optimizer": 51e9, "activations": activations, "logits": 0}
    card = type("Card", (), {"total_memory": 85e9})
    monkeypatch.setattr(memory, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: (sizes, update, "1 x 640 tokens"))
    arguments = train.TrainArguments(output_dir="run", train_type="full", learning_rate=1e-5, report_to="none")
    memory.print_estimate(str(llava), LORA, arguments, None, False, 2048)
    out = capsys.readouterr().out
    assert all(words in out for words in said)
    assert "--train_type lora; --deepspeed ds_zero3_offload.json" in out
    assert not any(word in out for word in ("checkpointing", "smaller"))  # the update alone is too large


@pytest.mark.parametrize(
    ("zero", "offload", "bits", "said"),
    [(None, False, 4, "a smaller language model"), (3, True, None, "a smaller language model"),
     (3, False, None, "--deepspeed ds_zero3_offload.json"),
     (2, False, None, "--bits 4; --deepspeed ds_zero3_offload.json")],
)  # fmt: skip
def test_only_options_that_are_possible_and_not_in_use_are_named(zero, offload, bits, said, monkeypatch):
    given = train.TrainArguments(output_dir="run", report_to="none", per_device_train_batch_size=1)
    given.activation_checkpointing = True
    monkeypatch.setattr(memory, "zero_of", lambda _: (zero, offload))
    assert memory.memory_advice(given, bits, fewer_activations=True) == f"Less takes: {said}"


def test_a_model_without_an_estimate_trains_all_the_same(llava, monkeypatch, capsys):
    def fail(*_):
        raise NotImplementedError("no numbers")

    monkeypatch.setattr(memory, "estimate_memory", fail)
    memory.print_estimate(str(llava), LORA, None, None, False, 2048)
    assert capsys.readouterr().out == "memory: no estimate for a qwen2 (no numbers)\n"
