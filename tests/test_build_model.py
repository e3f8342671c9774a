"""The assembled checkpoint holds both models unchanged, opens with transformers alone, and fails cleanly."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHATML, NARROW, make_tokenizer, run_train, turns
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    DeepseekV32Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    GenerationConfig,
    GPTNeoXConfig,
    GptOssConfig,
    Lfm2Config,
    Mamba2Config,
    PixtralImageProcessorPil,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SiglipConfig,
    pipeline,
)

from train_llava.build_model import BuildArguments, build_model, load_projector
from train_llava.chat import Chat
from train_llava.data import LlavaCollator
from train_llava.evaluation.generation import generate, sampling, user_message
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.adapter import load_model
from train_llava.modeling.parts import part_config
from train_llava.modeling.templates import end_of_turn_tokens, patch_chat_template
from train_llava.modeling.verification import packing_difference, reference_outputs, tolerance, verify_for_training
from train_llava.records import to_messages
from train_llava.training.optimizer import describe_trainable

PICTURE = Image.new("RGB", (50, 30), "red")


def test_weights_are_those_of_the_parts(parts, model):
    tower = CLIPModel.from_pretrained(parts["clip"]).vision_model.state_dict()
    language_model = Qwen2ForCausalLM.from_pretrained(parts["qwen2"]).state_dict()
    joined = model.model.language_model.state_dict(prefix="model.") | {"lm_head.weight": model.lm_head.weight}
    assert tower.keys() == model.model.vision_tower.state_dict().keys()
    assert all(torch.equal(tensor, tower[name]) for name, tensor in model.model.vision_tower.state_dict().items())
    assert language_model.keys() == joined.keys()
    assert all(torch.equal(tensor, language_model[name]) for name, tensor in joined.items())


def test_processor_and_config_agree(llava, processor):
    config = json.loads((llava / "config.json").read_text())
    tokenizer = processor.tokenizer
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
    assert processor.vision_feature_select_strategy == config["vision_feature_select_strategy"] == "default"
    assert config["image_token_index"] == tokenizer.convert_tokens_to_ids("<image>") == 300
    assert tokenizer.encode("<image>", add_special_tokens=False) == [300]
    assert "<image>" not in tokenizer.decode([300, 5], skip_special_tokens=True)
    assert config["pad_token_id"] == tokenizer.pad_token_id == 0
    assert GenerationConfig.from_pretrained(llava).eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    text = processor.apply_chat_template([{"role": "user", "content": "<image>\nhi"}])
    assert processor(images=PICTURE, text=text)["input_ids"][0].count(300) == config["image_seq_length"] == 16


def test_no_path_of_this_machine_is_saved(llava, parts):
    written = "".join(file.read_text() for file in llava.glob("*.json"))
    assert str(parts["clip"].parent) not in written
    assert str(llava.parent) not in written


def test_the_template_takes_structured_content_and_leaves_strings_alone(parts, processor):
    alone = AutoTokenizer.from_pretrained(parts["qwen2"])
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "这是什么?"}]
    assert processor.tokenizer.apply_chat_template(plain, tokenize=False) == alone.apply_chat_template(
        plain, tokenize=False
    )
    parts_of_content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    structured = processor.apply_chat_template([{"role": "user", "content": parts_of_content}])
    assert "user\n<image>\nWhat is this?<|im_end|>" in structured
    assert structured == processor.apply_chat_template([{"role": "user", "content": "<image>\nWhat is this?"}])


def test_transformers_alone_opens_it_and_answers(llava):
    model = AutoModelForImageTextToText.from_pretrained(llava)
    processor = AutoProcessor.from_pretrained(llava)
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ask = pipeline("image-text-to-text", model=str(llava))
    answer = ask(
        text=[{"role": "user", "content": content}],
        return_full_text=False,
        generate_kwargs={"max_new_tokens": 5, "do_sample": False},
    )
    assert answer[0]["generated_text"] == processor.decode(output, skip_special_tokens=True)


def test_dtype_sets_the_precision_of_the_weights(parts, tmp_path):
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "model"), dtype="bfloat16"))
    model, _ = load_checkpoint(str(tmp_path / "model"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_full_vocabulary_gets_one_more_row_and_keeps_the_others(parts, tmp_path):
    language_model = Qwen2ForCausalLM.from_pretrained(parts["qwen2"])
    language_model.resize_token_embeddings(300)
    language_model.save_pretrained(tmp_path / "full")
    AutoTokenizer.from_pretrained(parts["qwen2"]).save_pretrained(tmp_path / "full")
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "full"), str(tmp_path / "model")))
    model, processor = load_checkpoint(str(tmp_path / "model"))
    assert len(processor.tokenizer) == 301 <= model.config.text_config.vocab_size == 320
    assert torch.equal(model.get_input_embeddings().weight[:300], language_model.get_input_embeddings().weight)


def test_end_of_turn_token_is_read_off_the_template(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["qwen2"])
    patch_chat_template(tokenizer)
    assert end_of_turn_tokens(tokenizer) == ["<|im_end|>"]
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\n###\n")
    assert patch_chat_template(tokenizer)[-1].startswith("an end")
    assert end_of_turn_tokens(tokenizer) == [tokenizer.eos_token]


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        ("clip", "missing", "missing"),
        ("missing", "qwen2", "missing"),
        ("qwen2", "qwen2", "is a qwen2 model, not a vision tower"),
        ("clip", "no_template", "no chat template"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_is_left(parts, tmp_path, vision, language, message):
    tokenizer = AutoTokenizer.from_pretrained(parts["qwen2"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "no_template")
    shutil.copy(parts["qwen2"] / "config.json", tmp_path / "no_template")
    folders = parts | {"missing": tmp_path / "missing", "no_template": tmp_path / "no_template"}
    with pytest.raises((OSError, ValueError), match=message):
        build_model(BuildArguments(str(folders[vision]), str(folders[language]), str(tmp_path / "out" / "model")))
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(parts, llava):
    before = (llava / "config.json").read_text()
    with pytest.raises(ValueError, match="exists already"):
        build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(llava)))
    assert (llava / "config.json").read_text() == before


def test_a_checkpoint_that_differs_from_its_parts_is_refused(parts, tmp_path, monkeypatch):
    save = Qwen2ForCausalLM.save_pretrained

    def save_with_a_fault(self, *args, **kwargs):
        with torch.no_grad():
            self.model.language_model.layers[0].mlp.up_proj.weight.mul_(-1)
        save(self, *args, **kwargs)

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.save_pretrained", save_with_a_fault)
    with pytest.raises(ValueError, match="text-only logits differ"):
        build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "model")))
    assert list(tmp_path.iterdir()) == []


LM = NARROW | {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256}


def save_language_model(folder, config, model_class=None):
    """A random language model of some architecture, with the tiny chat tokenizer."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    make_tokenizer(folder, special, CHATML, "<|im_end|>", "<|endoftext|>")
    config.get_text_config().update({"vocab_size": 320, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None})
    torch.manual_seed(0)
    model = model_class(config) if model_class else AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    return model.eval()


