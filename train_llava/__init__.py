"""Assemble, feed, train and ask a LLaVA with plain Hugging Face parts. Start reading at `build_model.py`."""

import logging

# said whenever bitsandbytes is imported: a kernel of the hub is not there, without which it works as well
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
