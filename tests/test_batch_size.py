"""`auto` takes the largest batch that fits, and the total stays: the losses, the ranks and a resume do not notice."""

import platform
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from conftest import logged, run_train, run_zero2

from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.model import LoraArguments, load_checkpoint
from train_llava.train import TrainArguments
from train_llava.trainer import LlavaTrainer
from train_llava.training import batch_size, memory, preflight

RUN = ["--train_type", "full", "--learning_rate", "1e-3", "--max_steps", "3", "--global_batch_size", "8"]
AUTO = ["--per_device_train_batch_size", "auto"]


def arguments(tmp_path: Path, **given) -> TrainArguments:
    return TrainArguments(output_dir=str(tmp_path), report_to="none", **given)


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({"size": "auto"}, 1, "auto divides a total: set --global_batch_size"),
        ({"size": "auto", "total": 128}, 3, "--global_batch_size 128 cannot be .* batches of 1 on 3 ranks: take 126"),
        ({"size": 3, "total": 2}, 2, "--global_batch_size 2 cannot be .* batches of 3 on 2 ranks: take 6"),
        ({"size": 4, "total": 16, "steps": 2}, 1, "--gradient_accumulation_steps 2 follows from --global_batch_size"),
        ({"size": "auto", "total": 16, "steps": 2}, 1, "--gradient_accumulation_steps 2 follows from"),
    ],
)
def test_a_total_that_cannot_be_divided_is_refused(tmp_path, monkeypatch, given, ranks, message):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    names = {
        "size": "per_device_train_batch_size",
        "total": "global_batch_size",
        "steps": "gradient_accumulation_steps",
    }
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **{names[name]: value for name, value in given.items()})


@pytest.mark.parametrize(("size", "steps"), [(8, 4), (2, 16), (32, 1)])
def test_the_accumulation_follows_from_the_total(tmp_path, size, steps):
    args = arguments(tmp_path, per_device_train_batch_size=size, global_batch_size=32)
    assert (args.gradient_accumulation_steps, args.batches) == (steps, None)
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    assert args.gradient_accumulation_steps == steps


def test_the_batches_to_try_are_those_that_divide_a_ranks_share(tmp_path):
    total = {"per_device_train_batch_size": "auto", "global_batch_size": 12}
    sizes = (12, 6, 4, 3, 2, 1)
    assert arguments(tmp_path, **total).batches == [(n, recompute) for recompute in (False, True) for n in sizes]
    given = arguments(tmp_path, **total, activation_checkpointing=True)
    assert given.batches == [(n, True) for n in sizes]
    packed = arguments(tmp_path, **total, tokens_per_batch=100)
    assert packed.batches == [(1, False), (1, True)]
    assert packed.gradient_accumulation_steps == 12


def test_losses_and_recipe_are_those_of_the_same_total_by_hand(llava, corpus, tmp_path, monkeypatch, capsys):
    auto = run_train(monkeypatch, llava, corpus, tmp_path / "auto", *RUN, *AUTO)
    out = capsys.readouterr().out
    assert "batch: 8 x 1 accumulation steps x 1 ranks = 8, without activation checkpointing, for " in out
    by_hand = run_train(monkeypatch, llava, corpus, tmp_path / "hand", *RUN, "--per_device_train_batch_size", "2")
    assert auto == pytest.approx(by_hand, abs=1e-4)
    recipe = yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())
    chosen = {"per_device_train_batch_size": 8, "global_batch_size": 8, "activation_checkpointing": False}
    assert chosen.items() <= recipe.items()
    assert "gradient_accumulation_steps" not in recipe


def estimated(bytes_of, tried: list | None = None):
    """An estimate of `bytes_of(size, recompute)`, in place of the real one."""

    def estimate_memory(config, lora_arguments, args, *_):
        batch = args.per_device_train_batch_size, args.activation_checkpointing
        if tried is not None:
            tried.append(batch)
        return dict.fromkeys(memory.MODEL_STATES, 0) | {"activations": bytes_of(*batch)}, 0, "some tokens"

    return estimate_memory