def rows_of(output: str) -> dict[str, str]:
    """The table that build_model prints."""
    return {line[:26].strip(): line[26:] for line in output.splitlines() if len(line) > 26}


def test_the_printed_table_holds_the_measurements(parts, tmp_path, capsys):
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "llava"), verbose=True))
    rows = rows_of(capsys.readouterr().out)
    assert rows["what is learnt"] == "each answer with <|im_end|>, where generation stops"
    assert rows["generation prompt"] == r"as in training, '<|im_end|>\n<|im_start|>assistant\n'"
    assert rows["packed against alone"].startswith("equal (difference ")
    assert rows["batched against single"].startswith("equal (difference ")
    assert rows["tokens a picture"] == "16 written, 16 features"


def without(folder, copy, lost):
    """A copy of a checkpoint that lacks the weights whose names hold `lost`."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("part", "lost", "message"),
    [
        ("qwen2", "layers.1.", "lacks weights of the language model, .*model.layers.1.input_layernorm.weight"),
        ("qwen2", "lm_head", "lacks weights of the language model, .*lm_head.weight"),
        ("clip", "vision_model.encoder.layers.2.", "lacks weights of its vision tower, .*layers.2.layer_norm1.bias"),
        ("clip", "position_embedding", "lacks weights of its vision tower, .*position_embedding"),
    ],
)
def test_a_part_that_lacks_weights_is_refused(parts, tmp_path, part, lost, message):
    broken = parts | {part: without(parts[part], tmp_path / "broken", lost)}
    with pytest.raises(ValueError, match=message):
        build_model(BuildArguments(str(broken["clip"]), str(broken["qwen2"]), str(tmp_path / "out" / "llava")))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_clip_without_its_text_model_is_enough(parts, llava, tmp_path):
    clip = without(parts["clip"], tmp_path / "clip", "text_model.")
    build_model(BuildArguments(str(clip), str(parts["qwen2"]), str(tmp_path / "llava")))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llava", llava))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def edited(folder, copy, file, **settings):
    """A copy of a checkpoint with other settings in one of its JSON files."""
    shutil.copytree(folder, copy)
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | settings))
    return copy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "its weights are quantised"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "its weights are quantised"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "transformers has no code for a own"),
        ({"model_type": "t5"}, "is a t5, which is no model of that kind"),
        ({"model_type": "qwen2_5_vl"}, "is a qwen2_5_vl, whose text half transformers never opens alone"),
    ],
)
@pytest.mark.parametrize("trust", [False, True])
def test_a_language_model_that_a_llava_cannot_hold_is_refused(parts, tmp_path, settings, message, trust):
    folder = edited(parts["qwen2"], tmp_path / "edited", "config.json", **settings)
    with pytest.raises(ValueError, match=f"edited .*{message}"):
        build_model(BuildArguments(str(parts["clip"]), str(folder), str(tmp_path / "llava"), trust_remote_code=trust))
    assert not (tmp_path / "llava").exists()


def test_a_quantization_config_of_null_counts_as_none(parts, tmp_path):
    folder = edited(parts["qwen2"], tmp_path / "lm", "config.json", quantization_config=None)
    assert part_config(str(folder)).model_type == "qwen2"


def test_a_tokenizer_with_a_picture_token_of_its_own_gets_this_one(parts, tmp_path):
    """As Gemma 3's, in its sizes without a tower, too."""
    shutil.copytree(parts["qwen2"], tmp_path / "lm")
    named = {"extra_special_tokens": {"image_token": "<image_soft_token>"}}
    AutoTokenizer.from_pretrained(parts["qwen2"], **named).save_pretrained(tmp_path / "lm")
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").image_token == "<image_soft_token>"
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    assert processor.image_token == processor.tokenizer.image_token == "<image>"


