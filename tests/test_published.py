"""The layouts of published LLaVAs, at tiny widths: opened, with the labels that each was trained with, and trained."""

import json
from pathlib import Path

import pytest
import torch
from conftest import NARROW, make_tokenizer, run_train, turns
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from train_llava.data import LlavaCollator
from train_llava.evaluation.generation import generate
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_model
from train_llava.records import to_messages

TEXT = NARROW | {"num_hidden_layers": 2, "num_key_value_heads": 1, "max_position_embeddings": 512, "vocab_size": 400}
VISION = NARROW | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
SIGLIP = SiglipVisionConfig(**VISION, vision_use_head=False)
GRID = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
CROP = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def template(before: str, after_text: str, after_question: str, after_answer: str, prompt: str) -> str:
    """A template in the form of theirs: it takes lists of parts alone, and writes pictures before texts."""
    return (
        f"{{% for m in messages %}}{{% set is_answer = m.role == 'assistant' %}}{{{{ {before} }}}}"
        "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
        f"{{% for part in m.content if part.type == 'text' %}}{{{{ part.text + {after_text!r} }}}}{{% endfor %}}"
        f"{{{{ {after_answer!r} if is_answer else {after_question!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )


# The templates in the folders of llava-hf. The first of v1.6-mistral had a slip of the pen in its end token
ROLE, INST, START = "m.role | upper + ': '", "' ' if is_answer else '[INST] '", "'<|im_start|>' + m.role + "
VICUNA = template(ROLE, " ", "", "", "ASSISTANT:")
BAKLLAVA = template(ROLE, "\n", "", "", "ASSISTANT:")
MISTRAL = template(INST, "", " [/INST]", "</s> ", "")
MISTRAL_FIRST = template(INST, "", " [/INST]", "<\\s> ", "")
YI = template(f"{START}'\n'", "", "<|im_end|>\n", "<|im_end|>\n", "<|im_start|>assistant\n")
INTERLEAVE = template(f"{START}' '", "", "<|im_end|>", "<|im_end|>", "<|im_start|>assistant\n")

# Of each: the language model's class, the tower's, whether it takes tiles, the template, and what the model was
# trained to read before an answer, by its card, and to write
PUBLISHED = {
    "llava-1.5-7b": (LlamaConfig, "clip", False, VICUNA, "<s>USER: <image>\nWhat is this? ASSISTANT:", "</s>"),
    "bakLlava-v1": (MistralConfig, "clip", False, BAKLLAVA, "<s>USER: <image>\nWhat is this?\nASSISTANT:", "</s>"),
    "v1.6-vicuna-7b": (LlamaConfig, "clip", True, VICUNA, "<s>USER: <image>\nWhat is this? ASSISTANT:", "</s>"),
    "v1.6-mistral-7b": (MistralConfig, "clip", True, MISTRAL, "<s>[INST] <image>\nWhat is this? [/INST]", "</s>"),
    "v1.6-mistral-7b, first": (
        MistralConfig, "clip", True, MISTRAL_FIRST, "<s>[INST] <image>\nWhat is this? [/INST]", "</s>",
    ),
    "v1.6-34b": (
        LlamaConfig, "clip", True, YI,
        "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
    ),
    "interleave-qwen-7b": (
        Qwen2Config, "siglip", False, INTERLEAVE,
        "<|im_start|>user <image>\nWhat is this?<|im_end|><|im_start|>assistant\n", "<|im_end|>",
    ),
}  # fmt: skip


def llama_tokenizer() -> LlamaTokenizer:
    """A BPE whose words begin with a space, as Llama 2's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["USER: ASSISTANT: [INST] What is this? a red square And? It is red."] * 4, trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    return LlamaTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]], add_bos_token=True)


def publish(name: str, folder: Path) -> Path:
    """Writes a tiny random model as its namesake lies on the hub."""
    text_class, tower, anyres, chat_template, *_ = PUBLISHED[name]
    # The tokenizer, with the tokens that the conversion added
    tokenizer, added = llama_tokenizer(), ["<image>", "<pad>"]
    if "im_start" in chat_template:
        tokenizer, added = make_tokenizer(folder, CHATML, None, "<|im_end|>", "<|endoftext|>"), ["<image>"]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    tokenizer.pad_token = added[-1] if len(added) > 1 else tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": chat_template}))

    # The model
    token = tokenizer.convert_tokens_to_ids("<image>")
    settings = {
        "text_config": text_class(**TEXT),
        "image_token_index": token,
        "vision_config": CLIPVisionConfig(**VISION),
    }
    if tower == "siglip":
        settings |= {"vision_config": SIGLIP, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    torch.manual_seed(0)
    if anyres:
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**settings, **GRID))
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**settings))
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    assert any(tensor.startswith("language_model.model.layers.") for tensor in tensors)  # the names of that time
    save_file({n.replace("vision_tower.", "vision_tower.vision_model."): t for n, t in tensors.items()}, file)

    # The image processor
    pictures = LlavaNextImageProcessorPil(**CROP, **GRID) if anyres else CLIPImageProcessorPil(**CROP)
    if tower == "siglip":
        pictures = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.save_pretrained(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["processor_class"] = "LlavaNextProcessor" if anyres else "LlavaProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    return {name: publish(name, tmp_path_factory.mktemp("published")) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_learns_in_the_format_that_it_was_trained_in(published, name):
    *_, prompt, end = PUBLISHED[name]
    model, processor = load_checkpoint(str(published[name]))
    tokenizer, picture = processor.tokenizer, Image.new("RGB", (40, 60), "red")
    texts = ["<image>\nWhat is this?", "a red square", "And?", "It is red."]
    messages = to_messages({"id": 0, "image": "x", "conversations": turns(*texts)})
    assert processor.apply_chat_template(messages[:1], add_generation_prompt=True) == prompt
    batch = LlavaCollator(processor)([{"id": "0", "messages": messages, "images": [picture]}])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = tokenizer.decode(ids[ids != processor.image_token_id])
    assert text.startswith(prompt.replace("<image>", ""))  # <s> once, and the answer behind the prompt
    assert tokenizer.decode(labels[labels != -100]).replace(f"{end} ", end) == f"a red square{end}It is red.{end}"
    assert tokenizer.convert_tokens_to_ids(end) in model.generation_config.eos_token_id
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_trained_and_asked(published, corpus, tmp_path, monkeypatch, name):
    """A step changes what it says."""
    arguments = ["--max_steps", "1", "--learning_rate", "1e-2", "--lora_r", "4", "--warmup_steps", "0"]
    arguments += ["--per_device_train_batch_size", "2", "--preflight", "false"]
    run_train(monkeypatch, published[name], corpus, tmp_path / "run", *arguments)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    asked = [question], [Image.new("RGB", (40, 60))], 4
    before = load_model(str(published[name]))
    after = load_model(str(published[name]), str(tmp_path / "run"))
    assert generate(*after, *asked) != generate(*before, *asked)
