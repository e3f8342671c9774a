"""Nothing is lost: runs that are killed, stopped, poisoned, or run out of disk; and what each switch leaves alone."""

import gc
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import pytest
import torch
from conftest import logged, run_train, run_zero2, turns, zero2_command
from safetensors.torch import load_file, save_file
from test_data import ITEMS, gradients
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Qwen2Config, Qwen2ForCausalLM, Trainer

from train_llava.build_model import BuildArguments, build_model
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.dataset import table as table_module
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.train import TrainArguments
from train_llava.trainer import LlavaTrainer
from train_llava.training import preflight as preflight_module
from train_llava.training import throughput
from train_llava.training.checkpointing import (
    INCOMPLETE,
    check_resumable,
    is_checkpoint_complete,
    last_complete_checkpoint,
    rotate_checkpoints,
    starting_point,
)
from train_llava.training.stopping import StopOnSignal

ROOT = Path(__file__).parent.parent
FAST = ["--learning_rate", "1e-3", "--per_device_train_batch_size", "2"]


def write_checkpoint(folder: Path, ranks: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for rank in range(ranks):
        (folder / f"rng_state_{rank}.pth").touch()


def test_only_a_complete_checkpoint_of_as_many_ranks_is_resumed_from(tmp_path):
    assert last_complete_checkpoint(str(tmp_path)) is None
    for step in (8, 9, 10, 11):
        write_checkpoint(tmp_path / f"checkpoint-{step}", ranks=2)
    (tmp_path / "checkpoint-10" / INCOMPLETE).touch()
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")
    check_resumable(tmp_path / "checkpoint-9", 2)
    with pytest.raises(ValueError, match="written by 2 ranks and this run has 4"):
        check_resumable(tmp_path / "checkpoint-9", 4)
    with pytest.raises(ValueError, match="no checkpoint that was written to its end"):
        check_resumable(tmp_path / "checkpoint-10", 2)
    write_checkpoint(tmp_path / "checkpoint-12", ranks=0)
    with pytest.raises(ValueError, match="holds the model only"):
        check_resumable(tmp_path / "checkpoint-12", 2)
    write_checkpoint(tmp_path / "checkpoint-13.bak")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-12")


def test_only_checkpoints_of_the_run_itself_are_removed(tmp_path):
    for step in (2, 4, 6, 8, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in ("checkpoint-best", "checkpoint-2-good", "checkpoint-3", "checkpoint-007", "checkpoint-0x2"):
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / name)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-5").mkdir()
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text("torn")
    theirs = {path.name for path in tmp_path.iterdir()} - {f"checkpoint-{step}" for step in (2, 4, 6, 8, 10)}

    def left(limit: int | None, best: int | None) -> list[int]:
        rotate_checkpoints(tmp_path, limit, best and f"/elsewhere/checkpoint-{best}")
        assert theirs <= {path.name for path in tmp_path.iterdir()}
        return [step for step in (2, 4, 6, 8, 10) if (tmp_path / f"checkpoint-{step}").exists()]

    assert left(None, None) == [2, 4, 6, 8, 10]
    assert left(4, 2) == [2, 6, 8, 10]
    assert left(3, None) == [6, 8, 10]
    assert left(1, 8) == [8, 10]
    assert left(1, None) == [10]


def test_no_other_model_is_written_over_and_no_branch_left_is_taken_up_again(tmp_path):
    def begin(output, resume):
        return starting_point(TrainArguments(output_dir=str(tmp_path / output), resume_from_checkpoint=str(resume)))

    for run, step in (("one", 5), ("one", 10), ("other", 5)):
        write_checkpoint(tmp_path / run / f"checkpoint-{step}")
    five = tmp_path / "one" / "checkpoint-5"
    assert begin("new", five) == str(five)
    with pytest.raises(ValueError, match="other holds checkpoint-5: choose another"):
        begin("other", five)
    with pytest.raises(ValueError, match=r"checkpoint-5: .*checkpoint-10 is later; move it away, or go on from it"):
        begin("one", five)
    assert begin("one", "true") == str(tmp_path / "one" / "checkpoint-10")
    (tmp_path / "one" / "latest").symlink_to("checkpoint-10")
    assert begin("one", tmp_path / "one" / "latest")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "checkpoint-10").symlink_to(tmp_path / "one" / "checkpoint-10")
    assert begin("linked", tmp_path / "linked" / "checkpoint-10")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "model.safetensors").touch()
    with pytest.raises(
        ValueError, match=r"holds model.safetensors: choose another, or remove it, since no checkpoint"
    ):
        begin("done", "true")


