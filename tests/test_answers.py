"""Held-out answers in training equal those of `evaluate`, on one process and on several."""

import json
import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, logged, make_tokenizer, random_adapter, run_train, run_zero2
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from train_llava import evaluate, infer
from train_llava.build_model import BuildArguments, build_model
from train_llava.chat import Chat
from train_llava.data import LlavaDataset, to_sample
from train_llava.evaluation import answers
from train_llava.evaluation.answers import LOGGED
from train_llava.model import LoraArguments, load_checkpoint, load_processor, set_trainable
from train_llava.training import memory, throughput

SETTINGS = ["--learning_rate", "2e-2", "--per_device_train_batch_size", "4", "--lora_r", "4", "--warmup_steps", "0"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluated(model: Path, data: Path, output: Path, monkeypatch, *arguments) -> tuple[dict, list[dict]]:
    command = ["evaluate", "--model_name_or_path", model, "--data_path", data, "--output_dir", output, *arguments]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    evaluate.main()
    return json.loads((output / "metrics.json").read_text()), read_lines(output / "predictions.jsonl")


@pytest.mark.parametrize(
    ("train_type", "options"),
    [
        ("full", []),
        ("projector", ["--packing", "true"]),
        ("lora", []),
        ("lora", ["--bf16", "true"]),
        ("freeze_vision", ["--bf16", "true"]),
    ],
)
def test_answers_in_training_equal_those_of_evaluate_and_use_no_random_number(
    parts, corpus, tmp_path, monkeypatch, train_type, options
):
    llava = tmp_path / "llava"
    build_model(
        BuildArguments(
            str(parts["clip"]), str(parts["qwen2"]), str(llava), "bfloat16" if "--bf16" in options else "auto"
        )
    )
    settings = ["--train_type", train_type, "--max_steps", "6", "--eval_data_path", corpus, *SETTINGS, *options]
    settings += ["--eval_strategy", "steps", "--eval_steps", "3", "--preflight", "false"]
    run, plain = tmp_path / "run", tmp_path / "plain"
    losses = run_train(monkeypatch, llava, corpus, run, *settings, "--save_strategy", "no")
    assert run_train(monkeypatch, llava, corpus, plain, *settings, "--eval_answers", "0") == losses
    assert not (plain / "answers").exists()
    base = ["--adapter_name_or_path", run] if train_type == "lora" else []
    metrics, predictions = evaluated(llava if base else run, corpus, tmp_path / "out", monkeypatch, *base)
    assert read_lines(run / "answers" / "step-000006.jsonl") == predictions
    assert len({p["prediction"] for p in predictions}) > 1
    for name in LOGGED:
        assert logged(run, f"eval_{name}")[1] == pytest.approx(metrics[name], abs=1e-9)
        assert not logged(plain, f"eval_{name}")
    assert sorted(path.name for path in (run / "answers").iterdir()) == [
        f"step-{step:06}.{kind}" for step in (3, 6) for kind in ("jsonl", "png")
    ]
    with Image.open(run / "loss.png") as panels, Image.open(plain / "loss.png") as panel:
        assert panels.height == 2 * panel.height
    assert "held-out exact match, last" in (run / "README.md").read_text()


def test_tensorboard_and_the_log_show_the_answers(llava, corpus, tmp_path, monkeypatch, capsys):
    settings = ["--train_type", "projector", "--max_steps", "2", "--eval_data_path", corpus, "--eval_answers", "3"]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    command = ["train", "--model_name_or_path", llava, "--data_path", corpus, "--output_dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, *settings, "--save_strategy", "no"]])
    from train_llava import train

    train.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{'eval_")]
    shown = literal_eval(line)
    assert (shown["eval_questions"], type(shown["eval_loss"])) == (3, float)
    assert shown["eval_loss"] == pytest.approx(logged(tmp_path / "run", "eval_loss")[0], rel=1e-3)
    (events,) = (tmp_path / "board").rglob("events*")
    board = EventAccumulator(str(events), size_guidance={"images": 0})
    board.Reload()
    (sheet,) = board.Images("answers")
    with Image.open(tmp_path / "run" / "answers" / "step-000002.png") as drawn:
        assert (sheet.step, sheet.width, sheet.height) == (2, drawn.width, drawn.height)
    assert len(read_lines(tmp_path / "run" / "answers" / "step-000002.jsonl")) == 3
    assert {tag for tag in board.Tags()["scalars"] if "exact" in tag} == {"eval/exact_match"}


def test_the_best_checkpoint_has_the_best_metric_and_a_run_stops_early(llava, corpus, tmp_path, monkeypatch):
    settings = ["--train_type", "full", "--max_steps", "60", "--eval_data_path", corpus, *SETTINGS]
    settings += ["--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "4"]
    settings += ["--metric_for_best_model", "token_f1", "--load_best_model_at_end", "true"]
    run = tmp_path / "run"
    run_train(monkeypatch, llava, corpus, run, *settings, "--early_stopping_patience", "2", "--preflight", "false")
    state, scores = json.loads((run / "trainer_state.json").read_text()), logged(run, "eval_token_f1")
    best = int(np.argmax(scores))
    assert (state["best_metric"], state["best_global_step"]) == (scores[best], 4 * (best + 1))
    assert state["global_step"] == 4 * len(scores) == 4 * (best + 3) < 60
    _, predictions = evaluated(run, corpus, tmp_path / "out", monkeypatch)
    assert predictions == read_lines(run / "answers" / f"step-{4 * (best + 1):06}.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(("train_type", "options"), [("full", []), ("lora", ["--deepspeed", "ds_zero3.json"])])
def test_ranks_share_the_questions(llava, corpus, tmp_path, monkeypatch, train_type, options):
    settings = [
        "--train_type",
        train_type,
        *options,
        "--max_steps",
        "4",
        "--eval_data_path",
        corpus,
        "--eval_answers",
        "15",
        *SETTINGS,
    ]
    run = tmp_path / "run"
    done = run_zero2(llava, corpus, run, *settings, "--save_strategy", "no", "--preflight", "false")
    assert done.returncode == 0, done.stderr[-2000:]
    base = ["--adapter_name_or_path", run] if train_type == "lora" else []
    _, predictions = evaluated(llava if base else run, corpus, tmp_path / "out", monkeypatch, *base)
    assert read_lines(run / "answers" / "step-000004.jsonl") == predictions[:15]


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


def launch(*arguments) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*LAUNCH, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_write_the_same_files_as_one(llava, corpus, tmp_path, monkeypatch):
    adapter = random_adapter(llava, tmp_path / "adapter", 1)
    options = ["--adapter_name_or_path", adapter, "--max_new_tokens", "8", "--batch_size", "4"]
    evaluated(llava, corpus, tmp_path / "one", monkeypatch, *options)
    arguments = ["--model_name_or_path", llava, "--data_path", corpus, "--output_dir", tmp_path / "two", *options]
    monkeypatch.setattr(evaluate, "by_group", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an evaluation that fails leaves its answers
        evaluated(llava, corpus, tmp_path / "two", monkeypatch, *options)
    answered = tmp_path / "two.answers.jsonl"
    answered.write_bytes(answered.read_bytes()[: answered.stat().st_size // 2])
    launch("-m", "train_llava.evaluate", *arguments)
    for name in ("metrics.json", "predictions.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_two_processes_answer_a_file_in_order_and_continue_where_it_ends(llava, corpus, tmp_path, monkeypatch):
    pictures = [str(corpus / "images_dl" / f"{i}.png") for i in (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)]
    lines = [{"id": i, "image": picture, "prompt": f"What is {i}?"} for i, picture in enumerate(pictures)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["--model_name_or_path", llava, "--questions", tmp_path / "q.jsonl", "--max_new_tokens", "6"]
    command += ["--batch_size", "2", "--answers"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    monkeypatch.setattr(sys, "argv", ["infer", *map(str, command), str(one)])
    infer.main()
    whole = one.read_bytes()
    two.write_bytes(whole[: whole.index(b"\n", len(whole) // 2) - 9])  # killed within a line
    launch("-m", "train_llava.infer", *command, two)
    assert two.read_bytes() == whole


def test_the_text_loss_equals_a_computation_by_hand(llava, parts, corpus, tmp_path, monkeypatch, capsys):
    """For the adapter, for the base without it, and for the language model of the base."""
    adapter = random_adapter(llava, tmp_path / "adapter", 1)
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris. 红色的方块\n" * 12, encoding="utf-8")
    monkeypatch.setattr(evaluate, "WINDOW", 100)
    short = ["--adapter_name_or_path", adapter, "--text_path", text, "--max_new_tokens", "2"]
    kept = evaluated(llava, corpus, tmp_path / "off", monkeypatch, *short)[0]["text"]
    assert f"loss per token of the text: {kept['loss']:.4f}, {kept['base_loss']:.4f} before" in capsys.readouterr().out
    for base in (llava, parts["qwen2"]):
        again = evaluated(llava, corpus, tmp_path / base.name, monkeypatch, *short, "--base", base)[0]["text"]
        assert again == pytest.approx(kept, abs=1e-6)
    language_model = AutoModelForCausalLM.from_pretrained(parts["qwen2"])
    input_ids = torch.tensor(AutoTokenizer.from_pretrained(parts["qwen2"])(text.read_text())["input_ids"])
    pieces = [piece[None] for piece in input_ids.split(100)]
    losses = [language_model(input_ids=piece, labels=piece).loss.item() for piece in pieces]
    weights = [piece.shape[1] - 1 for piece in pieces]
    assert kept["base_loss"] == pytest.approx(np.average(losses, weights=weights), abs=1e-5)
    assert kept["tokens"] == len(input_ids) > 200
    assert abs(kept["loss"] - kept["base_loss"]) > 1e-3
    (head, _, row, *_) = evaluate.compare([tmp_path / "off", tmp_path / "qwen2"], tmp_path).splitlines()
    assert head.endswith("| text loss |")
    assert row.endswith(f"| {kept['loss']:.4f} |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text_path", "{tmp}/nowhere.txt"], "nowhere.txt"),
        (["--text_path", "{tmp}/gbk.txt"], "gbk.txt cannot be opened"),
        (["--text_path", "{tmp}/empty.txt"], "empty.txt is empty"),
        (["--text_path", "{tmp}/letter.txt"], "a text of one token"),
        (["--text_path", "{tmp}/picture.txt"], "picture.txt has <image> in it"),
        (["--base", "{llava}"], "--base goes with --text_path"),
        (["--text_path", "{tmp}/text.txt", "--base", "{tmp}"], "config.json"),
        (["--text_path", "{tmp}/text.txt", "--base", "{tmp}/other"], "splits the text into other tokens"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(llava, parts, corpus, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "gbk.txt").write_bytes("红色的方块".encode("gbk"))
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "letter.txt").write_text("a")
    (tmp_path / "picture.txt").write_text("<image> stands for a picture")
    (tmp_path / "text.txt").write_text("What is this?")
    shutil.copytree(parts["qwen2"], tmp_path / "other")
    make_tokenizer(tmp_path / "other", ("<|endoftext|>", "<|im_end|>"), None, "<|im_end|>", None, size=290)
    words = [word.format(tmp=tmp_path, llava=llava) for word in arguments]
    monkeypatch.setattr(evaluate, "predict", lambda *_, **__: pytest.fail("asked before the text was looked at"))
    with pytest.raises((OSError, ValueError), match=message):
        evaluated(llava, corpus, tmp_path / "out", monkeypatch, *words, "--max_new_tokens", "1")
    assert not (tmp_path / "out").exists()


def test_the_log_reports_the_throughput(llava, corpus, tmp_path, monkeypatch, capsys):
    """Tokens and pictures are counted from the records. The time of evaluation does not count."""
    settings = ["--train_type", "full", "--max_steps", "4", "--per_device_train_batch_size", "16"]
    settings += ["--eval_data_path", corpus, "--eval_strategy", "steps", "--eval_steps", "1", "--preflight", "false"]
    clock = iter(range(10**6))
    monkeypatch.setattr(throughput, "perf_counter", lambda: next(clock))  # a second passes at each look
    monkeypatch.setattr(throughput, "matmul_peak", lambda *_: 1e6)
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *settings)
    processor = load_processor(str(llava))[1]
    dataset, chat = LlavaDataset(str(corpus)), Chat(processor)
    tokens = sum(len(to_sample(dataset[i], chat).labels) for i in range(16))
    first, second = logged(tmp_path / "run", "tokens_per_second")[:2]
    # from the wait for the first batch to its end, and on to the log; then the same, a pause, and into it before
    assert (first, second) == pytest.approx((tokens / 2, tokens / 4), rel=5e-3)
    assert logged(tmp_path / "run", "pictures_per_second")[:2] == pytest.approx([15 / 2, 15 / 4], rel=5e-3)
    assert logged(tmp_path / "run", "data_wait")[:2] == pytest.approx([1 / 2, 1 / 4], rel=5e-3)
    assert not logged(tmp_path / "run", "mfu")
    out = capsys.readouterr().out
    assert re.search(r"^tokens a second, on all devices +\d", out, re.MULTILINE)


@pytest.mark.parametrize("train_type", ["full", "lora", "projector"])
def test_mfu_counts_the_flops_of_a_real_step(llava, corpus, tmp_path, monkeypatch, train_type):
    """A real batch of one record, as long as is assumed, needs as many FLOPs."""
    monkeypatch.setattr(memory, "TEXT", 45)
    monkeypatch.setattr(memory, "ANSWER", 7)
    model, processor = load_checkpoint(str(llava), attn_implementation="eager")
    given = LoraArguments(lora_r=4, lora_dropout=0.0)
    args = SimpleNamespace(train_type=train_type, activation_checkpointing=False, deepspeed=None, frozen_parts=())
    assumed = memory.flops_per_token(model.config, given, args)
    with_recomputation = memory.flops_per_token(model.config, given, args, recompute=True)
    assert with_recomputation > assumed
    args.deepspeed, args.hf_deepspeed_config = "ds_zero3.json", HfDeepSpeedConfig(str(ROOT / "ds_zero3.json"))
    assert memory.flops_per_token(model.config, given, args) == assumed  # whose empty weights are not shared out
    assert is_deepspeed_zero3_enabled()
    unset_hf_deepspeed_config()
    model = set_trainable(model.train(), train_type, given)
    labels = torch.full((1, 61), -100)
    labels[:, -7:] = 3
    logits_to_keep = torch.zeros(1, 61, dtype=torch.bool)
    logits_to_keep[:, -7:] = True
    input_ids = torch.cat([torch.full((1, 16), processor.image_token_id), torch.full((1, 45), 5)], dim=1)
    inputs = {"input_ids": input_ids, "pixel_values": torch.randn(1, 3, 28, 28), "logits_to_keep": logits_to_keep}
    for recompute, expected in ((False, assumed), (True, with_recomputation)):
        if recompute:
            model.train()
            language_model = next(m for name, m in model.named_modules() if name.endswith("model.language_model"))
            language_model.activation_checkpointing_enable()
        with FlopCounterMode(display=False) as counter:
            model(**inputs).logits.sum().backward()
        assert counter.get_total_flops() / 61 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla V100-SXM2-16GB", None),
        # Their names hold another's
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_mfu_is_of_the_published_peak_and_else_of_the_measured_one(monkeypatch, name, peak):
    clock = iter([0, 1, 3])  # the run begins, waits a second, and logs after three
    monkeypatch.setattr(throughput, "perf_counter", lambda: next(clock, 3))
    monkeypatch.setattr(throughput, "matmul_peak", lambda *_: 1e13)
    counts = throughput.Throughput(torch.device("cpu"), torch.bfloat16, 2)
    counts.published_peak = throughput.published_peak(name)
    counts.model_flops, counts.all_flops = 2e10, 3e10
    with counts.waiting():
        pass
    counts.add(300, 5)
    rates = counts.read()
    used = peak or 1e13
    assert counts.published_peak == peak
    assert rates["mfu"] == pytest.approx(100 * 2e10 / used, rel=5e-3)
    assert rates["hfu"] == pytest.approx(100 * 3e10 / used, rel=5e-3)
    assert rates.get("matmul_share") == (pytest.approx(0.2, rel=5e-3) if peak else None)
    assert (rates["tokens_per_second"], rates["data_wait"]) == pytest.approx((200, 1 / 3), rel=5e-3)


def test_held_out_data_without_a_question_is_refused(llava, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "list_questions", lambda *_: iter(()))
    settings = ["--train_type", "projector", "--max_steps", "1", "--eval_data_path", corpus, "--preflight", "false"]
    with pytest.raises(ValueError, match="no held-out question can be asked of this model: set --eval_answers 0"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *settings)
