"""Assembles the real geometry, CLIP-L/14-336 + Qwen1.5-4B in bf16, from random weights and reports memory and time.

    PYTHONPATH=. python benchmarks/assemble.py --work_dir /tmp/assemble

Takes 26 GB of disk. The parts have the published shapes, and random values; the tokenizer is the toy example's,
so only the number of `<image>` tokens is not the 4B setup's. Peak memory is the operating system's figure for the
whole process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import CLIP, QWEN
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, Qwen2ForCausalLM

QWEN2_TOKENIZER = Path(__file__).parent.parent / "examples/openmoji/parts/qwen2"


def make_parts(work_dir: Path) -> None:
    """Writes random CLIP and Qwen checkpoints of the real shapes in bf16, unless they are there."""
    if (work_dir / "qwen").exists():
        return
    torch.set_default_dtype(torch.bfloat16)
    side = CLIP.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    for part in (CLIPVisionModel(CLIP), processor):
        part.save_pretrained(work_dir / "clip")
    for part in (Qwen2ForCausalLM(QWEN), AutoTokenizer.from_pretrained(QWEN2_TOKENIZER)):
        part.save_pretrained(work_dir / "qwen")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Where the parts and the outcome are written.")
    parser.add_argument("--skip_checks", default="false", help="true: leave out build_model's checks, slow on a CPU.")
    arguments = parser.parse_args()
    work_dir = arguments.work_dir
    make_parts(work_dir)
    output_dir = work_dir / "llava"
    parts = ["--vision_model_name_or_path", work_dir / "clip", "--language_model_name_or_path", work_dir / "qwen"]
    start = time.monotonic()
    build = [sys.executable, "-m", "train_llava.build_model", *parts, "--output_dir", output_dir]
    build += ["--skip_checks", arguments.skip_checks]
    subprocess.run(build, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    size = sum(file.stat().st_size for file in output_dir.iterdir())
    print(
        json.dumps({"seconds": round(seconds), "folder_gb": size / 1e9, "peak_gb": peak / 1e9, "ratio": peak / size})
    )


if __name__ == "__main__":
    main()
