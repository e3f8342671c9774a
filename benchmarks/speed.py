"""Times a LoRA training step here, in plain transformers and in TRL: the same model, batch, loss and machine.

    pip install -r benchmarks/requirements.txt
    PYTHONPATH=. python benchmarks/speed.py --work_dir /tmp/speed --geometry small
    PYTHONPATH=. python benchmarks/speed.py --work_dir /tmp/speed --geometry 0.5b

One batch of two captioned 336-pixel pictures, fp32 (on a GPU: bf16), random weights, LoRA of rank 8 on every linear
layer of the language model, the projector in full. `small` takes minutes; `middle` lies between it and `0.5b`, which
has the shapes of CLIP-L/14-336 and Qwen1.5-0.5B; `4b` has those of the 4B setup. The contenders take turns, each time
in a process of its own, so that one's memory is not another's. Their first losses have to agree. Ours stands there
twice, padded and packed, and so does TRL: with its defaults, and without the gradient checkpointing that is one of
them.

The last column is the floating-point operations of our own step a second, over those that a multiplication of two
2048 x 2048 matrices (on a GPU: 8192 x 8192 in bf16) reaches on this machine in the same run: what is left of the
machine's speed. A contender that fails, as where TRL is not installed, is a row with its error.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from itertools import cycle, islice
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate.utils import send_to_device
from memory import CLIP, QWEN
from peft import get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from train_llava.build_model import BuildArguments, build_model
from train_llava.cli import device
from train_llava.data import LlavaCollator
from train_llava.evaluation.generation import assistant_message, user_message
from train_llava.model import LoraArguments, load_checkpoint, lora_config, set_trainable
from train_llava.training.throughput import peak_memory

EXAMPLE = Path(__file__).parent.parent / "examples/openmoji/parts/qwen2"  # a tokenizer
GEOMETRIES = {  # layers and widths of the tower and of the language model, and the vocabulary
    "tiny": ((3, 64), (2, 64), 8000),
    "small": ((6, 512), (6, 512), 32000),
    "middle": ((12, 768), (12, 768), 64000),
    "0.5b": ((24, 1024), (24, 1024), 151936),
}
REAL = "4b"  # the shapes in memory.py, in bf16
ON_GPU = device().type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
CONTENDERS = ("ours", "ours, packed", "plain transformers", "TRL", "TRL, no checkpointing")
# the end of an answer is the end of the text: TRL would also learn the line break that ChatML writes there
CHATML = (
    "{% for message in messages %}{{ ('' if loop.first else '\n') + '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}"
    "{% endif %}"
)
LORA = LoraArguments(lora_r=8, lora_alpha=16, lora_dropout=0.0)
TEXTS = [
    ("What is in this picture?", "a small red square on a white wall, and beside it a window with a blue curtain"),
    ("Describe the picture.", "two people on a bench in a park, one of them reading a newspaper to the other"),
]


def configurations(tower: tuple[int, int], text: tuple[int, int], vocabulary: int) -> tuple:
    """Those of a CLIP tower and a Qwen2 model, from layers and widths, with heads of 64."""
    (vision_layers, vision_width), (layers, width) = tower, text
    vision = CLIPVisionConfig(
        hidden_size=vision_width,
        intermediate_size=4 * vision_width,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_width // 64,
        image_size=336,
        patch_size=14,
    )
    heads = width // 64
    return vision, Qwen2Config(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


def make_parts(geometry: str, parts: Path) -> None:
    """Writes a tower and a language model of random weights."""
    vision, text = (CLIP, QWEN) if geometry == REAL else configurations(*GEOMETRIES[geometry])
    dtype = torch.bfloat16 if geometry == REAL else torch.float32
    torch.set_default_dtype(dtype)
    with device():  # a GPU draws billions of numbers in a second
        CLIPVisionModel(vision).save_pretrained(parts / "clip")
        Qwen2ForCausalLM(text).save_pretrained(parts / "qwen2")
    torch.set_default_dtype(torch.float32)
    size = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=size).save_pretrained(parts / "clip")
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(parts / "qwen2")


def make_model(geometry: str, folder: Path) -> None:
    """Writes a LLaVA of random weights, and its parts beside it."""
    parts = folder.with_name(f"{geometry}-parts")
    make_parts(geometry, parts)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the table
        build_model(BuildArguments(str(parts / "clip"), str(parts / "qwen2"), str(folder), skip_checks=True))


def make_apart(geometry: str, work_dir: Path) -> Path:
    """Lets a process of its own make the model, once: what that takes of a GPU goes with it."""
    folder = work_dir / geometry
    if not folder.exists():
        process = get_context("spawn").Process(target=make_model, args=(geometry, folder), daemon=True)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"error: no model of the geometry {geometry}")
    return folder


def wait() -> None:
    """Until a GPU has done what it was told to."""
    if ON_GPU:
        torch.cuda.synchronize()


class Clock(TrainerCallback):
    """The seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_, **__) -> None:
        wait()
        self.start = time.monotonic()

    def on_step_end(self, *_, **__) -> None:
        wait()
        self.seconds.append(time.monotonic() - self.start)


