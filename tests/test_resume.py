"""A resume honours an argument or refuses it, a run that is complete is left as it is, and a folder has one run."""

import fnmatch
import json
import math
import multiprocessing
import shutil
import time
from dataclasses import fields
from multiprocessing.synchronize import Event
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
from conftest import logged, run_train, run_zero2
from test_trainer import FAST
from transformers import TrainerState

from train_llava.model import LoraArguments
from train_llava.train import DataArguments, ModelArguments, TrainArguments
from train_llava.trainer import LlavaTrainer
from train_llava.training import resume
from train_llava.training.checkpointing import LOCK, locked
from train_llava.training.stopping import stopped_early

TRAIN = (ModelArguments, LoraArguments, DataArguments, TrainArguments)
RUN = [*FAST, "--train_type", "full", "--max_steps", "4", "--save_steps", "2"]


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "metric_for_best_model": "loss"}


def settings(tmp_path: Path, **given) -> dict:
    args = TrainArguments(output_dir=str(tmp_path), **given)
    return resume.settings_of(ModelArguments("m"), LoraArguments(), DataArguments(["d"]), args)


def checkpoint_of(tmp_path: Path, earlier: dict) -> str:
    """A folder that tells the settings of its run, at step 2."""
    (tmp_path / "trainer_state.json").write_text('{"global_step": 2}')
    resume.write_settings(str(tmp_path), earlier, [])
    return str(tmp_path)


@pytest.mark.parametrize("place", [Path, PurePosixPath])
def test_a_stream_is_known_by_its_files(tmp_path, monkeypatch, place):
    """Files on this disk have a size, and files on the hub a commit in their name."""
    found = {}
    for name, content in (("a", b"123"), ("b", b"123"), ("c", b"1234")):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(resume, "find_records", lambda *_, name=name, **__: ([place(tmp_path / name)], None))
        found[name] = resume.data_fingerprint(None, ["me/data"], None)
        assert found[name].startswith("1 files, fingerprint ")
        assert found[name] == resume.data_fingerprint(None, ["me/data"], None)
    assert len(set(found.values())) == 3


def test_every_argument_is_honoured_or_free_or_refused(tmp_path):
    """What no list names is refused, and so is an argument that is to come."""
    names = {field.name for arguments in TRAIN for field in fields(arguments)}
    free = {name for pattern in resume.FREE for name in fnmatch.filter(names, pattern)}
    assert all(fnmatch.filter(names, pattern) for pattern in resume.FREE)
    assert names >= resume.HONOURED | resume.SCORE
    assert not (resume.HONOURED | resume.SCORE) & free
    earlier, args = settings(tmp_path), TrainArguments(output_dir=str(tmp_path))
    earlier |= {"model_name_or_path": "a", "data_path": "b", "to_come": 1}
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"}
    assert {name.split()[0] for name in earlier} == (names - free - batch) | {
        "per_device_train_batch_size",
        "to_come",
    }
    checkpoint = checkpoint_of(tmp_path, earlier)
    assert resume.compare(checkpoint, earlier, args) == []
    refused = set()
    for name, value in earlier.items():
        try:
            changes = resume.compare(checkpoint, earlier | {name: "other"}, args)
        except ValueError as error:
            assert str(error).startswith(f"--{name} other: {tmp_path} was trained with ")  # noqa: PT017
            refused.add(name)
        else:
            assert changes == ([] if name in resume.SCORE else [f"{name} {value} → other from step 2"])
    assert refused == earlier.keys() - resume.HONOURED - resume.SCORE
    assert refused > {
        "seed", "data_seed", "data_path", "data_weights", "packing", "tokens_per_batch", "max_length", "bits", "bf16",
        "train_sampling_strategy", "lora_r", "lora_alpha", "use_rslora", "use_dora", "optim", "train_type",
        "deepspeed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("earlier", "now", "message"),
    [
        ({"seed": 1}, {"seed": 2}, "--seed 2: .* was trained with 1,"),
        ({"gradient_accumulation_steps": 2}, {}, "--gradient_accumulation_steps 8 x 1: .* with 8 x 2,"),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, {}, None),  # as many records a step
        ({"metric_for_best_model": "loss"}, {"metric_for_best_model": "eval_bleu"}, "eval_bleu: .* with loss,"),
        ({}, {"early_stopping_patience": 2}, None),
        ({"learning_rate": 1e-3}, {"learning_rate": 1e-4}, None),
        (PLATEAU | {"learning_rate": 1e-3}, PLATEAU | {"learning_rate": 1e-4}, "--learning_rate 0.0001: "),
        (
            {"projector_learning_rate": 1e-5},
            {"projector_learning_rate": 0.0},
            "--projector_learning_rate 0.0: .* 1e-05,",
        ),
        ({"vision_learning_rate": 0.0}, {"vision_learning_rate": 1e-5}, "--vision_learning_rate 1e-05: .* 0.0,"),
        ({"lr_scheduler_kwargs": {"a": 1}, "hub_token": "secret"}, {"lr_scheduler_kwargs": {"a": 2}}, None),
        ({"max_steps": 8}, {"max_steps": 2}, None),
        (
            {"weight_decay": 0.1, "max_steps": 8},
            {"max_steps": 2},
            "--weight_decay 0.0: .* with 0.1,",
        ),  # it is complete
    ],
)
def test_both_values_of_what_cannot_change_are_named(tmp_path, earlier, now, message):
    checkpoint, args = checkpoint_of(tmp_path, settings(tmp_path, **earlier)), TrainArguments(str(tmp_path), **now)
    assert "secret" not in (tmp_path / resume.SETTINGS).read_text()
    if message is None:
        resume.compare(checkpoint, settings(tmp_path, **now), args)
    else:
        with pytest.raises(ValueError, match=message):
            resume.compare(checkpoint, settings(tmp_path, **now), args)


