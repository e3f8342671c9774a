"""Writes a LLaVA checkpoint as the two files that llama.cpp, Ollama and LM Studio load.

    python -m train_llava.export_gguf --model_name_or_path output/run --output_dir output/gguf

`model-f16.gguf` is the language model with its tokenizer and chat template, `mmproj-f16.gguf` the vision tower and the
projector, `Modelfile` what `ollama create` takes. Names of tensors and fields are those of the gguf package; what the
engines compute with them was read in llama.cpp (tools/mtmd, src/models). An adapter is merged first: `merge_lora`.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class ExportArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    output_dir: str = field(metadata={"help": "The folder to write; it must not exist yet."})
    class_token: Literal["last", "first"] = field(
        default="last",
        metadata={
            "help": "Where the engine puts CLIP's class token: llama.cpp puts it behind the patches since May 2025 "
            "(its issue 25814), in front of them where that is mended."
        },
    )


if __name__ == "__main__":
    parse_first(ExportArguments)  # before the imports that take seconds

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tokenizers import Tokenizer
from transformers import (
    BaseImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_gguf_available

from train_llava.dataset.images import open_image
from train_llava.model import load_checkpoint
from train_llava.modeling.templates import ANSWER, QUESTION, TWO_TURNS, end_of_turn_tokens, template_segments
from train_llava.prepare_picture import as_seen, levels

if is_gguf_available():
    import gguf

# llama.cpp knows a byte-level BPE by the name of its pre-tokenizer: here, the steps that split a text before merging
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
PRE_TOKENIZERS = {
    "qwen2": [SPLIT | {"pattern": {"Regex": WORDS + r"\p{N}" + REST}}, BYTES],
    "llama-bpe": [SPLIT | {"pattern": {"Regex": WORDS + r"\p{N}{1,3}" + REST}}, BYTES],
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
}
WHOLE_WORDS = "llama-bpe"  # with these steps llama.cpp takes a word that is a token as it is, without merges
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens; llama.cpp has none of them
SYSTEM = ("system", ("text",))
LANGUAGE_MODELS = ("llama", "qwen2", "qwen3")  # gguf has their names in capitals
TOWERS = ("clip_vision_model", "siglip_vision_model")
# llama.cpp has one GELU, the one by tanh, which is also what it takes for the exact one
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
PADDING = (122, 116, 104)  # what llama.cpp fills a picture up with that is not square: the colour of LLaVA-1.5


def check_exportable(config: LlavaConfig | LlavaNextConfig) -> None:
    """Makes sure that llama.cpp would compute what transformers computes.

    Raises:
        ValueError: it would not; the message names what it has no means for.
    """
    if config.model_type == "llava_next":
        raise ValueError(
            "anyres cannot be exported to GGUF: llama.cpp hands on tile after tile, padding and all, then the whole "
            "picture, and puts no image_newline between rows"
        )
    text, vision, layer = config.text_config, config.vision_config, config.vision_feature_layer
    if text.model_type not in LANGUAGE_MODELS or vision.model_type not in TOWERS:
        kinds = f"{vision.model_type} and {text.model_type}"
        raise ValueError(
            f"only CLIP or SigLIP with a Qwen2, Qwen3 or Llama language model can be exported to GGUF, not {kinds}"
        )
    drops_first = config.vision_feature_select_strategy == "default"
    hindrances = {
        f"the activation {text.hidden_act} in the language model": text.hidden_act != "silu",
        f"the activation {vision.hidden_act} in the vision tower": vision.hidden_act not in ACTIVATIONS,
        f"the activation {config.projector_hidden_act} in the projector": config.projector_hidden_act != "gelu",
        "a projector without bias": not config.multimodal_projector_bias,
        f"features of more than one layer ({layer})": not isinstance(layer, int),
        "the class token among the features": has_class_token(config) and not drops_first,
        "a SigLIP without its first patch": drops_first and not has_class_token(config),
        "a vision tower whose MLP is as wide as its states": vision.intermediate_size == vision.hidden_size,
        f"rope scaling ({text.rope_parameters['rope_type']})": text.rope_parameters["rope_type"] != "default",
        "sliding windows": getattr(text, "use_sliding_window", False),
        "biases in Qwen3's attention": text.model_type == "qwen3" and text.attention_bias,
    }
    for what, applies in hindrances.items():
        if applies:
            raise ValueError(f"{what} cannot be exported to GGUF")


def has_class_token(config: LlavaConfig) -> bool:
    """Whether the tower puts a token in front of those of the patches: CLIP does, SigLIP does not."""
    return config.vision_config.model_type == "clip_vision_model"


def pre_tokenizer(written: dict[str, Any]) -> str:
    """The name by which llama.cpp knows how a byte-level BPE splits a text before it merges, from its tokenizer.json.

    Raises:
        ValueError: it is none that llama.cpp is known to split alike.
    """
    steps = written["pre_tokenizer"] or {}
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps.get("pretokenizers", [steps])]
    if written["model"]["type"] == "BPE":
        for name, known in PRE_TOKENIZERS.items():
            if steps == known:
                return name
    raise ValueError("a tokenizer that is no byte-level BPE of Qwen's, Llama 3's, SmolLM's or GPT-2's kind cannot be "
                     "exported to GGUF")  # fmt: skip


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Makes sure that llama.cpp gives the same tokens: tried on what the chat template writes, and on every token.

    Returns:
        Whether the tokenizer composes characters first (NFC), which llama.cpp leaves to those who write the text.

    Raises:
        ValueError: it splits a text otherwise, or normalizes texts in another way.
    """
    ours, written = tokenizer.backend_tokenizer, json.loads(tokenizer.backend_tokenizer.to_str())
    ignore_merges = pre_tokenizer(written) == WHOLE_WORDS
    normalizer = written["normalizer"] or {"normalizers": []}
    kinds = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
    if set(kinds) - {"NFC"}:
        raise ValueError(f"a tokenizer that normalizes texts ({', '.join(kinds)}) cannot be exported to GGUF")

    # the tokenizer with all that llama.cpp has, and nothing else
    model = {key: written["model"][key] for key in ("type", "vocab", "merges")} | {"ignore_merges": ignore_merges}
    added = [token | dict.fromkeys(FLAGS, False) for token in written["added_tokens"]]
    plain = {"model": model, "added_tokens": added, "decoder": BYTES | {"trim_offsets": True}}
    theirs = Tokenizer.from_str(json.dumps(written | plain))

    texts = ["a".join(template_segments(tokenizer, TWO_TURNS))]
    texts += [text for token in added for text in (f"a {token['content']} a", f"a{token['content']}a")]
    texts += theirs.decode_batch([[token_id] for token_id in theirs.get_vocab().values()], skip_special_tokens=False)
    encoded = [[e.ids for e in t.encode_batch(texts, add_special_tokens=False)] for t in (ours, theirs)]
    decoded = [t.decode_batch(encoded[0], skip_special_tokens=False) for t in (ours, theirs)]
    for text, *outcomes in zip(texts, *encoded, *decoded, strict=True):
        if outcomes[0] != outcomes[1] or outcomes[2] != outcomes[3]:
            raise ValueError(f"a tokenizer that llama.cpp would read otherwise, such as {text[:80]!r}, "
                             "cannot be exported to GGUF")  # fmt: skip
    return bool(kinds)


