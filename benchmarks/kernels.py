"""Counts, without a GPU, what a training step asks of one: kernels, waits of the host, and new attention shapes.

    PYTHONPATH=. python benchmarks/kernels.py > benchmarks/results/kernels.md

The model has the depth of the 4B setup and a small width, so that a step has the kernels of a real one and takes a
second here. Each row is a run of `train_llava.train` on one rank, in a process of its own:

- kernels: calls of ATen operators that are no views, in one step, by phase
- waits: calls after which the host has to wait for the GPU's numbers, such as `.item()` and `nonzero`
- new shapes: attention calls whose sizes or strides the process has not met before, per step after the tenth;
  attention by cuDNN builds a plan for each
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
LAYERS, TOWER_LAYERS = 40, 24  # of Qwen1.5-4B and CLIP-L
ROWS, WARM_STEPS, STEPS = 2, 10, 14
ZERO2 = ["--deepspeed", str(ROOT / "ds_zero2_no_offload.json")]
RUNS = {
    "padded": [],
    "`--activation_checkpointing true`": ["--activation_checkpointing", "true"],
    "`--packing true`": ["--packing", "true"],
    "padded, ZeRO-2": ZERO2,
}
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "select", "unsqueeze",
    "squeeze", "permute", "detach", "alias", "split", "split_with_sizes", "as_strided", "_reshape_alias",
    "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "chunk",
    "is_same_size", "narrow", "diagonal", "unfold", "reshape", "view_as", "set_data", "is_pinned",
    "_local_scalar_dense",
}  # fmt: skip
WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim", "equal", "item",
}  # fmt: skip
WORDS = ["a", "small", "red", "square", "on", "white", "with", "blue"]


class CallCounter(TorchDispatchMode):
    """Counts operator calls by phase: kernels, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.__name__.split(".")[0]
        # an index by a mask asks the GPU how many elements are true
        by_mask = False
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], list | tuple):
            by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        if name in WAITS or by_mask:
            self.waits[self.phase, name] += 1
        if name not in VIEWS:
            self.kernels[self.phase] += 1
        return func(*args, **(kwargs or {}))


def make_model_and_data(folder: Path) -> None:
    """Writes a LLaVA of real depth and small width, and records with answers of 16 to 47 words."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from train_llava.build_model import build_model

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=TOWER_LAYERS, num_attention_heads=4, image_size=56,
        patch_size=14,
    )  # fmt: skip
    CLIPVisionModel(tower).save_pretrained(folder / "clip")
    size = {"height": 56, "width": 56}
    CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=size).save_pretrained(folder / "clip")
    language_model = Qwen2Config(
        hidden_size=64, intermediate_size=176, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=8000, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(language_model).save_pretrained(folder / "qwen2")
    AutoTokenizer.from_pretrained(ROOT / "examples/openmoji/parts/qwen2").save_pretrained(folder / "qwen2")
    build_model(str(folder / "clip"), str(folder / "qwen2"), str(folder / "llava"), skip_checks=True)

    rng, records = np.random.default_rng(0), []
    (folder / "data/images").mkdir(parents=True)
    for i in range(96):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data/images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nWhat is in this picture?"}
        answer = {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(16, 48)))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "data/chat.json").write_text(json.dumps(records))


def count_step(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Trains for some steps and returns the counts of one of them."""
    counter, shapes, new_shapes = CallCounter(), set(), Counter()
    step = 0
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched_attention(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        shape = tuple((tuple(x.shape), tuple(x.stride())) for x in tensors)
        if shape not in shapes:
            shapes.add(shape)
            new_shapes[step] += 1
        return attention(*args, **kwargs)

    # before transformers binds the function's name
    torch.nn.functional.scaled_dot_product_attention = watched_attention
    from train_llava import train, trainer

    training_step, compute_loss = trainer.LlavaTrainer.training_step, trainer.LlavaTrainer.compute_loss

    def counted_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step = self.state.global_step + 1
        if step != 3:
            return training_step(self, *args, **kwargs)
        with counter:
            return training_step(self, *args, **kwargs)

    def counted_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.phase = "forward"
        loss = compute_loss(self, *args, **kwargs)
        counter.phase = "backward"
        return loss

    trainer.LlavaTrainer.training_step, trainer.LlavaTrainer.compute_loss = counted_step, counted_loss
    if "--deepspeed" in arguments:
        from deepspeed.runtime.engine import DeepSpeedEngine

        engine_step = DeepSpeedEngine.step

        def counted_engine_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            counter.phase = "optimizer"
            return engine_step(self, *args, **kwargs)

        DeepSpeedEngine.step = counted_engine_step
    sys.argv = ["train", "--model_name_or_path", str(folder / "llava"), "--data_path", str(folder / "data")]
    sys.argv += [
        "--output_dir",
        str(folder / "run"),
        "--max_steps",
        str(STEPS),
        "--logging_steps",
        "1",
        "--bf16",
        "true",
    ]
    sys.argv += ["--per_device_train_batch_size", str(ROWS), "--save_strategy", "no", "--report_to", "none"]
    sys.argv += ["--preflight", "false", "--dataloader_num_workers", "0", "--disable_tqdm", "true", *arguments]
    train.main()
    late = sum(new_shapes[i] for i in range(WARM_STEPS + 1, STEPS + 1)) / (STEPS - WARM_STEPS)
    waits = {" ".join(key): count for key, count in sorted(counter.waits.items())}
    return {"kernels": dict(counter.kernels), "waits": waits, "new_shapes": late}


def table(counts: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| run | kernels forward | backward | optimizer | waits | new attention shapes a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, count in counts.items():
        kernels = [count["kernels"].get(phase, 0) for phase in ("forward", "backward", "optimizer")]
        cells = [f"{number:,}" if number else "" for number in kernels]
        cells += [str(sum(count["waits"].values())), f"{count['new_shapes']:.1f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if len(sys.argv) > 2:  # one run, in a process of its own
        name, folder = sys.argv[1], Path(sys.argv[2])
        print("counts:", json.dumps(count_step(folder, RUNS[name])))
        return
    counts = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(sys.stderr):
            make_model_and_data(folder)
        for name in RUNS:
            rank = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29637",
            }
            environment = os.environ | (rank if "--deepspeed" in RUNS[name] else {})
            command = [sys.executable, __file__, name, str(folder)]
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            (line,) = [line for line in done.stdout.splitlines() if line.startswith("counts:")]
            counts[name] = json.loads(line.removeprefix("counts:"))
            subprocess.run(["rm", "-rf", folder / "run"], check=True)
            print(f"{name}: {counts[name]}", file=sys.stderr)
    print(table(counts))


if __name__ == "__main__":
    main()