@pytest.mark.parametrize(
    ("pictures", "message"),
    [(Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), "gives num_crops with a picture"),
     (PixtralImageProcessorPil(patch_size=7, size={"longest_edge": 64}), "makes no square of a wide picture")],
    ids=["more than pixels", "any size"],
)  # fmt: skip
def test_an_image_processor_that_a_llava_cannot_use_is_refused(parts, tmp_path, pictures, message):
    shutil.copytree(parts["clip"], tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").unlink(missing_ok=True)
    pictures.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=message):
        build_model(
            BuildArguments(
                str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "llava"), image_aspect_ratio="crop"
            )
        )


def test_a_processor_of_another_kind_is_named(llava, tmp_path):
    folder = edited(llava, tmp_path / "copy", "processor_config.json", processor_class="CLIPProcessor")
    with pytest.raises(ValueError, match="copy cannot be opened: its processor is a CLIPProcessor and no LLaVA's"):
        load_checkpoint(str(folder))


def test_an_architecture_that_does_not_run_as_one_is_refused(parts, tmp_path):
    config = Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, state_size=8, num_hidden_layers=1)
    save_language_model(tmp_path / "lm", config)
    with pytest.raises(ValueError, match="do not run as one LLaVA"):
        build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    assert not (tmp_path / "llava").exists()