@pytest.fixture(scope="module")
def finished(llava, corpus, tmp_path_factory):
    """A run of four steps, with checkpoints at two and four."""
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, llava, corpus, tmp_path_factory.mktemp("finished") / "run", *RUN)
    return tmp_path_factory.getbasetemp() / "finished0" / "run"


def halfway(finished: Path, folder: Path) -> Path:
    """That run as a kill after its first checkpoint leaves it."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoint-4", "model*", "trainer_state.json"))
    shutil.copytree(finished / "checkpoint-2", folder / "checkpoint-2", dirs_exist_ok=True)
    return folder


def test_changed_rates_decay_and_schedule_are_in_force(llava, corpus, finished, tmp_path, monkeypatch):
    """For every group of parameters, from the first step on; and the card and the log say so."""
    groups, step = [], LlavaTrainer.training_step

    def training_step(self, *args, **kwargs):
        groups.append([(group["lr"], group["weight_decay"], group["betas"]) for group in self.optimizer.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(LlavaTrainer, "training_step", training_step)
    changed = ["--learning_rate", "4e-3", "--projector_learning_rate", "1e-2", "--vision_learning_rate", "2e-3"]
    changed += ["--weight_decay", "0.1", "--adam_beta1", "0.8", "--lr_scheduler_type", "linear", "--warmup_steps", "0"]
    changed += ["--max_steps", "5", "--logging_steps", "1", "--save_steps", "3", "--resume_from_checkpoint", "true"]
    run = halfway(finished, tmp_path / "run")
    run_train(monkeypatch, llava, corpus, run, *RUN, *changed)
    rates = [rate for rate in (4e-3, 1e-2, 2e-3) for _ in range(2)]  # with weight decay, and without
    for number, rows in enumerate(groups, 2):
        assert [rate for rate, *_ in rows] == pytest.approx([rate * (5 - number) / 5 for rate in rates])
        assert [decay for _, decay, _ in rows] == [0.1, 0.0] * 3
        assert {betas for *_, betas in rows} == {(0.8, 0.999)}
    assert logged(run, "learning_rate")[2:] == pytest.approx([4e-3 * (5 - n) / 5 for n in (2, 3, 4)])
    assert {folder.name for folder in run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3", "checkpoint-5"}
    assert "learning_rate 0.001 → 0.004 from step 2; " in (run / "README.md").read_text()
    assert json.loads((run / "checkpoint-5" / "resume.json").read_text())["settings"]["adam_beta1"] == 0.8


@pytest.mark.slow
def test_changed_rates_are_in_force_under_deepspeed(llava, corpus, tmp_path):
    done = run_zero2(llava, corpus, tmp_path / "run", *RUN)
    assert done.returncode == 0, done.stderr[-3000:]
    changed = ["--learning_rate", "4e-3", "--lr_scheduler_type", "linear", "--warmup_steps", "0", "--max_steps", "6"]
    done = run_zero2(llava, corpus, tmp_path / "run", *RUN, *changed, "--resume_from_checkpoint", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "run", "learning_rate")[4:] == pytest.approx([4e-3 * (6 - n) / 6 for n in (4, 5)])
    done = run_zero2(
        llava, corpus, tmp_path / "run", *RUN, *changed, "--resume_from_checkpoint", "true", "--seed", "7"
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (1, 1)
    assert lines[0].startswith("error: --seed 7: ")
    assert "was trained with 42, " in lines[0]


@pytest.mark.parametrize("change", ["removed", "order", "text", "model"])
def test_other_data_and_another_model_are_refused(llava, corpus, finished, tmp_path, monkeypatch, request, change):
    model, records = llava, json.loads((corpus / "chat.json").read_text())
    if change == "model":
        model = request.getfixturevalue("merged")
    elif change == "removed":
        records.pop(3)
    elif change == "order":
        records.reverse()
    else:
        records[5]["conversations"][1]["value"] = "a blue square"
    (tmp_path / "chat.json").write_text(json.dumps(records, ensure_ascii=False))
    run = halfway(finished, tmp_path / "run")
    before = sorted(path for path in run.rglob("*"))
    message = (
        f"--model_name_or_path {model}, .* with {llava}, "
        if change == "model"
        else (f"--data_path {len(records)} records, fingerprint .* was trained with 16 records, fingerprint ")
    )
    with pytest.raises(ValueError, match=message):
        run_train(
            monkeypatch, model, tmp_path, run, *RUN, "--image_dir", corpus / "images_dl",
            "--resume_from_checkpoint", "true",
        )  # fmt: skip
    assert sorted(path for path in run.rglob("*")) == before


def test_the_same_data_elsewhere_and_in_smaller_batches_goes_on(
    llava, corpus, finished, tmp_path, monkeypatch, capsys
):
    """And without the settings, of an earlier version's run, with a line."""
    shutil.copytree(corpus, tmp_path / "data")
    run = halfway(finished, tmp_path / "run")
    smaller = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    smaller += ["--resume_from_checkpoint", "true"]
    again = run_train(monkeypatch, llava, tmp_path / "data", run, *RUN, *smaller)
    assert again == pytest.approx(logged(finished), abs=1e-4)
    assert "does not tell" not in capsys.readouterr().out
    run = halfway(finished, tmp_path / "old")
    (run / "checkpoint-2" / "resume.json").unlink()
    assert run_train(monkeypatch, llava, corpus, run, *RUN, "--resume_from_checkpoint", "true") == logged(finished)
    assert "checkpoint-2 does not tell its run's settings" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["nothing", "the final model"])
