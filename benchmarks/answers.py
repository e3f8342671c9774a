"""Questions a second: batches in the order of the questions against `generate_all`, on a model of the toy example.

    PYTHONPATH=. python benchmarks/answers.py > benchmarks/results/answers.md

The first row asks the model's own held-out questions, after `bash run_zero2.sh`: answers of a few words. In the second
row, answers have the lengths of a mixed set: most a word, some a paragraph. Their questions are numbered, each number
gets a length, and its answer ends there and not before; padding has to be token 0. Times are processor time of one
thread, in alternating rounds of one run.
"""

import argparse
import statistics
import time
from itertools import chain
from typing import Any

import torch
from tqdm import tqdm
from transformers import LogitsProcessor

from train_llava.chat import Chat
from train_llava.cli import BATCH, NEW_TOKENS
from train_llava.data import LlavaDataset
from train_llava.evaluation.answers import questions
from train_llava.evaluation.generation import WINDOW, Messages, generate, generate_all, prepare
from train_llava.modeling.adapter import load_model

LENGTHS = [1, 2, 3, 5, 8, 20, 60, 120]  # tokens, one of them for each question


class EndsAt(LogitsProcessor):
    """Ends each answer at one of `LENGTHS` and not before. The prompt decides which."""

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


def with_number(messages: Messages, number: int) -> Messages:
    """A conversation whose question ends with a number, so that no two prompts are the same."""
    *before, question = messages
    content = [*question["content"], {"type": "text", "text": f"({number})"}]
    return [*before, question | {"content": content}]


def per_second(seconds: list[float], number: int) -> str:
    """The median rate and its range."""
    return f"{number / statistics.median(seconds):.1f} ({number / max(seconds):.1f}-{number / min(seconds):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name_or_path", default="output/openmoji/stage2")
    parser.add_argument("--data_path", default="output/openmoji/data/heldout")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model(arguments.model_name_or_path)
    chat, dataset = Chat(processor), LlavaDataset(arguments.data_path)
    asked = []
    for i in range(WINDOW * BATCH):
        asked += questions(dataset[i])
    images = [question["images"] for question in asked]

    def in_order(conversations: list[Messages], **options: Any) -> list[str]:
        answers = []
        for start in range(0, len(asked), BATCH):
            batch = slice(start, start + BATCH)
            pictures = list(chain.from_iterable(images[batch]))
            answers += generate(model, processor, conversations[batch], pictures, NEW_TOKENS, **options)
        return answers

    def by_length(conversations: list[Messages], **options: Any) -> list[str]:
        prompts = [prepare(chat, *each) for each in zip(conversations, images, strict=True)]
        return [answer for answer, _ in generate_all(model, chat, prompts, BATCH, **options)]

    def row(name: str, conversations: list[Messages], **options: Any) -> str:
        """A row of the table: the rates both ways, their ratio, and how many answers are the same."""
        seconds, ratios = ([], []), []
        for _ in tqdm(range(arguments.rounds), desc=name):
            answers = []
            for way, times in zip((in_order, by_length), seconds, strict=True):
                start = time.process_time()
                answers.append(way(conversations, **options))
                times.append(time.process_time() - start)
            ratios.append(seconds[0][-1] / seconds[1][-1])
        rates = [per_second(times, len(asked)) for times in seconds]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        same = sum(map(str.__eq__, *answers))
        return f"| {name} | {' | '.join(rates)} | {ratio} | {same} of {len(asked)} |"

    plain = [question["messages"] for question in asked]
    numbered = [with_number(messages, i) for i, messages in enumerate(plain)]
    # the token that ends a turn, and the tokens of the template from there to the answer
    end, *_ = ends = model.generation_config.eos_token_id
    prompt = chat.prompts(plain[:1], images[0])["input_ids"][0]
    opening = len(prompt) - 1 - int((prompt == end).nonzero()[-1])
    rows = [row("a few words each", plain)]
    rows.append(row(f"{LENGTHS[0]} to {LENGTHS[-1]} tokens", numbered, logits_processor=[EndsAt(ends, end, opening)]))
    print("| answers | questions a second, in order | `generate_all` | ratio | the same |\n|---|---:|---:|---:|---:|")
    print("\n".join(rows))
    print(f"\n{len(asked)} questions, {BATCH} at once, {arguments.rounds} rounds; median and range.")


if __name__ == "__main__":
    main()
