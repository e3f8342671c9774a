"""What a step takes of a GPU, computed on the meta device, against the same steps computed with numbers."""

import pytest
import torch

from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.memory import SavedTensors, empty_model, step_bytes
from train_llava.model import TRAIN_TYPES, LoraArguments, load_checkpoint, set_trainable

LORA = LoraArguments(lora_r=4, lora_dropout=0.0)


def real_step(folder, corpus, train_type, recompute=False, backward=False, picked=range(2, 6)):
    model, processor = load_checkpoint(str(folder), torch.float32)
    language_model = model.model.language_model
    batch = LlavaCollator(processor)([LlavaDataset(str(corpus))[i] for i in picked])
    model = set_trainable(model, train_type, LORA).train()
    language_model.config.use_cache = False
    if recompute:
        language_model.activation_checkpointing_enable()
    with SavedTensors(model) as saved:
        model(**batch, num_items_in_batch=4)
    rows, tokens = batch["input_ids"].shape
    return saved.nbytes, (rows, tokens, len(batch["pixel_values"]), len(batch["shift_labels"])), model.config


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_activations_are_those_of_a_step_with_numbers(llava, corpus, train_type, recompute):
    counted, shape, config = real_step(llava, corpus, train_type, recompute)
    empty, _ = empty_model(config, train_type, LORA, torch.float32)
    if recompute:
        empty.model.language_model.activation_checkpointing_enable()
    print(step_bytes(empty, *shape), counted)
    assert step_bytes(empty, *shape)[0] == counted
