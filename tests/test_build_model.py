"""The assembled checkpoint holds both models unchanged, opens with transformers alone, and fails cleanly."""

import json

import pytest
import torch
from conftest import CHATML
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    GenerationConfig,
    Qwen2ForCausalLM,
    pipeline,
)

from train_llava.build_model import build_model
from train_llava.chat import complete_template, end_of_turn_tokens
from train_llava.model import load_checkpoint

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


def test_dtype_sets_what_is_written(parts, tmp_path):
    build_model(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "model"), dtype="bfloat16")
    model, _ = load_checkpoint(str(tmp_path / "model"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_full_vocabulary_gets_a_row_and_keeps_its_own(parts, tmp_path):
    language_model = Qwen2ForCausalLM.from_pretrained(parts["qwen2"])
    language_model.resize_token_embeddings(300)
    language_model.save_pretrained(tmp_path / "full")
    AutoTokenizer.from_pretrained(parts["qwen2"]).save_pretrained(tmp_path / "full")
    build_model(str(parts["clip"]), str(tmp_path / "full"), str(tmp_path / "model"))
    model, processor = load_checkpoint(str(tmp_path / "model"))
    assert len(processor.tokenizer) == 301 <= model.config.text_config.vocab_size == 320
    assert torch.equal(model.get_input_embeddings().weight[:300], language_model.get_input_embeddings().weight)


def test_end_of_turn_token_is_read_off_the_template(parts):
    tokenizer = AutoTokenizer.from_pretrained(parts["qwen2"])
    complete_template(tokenizer)
    assert end_of_turn_tokens(tokenizer) == ["<|im_end|>"]
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "\n###\n")
    assert complete_template(tokenizer)[-1].startswith("an end")
    assert end_of_turn_tokens(tokenizer) == [tokenizer.eos_token]


@pytest.mark.parametrize(
    ("vision", "language", "message"),
    [
        ("clip", "missing", "missing"),
        ("missing", "qwen2", "missing"),
        ("qwen2", "qwen2", "not a CLIP or SigLIP vision tower"),
        ("clip", "no_template", "no chat template"),
    ],
)
def test_a_wrong_part_is_named_and_nothing_is_left(parts, tmp_path, vision, language, message):
    tokenizer = AutoTokenizer.from_pretrained(parts["qwen2"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "no_template")
    folders = parts | {"missing": tmp_path / "missing", "no_template": tmp_path / "no_template"}
    with pytest.raises((OSError, ValueError), match=message):
        build_model(str(folders[vision]), str(folders[language]), str(tmp_path / "out" / "model"))
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_overwritten(parts, llava):
    before = (llava / "config.json").read_text()
    with pytest.raises(ValueError, match="exists already"):
        build_model(str(parts["clip"]), str(parts["qwen2"]), str(llava))
    assert (llava / "config.json").read_text() == before


def test_a_checkpoint_that_differs_from_its_parts_is_refused(parts, tmp_path, monkeypatch):
    save = Qwen2ForCausalLM.save_pretrained

    def save_with_a_fault(self, *args, **kwargs):
        with torch.no_grad():
            self.model.language_model.layers[0].mlp.up_proj.weight.mul_(-1)
        save(self, *args, **kwargs)

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.save_pretrained", save_with_a_fault)
    with pytest.raises(ValueError, match="text-only logits differ"):
        build_model(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "model"))
    assert list(tmp_path.iterdir()) == []
