"""Estimates the GPU memory of a training step from a checkpoint's configuration, before anything is loaded.

The model is on the meta device, where tensors have shapes and no numbers. A forward pass there shows which
tensors autograd keeps for the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    TrainingArguments,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from train_llava.cli import device
from train_llava.model import Llava, LoraArguments, count_parameters, load_config, set_trainable, tower_states

TEXT, ANSWER = 64, 32  # assumed text tokens of a row besides its picture, and the supervised ones among them
DIVIDED = {"optimizer": 1, "gradients": 2, "weights": 3}  # the first stage of ZeRO that divides it among ranks
STATE = ("weights", "gradients", "optimizer")  # in memory all the time
SUB_GROUP = 10**9  # numbers that ZeRO-3 updates at once: DeepSpeed's default


class FusedKernels(TorchFunctionMode):
    """Makes attention and dropout keep the same tensors on the meta device as on a GPU.

    Otherwise attention would keep all its probabilities, and dropout a number where a GPU keeps a byte.
    """

    def __torch_function__(self, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if function is functional.dropout:
            return _dropout(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if attn_mask is not None:  # each layer makes numbers of a boolean mask
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that the meta device has
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts in `nbytes` the storages that autograd keeps, each once, without those of the model itself.

    It does not see the tensors that activation checkpointing drops.
    """

    def __init__(self, model: nn.Module):
        self.nbytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        super().__init__(self._keep, lambda tensor: tensor)

    def __enter__(self) -> "SavedTensors":
        super().__enter__()
        return self

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # a reference, or another storage could get its address
            self.nbytes += storage.nbytes()
        return tensor.detach()  # itself, it would never be freed


@contextmanager
def without_zero3_partitioning(args: TrainingArguments) -> Iterator[None]:
    """Models made in the block are whole. Under ZeRO-3, transformers would divide even weights without numbers."""
    if args.deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def empty_model(
    config: LlavaConfig | LlavaNextConfig, train_type: str, lora_arguments: LoraArguments, dtype: torch.dtype
) -> tuple[Llava, nn.Module]:
    """A LLaVA on the meta device, and the same model after `set_trainable`, with LoRA in a `PeftModel`."""
    anyres, vision = isinstance(config, LlavaNextConfig), config.vision_config
    # Some architectures cache tensors for the whole process: first with numbers
    tower_states(vision, vision.image_size, num_hidden_layers=1)
    with torch.device("meta"):
        llava = (LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration)(config).train()
        model = set_trainable(llava, train_type, lora_arguments).to(dtype)
    llava.model.language_model.config.use_cache = False
    return llava, model


