"""Assemble, feed, train and ask a LLaVA with plain Hugging Face parts. Start reading at `build_model.py`."""
