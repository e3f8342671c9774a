"""The README's commands for the 4B setup, word for word, against a hub with tiny parts in the published layout."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import SENTENCES, free_port
from hub import Hub
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
CLIP, QWEN, DATA = "openai/clip-vit-large-patch14-336", "Qwen/Qwen1.5-4B-Chat", "liuhaotian/LLaVA-CC3M-Pretrain-595K"
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2))


def publish_clip(folder: Path) -> None:
    """As published in 2022: a pickle with the positions in it, sizes as numbers, the text half beside."""
    folder.mkdir(parents=True)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "projection_dim": 16}
    text = narrow | {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 2}
    vision = narrow | {"num_hidden_layers": 3, "image_size": 336, "patch_size": 14}
    torch.manual_seed(0)
    weights = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).state_dict()
    weights |= {f"{half}_model.embeddings.position_ids": torch.arange(size)[None]
                for half, size in (("text", 77), ("vision", 577))}  # fmt: skip
    torch.save(weights, folder / "pytorch_model.bin")
    text["model_type"], vision["model_type"] = "clip_text_model", "clip_vision_model"
    write_json(folder / "config.json", {
        "_name_or_path": CLIP, "architectures": ["CLIPModel"], "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 16, "text_config": text,
        "text_config_dict": text, "torch_dtype": "float32", "transformers_version": "4.21.0.dev0",
        "vision_config": vision, "vision_config_dict": vision})  # fmt: skip
    write_json(folder / "preprocessor_config.json", {
        "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 336})  # fmt: skip
    (folder / "tf_model.h5").write_bytes(b"not read")
    (folder / "README.md").write_text("---\ntags:\n- generated_from_keras_callback\n---\n# CLIP")


def publish_qwen(folder: Path) -> None:
    """As published in 2024: shards in bfloat16 with their index, a vocabulary without the special tokens, sampling."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    size = tokenizer.get_vocab_size()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    tokenizer.save(str(folder / "tokenizer.json"))
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(size + i): {"content": name} | plain for i, name in enumerate(names)},
        "additional_special_tokens": names[1:], "bos_token": None, "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 32768, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None})  # fmt: skip
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2,
        vocab_size=size + 20, max_position_embeddings=32768, bos_token_id=size, eos_token_id=size + 2,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="40KB")
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": size,
        "eos_token_id": size + 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 64,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 2,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 5000000.0,
        "sliding_window": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.37.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": config.vocab_size})  # fmt: skip
    write_json(folder / "generation_config.json", {
        "bos_token_id": size, "pad_token_id": size, "do_sample": True, "eos_token_id": [size + 2, size],
        "repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20,
        "transformers_version": "4.37.0"})  # fmt: skip
    (folder / "README.md").write_text("---\nlicense: other\npipeline_tag: text-generation\n---\n# Qwen1.5-4B-Chat")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def publish_data(folder: Path, records: int) -> None:
    """As published in 2023: a list, an archive of pictures without a folder in it, what is known of the pictures."""
    folder.mkdir(parents=True)
    rng, chat, known = np.random.default_rng(0), [], []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(records):
            name, file = f"GCC_train_{i:09}.jpg", io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file, "JPEG")
            archive.writestr(name, file.getvalue())
            question = "Render a clear and concise summary of the photo."
            asked = (f"{question}\n<image>", f"<image>\n{question}")[i % 2]
            turns = [
                {"from": "human", "value": asked},
                {"from": "gpt", "value": ("a red square", "a blue circle")[i % 2]},
            ]
            chat.append({"id": f"{i:09}", "image": name, "conversations": turns})
            known.append(
                {"id": f"{i:09}", "image": name, "caption": "a square", "blip_caption": "x", "url": "http://x"}
            )
    write_json(folder / "chat.json", chat)
    write_json(folder / "metadata.json", known)
    (folder / "README.md").write_text(
        "---\nlicense: other\ntask_categories:\n- visual-question-answering\n---\n# LLaVA"
    )


