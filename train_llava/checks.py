"""Before a long run, what would fail after hours is tried once: a step, saving, and reading back what was saved."""

import resource
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import GenerationConfig, LlavaProcessor, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.chat import IGNORE, Chat, form_of
from train_llava.data import CheckedDataset
from train_llava.model import count_parameters, load_checkpoint
from train_llava.records import IMAGE_TOKEN
from train_llava.run_folder import read_back
from train_llava.trainer import LlavaTrainer


def longest_batch(trainer: LlavaTrainer) -> dict[str, Any]:
    """One rank's batch of the longest records of the data, or of a stream's first."""
    dataset, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    if isinstance(dataset, CheckedDataset):
        items = [dataset[int(i)] for i in np.argsort(dataset.dataset.lengths())[-size:]]
    else:
        items = list(islice(dataset, size))
    batch = trainer.data_collator(items)
    return trainer._prepare_inputs(batch)


def loss_of(trainer: LlavaTrainer, model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """The loss of a batch, in the precision that the run computes in."""
    with trainer.accelerator.autocast():
        return trainer.compute_loss(model, dict(batch))


def peak_memory(device: torch.device) -> int:
    """The most memory used so far, in bytes: of the GPU, or, without one, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def preflight(trainer: LlavaTrainer, load_base: Callable[[], tuple[nn.Module, Any]]) -> None:
    """Tries forward, backward, saving and reading back on one rank, and says what memory the run will take.

    The model's weights, and the random numbers that the run will draw, stay as they are. `load_base` opens, once more,
    the checkpoint that the run starts from: a saved adapter is read back on top of it.

    Raises:
        ValueError: the loss or a gradient is missing or not finite, or the saved model is not the one in memory.
    """
    if trainer.is_world_process_zero():
        if is_deepspeed_zero3_enabled():
            print("preflight left out: under ZeRO-3 no rank holds the whole model")
        else:
            with torch.random.fork_rng():
                _try_once(trainer, load_base)
    trainer.accelerator.wait_for_everyone()


def _try_once(trainer: LlavaTrainer, load_base: Callable[[], tuple[nn.Module, Any]]) -> None:
    args = trainer.args
    model = trainer.model.to(args.device).train()
    batch = longest_batch(trainer)
    loss = loss_of(trainer, model, batch)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not torch.isfinite(parameter.grad).all()):
            fault = "no gradient" if parameter.grad is None else "a gradient that is not finite"
            raise ValueError(f"preflight: {name} gets {fault} (loss {loss.item():.4f})")
    model.zero_grad()
    peak = peak_memory(args.device)

    folder = Path(args.output_dir) / "preflight"
    try:
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        read_back(folder, model)
        with torch.no_grad():
            expected = loss_of(trainer, model.eval(), batch).item()
            if isinstance(model, PeftModel):
                base, _ = load_base()
                again = PeftModel.from_pretrained(base, folder)
            else:
                again, _ = load_checkpoint(str(folder), "auto")
            found = loss_of(trainer, again.to(args.device).eval(), batch).item()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not abs(found - expected) <= (1e-4 if model.dtype == torch.float32 else 2e-2) * abs(expected):
        raise ValueError(f"preflight: the loss is {expected:.6f}, and {found:.6f} once saved and read back")

    trains = sum(trainable for trainable, _ in count_parameters(model).values())
    # AdamW's two moments and, under DeepSpeed, the fp32 weights, each rank holding its part of them under ZeRO
    optimizer = trains * (12 / args.world_size if trainer.is_deepspeed_enabled else 8)
    print(
        f"preflight: {len(batch['labels'])} of the longest records forward and backward, saved, read back alike (loss "
        f"{expected:.4f}); {peak / 1e9:.1f} GB, and {optimizer / 1e9:.1f} GB more a rank for the optimizer"
    )


def example_inputs(processor: LlavaProcessor) -> tuple[torch.Tensor, torch.Tensor]:
    """For the checks: a text-only question `(1, T)`, and a square and a wide noise picture `(2, 3, H, W)`."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    input_ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in ((64, 64, 3), (48, 160, 3))]
    return input_ids, processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def reference_outputs(
    vision_tower: PreTrainedModel, language_model: PreTrainedModel, processor: LlavaProcessor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two models say alone: logits `(1, T, vocabulary)` and hidden states `(2, tokens, width)`."""
    input_ids, pixel_values = example_inputs(processor)
    logits = language_model(input_ids=input_ids).logits
    features = vision_tower(pixel_values.to(vision_tower.dtype), output_hidden_states=True).hidden_states[layer]
    return logits, features


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
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id or len(tokenizer) > rows:
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
    packed = packing_difference(model, chat)
    packs = "equal" if packed <= tolerance(model.dtype) else "not equal: training refuses --packing"
    outcome.append(("packed against alone", f"{packs} (difference {packed:.0e})"))
    batched = batching_difference(model, processor)
    if not batched <= tolerance(model.dtype):
        raise ValueError(f"in a batch its logits differ from those alone by {batched:.0e} of the largest")
    outcome.append(("batched against single", f"equal (difference {batched:.0e})"))

    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    picture = Image.new("RGB", (160, 48), "red")
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.dtype)
    written = int((inputs["input_ids"] == config.image_token_id).sum())
    given = len(model.get_image_features(inputs["pixel_values"]).pooler_output[0])
    if written != given:
        raise ValueError(f"the processor writes {written} {IMAGE_TOKEN} tokens a picture, the tower gives {given}")
    outcome.append(("tokens a picture", f"{written} written, {given} features"))

    # What all layers compute was compared above; a large picture's tokens would take minutes through them on a CPU.
    model.model.language_model.layers = model.model.language_model.layers[:1]
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    outcome.append(("a picture and a question", f"{answer.shape[1] - inputs['input_ids'].shape[1]} tokens generated"))
    return outcome


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
    ends: list[str] = []
    for texts in (("What is this?", "A red square."), ("What is this?", "A red square.", "And this?", "It is blue.")):
        messages = conversation(*texts)
        input_ids, labels = chat.encode(messages)
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
            prompt = chat.prompts([messages[: 2 * i + 1]], [Image.new("RGB", (8, 8))])["input_ids"][0].tolist()
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
def packing_difference(model: nn.Module, chat: Chat) -> float:
    """The largest difference of logits between two conversations alone and packed into one row, of the largest logit.

    Some architectures cannot tell one conversation from the next by `position_ids`: those with linear attention or
    convolutions, and those that make their masks without them.
    """
    texts = ("What is the capital of France?", "Paris."), ("Name a colour.", "Red, or blue, as you like it.")
    rows = []
    for question, answer in texts:
        messages = conversation(question, answer)
        messages[0]["content"].pop(0)
        rows.append(torch.from_numpy(chat.encode(messages)[0])[None].to(model.device))
    position_ids = torch.cat([torch.arange(row.shape[1], device=model.device) for row in rows])[None]
    alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    packed = model(input_ids=torch.cat(rows, dim=1), position_ids=position_ids, use_cache=False).logits
    return difference(packed, alone)


@torch.inference_mode()
def batching_difference(model: nn.Module, processor: LlavaProcessor) -> float:
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
