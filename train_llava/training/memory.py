"""What a training step takes of a GPU's memory, computed from a checkpoint's configuration before anything is loaded.

The model is on the meta device, where tensors have shapes and no numbers. A forward pass there tells what autograd
keeps for the backward pass.
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

TEXT, ANSWER = 64, 32  # tokens that a row is taken to have beside its picture, and how many of them are learnt
DIVIDED = {"optimizer": 1, "gradients": 2, "weights": 3}  # from which stage of ZeRO on the ranks share it
STATE = ("weights", "gradients", "optimizer")  # what is there all the time
SUB_GROUP = 10**9  # so many numbers ZeRO-3 updates at once: DeepSpeed's default


class FusedKernels(TorchFunctionMode):
    """Lets attention and dropout keep on the meta device what they keep on a GPU.

    There, attention would fall back to matrix products and keep all its probabilities, and dropout a number where a
    GPU keeps a byte.
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
    if attn_mask is not None:  # PyTorch makes numbers of a mask of truths, in each layer anew
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the one that the meta device has
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(x, p, training)[0] if training and p else x


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context in which `nbytes` grows by what autograd keeps: each storage once, however many operations keep it,
    and those of the model's own tensors not. What activation checkpointing drops is not seen."""

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
            self.seen[storage._cdata] = storage  # held, or another storage might come to lie at its address
            self.nbytes += storage.nbytes()
        return tensor.detach()  # itself, it would never be freed


@contextmanager
def without_zero3_partitioning(args: TrainingArguments) -> Iterator[None]:
    """Models made in it are whole: under ZeRO-3 transformers would share out even weights without numbers."""
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
    """A LLaVA on the meta device, and the same as `set_trainable` prepares it (with LoRA, inside a `PeftModel`)."""
    anyres, vision = isinstance(config, LlavaNextConfig), config.vision_config
    # what an architecture caches for the whole process must not be cached without numbers
    tower_states(vision, vision.image_size, num_hidden_layers=1)
    with torch.device("meta"):
        llava = (LlavaNextForConditionalGeneration if anyres else LlavaForConditionalGeneration)(config).train()
        model = set_trainable(llava, train_type, lora_arguments).to(dtype)
    llava.model.language_model.config.use_cache = False
    return llava, model


def picture_features(llava: Llava, pictures: int) -> torch.Tensor:
    """The projector's output `(tokens, width)` for pictures of as many tokens as a picture can have."""
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
        pictures, answers: pictures, and learnt tokens, of all rows together.

    Returns:
        What autograd keeps, the loss's included; how much of it a layer of the language model keeps, the largest; and
        logits with their copy in fp32, which are there while the loss is computed.
    """
    language_model, saved, marks = llava.model.language_model, SavedTensors(llava), []
    hooks = []
    for layer in language_model.layers:
        for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
            hooks.append(register(lambda *_: marks.append(saved.nbytes)))
    with torch.device("meta"), FusedKernels(), saved:
        embeds = llava.get_input_embeddings()(torch.empty(rows, tokens, dtype=torch.long))
        places = torch.empty(rows, tokens, 1, dtype=torch.bool)
        embeds = embeds.masked_scatter(places, picture_features(llava, pictures).to(embeds.dtype))
        # a mask of four dimensions is taken as it is; into another the model would look
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
    """What a step keeps and computes beside the model, in bytes by kind. With `recompute` (activation checkpointing of
    the language model) the backward pass has one layer whole at a time. See `step_bytes`."""
    kept, layer, logits = step_bytes(llava, rows, tokens, pictures, answers)
    if recompute:
        llava.model.language_model.activation_checkpointing_enable()
        kept = step_bytes(llava, rows, tokens, pictures, answers)[0] + layer
        llava.model.language_model.activation_checkpointing_disable()
    return {"activations": kept, "logits": logits}


def flops_per_token(
    config: LlavaConfig | LlavaNextConfig, lora_arguments: LoraArguments, args: TrainingArguments
) -> float:
    """Floating-point operations that a training step does for each token: PyTorch counts the matrix products, forward
    and backward, of a row with one picture of as many tokens as it can have. A layer that is computed twice, by
    activation checkpointing, counts twice."""
    with without_zero3_partitioning(args):
        llava, _ = empty_model(config, args.train_type, lora_arguments, torch.float32)
    if args.activation_checkpointing:
        llava.model.language_model.activation_checkpointing_enable()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        features = picture_features(llava, 1)[None]
        embeds = torch.cat([features, llava.get_input_embeddings()(torch.empty(1, TEXT, dtype=torch.long))], dim=1)
        # a mask given ready-made is not looked into, which a tensor without numbers would not allow
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
    """What a GPU keeps of a model and its AdamW, in bytes by kind.

    Args:
        zero: DeepSpeed's stage, which divides the optimizer (1), the gradients too (2), the weights too (3) by
            `world_size`; None: no DeepSpeed, and what trains is held in fp32, with a copy in `dtype` in a step.
        offload: gradients and optimizer, under ZeRO-3 the weights too, are in the CPU's memory.
        bits: see `quantization`.
    """
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
        few = sum(w.numel() for name, w in linear if "language_model." in name and not w.requires_grad)
        sizes["weights"] -= few * (dtype.itemsize - bits / 8)
    if offload:
        sizes |= dict.fromkeys(["gradients", "optimizer"] + ["weights"] * (zero == 3), 0)
    return sizes


def optimizer_step_bytes(
    model: nn.Module, dtype: torch.dtype, world_size: int = 1, zero: int | None = None, offload: bool = False
) -> float:
    """Bytes that the optimizer step takes after the activations are freed; arguments as in `model_state_bytes`.

    DeepSpeed updates one group of parameters after the other: it puts a rank's gradients in a row, and that in fp32.
    All that trains is taken for one group, which it nearly is where the language model trains in full; with several
    it is less. On one GPU `full` with 4.25 billion parameters, 68 GB at rest, so runs out of 80 GB.
    """
    if not zero or offload:
        return 0
    numbers = sum(trained for trained, _ in count_parameters(model).values()) / world_size
    if zero == 3:
        numbers = min(numbers, SUB_GROUP)
    return numbers * (dtype.itemsize + (4 if dtype.itemsize < 4 else 0))


def precision(args: TrainingArguments) -> torch.dtype:
    """What a run computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def zero_of(args: TrainingArguments) -> tuple[int | None, bool]:
    """The stage of a run's DeepSpeed configuration, None without one, and whether it offloads."""
    if args.deepspeed is None:
        return None, False
    deepspeed = args.hf_deepspeed_config
    return deepspeed.get_value("zero_optimization.stage", 0), deepspeed.is_offload()