def picture_features(llava: Llava, pictures: int) -> torch.Tensor:
    """The projector's output `(tokens, width)` for pictures, each with the most tokens that it can have."""
    side, more = llava.config.vision_config.image_size, {}
    shape: tuple[int, ...] = (pictures, 3, side, side)
    if isinstance(llava.config, LlavaNextConfig):
        largest = max(llava.config.image_grid_pinpoints, key=prod)
        more["image_sizes"] = [tuple(largest)] * pictures
        shape = (pictures, 1 + prod(largest) // side**2, 3, side, side)
    pixel_values = torch.empty(shape, dtype=llava.dtype, device="meta")
    return torch.cat(list(llava.model.get_image_features(pixel_values, **more).pooler_output))


def step_bytes(llava: Llava, rows: int, tokens: int, pictures: int, answers: int) -> tuple[int, int, int]:
    """Bytes of one forward pass of a model that `empty_model` made, with the batch as `LlavaCollator` lays it out.

    Rows are taken to be of unequal lengths, or packed, so that attention has a mask `(rows, 1, tokens, tokens)`.

    Args:
        tokens: of a row, pictures and padding included.
        pictures, answers: pictures, and supervised tokens, of all rows together.

    Returns:
        Bytes that autograd keeps, those of the loss included; those of the language model's largest layer; those of
        the logits and their fp32 copy, while the loss is computed.
    """
    # Hooks note the bytes before and after each layer
    language_model, saved, marks = llava.model.language_model, SavedTensors(llava), []
    hooks = []
    for layer in language_model.layers:
        for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
            hooks.append(register(lambda *_: marks.append(saved.nbytes)))
    # A forward pass, up to the loss
    with torch.device("meta"), FusedKernels(), saved:
        embeds = llava.get_input_embeddings()(torch.empty(rows, tokens, dtype=torch.long))
        places = torch.empty(rows, tokens, 1, dtype=torch.bool)
        embeds = embeds.masked_scatter(places, picture_features(llava, pictures).to(embeds.dtype))
        # The model would read the values of a mask that has not four dimensions
        mask = torch.empty(rows, 1, tokens, tokens, dtype=torch.bool)
        hidden = language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        labels, row, place = (torch.empty(answers, dtype=torch.long) for _ in range(3))
        logits = llava.lm_head(hidden[row, place])
        in_fp32 = logits.float()
        functional.cross_entropy(in_fp32, labels, reduction="sum")
    for hook in hooks:
        hook.remove()
    largest = max(after - before for before, after in zip(marks[::2], marks[1::2], strict=True))
    copies = {x.untyped_storage()._cdata: x.nbytes for x in (logits, in_fp32)}
    return saved.nbytes, largest, sum(copies.values())


def activation_bytes(llava: Llava, rows: int, tokens: int, pictures: int, answers: int, recompute: bool) -> dict:
    """The activations and logits of a step, in bytes (see `step_bytes`); `recompute`: activation checkpointing."""
    activations, layer, logits = step_bytes(llava, rows, tokens, pictures, answers)
    if recompute:  # the backward pass has one whole layer at a time
        llava.model.language_model.activation_checkpointing_enable()
        activations = step_bytes(llava, rows, tokens, pictures, answers)[0] + layer
        llava.model.language_model.activation_checkpointing_disable()
    return {"activations": activations, "logits": logits}


def flops_per_token(
    config: LlavaConfig | LlavaNextConfig, lora_arguments: LoraArguments, args: TrainingArguments
) -> float:
    """FLOPs per token of a training step, forward and backward, for a row with one picture of the most tokens.

    PyTorch counts the matrix products. A layer that activation checkpointing computes twice counts twice.
    """
    with without_zero3_partitioning(args):
        llava, _ = empty_model(config, args.train_type, lora_arguments, torch.float32)
    if args.activation_checkpointing:
        llava.model.language_model.activation_checkpointing_enable()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        features = picture_features(llava, 1)[None]
        embeds = torch.cat([features, llava.get_input_embeddings()(torch.empty(1, TEXT, dtype=torch.long))], dim=1)
        # The model does not read a mask that is made already; without numbers, it could not
        mask = {"full_attention": None, "sliding_attention": None}
        hidden = llava.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        llava.lm_head(hidden.last_hidden_state[:, -ANSWER:]).sum().backward()
    return counter.get_total_flops() / embeds.shape[1]


def model_state_bytes(
    model: nn.Module,
    dtype: torch.dtype,
    world_size: int = 1,
    zero: int | None = None,
    offload: bool = False,
    bits: int | None = None,
) -> dict[str, float]:
    """Weights, gradients and AdamW's state on a GPU, in bytes.

    Args:
        zero: DeepSpeed's stage, which divides the optimizer (1), the gradients too (2), the weights too (3) by
            `world_size`. None: no DeepSpeed; trained weights are in fp32, with a copy in `dtype` during a step.
        offload: gradients and optimizer, under ZeRO-3 the weights too, are in the CPU's memory.
        bits: see `quantization`.
    """
    # Without DeepSpeed, with it, and with weights in few bits
    trained, total = (sum(column) for column in zip(*count_parameters(model).values(), strict=True))
    if zero is None:
        copy = dtype.itemsize if dtype.itemsize < 4 else 0
        sizes = {"weights": (total - trained) * dtype.itemsize + trained * (4 + copy)}
        sizes |= {"gradients": trained * 4, "optimizer": trained * 8}
    else:
        parts = {name: world_size if zero >= stage else 1 for name, stage in DIVIDED.items()}
        sizes = {"weights": total * dtype.itemsize / parts["weights"]}
        sizes |= {"gradients": trained * dtype.itemsize / parts["gradients"]}
        sizes |= {"optimizer": trained * 12 / parts["optimizer"]}  # an fp32 copy and AdamW's two moments
    if bits:
        linear = [(name, m.weight) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        quantized = sum(w.numel() for name, w in linear if "language_model." in name and not w.requires_grad)
        sizes["weights"] -= quantized * (dtype.itemsize - bits / 8)
    if offload:
        sizes |= dict.fromkeys(["gradients", "optimizer"] + ["weights"] * (zero == 3), 0)
    return sizes


def optimizer_step_bytes(
    model: nn.Module, dtype: torch.dtype, world_size: int = 1, zero: int | None = None, offload: bool = False
) -> float:
    """Bytes that the optimizer step takes after the activations are freed; arguments as in `model_state_bytes`.

    DeepSpeed updates one group of parameters after the other. It copies a rank's gradients of the group into one
    tensor, and this to fp32. All parameters are taken as one group; several groups need less. For example, `full`
    with 4.25 billion parameters has 68 GB of states on one GPU, and in this step runs out of 80 GB.
    """
    if not zero or offload:
        return 0
    numbers = sum(trained for trained, _ in count_parameters(model).values()) / world_size
    if zero == 3:
        numbers = min(numbers, SUB_GROUP)
    return numbers * (dtype.itemsize + (4 if dtype.itemsize < 4 else 0))


def precision(args: TrainingArguments) -> torch.dtype:
    """The precision of a run's computation."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def zero_of(args: TrainingArguments) -> tuple[int | None, bool]:
    """The ZeRO stage of a run's DeepSpeed configuration (None without one), and whether it offloads."""
    if args.deepspeed is None:
        return None, False
    deepspeed = args.hf_deepspeed_config
    return deepspeed.get_value("zero_optimization.stage", 0), deepspeed.is_offload()


def accumulated_gradient_bytes(args: TrainingArguments, gradients: float) -> float:
    """Bytes of the accumulated gradients that ZeRO-2 keeps in a step of several batches; `gradients`: of one batch."""
    zero, offload = zero_of(args)
    return gradients if zero == 2 and not offload and args.gradient_accumulation_steps > 1 else 0


def estimate_memory(
    config: LlavaConfig | LlavaNextConfig,
    lora_arguments: LoraArguments,
    args: TrainingArguments,
    bits: int | None = None,
    packing: bool = False,
    max_length: int | None = None,
) -> tuple[dict[str, float], float, str]:
    """Estimates the memory of a step on each GPU.

    Each record is assumed to have one picture of the most tokens, and `TEXT` other tokens, `ANSWER` of them
    supervised. A row of `tokens_per_batch` is full of such records.

    Returns:
        Bytes of a forward and backward pass by kind; bytes of the optimizer step besides the `STATE`; a description
        of the batch.
    """
    # The batch
    dtype, (zero, offload) = precision(args), zero_of(args)
    with without_zero3_partitioning(args):
        llava, model = empty_model(config, args.train_type, lora_arguments, dtype)
    batch, tokens = args.per_device_train_batch_size, len(picture_features(llava, 1)) + TEXT
    tokens = min(tokens, max_length or tokens)
    rows, width = (1, batch * tokens) if packing else (batch, tokens)
    note = f"{batch} x {tokens:,} tokens, a picture in each"
    if args.tokens_per_batch is not None:
        width, batch = args.tokens_per_batch, max(1, args.tokens_per_batch // tokens)
        note = f"a row of {width:,} tokens, {batch} pictures in it"
    # Its bytes
    sizes = model_state_bytes(model, dtype, args.world_size, zero, offload, bits)
    update = optimizer_step_bytes(model, dtype, args.world_size, zero, offload)
    sizes |= activation_bytes(llava, rows, width, batch, batch * ANSWER, args.activation_checkpointing)
    if accumulated := accumulated_gradient_bytes(args, sizes["gradients"]):
        sizes |= {"accumulated gradients": accumulated}
    divided = [name for name, stage in DIVIDED.items() if zero and zero >= stage]
    if divided and args.world_size > 1:
        note += f"; ZeRO-{zero} divides {', '.join(divided)} by {args.world_size}"
    return sizes, update, note + "; what is offloaded is not counted" * offload


def print_estimate(
    model_name_or_path: str,
    lora_arguments: LoraArguments,
    args: TrainingArguments,
    bits: int | None,
    packing: bool,
    max_length: int,
) -> None:
    """Prints a run's `estimate_memory` and, if a GPU has less, advice. Some models cannot be estimated.

    Raises:
        ValueError: see `load_config`.
    """
    config = load_config(model_name_or_path)
    try:
        sizes, update, note = estimate_memory(config, lora_arguments, args, bits, packing, max_length)
    except Exception as error:  # models raise errors of any type on the meta device
        print(f"memory: no estimate for a {config.text_config.model_type} ({' '.join(str(error).split())[:100]})")
        return
    # The peak is in the backward pass, or in the optimizer step after it
    updated = sum(sizes[name] for name in STATE) + update
    total = max(sum(sizes.values()), updated)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    if total == updated:
        parts += f"; then the first three and {update / 1e9:.1f} for the optimizer step"
    print(f"memory: about {total / 1e9:.1f} GB a rank ({parts}) for {note}")
    if device().type == "cuda":
        available = torch.cuda.get_device_properties(args.device).total_memory
        if total > available:
            advice = memory_advice(args, bits, updated <= available)
            print(f"memory: this GPU has {available / 1e9:.1f} GB. {advice}")


def memory_advice(args: TrainingArguments, bits: int | None, activations: bool) -> str:
    """The options that would save memory and are not used yet; `activations`: fewer of these can be enough."""
    fewer = {
        "--activation_checkpointing true": not args.activation_checkpointing,
        "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps": (
            args.per_device_train_batch_size > 1
        ),
        "a smaller --tokens_per_batch with more --gradient_accumulation_steps": args.tokens_per_batch is not None,
    }
    zero, offload = zero_of(args)
    ways = (fewer if activations else {}) | {
        "--train_type lora": args.train_type in ("freeze_vision", "full"),
        "--bits 4": args.train_type == "lora" and not bits and zero != 3,
        "--deepspeed ds_zero3_offload.json": not bits and not (zero == 3 and offload),
    }
    advice = [way for way, helps in ways.items() if helps]
    return f"Less takes: {'; '.join(advice) or 'a smaller language model'}"
