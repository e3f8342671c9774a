"""Assemble, feed, train and ask a LLaVA with plain Hugging Face parts. Start reading at `build_model.py`."""

import logging
import sys
from importlib.util import find_spec

__version__ = "0.4.0"

# A command of another Python than the one that has the packages
if sys.argv[:1] == ["-m"] and not all(map(find_spec, ("torch", "transformers", "yaml"))):
    sys.exit(f"error: {sys.executable} lacks the packages: source .venv/bin/activate, or see README.md's quick start")

# Warnings on any machine without a GPU, of a model whose tokenizer grows, and of a package for 4 bits on some CPUs
HARMLESS = ("No CUDA runtime", "Setting accelerator to CPU", "The new embeddings", "Failed to load CPU gemm_4bit")
for name in ("DeepSpeed", "torch.utils.cpp_extension", "transformers.modeling_utils", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(HARMLESS))