def accumulated_gradient_bytes(args: TrainingArguments, gradients: float) -> float:
    """What ZeRO-2 keeps of the batches before in a step of several, where the gradients of one take so many bytes."""
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
    """What a pass, forward and backward, takes on each GPU, in bytes by kind; what the update behind it takes beside
    the `STATE`; and for what batch: each record with one picture of as many tokens as it can have, and `TEXT` tokens
    beside it, `ANSWER` of them learnt; a row of `tokens_per_batch` is full of such records."""
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
    sizes = model_state_bytes(model, dtype, args.world_size, zero, offload, bits)
    update = optimizer_step_bytes(model, dtype, args.world_size, zero, offload)
    sizes |= activation_bytes(llava, rows, width, batch, batch * ANSWER, args.activation_checkpointing)
    if earlier := accumulated_gradient_bytes(args, sizes["gradients"]):
        sizes |= {"gradients of the batches before": earlier}
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
    """Says what the run at hand will take, and, where a GPU has less, what would help. A model that cannot be run
    without numbers gets no estimate, and trains all the same.

    Raises:
        ValueError: see `load_config`.
    """
    config = load_config(model_name_or_path)
    try:
        sizes, update, note = estimate_memory(config, lora_arguments, args, bits, packing, max_length)
    except Exception as error:  # models raise anything where numbers are missing
        print(f"memory: no estimate for a {config.text_config.model_type} ({' '.join(str(error).split())[:100]})")
        return
    updated = sum(sizes[name] for name in STATE) + update
    total = max(sum(sizes.values()), updated)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    if total == updated:
        parts += f"; beside the first three the optimizer's update {update / 1e9:.1f}"
    print(f"memory: about {total / 1e9:.1f} GB a rank ({parts}) for {note}")
    if device().type == "cuda" and total > (there := torch.cuda.get_device_properties(args.device).total_memory):
        print(f"memory: this GPU has {there / 1e9:.1f} GB. {remedy(args, bits, updated <= there)}")


def remedy(args: TrainingArguments, bits: int | None, activations: bool) -> str:
    """What would make a run smaller, of what it does not use yet; `activations`: fewer of them can be enough."""
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
    return f"Less takes: {'; '.join(way for way, helps in ways.items() if helps) or 'a smaller language model'}"