def matmul_rate() -> float:
    """Floating-point operations a second of a large matrix multiplication: the best of some."""
    side = 8192 if ON_GPU else 2048
    a = torch.randn(side, side, dtype=DTYPE, device=device())
    times = []
    for _ in range(8):
        wait()
        start = time.monotonic()
        a @ a
        wait()
        times.append(time.monotonic() - start)
    return 2 * side**3 / min(times)


def attention(
    query: torch.Size, key: torch.Size, value: torch.Size, dropout: float = 0, is_causal: bool = False, **_: object
) -> int:
    """Operations of the CPU's attention, which PyTorch's counter does not know; a causal one does half of them."""
    return sdpa_flop_count(query, key, value) // (2 if is_causal else 1)


def attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **__: object
) -> int:
    """The same of its gradient; `rest` is the output, what the forward pass kept, dropout and whether it is causal."""
    return sdpa_backward_flop_count(grad, query, key, value) // (2 if rest[3] else 1)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def train_in_fp32(model: torch.nn.Module) -> None:
    """Half-precision weights are too coarse for small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def two_items() -> list[dict]:
    """Two captioned pictures, as a `LlavaDataset` gives them."""
    items = []
    for i, (text, answer) in enumerate(TEXTS):
        picture = Image.effect_mandelbrot((336, 336), (-2, -1.5, 1, 1.5), 20 + i).convert("RGB")
        messages = [user_message(text, 1), assistant_message(answer)]
        items.append({"id": str(i), "messages": messages, "images": [picture]})
    return items


def run(
    contender: str,
    folder: Path,
    output: Path,
    steps: int,
    items: list[dict],
    batch: int = 2,
    lora_arguments: LoraArguments = LORA,
) -> dict:
    """Trains for some steps; returns their seconds, the losses and the peak memory.

    `items`: of a `LlavaDataset`, `batch` a step; they come again where they end.
    """
    model, processor = load_checkpoint(str(folder), DTYPE)
    items = list(islice(cycle(items), steps * batch))
    clock, flops = Clock(), 0
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "dataloader_pin_memory": False,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "disable_tqdm": True,
    }
    lora = lora_config(model, ["projector", "language model"], lora_arguments)
    collator = LlavaCollator(processor, packing=contender == "ours, packed")
    if contender.startswith("ours"):
        model = set_trainable(model, "lora", lora_arguments)
        model.config.text_config.use_cache = False
        train_in_fp32(model)
        model.to(device())
        inputs = send_to_device(collator(items[:batch]), device())
        in_bf16 = torch.autocast(device().type, torch.bfloat16, enabled=ON_GPU)
        with in_bf16, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            model(**inputs).loss.backward()
        model.zero_grad()
        flops = counter.get_total_flops()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        trainer = Trainer(model, TrainingArguments(**settings), data_collator=collator, train_dataset=items)
    elif contender == "plain transformers":

        def full(rows: list[dict]) -> dict:
            keep = ("input_ids", "attention_mask", "pixel_values", "labels")
            return {name: value for name, value in collator(rows).items() if name in keep}

        model = get_peft_model(model, lora)
        train_in_fp32(model)
        trainer = Trainer(model, TrainingArguments(**settings), data_collator=full, train_dataset=items)
    else:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        texts = [[message["content"][-1]["text"] for message in item["messages"]] for item in items]
        columns = {
            "images": [item["images"] for item in items],
            "prompt": [[{"role": "user", "content": text}] for text, _ in texts],
            "completion": [[{"role": "assistant", "content": answer}] for _, answer in texts],
        }
        if contender != "TRL":
            settings["gradient_checkpointing"] = False
        config = SFTConfig(**settings, completion_only_loss=True, max_length=None)
        trainer = SFTTrainer(
            model, config, train_dataset=Dataset.from_dict(columns), processing_class=processor, peft_config=lora
        )
    trainer.add_callback(clock)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": clock.seconds,
        "losses": list(map(float, losses)),
        "peak_gb": peak_memory(device()) / 1e9,
        "flops": flops,
        "rate": matmul_rate(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Where the models are written.")
    parser.add_argument("--geometry", choices=[*GEOMETRIES, REAL], default="small")
    parser.add_argument("--rounds", type=int, default=3, help="How often each contender has its turn.")
    parser.add_argument("--steps", type=int, default=3, help="Steps a turn; the first is not counted.")
    parser.add_argument("--contender", choices=CONTENDERS, help="Run this one alone, and print its figures.")
    arguments = parser.parse_args()
    folder = make_apart(arguments.geometry, arguments.work_dir)
    if arguments.contender is not None:
        output = arguments.work_dir / "output"
        print(json.dumps(run(arguments.contender, folder, output, arguments.steps, two_items())))
        return

    turns: dict[str, list[dict]] = {contender: [] for contender in CONTENDERS}
    failed: dict[str, str] = {}
    for number in range(arguments.rounds):
        for contender in [name for name in CONTENDERS if name not in failed][:: 1 if number % 2 == 0 else -1]:
            command = [sys.executable, __file__, "--work_dir", arguments.work_dir, "--geometry", arguments.geometry]
            command += ["--steps", str(arguments.steps), "--contender", contender]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                failed[contender] = " ".join(done.stderr.strip().rpartition("\n")[2].split())
                continue
            turns[contender].append(turn := json.loads(done.stdout.splitlines()[-1]))
            turn["seconds"] = turn["seconds"][1:]  # the first step warms up
            print(f"round {number + 1}: {contender} {turn['seconds']}", file=sys.stderr, flush=True)
    if "ours" in failed:
        raise SystemExit(f"error: {failed['ours']}")
    losses = {contender: found[0]["losses"][0] for contender, found in turns.items() if contender not in failed}
    if max(losses.values()) - min(losses.values()) > (2e-2 if ON_GPU else 1e-4) * min(losses.values()):
        raise SystemExit(f"the contenders do not compute the same loss: {losses}")

    ours = statistics.median(second for turn in turns["ours"] for second in turn["seconds"])
    rate = statistics.median(turn["rate"] for found in turns.values() for turn in found)
    flops = turns["ours"][0]["flops"]
    print(
        f"geometry {arguments.geometry}: {flops / 1e12:.2f} TFLOP a step of ours, matrix multiplication at "
        f"{rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| | s a step (range) | times ours | peak GB | first loss | of the matmul peak |")
    print("|---|---:|---:|---:|---:|---:|")
    for contender, found in turns.items():
        if contender in failed:
            print(f"| {contender} | failed: {failed[contender].replace('|', '/')} | | | | |")
            continue
        seconds = [second for turn in found for second in turn["seconds"]]
        middle = statistics.median(seconds)
        peak = statistics.median(turn["peak_gb"] for turn in found)
        print(
            f"| {contender} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {middle / ours:.2f} | "
            f"{peak:.1f} | {losses[contender]:.5f} | {flops / middle / rate:.0%} |"
        )


if __name__ == "__main__":
    main()
