"""Counts how many questions llama.cpp and transformers answer alike, greedily, in f16 and quantised.

    PYTHONPATH=. python benchmarks/llamacpp.py                        the engine as it is released
    PYTHONPATH=. python benchmarks/llamacpp.py --class_token first    one with pull request 25844: see README.md here

It exports what `bash run_zero2.sh` left in output/openmoji, a CLIP with a Qwen2, and the SigLIP with a Qwen3 of
siglip_qwen3.py, and asks both about the held-out pictures. It needs llama-cpp-python. The tokenizers have to agree on
some texts in any case. The tower and the projector stay in f16; transformers computes in float32 throughout.
"""

import argparse
import base64
import contextlib
import io
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gguf
import llama_cpp
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image
from transformers import PreTrainedTokenizerBase

from benchmarks import siglip_qwen3
from train_llava.data import LlavaDataset
from train_llava.evaluation.answers import questions
from train_llava.evaluation.generation import generate
from train_llava.export_gguf import export_gguf
from train_llava.model import load_checkpoint

NEW_TOKENS = 32
TEXTS = [
    "What is this?",
    "It's  12345 apples,\n\n and\tmore…",
    "这张图片里有什么？",
    "<|im_start|>user\nHi<|im_end|>\n",
]
QUANTIZED = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def quantize(folder: Path, name: str) -> Path:
    """Writes `model-NAME.gguf` beside `model-f16.gguf`, as `llama-quantize` does.

    Raises:
        ValueError: llama.cpp could not.
    """
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = QUANTIZED[name], 1
    path = folder / f"model-{name}.gguf"
    if llama_cpp.llama_model_quantize(str(folder / "model-f16.gguf").encode(), str(path).encode(), settings):
        raise ValueError(f"llama.cpp could not write {path}")
    return path


def matrices(path: Path) -> str:
    """How many matrices of a file are of which type; a row of no multiple of 256 numbers is none for a K-quant."""
    kinds = Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def agreement(
    checkpoint: Path, dataset: LlavaDataset, class_token: str, folder: Path, names: list[str]
) -> tuple[int, list[int]]:
    """Exports a checkpoint to `folder` and asks every question of a data set.

    Returns:
        How many there are, and how many answers are those of transformers: in f16, and quantised to each of `names`.

    Raises:
        ValueError: llama.cpp splits a text into other tokens, or the model answers many pictures alike.
    """
    export_gguf(str(checkpoint), str(folder), class_token)
    model, processor = load_checkpoint(str(checkpoint))
    asked = [found for item in dataset for found in questions(item)]
    images = [image for question in asked for image in question["images"]]
    ours = generate(model.eval(), processor, [question["messages"] for question in asked], images, NEW_TOKENS)
    if len(set(ours)) < len(asked) / 5:
        raise ValueError(f"{len(set(ours))} different answers to {len(asked)} questions: too few to compare by")
    paths = [folder / "model-f16.gguf", *(quantize(folder, name) for name in names)]
    return len(asked), [count_same(path, processor.tokenizer, asked, images, ours) for path in paths]


def count_same(
    path: Path, tokenizer: PreTrainedTokenizerBase, asked: list[dict], images: list[Image.Image], ours: list[str]
) -> int:
    """How many questions, each about one picture, the engine answers with the same words."""
    handler = MTMDChatHandler(str(path.parent / "mmproj-f16.gguf"), verbose=False)
    engine = llama_cpp.Llama(str(path), chat_handler=handler, n_ctx=512, verbose=False)
    for text in TEXTS:
        theirs = engine.tokenize(text.encode(), add_bos=False, special=True)
        if theirs != tokenizer(text, add_special_tokens=False)["input_ids"]:
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
    dataset, names = LlavaDataset("output/openmoji/data/heldout"), []
    pairs = {f"CLIP and Qwen2, class token {class_token}": Path("output/openmoji/stage2")}
    if class_token == "last":
        pairs["SigLIP and Qwen3"], names = siglip_qwen3.OUTPUT / "run", list(QUANTIZED)
    lines = [f"| llama-cpp-python {llama_cpp.__version__} | answers that agree | of |", "|---|---:|---:|"]
    notes = []
    with tempfile.TemporaryDirectory() as root, contextlib.redirect_stdout(sys.stderr):  # exporting prints, too
        for pair, checkpoint in pairs.items():
            folder = Path(root) / checkpoint.parent.name
            asked, counts = agreement(checkpoint, dataset, class_token, folder, names)
            lines += [f"| {pair}, {n} | {c} | {asked} |" for n, c in zip(["f16", *names], counts, strict=True)]
            notes += [f"{pair}, {name}: {matrices(folder / f'model-{name}.gguf')}" for name in names]
    if notes:
        lines += ["", "Matrices of the quantised files by type:", "", *(f"- {note}" for note in notes)]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
