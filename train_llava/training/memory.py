"""Estimates the GPU memory of a training step from a checkpoint's configuration, before weights are loaded.

The model is on the meta device: tensors have shapes and no numbers. A forward pass tells what autograd keeps.
torch 2.13 has no counter for this: `MemTracker` fails at a frozen parameter, and under `FakeTensorMode` PEFT
cannot add LoRA. Training the projector gives the same bytes there, in four times the time.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, TrainingArguments
from transformers.modeling_utils import set_zero3_state

from train_llava.cli import device
from train_llava.model import (
    LORA_PARTS,
    Llava,
    LoraArguments,
    count_parameters,
    load_config,
    part_of,
    set_trainable,
)
from train_llava.modeling.kinds import Config, picture_features
from train_llava.modeling.towers import tower_states

TEXT, ANSWER = 64, 32  # assumed of a sample: tokens beside its picture, and supervised ones among them
DIVIDED = {"optimizer": 1, "gradients": 2, "weights": 3}  # the stage of ZeRO from which the ranks share it
MODEL_STATES = ("weights", "gradients", "optimizer")
SUB_GROUP = 10**9  # parameters that ZeRO-3 updates at once: DeepSpeed's default


class FusedKernels(TorchFunctionMode):
    """Attention and dropout keep on the meta device what they keep on a GPU: no probabilities, masks of bytes."""

    def __torch_function__(self, function: Any, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        fused = {functional.scaled_dot_product_attention: _attention, functional.dropout: _dropout}
        return fused.get(function, function)(*args, **(kwargs or {}))


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if attn_mask is not None:  # each layer converts a boolean mask to numbers
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the only one on the meta device
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dropout(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, training)[0] if training and p else x


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts in `nbytes` each storage that autograd keeps, without the model's own tensors."""

    def __init__(self, model: nn.Module):
        self.nbytes = 0
        tensors = [*model.parameters(), *model.buffers()]
        self.seen = {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
        super().__init__(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # kept alive, or another storage could get its address
            self.nbytes += storage.nbytes()
        return tensor.detach()  # the tensor itself would never be freed


def empty_model(
    config: Config,
    train_type: str,
    lora_arguments: LoraArguments,
    dtype: torch.dtype,
    frozen_parts: Collection[str] = (),
) -> tuple[Llava, nn.Module]:
    """A LLaVA on the meta device, and the same as `set_trainable` prepares it (a `PeftModel` for LoRA)."""
    vision = config.vision_config
    # What an architecture caches for the whole process has to have numbers: it caches it here
    tower_states(vision, vision.image_size, num_hidden_layers=1)
    # Whole, also under ZeRO-3, where transformers would partition a model as it makes it
    with torch.device("meta"), set_zero3_state():
        llava = AutoModelForImageTextToText.from_config(config).train()
        model = set_trainable(llava, train_type, lora_arguments, frozen_parts).to(dtype)
    llava.get_decoder().config.use_cache = False
    return llava, model


def forward_bytes(llava: Llava, rows: int, tokens: int, pictures: int, answers: int) -> tuple[int, int, int]:
    """Bytes of a forward pass of a model from `empty_model`, with an attention mask `(rows, 1, tokens, tokens)`.

    Args:
        tokens: tokens of a row, with those of its pictures and padding.
        pictures, answers: pictures and supervised tokens of all rows together.

    Returns:
        What autograd keeps; the largest language-model layer's part of it; the logits with their copy in fp32.
    """
    language_model, saved = llava.get_decoder(), SavedTensors(llava)

    # Each layer notes what is kept so far, before it and after it
    before, after, hooks = [], [], []
    for layer in language_model.layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: before.append(saved.nbytes)))
        hooks.append(layer.register_forward_hook(lambda *_: after.append(saved.nbytes)))

    # The forward pass of `LlavaForConditionalGeneration`, without the steps that need numbers
    with torch.device("meta"), FusedKernels(), saved:
        embeds = llava.get_input_embeddings()(torch.empty(rows, tokens, dtype=torch.long))
        is_image_token = torch.empty(rows, tokens, 1, dtype=torch.bool)
        embeds = embeds.masked_scatter(is_image_token, picture_features(llava, pictures).to(embeds.dtype))
        mask = torch.empty(rows, 1, tokens, tokens, dtype=torch.bool)  # taken as it is, unlike (rows, tokens)
        hidden = language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        labels, row, place = (torch.empty(answers, dtype=torch.long) for _ in range(3))
        logits = llava.lm_head(hidden[row, place])
        in_fp32 = logits.float()
        functional.cross_entropy(in_fp32, labels, reduction="sum")
    for hook in hooks:
        hook.remove()

    largest_layer = max(end - start for start, end in zip(before, after, strict=True))
    logit_bytes = logits.nbytes if in_fp32 is logits else logits.nbytes + in_fp32.nbytes
    return saved.nbytes, largest_layer, logit_bytes