def add_tokenizer(
    writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerBase, vocab_size: int, stops: list[int]
) -> None:
    """Writes tokens, merges, special tokens and the chat template, for `vocab_size` rows of the embedding.

    `stops` are the ids that end an answer; the format has room for three.
    """
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = []
    for token_id in range(vocab_size):
        if token_id in added:
            kinds.append(gguf.TokenType.CONTROL if added[token_id].special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL if token_id in names else gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(written))
    writer.add_token_list([names.get(token_id, f"[PAD{token_id}]") for token_id in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    roles = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, stop in zip(roles, stops, strict=False):
        add(stop)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(writes_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)


def text_tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's tensors by the names they have in a checkpoint of its own."""
    config = model.config.text_config
    for name, tensor in model.model.language_model.state_dict().items():
        # llama.cpp turns neighbouring numbers of a head where transformers turns those half a head apart
        if config.model_type == "llama" and ".self_attn.q_proj." in name:
            tensor = interleave(tensor, config.num_attention_heads)
        if config.model_type == "llama" and ".self_attn.k_proj." in name:
            tensor = interleave(tensor, config.num_key_value_heads)
        yield f"model.{name}", tensor
    if not config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, `(heads x size, ...)`, with the two halves of each head interleaved."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def picture_tensors(model: LlavaForConditionalGeneration, class_token: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of tower and projector by the names they have in a LLaVA's checkpoint.

    The layer norm behind the last layer is left out: llama.cpp would apply it, a LLaVA reads features before it.

    SigLIP's pooling head is left out, too: a LLaVA has no use for it.

    An engine with the class token last gives position 0 to the first patch. The rows of the position table are moved
    along, so that each patch meets its own and the tower computes what it was trained to. What such an engine hands on
    is then still one row off: it leaves out the first patch and ends with the class token.
    """
    for name, tensor in model.model.vision_tower.state_dict().items():
        if class_token == "last" and has_class_token(model.config) and name == "embeddings.position_embedding.weight":
            tensor = tensor.roll(-1, dims=0)
        if not name.startswith(("post_layernorm.", "head.")):
            yield f"vision_tower.vision_model.{name}", tensor
    # llama.cpp counts the projector's layers as LLaVA's authors did: 0, an activation, 2
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        yield f"multi_modal_projector.{name.replace('linear_1', 'linear_0')}", tensor


def write(writer: "gguf.GGUFWriter", names: "gguf.TensorNameMap", tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Writes a file: fields set before, then tensors, matrices in float16 and the small rest in float32.

    Raises:
        ValueError: a tensor has no place in the format, or a number too large for float16.
    """
    for name, tensor in tensors:
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if written is None:
            raise ValueError(f"{name} has no place in a GGUF file")
        numbers = tensor.detach().float().cpu().numpy()
        if numbers.ndim > 1 and "position_embd" not in written:
            if np.abs(numbers).max() > np.finfo(np.float16).max:
                raise ValueError(f"{name} holds numbers too large for float16")
            numbers = numbers.astype(np.float16)
        writer.add_tensor(written, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def export_text(model: LlavaForConditionalGeneration, processor: LlavaProcessor, path: Path) -> None:
    """Writes the language model's file."""
    config = model.config.text_config
    arch = gguf.MODEL_ARCH[config.model_type.upper()]
    head_dim = model.model.language_model.layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, processor.tokenizer, config.vocab_size, model.generation_config.eos_token_id)
    write(writer, gguf.get_tensor_name_map(arch, config.num_hidden_layers), text_tensors(model))


def export_pictures(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, class_token: str, path: Path
) -> None:
    """Writes the vision tower's and the projector's file."""
    config, prepare = model.config.vision_config, processor.image_processor
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_image_mean(prepare.image_mean)
    writer.add_vision_image_std(prepare.image_std)
    writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")
    # counted as hidden states are, 0 being what goes into the first layer; unsaid, it is the last layer but one
    layer = range(config.num_hidden_layers + 1)[model.config.vision_feature_layer]
    if layer != config.num_hidden_layers - 1:
        writer.add_array("clip.vision.feature_layer", [layer])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(3, config.num_hidden_layers))
    write(writer, names, picture_tensors(model, class_token))


def tried_pictures(side: int) -> list[tuple[str, bytes]]:
    """Picture files of every kind that programs read differently, and the words for it; noise, twice `side` large."""
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side, 4), dtype=np.uint8)
    clear, rgb = Image.fromarray(noise), Image.fromarray(noise[..., :3])
    deep, palette, turned = Image.fromarray(noise[..., 0] * np.uint16(257)), rgb.quantize(4), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    # a palette without one color in it, and so without that which is transparent
    keyed = {"transparency": tuple(palette.getpalette()[:3])}
    kinds = [
        ("square pictures", rgb, "PNG", {}),
        ("pictures that are not square", rgb.resize((2 * side, side)), "PNG", {}),
        ("transparent pictures", clear, "PNG", {}),
        ("transparent pictures", clear.convert("LA"), "PNG", {}),
        ("transparent pictures", palette, "PNG", {"transparency": 0}),
        ("transparent pictures", palette.convert("RGB"), "PNG", keyed),
        ("transparent pictures", palette, "GIF", {"transparency": 0}),
        ("JPEGs that EXIF turns", rgb, "JPEG", {"exif": turned}),
        ("PNGs that EXIF turns", rgb, "PNG", {"exif": turned}),
        ("gray of 16 bits", deep, "PNG", {}),
        ("CMYK", rgb.convert("CMYK"), "JPEG", {}),
        ("animations", rgb, "GIF", {"save_all": True, "append_images": [clear.convert("RGB").rotate(90)]}),
    ]
    files = []
    for words, image, kind, options in kinds:
        image.save(file := io.BytesIO(), kind, **options)
        files.append((words, file.getvalue()))
    return files


