"""`--torch_compile`: compiles each decoder layer, so that one graph serves all layers and all lengths."""

import os

from torch import nn
from transformers import TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer


def compile_layers(language_model: nn.Module, args: TrainingArguments) -> None:
    """Compiles the layers of a language model in place, and keeps `Trainer` from compiling the whole model."""
    for layer in language_model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    args.torch_compile = False
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)  # accelerate reads it, too
