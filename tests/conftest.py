"""Tiny random models of the real architectures and a small corpus, made once a session; nothing comes from a hub."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-cache-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and threads that wait for each other are slow

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train_llava.build_model
from train_llava import train
from train_llava.build_model import BuildArguments, build_model
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.adapter import load_model
from train_llava.modeling.verification import verify_checkpoint

train_llava.build_model.verify_in_fresh_process = verify_checkpoint  # a fresh process takes seconds to begin
ROOT = Path(__file__).parent.parent
os.environ["LC_ALL"] = "C.UTF-8"  # the scripts' own lines are Chinese in a Chinese locale

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "What is this?",
    "a red square",
    "a blue circle",
    "这是什么?",
    "红色的方块",
    "The capital of France is Paris.",
]


def make_tokenizer(
    folder: Path, special: tuple[str, ...], template: str | None, eos: str, pad: str | None, size: int = 300
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with the special tokens and the chat template of a family; `size` tokens in all."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, chat_template=template)
    fast.add_special_tokens({"additional_special_tokens": [token for token in special if token not in (eos, pad)]})
    fast.save_pretrained(folder)
    return fast


NARROW = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> dict[str, Path]:
    """A tiny CLIP and a tiny Qwen2 chat model with spare embedding rows, in folders."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config=NARROW | {"num_hidden_layers": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1},
            vision_config=NARROW | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7},
            projection_dim=16,
        )
    )
    clip.save_pretrained(root / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        root / "clip"
    )
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = make_tokenizer(root / "qwen2", special, CHATML, "<|im_end|>", "<|endoftext|>")
    language_model = Qwen2ForCausalLM(
        Qwen2Config(
            **NARROW,
            num_key_value_heads=1,
            num_hidden_layers=2,
            vocab_size=320,
            max_position_embeddings=512,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    language_model.save_pretrained(root / "qwen2")
    return {"clip": root / "clip", "qwen2": root / "qwen2"}


@pytest.fixture(scope="session")
def llava(parts, tmp_path_factory) -> Path:
    """The tiny parts assembled by `build_model`: 16 tokens a picture."""
    folder = tmp_path_factory.mktemp("llava") / "model"
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(folder)))
    return folder


@pytest.fixture(scope="session")
def processor(llava):
    return AutoProcessor.from_pretrained(llava)


@pytest.fixture
def model(llava):
    return LlavaForConditionalGeneration.from_pretrained(llava)


def turns(*texts: str) -> list[dict[str, str]]:
    """LLaVA conversations from alternating questions and answers."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixteen records in the LLaVA-CC3M layout: one picture each, but for one text-only record."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "images_dl").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)).save(root / "images_dl" / f"{i}.png")
        question = ("<image>\nWhat is this?", "What is this?\n<image>", "<image>\n这是什么?")[i % 3]
        answer = ("a red square", "a blue circle", "红色的方块")[i % 3] * (1 + i % 2)
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns(question, answer)})
    records[5] = {"id": "5", "conversations": turns("What is this?", "a red square", "这是什么?", "红色的方块")}
    (root / "chat.json").write_text(json.dumps(records, ensure_ascii=False))
    return root


@pytest.fixture(scope="session")
def bad_data(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A data set with bad records between good ones, and the reason of each bad one by its id."""
    from record_files import write_bad_data  # which imports this file

    root = tmp_path_factory.mktemp("bad")
    return root, write_bad_data(root)


def run_train(monkeypatch, model: Path, data: Path, output: Path, *arguments: str) -> list[float]:
    """Trains in this process; returns the loss of every step."""
    command = ["train", "--model_name_or_path", model, "--data_path", data, "--output_dir", output, *arguments]
    command += ["--logging_steps", "1", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    train.main()
    return logged(output)


def logged(output: Path, key: str = "loss") -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def free_port() -> str:
    """A port that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def zero2_command(
    model: Path, data: Path, output: Path, *arguments: str, ranks: int = 2
) -> tuple[list[str], dict[str, str]]:
    """The command that trains through run_zero2.sh on CPU ranks, and its environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"CPU_RANKS": str(ranks), "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", "PATH": path}
    command = ["bash", "run_zero2.sh", "--model_name_or_path", model, "--data_path", data, "--output_dir", output]
    command += [*arguments, "--logging_steps", "1", "--report_to", "none"]
    return [str(word) for word in command], os.environ | settings


def run_zero2(model: Path, data: Path, output: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess:
    """Trains through run_zero2.sh on CPU ranks."""
    command, environment = zero2_command(model, data, output, *arguments, ranks=ranks)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def random_adapter(llava: Path, folder: Path, seed: int, train_type: str = "lora") -> Path:
    """Writes a LoRA adapter for a LLaVA whose matrices and projector are random, so that it changes every answer."""
    model, processor = load_checkpoint(str(llava))
    adapted = set_trainable(model, train_type, LoraArguments(lora_r=4, lora_alpha=8))
    torch.manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(llava, tmp_path_factory) -> Path:
    """A LoRA adapter for the tiny LLaVA whose matrices and projector are random, so that it changes every answer."""
    return random_adapter(llava, tmp_path_factory.mktemp("adapter") / "run", seed=1)


@pytest.fixture(scope="session")
def merged(llava, adapter, tmp_path_factory) -> Path:
    """That adapter merged into its base."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_lora(str(llava), str(adapter), str(folder))
    return folder


@pytest.fixture(scope="session")
def opened(merged):
    """The merged model and its processor."""
    return load_model(str(merged))


def user_message(*texts: str) -> list[dict]:
    """A conversation of one question; "<image>" stands for a picture."""
    parts = [{"type": "image"} if text == "<image>" else {"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": parts}]


QUESTIONS = [
    user_message("<image>", "What is this?"),
    user_message("Where is Paris?"),
    user_message("<image>", "<image>", "这是?"),
]
IMAGES = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]


@pytest.fixture(scope="session")
def default_run(tmp_path_factory, worker_id) -> Path:
    """`bash run_zero2.sh` without arguments, in the environment of the tests, made anew, by one of their processes."""
    session = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        session = session.parent
    with FileLock(session / "default_run.lock"):
        if not (session / "default_run").exists():
            shutil.rmtree(ROOT / "output/openmoji", ignore_errors=True)
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            environment = os.environ | {"PATH": path, "MASTER_PORT": free_port()}
            environment.pop("OMP_NUM_THREADS", None)
            command = ["bash", "run_zero2.sh"]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            (session / "default_run").touch()
    return ROOT / "output" / "openmoji"
