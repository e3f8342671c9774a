"""llama.cpp's computation with a pair of GGUF files, in plain PyTorch, from the contents of the files alone.

Written from llama.cpp's src/models and tools/mtmd/models/llava.cpp, with the class token in front of the patches.
"""

from math import sqrt
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import conv2d, gelu, layer_norm, linear, silu

# by the pre-tokenizer's name: the patterns that split a text, and whether a word that is a token skips the merges
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "qwen2": ([QWEN2], False),
    "llama-bpe": ([QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)], True),
    "gpt-2": ([GPT2], False),
    "smollm": ([r"\p{N}", GPT2], False),
}


def read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """A file's fields and tensors."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: torch.from_numpy(np.array(t.data, dtype=np.float32)) for t in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def tokenizer_of(fields: dict) -> Tokenizer:
    """The tokenizer: control and user-defined tokens (types 3 and 4) come first, the rest is split and merged."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    splits, ignore_merges = SPLITS[fields["tokenizer.ggml.pre"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    steps = [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((3, True), (4, False)):
        matching = [token for token, k in zip(tokens, kinds, strict=True) if k == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in matching])
    return tokenizer


def dense(x: torch.Tensor, tensors: dict, name: str) -> torch.Tensor:
    return linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotated(x: torch.Tensor, base: float, size: int, neighbours: bool) -> torch.Tensor:
    """The first `size` numbers of heads `(tokens, heads, all)`: pairs of neighbours, or of numbers half apart."""
    angle = torch.arange(len(x))[:, None, None] * base ** (-torch.arange(0, size, 2) / size)
    x, rest = x[..., :size], x[..., size:]
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    pair = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat([torch.stack(pair, -1).flatten(-2) if neighbours else torch.cat(pair, -1), rest], -1)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of `(tokens, heads, size)`; neighbouring query heads share a key if there are fewer keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhs,khs->hqk", q, k) / sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[1:], -torch.inf).triu(1)
    return torch.einsum("hqk,khs->qhs", scores.softmax(-1), v).flatten(1)


def logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    """The language model's logits for embeddings `(tokens, width)`."""
    fields, tensors = read(path)
    arch = fields["general.architecture"]

    def field(name: str) -> float:
        return fields[f"{arch}.{name}"]

    eps, size = field("attention.layer_norm_rms_epsilon"), field("attention.key_length")
    for i in range(field("block_count")):
        h, block = rms(x, tensors[f"blk.{i}.attn_norm.weight"], eps), f"blk.{i}"
        q, k, v = (dense(h, tensors, f"{block}.attn_{part}") for part in "qkv")
        q = q.view(len(x), field("attention.head_count"), size)
        k, v = (y.view(len(x), field("attention.head_count_kv"), -1) for y in (k, v))
        if f"{block}.attn_q_norm.weight" in tensors:
            q, k = (rms(y, tensors[f"{block}.attn_{n}_norm.weight"], eps) for y, n in ((q, "q"), (k, "k")))
        rope = field("rope.freq_base"), field("rope.dimension_count"), arch == "llama"
        x = x + dense(attended(rotated(q, *rope), rotated(k, *rope), v, True), tensors, f"{block}.attn_output")
        h = rms(x, tensors[f"{block}.ffn_norm.weight"], eps)
        gated = silu(dense(h, tensors, f"{block}.ffn_gate")) * dense(h, tensors, f"{block}.ffn_up")
        x = x + dense(gated, tensors, f"{block}.ffn_down")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    return linear(rms(x, tensors["output_norm.weight"], eps), head)


def features(path: Path, picture: np.ndarray) -> torch.Tensor:
    """The language model's input `(tokens, width)` for an RGB picture `(H, W, 3)` of the model's size."""
    fields, tensors = read(path)

    def field(name: str) -> float:
        return fields[f"clip.vision.{name}"]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return layer_norm(x, weight.shape, weight, bias, field("attention.layer_norm_epsilon"))

    assert picture.shape == (field("image_size"), field("image_size"), 3)
    assert fields["clip.projector_type"] == "mlp"
    pixels = (picture / 255 - np.array(field("image_mean"))) / np.array(field("image_std"))
    pixels = torch.from_numpy(pixels).float().permute(2, 0, 1)[None]
    patch = tensors["v.patch_embd.weight"], tensors.get("v.patch_embd.bias")
    x = conv2d(pixels, *patch, stride=field("patch_size"))[0].flatten(1).T
    if class_token := "v.class_embd" in tensors:
        x = torch.cat([tensors["v.class_embd"][None], x])
    x = x + tensors["v.position_embd.weight"]
    if "v.pre_ln.weight" in tensors:
        x = norm(x, "v.pre_ln")
    (last,) = fields.get("clip.vision.feature_layer", [field("block_count") - 1])
    for i in range(last):
        h, block = norm(x, f"v.blk.{i}.ln1"), f"v.blk.{i}"
        heads = [dense(h, tensors, f"{block}.attn_{n}").view(len(x), field("attention.head_count"), -1) for n in "qkv"]
        x = x + dense(attended(*heads, False), tensors, f"{block}.attn_out")
        h = dense(norm(x, f"{block}.ln2"), tensors, f"{block}.ffn_up")
        h = gelu(h, approximate="tanh") if fields.get("clip.use_gelu") else h * (1.702 * h).sigmoid()
        x = x + dense(h, tensors, f"{block}.ffn_down")
    return dense(gelu(dense(x[class_token:], tensors, "mm.0")), tensors, "mm.2")
