"""A run: arguments, preflight, checkpointing, resume, throughput, memory, stopping, cards."""