def activation_bytes(llava: Llava, *batch: int, recompute: bool) -> dict[str, int]:
    """A step's activations and logits in bytes, of a `batch` as in `forward_bytes`, with `recompute` checkpointed."""
    kept, largest_layer, logits = forward_bytes(llava, *batch)
    if recompute:
        llava.get_decoder().activation_checkpointing_enable()
        kept, _, _ = forward_bytes(llava, *batch)
        kept += largest_layer  # recomputed as a whole in the backward pass
        llava.get_decoder().activation_checkpointing_disable()
    return {"activations": kept, "logits": logits}


def flops_per_token(
    config: Config,
    lora_arguments: LoraArguments,
    args: TrainingArguments,
    recompute: bool = False,
) -> float:
    """FLOPs of a training step for each token; with `recompute`, those of activation checkpointing count, too.

    PyTorch counts the matrix products, forward and backward, of a row with one picture of the largest size.
    """
    llava, _ = empty_model(config, args.train_type, lora_arguments, torch.float32, args.frozen_parts)
    if recompute:
        llava.get_decoder().activation_checkpointing_enable()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        text = llava.get_input_embeddings()(torch.empty(1, TEXT, dtype=torch.long))
        embeds = torch.cat([picture_features(llava, 1)[None], text], dim=1)
        mask = {"full_attention": None, "sliding_attention": None}  # ready-made masks are taken as they are
        hidden = llava.get_decoder()(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        llava.lm_head(hidden.last_hidden_state[:, -ANSWER:]).sum().backward()
    return counter.get_total_flops() / embeds.shape[1]


def model_state_bytes(
    model: nn.Module,
    dtype: torch.dtype,
    world_size: int = 1,
    zero: int | None = None,
    offload: bool = False,
    bits: int | None = None,
) -> tuple[dict[str, float], float]:
    """What a GPU keeps of a model and its AdamW, in bytes by kind; and the bytes that an optimizer step adds.

    It adds them after activations are freed: DeepSpeed copies the gradients of a parameter group into one row, and
    that row to fp32. All parameters that train count as one group here; several groups take less.

    Args:
        zero: DeepSpeed's stage. None: no DeepSpeed; what trains is in fp32, with a copy in `dtype`.
        offload: gradients and optimizer, under ZeRO-3 the weights too, are in the CPU's memory.
        bits: see `quantization`.
    """
    trained, total = (sum(column) for column in zip(*count_parameters(model).values(), strict=True))
    is_half = dtype.itemsize < 4
    if zero is None:
        sizes = {"weights": total * dtype.itemsize + trained * 4 * is_half}
        sizes |= {"gradients": trained * 4, "optimizer": trained * 8}
    else:
        sizes = {"weights": total * dtype.itemsize, "gradients": trained * dtype.itemsize}
        sizes["optimizer"] = trained * 12  # an fp32 copy and AdamW's two moments
        for name, stage in DIVIDED.items():
            sizes[name] /= world_size if zero >= stage else 1
    if bits:
        for name, module in model.named_modules():
            frozen = isinstance(module, nn.Linear) and not module.weight.requires_grad
            if frozen and part_of(name) == "language model" and "lm_head" not in name:
                sizes["weights"] -= module.weight.numel() * (dtype.itemsize - bits / 8)
    if offload:
        sizes |= dict.fromkeys(["gradients", "optimizer"] + ["weights"] * (zero == 3), 0)
    if offload or not zero:
        return sizes, 0
    group = min(trained / world_size, SUB_GROUP if zero == 3 else math.inf)
    return sizes, group * (dtype.itemsize + 4 * is_half)


def precision(args: TrainingArguments) -> torch.dtype:
    """The type that a run computes in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def zero_of(args: TrainingArguments) -> tuple[int | None, bool]:
    """The stage of a run's DeepSpeed configuration, None without one, and whether it offloads."""
    if args.deepspeed is None:
        return None, False
    deepspeed = args.hf_deepspeed_config
    return deepspeed.get_value("zero_optimization.stage", 0), deepspeed.is_offload()


def state_bytes(model: nn.Module, args: TrainingArguments, bits: int | None = None) -> tuple[dict[str, float], float]:
    """The `model_state_bytes` of a run. ZeRO-2 keeps a step's earlier gradients beside those of the current batch."""
    zero, offload = zero_of(args)
    sizes, optimizer_step = model_state_bytes(model, precision(args), args.world_size, zero, offload, bits)
    if zero == 2 and not offload and args.gradient_accumulation_steps > 1:
        sizes["accumulated gradients"] = sizes["gradients"]
    return sizes, optimizer_step


def estimate_memory(
    config: Config,
    lora_arguments: LoraArguments,
    args: TrainingArguments,
    bits: int | None = None,
    packing: bool = False,
    max_length: int | None = None,
    longest: list[int] | None = None,
) -> tuple[dict[str, float], float, str]:
    """Estimates a run on one GPU, where each sample has a picture of the largest size and `TEXT` tokens.

    Args:
        longest: instead, the most tokens, image tokens and tokens of text of a sample.

    Returns:
        Bytes of a forward and backward pass by kind; bytes that the optimizer step adds to `MODEL_STATES`; a
        description of the batch.
    """
    llava, model = empty_model(config, args.train_type, lora_arguments, precision(args), args.frozen_parts)

    # The batch
    batch, picture = args.per_device_train_batch_size, len(picture_features(llava, 1))
    tokens, image_tokens, text = longest or (min(picture + TEXT, max_length or math.inf), picture, ANSWER)
    if args.tokens_per_batch is not None:
        batch = max(1, args.tokens_per_batch // tokens)
    pictures = max(1, math.ceil(batch * image_tokens / picture))
    rows, width = (1, args.tokens_per_batch or batch * tokens) if packing else (batch, tokens)
    note = f"{batch} x {tokens:,} tokens, " + ("a picture in each" if pictures == batch else f"{pictures} pictures")
    if args.tokens_per_batch is not None:
        note = f"a row of {width:,} tokens, {pictures} pictures in it"

    # What it takes
    (sizes, optimizer_step), (zero, offload) = state_bytes(model, args, bits), zero_of(args)
    recompute = args.activation_checkpointing
    sizes |= activation_bytes(llava, rows, width, pictures, batch * text, recompute=recompute)
    divided = [name for name, stage in DIVIDED.items() if zero and zero >= stage]
    if divided and args.world_size > 1:
        note += f"; ZeRO-{zero} divides {', '.join(divided)} by {args.world_size}"
    return sizes, optimizer_step, note + "; what is offloaded is not counted" * offload


def print_estimate(
    model_name_or_path: str, lora_arguments: LoraArguments, args: TrainingArguments, bits: int | None, *batch: Any
) -> None:
    """Prints a run's estimate and, where the GPU has less memory, what helps. Raises as `load_config`.

    `batch`: the other arguments of `estimate_memory`.
    """
    config = load_config(model_name_or_path)
    try:
        sizes, optimizer_step, note = estimate_memory(config, lora_arguments, args, bits, *batch)
    except Exception as error:  # a model that cannot run on meta raises anything, and trains all the same
        reason = " ".join(str(error).split())[:100]
        print(f"memory: no estimate for a {config.text_config.model_type} ({reason})")
        return
    in_optimizer_step = sum(sizes[name] for name in MODEL_STATES) + optimizer_step
    total = max(sum(sizes.values()), in_optimizer_step)
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    if total == in_optimizer_step:
        parts += f"; the optimizer step adds {optimizer_step / 1e9:.1f} to the first three"
    print(f"memory: about {total / 1e9:.1f} GB a rank ({parts}) for {note}")
    if device().type == "cuda":
        limit = torch.cuda.get_device_properties(args.device).total_memory
        if total > limit:
            advice = memory_advice(args, bits, in_optimizer_step <= limit)
            print(f"memory: this GPU has {limit / 1e9:.1f} GB. {advice}")


def memory_advice(args: TrainingArguments, bits: int | None, fewer_activations: bool) -> str:
    """Names options that save memory and are not in use; `fewer_activations`: those for activations, too."""
    zero, offload = zero_of(args)
    accumulate = "with more --gradient_accumulation_steps"
    helps = {}
    if fewer_activations:
        helps["--activation_checkpointing true"] = not args.activation_checkpointing
        helps[f"a smaller --per_device_train_batch_size {accumulate}"] = args.per_device_train_batch_size > 1
        helps[f"a smaller --tokens_per_batch {accumulate}"] = args.tokens_per_batch is not None
    helps["--train_type lora"] = args.train_type in ("freeze_vision", "full", "lora_all")
    helps["--bits 4"] = args.train_type in LORA_PARTS and not bits and zero != 3
    helps["--deepspeed ds_zero3_offload.json"] = not bits and not (zero == 3 and offload)
    options = [option for option, applies in helps.items() if applies]
    return f"Less takes: {'; '.join(options) or 'a smaller language model'}"
