"""Language models of every family and towers of every kind come out right: numbers, tokens, templates."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHATML, NARROW, make_tokenizer
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    GPTJConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    NanoChatConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from train_llava.build_model import BuildArguments, build_model
from train_llava.data import LlavaCollator
from train_llava.evaluation.generation import generate
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.verification import cached_difference, longest_difference
from train_llava.records import to_messages

LM = NARROW | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}
LLAMA4 = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1],
          "attention_chunk_size": 64, "pad_token_id": 0}  # fmt: skip
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# The formats of the families, as their published templates write them
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PHI_TOKENS = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")

# config, special tokens, template, eos, pad, tokens in the tokenizer, rows in the embedding, stops, end of turn
FAMILIES = {
    "qwen2, tied, spare rows": (
        Qwen2Config(**LM, tie_word_embeddings=True), QWEN, CHATML, "<|im_end|>", "<|endoftext|>", 300, 320, [2, 0], 2
    ),
    "qwen3, untied, full": (
        Qwen3Config(**LM, tie_word_embeddings=False), QWEN, QWEN3, "<|im_end|>", "<|endoftext|>", 300, 300, [2, 0], 2
    ),
    "llama, no pad, full, tied": (
        LlamaConfig(**LM, tie_word_embeddings=True),
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        LLAMA3, "<|eot_id|>", None, 300, 300, [1, 4], 4,
    ),
    "mistral, pad is eos, one stop": (
        MistralConfig(**LM), ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), MISTRAL, "</s>", "</s>", 300, 300, 2, 2
    ),
    "gemma, tied, stop at eos alone": (
        GemmaConfig(**LM, tie_word_embeddings=True),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), GEMMA, "<eos>", "<pad>", 300, 384, 1, 4,
    ),
    "gemma3, tied": (
        Gemma3TextConfig(**LM, tie_word_embeddings=True),
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), GEMMA, "<eos>", "<pad>", 300, 384, [1, 4], 4,
    ),
    "phi3, eos after the last turn": (
        Phi3Config(**{k: v for k, v in LM.items() if k != "head_dim"}, pad_token_id=0), PHI_TOKENS, PHI,
        "<|endoftext|>", "<|endoftext|>", 300, 320, [0], 4,
    ),
}  # fmt: skip


def save_family(folder, config, special, template, eos, pad, tokens=300, rows=320, stops=None) -> None:
    """A tiny random language model with its tokenizer and chat template; `stops` is what generation ends with."""
    tokenizer = make_tokenizer(folder, special, template, eos, pad, tokens)
    config.vocab_size = rows
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    stops = tokenizer.eos_token_id if stops is None else stops
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory):
    """Every family assembled once with the tiny CLIP: name -> (language model folder, LLaVA folder)."""
    folders = {}

    def build(name):
        if name not in folders:
            root = tmp_path_factory.mktemp("family")
            save_family(root / "lm", *FAMILIES[name][:-1])
            build_model(BuildArguments(str(parts["clip"]), str(root / "lm"), str(root / "llava")))
            folders[name] = root / "lm", root / "llava"
        return folders[name]

    return build


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_answered_word_for_word_as_by_the_language_model(built, name):
    folder, llava = built(name)
    alone, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model, processor = load_checkpoint(str(llava))
    conversation = [{"role": "user", "content": "What is this?"}]
    text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    text += "<think>\n\n</think>\n\n" * name.startswith("qwen3")  # as this template opens answers that it renders
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    answer = tokenizer.decode(alone.generate(**inputs, max_new_tokens=12)[0, ids.shape[1] :], skip_special_tokens=True)
    (ours,) = generate(model, processor, [conversation], [], 12)
    assert ours.strip() == answer.strip()  # an indent is kept
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert torch.equal(processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"], ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_image_token_embedding_rows_stops_and_ties_are_right(built, name):
    config, *_, pad, tokens, rows, stops, end_of_turn = FAMILIES[name]
    folder, llava = built(name)
    alone = AutoModelForCausalLM.from_pretrained(folder)
    model, processor = load_checkpoint(str(llava))
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id == tokens
    assert len(tokenizer) == tokens + 1
    assert model.get_input_embeddings().num_embeddings == max(rows, 320)
    assert torch.equal(model.get_input_embeddings().weight[:rows], alone.get_input_embeddings().weight)
    assert torch.equal(model.lm_head.weight[:rows], alone.get_output_embeddings().weight)
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings == config.tie_word_embeddings
    assert tokenizer.pad_token == (pad or tokenizer.eos_token)
    kept = stops if isinstance(stops, list) else [stops]
    assert set(model.generation_config.eos_token_id) == {*kept, end_of_turn}


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_the_answers_with_their_end_of_turn(built, name):
    _, processor = load_checkpoint(str(built(name)[1]))
    texts = ["<image>\nWhat is this?", "a red square", "And?", "It is red."]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    messages = to_messages({"id": 0, "image": "x", "conversations": turns})
    item = {"id": "0", "messages": messages, "images": [Image.new("RGB", (28, 28))]}
    labels = LlavaCollator(processor)([item])["labels"][0]
    end = processor.tokenizer.convert_ids_to_tokens(FAMILIES[name][-1])
    said = processor.tokenizer.decode(labels[labels != -100])
    before = {"mistral": " "}.get(name.split(",")[0], "")  # Mistral writes a space before an answer
    assert said == f"{before}a red square{end}{before}It is red.{end}"


OUTSIDE = """
import json, sys
sys.modules["train_llava"] = None  # an import of this repo's package would fail
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
image = Image.new("RGB", (50, 30), "red")
parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
for folder in sys.argv[1:]:
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    answers = []
    for content in (parts, "<image>\\nWhat is this?"):
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        answers.append(processor.decode(output, skip_special_tokens=True))
    ask = pipeline("image-text-to-text", model=folder)
    said = ask(text=[{"role": "user", "content": parts}], return_full_text=False,
               generate_kwargs={"max_new_tokens": 8, "do_sample": False})
    print(json.dumps([*answers, said[0]["generated_text"]]))