@pytest.mark.parametrize(
    ("free", "chosen"),
    [(80, (8, False)), (79, (4, False)), (10, (1, False)), (9, (8, True)), (7, (4, True)), (0, (1, True))],
)
def test_the_largest_without_recomputation_that_fits_is_taken_otherwise_with_it(
    llava, corpus, tmp_path, monkeypatch, capsys, free, chosen
):
    monkeypatch.setattr(batch_size, "estimate_memory", estimated(lambda size, again: size * (1 if again else 10)))
    monkeypatch.setattr(batch_size, "SHARE", 1)
    gathered = {str: [platform.node()], float: [99, free]}  # of this rank, and of one with less
    monkeypatch.setattr(batch_size, "gather_object", lambda values: gathered[type(values[0])])
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *RUN, *AUTO, "--max_steps", "1")
    size, recompute = chosen
    how = "with" if recompute else "without"
    line = f"batch: {size} x {8 // size} accumulation steps x 1 ranks = 8, {how} activation checkpointing, for 0.0 GB"
    assert line in capsys.readouterr().out
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert args.batches[0] == chosen
    after = [(n, False) for n in (8, 4, 2, 1) if n < size and not recompute] + [(n, True) for n in (8, 4, 2, 1)]
    assert args.batches[1:] == [batch for batch in after if batch[0] <= size and batch != chosen]


@pytest.mark.parametrize(("packing", "multiple"), [(False, 1), (False, 64), (True, 1)])
def test_every_record_counts_as_the_longest_and_there_are_no_more_than_the_data_has(
    llava, corpus, tmp_path, monkeypatch, packing, multiple
):
    model, processor = load_checkpoint(str(llava), torch.float32)
    collator = LlavaCollator(processor, 100, packing, multiple=multiple)
    dataset = CheckedDataset(LlavaDataset(str(corpus)), collator.chat, tmp_path / "bad.jsonl")
    samples = [dataset[i] for i in range(16)]
    pictured = [len(sample.input_ids) for sample in samples if sample.images]
    (text,) = [len(sample.input_ids) for sample in samples if not sample.images]
    calls = []
    estimate = estimated(lambda *_: 1)
    monkeypatch.setattr(batch_size, "estimate_memory", lambda *given: calls.append(given) or estimate(*given))
    args = arguments(tmp_path, per_device_train_batch_size="auto", global_batch_size=64)
    batch_size.choose_batch(args, model, LoraArguments(), None, dataset, collator)
    assert args.per_device_train_batch_size == 16  # records of the corpus
    tokens, texts = max(text + 16, *pictured), max(text, max(pictured) - 16)
    assert calls[0][4:] == (packing, None, [-(-tokens // multiple) * multiple, 16, texts])
    stream = arguments(tmp_path, per_device_train_batch_size="auto", global_batch_size=64)
    batch_size.choose_batch(stream, model, LoraArguments(), None, None, collator)
    assert calls[-1][6][1:] == [100, 100]
    assert stream.per_device_train_batch_size == 64


def test_a_model_without_an_estimate_takes_one_record_with_recomputation(llava, corpus, tmp_path, monkeypatch, capsys):
    for module in (batch_size, memory):
        monkeypatch.setattr(module, "estimate_memory", lambda *_: 1 / 0)
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *RUN, *AUTO, "--max_steps", "1")
    out = capsys.readouterr().out
    assert "memory: no estimate for a qwen2 (division by zero)\nbatch: 1 x 8 accumulation steps" in out


def test_the_preflight_goes_down_to_a_batch_that_fits(llava, corpus, tmp_path, monkeypatch, capsys):
    by_hand = run_train(monkeypatch, llava, corpus, tmp_path / "hand", *RUN, "--per_device_train_batch_size", "2")
    compute_loss, rows = LlavaTrainer.compute_loss, []

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def compute_or_fail(self, model, inputs, *args, **kwargs):
        rows.append(len(inputs["input_ids"]))
        loss = compute_loss(self, model, inputs, *args, **kwargs)
        if rows[-1] > 2 or not model.get_decoder().is_activation_checkpointing:
            loss.register_hook(fail)  # called in the backward pass
        return loss

    monkeypatch.setattr(LlavaTrainer, "compute_loss", compute_or_fail)
    capsys.readouterr()
    losses = run_train(monkeypatch, llava, corpus, tmp_path / "auto", *RUN, *AUTO)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("batch:")]
    tried = [(8, "without"), (4, "without"), (2, "without"), (1, "without"), (8, "with"), (4, "with"), (2, "with")]
    assert lines[1:] == [
        f"batch: {size} x {8 // size} accumulation steps x 1 ranks = 8, {how} activation checkpointing, "
        f"since {before} do not fit"
        for (before, _), (size, how) in pairwise(tried)
    ]
    assert rows == [size for size, _ in tried] + [2] * 3 + [2] * 4 * 3  # three to tell the time, then three steps
    assert losses == pytest.approx(by_hand, abs=1e-4)
    recipe = yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())
    assert (recipe["per_device_train_batch_size"], recipe["activation_checkpointing"]) == (2, True)


