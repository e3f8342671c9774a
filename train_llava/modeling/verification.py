"""Verifies a LLaVA by measuring it: against its two parts, and what training and generation rely on.

A check that fails raises a ValueError that names what is wrong.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from train_llava.chat import IGNORE, Chat, Processor, chat_of, turn_structure
from train_llava.cli import ROOT
from train_llava.model import Llava, load_checkpoint
from train_llava.modeling.attention import in_one_call, packed_arguments
from train_llava.modeling.parts import decoder_of, running_as_one
from train_llava.modeling.towers import tower_features
from train_llava.modeling.weights import base_tensors, differing_tensor, save_weights
from train_llava.records import IMAGE_TOKEN, to_messages

Rows = list[tuple[str, str]]  # of the table that `build_model` prints: (what was checked, the outcome)
MILLION = 1_000_000  # tokens; no longer context is tried
CONVERSATION = ("What is this?", "A red square.", "And this?", "It is blue.")
PACKED = (("What is the capital of France?", "Paris."), ("Name a colour.", "Red, or blue."))


# Called by the commands


@torch.inference_mode()
def reference_outputs(
    vision_tower: PreTrainedModel, language_model: PreTrainedModel, processor: Processor, layer: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the two models alone: logits `(1, T, vocabulary)` and the tower's features `(N, tokens, width)`."""
    input_ids, pixel_values = example_inputs(processor)
    logits = language_model(input_ids=input_ids).logits
    output = vision_tower(pixel_values.to(vision_tower.dtype), output_hidden_states=True)
    return logits, tower_features(output, layer)


