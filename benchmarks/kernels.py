"""Counts, without a GPU, what a training step asks of one: kernels, waits, new attention shapes, and graphs.

    PYTHONPATH=. python benchmarks/kernels.py > benchmarks/results/kernels.md

The model has the depth of the 4B setup and a small width, so that a step has the kernels of a real one and takes a
second here. Each row is a run of `train_llava.train` on one rank, in a process of its own. Its batches are those of a
GPU: no attention mask, lengths in multiples of 64, and packed rows in one attention call a layer.

- kernels: calls of ATen operators that are no views, in one step, by phase
- waits: calls after which the host has to wait for the GPU's numbers, such as `.item()` and `nonzero`, in a step that
  is not logged. A number that has been copied to the host costs no further wait
- new shapes: attention calls whose sizes, strides or longest length the process has not met before, per step after the
  tenth; attention by cuDNN builds a plan for each
- graphs and breaks: with `--torch_compile true`, the graphs for the decoder layers of batches of nine lengths or more,
  and the places where a graph had to end
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stdout
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
LAYERS, TOWER_LAYERS = 40, 24  # of Qwen1.5-4B and CLIP-L
ROWS, WARM_STEPS, STEPS = 2, 10, 14
ZERO2 = ["--deepspeed", str(ROOT / "ds_zero2_no_offload.json")]
COMPILE = ["--torch_compile", "true", "--torch_compile_backend", "eager"]
RUNS = {
    "padded": [],
    "`--lora_dropout 0.05`": ["--lora_dropout", "0.05"],
    "`--activation_checkpointing true`": ["--activation_checkpointing", "true"],
    "`--packing true`": ["--packing", "true"],
    "padded, ZeRO-2": ZERO2,
    "padded, `--torch_compile true`": COMPILE,
    "`--packing true --torch_compile true`": ["--packing", "true", *COMPILE],
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
    "masked_scatter_backward",  # it calls masked_select
}  # fmt: skip
WORDS = ["a", "dog", "red", "bird", "on", "the", "two", "blue"]


def tensors_of(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class HostCopies(TorchFunctionMode):
    """Marks what a GPU run has on the host: the outcomes of `.cpu()`, and of a copy without a wait."""

    def __init__(self, counter: "CallCounter") -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        copied = func is torch.Tensor.to and args[1:] == ("cpu",) and kwargs.get("non_blocking")
        if func in (torch.Tensor.cpu, torch.Tensor.tolist) and not hasattr(args[0], "on_host"):
            self.counter.waits[self.counter.phase, func.__name__] += 1
            copied = func is torch.Tensor.cpu
        if not copied:
            return func(*args, **kwargs)
        copy = args[0].clone()
        copy.on_host = True
        return copy


class CallCounter(TorchDispatchMode):
    """Counts operator calls by phase: kernels, and those that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        inputs = tensors_of((args, kwargs))
        if inputs and all(hasattr(tensor, "on_host") for tensor in inputs):
            for tensor in tensors_of(outcome):
                tensor.on_host = True
            return outcome
        name = func.__name__.split(".")[0]
        # An index by a mask asks the GPU how many elements are true
        by_mask = False
        if name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], list | tuple):
            by_mask = any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1])
        if name in WAITS or by_mask:
            self.waits[self.phase, name] += 1
        if name not in VIEWS:
            self.kernels[self.phase] += 1
        return outcome