def read_as_llama_cpp(file: bytes) -> Image.Image:
    """A JPEG, PNG or GIF as stb_image reads it for llama.cpp: no EXIF, colors without transparency, upper bytes."""
    image = Image.open(io.BytesIO(file))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA").convert("RGB")


def prepared_otherwise(image_processor: BaseImageProcessor, side: int, prepared: bool = False) -> list[str]:
    """Of which pictures llama.cpp makes other pixels than the image processor was given in training: found by trying.

    llama.cpp resizes a picture bicubically until it fits into the square and fills up what is left. With `prepared`,
    it gets the pictures that `prepare_picture` writes.
    """
    kinds = []
    for words, file in tried_pictures(side):
        image = open_image(file, words)
        read = as_seen(image_processor, image) if prepared else read_as_llama_cpp(file)
        theirs = np.array(ImageOps.pad(read, (side, side), Image.Resampling.BICUBIC, color=PADDING))
        # of 256 levels; Pillow's and torch's roundings differ by less than one
        if np.abs(levels(image_processor, image) - theirs).mean() > 3:
            kinds.append(words)
    return list(dict.fromkeys(kinds))


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins with the tokenizer's first token. llama.cpp then does not write it twice."""
    before = template_segments(tokenizer, (QUESTION,), answer_next=True)[0]
    return tokenizer.bos_token is not None and before.startswith(tokenizer.bos_token)


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template asks for the date: then it breaks without the function that tells it."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, strftime_now=None)
    except Exception:  # a template is a program
        return True
    return False