def test_a_complete_run_is_left_as_it_is(llava, corpus, finished, tmp_path, monkeypatch, capsys, missing):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    weights = (run / "model.safetensors").read_bytes()
    if missing != "nothing":  # as a kill between the last checkpoint and the model leaves it
        (run / "trainer_state.json").unlink()
        (run / "model.safetensors").write_bytes(weights[:100])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    losses = run_train(monkeypatch, llava, corpus, run, *RUN, "--resume_from_checkpoint", "true")
    assert losses == logged(finished)
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 4
    assert (run / "model.safetensors").read_bytes() == weights
    if missing == "nothing":
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
        assert capsys.readouterr().out.startswith("done: 4 of 4 steps; the model is in ")
        with pytest.raises(ValueError, match=r"--seed 3: .* was trained with 42, "):
            run_train(monkeypatch, llava, corpus, run, *RUN, "--resume_from_checkpoint", "true", "--seed", "3")
        more = ["--max_steps", "5", "--resume_from_checkpoint", str(run / "checkpoint-4")]
        assert len(run_train(monkeypatch, llava, corpus, run, *RUN, *more)) == 5


@pytest.mark.parametrize(
    ("scores", "greater", "patience", "stops"),
    [
        ([3, 2, 1], False, 1, False),
        ([3, 2, 2], False, 1, True),
        ([3, 2, 4, 5], False, 2, True),
        ([3, 2, 4, 5], False, 3, False),
        ([3, 2, 4, 1], False, 2, False),
        ([1, 2, 3], True, 1, False),
        ([2, 1], True, 1, True),
        ([math.nan, 2], False, 1, False),
        ([2, math.nan], False, 1, True),
        ([math.nan, math.nan], True, 1, True),
        ([], False, 1, False),
        ([2, 2, 2], False, None, False),
    ],
)
def test_early_stopping_counts_the_evaluations_since_the_best(scores, greater, patience, stops):
    log = [
        entry for i, score in enumerate(scores) for entry in ({"step": i, "loss": 1}, {"step": i, "eval_loss": score})
    ]
    args = SimpleNamespace(early_stopping_patience=patience, metric_for_best_model="loss", greater_is_better=greater)
    again = log[-1:]  # an evaluation at the start of a resumed run repeats the last one
    for history in (log, log + again):
        assert stopped_early(args, TrainerState(log_history=history)) is stops