@pytest.mark.parametrize("layer", [-30, -5, 4, 50])
def test_a_layer_out_of_range_is_refused(parts, tmp_path, layer):
    with pytest.raises(ValueError, match=f"--vision_feature_layer {layer}: the tower has hidden states -4 to 3"):
        build_model(
            BuildArguments(
                str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "llava"), vision_feature_layer=layer
            )
        )


def test_settings_of_sampling_that_never_takes_place_can_be_saved(parts, tmp_path):
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    greedy = edited(parts["qwen2"], tmp_path / "greedy", "generation_config.json", **sampling)
    drawn = edited(parts["qwen2"], tmp_path / "drawn", "generation_config.json", **sampling, do_sample=True)
    for folder in (greedy, drawn):
        build_model(
            BuildArguments(str(parts["clip"]), str(folder), str(tmp_path / "llava" / folder.name), skip_checks=True)
        )
    assert GenerationConfig.from_pretrained(tmp_path / "llava" / "greedy").temperature is None
    assert GenerationConfig.from_pretrained(tmp_path / "llava" / "drawn").to_diff_dict().items() >= sampling.items()


def test_greedy_answers_ignore_the_language_models_own_generation_rules(parts, llava, tmp_path):
    """Qwen's chat models penalise words that the conversation already has; others have rules of their own."""
    rules = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 7, "suppress_tokens": [40, 41]}
    with_rules = edited(parts["qwen2"], tmp_path / "lm", "generation_config.json", **rules, do_sample=True, min_p=0.9)
    build_model(BuildArguments(str(parts["clip"]), str(with_rules), str(tmp_path / "llava"), skip_checks=True))
    saved = GenerationConfig.from_pretrained(tmp_path / "llava").to_diff_dict()
    assert not rules.keys() & saved.keys()
    asked = [user_message("red red red blue?", 0)]
    model, processor = load_model(str(tmp_path / "llava"))
    assert generate(model, processor, [asked], [], 12) == generate(*load_model(str(llava)), [asked], [], 12)
    torch.manual_seed(0)
    drawn = {generate(model, processor, [asked], [], 12, **sampling(3.0, 1.0))[0] for _ in range(4)}
    assert len(drawn) > 2  # min_p 0.9 would leave the likeliest token alone


def test_a_language_model_with_a_tower_of_its_own_gives_its_text_half(parts, tmp_path, capsys):
    vision = NARROW | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 7}
    config = Gemma3Config(text_config=LM | {"sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4)
    whole = save_language_model(tmp_path / "whole", config, Gemma3ForConditionalGeneration)
    without(tmp_path / "whole", tmp_path / "lm", "vision_tower")  # which nobody reads
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    model, _ = load_checkpoint(str(tmp_path / "llava"))
    assert model.config.text_config.model_type == "gemma3_text"
    ids = torch.tensor([[5, 40, 7, 80, 33]])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=ids).logits[..., :320], whole(input_ids=ids).logits)


def test_a_llava_lends_its_tower(parts, llava, tmp_path):
    build_model(BuildArguments(str(llava), str(parts["qwen2"]), str(tmp_path / "llava")))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llava", llava))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_pad_resizes_to_what_the_tower_takes(parts, tmp_path):
    clip = tmp_path / "clip"
    shutil.copytree(parts["clip"], clip)
    CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 28, "width": 28}).save_pretrained(clip)
    build_model(BuildArguments(str(clip), str(parts["qwen2"]), str(tmp_path / "llava"), image_aspect_ratio="pad"))
    processor = AutoProcessor.from_pretrained(tmp_path / "llava")
    wide = Image.new("RGB", (80, 20), "red")
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)
    red = pixels[0, 0] > 1  # the padding is of the mean colour
    assert red.any(dim=0).all()  # both sides are kept
    assert 6 <= red.any(dim=1).sum() <= 8  # a quarter as high as wide


