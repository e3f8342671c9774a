"""Time, energy and price before the first step, by a clock that only records and steps move on."""

import re

import numpy as np
import pytest
import torch
from conftest import run_train

from train_llava import data
from train_llava.data import CheckedDataset, LlavaDataset
from train_llava.dataset.lengths import count_tokens
from train_llava.training import preflight, throughput

RUN = ["--train_type", "projector", "--max_steps", "1", "--save_strategy", "no"]


@pytest.fixture
def timed(llava, corpus, tmp_path, monkeypatch, capsys):
    """Runs training in which a record takes `record` seconds and a step `step`; returns what is printed and timed."""

    def timed(record: float, step: float, *arguments: str) -> tuple[str, int, np.ndarray]:
        clock, tokens, try_step, read, counts = [0.0], [], preflight._try_step, LlavaDataset.read, []

        def now() -> float:
            clock[0] += 1e-9  # or the matmul peak would be infinite
            return clock[0]

        def reading(self, index, decode):
            clock[0] += record * decode
            return read(self, index, decode)

        def stepping(trainer, batch):
            clock[0] += step
            tokens.append(batch["extras"]["tokens"])
            return try_step(trainer, batch)

        def counting(trainer):
            dataset = trainer.train_dataset
            if isinstance(dataset, CheckedDataset):
                counts.append(count_tokens(dataset.records, dataset.chat)[:, 0])
            return cost(trainer)

        cost = preflight.print_cost
        monkeypatch.setattr(throughput, "perf_counter", now)
        monkeypatch.setattr(data.LlavaDataset, "read", reading)
        monkeypatch.setattr(preflight, "_try_step", stepping)
        monkeypatch.setattr(preflight, "print_cost", counting)
        run_train(monkeypatch, llava, corpus, tmp_path / "run", *RUN, *arguments)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time:")]
        assert len(tokens) == 4  # the longest batch, one to warm up, two that are timed
        return line, sum(tokens[2:]), counts[0] if counts else None

    return timed


def test_all_tokens_take_as_long_as_those_of_two_steps(timed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 300_000, raising=False)  # milliwatts
    words = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--max_steps", "-1"]
    line, tokens, counts = timed(100, 1000, *words, "--num_train_epochs", "3", "--price_per_hour", "2.5")
    total = 3 * counts.sum()
    hours = total / tokens * 2 * (4 * 100 + 1000) / 3600
    assert line.startswith(f"time: about {hours:.1f} h ({total / 1e6:.3g} M tokens, ")
    assert re.search(r"M tokens, [\d.e-]+ GFLOP each, at the \d+% that two steps reached\), ", line)
    energy, price = map(float, re.search(r", ([\d.]+) kWh, ([\d.]+) at --price_per_hour 2.5$", line).groups())
    assert (energy, price) == pytest.approx((0.3 * hours, 2.5 * hours), rel=0.05)


@pytest.mark.parametrize(("record", "slower"), [(100, 1000), (1000, 2000)])
def test_workers_open_records_during_the_steps(timed, record, slower):
    """Two workers open four records in 200 or 2,000 seconds; a step takes 1,000."""
    words = ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "2", "--max_steps", "6"]
    line, tokens, counts = timed(record, 1000, *words)
    total = 6 * 4 * counts.mean()
    hours = total / tokens * 2 * slower / 3600
    assert line.startswith(f"time: about {hours:.1f} h ({total / 1e6:.3g} M tokens")
    assert "kWh" not in line
    assert "price" not in line


def test_a_packed_run_counts_its_rows(timed):
    line, tokens, _ = timed(0, 60, "--packing", "true", "--tokens_per_batch", "200", "--max_steps", "3")
    minutes, total = map(float, re.match(r"time: about ([\d.]+) min \(([\d.e-]+) M tokens", line).groups())
    assert minutes == pytest.approx(total * 1e6 / tokens * 2, abs=0.06)  # a step takes a minute
    assert 3 * 100 < total * 1e6 <= 3 * 200


def test_a_stream_takes_the_tokens_of_the_two_steps(timed):
    line, tokens, _ = timed(0, 60, "--streaming", "true", "--max_steps", "5", "--per_device_train_batch_size", "2")
    assert line.startswith(f"time: about 5.0 min ({5 * tokens / 2 / 1e6:.3g} M tokens")
