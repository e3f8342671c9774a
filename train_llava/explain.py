"""Shows what a model sees: where an answer comes from, at which layer it appears, and how much the picture adds.

    python -m train_llava.explain --model_name_or_path output/run --image cat.jpg --prompt "What is this?" \
        --output_dir output/explanation
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from math import exp
from statistics import mean
from typing import Any, Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import BATCH, BITS_HELP, parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class ExplainArguments:
    model_name_or_path: str = HfArg(help="A LLaVA checkpoint, a folder or a hub id.")
    image: str = HfArg(help="The picture: a file, an http(s) address, or - for stdin.")
    prompt: str = HfArg(help="The question.")
    output_dir: str = HfArg(help="The folder to write; it must not exist yet.")
    answer: str | None = HfArg(default=None, help="The answer to explain; default: the model's own.")
    data_path: str | None = HfArg(default=None, help="Data whose pictures are shown instead, to compare.")
    adapter_name_or_path: str | None = HfArg(default=None, help="A LoRA adapter trained on that model.")
    bits: Literal[4, 8] | None = HfArg(default=None, help=BITS_HELP)


if __name__ == "__main__":
    parse_first(ExplainArguments)  # before the imports that take seconds

import numpy as np
import torch
from peft import PeftModel
from PIL import Image

from train_llava.chat import Chat, chat_of
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluation.generation import assistant_message, generate, log_probabilities, user_message
from train_llava.evaluation.plots import draw, draw_explanation
from train_llava.infer import fetch_image
from train_llava.modeling.adapter import load_model

BLOCKS = 8  # of the map, along each side of the picture


def occlusion_map(score: Callable[[list[Image.Image]], torch.Tensor], image: Image.Image) -> torch.Tensor:
    """How far the score of a picture falls if a part of it is covered, `(BLOCKS, BLOCKS)` (Zeiler and Fergus, 2014).

    A square around each block, of twice its side, takes the picture's median colour, before the picture is cropped,
    padded or cut into tiles. `score` gives a number for each of several pictures.
    """
    pixels, rows = np.asarray(image), []
    colour = np.median(pixels, axis=(0, 1))
    ends = np.rint(np.outer(image.size, np.arange(-1, 2 * BLOCKS + 2)) / (2 * BLOCKS)).clip(0).astype(int)
    for row in range(0, 2 * BLOCKS, 2):
        covered = []
        for column in range(0, 2 * BLOCKS, 2):
            covered.append(pixels.copy())
            covered[-1][ends[1, row] : ends[1, row + 4], ends[0, column] : ends[0, column + 4]] = colour
        rows.append(score(list(map(Image.fromarray, covered))))
    return score([image]) - torch.stack(rows)


@torch.inference_mode()
def read_layers(model: Any, chat: Chat, prompt: str, answer: str, image: Image.Image) -> dict[str, list[Any]]:
    """At which of the language model's L layers the N tokens of an answer appear (logit lens; nostalgebraist, 2020).

    Returns `tokens`; their `probabilities`, if each layer were the last one, `(L, N)`; in `layers`, the one from which
    on a token is the most likely, None if it is not in the end; in `attention`, each layer's share on the picture.
    """
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    llava.set_attn_implementation("eager")  # the one that gives its attention away
    messages = [user_message(prompt, 1), assistant_message(answer)]
    batch = LlavaCollator(chat.processor)([{"id": prompt, "messages": messages, "images": [image]}])
    tokens, before = batch.pop("shift_labels"), batch.pop("logits_to_keep")[0]
    inputs = {name: batch[name].to(llava.device) for name in batch.keys() - {"labels"}}
    output = llava(**inputs, output_hidden_states=True, output_attentions=True, logits_to_keep=1)
    # Each layer's output passes through the last norm, as the last one's has already, and the head
    norm = [module for name, module in llava.get_decoder().named_children() if "norm" in name][-1]
    probabilities, is_first = [], []
    for layer in [*map(norm, output.hidden_states[1:-1]), output.hidden_states[-1]]:
        logits = llava.lm_head(layer[0, before]).float().cpu()
        probabilities.append(logits.softmax(-1).gather(1, tokens[:, None])[:, 0].tolist())
        is_first.append(logits.argmax(-1) == tokens)
    lasting = torch.stack(is_first).flip(0).long().cumprod(0).sum(0).tolist()  # layers, from the last one back
    on_picture, count = batch["input_ids"][0] == llava.config.image_token_id, len(is_first)
    attention = [layer[0][:, before][..., on_picture].sum(-1).mean().item() for layer in output.attentions]
    layers = [count - of_token + 1 if of_token else None for of_token in lasting]
    texts = [chat.tokenizer.decode(token) for token in tokens]
    return {"tokens": texts, "layers": layers, "probabilities": probabilities, "attention": attention}


def explain(arguments: ExplainArguments) -> tuple[dict[str, Any], Image.Image]:
    """All that `draw_explanation` draws of an answer, and the picture."""
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path, arguments.bits)
    chat, prompt = chat_of(processor), arguments.prompt
    image, messages = fetch_image(arguments.image, chat.min_side), [user_message(prompt, 1)]
    answer = arguments.answer or generate(model, processor, [messages], [image])[0]
    if not answer.strip():
        raise ValueError("the answer is empty: name one with --answer")
    pictures = {"this picture": [image], "a white picture": [Image.new("RGB", image.size, "white")]}
    if arguments.data_path is not None:
        dataset = LlavaDataset(arguments.data_path)
        first = chain.from_iterable(dataset[i]["images"] for i in range(min(len(dataset), BATCH)))
        pictures["other pictures"] = [other for other in first if other != image]
        if not pictures["other pictures"]:
            raise ValueError(f"--data_path {arguments.data_path} begins with no other picture: leave it out")

    def score(images: list[Image.Image]) -> torch.Tensor:
        return log_probabilities(model, chat, messages, [[one] for one in images], [answer])[:, 0]

    def how_much() -> dict[str, float]:
        return {kind: mean(score([one]).item() for one in of_kind) for kind, of_kind in pictures.items()}

    metrics = {"prompt": prompt, "answer": answer, "log_probability": how_much()}
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            metrics["base_log_probability"] = how_much()
    metrics["map"] = occlusion_map(score, image).tolist()
    return metrics | read_layers(model, chat, prompt, answer, image), image


def main() -> None:
    (arguments,) = parse_arguments(ExplainArguments)
    with written_whole(arguments.output_dir) as folder:
        metrics, image = explain(arguments)
        (folder / "metrics.json").write_text(json.dumps(metrics, ensure_ascii=False) + "\n", encoding="utf-8")
        draw(lambda path: draw_explanation(image, metrics, path), folder / "explanation.png")
    print(metrics["answer"])
    for name, label in (("log_probability", "probability"), ("base_log_probability", "without the adapter")):
        if name in metrics:
            print(f"{label}:", ", ".join(f"{exp(value):.1%} with {kind}" for kind, value in metrics[name].items()))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
