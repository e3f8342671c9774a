"""What is measured and not assumed: of an assembled model and, before a long run, of what would fail after hours.

    python -m train_llava.checks FOLDER REFERENCES OUTCOME

is how `build_model` has its checks run in a fresh process (see `check_apart`).
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    GenerationConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks, is_deepspeed_zero3_enabled
from transformers.utils import is_liger_kernel_available

from train_llava.answers import LOGGED
from train_llava.chat import IGNORE, Chat, Processor, form_of
from train_llava.cli import writing
from train_llava.data import CheckedDataset, weights_of
from train_llava.lengths import estimate_lengths
from train_llava.memory import earlier_bytes, precision, state_bytes, update_bytes, zero_of
from train_llava.model import load_checkpoint, part_of
from train_llava.pace import peak_memory
from train_llava.packing import PackedDataset
from train_llava.parts import decoder_of, running_as_one
from train_llava.pictures import prepare_pictures
from train_llava.records import IMAGE_TOKEN
from train_llava.run_folder import base_tensors, differing_tensor, save_weights
from train_llava.template import context_length
from train_llava.trainer import LlavaTrainer

MILLION = 1_000_000  # tokens, beyond which no context is tried
# What `TrainingArguments` has and a LLaVA's training here cannot follow, or would pass over in silence
UNSUPPORTED = (
    "batch_eval_metrics",
    "debug",
    "fsdp",
    "include_for_metrics",
    "label_names",
    "label_smoothing_factor",
    "prediction_loss_only",
    "remove_unused_columns",
)


def check_together(adapter: str | None, bits: int | None, data_arguments: Any, args: TrainingArguments) -> None:
    """Refuses arguments of training that need each other, or shut each other out.

    Raises:
        ValueError: the message names them.
    """
    if adapter is not None and (args.train_type != "lora" or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "--adapter_name_or_path goes with --train_type lora, and not with ZeRO-3: merge_lora it first"
        )
    if bits and (args.train_type != "lora" or is_deepspeed_zero3_enabled()):
        raise ValueError("--bits goes with --train_type lora, and not with ZeRO-3: weights in few bits cannot train")
    for field in fields(args):
        if field.name in UNSUPPORTED and (value := getattr(args, field.name)) not in (field.default, []):
            raise ValueError(f"--{field.name} {value} is not supported: leave it out")
    weights_of(data_arguments.data_path, data_arguments.data_weights)
    if args.save_dtype != "auto" and args.train_type == "lora":
        raise ValueError("--save_dtype is for whole models, and lora writes an adapter: leave it out")
    if data_arguments.streaming and args.max_steps <= 0:
        raise ValueError("--streaming has no end: set --max_steps")
    if args.tokens_per_batch is not None:
        if not data_arguments.packing:
            raise ValueError("--tokens_per_batch fills the rows of --packing true: set it, too")
        if data_arguments.streaming:
            raise ValueError("--tokens_per_batch counts all records beforehand: not with --streaming")
    for option, given, orders in (
        ("--streaming", data_arguments.streaming, ("random",)),
        ("--tokens_per_batch", args.tokens_per_batch is not None, ("random", "sequential")),
        ("data of pictures and texts", True, ("random", "sequential", "group_by_length")),
    ):
        if given and args.train_sampling_strategy not in orders:
            raise ValueError(f"{option} not with --train_sampling_strategy {args.train_sampling_strategy}")
    if data_arguments.eval_data_path is None:
        given = {"eval_strategy": args.eval_strategy != "no", "save_strategy best": args.save_strategy == "best"}
        given |= {name: getattr(data_arguments, name) for name in ("eval_answers", "eval_image_dir")}
        given |= {name: getattr(args, name) for name in ("early_stopping_patience", "eval_on_start")}
        if any(given.values()):
            raise ValueError(f"--{next(filter(given.get, given))} takes held-out data: set --eval_data_path")


def check_batches(number: int, args: TrainingArguments) -> None:
    """Refuses data, so many records or packed rows, of which `--dataloader_drop_last` leaves nothing.

    Raises:
        ValueError: they are less than one batch on every rank.
    """
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and number < batch:
        raise ValueError(f"--dataloader_drop_last leaves nothing of {number} records: all ranks' batch is {batch}")


def check_options(args: TrainingArguments, model: nn.Module, eval_answers: int) -> None:
    """Asks the libraries for what the arguments name, before data is read or anything written.

    Raises:
        ValueError: there is nothing of that name, or it needs a package that is not installed.
    """
    measured, metric = ["loss", *LOGGED] if eval_answers else ["loss"], args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise ValueError(f"--metric_for_best_model {metric}: this run measures {', '.join(measured)}")
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError("--use_liger_kernel needs a package that is not installed: pip install liger-kernel")
    scheduled = (args.lr_scheduler_type, SGD([torch.zeros(1)]), 1, 2, args.lr_scheduler_kwargs)
    compiled = {"mode": args.torch_compile_mode, "backend": args.torch_compile_backend}
    options = ("num_workers", "prefetch_factor", "persistent_workers", "multiprocessing_context")
    loading = {option: getattr(args, f"dataloader_{option}") for option in options}
    asked = {
        "optim": lambda: Trainer.get_optimizer_cls_and_kwargs(args, model),
        "lr_scheduler_type": lambda: get_scheduler(*scheduled),
        "report_to": lambda: [callback() for callback in get_reporting_integration_callbacks(args.report_to)],
        "torch_compile": lambda: args.torch_compile and torch.compile(nn.Identity(), **compiled),
        "dataloader_num_workers": lambda: DataLoader([0], **loading),
    }
    for name, ask in asked.items():
        try:
            ask()
        except (RuntimeError, TypeError, ValueError) as error:
            value = getattr(args, name)
            raise ValueError(f"--{name} {getattr(value, 'value', value)}, or what goes with it: {error}") from error


def longest_items(trainer: LlavaTrainer) -> list[dict[str, Any]]:
    """A batch's number of the longest good records, by their tokens, the fullest row, or a stream's first.

    Those that seem the longest (see `estimate_lengths`) are tokenised, until there are 64 more good ones.
    """
    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if isinstance(dataset, PackedDataset):
        return dataset[int(dataset.tokens.argmax())]
    if not isinstance(dataset, CheckedDataset):
        return list(islice(dataset, size))
    tokens: dict[int, int] = {}
    for i in np.argsort(-estimate_lengths(dataset.dataset, dataset.chat), kind="stable"):
        if (item := dataset.good_item(int(i))) is not None:
            tokens[int(i)] = len(item["input_ids"])
        if len(tokens) == size + 64:
            break
    longest = sorted(tokens, key=lambda i: -tokens[i])[:size]
    return [dataset[i] for i in longest or [0]]  # where none is good, [0] says so


def preflight(trainer: LlavaTrainer) -> None:
    """Tries forward, backward, saving and reading back on one rank, and says what memory the run will take.

    The model's weights, and the random numbers that the run will draw, stay as they are. Held-out records are all
    looked at, whose first evaluation may be hours away.

    Raises:
        ValueError: the loss or a gradient is missing or not finite, or what is saved is not what is in memory; or too
            many held-out records are bad.
    """
    args, held_out = trainer.args, trainer.eval_dataset
    mine = range(args.process_index, len(held_out or ()), args.world_size)
    for i in tqdm(mine, "held-out records", disable=len(mine) < 1000 or args.process_index > 0):
        held_out.good_item(i)
    untrained: list[set[str]] = [set()]
    if trainer.is_world_process_zero():
        if is_deepspeed_zero3_enabled():
            print("preflight left out: under ZeRO-3 no rank holds the whole model")
        else:
            with torch.random.fork_rng():
                untrained = [_try_once(trainer)]
    for name in broadcast_object_list(untrained)[0]:
        trainer.model.get_parameter(name).requires_grad_(False)


def _try_once(trainer: LlavaTrainer) -> set[str]:
    """See `preflight`. Returns the names of the parameters that are not to train: see `unreached_parameters`."""
    args = trainer.args
    model = trainer.model.to(args.device).train()
    items = longest_items(trainer)
    batch = trainer.data_collator(items)
    what = f"{len(items)} of the longest records"
    if isinstance(trainer.train_dataset, PackedDataset):
        what = f"the fullest row, {batch['size'][0]:,} tokens of {len(items)} records,"
    pixel_values = batch["pixel_values"]
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    finite: dict[nn.Parameter, bool] = {}

    def check_gradient(parameter: nn.Parameter) -> None:
        finite[parameter] = bool(torch.isfinite(parameter.grad).all())
        parameter.grad = None  # under ZeRO-2 no rank holds all gradients

    hooks = [parameter.register_post_accumulate_grad_hook(check_gradient) for parameter in trained.values()]

    def compute_loss() -> torch.Tensor:
        with trainer.accelerator.autocast():
            return trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))

    loss = compute_loss()
    loss.backward()
    for hook in hooks:
        hook.remove()
    for name, parameter in trained.items():
        if not finite.get(parameter, True):
            raise ValueError(f"preflight: {name} gets a gradient that is not finite (loss {loss.item():.4f})")
    without = {name: parameter for name, parameter in trained.items() if parameter not in finite}
    untrained = unreached_parameters(model, without, compute_loss) if without else set()
    peak = peak_memory(args.device)

    folder = Path(args.output_dir) / "preflight"
    try:
        with writing(folder):
            trainer._save(str(folder))
        saved, images = AutoProcessor.from_pretrained(folder), [image for item in items for image in item["images"]]
        ours, theirs = (
            processor.tokenizer.apply_chat_template([item["messages"] for item in items], return_dict=False)
            for processor in (trainer.processing_class, saved)
        )
        prepared = prepare_pictures(saved.image_processor, images)["pixel_values"] if images else pixel_values
        if ours != theirs or not prepared.equal(pixel_values):
            raise ValueError("preflight: the processor is not saved as it is in memory")
    except OSError as error:
        raise ValueError(f"preflight: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    dtype, (zero, offload) = precision(args), zero_of(args)
    kept = state_bytes(model, dtype, args.world_size, zero, offload)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    update = weights + update_bytes(model, dtype, args.world_size, zero, offload)
    gradients = kept["gradients"] + earlier_bytes(args, kept["gradients"])
    more = gradients + kept["optimizer"] + max(update - peak, 0)
    print(
        f"preflight: {what} forward and backward, saved, read back alike (loss {loss.item():.4f}); "
        f"{peak / 1e9:.1f} GB, and {more / 1e9:.1f} GB more a rank for gradients and optimizer"
    )
    return untrained


def unreached_parameters(
    model: nn.Module, without: dict[str, nn.Parameter], compute_loss: Callable[[], torch.Tensor]
) -> set[str]:
    """Tells why parameters got no gradient, and returns the names of those that are not to train.

    A fault is one that acts on the loss: where it is changed, so is the loss of the batch, and so is what the language
    model alone makes of two tokens. What only chooses among tokens, as the indexer of DeepSeek-V3.2 does, has nothing
    to choose among two, and what nothing reads changes neither. These are not trained by design, unless many tokens
    of text alone give them a gradient: an expert that no token of the batch has reached goes on training.

    Args:
        without: the parameters that got no gradient, by name.
        compute_loss: gives the loss of the batch.

    Raises:
        ValueError: one of them acts on the loss, or is no part of the language model; the message names it.
    """
    language_model = next(m for name, m in model.named_modules() if name.endswith("model.language_model"))

    def text_alone(tokens: int) -> torch.Tensor:
        ids = torch.arange(tokens, device=model.device) * 7919 % language_model.config.vocab_size
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            return language_model(input_ids=ids[None], use_cache=False).last_hidden_state

    @torch.no_grad()
    def acts_on(compute: Callable[[], torch.Tensor], parameter: nn.Parameter) -> bool:
        before, held = compute(), parameter.detach().clone()
        parameter.add_(torch.randn_like(parameter) * (held.abs().mean() + 0.01))
        changed = not compute().equal(before)
        parameter.copy_(held)
        return changed

    training = model.training
    model.eval()  # without dropout
    for name, parameter in without.items():
        outside = part_of(name) != "language model" or "lm_head" in name
        if outside or (acts_on(partial(text_alone, 2), parameter) and acts_on(compute_loss, parameter)):
            raise ValueError(f"preflight: {name} gets no gradient")
    many = text_alone(min(1024, context_length(language_model.config))).float().square().mean()
    gradients = torch.autograd.grad(many, list(without.values()), allow_unused=True)
    untrained = {name for name, gradient in zip(without, gradients, strict=True) if gradient is None}
    model.train(training)
    if untrained:
        print(
            f"not trained, since the language model by its design gives them no gradient: {len(untrained)} tensors, "
            f"{min(untrained)} for one"
        )
    return untrained


def example_inputs(processor: Processor) -> tuple[torch.Tensor, torch.Tensor]:
    """For the checks: a text-only question `(1, T)`, and a square and a wide noise picture, or the tiles of both,
    `(N, 3, H, W)`."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    input_ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((64, 64, 3), (48, 160, 3))]
    return input_ids, processor.image_processor(pictures, return_tensors="pt")["pixel_values"].flatten(0, -4)


