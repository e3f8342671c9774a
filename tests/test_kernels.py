"""What a step asks of a GPU: the counts of the committed table; and what spares waits changes no number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_anyres import ITEMS as ANYRES_ITEMS
from test_anyres import anyres  # noqa: F401, a fixture
from test_data import ITEMS, gradients

from train_llava.data import LlavaCollator, to_sample
from train_llava.model import load_checkpoint
from train_llava.training.extras import with_extras
from train_llava.training.waits import check_losses, check_on_device, keep_positions

ROOT = Path(__file__).parent.parent


def rows_of(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return {name: cells for name, *cells in lines if not name.startswith("---")}


@pytest.mark.slow
def test_a_step_asks_no_more_of_a_gpu_than_the_committed_table():
    """Half a percent of the kernels is less than one kernel a layer."""
    command = [sys.executable, "benchmarks/kernels.py"]
    environment = os.environ | {"PYTHONPATH": "."}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    counted, committed = rows_of(done.stdout), rows_of((ROOT / "benchmarks/results/kernels.md").read_text())
    assert counted.keys() == committed.keys()
    assert counted.pop("run") == committed.pop("run")
    for name, cells in committed.items():
        assert counted[name][3:] == cells[3:], name  # waits, new shapes, graphs, breaks
        ours, theirs = ([int(cell.replace(",", "") or 0) for cell in row[:3]] for row in (counted[name], cells))
        assert ours == pytest.approx(theirs, rel=0.005), name


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("folder", ["llava", "anyres"])
def test_loss_and_gradients_are_those_of_the_model_alone(request, folder, packing):
    """To the last bit: positions in place of a mask, and the device's own check of the image tokens."""
    model, processor = load_checkpoint(str(request.getfixturevalue(folder)))
    collator = LlavaCollator(processor, packing=packing)
    items = ITEMS.values() if folder == "llava" else ANYRES_ITEMS
    batch = with_extras([to_sample(item, collator.chat) for item in items], collator)
    positions = batch.pop("extras")["positions"]
    loss, grads = gradients(model, **batch)
    check_on_device(model)
    del batch["logits_to_keep"]
    with keep_positions(model, positions):
        ours, our_grads = gradients(model, **batch)
    assert ours.equal(loss)
    assert our_grads.keys() == grads.keys()
    assert all(our_grads[name].equal(grad) for name, grad in grads.items())


def test_the_device_finds_a_picture_without_its_tokens(model, processor):
    check_on_device(model)
    batch = LlavaCollator(processor)([ITEMS["one turn"]])
    with pytest.raises(RuntimeError, match="image features and image tokens do not match"):
        model(**batch | {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})


def test_a_loss_is_named_with_the_records_of_its_batch():
    losses = [(["a", "b"], torch.tensor(1.5)), (["c"], torch.tensor(torch.inf))]
    with pytest.raises(ValueError, match=r"^step 7: the loss is inf at the records 'c'$"):
        check_losses(losses, 7)
    check_losses(finite := losses[:1], 7)
    assert finite == []
