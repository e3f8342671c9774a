"""Questions a second: batches in the order of the questions beside `generate_all`, on a model of the toy example.

    PYTHONPATH=. python benchmarks/answers.py > benchmarks/results/answers.md

Twice the same held-out questions, after `bash run_zero2.sh`: as the model answers them, in a few words, and at lengths
as a mixed set asks for, a word from most and a paragraph from some. These are made: an answer ends where its question
says, and not before; padding has to be token 0. Processor time of one thread, in alternating rounds of one run.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm
from transformers import LogitsProcessor

from train_llava.chat import Chat
from train_llava.cli import BATCH, NEW_TOKENS
from train_llava.data import LlavaDataset
from train_llava.evaluation.answers import questions
from train_llava.evaluation.generation import WINDOW, generate, generate_all, prepare
from train_llava.modeling.adapter import load_model

LENGTHS = [1, 2, 3, 5, 8, 20, 60, 120]  # tokens, one of them for each question


class EndsAt(LogitsProcessor):
    """Ends each answer at one of `LENGTHS`, which its prompt decides, and not before."""

    def __init__(self, ends: list[int], end_of_turn: int, opening: int):
        self.ends, self.end_of_turn, self.opening = ends, end_of_turn, opening

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(B, V)` of the next token; behind the last end of a turn stand `opening` tokens, then the answer."""
        scores = scores.clone()
        scores[:, self.ends] = -torch.inf
        for row, ids in enumerate(input_ids):
            prompt = int((ids == self.end_of_turn).nonzero()[-1]) + 1
            if len(ids) - prompt - self.opening >= LENGTHS[int(ids[:prompt].sum()) % len(LENGTHS)]:
                scores[row] = -torch.inf
                scores[row, self.end_of_turn] = 0
        return scores


def compare(
    name: str, in_order: Callable[[], list[str]], together: Callable[[], list[str]], number: int, rounds: int
) -> str:
    """A row of the table: questions a second both ways, their ratio, and how many answers are the same."""
    before, now = [], []
    for _ in tqdm(range(rounds), desc=name):
        start = time.process_time()
        first = in_order()
        middle = time.process_time()
        second = together()
        before.append(middle - start)
        now.append(time.process_time() - middle)
    rates = [
        f"{number / statistics.median(v):.1f} ({number / max(v):.1f}-{number / min(v):.1f})" for v in (before, now)
    ]
    ratios = [b / n for b, n in zip(before, now, strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    same = sum(map(str.__eq__, first, second))
    return f"| {name} | {' | '.join(rates)} | {ratio} | {same} of {number} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", default="output/openmoji/stage2")
    parser.add_argument("--data_path", default="output/openmoji/data/heldout")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(arguments.model_name_or_path)
    chat, dataset = Chat(processor), LlavaDataset(arguments.data_path)
    asked = [question for i in range(WINDOW * BATCH) for question in questions(dataset[i])]
    conversations, images = [q["messages"] for q in asked], [q["images"] for q in asked]

    def in_order(**options: LogitsProcessor) -> list[str]:
        said = []
        for start in range(0, len(asked), BATCH):
            shown = [image for some in images[start : start + BATCH] for image in some]
            said += generate(model, processor, conversations[start : start + BATCH], shown, NEW_TOKENS, **options)
        return said

    def together(**options: LogitsProcessor) -> list[str]:
        prepared = [prepare(model, chat, *each) for each in zip(conversations, images, strict=True)]
        return [answer for answer, _ in generate_all(model, chat, prepared, BATCH, **options)]

    end, *_ = ends = model.generation_config.eos_token_id
    prompt = chat.prompts(conversations[:1], images[0])["input_ids"][0]
    opening = len(prompt) - 1 - int((prompt == end).nonzero()[-1])
    mixed = {"logits_processor": [EndsAt(ends, end, opening)]}
    rows = [
        compare(name, partial(in_order, **options), partial(together, **options), len(asked), arguments.rounds)
        for name, options in (("a few words each", {}), (f"{LENGTHS[0]} to {LENGTHS[-1]} tokens", mixed))
    ]
    print("| answers | questions a second, in order | `generate_all` | ratio | the same |\n|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    print(f"\n{len(asked)} questions, {BATCH} at once, {arguments.rounds} rounds; median and range.")


if __name__ == "__main__":
    main()