def commands(name: str) -> list[str]:
    """The commands of the README's section, word for word, without those of the toy example and of LLaVA-1.5-7B."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(f"\n## {name}\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in re.split(r"(?<!\\)\n", block)]
    kept = [line for line in lines if line and not line.startswith("#")]
    others = ("openmoji", "mine-small", "bitsandbytes", "llava-1.5-7b", "output/before")
    return [line for line in kept if not any(other in line for other in others)]


@pytest.fixture
def workplace(tmp_path):
    """A folder as that of this repository, and a hub that has the parts, as a function that runs a command there."""
    for name in ("train_llava", "recipes", "env.sh", "run_zero2.sh", "requirements.txt", "ds_zero2_no_offload.json"):
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / name).symlink_to(ROOT / name)
    with Hub(tmp_path / "hub").serving() as hub:
        publish_clip(hub.folder("models", CLIP))
        publish_qwen(hub.folder("models", QWEN))
        publish_data(hub.folder("datasets", DATA), 48)
        more = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_TOKEN": "hf_x", "CPU_RANKS": "1",
                "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}  # fmt: skip
        environment = hub.environment(tmp_path / "home", **more) | {"PYTHONPATH": ""}

        def run(command: str) -> str:
            settings = {"cwd": tmp_path / "work", "env": environment, "text": True, "stdout": PIPE, "stderr": PIPE}
            if "web_demo" in command:  # it serves until it is stopped
                command = f"exec {command} --port {free_port()}"
                with subprocess.Popen(["bash", "-c", command], **settings) as served:
                    page = served.stdout.readline().strip()
                    while served.poll() is None:
                        with suppress(URLError), urlopen(page) as answer:
                            text = answer.read().decode()
                            served.terminate()
                            return text
                    raise AssertionError(served.stderr.read()[-3000:])
            done = subprocess.run(["bash", "-c", command], input="What is this?\n", check=False, **settings)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return done.stdout

        run.hub, run.folder = hub, tmp_path / "work"
        yield run


@pytest.mark.slow
def test_the_commands_for_the_4b_setup_word_for_word(workplace):
    run, output = workplace, workplace.folder / "output"
    for command in commands("Train"):
        print(command, run(command), sep="\n", flush=True)
    assert (output / "stage2" / "adapter_model.safetensors").exists()

    # Its own data, and held-out data, in the form of the README's example
    for name in ("mine", "heldout"):
        shutil.copytree(workplace.folder / "data" / DATA.split("/")[1], workplace.folder / "data" / name)
    Image.new("RGB", (50, 40), "red").save(workplace.folder / "cat.jpg")
    for command in [*commands("Data"), *commands("Inference and deployment")]:
        print(command, run(command), sep="\n", flush=True)
    assert json.loads((output / "evaluation" / "metrics.json").read_text())["n"] == 48
    assert list((output / "gguf").glob("*.gguf"))

    # The same by hub ids alone, pushed and opened by their ids: to the byte
    ids = f"--vision_model_name_or_path {CLIP} --language_model_name_or_path {QWEN}"
    run(f"python -m train_llava.build_model {ids} --output_dir output/by-id")
    by_id, push = f"--data_path {DATA}", "--push_to_hub true --hub_model_id me"
    run(f"bash run_zero2.sh recipes/one-gpu-stage1.yaml {by_id} --output_dir output/id1 {push}/llava")
    shutil.rmtree(output / "id1")
    by_ids = f"{by_id} --model_name_or_path me/llava"
    run(f"bash run_zero2.sh recipes/one-gpu-stage2.yaml {by_ids} --output_dir output/id2 {push}/adapter")
    pushed = workplace.hub.folder("models", "me/llava")
    assert by_id.split()[1] in (pushed / "README.md").read_text()
    adapter = "adapter_model.safetensors"
    for made, same in (
        (output / "by-id/model.safetensors", output / "llava/model.safetensors"),
        (pushed / "model.safetensors", output / "stage1/model.safetensors"),
        (workplace.hub.folder("models", "me/adapter") / adapter, output / "stage2" / adapter),
    ):
        assert made.read_bytes() == same.read_bytes(), made
    asked = "--image cat.jpg --prompt 'What is this?'"
    assert run(f"python -m train_llava.infer --model_name_or_path me/llava --adapter_name_or_path me/adapter {asked}")
    stream = "--streaming true --max_steps 1 --preflight false --output_dir output/stream"
    run(f"bash run_zero2.sh recipes/one-gpu-stage1.yaml {by_id} {stream}")