SMALL_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_ATTENTION = {f"linear_{name}": n for name, n in (
    ("num_key_heads", 2), ("num_value_heads", 2), ("key_head_dim", 16), ("value_head_dim", 16))}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("config", "packs"),
    [
        (GPTNeoXConfig(**{name: value for name, value in LM.items() if name != "head_dim"}), True),
        (Qwen3MoeConfig(**LM, **SMALL_EXPERTS), True),
        (GptOssConfig(**LM, num_local_experts=4, num_experts_per_tok=2, sliding_window=8), False),
        (
            Lfm2Config(
                **{name: value for name, value in LM.items() if name != "head_dim"},
                layer_types=["conv", "full_attention"],
                block_multiple_of=8,
                initializer_range=0.3,
            ),
            False,
        ),
        (
            Qwen3NextConfig(
                **LM, **SMALL_EXPERTS, **LINEAR_ATTENTION, layer_types=["linear_attention", "full_attention"]
            ),
            False,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_packing_is_reported_as_equal_only_where_it_is(parts, tmp_path, capsys, config, packs, dtype):
    save_language_model(tmp_path / "lm", config)
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava"), dtype=dtype))
    rows = rows_of(capsys.readouterr().out)
    assert rows["verified"].startswith("12 checks: ")
    assert ("packed against alone" in rows, "text-only logits" in rows) == (not packs, False)
    row = rows.get("packed against alone", "equal")
    assert row.startswith("equal" if packs else "not equal: training refuses --packing")
    model, processor = load_checkpoint(str(tmp_path / "llava"), torch.float32)
    texts = ("What is this?", "a red square"), ("And this? " * 5, "a blue circle, " * 4)
    items = [
        {"id": str(i), "images": [], "messages": to_messages({"conversations": turns(*pair)})}
        for i, pair in enumerate(texts)
    ]
    with torch.inference_mode():
        alone = model(**LlavaCollator(processor)(items)).loss
        try:
            packed = model(**LlavaCollator(processor, packing=True)(items)).loss
        except ValueError:  # transformers itself refuses some architectures
            packed = torch.inf
    assert (abs(packed - alone) < 1e-6) == packs


def test_a_leak_between_packed_conversations_is_not_taken_for_noise(parts, tmp_path):
    """A model that chooses tokens by an index sees, in a text longer than it chooses, what follows: in front, too."""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    index = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1}
    save_language_model(
        tmp_path / "lm", DeepseekV32Config(**LM | {"num_key_value_heads": 2}, **latent, **experts, **index)
    )
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava"), skip_checks=True))
    model, processor = load_checkpoint(str(tmp_path / "llava"))
    packed, equal = packing_difference(model, Chat(processor))
    assert packed > 100 * tolerance(torch.float32)
    assert not equal
    with pytest.raises(ValueError, match="--packing: a deepseek_v32 mixes"):
        verify_for_training(model, processor, packing=True)
    with pytest.raises(ValueError, match="with a cache, in 256 tokens, its logits differ"):
        build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "checked")))


def test_experts_get_no_adapter_and_the_table_reports_it(parts, tmp_path):
    save_language_model(tmp_path / "lm", Qwen3MoeConfig(**LM, **SMALL_EXPERTS))
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    model = set_trainable(load_checkpoint(str(tmp_path / "llava"))[0], "lora", LoraArguments(lora_r=2))
    table = describe_trainable(model, dict.fromkeys(("vision tower", "projector", "language model"), 1e-4))
    assert table.splitlines()[-1] == "no adapter on mlp.experts.down_proj, mlp.experts.gate_up_proj: no linear layers"
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("self_attn.q_proj.lora_A" in name for name in adapted)
    assert not any("experts" in name for name in adapted)


@pytest.mark.parametrize("lost", [("num_additional_image_tokens",), ("vision_feature_select_strategy",), (
    "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")])  # fmt: skip
