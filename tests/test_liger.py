"""`--use_liger_kernel`: liger-kernel's functions in the language model, with the losses of the plain run.

liger-kernel needs Triton, so a small package stands in for it, with its names and its way to replace functions.
"""

import importlib
import re
import sys

import pytest
from conftest import logged, run_train
from transformers.models.qwen2 import modeling_qwen2
from transformers.utils import is_liger_kernel_available

from train_llava import train
from train_llava.build_model import BuildArguments, build_model
from train_llava.cli import run_command

# As in liger-kernel: the LLaVA's own function replaces its forward, the language model's replaces functions in the
# instance, a class and, for the whole process, the rotary embedding. `used` counts the calls of each
STAND_IN = """
from collections import Counter
import torch
from torch import nn

used = Counter()

def norm(self, x):
    used["norm"] += 1
    scale = x.float().square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
    return self.weight * (x.float() * scale).to(x.dtype)

def mlp(self, x):
    used["mlp"] += 1
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

def rotary(q, k, cos, sin, unsqueeze_dim=1):
    used["rotary"] += 1
    assert not q.is_meta  # a kernel cannot run there
    def turn(x):
        return torch.cat([-x[..., x.shape[-1] // 2:], x[..., :x.shape[-1] // 2]], -1)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turn(q) * sin, k * cos + turn(k) * sin

class LigerMLP(nn.Module):
    def __init__(self, config):
        raise AssertionError("the class outlives its use")

def refuse(*args, **kwargs):
    raise IndexError("this forward takes no mask in logits_to_keep")

def to_qwen2(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
    from transformers.models.qwen2 import modeling_qwen2
    modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2MLP = rotary, LigerMLP
    if fused_linear_cross_entropy:
        model.forward = refuse
    for layer in model.layers:
        layer.mlp.forward = mlp.__get__(layer.mlp)
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = norm.__get__(module)

def to_llava(model=None, **kwargs):
    model.forward = refuse

MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": to_qwen2, "llava": to_llava}
"""
APPLY = """
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

def _apply_liger_kernel_to_instance(model, **kwargs):
    if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model, **kwargs)
"""
LIGER = ["--use_liger_kernel", "true"]


@pytest.fixture
def liger(tmp_path, monkeypatch):
    """The stand-in, installed in a folder of its own; afterwards nothing of it is left."""
    package, metadata = tmp_path / "site" / "liger_kernel", tmp_path / "site" / "liger_kernel-0.8.5.dist-info"
    (package / "transformers").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "transformers" / "__init__.py").write_text(APPLY)
    (package / "transformers" / "monkey_patch.py").write_text(STAND_IN)
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: liger_kernel\nVersion: 0.8.5\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(modeling_qwen2, "apply_rotary_pos_emb", modeling_qwen2.apply_rotary_pos_emb)
    monkeypatch.setattr(modeling_qwen2, "Qwen2MLP", modeling_qwen2.Qwen2MLP)
    is_liger_kernel_available.cache_clear()
    yield importlib.import_module("liger_kernel.transformers.monkey_patch")
    is_liger_kernel_available.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
        del sys.modules[name]


@pytest.mark.parametrize("ratio", ["crop", "anyres"])
def test_the_language_model_alone_is_replaced_and_losses_stay(liger, parts, corpus, tmp_path, monkeypatch, ratio):
    llava = tmp_path / "llava"
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(llava), image_aspect_ratio=ratio))
    arguments = ["--train_type", "lora", "--lora_dropout", "0", "--max_steps", "2", "--learning_rate", "1e-3"]
    arguments += ["--eval_data_path", corpus, "--eval_answers", "2"]
    plain = run_train(monkeypatch, llava, corpus, tmp_path / "plain", *arguments)
    assert not liger.used
    losses = run_train(monkeypatch, llava, corpus, tmp_path / "liger", *arguments, *LIGER)
    assert losses == pytest.approx(plain, rel=1e-5)
    for key in ("eval_loss", "eval_exact_match"):
        assert logged(tmp_path / "liger", key) == pytest.approx(logged(tmp_path / "plain", key), rel=1e-5)
    # five norms, two MLPs and two rotations a pass
    assert liger.used["mlp"] == liger.used["rotary"] == liger.used["norm"] * 2 / 5 > 2 * 2
    assert "mfu" in (tmp_path / "liger" / "trainer_state.json").read_text()  # counted without kernels


def test_a_whole_model_resumes(liger, llava, corpus, tmp_path, monkeypatch):
    arguments = ["--train_type", "freeze_vision", "--max_steps", "2", "--save_steps", "1", *LIGER]
    whole = run_train(monkeypatch, llava, corpus, tmp_path / "run", *arguments)
    stopped = tmp_path / "run" / "checkpoint-1"
    assert run_train(
        monkeypatch, llava, corpus, tmp_path / "again", *arguments, "--resume_from_checkpoint", stopped
    ) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MODEL_TYPE_TO_APPLY_LIGER_FN", {"llava": None}, "liger-kernel does not know a qwen2"),
        ("mlp", lambda self, x: self.up_proj(x)[..., :32], "this qwen2 has other logits with it (by "),
        ("rotary", lambda *_: 1 / 0, "this qwen2 does not run with it here: division by zero"),
    ],
)
def test_a_model_that_liger_does_not_know_or_compute_is_refused(
    liger, llava, corpus, tmp_path, monkeypatch, name, value, message
):
    monkeypatch.setattr(liger, name, value)
    command = ["train", "--model_name_or_path", llava, "--data_path", corpus, "--output_dir", tmp_path / "out", *LIGER]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--report_to", "none", "--preflight", "false"])
    with pytest.raises(SystemExit, match=rf"^error: --use_liger_kernel: .*{re.escape(message)}.*$"):
        run_command(train.main)