@pytest.mark.parametrize("batch", ["1", "auto"])
def test_out_of_memory_ends_a_run_without_a_smaller_batch(llava, corpus, tmp_path, monkeypatch, batch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LlavaTrainer, "compute_loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run_train(monkeypatch, llava, corpus, tmp_path / batch, *RUN, "--per_device_train_batch_size", batch)


def test_a_batch_whose_optimizer_would_not_fit_is_made_smaller(llava, corpus, tmp_path, monkeypatch, capsys):
    """By the memory that the trial measured, which has no optimizer yet."""
    card = type("Card", (), {"total_memory": 10**12})
    monkeypatch.setattr(preflight, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    run_train(monkeypatch, llava, corpus, tmp_path / "roomy", *RUN, *AUTO, "--max_steps", "1")
    assert "do not fit" not in capsys.readouterr().out
    card.total_memory = 50
    run_train(monkeypatch, llava, corpus, tmp_path / "tight", *RUN, *AUTO, "--max_steps", "1")
    assert "batch: 1 x 8 accumulation steps x 1 ranks = 8, with activation" in capsys.readouterr().out


def test_a_resume_goes_on_with_another_batch_of_the_same_total(llava, corpus, tmp_path, monkeypatch, capsys):
    """As on another card."""
    run = [*RUN, *AUTO, "--max_steps", "4", "--save_steps", "2"]
    whole = run_train(monkeypatch, llava, corpus, tmp_path / "run", *run)
    for name in ("model.safetensors", "trainer_state.json"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resume = ["--resume_from_checkpoint", "true"]
    with pytest.raises(ValueError, match=r"accumulation_steps 4: .* was trained with 8, which a resume cannot change"):
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *run, *resume, "--global_batch_size", "4")
    monkeypatch.setattr(batch_size, "estimate_memory", estimated(lambda size, _: size * 10**15 - 2.5 * 10**15))
    again = run_train(monkeypatch, llava, corpus, tmp_path / "run", *run, *resume)
    assert "batch: 2 x 4 accumulation steps" in capsys.readouterr().out
    assert again == pytest.approx(whole, abs=1e-4)


def test_a_resume_keeps_a_batch_that_the_order_depends_on(llava, corpus, tmp_path, monkeypatch):
    run = [*RUN, "--dataloader_drop_last", "true", "--save_steps", "2", "--max_steps"]
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *run, "2", *AUTO)
    resumed = ["3", "--resume_from_checkpoint", "true", AUTO[0]]
    for batch in ("4", "auto"):
        with pytest.raises(ValueError, match=f"batch_size {batch}: .* was trained with 8, which a resume cannot"):
            run_train(monkeypatch, llava, corpus, tmp_path / "run", *run, *resumed, batch)
    assert len(run_train(monkeypatch, llava, corpus, tmp_path / "run", *run, *resumed, "8")) == 3


@pytest.mark.slow
def test_two_zero2_ranks_choose_the_same_and_keep_the_losses(llava, corpus, tmp_path):
    losses = {}
    for batch in ("auto", "2"):
        done = run_zero2(llava, corpus, tmp_path / batch, *RUN, "--per_device_train_batch_size", batch)
        assert done.returncode == 0, done.stderr[-3000:]
        losses[batch] = logged(tmp_path / batch)
        if batch == "auto":
            assert "batch: 4 x 1 accumulation steps x 2 ranks = 8, without activation" in done.stdout
    assert losses["auto"] == pytest.approx(losses["2"], abs=1e-4)