def start(command: list, environment: dict, output: Path, checkpoint: str) -> subprocess.Popen:
    """Starts a run in a process group of its own, and comes back once it has written a checkpoint."""
    run = subprocess.Popen(
        command, cwd=ROOT, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    folder = output / checkpoint
    deadline = time.monotonic() + 240
    while not ((folder / "trainer_state.json").exists() and not (folder / INCOMPLETE).exists()):
        assert run.poll() is None, run.stdout.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_killed_run_goes_on_to_the_same_losses(llava, corpus, tmp_path, train_type):
    arguments = [*FAST, "--train_type", train_type, "--max_steps", "60", "--save_steps", "5"]
    done = run_zero2(llava, corpus, tmp_path / "whole", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    command, environment = zero2_command(llava, corpus, tmp_path / "run", *arguments)
    run = start(command, environment, tmp_path / "run", "checkpoint-10")
    for process in [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]:
        process.kill()
    run.communicate()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    # as a kill in the middle of writing leaves it
    last = last_complete_checkpoint(str(tmp_path / "run"))
    torn = tmp_path / "run" / "checkpoint-59"
    shutil.copytree(last, torn)
    (torn / INCOMPLETE).touch()
    for file in torn.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    done = run_zero2(llava, corpus, tmp_path / "run", *arguments, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from {last}" in done.stdout
    assert logged(tmp_path / "run") == pytest.approx(logged(tmp_path / "whole"), abs=1e-6)
    assert len(logged(tmp_path / "run")) == 60
    weights = "adapter_model.safetensors" if train_type == "lora" else "model.safetensors"
    ours, theirs = load_file(tmp_path / "run" / weights), load_file(tmp_path / "whole" / weights)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_run_resumes_without_deepspeed(llava, corpus, tmp_path, monkeypatch, order):
    """In the middle of an epoch that is not the first, 8 steps each."""
    arguments = [*FAST, "--train_type", "full", "--max_steps", "15", "--save_steps", "5"]
    arguments += ["--train_sampling_strategy", order]
    whole = run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    shutil.rmtree(tmp_path / "run" / "checkpoint-15")
    again = run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments, "--resume_from_checkpoint", "true")
    assert again == whole


def test_a_killed_run_without_a_checkpoint_starts_anew(llava, corpus, tmp_path, monkeypatch, capsys):
    arguments = [*FAST, "--train_type", "projector", "--max_steps", "2", "--resume_from_checkpoint", "true"]
    assert len(run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)) == 2
    assert "no checkpoint was finished: training from the start" in capsys.readouterr().out


def test_a_stopped_run_keeps_its_last_checkpoint_beside_the_best(llava, corpus, tmp_path, monkeypatch):
    def stop_at_3(self, *args, **kwargs):
        self.received = args[1].global_step == 3
        return on_step_end(self, *args, **kwargs)

    on_step_end = StopOnSignal.on_step_end
    monkeypatch.setattr(StopOnSignal, "on_step_end", stop_at_3)
    arguments = [*FAST, "--train_type", "projector", "--max_steps", "9", "--save_steps", "1", "--eval_steps", "1"]
    arguments += ["--eval_strategy", "steps", "--eval_data_path", corpus, "--load_best_model_at_end", "true"]
    arguments += ["--eval_answers", "0"]
    arguments += ["--metric_for_best_model", "loss", "--greater_is_better", "true"]  # so that the first is the best
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments, "--save_total_limit", "1")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("everybody", [False, True])
def test_sigterm_ends_a_run_with_a_checkpoint(llava, corpus, tmp_path, everybody):
    """Also one that a scheduler sends to all processes of a job, those that load data among them."""
    arguments = [*FAST, "--train_type", "projector", "--max_steps", "100000", "--save_steps", "5"]
    arguments += ["--save_total_limit", "2", "--dataloader_num_workers", "1"]
    command, environment = zero2_command(llava, corpus, tmp_path / "run", *arguments)
    run = start(command, environment, tmp_path / "run", "checkpoint-5")
    process = psutil.Process(run.pid)
    for told in [process, *process.children(recursive=True)] if everybody else [process]:
        told.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=120)[0].decode()
    assert "SIGTERM: ending at step" in output, output[-3000:]
    step = int(output.split("SIGTERM: ending at step ")[1].split()[0])
    assert last_complete_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / f"checkpoint-{step}")
    check_resumable(tmp_path / "run" / f"checkpoint-{step}", 2)


