"""Each check of an assembled model can fail, and says what failed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from train_llava.chat import IGNORE, Chat
from train_llava.model import load_checkpoint
from train_llava.modeling import verification


class FaultyChat:
    """A `Chat` whose labels or prompts go through a function first."""

    def __init__(
        self,
        chat: Chat,
        labels: Callable[[np.ndarray, np.ndarray], np.ndarray] = lambda ids, labels: labels,
        prompt: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids,
    ):
        self.chat, self.labels, self.prompt = chat, labels, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chat, name)

    def encode(self, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        input_ids, labels = self.chat.encode(*args)
        return input_ids, self.labels(input_ids, labels.copy())

    def prompts(self, *args: Any) -> dict[str, Any]:
        batch = self.chat.prompts(*args)
        return {"input_ids": self.prompt(batch["input_ids"])}


def without_last(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    last = np.flatnonzero(labels != IGNORE)[-1]
    return np.where(np.arange(len(labels)) == last, IGNORE, labels)


def first_answer_alone(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    supervised = np.flatnonzero(labels != IGNORE)
    breaks = np.flatnonzero(np.diff(supervised) > 1)
    if len(breaks):
        labels[supervised[breaks[0] + 1] :] = IGNORE
    return labels


MISTAKES = {
    "everything is supervised": ({"labels": lambda ids, labels: ids}, "is learnt as the answer 'A red square.'"),
    "an answer without its end": ({"labels": without_last}, "is learnt as the answer 'A red square.'"),
    "one answer of two": ({"labels": first_answer_alone}, "^1 stretches are learnt of a conversation with 2 answers"),
    "a prompt with a token less": ({"prompt": lambda ids: ids[:, :-1]}, "^generation begins from"),
    "a prompt with a token more": (
        {"prompt": lambda ids: ids[:, [0, *range(ids.shape[1])]]},
        "^generation begins from",
    ),
}


@pytest.fixture(scope="module")
def opened(llava):
    return load_checkpoint(str(llava))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_labels_or_prompts_is_found(opened, name):
    model, processor = opened
    mistake, message = MISTAKES[name]
    verification.verify_conversations(FaultyChat(Chat(processor)), model.generation_config)
    with pytest.raises(ValueError, match=message):
        verification.verify_conversations(FaultyChat(Chat(processor), **mistake), model.generation_config)


@pytest.mark.parametrize("stops", [0, [0, 1], None])
def test_generation_has_to_stop_where_answers_end(opened, stops):
    with pytest.raises(ValueError, match=r"answers are taught to end with <\|im_end\|>, and generation does not stop"):
        verification.verify_conversations(Chat(opened[1]), GenerationConfig(eos_token_id=stops))
