"""Recipes: a file gives the same as the command line, a wrong line is named, a run is repeated from its own."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, logged, run_train, run_zero2, zero2_command

from train_llava import infer, train
from train_llava.cli import given_arguments, parse_arguments
from train_llava.infer import InferArguments
from train_llava.model import LoraArguments
from train_llava.train import DataArguments, ModelArguments, TrainArguments
from train_llava.training.checkpointing import write_recipe

TRAIN = (ModelArguments, LoraArguments, DataArguments, TrainArguments)
RECIPE = """\
# 第一阶段
model_name_or_path: "模型 1" # the model
data_path: [a, 'b c']
data_weights:
  - 1
  - 1e-1
output_dir: out
--learning-rate: 1e-3
packing: yes
eval_strategy: no
save_strategy: "no"
bits: ~
eval_data_path:
image_dir: ''
warmup_steps: 007
report_to: [none]
lr_scheduler_kwargs: {min_lr: 1e-5, deep: {on: yes, off: null, "text": "1e-5"}}
push_to_hub: False
run_name: 2026_11_30
hub_model_id: -me
"""
WORDS = """--model_name_or_path '模型 1' --data_path a 'b c' --data_weights 1 1e-1 --output_dir out
--learning_rate 1e-3 --packing yes --eval_strategy no --save_strategy no --image_dir '' --warmup_steps 007
--report_to none --lr_scheduler_kwargs '{"min_lr": 1e-05, "deep": {"true": true, "false": null, "text": "1e-5"}}'
--push_to_hub False --run_name 2026_11_30 --hub_model_id=-me"""


@pytest.mark.parametrize("ending", ["yaml", "yml", "YAML"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_recipe_gives_what_the_command_line_gives(tmp_path, ending, encoding):
    file = tmp_path / f"r.{ending}"
    file.write_bytes(RECIPE.replace("\n", "\r\n").encode(encoding))
    given = given_arguments(TRAIN, [str(file)])
    assert given == given_arguments(TRAIN, shlex.split(WORDS))
    assert given["learning_rate"] == 0.001
    assert given["data_weights"] == [1.0, 0.1]
    assert given["packing"] is True
    assert given["eval_strategy"] == "no"
    assert not {"bits", "eval_data_path"} & given.keys()  # null: as if they were not there


def test_later_arguments_override_a_recipe_and_a_recipe_overrides_the_launcher(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("deepspeed: ds_zero3.json\ndata_path: [a, b]\npacking: true\npreflight: yes\nseed: 3\n")
    ours = ["--local_rank=1", f"--deepspeed={ROOT}/ds_zero2_no_offload.json"]
    given = given_arguments(TRAIN, [*ours, "r.yaml", "--data_path", "c", "--no_preflight", "--packing", "false"])
    expected = {"local_rank": 1, "deepspeed": f"{ROOT}/ds_zero3.json", "data_path": ["c"], "packing": False}
    assert given == expected | {"preflight": False, "seed": 3}
    Path("r.yaml").write_text("seed: 3\n")
    assert given_arguments(TRAIN, [*ours, "r.yaml"])["deepspeed"] == f"{ROOT}/ds_zero2_no_offload.json"
    given = given_arguments(TRAIN, [*ours, "r.yaml", "--deepspeed", "own.json"])
    assert given == {"local_rank": 1, "deepspeed": "own.json", "seed": 3}


def test_deepspeed_settings_are_looked_up_in_the_callers_folder_and_then_in_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["--deepspeed", "ds_zero3.json"], ["--deepspeed=ds_zero3.json"]):
        assert given_arguments(TRAIN, words) == {"deepspeed": f"{ROOT}/ds_zero3.json"}
    Path("ds_zero3.json").touch()
    assert given_arguments(TRAIN, ["--deepspeed", "ds_zero3.json"]) == {"deepspeed": "ds_zero3.json"}


def test_a_home_folder_is_expanded_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "r.yaml").write_text("data_path: [~/a, c~/d]\noutput_dir: ~/e\nmodel_name_or_path: ~")
    expected = {"data_path": ["/home/me/a", "c~/d"], "output_dir": "/home/me/e"}
    assert given_arguments(TRAIN, [str(tmp_path / "r.yaml")]) == expected


def test_mappings_arrive_as_the_library_reads_them(tmp_path, monkeypatch, llava):
    (tmp_path / "r.yaml").write_text(
        f"model_name_or_path: {llava}\ndata_path: {tmp_path}\noutput_dir: out\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr: 1e-5\n"
        "accelerator_config: {split_batches: false, even_batches: yes}\n"
    )
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "r.yaml"), "--use_cpu", "true"])
    *_, args = parse_arguments(*TRAIN)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-5}
    assert args.accelerator_config.even_batches is True
    assert args.accelerator_config.split_batches is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not hold lines `key: value`"),
        ("# nothing\n", "does not hold lines `key: value`"),
        ("- seed: 1", "does not hold lines `key: value`"),
        ("seed 1", "does not hold lines `key: value`"),
        ("seed: 1\nsede: 2", ", line 2: sede is not known: the nearest that is known is seed"),
        ("image_folder: a", ", line 1: image_folder is not known: the nearest that is known is image_dir"),
        (
            "--per-device-batch-size: 4",
            "--per-device-batch-size is not known: the nearest that is known is --per_",
        ),
        ("seed: 1\n\nseed: 2", ", line 3: seed is given twice"),
        ("max-steps: 1\nmax_steps: 2", ", line 2: max_steps is given twice"),
        ("packing: maybe", ", line 1: argument --packing: Truthy value expected: got maybe"),
        ("seed: 1.5", ", line 1: argument --seed: invalid int value: '1.5'"),
        ("train_type: fulll", "invalid choice: 'fulll'"),
        ("seed: [1, 2]", ", line 1: seed takes one value, and here are 2"),
        ("data_path: []", "expected at least one argument"),
        ("seed: 1\n\tmax_steps: 2", r" is no YAML: .*line 2"),
        ("data_path: [a", " is no YAML: "),
        ("seed: 1\n---\nseed: 2", " is no YAML: "),
        ("lr_scheduler_kwargs: {a: !python/name 1}", " is no YAML: "),
        (b"data_path: \xc4\xe3", " is no YAML: 'utf-8' codec"),
        (bytes(range(256)), " is no YAML: "),
    ],
)
def test_an_error_in_a_recipe_names_the_file_and_the_line(tmp_path, text, message):
    (tmp_path / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"(?s)^{tmp_path}/r.yaml.*{message}"):
        given_arguments(TRAIN, [str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["."], r"^\. belongs to no argument$"),
        (["--seed", "1", "r.yaml"], "^r.yaml belongs to no argument: a recipe stands first$"),
        (["--image_folder", "a"], "^--image_folder is not known: the nearest that is known is --image_dir$"),
        (["--loar-r=3"], "^--loar-r is not known: the nearest that is known is --lora_r$"),
    ],
)
def test_an_unknown_argument_is_named(words, message):
    with pytest.raises((ValueError, OSError), match=message):
        given_arguments(TRAIN, words)


def test_a_missing_argument_is_named(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text("model_name_or_path: m\n")
    monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "r.yaml")])
    with pytest.raises(ValueError, match=r"^the following arguments are required: --data_path$"):
        parse_arguments(*TRAIN)


def test_other_commands_take_a_recipe_too(llava, tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(f"model_name_or_path: {llava}\nmax_new_tokens: 4\n")
    for words in ([tmp_path / "r.yaml"], ["--model_name_or_path", llava, "--max_new_tokens", "4"]):
        monkeypatch.setattr(sys, "argv", [str(word) for word in ["infer", *words, "--prompt", "hi"]])
        infer.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    (tmp_path / "r.yaml").write_text("packing: true")
    with pytest.raises(ValueError, match="packing is not known"):
        given_arguments((InferArguments,), [str(tmp_path / "r.yaml")])


LORA = ["--train_type", "use_lora", "--lora_r", "4", "--lora_dropout", "0.2", "--max_steps", "4", "--seed", "7"]
LORA += ["--per_device_train_batch_size", "2", "--lr_scheduler_type", "cosine_with_min_lr", "--packing"]
LORA += ["--lr_scheduler_kwargs", '{"min_lr": 1e-5}', "--data_weights", "0.5", "--learning_rate", "1e-2"]


def test_a_run_is_repeated_from_its_own_recipe(llava, corpus, tmp_path, monkeypatch):
    losses = run_train(monkeypatch, llava, corpus, tmp_path / "run", *LORA, "--hub_token", "secret")
    written = (tmp_path / "run" / "recipe.yaml").read_text()
    assert written.startswith("# What a run on 1 ranks was started with; again: python -m train_llava.train ")
    assert yaml.safe_load(written) == {
        "model_name_or_path": str(llava),
        "lora_r": 4,
        "lora_dropout": 0.2,
        "data_path": [str(corpus)],
        "data_weights": [0.5],
        "packing": True,
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr": 1e-5}',
        "logging_steps": 1.0,
        "report_to": "none",
        "seed": 7,
        "train_type": "lora",
        "learning_rate": 1e-2,
        "projector_learning_rate": 1e-3,
        "vision_learning_rate": 1e-3,
        "bf16": False,
    }
    command = ["train", tmp_path / "run" / "recipe.yaml", "--output_dir", tmp_path / "again"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    train.main()
    assert logged(tmp_path / "again") == losses
    assert len(set(losses)) == 4
    again = (tmp_path / "again" / "recipe.yaml").read_text()
    assert again == written.replace(f"{tmp_path}/run", f"{tmp_path}/again")


def test_the_recipe_of_an_earlier_start_is_kept(tmp_path, monkeypatch):
    words = ["train", "--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path), "--use_cpu"]
    for seed in ("1", "1", "2", "3"):
        monkeypatch.setattr(sys, "argv", [*words, "--seed", seed])
        args = TrainArguments(output_dir=str(tmp_path), use_cpu=True, seed=int(seed))
        write_recipe(ModelArguments("m"), LoraArguments(), DataArguments(["d"]), args)
    seeds = {file.name: yaml.safe_load(file.read_text())["seed"] for file in tmp_path.iterdir()}
    assert seeds == {"recipe-1.yaml": 1, "recipe-2.yaml": 2, "recipe.yaml": 3}


@pytest.mark.slow
def test_a_run_on_two_ranks_is_repeated_from_its_recipe_with_its_deepspeed_settings(llava, corpus, tmp_path):
    arguments = ["--train_type", "full", "--max_steps", "4", "--per_device_train_batch_size", "2", "--seed", "5"]
    done = run_zero2(llava, corpus, tmp_path / "run", *arguments, "--deepspeed", "ds_zero3.json")
    assert done.returncode == 0, done.stderr[-3000:]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["deepspeed"] == "ds_zero3.json"
    assert "local_rank" not in recipe
    _, environment = zero2_command(llava, corpus, tmp_path / "again")
    command = ["bash", ROOT / "run_zero2.sh", tmp_path / "run" / "recipe.yaml", "--output_dir", tmp_path / "again"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())["deepspeed"] == "ds_zero3.json"
    assert logged(tmp_path / "again") == logged(tmp_path / "run")