"""


def test_a_process_without_this_package_gives_the_same_answers(built, tmp_path):
    folders = [built(name)[1] for name in ("qwen2, tied, spare rows", "mistral, pad is eos, one stop")]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *folders], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    parts, picture = [{"type": "image"}, {"type": "text", "text": "What is this?"}], Image.new("RGB", (50, 30), "red")
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        ours = generate(*load_checkpoint(str(folder)), [[{"role": "user", "content": parts}]], [picture], 8)
        assert [answer.strip() for answer in json.loads(line)] == ours * 3


HEADS = {name: value for name, value in LM.items() if name != "head_dim"}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "word_embed_proj_dim": 32}
SCALE = "the logits of a {} are not those of its output layer alone"


# of each, what it does to a text is smaller than the noise of logits in half precision
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**LM), SCALE.format("gemma2")),  # no logit comes near its cap of 30
        (GraniteConfig(**HEADS, logits_scaling=1.01), SCALE.format("granite")),
        (CohereConfig(**HEADS, logit_scale=0.999), SCALE.format("cohere")),
        (PhiConfig(**HEADS), "a LLaVA has no place for lm_head.bias of this language model, a phi"),  # it is zero
        (PhimoeConfig(**HEADS, num_local_experts=2, lm_head_bias=True), "a LLaVA has no place for lm_head.bias"),
        (GPTJConfig(n_embd=32, n_head=2, n_layer=1, rotary_dim=8), "a LLaVA has no place for lm_head.bias"),
        (NanoChatConfig(**LM), SCALE.format("nanochat")),
        (OPTConfig(**OPT), "the output layer of a opt is its embedding, and a LLaVA shares only one"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_language_models_that_a_llava_cannot_hold_are_refused(parts, tmp_path, config, reason, dtype):
    save_family(tmp_path / "lm", config, QWEN, CHATML, "<|im_end|>", "<|endoftext|>")
    with pytest.raises(ValueError, match=reason):
        build_model(
            BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "out" / "model"), dtype=dtype)
        )
    assert list((tmp_path / "out").iterdir()) == []


# what holds the decoder, and where, differs from class to class
@pytest.mark.parametrize(
    ("config", "decoder"),
    [
        (Llama4TextConfig(**LM, **LLAMA4), "layers.0.self_attn.q_proj.weight"),
        (Llama4TextConfig(**LM, **LLAMA4, tie_word_embeddings=True), "layers.0.self_attn.q_proj.weight"),
        (OPTConfig(**OPT, tie_word_embeddings=False), "decoder.layers.0.self_attn.q_proj.weight"),
        (GPTNeoXConfig(**HEADS, rotary_pct=0.5), "layers.0.attention.query_key_value.weight"),
    ],
    ids=["llama4", "llama4 tied", "opt", "gpt_neox"],
)
def test_the_module_that_forward_calls_is_the_decoder(parts, tmp_path, config, decoder):
    save_family(tmp_path / "lm", config, QWEN, CHATML, "<|im_end|>", "<|endoftext|>")
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").state_dict()
    saved = load_file(tmp_path / "llava" / "model.safetensors")
    name = f"language_model.model.{decoder}"
    assert torch.equal(saved[name], next(tensor for key, tensor in alone.items() if key.endswith(decoder)))
    assert ("language_model.lm_head.weight" in saved) == (not config.tie_word_embeddings)


def test_the_picture_token_never_gets_the_id_of_a_word(parts, tmp_path):
    """In a vocabulary with a hole the number of tokens is the id of one."""
    shutil.copytree(parts["qwen2"], tmp_path / "lm")
    file = tmp_path / "lm" / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 1
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="have a hole, and <image> would get that of"):
        build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))


ROTATIONS = {
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
                 "original_max_position_embeddings": 192},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize(("rope", "length"), [("longrope", 192), ("dynamic", 256), ("yarn", 256)])
def test_a_context_ends_where_a_rotation_changes_for_all_tokens(parts, tmp_path, monkeypatch, rope, length):
    config = LlamaConfig(**LM, rope_parameters=ROTATIONS[rope] | {"rope_theta": 1e4})
    save_family(tmp_path / "lm", config, QWEN, CHATML, "<|im_end|>", "<|endoftext|>")
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    model, processor = load_checkpoint(str(tmp_path / "llava"))
    assert processor.tokenizer.model_max_length == length
    ids = torch.randint(3, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    for check in (cached_difference, longest_difference):
        assert check(model, ids, length) <= 1e-5
    changes = max(check(model, ids, 4 * length) for check in (cached_difference, longest_difference))
    assert (changes > 1e-4) == (rope != "yarn")
    if rope != "yarn":  # a context that would go on is refused
        monkeypatch.setattr("train_llava.model.context_length", lambda _: 4 * length)
        with pytest.raises(ValueError, match=f"{4 * length:,} tokens,? its logits differ from those alone"):
            build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "again")))


def make_tower(folder, kind: str, size: int, patch: int) -> None:
    torch.manual_seed(0)
    vision = NARROW | {"num_hidden_layers": 3, "image_size": size, "patch_size": patch}
    if kind == "clip":
        CLIPVisionModel(CLIPVisionConfig(**vision)).save_pretrained(folder)
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    else:
        text = NARROW | {
            "num_hidden_layers": 1,
            "vocab_size": 64,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
        }
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    processor.save_pretrained(folder)


@pytest.mark.parametrize(
    ("kind", "size", "patch", "options", "tokens"),
    [
        ("clip", 32, 16, {}, 4),
        ("clip", 42, 14, {}, 9),
        ("clip", 28, 7, {"vision_feature_select_strategy": "full"}, 17),
        ("clip", 28, 7, {"vision_feature_layer": -1}, 16),
        ("clip", 28, 7, {"vision_feature_layer": 1, "image_aspect_ratio": "pad"}, 16),
        ("siglip", 32, 8, {}, 16),
        ("siglip", 42, 14, {"vision_feature_layer": -1, "image_aspect_ratio": "pad"}, 9),
    ],
)
def test_features_tokens_and_gradients_follow_the_options_of_the_tower(
    parts, tmp_path, kind, size, patch, options, tokens
):
    make_tower(tmp_path / "tower", kind, size, patch)
    build_model(BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "llava"), **options))
    model, processor = load_checkpoint(str(tmp_path / "llava"))
    wide = Image.new("RGB", (90, 30), "white")
    inputs = processor(images=wide, text="<image>", return_tensors="pt")
    assert inputs["input_ids"].shape == (1, tokens)
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = options.get("vision_feature_layer", -2)
    keeps_all = kind == "siglip" or options.get("vision_feature_select_strategy") == "full"
    expected = model.model.multi_modal_projector(hidden[layer][:, 0 if keeps_all else 1 :])
    assert torch.allclose(model.get_image_features(inputs["pixel_values"]).pooler_output[0], expected[0], atol=1e-6)
    edges = inputs["pixel_values"][0, :, 0]  # a padded picture has the mean colour above it, a cropped one white
    padded = options.get("image_aspect_ratio") == "pad"
    assert (edges.abs().max() < 0.05) == padded
    item = {"id": "x", "messages": to_messages({"image": "x", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "white"}]}), "images": [wide]}  # fmt: skip
    set_trainable(model, "full", LoraArguments())
    model(**LlavaCollator(processor)([item])).loss.backward()
    unused = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    assert unused == set()


def test_a_processor_that_does_not_fit_its_tower_is_refused(parts, tmp_path):
    make_tower(tmp_path / "tower", "clip", 28, 7)
    CLIPImageProcessorPil(size={"shortest_edge": 35}, crop_size={"height": 35, "width": 35}).save_pretrained(
        tmp_path / "tower"
    )
    with pytest.raises(ValueError, match="makes pictures of 35 pixels a side, its vision tower takes 28"):
        build_model(BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "llava")))


def test_a_checkpoint_of_the_tutorial_opens_as_it_is(llava, parts, tmp_path, capsys):
    old = tmp_path / "old"
    model, processor = load_checkpoint(str(llava))
    model.save_pretrained(old)
    processor.image_processor.save_pretrained(old)
    processor.tokenizer.chat_template = AutoTokenizer.from_pretrained(parts["qwen2"]).chat_template
    processor.tokenizer.save_pretrained(old)
    assert not (old / "processor_config.json").exists()
    capsys.readouterr()
    again, derived = load_checkpoint(str(old))
    assert (
        "lacks the number of tokens a picture has and a chat template that takes pictures" in capsys.readouterr().err
    )
    _, processor = load_checkpoint(str(llava))
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    picture = [Image.new("RGB", (50, 30), "red")]
    assert generate(again, derived, [question], picture, 8) == generate(model, processor, [question], picture, 8)


# as llava-hf/llava-1.5-7b-hf has it: parts only, pictures first, and nothing after an answer
LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_a_checkpoint_of_llava_hf_opens_and_learns_to_stop(llava, tmp_path, capsys):
    model, processor = load_checkpoint(str(llava))
    model.save_pretrained(tmp_path / "hf")
    processor.chat_template = processor.tokenizer.chat_template = LLAVA_HF
    processor.save_pretrained(tmp_path / "hf")
    capsys.readouterr()
    _, processor = load_checkpoint(str(tmp_path / "hf"))
    lacked = "lacks a chat template that takes pictures in strings and an end of the answers in its chat template"
    assert lacked in capsys.readouterr().err
    records = ["What is <image>?", "a red square", "Sure?", "yes"]
    conversation = [{"from": who, "value": text} for who, text in zip(["human", "gpt"] * 2, records, strict=True)]
    messages = to_messages({"image": "x", "conversations": conversation})
    input_ids, labels = LlavaCollator(processor).chat.encode(messages)
    eos = processor.tokenizer.eos_token
    said = processor.tokenizer.decode(labels[labels != -100])
    assert said == f" a red square{eos} yes{eos}"
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert prompt == f"USER: <image>\nWhat is  ? ASSISTANT: a red square{eos} USER: Sure? ASSISTANT:"
    assert processor.tokenizer.decode(input_ids).replace("<image>" * 16, "<image>") == f"{prompt} yes{eos} "


@pytest.mark.parametrize("trust", [False, True])
def test_code_of_a_language_model_is_never_run(parts, tmp_path, trust):
    folder = tmp_path / "lm"
    make_tokenizer(folder, QWEN, CHATML, "<|im_end|>", "<|endoftext|>")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises((OSError, ValueError), match="transformers has no code for a own"):
        build_model(BuildArguments(str(parts["clip"]), str(folder), str(tmp_path / "out"), trust_remote_code=trust))
    assert not (tmp_path / "ran").exists()
