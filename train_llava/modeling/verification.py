"""What is measured and not assumed: of an assembled model and, before a long run, of what would fail after hours.

    python -m train_llava.checks FOLDER REFERENCES OUTCOME

is how `build_model` has its checks run in a fresh process (see `verify_in_fresh_process`).
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.chat import IGNORE, Chat, Processor, turn_structure
from train_llava.cli import ROOT
from train_llava.model import load_checkpoint
from train_llava.modeling.parts import decoder_of, running_as_one
from train_llava.modeling.weights import base_tensors, differing_tensor, save_weights
from train_llava.records import IMAGE_TOKEN

MILLION = 1_000_000  # tokens, beyond which no context is tried


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
def verify_text_path(language_model: PreTrainedModel, processor: Processor) -> None:
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


def verify_in_fresh_process(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> list[tuple[str, str]]:
    """`verify_checkpoint` in a fresh process, which sees the model as every later command does.

    Raises:
        ValueError: see `verify_checkpoint`.
    """
    with TemporaryDirectory() as scratch:
        references, outcome = Path(scratch, "references.safetensors"), Path(scratch, "outcome.json")
        save_file({"logits": logits.contiguous(), "features": features.contiguous()}, references)
        command = [sys.executable, "-m", "train_llava.modeling.verification", folder.absolute(), references, outcome]
        ended = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not outcome.exists():
            raise ValueError(f"the checks of {folder} did not end: exit code {ended}")
        found = json.loads(outcome.read_text())
    if "error" in found:
        raise ValueError(found["error"])
    return found["rows"]


@running_as_one()
@torch.inference_mode()
def verify_checkpoint(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> list[tuple[str, str]]:
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
    outcome += verify_conversations(chat, model.generation_config)
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


def verify_for_training(model: nn.Module, processor: Processor, packing: bool) -> None:
    """Measures, on a model that may have been assembled elsewhere, what training claims of it.

    Raises:
        ValueError: see `verify_conversations`; or `packing` is set and the model mixes packed conversations.
    """
    chat = Chat(processor)
    verify_conversations(chat, model.generation_config)
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


def verify_conversations(chat: Chat, generation_config: GenerationConfig) -> list[tuple[str, str]]:
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
    opening = chat.pieces(turn_structure(messages[:1]), answer_next=True)[-1]
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
        found: dict[str, Any] = {"rows": verify_checkpoint(folder, **load_file(references))}
    except (OSError, ValueError) as error:
        found = {"error": str(error)}
    outcome.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