def test_a_processor_of_an_older_version_gets_the_tokens_of_its_tower(llava, tmp_path, capsys, lost):
    old = tmp_path / "old"
    shutil.copytree(llava, old)
    settings = json.loads((old / "processor_config.json").read_text())
    kept = {name: value for name, value in settings.items() if name not in lost}
    (old / "processor_config.json").write_text(json.dumps(kept))
    model, processor = load_checkpoint(str(old))
    assert "lacks the number of tokens a picture has" in capsys.readouterr().err
    assert (processor.patch_size, processor.num_additional_image_tokens) == (7, 1)
    inputs = processor(images=PICTURE, text="<image>\nhi", return_tensors="pt")
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_batch_is_answered_as_its_questions_alone(llava):
    model, processor = (kind.from_pretrained(llava) for kind in (AutoModelForImageTextToText, AutoProcessor))
    assert processor.tokenizer.padding_side == "left"
    questions = ["<image>\nhi", "<image>\nWhat is this, and what is it not?", "这是什么?\n<image>"]
    texts = [
        processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in questions
    ]
    pictures = [Image.new("RGB", (50, 30), color) for color in ("red", "green", "blue")]

    def answers(texts, pictures):
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        return model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :].tolist()

    assert answers(texts, pictures) == [answers([texts[i]], [pictures[i]])[0] for i in range(3)]


def test_training_refuses_packing_where_conversations_see_each_other(parts, corpus, tmp_path, monkeypatch):
    config = GptOssConfig(**LM, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    save_language_model(tmp_path / "lm", config)
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava")))
    with pytest.raises(ValueError, match="--packing: a gpt_oss mixes the conversations of a row"):
        run_train(monkeypatch, tmp_path / "llava", corpus, tmp_path / "run", "--packing", "true", "--max_steps", "1")
    assert not (tmp_path / "run").exists()


def test_reference_outputs_keep_no_graph(parts, processor):
    tower = CLIPModel.from_pretrained(parts["clip"]).vision_model
    outputs = reference_outputs(tower, Qwen2ForCausalLM.from_pretrained(parts["qwen2"]), processor, -2)
    assert [output.requires_grad for output in outputs] == [False, False]  # a graph would hold both models in memory


def test_a_tied_model_may_have_either_of_the_two_names(parts, tmp_path):
    save_language_model(tmp_path / "tied", Qwen2Config(**LM, tie_word_embeddings=True))
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    embedding = weights.pop("model.embed_tokens.weight")
    shutil.copytree(tmp_path / "tied", tmp_path / "head")
    save_file(weights | {"lm_head.weight": embedding}, tmp_path / "head" / "model.safetensors", {"format": "pt"})
    build_model(BuildArguments(str(parts["clip"]), str(tmp_path / "head"), str(tmp_path / "llava")))
    model, _ = load_checkpoint(str(tmp_path / "llava"))
    assert torch.equal(model.get_input_embeddings().weight[: len(embedding)], embedding)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_another_towers_weights_are_refused(parts, tmp_path):
    vision = NARROW | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
    config = SiglipConfig(text_config=NARROW | {"num_hidden_layers": 1, "vocab_size": 64}, vision_config=vision)
    siglip = tmp_path / "siglip"
    config.save_pretrained(siglip)
    for name in ("model.safetensors", "preprocessor_config.json"):
        shutil.copy(parts["clip"] / name, siglip)
    with pytest.raises(ValueError, match="siglip"):
        build_model(BuildArguments(str(siglip), str(parts["qwen2"]), str(tmp_path / "llava")))
    assert not (tmp_path / "llava").exists()


def published_layout(projector: dict[str, torch.Tensor], path: Path) -> None:
    """Writes a projector as LLaVA's authors publish theirs."""
    numbers = {"linear_1": 0, "linear_2": 2}
    names = {name: re.sub(r"linear_\d", lambda m: str(numbers[m[0]]), name) for name in projector}
    torch.save({f"model.mm_projector.{names[name]}": tensor for name, tensor in projector.items()}, path)


@pytest.mark.parametrize("ratio", ["crop", "anyres"])
def test_a_trained_projector_is_loaded_from_either_layout(parts, corpus, tmp_path, monkeypatch, capsys, ratio):
    """What stage 1 has trained, alone, and what it has written whole are one model once more."""
    options = {"image_aspect_ratio": ratio}
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "llava"), **options))
    run = ["--train_type", "projector", "--max_steps", "2", "--learning_rate", "1e-2"]
    run_train(monkeypatch, tmp_path / "llava", corpus, tmp_path / "run", *run)
    trained = load_file(tmp_path / "run" / "projector.safetensors")
    assert trained.keys() == {
        name for name in load_file(tmp_path / "run" / "model.safetensors") if "projector" in name or "newline" in name
    }
    build_model(
        BuildArguments(
            str(parts["clip"]),
            str(parts["qwen2"]),
            str(tmp_path / "again"),
            projector=str(tmp_path / "run" / "projector.safetensors"),
            skip_checks=True,
            **options,
        )
    )
    whole, again, before = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "again", "llava"))
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert any(not torch.equal(whole[name], before[name]) for name in trained)
    layers = {name.removeprefix("multi_modal_projector."): t for name, t in trained.items() if "projector" in name}
    published_layout(layers, tmp_path / "mm_projector.bin")
    build_model(
        BuildArguments(
            str(parts["clip"]),
            str(parts["qwen2"]),
            str(tmp_path / "theirs"),
            projector=str(tmp_path / "mm_projector.bin"),
            skip_checks=True,
            **options,
        )
    )
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert all(torch.equal(theirs[f"multi_modal_projector.{name}"], tensor) for name, tensor in layers.items())
    # LLaVA's authors publish no newline of tiles: who starts from their projector is told that it is random
    assert ("It has no image_newline" in capsys.readouterr().err) == (ratio == "anyres")
    assert ("It has no image_newline" in (tmp_path / "theirs" / "README.md").read_text()) == (ratio == "anyres")


