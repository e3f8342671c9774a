"""Tries the longest batch of a run before its first step: forward, backward, save and read back."""

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoProcessor
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.cli import device
from train_llava.common.files import writing
from train_llava.data import CheckedDataset, Sample
from train_llava.dataset.images import prepare_pictures
from train_llava.dataset.lengths import count_tokens
from train_llava.dataset.packing import PackedDataset
from train_llava.model import part_of
from train_llava.modeling.attention import in_one_call
from train_llava.modeling.templates import context_length
from train_llava.modeling.verification import packing_difference, refuse_mixing
from train_llava.trainer import LlavaTrainer
from train_llava.training.batch_size import next_batch
from train_llava.training.checkpointing import on_first_rank
from train_llava.training.memory import precision, state_bytes
from train_llava.training.throughput import peak_memory
from train_llava.training.waits import check_losses


def longest_samples(trainer: LlavaTrainer) -> list[Sample]:
    """One batch: the longest good records, or the fullest row, or the first records of a stream."""
    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if isinstance(dataset, PackedDataset):
        return dataset[int(dataset.tokens.argmax())]
    if not isinstance(dataset, CheckedDataset):
        return list(islice(dataset, size))
    order = np.argsort(-count_tokens(dataset.records, dataset.chat)[:, 0], kind="stable").tolist()
    good_samples = filter(None, map(dataset.good_sample, order))
    return list(islice(good_samples, size)) or [dataset[0]]  # if no record is good, [0] says so


def preflight(trainer: LlavaTrainer) -> None:
    """Tries forward, backward, saving and reading back on one rank, and prints the memory that the run will take.

    The weights and the run's random numbers do not change. All held-out records are read, because the first
    evaluation may be hours away. A ValueError says that the loss or a gradient is missing or not finite, that the
    saved model differs from the one in memory, or that too many held-out records are bad.
    """
    # The held-out records, each rank its share
    args, held_out = trainer.args, trainer.eval_dataset
    mine = range(args.process_index, len(held_out or ()), args.world_size)
    for i in tqdm(mine, "held-out records", disable=len(mine) < 1000 or args.process_index > 0):
        held_out.good_sample(i)
    if is_deepspeed_zero3_enabled():
        if trainer.is_world_process_zero():
            print("preflight left out: under ZeRO-3 no rank holds the whole model")
        return

    def trial() -> set[str] | None:
        """The names of `parameters_without_gradient`; None: memory ran out, and there is a smaller batch."""
        try:
            with torch.random.fork_rng(), in_one_call(trainer.packed_model):
                return _try_once(trainer)
        except RuntimeError as error:
            if not (should_reduce_batch_size(error) and args.batches and args.batches[1:]):
                raise
            return None

    while (untrained := on_first_rank(args, trial)) is None:
        next_batch(args, trainer.model)
        trainer._train_batch_size = args.train_batch_size
    for name in untrained:
        trainer.model.get_parameter(name).requires_grad_(False)


def _try_once(trainer: LlavaTrainer) -> set[str]:
    """See `preflight`. Returns the names of `parameters_without_gradient`."""
    # The batch, and its description
    args = trainer.args
    model = trainer.model.to(args.device).train()
    samples = longest_samples(trainer)
    batch = trainer.data_collator(samples)
    what = f"{len(samples)} of the longest records"
    if isinstance(trainer.train_dataset, PackedDataset):
        what = f"the fullest row, {batch['extras']['tokens']:,} tokens of {len(samples)} records,"
    # On a GPU, packed rows take another way than the one that was verified on the CPU
    if trainer.packed_model is not None:
        with trainer.accelerator.autocast():
            chat, dtype = trainer.data_collator.keywords["collator"].chat, precision(args)
            refuse_mixing(model, packing_difference(model.eval(), chat, trainer.packed_model, dtype))
        model.train()
    loss, untrained = _try_step(trainer, batch)
    peak = peak_memory(args.device)
    _try_saving(trainer, samples, batch["pixel_values"])

    # The memory measured, and that which the optimizer will add
    sizes, optimizer_step = state_bytes(model, args)
    update = optimizer_step + sum(parameter.nbytes for parameter in model.parameters())
    more = sum(sizes.values()) - sizes["weights"] + max(update - peak, 0)
    limit = torch.cuda.get_device_properties(args.device).total_memory if device().type == "cuda" else math.inf
    if args.batches and args.batches[1:] and peak + more > limit:
        raise torch.OutOfMemoryError("the optimizer would run out of memory.")
    print(
        f"preflight: {what} forward and backward, saved, read back alike (loss {loss:.4f}); "
        f"{peak / 1e9:.1f} GB, and {more / 1e9:.1f} GB more a rank for gradients and optimizer"
    )
    print_cost(trainer)
    return untrained


