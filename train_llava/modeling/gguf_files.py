"""Writes a LLaVA's two GGUF files, and refuses a model or a tokenizer that llama.cpp would read differently.

The names of tensors and fields come from the gguf package. Their use follows llama.cpp's source (tools/mtmd and
src/models).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from train_llava.chat import Processor
from train_llava.modeling.kinds import Config, Llava
from train_llava.modeling.templates import QUESTION, TWO_TURNS, template_segments

if is_gguf_available():
    import gguf

# llama.cpp's name of a pre-tokenizer, and the steps by which it splits a text into words before BPE merges
PRE_TOKENIZERS = json.loads(Path(__file__).with_name("gguf_pre_tokenizers.json").read_text(encoding="utf-8"))
WHOLE_WORDS = "llama-bpe"  # with this pre-tokenizer, llama.cpp takes a word that is a token without merging
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of added tokens; llama.cpp has none of them
LANGUAGE_MODELS = ("llama", "qwen2", "qwen3")
TOWERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")  # llama.cpp computes "gelu" by tanh, too
NamedTensors = Iterator[tuple[str, torch.Tensor]]


def check_exportable(config: Config) -> None:
    """Verifies that llama.cpp can compute what transformers computes; a ValueError names the feature that it lacks."""
    if config.model_type == "llava_next":
        other = "keeps the padding of tiles, puts the whole picture last, and puts no image_newline between rows"
        raise ValueError(f"anyres cannot be exported to GGUF: llama.cpp {other}")
    if config.model_type == "idefics3":
        other = "cuts every picture into tiles, and writes a line break before it"
        raise ValueError(f"--pixel_shuffle cannot be exported to GGUF: llama.cpp {other}")
    text, vision, layer = config.text_config, config.vision_config, config.vision_feature_layer
    if text.model_type not in LANGUAGE_MODELS or vision.model_type not in TOWERS:
        models = "only CLIP or SigLIP with a Qwen2, Qwen3 or Llama language model"
        raise ValueError(f"{models} can be exported to GGUF, not {vision.model_type} and {text.model_type}")
    # Each feature that llama.cpp lacks, and whether the model has it
    drops_first = config.vision_feature_select_strategy == "default"
    has_class_token = vision.model_type == "clip_vision_model"  # in front of the patches; SigLIP has none
    rope_type = text.rope_parameters["rope_type"]
    obstacles = {
        f"the activation {text.hidden_act} in the language model": text.hidden_act != "silu",
        f"the activation {vision.hidden_act} in the vision tower": vision.hidden_act not in ACTIVATIONS,
        f"the activation {config.projector_hidden_act} in the projector": config.projector_hidden_act != "gelu",
        "a projector without bias": not config.multimodal_projector_bias,
        f"features of more than one layer ({layer})": not isinstance(layer, int),
        "the class token among the features": has_class_token and not drops_first,
        "a SigLIP without its first patch": drops_first and not has_class_token,
        "a vision tower whose MLP is as wide as its states": vision.intermediate_size == vision.hidden_size,
        f"rope scaling ({rope_type})": rope_type != "default",
        "sliding windows": getattr(text, "use_sliding_window", False),
        "biases in Qwen3's attention": text.model_type == "qwen3" and text.attention_bias,
    }
    for obstacle, applies in obstacles.items():
        if applies:
            raise ValueError(f"{obstacle} cannot be exported to GGUF")


def pre_tokenizer(tokenizer_json: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer in a `tokenizer.json`; a ValueError if it has none."""
    sequence = tokenizer_json["pre_tokenizer"] or {}
    steps = []
    for step in sequence.get("pretokenizers", [sequence]):
        # Offsets change no token
        steps.append({key: value for key, value in step.items() if key != "trim_offsets"})
    if tokenizer_json["model"]["type"] == "BPE":
        for name, known_steps in PRE_TOKENIZERS.items():
            if steps == known_steps:
                return name
    raise ValueError("only a byte-level BPE of Qwen, Llama 3, SmolLM or GPT-2 can be exported to GGUF")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Verifies that llama.cpp gives the same tokens for every token's text and for a rendered conversation.

    Returns whether the tokenizer composes characters first (NFC), which llama.cpp leaves to its users. A ValueError
    says that llama.cpp would read a text as other tokens, or that the tokenizer normalizes in another way.
    """
    ours = tokenizer.backend_tokenizer
    ours_json = json.loads(ours.to_str())
    ignore_merges = pre_tokenizer(ours_json) == WHOLE_WORDS
    normalizer = ours_json["normalizer"] or {"normalizers": []}
    normalizers = [step["type"] for step in normalizer.get("normalizers", [normalizer])]
    if set(normalizers) - {"NFC"}:
        raise ValueError(f"a tokenizer that normalizes texts ({', '.join(normalizers)}) cannot be exported to GGUF")

    # The same tokenizer with the parts that llama.cpp knows, and no others
    model = {key: ours_json["model"][key] for key in ("type", "vocab", "merges")}
    model["ignore_merges"] = ignore_merges
    added_tokens = [token | dict.fromkeys(FLAGS, False) for token in ours_json["added_tokens"]]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False, "trim_offsets": True}
    known_parts = {"model": model, "added_tokens": added_tokens, "decoder": decoder}
    theirs = Tokenizer.from_str(json.dumps(ours_json | known_parts))

    # Texts that show a difference: a conversation, every added token with and without spaces, every token
    texts = ["a".join(template_segments(tokenizer, TWO_TURNS))]
    for token in added_tokens:
        texts += [f"a {token['content']} a", f"a{token['content']}a"]
    texts += [theirs.decode([token_id], skip_special_tokens=False) for token_id in theirs.get_vocab().values()]

    # Both have to encode and decode them alike
    for text in texts:
        ids = ours.encode(text, add_special_tokens=False).ids
        same_ids = ids == theirs.encode(text, add_special_tokens=False).ids
        if not same_ids or ours.decode(ids, False) != theirs.decode(ids, False):
            raise ValueError(f"llama.cpp would read {text[:80]!r} as other tokens: it cannot be exported to GGUF")
    return bool(normalizers)


def writes_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template begins with the first token (BOS). llama.cpp then does not write it twice."""
    before_question = template_segments(tokenizer, (QUESTION,), answer_next=True)[0]
    return tokenizer.bos_token is not None and before_question.startswith(tokenizer.bos_token)