@torch.inference_mode()
def reference_outputs(
    vision_tower: PreTrainedModel, language_model: PreTrainedModel, processor: Processor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two models say alone: logits `(1, T, vocabulary)` and hidden states `(N, tokens, width)`."""
    input_ids, pixel_values = example_inputs(processor)
    logits = language_model(input_ids=input_ids).logits
    features = vision_tower(pixel_values.to(vision_tower.dtype), output_hidden_states=True).hidden_states[layer]
    return logits, features


@torch.inference_mode()
def check_text_path(language_model: PreTrainedModel, processor: Processor) -> None:
    """Makes sure that a language model does no more with a text than a LLaVA does: its embedding's rows into its
    decoder, the decoder's states into its output layer.

    In half precision a scale or a cap can be smaller than the noise of logits. So the output layer's first rows get
    large states, in float32.

    Raises:
        ValueError: it does more; the message says where.
    """
    input_ids, decoder = example_inputs(processor)[0], decoder_of(language_model)
    embeds = language_model.get_input_embeddings()(input_ids)
    ours, theirs = (
        decoder(**inputs, use_cache=False).last_hidden_state
        for inputs in ({"inputs_embeds": embeds}, {"input_ids": input_ids})
    )
    if not (scaled := difference(ours, theirs)) <= tolerance(torch.float32):
        raise ValueError(
            f"a {decoder.config.model_type} does more with a text's embeddings than its decoder does "
            f"(states differ by {scaled:.0e} of the largest), and a LLaVA has no place for that"
        )

    whole = language_model.get_output_embeddings()
    head = nn.Linear(whole.weight.shape[1], min(64, len(whole.weight)), bias=False)
    head.weight.copy_(whole.weight[: head.out_features])
    states = torch.randn(*input_ids.shape, head.in_features, generator=torch.Generator().manual_seed(0))
    states *= 1e4 / head(states).abs().max()
    models = [m for m in language_model.modules() if isinstance(m, PreTrainedModel) and m is not language_model]
    hooks = [m.register_forward_hook(lambda *args: args[-1] | {"last_hidden_state": states}) for m in models]
    language_model.set_output_embeddings(head)
    try:
        logits = language_model(input_ids=input_ids, use_cache=False).logits
    finally:
        language_model.set_output_embeddings(whole)
        for hook in hooks:
            hook.remove()
    if not (scaled := difference(logits, head(states))) <= tolerance(torch.float32):
        raise ValueError(
            f"the logits of a {decoder.config.model_type} are not those of its output layer alone (they differ by "
            f"{scaled:.0e} of the largest): a LLaVA has no place for a scale, a cap or another layer"
        )


def check_apart(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> list[tuple[str, str]]:
    """`check_checkpoint` in a fresh process, which sees the model as every later command does.

    Raises:
        ValueError: see `check_checkpoint`.
    """
    with TemporaryDirectory() as scratch:
        references, outcome = Path(scratch, "references.safetensors"), Path(scratch, "outcome.json")
        save_file({"logits": logits.contiguous(), "features": features.contiguous()}, references)
        command = [sys.executable, "-m", "train_llava.checks", folder.absolute(), references, outcome]
        ended = subprocess.run(command, cwd=Path(__file__).parent.parent, check=False).returncode
        if not outcome.exists():
            raise ValueError(f"the checks of {folder} did not end: exit code {ended}")
        found = json.loads(outcome.read_text())
    if "error" in found:
        raise ValueError(found["error"])
    return found["rows"]


@running_as_one()
@torch.inference_mode()
def check_checkpoint(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> list[tuple[str, str]]:
    """Reads a saved LLaVA back and measures what is claimed of it: that it is its two parts (see `reference_outputs`),
    what it learns and generates from, and what it gives in a batch.

    Returns the outcome as rows of (what was checked, what was found).

    Raises:
        ValueError: a check failed; the message names it.
    """
    model, processor = load_checkpoint(str(folder))
    config, tokenizer, chat = model.config, processor.tokenizer, Chat(processor)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id or config.image_token_id >= rows:
        raise ValueError(f"{IMAGE_TOKEN} has no row of its own: {len(tokenizer)} tokens, {rows} embedding rows")
    outcome = [
        ("tokenizer and embedding", f"{len(tokenizer)} tokens, {rows} rows, {IMAGE_TOKEN} is {config.image_token_id}")
    ]

    input_ids, pixel_values = example_inputs(processor)
    our_logits = model(input_ids=input_ids).logits[..., : logits.shape[-1]]
    outcome.append(("text-only logits", _equal("text-only logits", our_logits, logits)))
    hidden = model.model.vision_tower(pixel_values.to(model.dtype), output_hidden_states=True).hidden_states
    outcome.append(("vision features", _equal("vision features", hidden[config.vision_feature_layer], features)))
    outcome += check_conversations(chat, model.generation_config)
    packed, equal = packing_difference(model, chat)
    packs = "equal" if equal else "not equal: training refuses --packing"
    outcome.append(("packed against alone", f"{packs} (difference {packed:.0e})"))
    length = min(tokenizer.model_max_length, MILLION)
    for name, what, found in (
        ("batched against single", "in a batch", batching_difference(model, processor)),
        (
            "cached against uncached",
            f"with a cache, in {length:,} tokens,",
            cached_difference(model, input_ids, length),
        ),
        ("short beside long", f"beside a text of {length:,} tokens", longest_difference(model, input_ids, length)),
    ):
        if not found <= tolerance(model.dtype):
            raise ValueError(f"{what} its logits differ from those alone by {found:.0e} of the largest")
        outcome.append((name, f"equal (difference {found:.0e})"))

    again, written = folder / "again", base_tensors(str(folder))
    save_weights(model, again, base=written)
    if (name := differing_tensor(again, written)) is not None:
        raise ValueError(f"opened and saved again, its {name} is another")
    shutil.rmtree(again)
    outcome.append(("opened and saved again", f"{len(written)} tensors, the same to the bit"))

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.new("RGB", (160, 48), "red")
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.dtype)
    written = int((inputs["input_ids"] == config.image_token_id).sum())
    pictures = {name: inputs[name] for name in processor.image_processor.model_input_names}
    given = len(model.get_image_features(**pictures).pooler_output[0])
    if written != given:
        raise ValueError(f"the processor writes {written} {IMAGE_TOKEN} tokens a picture, the tower gives {given}")
    outcome.append(("tokens a picture", f"{written} written, {given} features"))

    # What all layers compute was compared above; a large picture's tokens would take minutes through them on a CPU.
    for modules in model.model.language_model.modules():
        if isinstance(modules, nn.ModuleList) and len(modules) == config.text_config.num_hidden_layers:
            del modules[1:]
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    outcome.append(("a picture and a question", f"{answer.shape[1] - inputs['input_ids'].shape[1]} tokens generated"))
    return outcome


def check_claims(model: nn.Module, processor: Processor, packing: bool) -> None:
    """Measures, on a model that may have been assembled elsewhere, what training claims of it.

    Raises:
        ValueError: see `check_conversations`; or `packing` is asked for and the model cannot keep conversations apart.
    """
    chat = Chat(processor)
    check_conversations(chat, model.generation_config)
    if packing and not is_deepspeed_zero3_enabled():  # where no rank holds the whole model
        packed, equal = packing_difference(model, chat)
        if not equal:
            raise ValueError(
                f"--packing: a {model.config.text_config.model_type} does not keep the conversations of a row apart "
                f"(logits differ by {packed:.0e} of the largest from those of each alone)"
            )


def conversation(*texts: str) -> list[dict[str, Any]]:
    """Messages of alternating questions and answers, a picture in front of the first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": [{"type": "text", "text": text}]} for i, text in enumerate(texts)]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def check_conversations(chat: Chat, generation_config: GenerationConfig) -> list[tuple[str, str]]:
    """Makes sure, on conversations of one and of two turns, that what is learnt is each answer and the token that ends
    its turn, that generation stops at these, and that it begins from the same tokens as the answer had in training.

    Returns the outcome as rows of (what was checked, what was found).

    Raises:
        ValueError: one of these is not so; the message says what.
    """
    tokenizer, stops = chat.tokenizer, generation_config.eos_token_id
    ends, picture = [], Image.new("RGB", (8, 8))
    for texts in (("What is this?", "A red square."), ("What is this?", "A red square.", "And this?", "It is blue.")):
        messages = conversation(*texts)
        input_ids, labels = chat.encode(messages, [picture.size])
        learnt = np.flatnonzero(labels != IGNORE)
        runs = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
        if len(runs) != len(texts) // 2:
            raise ValueError(f"{len(runs)} stretches are learnt of a conversation with {len(texts) // 2} answers")
        for i, run in enumerate(runs):
            end = tokenizer.convert_ids_to_tokens(int(input_ids[run[-1]]))
            if tokenizer.decode(input_ids[run[:-1]]).strip() != texts[2 * i + 1]:
                raise ValueError(f"{tokenizer.decode(input_ids[run])!r} is learnt as the answer {texts[2 * i + 1]!r}")
            if input_ids[run[-1]] not in (stops if isinstance(stops, list) else [stops]):
                raise ValueError(f"answers are taught to end with {end}, and generation does not stop there")
            prompt = chat.prompts([messages[: 2 * i + 1]], [picture])["input_ids"][0].tolist()
            if prompt != input_ids[: run[0]].tolist():
                raise ValueError(
                    f"generation begins from {tokenizer.decode(prompt[-8:])!r}, and in training the answer followed "
                    f"{tokenizer.decode(input_ids[max(0, run[0] - 8) : run[0]])!r}"
                )
            ends.append(end)
    opening = chat.pieces(form_of(messages[:1]), answer_next=True)[-1]
    return [
        ("what is learnt", f"each answer with {' or '.join(dict.fromkeys(ends))}, where generation stops"),
        ("generation prompt", f"as in training, {opening!r}"),
    ]


@torch.inference_mode()
def packing_difference(model: nn.Module, chat: Chat) -> tuple[float, bool]:
    """How much the logits of two conversations in a row differ from those of each alone, and whether it is noise.

    Some architectures cannot tell one conversation from the next by `position_ids`: those with linear attention or
    convolutions, and those that make their masks without them. What stands in front of a conversation may change its
    logits by three times of what the text behind one does, which nothing sees. Neither may exceed the precision.
    """
    rows = []
    for question, answer in (("What is the capital of France?", "Paris."), ("Name a colour.", "Red, or blue.")):
        messages = conversation(question, answer)
        messages[0]["content"].pop(0)
        rows.append(torch.from_numpy(chat.encode(messages)[0])[None].to(model.device))
    first, second = rows
    position_ids = torch.cat([torch.arange(row.shape[1], device=model.device) for row in rows])[None]

    def packed(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = model(input_ids=torch.cat(rows, dim=1), position_ids=position_ids, use_cache=False).logits
        return logits.split([row.shape[1] for row in rows], dim=1)

    front, behind = packed(first, second)
    noise = difference(packed(first, second.flip(1))[0], front)
    leak = difference(packed(first.flip(1), second)[1], behind)
    alone = [
        difference(ours, model(input_ids=row, use_cache=False).logits)
        for ours, row in ((front, first), (behind, second))
    ]
    within = all(found <= tolerance(model.dtype) for found in (noise, *alone))
    return max(leak, *alone), within and leak <= max(1e-5, 3 * noise)


@torch.inference_mode()
def batching_difference(model: nn.Module, processor: Processor) -> float:
    """The largest difference of the next token's logits between two questions alone and in one batch, padded as plain
    transformers does, of the largest logit."""
    texts = [
        processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in ("What is the capital of France?", "Hello")
    ]

    def last_logits(texts: list[str]) -> torch.Tensor:
        inputs = processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt").to(model.device)
        # as generation counts positions, without the padding
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return model(**inputs, position_ids=position_ids).logits[:, -1]

    return difference(last_logits(texts), torch.cat([last_logits([text]) for text in texts]))


@torch.inference_mode()
def cached_difference(model: nn.Module, input_ids: torch.Tensor, length: int) -> float:
    """The largest difference of a text's logits between reading it at once and, with the cache, one token after
    the other, as the first and as the last of so many tokens."""
    sizes, found = [input_ids.shape[1] - 4, 1, 1, 1, 1], []
    for start in (0, length - input_ids.shape[1]):
        position_ids = torch.arange(start, start + input_ids.shape[1])[None]
        whole = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        cache, logits = None, []
        for ids, positions in zip(input_ids.split(sizes, 1), position_ids.split(sizes, 1), strict=True):
            output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        found.append(difference(torch.cat(logits, dim=1), whole))
    return max(found)


@torch.inference_mode()
def longest_difference(model: nn.Module, input_ids: torch.Tensor, length: int) -> float:
    """The largest difference of a text's logits between beside a copy of itself and beside one that is the last of so
    many tokens: rotations may be chosen by the longest text of a batch."""
    short = torch.arange(input_ids.shape[1])
    ours, theirs = (
        model(input_ids=input_ids.expand(2, -1), position_ids=torch.stack([short, other]), use_cache=False).logits[0]
        for other in (short + length - len(short), short)
    )
    return difference(ours, theirs)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def tolerance(dtype: torch.dtype) -> float:
    """What a precision's noise may come to, as `difference` counts."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def _equal(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """States the difference; past the precision's noise it is an error."""
    relative = difference(ours, theirs)
    if not relative <= tolerance(theirs.dtype):
        raise ValueError(
            f"the {name} differ from the part's own by {relative:.0e} of the largest: this architecture does "
            "something that a LLaVA of transformers does not"
        )
    return f"equal to the part's own (difference {relative:.0e})"


def main() -> None:
    folder, references, outcome = map(Path, sys.argv[1:])
    try:
        found: dict[str, Any] = {"rows": check_checkpoint(folder, **load_file(references))}
    except (OSError, ValueError) as error:
        found = {"error": str(error)}
    outcome.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
