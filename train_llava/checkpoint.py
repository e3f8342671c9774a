"""Opens LLaVA checkpoints, older ones too, and knows what is in them: chat template, tokens, parts."""

import sys
from typing import Any

import torch
from jinja2.exceptions import UndefinedError
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available

IMAGE_TOKEN = "<image>"
BITS_HELP = "Hold the language model's weights in 4 or 8 bits; needs bitsandbytes."

# Chat templates of language models expect each message's content to be a string. Pipelines and servers send a list of
# parts. This prelude turns such a list into the string a LLaVA is trained on (the parts in order, one a line) and
# hands it to the language model's own template, which follows it unchanged.
STRUCTURED_CONTENT = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message.content is string or message.content is not iterable -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set turn = namespace(parts=[]) -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'text' -%}{%- set turn.parts = turn.parts + [part.text] -%}"
    "{%- else -%}{%- set turn.parts = turn.parts + ['" + IMAGE_TOKEN + "'] -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=turn.parts | join('\n'))] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages %}"
)


# The template of llava-hf/llava-1.5-7b-hf and its kind writes nothing after an answer, so that a model trained with it
# would never stop. LLaVA-1.5 itself was trained with the end-of-sequence token there; this prelude writes it.
ENDED_ANSWERS = (
    "{{%- set ended = namespace(messages=[]) -%}}"
    "{{%- for message in messages -%}}"
    "{{%- if message.role != 'assistant' -%}}"
    "{{%- set ended.messages = ended.messages + [message] -%}}"
    "{{%- elif message.content is string -%}}"
    "{{%- set ended.messages = ended.messages + [dict(message, content=message.content + '{eos}')] -%}}"
    "{{%- else -%}}"
    "{{%- set last = dict(message.content[-1], text=message.content[-1].text + '{eos}') -%}}"
    "{{%- set ended.messages = ended.messages + [dict(message, content=message.content[:-1] + [last])] -%}}"
    "{{%- endif -%}}"
    "{{%- endfor -%}}"
    "{{%- set messages = ended.messages %}}"
)


def with_structured_content(chat_template: str) -> str:
    """The language model's chat template, made to take structured message content as well as strings."""
    return STRUCTURED_CONTENT + chat_template


def end_of_turn_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the chat template writes after an assistant's answer, where generation must stop.

    Raises:
        ValueError: the template ends an answer with no special token.
    """
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}
    text = tokenizer.apply_chat_template([question, answer], tokenize=False)
    if "yes" not in text:  # a template that takes structured content only
        question, answer = (dict(m, content=[{"type": "text", "text": m["content"]}]) for m in (question, answer))
        text = tokenizer.apply_chat_template([question, answer], tokenize=False)
    ids = tokenizer(text[text.rindex("yes") :], add_special_tokens=False)["input_ids"]
    for token_id in ids:
        if token_id in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[token_id].special:
            return tokenizer.convert_ids_to_tokens(token_id)
    raise ValueError(f"the chat template of {tokenizer.name_or_path} ends an answer with no special token")


def load_processor(model_name_or_path: str) -> tuple[LlavaConfig, LlavaProcessor]:
    """The configuration and the processor of a LLaVA checkpoint, a folder or a hub id.

    What processors saved by older versions of transformers lack is derived, and said so on standard error.

    Raises:
        ValueError: there is no checkpoint of that name, or it is not a LLaVA; the message says which.
    """
    try:
        config = AutoConfig.from_pretrained(model_name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model_name_or_path} is no model folder, and no model that the hub would give") from error
    if config.model_type != "llava":
        raise ValueError(f"{model_name_or_path} is a {config.model_type} model, not a LLaVA: see build_model")
    processor = AutoProcessor.from_pretrained(model_name_or_path)
    derived = []
    if processor.patch_size is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")
        derived.append("the patch size")
    template = processor.chat_template or processor.tokenizer.chat_template
    if not template:
        raise ValueError(f"{model_name_or_path} has no chat template")
    processor.tokenizer.chat_template = processor.chat_template = template
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    try:
        takes_parts = IMAGE_TOKEN in processor.apply_chat_template([question])
    except (TypeError, UndefinedError):  # a template that adds strings
        takes_parts = False
    if not takes_parts:
        processor.tokenizer.chat_template = processor.chat_template = with_structured_content(template)
        derived.append("a chat template that takes pictures")
    try:
        end_of_turn_token(processor.tokenizer)
    except ValueError:
        ended = ENDED_ANSWERS.format(eos=processor.tokenizer.eos_token) + processor.chat_template
        processor.tokenizer.chat_template = processor.chat_template = ended
        derived.append("an end of the answers in its chat template")
    if derived:
        print(f"{model_name_or_path} lacks {' and '.join(derived)}: derived from its config", file=sys.stderr)
    return config, processor


def quantization(bits: int, dtype: torch.dtype) -> dict[str, Any]:
    """How `from_pretrained` puts the language model's weights in 8 bits (Dettmers et al., 2022) or 4 (QLoRA, 2023).

    What is small, or reads pictures, stays as it is: the vision tower, the projector and the output embedding.

    Raises:
        ValueError: bitsandbytes, which does it, is not installed.
    """
    if not is_bitsandbytes_available():
        raise ValueError(f"--bits {bits} needs a package that is not installed: pip install bitsandbytes")
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    accelerator = torch.accelerator.current_accelerator()  # such weights are made where they stay
    device = torch.accelerator.current_device_index() if accelerator else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def load_checkpoint(
    model_name_or_path: str,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    bits: int | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Opens a LLaVA checkpoint, a folder or a hub id, with its processor; `bits`: see `quantization`.

    Raises:
        ValueError: there is none of that name, or it is not a whole LLaVA; the message says which.
    """
    config, processor = load_processor(model_name_or_path)
    quantized = quantization(bits, config.dtype if dtype == "auto" else dtype) if bits else {}
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        model_name_or_path,
        dtype=dtype,
        attn_implementation=attn_implementation,
        output_loading_info=True,
        **quantized,
    )
    if loading["missing_keys"]:
        raise ValueError(f"{model_name_or_path} lacks weights, {min(loading['missing_keys'])} for one")
    return model, processor


def part_of(parameter_name: str) -> str:
    """The part of a LLaVA that a parameter belongs to: "vision tower", "projector" or "language model"."""
    if "vision_tower." in parameter_name:
        return "vision tower"
    return "projector" if "multi_modal_projector." in parameter_name else "language model"


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """How many parameters of each part of a LLaVA train, and how many there are; tied ones count once."""
    counts = {"vision tower": (0, 0), "projector": (0, 0), "language model": (0, 0)}
    for name, parameter in model.named_parameters():
        if "original_module" in name:  # PEFT trains a copy of the projector and keeps this one beside it
            continue
        # where ZeRO-3 has shared a parameter out, a rank holds a piece of it, and DeepSpeed's note of its whole size
        size = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit":  # two numbers in a byte
            size = parameter.quant_state.shape.numel()
        part = part_of(name)
        trainable, total = counts[part]
        counts[part] = trainable + size * parameter.requires_grad, total + size
    return counts