def add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> None:
    """Adds a tokenizer with one token for each of the embedding's `rows`; the ids in `ends` end an answer."""
    # The type of each row's token; spare rows are unused
    tokenizer_json = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    types = dict.fromkeys(range(rows), gguf.TokenType.UNUSED) | dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for token_id, token in tokenizer.added_tokens_decoder.items():
        types[token_id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer_json))
    writer.add_token_list([tokens.get(token_id, f"[PAD{token_id}]") for token_id in range(rows)])
    writer.add_token_types([types[token_id] for token_id in range(rows)])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer_json["model"]["merges"]])
    # The format has fields for three tokens that end an answer
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    end_fields = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add_end, end_id in zip(end_fields, ends, strict=False):
        add_end(end_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(writes_bos(tokenizer))
    writer.add_chat_template(tokenizer.chat_template)


def text_tensors(model: Llava) -> NamedTensors:
    """The language model's tensors, under the names of a checkpoint of its own."""
    config = model.config.text_config
    # llama.cpp rotates pairs of neighbouring numbers in a Llama, transformers pairs that are half a head apart
    rotated = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.model.language_model.state_dict().items():
        projection = name.split(".")[-2]
        if config.model_type == "llama" and projection in rotated:
            tensor = interleave(tensor, rotated[projection])
        yield f"model.{name}", tensor
    if not config.tie_word_embeddings:
        yield "lm_head.weight", model.lm_head.weight


def interleave(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleaves the halves of each head in a projection `(heads x size, ...)`: its rows 0 1 2 3 become 0 2 1 3."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def picture_tensors(model: Llava, class_token: str) -> NamedTensors:
    """The tensors of tower and projector, under the names of a LLaVA's checkpoint.

    An engine with the class token last gives position 0 to the first patch. The position table is rolled by
    one row, so that each patch gets its own position. Such an engine still drops the first patch from the
    features and keeps the class token.
    """
    tower_tensors = model.model.vision_tower.state_dict()
    if class_token == "last" and "embeddings.class_embedding" in tower_tensors:
        name = "embeddings.position_embedding.weight"
        tower_tensors[name] = tower_tensors[name].roll(-1, dims=0)
    for name, tensor in tower_tensors.items():
        # A LLaVA's features come before the last layer norm, which llama.cpp would apply, and SigLIP's head
        if not name.startswith(("post_layernorm.", "head.")):
            yield f"vision_tower.vision_model.{name}", tensor
    # llama.cpp numbers the projector's layers as LLaVA's authors did: 0, an activation, 2
    for name, tensor in model.model.multi_modal_projector.state_dict().items():
        yield f"multi_modal_projector.{name.replace('linear_1', 'linear_0')}", tensor


def write(writer: "gguf.GGUFWriter", names: "gguf.TensorNameMap", tensors: NamedTensors) -> None:
    """Writes the fields that were added, then the tensors: matrices in float16, all others in float32."""
    for name, tensor in tensors:
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(f"{name} has no place in a GGUF file")
        numbers = tensor.detach().float().cpu().numpy()
        if numbers.ndim > 1 and "position_embd" not in gguf_name:
            if np.abs(numbers).max() > np.finfo(np.float16).max:
                raise ValueError(f"{name} holds numbers too large for float16")
            numbers = numbers.astype(np.float16)
        writer.add_tensor(gguf_name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


def export_text(model: Llava, processor: Processor, path: Path) -> None:
    """Writes the language model's file: its sizes, the tokenizer, then the tensors."""
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


def export_pictures(model: Llava, processor: Processor, class_token: str, path: Path) -> None:
    """Writes the file of the vision tower and the projector."""
    config, image_processor = model.config.vision_config, processor.image_processor
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
    writer.add_vision_image_mean(image_processor.image_mean)
    writer.add_vision_image_std(image_processor.image_std)
    writer.add_vision_use_gelu(config.hidden_act != "quick_gelu")
    # Numbered as hidden states are, where 0 goes into the first layer; the default is the last but one
    layer = range(config.num_hidden_layers + 1)[model.config.vision_feature_layer]
    if layer != config.num_hidden_layers - 1:
        writer.add_array("clip.vision.feature_layer", [layer])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(3, config.num_hidden_layers))
    write(writer, names, picture_tensors(model, class_token))