def probabilities(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Of one conversation, under a causal mask."""
    hidden = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    scores = scale * torch.einsum("qhw,khw->hqk", query.float(), key.float())
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def varlen_forward(query: Any, key: Any, value: Any, starts: Any, *_: Any, scale: float, **__: Any) -> tuple:
    """What the CUDA kernel behind `varlen_attn` computes, for as many heads of keys as of queries."""
    assert query.dtype == key.dtype == value.dtype == torch.bfloat16
    output = torch.empty_like(query)
    for start, stop in pairwise(starts.tolist()):
        q, k, v = (states[start:stop] for states in (query, key, value))
        output[start:stop] = torch.einsum("hqk,khw->qhw", probabilities(q, k, scale), v.float())
    return output, query.new_zeros(query.shape[1], len(query)), torch.zeros(2), torch.zeros(1), torch.zeros(1)


def varlen_backward(
    grad: Any, query: Any, key: Any, value: Any, output: Any, _: Any, starts: Any, *__: Any, scale: float, **___: Any
) -> tuple:
    """Its backward pass."""
    gradients = [torch.empty_like(states) for states in (query, key, value)]
    for start, stop in pairwise(starts.tolist()):
        q, k, v, g = (states[start:stop].float() for states in (query, key, value, grad))
        weights = probabilities(q, k, scale)
        grad_weights = torch.einsum("qhw,khw->hqk", g, v)
        grad_scores = scale * weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True))
        gradients[0][start:stop] = torch.einsum("hqk,khw->qhw", grad_scores, k)
        gradients[1][start:stop] = torch.einsum("hqk,qhw->khw", grad_scores, q)
        gradients[2][start:stop] = torch.einsum("hqk,qhw->khw", weights, g)
    return tuple(gradients)


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

    from train_llava.build_model import BuildArguments, build_model
    from train_llava.data import LlavaDataset

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
    build_model(BuildArguments(str(folder / "clip"), str(folder / "qwen2"), str(folder / "llava"), skip_checks=True))

    rng, records = np.random.default_rng(0), []
    (folder / "data/images").mkdir(parents=True)
    for i in range(96):
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "data/images" / f"{i}.jpg")
        question = {"from": "human", "value": "<image>\nWhat is in this picture?"}
        answer = {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(16, 48)))}
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": [question, answer]})
    (folder / "data/chat.json").write_text(json.dumps(records))
    LlavaDataset(str(folder / "data"))  # its table is written before several processes read it


def count_step(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Trains for some steps and returns the counts of one of them."""
    compiled, packing = "--torch_compile" in arguments, "--packing" in arguments
    counter, shapes, new_shapes, lengths = CallCounter(), set(), Counter(), set()
    step = 0

    def watched(attention: Any) -> Any:
        def watched_attention(*args: Any, **kwargs: Any) -> Any:
            values = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor | int)]
            shape = tuple((tuple(x.shape), x.stride()) if isinstance(x, torch.Tensor) else x for x in values)
            if shape not in shapes:
                shapes.add(shape)
                new_shapes[step] += 1
            return attention(*args, **kwargs)

        return attention if compiled else watched_attention  # a graph would end there

    # Before transformers binds the function's name
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = watched(functional.scaled_dot_product_attention)
    from train_llava import train, trainer
    from train_llava.modeling import attention

    attention.varlen_attn = watched(attention.varlen_attn)

    # Batches and attention as on a GPU; compiled layers meet more lengths
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", varlen_forward, "CPU")
    library.impl("_flash_attention_backward", varlen_backward, "CPU")
    collator_class, trainer_class = train.LlavaCollator, trainer.LlavaTrainer

    def collator_on_gpu(processor: Any, max_length: int, packing: bool, *_: Any) -> Any:
        return collator_class(processor, max_length, packing, padding_mask=False, multiple=1 if compiled else 64)

    def trainer_on_gpu(model: Any, **kwargs: Any) -> Any:
        kwargs["packed_model"] = model.get_base_model().model.language_model if packing else None
        return trainer_class(model=model, **kwargs)

    train.LlavaCollator, train.LlavaTrainer = collator_on_gpu, trainer_on_gpu

    # The third step is counted, up to the next batch
    training_step, compute_loss = trainer_class.training_step, trainer_class.compute_loss
    get_batch_samples, modes = trainer_class.get_batch_samples, ExitStack()

    def counted_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal step
        step = self.state.global_step + 1
        lengths.add(inputs["input_ids"].shape[1])
        if step == 3 and not compiled:
            modes.enter_context(counter)
            modes.enter_context(HostCopies(counter))
        loss = training_step(self, model, inputs, *args, **kwargs)
        counter.phase = "optimizer"
        return loss

    def counted_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        counter.phase = "forward"
        loss = compute_loss(self, *args, **kwargs)
        counter.phase = "backward"
        return loss

    def next_batch(self: Any, *args: Any) -> Any:
        modes.close()
        return get_batch_samples(self, *args)

    trainer_class.training_step, trainer_class.compute_loss = counted_step, counted_loss
    trainer_class.get_batch_samples = next_batch
    if "--deepspeed" in arguments:
        from deepspeed.runtime.engine import DeepSpeedEngine

        engine_step = DeepSpeedEngine.step

        def counted_engine_step(self: Any, *args: Any, **kwargs: Any) -> Any:
            counter.phase = "optimizer"
            return engine_step(self, *args, **kwargs)

        DeepSpeedEngine.step = counted_engine_step

    # The run
    sys.argv = ["train", "--model_name_or_path", str(folder / "llava"), "--data_path", str(folder / "data")]
    sys.argv += ["--output_dir", tempfile.mkdtemp(dir=folder), "--max_steps", str(STEPS), "--bf16", "true"]
    sys.argv += ["--per_device_train_batch_size", str(ROWS), "--save_strategy", "no", "--report_to", "none"]
    sys.argv += ["--preflight", "false", "--dataloader_num_workers", "0", "--disable_tqdm", "true", *arguments]
    train.main()

    # Its counts
    if compiled:
        from torch._dynamo.utils import counters

        assert len(lengths) >= 9, lengths
        return {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    late = sum(new_shapes[i] for i in range(WARM_STEPS + 1, STEPS + 1)) / (STEPS - WARM_STEPS)
    waits = {" ".join(key): count for key, count in sorted(counter.waits.items())}
    return {"kernels": dict(counter.kernels), "waits": waits, "new_shapes": late}


def table(counts: dict[str, dict[str, Any]]) -> str:
    names = ["run", "kernels forward", "backward", "optimizer", "waits", "new attention shapes a step"]
    names += ["graphs", "breaks"]
    lines = [f"| {' | '.join(names)} |", "|---|" + "---:|" * (len(names) - 1)]
    for name, count in counts.items():
        if "graphs" in count:
            cells = [""] * 5 + [str(count["graphs"]), str(count["breaks"])]
        else:
            cells = [f"{count['kernels'][phase]:,}" for phase in ("forward", "backward", "optimizer")]
            cells += [str(sum(count["waits"].values())), f"{count['new_shapes']:.1f}", "", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counts_of(name: str, folder: Path) -> dict[str, Any]:
    """The counts of a run, in a process of its own."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29637"}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (rank if "--deepspeed" in RUNS[name] else {})
    command = [sys.executable, __file__, name, str(folder)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("counts:")]
    print(f"{name}: {line}", file=sys.stderr)
    return json.loads(line.removeprefix("counts:"))


def main() -> None:
    if len(sys.argv) > 2:
        name, folder = sys.argv[1], Path(sys.argv[2])
        print("counts:", json.dumps(count_step(folder, RUNS[name])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with redirect_stdout(sys.stderr):
            make_model_and_data(folder)
        with ThreadPoolExecutor(2) as pool:
            counts = dict(zip(RUNS, pool.map(partial(counts_of, folder=folder), RUNS), strict=True))
    print(table(counts))


if __name__ == "__main__":
    main()
