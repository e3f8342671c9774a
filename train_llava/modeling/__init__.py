"""Models: their parts, chat templates, quantization, attention, weights, verification."""
