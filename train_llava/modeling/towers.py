"""Measures a vision tower by running it: its hidden states, and the layers that the projector never uses."""

from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ModelOutput


def tower_features(output: ModelOutput, layer: int | None) -> torch.Tensor:
    """What the projector reads of a tower's output: a hidden state; None: the last, behind its layer norm."""
    return output.last_hidden_state if layer is None else output.hidden_states[layer]


def tower_states(config: PreTrainedConfig, side: int, **settings: int) -> tuple[PreTrainedModel, ModelOutput]:
    """Makes a vision tower with unset weights, and runs it on a picture of `side` x `side` pixels.

    `settings` replace values of its configuration, to make it small. It runs on the CPU and outside inference
    mode, because some architectures cache tensors for the whole process: these have to be the usual ones. Returns
    the tower and its output, with hidden states of `(1, tokens, width)`.
    """
    config = deepcopy(config)
    for name, value in (settings | {"_attn_implementation": "eager"}).items():
        setattr(config, name, value)
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.random.fork_rng([]),  # the run's own random numbers stay as they are
        no_init_weights(),  # memory that is never written costs nothing
    ):
        # Not by `from_config`, which would partition the weights under ZeRO-3
        tower = AutoModel._model_mapping[type(config)](config).eval()
        return tower, tower(torch.zeros(1, 3, side, side), output_hidden_states=True)


def unused_parameters(config: PreTrainedConfig, layers: int | list[int] | None) -> set[str]:
    """Names the parameters of a vision tower on which its features do not depend: see `tower_features`.

    The autograd graph of a small picture tells. A backward pass would need memory for every gradient.
    """
    # The graph's nodes, from the hidden states back to the parameters
    side = 4 * config.patch_size
    tower, output = tower_states(config, side, image_size=side)
    nodes = [tower_features(output, layer).grad_fn for layer in (layers if isinstance(layers, list) else [layers])]
    seen, used = {None}, set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # a leaf of the graph: a parameter
            used.add(id(node.variable))
        nodes += [previous for previous, _ in node.next_functions]
    return {name for name, parameter in tower.named_parameters() if id(parameter) not in used}


def skip_unused_layers(model: nn.Module) -> set[str]:
    """Skips the vision tower's layers whose output the projector never uses. They stay in its files.

    Returns the names of the tower's parameters that get no gradient.
    """
    unused = unused_parameters(model.config.vision_config, getattr(model.config, "vision_feature_layer", None))
    for name, layers in model.get_encoder("image").named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        for i, layer in enumerate(layers):
            names = {f"{name}.{i}.{parameter}" for parameter, _ in layer.named_parameters()}
            if names and names <= unused:
                layer.forward = lambda hidden_states, *_, **__: hidden_states
    return unused
