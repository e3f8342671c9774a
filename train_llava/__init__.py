"""Assemble, feed, train and ask a LLaVA with plain Hugging Face parts. Start reading at `build_model.py`."""

import logging

__version__ = "0.4.0"

# Which names a package that makes 4 bits on some CPUs faster, in every command
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