@pytest.mark.parametrize("more", [[], ["--restore_callback_states_from_checkpoint", "true"]])
def test_a_resumed_run_stops_early_where_an_unbroken_one_does(llava, corpus, tmp_path, monkeypatch, capsys, more):
    """Its loss only rises: the first evaluation stays the best."""
    arguments = [*RUN, "--max_steps", "9", "--save_steps", "1", "--eval_data_path", corpus, "--eval_answers", "0"]
    arguments += ["--eval_strategy", "steps", "--eval_steps", "1", "--early_stopping_patience", "3", *more]
    arguments += ["--learning_rate", "1e-20", "--preflight", "false", "--resume_from_checkpoint", "true"]
    run = tmp_path / "run"
    whole = run_train(monkeypatch, llava, corpus, run, *arguments)
    assert len(whole) == 4
    capsys.readouterr()
    assert run_train(monkeypatch, llava, corpus, run, *arguments) == whole
    assert capsys.readouterr().out.startswith("done: 4 of 9 steps, stopped early; ")
    for file in ("checkpoint-3", "checkpoint-4"):
        shutil.rmtree(run / file)
    (run / "trainer_state.json").unlink()
    assert run_train(monkeypatch, llava, corpus, run, *arguments) == whole
    assert (run / "model.safetensors").exists()


def hold(args: SimpleNamespace, begun: Event) -> None:
    with locked(args):
        begun.set()
        time.sleep(600)


def test_a_folder_has_one_run_until_that_ends_or_dies(llava, corpus, tmp_path, monkeypatch):
    args = SimpleNamespace(output_dir=str(tmp_path / "run"), process_index=0, world_size=1)
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    holder = fork.Process(target=hold, args=(args, begun))
    holder.start()
    begun.wait()
    with pytest.raises(
        ValueError, match=rf"^--output_dir {tmp_path}/run: .* at work in it \(process {holder.pid} on "
    ):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *RUN)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    holder.kill()
    holder.join()
    with locked(args):
        assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / LOCK]
    assert list((tmp_path / "run").iterdir()) == []
    with (
        pytest.raises(ValueError, match="no model"),
        locked(SimpleNamespace(**vars(args) | {"output_dir": tmp_path / "new"})),
    ):
        raise ValueError("no model")
    assert not (tmp_path / "new").exists()