FAILED = """
import sys
from functools import partial
from torch.utils.data import DataLoader
from train_llava.training import stopping
batches = iter(DataLoader(range(9), num_workers=1, worker_init_fn=partial(stopping.outlive_sigterm, begin=None)))
next(batches)
sys.exit(3)
"""


def test_a_run_that_fails_does_not_wait_for_its_workers():
    """They let a SIGTERM pass, by which Python would end them."""
    done = subprocess.run([sys.executable, "-c", FAILED], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(llava, corpus, tmp_path, monkeypatch):
    """One token, which one record alone has, is given an embedding that is not a number."""
    model, processor = load_checkpoint(str(llava))
    token_id = processor.tokenizer("Q")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[token_id] = torch.nan
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    records = json.loads((corpus / "chat.json").read_text())
    records[11] = records[11] | {
        "id": "poison",
        "conversations": turns("<image>\nQ?" + " a red square" * 9, "a red square"),
    }
    (tmp_path / "chat.json").write_text(json.dumps(records))
    arguments = [*FAST, "--train_type", "projector", "--num_train_epochs", "1", "--save_steps", "1"]
    arguments += ["--image_dir", corpus / "images_dl", "--preflight", "false"]
    with pytest.raises(ValueError, match=r"step \d+: the loss is nan at the records .*'poison'") as error:
        run_train(monkeypatch, tmp_path / "model", tmp_path, tmp_path / "run", *arguments)
    step = int(str(error.value).split()[1].strip(":"))
    assert last_complete_checkpoint(str(tmp_path / "run")) in (None, str(tmp_path / "run" / f"checkpoint-{step - 1}"))
    command = [sys.executable, "-m", "train_llava.train", "--model_name_or_path", tmp_path / "model", "--data_path"]
    command += [tmp_path, "--output_dir", tmp_path / "again", "--report_to", "none", *arguments[:-2]]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "step 1: the loss is nan at the records" in done.stderr  # the preflight's, of the longest record


@pytest.mark.parametrize(
    ("broken", "save", "message"),
    [
        ("gradient", "steps", "step 3: the gradients are not finite .*; checkpoints before it are whole"),
        ("gradient unclipped", "steps", "step 3: the gradients are not finite"),
        ("weight", "steps", r"checkpoint-3 could not be written \(step 3: .*linear_2.bias is not finite\)"),
        ("weight", "no", r"^step 3: .*linear_2.bias is not finite"),
    ],
)
def test_nothing_is_saved_that_is_not_finite(llava, corpus, tmp_path, monkeypatch, broken, save, message):
    training_step, run = LlavaTrainer.training_step, tmp_path / "run"

    def break_one_number(self, model, *args):
        loss = training_step(self, model, *args)
        bias = model.model.multi_modal_projector.linear_2.bias
        if self.state.global_step == 2:
            (bias.data if broken == "weight" else bias.grad)[1] = torch.inf
        return loss

    monkeypatch.setattr(LlavaTrainer, "training_step", break_one_number)
    arguments = [*FAST, "--train_type", "projector", "--max_steps", "3", "--preflight", "false", "--save_steps", "1"]
    arguments += ["--save_strategy", save, "--max_grad_norm", "0" if broken == "gradient unclipped" else "1"]
    with pytest.raises(ValueError, match=message):
        run_train(monkeypatch, llava, corpus, run, *arguments)
    assert not list(run.glob("*.safetensors"))
    if save == "no":
        return
    last = run / "checkpoint-2"
    assert last_complete_checkpoint(str(run)) == str(last)
    monkeypatch.undo()
    weights = load_file(last / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    weights[name][0, 0] = torch.nan
    save_file(weights, last / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{last} is nothing to go on from; take an earlier one: .*linear_1.weight"):
        run_train(monkeypatch, llava, corpus, run, *arguments, "--resume_from_checkpoint", "true")


def test_a_full_disk_costs_no_checkpoint_before_it(llava, corpus, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("a small disk to fill takes the right to mount one")
    try:
        arguments = [*FAST, "--train_type", "full", "--max_steps", "20", "--save_steps", "2", "--preflight", "false"]
        with pytest.raises(ValueError, match=r"checkpoint-\d+ could not be written .* before it are whole"):
            run_train(monkeypatch, llava, corpus, disk / "run", *arguments)
        last = last_complete_checkpoint(str(disk / "run"))
        check_resumable(Path(last), 1)
        load_checkpoint(last)
        assert all(is_checkpoint_complete(checkpoint) for checkpoint in (disk / "run").glob("checkpoint-*"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def small_files():
    """No file can grow beyond 50 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("preflight", "what"), [("false", "{run}"), ("true", "preflight: {run}/preflight")])
def test_a_full_disk_at_the_last_save_is_named(llava, corpus, tmp_path, monkeypatch, preflight, what, small_files):
    arguments = [*FAST, "--train_type", "full", "--max_steps", "1", "--save_strategy", "no", "--preflight", preflight]
    named = what.format(run=tmp_path / "run")
    with pytest.raises((OSError, ValueError), match=f"^{named} could not be written: file too large; make room on"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    assert not list((tmp_path / "run").glob("**/*.safetensors"))
    assert not (tmp_path / "run" / "trainer_state.json").exists()


def test_a_full_disk_is_named_where_a_table_or_a_model_is_written(llava, adapter, tmp_path, monkeypatch, small_files):
    records = [{"id": str(i), "conversations": turns("What is this? " * 20, "a red square")} for i in range(300)]
    with open(tmp_path / "chat.jsonl", "w") as file:
        file.writelines(json.dumps(part) + "\n" for part in records[:50])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = table_module.table_rows
    monkeypatch.setattr(table_module, "table_rows", lambda *given: (row for _ in range(9) for row in rows(*given)))
    with pytest.raises(
        OSError, match=rf"^{tmp_path}/cache/\S+ could not be written: file too .* set HF_DATASETS_CACHE"
    ):
        LlavaDataset(str(tmp_path / "chat.jsonl"))
    assert [path.suffix for path in (tmp_path / "cache" / "train_llava").iterdir()] == [".lock"]
    with pytest.raises(OSError, match=f"^{tmp_path}/merged could not be written: file too large; make room"):
        merge_lora(str(llava), str(adapter), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_preflight_finds_a_model_that_is_not_saved_as_it_is(llava, corpus, tmp_path, monkeypatch):
    save = LlavaForConditionalGeneration.save_pretrained

    def save_with_a_fault(self, *args, **kwargs):
        weight = self.model.language_model.layers[0].mlp.up_proj.weight
        with torch.no_grad():
            weight.neg_()
            save(self, *args, **kwargs)
            weight.neg_()

    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", save_with_a_fault)
    with pytest.raises(
        ValueError, match=r"preflight: .*layers\.0\.mlp\.up_proj\.weight is not saved as it is in memory"
    ):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *FAST, "--max_steps", "2", "--train_type", "full")
    assert not list((tmp_path / "run").glob("preflight*"))


def change_a_file(folder: Path, change: str) -> None:
    """Does to a folder just saved what a fault in saving might."""
    weights = next(folder.glob("*model.safetensors"))
    if change == "template":
        template = folder / "chat_template.jinja"
        template.write_text(template.read_text() + "{{ 'Bye' }}")
    elif change == "picture":
        config = folder / "processor_config.json"
        config.write_text(config.read_text().replace("0.48145466", "0.5"))
    else:
        tensors = load_file(weights)
        name = next(name for name in tensors if change.split()[0] in name)
        value = tensors.pop(name)
        if "changed" in change:
            tensors[name] = value + 1
        if "renamed" in change:
            tensors[name.replace("layers", "layer")] = value
        if "left over" in change:
            tensors |= {name: value, "left.over": value.clone()}
        save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize(
    ("train_type", "change"),
    [
        *(("full", f"v_proj {fault}") for fault in ("changed", "missing", "renamed", "left over")),
        *(("lora", f"lora_B {fault}") for fault in ("changed", "missing")),
        ("lora", "projector changed"),
        ("projector", "template"),
        ("lora", "picture"),
    ],
)
def test_preflight_finds_every_error_of_saving(llava, corpus, tmp_path, monkeypatch, train_type, change):
    save = LlavaProcessor.save_pretrained

    def save_with_a_fault(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        change_a_file(Path(folder), change)

    monkeypatch.setattr(LlavaProcessor, "save_pretrained", save_with_a_fault)
    with pytest.raises(ValueError, match=r"preflight: .* is not saved as it is in memory"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *FAST, "--max_steps", "2", "--train_type", train_type)


def test_preflight_loads_nothing_and_keeps_no_gradients(llava, corpus, tmp_path, monkeypatch):
    """What it holds beside the model is one gradient and, while it compares, one tensor."""
    opened, held = [], []
    from_pretrained = LlavaForConditionalGeneration.from_pretrained.__func__
    monkeypatch.setattr(
        LlavaForConditionalGeneration,
        "from_pretrained",
        classmethod(
            lambda cls, name, *args, **kwargs: opened.append(name) or from_pretrained(cls, name, *args, **kwargs)
        ),
    )
    peak_memory = preflight_module.peak_memory

    def gradients_held(device):
        held.append(sum(p.grad is not None for p in gc.get_objects() if isinstance(p, torch.nn.Parameter)))
        return peak_memory(device)

    monkeypatch.setattr(preflight_module, "peak_memory", gradients_held)
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *FAST, "--max_steps", "1", "--train_type", "full")
    assert opened == [str(llava)]
    assert held == [0]


@pytest.mark.parametrize(("name", "expected"), [("linux", 3 * 1024), ("darwin", 3), ("win32", 7)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, name, expected):
    """`ru_maxrss` is in KiB on Linux, in bytes on macOS, and Windows has no such module."""
    usage = SimpleNamespace(ru_maxrss=3)
    module = None if name == "win32" else SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    monkeypatch.setitem(sys.modules, "resource", module)
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.setattr(
        throughput.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    )
    assert throughput.peak_memory(torch.device("cpu")) == expected


@pytest.mark.parametrize("train_type", ["lora", "full", "freeze_vision", "projector"])
def test_every_type_trains_in_bf16(llava, corpus, tmp_path, monkeypatch, train_type):
    arguments = [*FAST, "--max_steps", "4", "--train_type", train_type, "--lora_dropout", "0", "--save_strategy", "no"]
    exact = run_train(monkeypatch, llava, corpus, tmp_path / "fp32", *arguments)
    rough = run_train(monkeypatch, llava, corpus, tmp_path / "bf16", *arguments, "--bf16", "true")
    assert rough == pytest.approx(exact, rel=5e-3)
    assert rough != exact


def test_the_held_out_loss_is_that_of_all_answer_tokens(llava, corpus, tmp_path, monkeypatch):
    """Whatever the batch size: the sum of the tokens' losses over their number, as one batch of all records has it."""
    arguments = ["--max_steps", "1", "--learning_rate", "1e-20", "--eval_data_path", corpus, "--preflight", "false"]
    arguments += ["--train_type", "projector", "--save_strategy", "no", "--eval_answers", "0"]
    losses = []
    for i, more in enumerate(
        ([1], [3], [10], [3, "--packing", "true"], [3, "--train_sampling_strategy", "group_by_length"])
    ):
        output = tmp_path / str(i)
        run_train(monkeypatch, llava, corpus, output, *arguments, "--per_device_eval_batch_size", *more)
        losses += logged(output, "eval_loss")
    model, processor = load_checkpoint(str(llava))
    dataset = LlavaDataset(str(corpus))
    expected = model(**LlavaCollator(processor)([dataset[i] for i in range(16)])).loss.item()
    assert losses == pytest.approx([expected] * 5, abs=1e-6)


def test_a_replacement_does_not_count_twice_in_the_held_out_loss(llava, corpus, tmp_path, monkeypatch):
    records = json.loads((corpus / "chat.json").read_text())
    for name, held_out in (("good", records[1:]), ("bad", [{"id": "bad"}, *records[1:]])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chat.json").write_text(json.dumps(held_out))
    arguments = ["--max_steps", "1", "--learning_rate", "1e-20", "--train_type", "projector", "--preflight", "false"]
    arguments += ["--save_strategy", "no", "--max_bad_fraction", "0.1", "--eval_image_dir", corpus / "images_dl"]
    arguments += ["--eval_answers", "0"]
    losses = []
    for name in ("good", "bad"):
        data = ["--eval_data_path", tmp_path / name]
        run_train(monkeypatch, llava, corpus, tmp_path / "run" / name, *arguments, *data)
        losses += logged(tmp_path / "run" / name, "eval_loss")
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


def test_a_run_in_bf16_goes_on_from_what_it_saved_in_fp32(llava, corpus, tmp_path, monkeypatch):
    arguments = [*FAST, "--train_type", "freeze_vision", "--bf16", "true", "--save_steps", "2", "--preflight", "false"]
    whole = run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments, "--max_steps", "4")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    load, loaded = LlavaTrainer._load_from_checkpoint, []

    def load_and_keep(self, *given):
        load(self, *given)
        loaded.extend(p.detach().clone() for p in self.model.parameters() if p.requires_grad)

    monkeypatch.setattr(LlavaTrainer, "_load_from_checkpoint", load_and_keep)
    again = [*arguments, "--max_steps", "4", "--resume_from_checkpoint", "true"]
    assert run_train(monkeypatch, llava, corpus, tmp_path / "run", *again) == whole
    assert any(not torch.equal(weights, weights.bfloat16().float()) for weights in loaded)


def test_every_overridden_method_still_exists_in_trainer():
    """A method that transformers renames would be overridden in vain, in silence."""
    own = [name for name in vars(LlavaTrainer) if not name.startswith("__")]
    assert "_save_checkpoint" in own
    assert all(callable(getattr(Trainer, name, None)) for name in own)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_preflight_changes_nothing(llava, corpus, tmp_path, monkeypatch, capsys, train_type):
    arguments = [*FAST, "--max_steps", "3", "--train_type", train_type, "--lora_dropout", "0.5"]
    with_it = run_train(monkeypatch, llava, corpus, tmp_path / "with", *arguments)
    assert (
        "preflight: 2 of the longest records forward and backward, saved, read back alike" in capsys.readouterr().out
    )
    without = run_train(monkeypatch, llava, corpus, tmp_path / "without", *arguments, "--preflight", "false")
    assert with_it == without


def test_an_empty_tensor_in_a_saved_model_is_noticed(llava, corpus, tmp_path, monkeypatch):
    save = LlavaForConditionalGeneration.save_pretrained

    def save_without_the_projector(self, folder, *args, state_dict=None, **kwargs):
        state_dict = {k: v for k, v in self.state_dict().items() if "linear_2.weight" not in k}
        save(self, folder, *args, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "save_pretrained", save_without_the_projector)
    arguments = [*FAST, "--max_steps", "1", "--train_type", "projector", "--preflight", "false"]
    with pytest.raises(ValueError, match="was not saved whole"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)


def test_every_part_trains_at_its_own_rate(model, tmp_path):
    rates = {"vision tower": 1e-6, "projector": 1e-3, "language model": 1e-5}
    args = TrainArguments(output_dir=str(tmp_path), train_type="full", weight_decay=0.1)
    whole = set_trainable(model, "full", LoraArguments())
    trainer = LlavaTrainer(whole, args, learning_rates=rates, write_card=print)
    groups = trainer.create_optimizer().param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, (rate, decay) in found.items():
        part = "vision tower" if "vision" in name else "projector" if "projector" in name else "language model"
        assert rate == rates[part], name
        assert decay == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_a_tied_weight_is_written_once(parts, tmp_path):
    """DeepSpeed hands over copies, of which nobody sees any more that two were one."""
    for file in parts["qwen2"].iterdir():
        if file.name != "config.json":
            shutil.copy(file, tmp_path)
    config = Qwen2Config.from_pretrained(parts["qwen2"], tie_word_embeddings=True)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path), str(tmp_path / "llava")))
    model, processor = load_checkpoint(str(tmp_path / "llava"))
    args = TrainArguments(output_dir=str(tmp_path / "run"), train_type="full")
    trainer = LlavaTrainer(model, args, processing_class=processor, learning_rates={}, write_card=print)
    whole = model.state_dict()
    trainer._save(str(tmp_path / "run"), {name: tensor.clone() for name, tensor in whole.items()})
    written = load_file(tmp_path / "run/model.safetensors")
    assert len(written) == len(whole) - 1
    again, _ = load_checkpoint(str(tmp_path / "run"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("train_type", "given", "expected"),
    [
        ("lora", {}, (2e-5, 2e-4)),
        ("full", {}, (2e-5, 2e-5)),
        ("projector", {}, (1e-3, 1e-3)),
        ("full", {"vision_learning_rate": 3e-6, "projector_learning_rate": 4e-4}, (4e-4, 2e-5)),
    ],
)
def test_default_rates_are_those_of_the_recipes(tmp_path, train_type, given, expected):
    args = TrainArguments(output_dir=str(tmp_path), train_type=train_type, **given)
    assert (args.projector_learning_rate, args.learning_rate) == pytest.approx(expected)
    assert args.vision_learning_rate == pytest.approx(given.get("vision_learning_rate", args.learning_rate / 10))


def test_packing_gives_the_loss_and_gradients_of_padding(processor, model):
    loss, grads = gradients(model, **LlavaCollator(processor)(list(ITEMS.values())))
    packed = LlavaCollator(processor, packing=True)(list(ITEMS.values()))
    assert packed["input_ids"].shape[0] == 1
    packed_loss, packed_grads = gradients(model, **packed)
    assert abs(loss - packed_loss) <= 1e-6 * loss
    for name, grad in grads.items():
        assert (packed_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-10, name


def test_packed_conversations_do_not_see_each_other(processor, model):
    collator = LlavaCollator(processor, packing=True)
    alone = model(**collator([ITEMS["text alone"]])).logits
    behind = model(**collator([ITEMS["several turns"], ITEMS["text alone"]])).logits[-len(alone) :]
    assert torch.allclose(alone, behind, atol=1e-6)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_packing_trains_to_the_same_losses(llava, corpus, tmp_path, monkeypatch, train_type):
    arguments = [*FAST, "--max_steps", "5", "--train_type", train_type, "--lora_dropout", "0"]
    padded = run_train(monkeypatch, llava, corpus, tmp_path / "padded", *arguments)
    packed = run_train(monkeypatch, llava, corpus, tmp_path / "packed", *arguments, "--packing", "true")
    assert packed == pytest.approx(padded, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_zero3_trains_to_the_same_losses_and_saves_one_whole_checkpoint(llava, corpus, tmp_path, train_type):
    arguments = [*FAST, "--train_type", train_type, "--max_steps", "5", "--lora_dropout", "0"]
    losses = {}
    for config in ("ds_zero2_no_offload.json", "ds_zero3.json"):
        output = tmp_path / config
        done = run_zero2(llava, corpus, output, *arguments, "--deepspeed", config)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[config] = logged(output)
    assert losses["ds_zero3.json"] == pytest.approx(losses["ds_zero2_no_offload.json"], abs=1e-5)
    if train_type == "lora":
        two, three = (load_file(tmp_path / config / "adapter_model.safetensors") for config in losses)
    else:  # the names in the file may differ; what is loaded from it must not
        two, three = (load_checkpoint(str(tmp_path / config))[0].state_dict() for config in losses)
    assert two.keys() == three.keys()
    assert all(torch.allclose(two[name], three[name], atol=1e-5) for name in two)


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one_do(llava, corpus, tmp_path):
    """Two launchers that know of each other by a host file alone, as on two machines without ssh between them."""
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=1\n")
    arguments = [*FAST, "--train_type", "projector", "--max_steps", "5"]
    command, environment = zero2_command(llava, corpus, tmp_path / "nodes", *arguments)
    environment |= {"HOSTFILE": str(tmp_path / "hosts"), "MASTER_ADDR": "127.0.0.1"}
    nodes = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment | {"NODE_RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    for node in nodes:
        output = node.communicate(timeout=240)[0].decode()
        assert node.returncode == 0, output[-3000:]
    done = run_zero2(llava, corpus, tmp_path / "ranks", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "nodes") == pytest.approx(logged(tmp_path / "ranks"), abs=1e-6)


def test_unused_layers_of_the_tower_are_not_run(model, processor, corpus):
    dataset = LlavaDataset(str(corpus))
    batch = LlavaCollator(processor)([dataset[i] for i in range(4)])
    before = model(**batch).loss
    set_trainable(model, "projector", LoraArguments())
    layers = model.model.vision_tower.encoder.layers
    run = []
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: run.append(i))
    assert torch.equal(model(**batch).loss, before)
    assert run == [0, 1]


TOWER = {"projector": "model.vision_tower", "lora": "base_model.model.model.vision_tower"}


@pytest.mark.parametrize("train_type", TOWER)
def test_activation_checkpointing_leaves_the_tower_and_the_losses_alone(
    llava, corpus, tmp_path, monkeypatch, train_type
):
    arguments = [*FAST, "--max_steps", "3", "--train_type", train_type, "--lora_dropout", "0"]
    plain = run_train(monkeypatch, llava, corpus, tmp_path / "plain", *arguments)
    trainers = []
    initialise = LlavaTrainer.__init__

    def remember(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        trainers.append(self)

    monkeypatch.setattr(LlavaTrainer, "__init__", remember)
    saved = run_train(monkeypatch, llava, corpus, tmp_path / "saved", *arguments, "--activation_checkpointing", "true")
    assert saved == pytest.approx(plain, abs=1e-6)
    flags = {
        name: module.gradient_checkpointing
        for name, module in trainers[0].model.named_modules()
        if "layers." in name and hasattr(module, "gradient_checkpointing")
    }
    assert {flag for name, flag in flags.items() if "language_model" in name} == {True}
    assert {flag for name, flag in flags.items() if "vision_tower" in name} == {False}
    features = trainers[0].model.get_submodule(TOWER[train_type])(torch.zeros(1, 3, 28, 28)).last_hidden_state
    assert not features.requires_grad