def test_a_projector_is_recognised_by_its_content(tmp_path):
    """Not by the ending of its name, nor by the prefix of its layers; a run's folder stands for its projector."""
    layers = {f"linear_{i}.{kind}": torch.rand(2) for i in (1, 2) for kind in ("weight", "bias")}
    for prefix in ("", "multi_modal_projector.", "model.multi_modal_projector.", "mm_projector."):
        for name, save in (("safe.bin", save_file), ("torch.safetensors", torch.save)):
            save({f"{prefix}{layer}": tensor for layer, tensor in layers.items()}, tmp_path / name)
            read = load_projector(str(tmp_path / name))
            assert read.keys() == layers.keys()
            assert all(torch.equal(read[layer], tensor) for layer, tensor in layers.items())
    save_file(layers, tmp_path / "projector.safetensors")
    assert load_projector(str(tmp_path)).keys() == layers.keys()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            {"linear_1.weight": (48, 32)},
            r"linear_1.weight is \(48, 32\), and these two models need \(32, 32\)",
        ),
        ({"linear_2.bias": None}, "no projector of two linear layers"),
        ({"linear_3.bias": (32,)}, "no projector of two linear layers"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused_by_name(parts, tmp_path, fault, message):
    shapes = {"linear_1.weight": (32, 32), "linear_1.bias": (32,), "linear_2.weight": (32, 32), "linear_2.bias": (32,)}
    tensors = {name: torch.zeros(shape) for name, shape in (shapes | fault).items() if shape is not None}
    save_file(
        {f"multi_modal_projector.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "p.safetensors"
    )
    with pytest.raises(ValueError, match=message):
        build_model(
            BuildArguments(
                str(parts["clip"]),
                str(parts["qwen2"]),
                str(tmp_path / "out"),
                projector=str(tmp_path / "p.safetensors"),
            )
        )
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_projector_is_refused_in_a_line(tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"{")
    (tmp_path / "torn.bin").write_bytes(b"no pickle")
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    torch.save({f"linear_{i}.{kind}": 1 for i in (1, 2) for kind in ("weight", "bias")}, tmp_path / "numbers.bin")
    torch.save(Path("code.bin"), tmp_path / "code.bin")
    for name, reason in (
        ("torn.safetensors", "neither safetensors nor"),
        ("torn.bin", "neither safetensors nor"),
        ("code.bin", "neither safetensors nor"),
        ("list.bin", "no dictionary of tensors"),
        ("numbers.bin", "no dictionary of tensors"),
    ):
        with pytest.raises(ValueError, match=rf"{name} cannot be opened: it is {reason}"):
            load_projector(str(tmp_path / name))
    with pytest.raises(OSError, match=r"projector\.safetensors"):
        load_projector(str(tmp_path))