def modelfile(tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's description of the model. Its template is Go's, put together from what the chat template writes.

    Raises:
        ValueError: what the chat template writes around a text depends on more than the messages beside it.
    """
    first, to_answer, after_answer, to_generate = template_segments(
        tokenizer, (QUESTION, ANSWER, QUESTION), answer_next=True
    )
    more = (to_answer, after_answer, to_generate)
    expected = {
        (QUESTION,): (first, to_generate),
        (QUESTION, ANSWER, QUESTION, ANSWER, QUESTION): (first, to_answer, after_answer, *more),
    }
    try:
        before_system, after_system, _ = template_segments(tokenizer, (SYSTEM, QUESTION), answer_next=True)
        expected[(SYSTEM, QUESTION, ANSWER, QUESTION)] = (before_system, after_system, *more)
    except ValueError:  # it takes no system message
        before_system = None
    for form, pieces in expected.items():
        if tuple(template_segments(tokenizer, form, answer_next=True)) != pieces:
            roles = ", ".join(role for role, _ in form)
            raise ValueError(f"the chat template writes a conversation of {roles} in a way that Ollama's cannot")

    def go(text: str) -> str:
        """A text in Go's template, quoted where it would not be read as it is; Ollama adds the first token itself."""
        if writes_bos(tokenizer):
            text = text.removeprefix(tokenizer.bos_token)
        if not re.search(r'[{}"]', text) and text.replace("\n", "").isprintable():
            return text
        escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
        return f'{{{{ "{"".join(escaped)}" }}}}'

    system = go(first) if before_system is None else go(before_system) + "{{ $m.Content }}" + go(after_system)
    template = (
        "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq $m.Role "system" }}' + system + "{{ end }}"
        '{{ if eq $m.Role "user" }}{{ if eq $i 0 }}' + go(first) + "{{ end }}{{ $m.Content }}"
        "{{ if $last }}" + go(to_generate) + "{{ else }}" + go(to_answer) + "{{ end }}{{ end }}"
        '{{ if eq $m.Role "assistant" }}{{ $m.Content }}{{ if not $last }}' + go(after_answer) + "{{ end }}{{ end }}"
        "{{ end }}"
    )  # fmt: skip
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in end_of_turn_tokens(tokenizer))
    return (
        f'FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE """{template}"""\n'
        f"{stops}PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )


def export_gguf(*arguments: Any, **named: Any) -> None:
    """Writes `model-f16.gguf`, `mmproj-f16.gguf` and `Modelfile` to a new folder; takes what `ExportArguments` takes.

    Prints which pictures and texts the engines read otherwise, and what to do about it.

    Raises:
        ValueError: there is no such checkpoint, or llama.cpp would compute something else with it; nothing is left
            behind.
    """
    given = ExportArguments(*arguments, **named)
    if not is_gguf_available():
        raise ValueError("this needs a package that is not installed: pip install gguf")
    with written_whole(given.output_dir) as folder:
        model, processor = load_checkpoint(given.model_name_or_path)
        check_exportable(model.config)
        tried = processor.image_processor, model.config.vision_config.image_size
        if kinds := prepared_otherwise(*tried):
            print(f"llama.cpp reads {', '.join(kinds)} otherwise than training did, and answers to them may differ: "
                  "give it what python -m train_llava.prepare_picture makes of them")  # fmt: skip
        if kinds := prepared_otherwise(*tried, prepared=True):
            print(f"where prepare_picture does not help: {', '.join(kinds)}")
        if check_tokenizer(processor.tokenizer):
            print("llama.cpp does not compose characters, as the tokenizer does (NFC): é is one character there, "
                  "not e and an accent")  # fmt: skip
        if writes_date(processor.tokenizer):
            print("the chat template writes the date: the Modelfile keeps today's for good, llama.cpp does not")
        (folder / "Modelfile").write_text(modelfile(processor.tokenizer), encoding="utf-8", newline="\n")
        export_text(model, processor, folder / "model-f16.gguf")
        export_pictures(model, processor, given.class_token, folder / "mmproj-f16.gguf")


def main() -> None:
    (arguments,) = parse_arguments(ExportArguments)
    export_gguf(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