def verify_in_fresh_process(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> Rows:
    """Calls `verify_checkpoint` in a fresh process, which sees the model as every later command does."""
    with TemporaryDirectory() as scratch:
        # The two models' outputs go to the process in a file, where it puts its result
        exchange = Path(scratch, "exchange.pt")
        torch.save((logits, features), exchange)
        command = [sys.executable, "-m", __name__, folder.absolute(), exchange]
        exit_code = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = torch.load(exchange)
    if isinstance(rows, tuple):  # the outputs still
        raise ValueError(f"the checks of {folder} did not end: exit code {exit_code}")
    if isinstance(rows, str):  # an error
        raise ValueError(rows)
    return rows


def main() -> None:
    """The fresh process of `verify_in_fresh_process`."""
    folder, exchange = map(Path, sys.argv[1:])
    try:
        rows: Rows | str = verify_checkpoint(folder, *torch.load(exchange))
    except (OSError, ValueError) as error:
        rows = str(error)
    torch.save(rows, exchange)


@running_as_one()
@torch.inference_mode()
def verify_checkpoint(folder: Path, logits: torch.Tensor, features: torch.Tensor) -> Rows:
    """Opens a saved LLaVA and verifies it against the two models' `reference_outputs`: a function for each row."""
    # The LLaVA's own outputs on the same inputs
    model, processor = load_checkpoint(str(folder))
    input_ids, layer = example_inputs(processor)[0], getattr(model.config, "vision_feature_layer", None)
    our_logits, our_features = reference_outputs(model.get_encoder("image"), model, processor, layer)
    our_logits = our_logits[..., : logits.shape[-1]]

    # The table, in the order in which the checks run; packing is only reported
    chat, length = chat_of(processor), min(processor.tokenizer.model_max_length, MILLION)
    cached, longer = f"with a cache, in {length:,} tokens,", f"beside a text of {length:,} tokens"
    packed, keeps_apart = packing_difference(model, chat)
    packs = "equal" if keeps_apart else "not equal: training refuses --packing"
    return [
        ("tokenizer and embedding", verify_embedding(model, processor)),
        ("text-only logits", verify_part("text-only logits", our_logits, logits)),
        ("vision features", verify_part("vision features", our_features, features)),
        *verify_conversations(chat, model.generation_config),
        ("packed against alone", f"{packs} (difference {packed:.0e})"),
        ("batched against single", verify_noise("in a batch", batching_difference(model, processor), model)),
        ("cached against uncached", verify_noise(cached, cached_difference(model, input_ids, length), model)),
        ("short beside long", verify_noise(longer, longest_difference(model, input_ids, length), model)),
        ("opened and saved again", verify_second_save(model, folder)),
        ("tokens a picture", verify_image_tokens(model, processor)),
        ("a picture and a question", verify_generation(model, processor)),
    ]


def verify_for_training(model: nn.Module, processor: Processor, packing: bool) -> None:
    """Verifies what training relies on, on a model that may have been assembled elsewhere."""
    chat = chat_of(processor)
    verify_conversations(chat, model.generation_config)
    if packing and not is_deepspeed_zero3_enabled():  # under ZeRO-3 no rank holds the whole model
        refuse_mixing(model, packing_difference(model, chat))


def refuse_mixing(model: nn.Module, measured: tuple[float, bool]) -> None:
    """Refuses `--packing` if `packing_difference` measured more than noise."""
    apart, equal = measured
    if not equal:
        kind = model.config.text_config.model_type
        raise ValueError(f"--packing: a {kind} mixes the conversations of a row (logits differ by {apart:.0e})")


@torch.inference_mode()
def verify_text_path(language_model: PreTrainedModel, processor: Processor) -> None:
    """Verifies that a language model does no more with a text than a LLaVA does.

    A LLaVA puts its embedding's rows into its decoder, and the decoder's states into its output layer. In
    half precision a scale or a cap of the logits can be smaller than their noise. So the check runs a small
    output layer on large states, in float32.
    """
    input_ids, decoder = example_inputs(processor)[0], decoder_of(language_model)
    model_type = decoder.config.model_type

    # The decoder: from ids and from the embedding's rows
    embeds = language_model.get_input_embeddings()(input_ids)
    from_embeds = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    from_ids = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    if not (apart := difference(from_embeds, from_ids)) <= tolerance(torch.float32):
        more = f"a {model_type} does more with a text's embeddings than its decoder does"
        raise ValueError(f"{more} (states differ by {apart:.0e} of the largest), and a LLaVA has no place for that")

    # The output layer: a small one in its place, and hooks put large states in place of the decoder's
    output_layer = language_model.get_output_embeddings()
    head = nn.Linear(output_layer.weight.shape[1], 64, bias=False)
    states = 1e4 * torch.randn(*input_ids.shape, head.in_features)

    def replace_states(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output | {"last_hidden_state": states}

    inner = [module for module in language_model.modules() if isinstance(module, PreTrainedModel)][1:]
    hooks = [module.register_forward_hook(replace_states) for module in inner]  # which of them it calls is unknown
    language_model.set_output_embeddings(head)
    logits = language_model(input_ids=input_ids, use_cache=False).logits
    language_model.set_output_embeddings(output_layer)
    for hook in hooks:
        hook.remove()
    if not (apart := difference(logits, head(states))) <= tolerance(torch.float32):
        more = f"the logits of a {model_type} are not those of its output layer alone"
        place = "a LLaVA has no place for a scale, a cap or another layer"
        raise ValueError(f"{more} (they differ by {apart:.0e} of the largest): {place}")


# The checks: each returns the outcome for its row of the table


def verify_embedding(model: Llava, processor: Processor) -> str:
    """Verifies that `<image>` has a row of its own in the embedding."""
    tokenizer, image_id = processor.tokenizer, model.config.image_token_id
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != image_id or image_id >= rows:
        raise ValueError(f"{IMAGE_TOKEN} has no row of its own: {len(tokenizer)} tokens, {rows} embedding rows")
    return f"{len(tokenizer)} tokens, {rows} rows, {IMAGE_TOKEN} is {image_id}"


def verify_part(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Verifies that the LLaVA computes what one of the two models computes alone."""
    apart = difference(ours, theirs)
    if not apart <= tolerance(theirs.dtype):
        more = "this architecture does something that a LLaVA of transformers does not"
        raise ValueError(f"the {name} differ from the part's own by {apart:.0e} of the largest: {more}")
    return f"equal to the part's own (difference {apart:.0e})"


def verify_conversations(chat: Chat, generation_config: GenerationConfig) -> Rows:
    """Verifies the supervised tokens and the generation prompt, on conversations of one and of two turns.

    Only the answers are supervised, each with the token that ends its turn. Generation stops at these tokens. It
    begins from the tokens that precede the answer in training.
    """
    tokenizer, stops = chat.tokenizer, generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    picture, end_tokens = Image.new("RGB", (8, 8)), []
    for texts in (CONVERSATION[:2], CONVERSATION):
        # Each stretch of supervised tokens is one answer
        messages = conversation(*texts)
        input_ids, labels = chat.encode(messages, [picture.size])
        supervised = np.flatnonzero(labels != IGNORE)
        stretches = np.split(supervised, np.flatnonzero(np.diff(supervised) > 1) + 1)
        answers = texts[1::2]
        if len(stretches) != len(answers):
            raise ValueError(f"{len(stretches)} stretches are learnt of a conversation with {len(answers)} answers")
        for i, (stretch, answer) in enumerate(zip(stretches, answers, strict=True)):
            # The answer, and the token that ends its turn
            begin, last_id = stretch[0], int(input_ids[stretch[-1]])
            end = tokenizer.convert_ids_to_tokens(last_id)
            if tokenizer.decode(input_ids[stretch[:-1]]).strip() != answer:
                raise ValueError(f"{tokenizer.decode(input_ids[stretch])!r} is learnt as the answer {answer!r}")
            if last_id not in stops:
                raise ValueError(f"answers are taught to end with {end}, and generation does not stop there")
            # The generation prompt, and the tokens before the answer in training
            prompt = chat.prompts([messages[: 2 * i + 1]], [picture])["input_ids"][0].tolist()
            if prompt != input_ids[:begin].tolist():
                ours, theirs = (tokenizer.decode(ids[-8:]) for ids in (prompt, input_ids[:begin]))
                raise ValueError(f"generation begins from {ours!r}, and in training the answer followed {theirs!r}")
            end_tokens.append(end)
    assistant_prefix = chat.segments(turn_structure(messages[:1]), answer_next=True)[-1]
    ends = " or ".join(dict.fromkeys(end_tokens))
    return [
        ("what is learnt", f"each answer with {ends}, where generation stops"),
        ("generation prompt", f"as in training, {assistant_prefix!r}"),
    ]


def verify_noise(where: str, apart: float, model: Llava) -> str:
    """Verifies that a text's logits differ by noise alone; `where` says what they were compared in."""
    if not apart <= tolerance(model.dtype):
        raise ValueError(f"{where} its logits differ from those alone by {apart:.0e} of the largest")
    return f"equal (difference {apart:.0e})"


def verify_second_save(model: Llava, folder: Path) -> str:
    """Verifies that the opened model is saved as the same tensors."""
    tensors = base_tensors(str(folder))
    save_weights(model, folder / "again", base=tensors)
    if (name := differing_tensor(folder / "again", tensors)) is not None:
        raise ValueError(f"opened and saved again, its {name} is another")
    shutil.rmtree(folder / "again")
    return f"{len(tensors)} tensors, the same to the bit"


def verify_image_tokens(model: Llava, processor: Processor) -> str:
    """Verifies that the processor writes one `<image>` token for each feature of the tower."""
    inputs = picture_and_question(model, processor)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    pictures = {name: inputs[name] for name in processor.image_processor.model_input_names}
    features = len(model.get_image_features(**pictures).pooler_output[0])
    if tokens != features:
        raise ValueError(f"the processor writes {tokens} {IMAGE_TOKEN} a picture, the tower gives {features}")
    return f"{tokens} written, {features} features"


def verify_generation(model: Llava, processor: Processor) -> str:
    """Verifies that the model answers a question about a picture. It removes all layers but the first, in place.

    The logits of all layers are verified already, and on a CPU a large picture would take minutes.
    """
    for layers in model.get_decoder().modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == model.config.text_config.num_hidden_layers:
            del layers[1:]
    inputs = picture_and_question(model, processor)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return f"{output.shape[1] - inputs['input_ids'].shape[1]} tokens generated"


# Measurements of the checks


@torch.inference_mode()
def packing_difference(
    model: nn.Module, chat: Chat, packed_model: nn.Module | None = None, dtype: torch.dtype | None = None
) -> tuple[float, bool]:
    """Compares the logits of two packed conversations with those of each alone.

    Some architectures cannot tell conversations apart by `position_ids`: linear attention, convolutions,
    masks made without them. A conversation cannot see the text behind it, so that text's effect is noise. The
    text in front may have three times this effect. Neither may exceed the precision.

    Args:
        packed_model: the language model, if it computes packed rows in one call; see `in_one_call`.
        dtype: the precision of the computation; default: that of the model.

    Returns:
        The largest difference, and whether it is noise.
    """
    # Two conversations without pictures, their tokens (1, T) each
    rows = []
    for texts in PACKED:
        input_ids, _ = chat.encode(conversation(*texts, pictures=0))
        rows.append(torch.from_numpy(input_ids)[None].to(model.device))
    first, second = rows
    arguments = packed_arguments([row.shape[1] for row in rows], model.device)
    if packed_model is None:  # a CPU's loop would keep apart what the model's own mask does not
        arguments = {name: arguments[name] for name in ("position_ids", "use_cache")}

    def packed(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
        input_ids = torch.cat([first, second], dim=1)
        with in_one_call(packed_model):
            logits = model(input_ids=input_ids, **arguments).logits
        return logits.split([first.shape[1], second.shape[1]], dim=1)

    # Each conversation packed, with another text behind or in front of it, and alone
    first_packed, second_packed = packed(first, second)
    noise = difference(packed(first, second.flip(1))[0], first_packed)
    leak = difference(packed(first.flip(1), second)[1], second_packed)
    first_apart = difference(first_packed, model(input_ids=first, use_cache=False).logits)
    second_apart = difference(second_packed, model(input_ids=second, use_cache=False).logits)
    within = all(apart <= tolerance(dtype or model.dtype) for apart in (noise, first_apart, second_apart))
    return max(leak, first_apart, second_apart), within and leak <= max(1e-5, 3 * noise)


@torch.inference_mode()
def padding_is_invisible(model: nn.Module, chat: Chat) -> bool:
    """Whether a row's logits are the same with padding on its right that no attention mask covers."""
    row = torch.from_numpy(chat.encode(conversation(*CONVERSATION), [(8, 8)])[0])
    row = row[row != model.config.image_token_id][None].to(model.device)
    padded = nn.functional.pad(row, (0, 16), value=chat.tokenizer.pad_token_id)
    logits = model(input_ids=padded, use_cache=False).logits[:, : row.shape[1]]
    return difference(logits, model(input_ids=row, use_cache=False).logits) <= tolerance(model.dtype)


@torch.inference_mode()
def batching_difference(model: nn.Module, processor: Processor) -> float:
    """Compares two questions' next-token logits alone and in a batch, padded by plain transformers."""
    texts = []
    for question in ("What is the capital of France?", "Hello"):
        message = {"role": "user", "content": question}
        texts.append(processor.apply_chat_template([message], add_generation_prompt=True))

    def last_logits(texts: list[str]) -> torch.Tensor:
        inputs = processor(text=texts, padding=True, add_special_tokens=False, return_tensors="pt")
        inputs = inputs.to(model.device)
        # As generation counts positions, without the padding
        position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return model(**inputs, position_ids=position_ids).logits[:, -1]

    return difference(last_logits(texts), torch.cat([last_logits([text]) for text in texts]))


@torch.inference_mode()
def cached_difference(model: nn.Module, input_ids: torch.Tensor, length: int) -> float:
    """Compares a text's logits with and without a cache, at the first and the last of `length` positions."""
    number = input_ids.shape[1]
    sizes, differences = [number - 4, 1, 1, 1, 1], []  # the last four tokens one at a time
    for start in (0, length - number):
        position_ids = torch.arange(start, start + number)[None]
        whole = model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        # With the cache, piece by piece
        cache, logits = None, []
        for ids, positions in zip(input_ids.split(sizes, 1), position_ids.split(sizes, 1), strict=True):
            output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        differences.append(difference(torch.cat(logits, dim=1), whole))
    return max(differences)


@torch.inference_mode()
def longest_difference(model: nn.Module, input_ids: torch.Tensor, length: int) -> float:
    """Compares a text's logits beside a copy of itself with those beside the last of `length` tokens.

    In some models, the longest text of a batch decides the rotary embedding of all.
    """
    short = torch.arange(input_ids.shape[1])
    pair = input_ids.expand(2, -1)
    far = short + length - len(short)
    with_copy = model(input_ids=pair, position_ids=torch.stack([short, short]), use_cache=False).logits[0]
    with_long = model(input_ids=pair, position_ids=torch.stack([short, far]), use_cache=False).logits[0]
    return difference(with_long, with_copy)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of `theirs`."""
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


def tolerance(dtype: torch.dtype) -> float:
    """The largest `difference` that a precision's noise makes."""
    return 1e-4 if dtype == torch.float32 else 3e-2


# Inputs of the measurements


def example_inputs(processor: Processor) -> tuple[torch.Tensor, torch.Tensor]:
    """A text-only question `(1, T)`, and a square and a wide noise picture (or tiles), `(N, 3, H, W)`."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    input_ids = processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((64, 64, 3), (48, 160, 3))]
    pictures = [Image.fromarray(array) for array in arrays]
    return input_ids, processor.image_processor(pictures, return_tensors="pt")["pixel_values"].flatten(0, -4)


def picture_and_question(model: Llava, processor: Processor) -> Any:
    """A wide picture and a question about it, as the processor's batch."""
    prompt = processor.apply_chat_template(conversation(*CONVERSATION[:2])[:1], add_generation_prompt=True)
    picture = Image.new("RGB", (160, 48), "red")
    return processor(images=picture, text=prompt, return_tensors="pt").to(model.dtype)


def conversation(*texts: str, pictures: int = 1) -> list[dict[str, Any]]:
    """Messages of alternating questions and answers, a picture in front of the first."""
    turns = [{"user": question, "assistant": answer} for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    return to_messages({"texts": turns, "images": ["?"] * pictures})


if __name__ == "__main__":
    main()
