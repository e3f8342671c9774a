"""Other programs serve a checkpoint as it is: transformers' own server, and what vLLM looks for in a folder."""

import base64
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import run_train
from safetensors import safe_open

from train_llava.data import LlavaDataset
from train_llava.evaluation.generation import generate
from train_llava.merge_lora import merge_lora
from train_llava.model import load_checkpoint


def ask(url: str, request: dict | None = None) -> dict:
    body = None if request is None else json.dumps(request).encode()
    with urllib.request.urlopen(
        urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=60
    ) as answer:
        return json.load(answer)


@pytest.fixture
def server(llava):
    """transformers' server of the checkpoint: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", llava, "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        assert running.poll() is None, running.stdout.read().decode()[-2000:]
        try:
            ask(f"{address}/health")
            break
        except OSError:
            time.sleep(0.5)
    yield address
    running.terminate()
    running.wait()


@pytest.mark.slow
def test_transformers_serves_the_checkpoint(llava, corpus, server):
    item = LlavaDataset(str(corpus))[0]
    model, processor = load_checkpoint(str(llava))
    (ours,) = generate(model.eval(), processor, [item["messages"][:1]], item["images"], 8)
    buffer = io.BytesIO()
    item["images"][0].save(buffer, "png")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    request = {
        "model": str(llava),
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = ask(f"{server}/v1/chat/completions", request)
    assert answer["choices"][0]["message"]["content"].strip() == ours.strip()


# of its `LlavaForConditionalGeneration.hf_to_vllm_mapper`
VLLM_PREFIXES = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}


def vllm_name(name: str) -> str:
    """Where vLLM 0.33 puts a weight."""
    old = next((prefix for prefix in VLLM_PREFIXES if name.startswith(prefix)), "")
    return VLLM_PREFIXES.get(old, "") + name.removeprefix(old)


@pytest.mark.parametrize("made", ["build_model", "train", "merge_lora"])
def test_vllm_finds_its_weights_and_fields(made, llava, corpus, tmp_path, monkeypatch):
    """The names of weights and the fields that vLLM 0.33 reads: models/llava.py, models/clip.py."""
    folder = tmp_path / "run"
    arguments = ["--max_steps", "1", "--preflight", "false", "--save_strategy", "no"]
    if made == "train":
        run_train(monkeypatch, llava, corpus, folder, *arguments, "--train_type", "full")
    elif made == "merge_lora":
        run_train(monkeypatch, llava, corpus, tmp_path / "adapter", *arguments, "--lora_r", "4")
        merge_lora(str(llava), str(tmp_path / "adapter"), str(folder))
    else:
        folder = llava
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [vllm_name(name) for name in file.keys()]  # noqa: SIM118
    places = (
        r"vision_tower\.vision_model\.(embeddings|pre_layrnorm|encoder\.layers\.\d+|post_layernorm)\.",
        r"multi_modal_projector\.linear_[12]\.(weight|bias)$",
        r"language_model\.(model\.(embed_tokens|layers\.\d+|norm)|lm_head)\.",
    )
    for place in places:
        assert any(re.match(place, name) for name in names), place
    assert [name for name in names if not any(re.match(place, name) for place in places)] == []
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "processor_config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["image_token_index"] == load_checkpoint(str(folder))[1].tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(config["vision_feature_layer"], int)
    assert config["vision_feature_select_strategy"] == processor["vision_feature_select_strategy"] == "default"
    assert processor["image_token"] == "<image>"
    assert processor["patch_size"] == config["vision_config"]["patch_size"]
    assert (folder / "tokenizer_config.json").exists()
