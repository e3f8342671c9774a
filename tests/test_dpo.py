"""TRL trains a checkpoint of this repo, as it is, by preferences, and writes one that opens like any other."""

import pytest
import torch

from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.model import load_checkpoint

pytest.importorskip("trl", reason="TRL is not installed: benchmarks/requirements.txt")

from benchmarks.dpo import preferences, train


def test_preferences_grow_and_the_checkpoint_opens(llava, corpus, tmp_path):
    model, processor = load_checkpoint(str(llava))
    dataset = LlavaDataset(str(corpus))
    items = [dataset[i] for i in range(len(dataset)) if i != 5]  # all but the one without a picture
    pairs = preferences(items)
    assert len(pairs) == len(items)
    for item, row in zip(items, pairs, strict=True):
        assert row["chosen"][0]["content"][0]["text"] == item["messages"][-1]["content"][0]["text"]
        assert row["rejected"] != row["chosen"]
        # what TRL's template makes of the row is the prompt of training
        asked = Chat(processor).prompts([item["messages"][:-1]], item["images"])["input_ids"]
        prompt = processor.apply_chat_template(row["prompt"], add_generation_prompt=True)
        theirs = processor(text=prompt, images=row["images"], add_special_tokens=False, return_tensors="pt")
        assert torch.equal(asked, theirs["input_ids"])

    logged = train(model, processor, pairs, str(tmp_path / "dpo"), 2e-2, 40)
    assert len(logged) == 40
    assert logged[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # log 2: nothing is preferred yet
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert sum(entry["rewards/margins"] for entry in logged[-10:]) / 10 > 0.5
    assert sum(entry["loss"] for entry in logged[-10:]) / 10 < 0.6
    before, after = load_checkpoint(str(llava))[0].state_dict(), load_checkpoint(str(tmp_path / "dpo"))[0].state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any("vision_tower" in name for name in moved)