def print_cost(trainer: LlavaTrainer) -> None:
    """Prints what the run will take, by two batches behind a warm-up: its other tokens are to take as long as theirs.

    The batches are opened here; workers open theirs during the steps. Updates of the weights, the exchange between
    ranks, evaluations and saves are left out.
    """
    args, dataset, throughput = trainer.args, trainer.train_dataset, trainer.throughput
    size, workers, is_stream = args.train_batch_size, args.dataloader_num_workers, not hasattr(dataset, "__len__")
    loader = DataLoader(dataset, size, not is_stream, collate_fn=trainer.data_collator, generator=torch.Generator())
    batches = cycle(loader)
    for number in range(3):
        if number == 1:
            throughput.read()  # the warm-up's
        with throughput.waiting():
            batch = next(batches)
        _try_step(trainer, batch)
    tokens, speed, throughput.started = throughput.tokens / 2, throughput.read(), None
    # The tokens of all steps: of as many samples, or rows, as a step takes, in the mean
    if not is_stream:
        packed = isinstance(dataset, PackedDataset)
        tokens = size * (dataset.tokens if packed else count_tokens(dataset.records, dataset.chat)[:, 0]).mean()
    of_step, wait = args.gradient_accumulation_steps * args.world_size, speed["data_wait"]
    steps = args.max_steps if args.max_steps > 0 else args.num_train_epochs * len(dataset) / (size * of_step)
    total = steps * of_step * tokens
    hours = total / speed["tokens_per_second"] / 3600 * (max(1 - wait, wait / workers) if workers else 1)
    text = f"time: about {f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'} ({total / 1e6:,.3g} M tokens"
    if "mfu" in speed:
        text += f", {throughput.model_flops / 1e9:.3g} GFLOP each, at the {speed['mfu']:.0%} that two steps reached"
    text += ")"
    with suppress(Exception):  # without a GPU, or NVIDIA's library
        text += f", {torch.cuda.power_draw(args.device) / 1e6 * args.world_size * hours:.2g} kWh"
    if args.price_per_hour is not None:
        text += f", {args.price_per_hour * hours:,.2f} at --price_per_hour {args.price_per_hour:g}"
    print(text)


def _try_step(trainer: LlavaTrainer, batch: dict[str, Any]) -> tuple[float, set[str]]:
    """Forward and backward: the loss, and the names of `parameters_without_gradient`."""
    # Each gradient is checked and freed as soon as it is there
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    finite: dict[nn.Parameter, bool] = {}

    def check_gradient(parameter: nn.Parameter) -> None:
        finite[parameter] = bool(torch.isfinite(parameter.grad).all())
        parameter.grad = None  # under ZeRO-2 no rank holds all gradients

    hooks = [parameter.register_post_accumulate_grad_hook(check_gradient) for parameter in trained.values()]

    def compute_loss() -> torch.Tensor:
        with trainer.accelerator.autocast():
            return trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))

    try:
        loss = compute_loss()
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    check_losses(trainer.losses, 1)
    for name, parameter in trained.items():
        if not finite.get(parameter, True):
            raise ValueError(f"preflight: {name} gets a gradient that is not finite (loss {loss.item():.4f})")
    without = {name: parameter for name, parameter in trained.items() if parameter not in finite}
    return loss.item(), parameters_without_gradient(trainer.model, without, compute_loss) if without else set()


def _try_saving(trainer: LlavaTrainer, samples: list[Sample], pixel_values: torch.Tensor) -> None:
    """Saves model and processor, reads them back, and prepares the samples by the processor that was read."""
    folder = Path(trainer.args.output_dir) / "preflight"
    try:
        with writing(folder):
            trainer._save(str(folder))
        saved, images = AutoProcessor.from_pretrained(folder), [image for sample in samples for image in sample.images]
        ours, theirs = (
            processor.tokenizer.apply_chat_template([sample.messages for sample in samples], return_dict=False)
            for processor in (trainer.processing_class, saved)
        )
        prepared = prepare_pictures(saved.image_processor, images)["pixel_values"] if images else pixel_values
        if ours != theirs or not prepared.equal(pixel_values):
            raise ValueError("preflight: the processor is not saved as it is in memory")
    except OSError as error:
        raise ValueError(f"preflight: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parameters_without_gradient(
    model: nn.Module, without: dict[str, nn.Parameter], compute_loss: Callable[[], torch.Tensor]
) -> set[str]:
    """Finds out why parameters got no gradient, and returns the names of those that cannot train by design.

    It is an error if a parameter acts on the loss: a change of it changes the loss of the batch, and the language
    model's output for two tokens. A parameter that only chooses among tokens, as in the indexer of DeepSeek-V3.2,
    does not change the latter; an unused one changes neither. Such a parameter is not trained, unless many tokens of
    text give it a gradient: an expert that no token of the batch has reached continues to train.

    Args:
        without: the parameters that got no gradient, by name; one outside the language model is an error, too.
        compute_loss: gives the loss of the batch.
    """
    language_model = model.get_decoder()

    def text_alone(tokens: int) -> torch.Tensor:
        ids = torch.arange(tokens, device=model.device) * 7919 % language_model.config.vocab_size
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            return language_model(input_ids=ids[None], use_cache=False).last_hidden_state

    @torch.no_grad()
    def acts_on(compute: Callable[[], torch.Tensor], parameter: nn.Parameter) -> bool:
        before, original = compute(), parameter.detach().clone()
        parameter.add_(torch.randn_like(parameter) * (original.abs().mean() + 0.01))
        changed = not compute().equal(before)
        parameter.copy_(original)
        return changed

    # Parameters that have to get a gradient
    model.eval()  # without dropout
    for name, parameter in without.items():
        outside = part_of(name) != "language model" or "lm_head" in name
        if outside or (acts_on(partial(text_alone, 2), parameter) and acts_on(compute_loss, parameter)):
            raise ValueError(f"preflight: {name} gets no gradient")
    # Of the others, those without a gradient from many tokens
    many = text_alone(min(1024, context_length(language_model.config))).float().square().mean()
    gradients = torch.autograd.grad(many, list(without.values()), allow_unused=True)
    untrained = {name for name, gradient in zip(without, gradients, strict=True) if gradient is None}
    model.train()
    if untrained:
        print(
            f"not trained, since the language model by its design gives them no gradient: {len(untrained)} tensors, "
            f"for example {min(untrained)}"
        )
    return untrained
