"""Counts how many of 50 held-out pictures llama.cpp and transformers answer alike, greedily and in f16.

    PYTHONPATH=. python benchmarks/llamacpp.py                        the engine as it is released
    PYTHONPATH=. python benchmarks/llamacpp.py --class_token first    one with pull request 25844: see README.md here

It exports what `bash run_zero2.sh` left in output/openmoji, and needs llama-cpp-python. The tokenizers have to agree
on some texts in any case.
"""

import argparse
import base64
import io
import tempfile
from pathlib import Path

import llama_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image

from train_llava.answers import questions
from train_llava.data import LlavaDataset
from train_llava.export_gguf import export_gguf
from train_llava.infer import generate
from train_llava.model import load_checkpoint

QUESTIONS, NEW_TOKENS = 50, 32
TEXTS = [
    "What is this?",
    "It's  12345 apples,\n\n and\tmore…",
    "这张图片里有什么？",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def agreement(run: Path, class_token: str, folder: Path) -> int:
    """Exports `run/stage2` to `folder` and returns how many of the answers are the same in both.

    Raises:
        ValueError: llama.cpp splits a text into other tokens.
    """
    export_gguf(str(run / "stage2"), str(folder), class_token)
    model, processor = load_checkpoint(str(run / "stage2"))
    dataset = LlavaDataset(str(run / "data/heldout"))
    every = len(dataset) // (QUESTIONS - 1)
    asked = [found for i in range(0, len(dataset), every) for found in questions(dataset[i])][:QUESTIONS]
    images = [image for question in asked for image in question["images"]]
    ours = generate(model.eval(), processor, [question["messages"] for question in asked], images, NEW_TOKENS)

    handler = MTMDChatHandler(str(folder / "mmproj-f16.gguf"), verbose=False)
    engine = llama_cpp.Llama(str(folder / "model-f16.gguf"), chat_handler=handler, n_ctx=512, verbose=False)
    for text in TEXTS:
        theirs = engine.tokenize(text.encode(), add_bos=False, special=True)
        if theirs != processor.tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise ValueError(f"llama.cpp splits {text!r} into other tokens: {theirs}")
    same = 0
    for question, image, ours_says in zip(asked, images, ours, strict=True):
        (message,) = question["messages"]
        parts = [
            part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": data_url(image)}}
            for part in message["content"]
        ]
        answer = engine.create_chat_completion(
            [{"role": "user", "content": parts}], temperature=0.0, repeat_penalty=1.0, max_tokens=NEW_TOKENS
        )
        same += answer["choices"][0]["message"]["content"].strip() == ours_says
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--class_token", choices=["last", "first"], default="last", help="As export_gguf's.")
    class_token = parser.parse_args().class_token
    with tempfile.TemporaryDirectory() as folder:
        same = agreement(Path("output/openmoji"), class_token, Path(folder) / "gguf")
    print(f"| llama-cpp-python {llama_cpp.__version__} | answers that agree | of |\n|---|---:|---:|")
    print(f"| class token {class_token} | {same} | {QUESTIONS} |")


if __name__ == "__main__":
    main()
