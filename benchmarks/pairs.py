"""Assembles every language model's family with every vision tower, tiny and random, and keeps what was measured.

    PYTHONPATH=.:tests python benchmarks/pairs.py > benchmarks/results/pairs.md

The figures are those that `build_model` prints of its own checks. The architectures, and the settings that change
what is computed, are those of the published models; widths and depths are not. The towers are those of
tests/test_towers.py.
"""

import argparse
import io
import json
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from conftest import CHATML
from test_build_model import LINEAR_ATTENTION, SMALL_EXPERTS, rows_of
from test_families import GEMMA, LLAMA3, LM, MISTRAL, PHI, PHI_TOKENS, QWEN, QWEN3, save_family
from test_towers import REFUSED, TOWERS, save_tower
from tqdm import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    Cohere2Config,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    InternLM3Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SmolLM3Config,
)
from transformers.utils import logging

from train_llava.build_model import BuildArguments, build_model
from train_llava.modeling.gguf_files import check_exportable

# The formats of the families, as their published templates write them; more are in tests/test_families.py
SMOLLM3 = (
    "{% set thinks = enable_thinking if enable_thinking is defined else true %}{{ '<|im_start|>system\n## Metadata\n\n"
    "Reasoning Mode: ' + ('/think' if thinks else '/no_think') + '\n\n<|im_end|>\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not thinks %}{{ '<think>\n\n</think>\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if thinks else '<think>\n\n</think>\n') }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content }}"
    "{{ eos_token + ('' if loop.last else '\n') }}{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GLM4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
GPT_OSS = (
    "{{ '<|start|>system<|message|>You are ChatGPT.<|end|>' }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
COHERE = (
    "{{ '<BOS_TOKEN>' }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
    "('CHATBOT' if m.role == 'assistant' else m.role | upper) + '_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK = (
    "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|Assistant|>' + m.content + '<eos>' }}"
    "{% else %}{{ ('<|User|>' if m.role == 'user' else '') + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
CHATML_FORMAT = QWEN, CHATML, "<|im_end|>", "<|endoftext|>"
QWEN3_FORMAT = QWEN, QWEN3, "<|im_end|>", "<|endoftext|>"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL_FORMAT = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), MISTRAL, "</s>", "</s>"
GEMMA_FORMAT = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), GEMMA, "<eos>", "<pad>"
GRANITE_TOKENS = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>")
GRANITE_FORMAT = GRANITE_TOKENS, GRANITE, "<|end_of_text|>", "<|end_of_text|>"
GRANITE_SCALES = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
OSS_TOKENS = ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
COHERE_TOKENS = ("<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
                 "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")  # fmt: skip
OLMO_TOKENS = ("<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>")
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>")
NO_HEAD_DIM = {name: value for name, value in LM.items() if name != "head_dim"}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
          "first_k_dense_replace": 1}  # fmt: skip

Outcome = dict[tuple[str, str], dict[str, str]]  # (family, tower) -> see `measure`

# A configuration, special tokens, a chat template, the token that ends texts, the one that pads
FAMILIES = {
    "Qwen2, Qwen2.5": (Qwen2Config(**NO_HEAD_DIM), *CHATML_FORMAT),
    "Qwen3": (Qwen3Config(**LM), *QWEN3_FORMAT),
    "Qwen3-MoE": (Qwen3MoeConfig(**LM, **SMALL_EXPERTS), *QWEN3_FORMAT),
    "Qwen3-Next": (
        Qwen3NextConfig(
            **LM, **SMALL_EXPERTS, **LINEAR_ATTENTION, layer_types=["linear_attention", "full_attention"]
        ),
        *QWEN3_FORMAT,
    ),
    "Llama 3": (LlamaConfig(**LM), LLAMA_TOKENS, LLAMA3, "<|eot_id|>", None),
    "SmolLM2": (LlamaConfig(**LM, tie_word_embeddings=True), *CHATML_FORMAT),
    "SmolLM3": (
        SmolLM3Config(**NO_HEAD_DIM, no_rope_layers=[1, 0], pad_token_id=0),
        QWEN, SMOLLM3, "<|im_end|>", "<|endoftext|>",
    ),
    "Mistral": (MistralConfig(**LM, sliding_window=None), *MISTRAL_FORMAT),
    "Mixtral": (MixtralConfig(**LM, num_local_experts=4), *MISTRAL_FORMAT),
    "Gemma 2": (Gemma2Config(**LM), *GEMMA_FORMAT),
    "Gemma 3": (Gemma3TextConfig(**LM, sliding_window=8), *GEMMA_FORMAT),
    "Phi-3": (Phi3Config(**NO_HEAD_DIM, pad_token_id=0), PHI_TOKENS, PHI, "<|endoftext|>", "<|endoftext|>"),
    "Phi-4": (
        Phi3Config(**NO_HEAD_DIM, pad_token_id=0),
        ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), PHI4, "<|im_end|>", "<|endoftext|>",
    ),
    "OLMo 2": (Olmo2Config(**NO_HEAD_DIM), OLMO_TOKENS, OLMO2, "<|endoftext|>", "<|pad|>"),
    "GLM-4": (Glm4Config(**LM, pad_token_id=0), GLM_TOKENS, GLM4, "<|endoftext|>", "<|endoftext|>"),
    "InternLM 3": (InternLM3Config(**LM), *CHATML_FORMAT),
    "DeepSeek-V3": (
        DeepseekV3Config(**NO_HEAD_DIM | {"num_key_value_heads": 2}, **LATENT),
        ("<pad>", "<bos>", "<eos>", "<|User|>", "<|Assistant|>"), DEEPSEEK, "<eos>", "<pad>",
    ),
    "LFM2": (
        Lfm2Config(**NO_HEAD_DIM, layer_types=["conv", "full_attention"], block_multiple_of=8, initializer_range=0.3),
        *CHATML_FORMAT,
    ),
    "gpt-oss": (
        GptOssConfig(**LM, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        OSS_TOKENS, GPT_OSS, "<|return|>", "<|endoftext|>",
    ),
    "Granite 3": (GraniteConfig(**NO_HEAD_DIM, **GRANITE_SCALES), *GRANITE_FORMAT),
    "Granite 4, hybrid": (
        GraniteMoeHybridConfig(
            **NO_HEAD_DIM, **GRANITE_SCALES, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0,
            shared_intermediate_size=64,
        ),
        *GRANITE_FORMAT,
    ),
    "Falcon-H1": (
        FalconH1Config(**LM, **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.0195, embedding_multiplier=5.657),
        *CHATML_FORMAT,
    ),
    "Cohere 2": (Cohere2Config(**NO_HEAD_DIM), COHERE_TOKENS, COHERE, "<|END_OF_TURN_TOKEN|>", "<PAD>"),
    "Mamba 2": (
        Mamba2Config(hidden_size=32, num_heads=4, head_dim=16, n_groups=1, state_size=8, num_hidden_layers=2),
        *CHATML_FORMAT,
    ),
}  # fmt: skip

# Further families, by their names in transformers, which are measured with the first tower alone
SMALL = LM | LATENT | LINEAR_ATTENTION | SMALL_EXPERTS | {
    "num_local_experts": 4, "moe_num_experts": 4, "moe_k": 2, "shared_expert_intermediate_size": 16,
    "num_shared_experts": 1, "intermediate_size_mlp": 64, "moe_layers": [1], "sliding_window": 16, "pad_token_id": 0,
    "num_key_value_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32, "rotary_dim": 8,
}  # fmt: skip
FURTHER = (
    "afmoe", "apertus", "arcee", "aria_text", "biogpt", "bitnet", "doge", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "flex_olmo", "gemma", "glm", "glm4_moe", "gpt_neox", "gptj", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "jais2", "jetmoe", "llama4_text",
    "minicpm3", "minimax_m2", "ministral", "ministral3", "nemotron", "olmo", "olmo3", "olmoe", "opt", "persimmon",
    "phi", "phimoe", "qwen2_moe", "seed_oss", "solar_open", "stablelm", "starcoder2", "vaultgemma", "xglm",
)  # fmt: skip


def small(model_type: str) -> PreTrainedConfig:
    """A tiny configuration of a language model."""
    kind = CONFIG_MAPPING[model_type]
    known = kind.__dataclass_fields__.keys() | kind.attribute_map.keys()
    return kind(**{name: value for name, value in SMALL.items() if name in known})


def measure(tower: Path, language_model: Path, folder: Path) -> dict[str, str]:
    """What `build_model` prints of a pair, `beside` (tokens beside the patches) and `gguf` (why not, or nothing); of a
    pair that it refuses, the reason under `refused`."""
    with redirect_stdout(io.StringIO()) as printed:
        try:
            build_model(BuildArguments(str(tower), str(language_model), str(folder), verbose=True))
        except ValueError as error:
            reason = " ".join(str(error).split())
            return {"refused": reason.replace(f"{tower}", "it").replace(f"{language_model}", "it")}
    found = rows_of(printed.getvalue())
    found["beside"] = str(json.loads((folder / "processor_config.json").read_text())["num_additional_image_tokens"])
    try:
        check_exportable(AutoConfig.from_pretrained(folder))
        found["gguf"] = ""
    except ValueError as error:
        found["gguf"] = str(error)
    shutil.rmtree(folder)
    return found


def measure_all(families: list[str], towers: list[str], root: Path) -> Outcome:
    """Every pair of the two; of a family that is refused with the first tower, that one alone."""
    for tower in towers:
        save_tower(root / tower, *(TOWERS | REFUSED)[tower][:-1])
    found = {}
    for family in tqdm(families, unit="family"):
        parts = FAMILIES[family] if family in FAMILIES else (small(family), *CHATML_FORMAT)
        save_family(root / family, *parts)
        for tower in towers:
            found[family, tower] = measure(root / tower, root / family, root / "llava")
            if tower == towers[0] and "refused" in found[family, tower]:
                break
    return found


def worst(outcomes: list[str]) -> str:
    """The largest of the differences in rows of `build_model`, which end with "(difference 1e-07)"."""
    return f"{max(float(outcome.rpartition(' ')[-1].rstrip(')')) for outcome in outcomes):g}"


def line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def family_row(name: str, pairs: dict[str, dict[str, str]], towers: int) -> str:
    """A language model's row, of its pairs by tower."""
    rows = list(pairs.values())
    (learnt,) = {row["what is learnt"].removeprefix("each answer with ").partition(",")[0] for row in rows}
    (packs,) = {row["packed against alone"].startswith("equal") for row in rows}
    return line(
        name,
        worst([row["text-only logits"] for row in rows]),
        " or ".join(f"`{end}`" for end in learnt.split(" or ")),
        "yes" if packs else "refused",
        worst([row["batched against single"] for row in rows]),
        f"{len(pairs)} of {towers}",
        ", ".join(tower for tower, row in pairs.items() if not row["gguf"]) or "no",
    )


def tower_row(name: str, pairs: dict[str, dict[str, str]], families: int) -> str:
    """A tower's row, of its pairs by family."""
    rows = list(pairs.values())
    (beside,) = {row["beside"] for row in rows}
    (tokens,) = {row["tokens a picture"].partition(" ")[0] for row in rows}
    return line(name, beside, tokens, worst([row["vision features"] for row in rows]), f"{len(pairs)} of {families}")


def table(found: Outcome, refused_towers: dict[str, str], further: Outcome) -> str:
    """What was measured: by language model, by tower, and what is refused and why; the further families in a line."""
    exact = [f"`{family}`" for (family, _), row in further.items() if "refused" not in row]
    good = {pair: row for pair, row in found.items() if "refused" not in row}
    families = list(dict.fromkeys(family for family, _ in good))
    towers = list(dict.fromkeys(tower for _, tower in found))
    refused = {
        family if family not in families else f"{family} with {tower}": row["refused"]
        for (family, tower), row in (found | further).items()
        if "refused" in row
    }
    # one reason for each part of which no pair has a GGUF: with the other table's first
    without = {family: good[family, towers[0]]["gguf"] for family in families}
    without |= {tower: good[families[0], tower]["gguf"] for tower in towers}
    exported = {name for pair, row in good.items() if not row["gguf"] for name in pair}
    return "\n".join(
        [
            "| language model | logits | learnt: the answer and | packing | batching | towers | GGUF |",
            "|---|---:|---|---|---:|---:|---|",
            *(
                family_row(name, {t: row for (f, t), row in good.items() if f == name}, len(towers))
                for name in families
            ),
            "",
            "| vision tower | tokens beside the patches | `<image>` tokens | features | language models |",
            "|---|---:|---:|---:|---:|",
            *(
                tower_row(name, {f: row for (f, t), row in good.items() if t == name}, len(families))
                for name in towers
            ),
            "",
            f"With CLIP and ChatML's format, {len(exact)} further families are exact: {', '.join(exact)}.",
            "",
            "| refused | why |",
            "|---|---|",
            *(line(name, reason) for name, reason in (refused | refused_towers).items()),
            "",
            "| no GGUF | why |",
            "|---|---|",
            *(line(name, reason) for name, reason in without.items() if name not in exported),
        ]
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    first = next(iter(FAMILIES))
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(list(FAMILIES), list(TOWERS), Path(folder))
        others = measure_all([first], ["CLIP", *REFUSED], Path(folder))
        further = measure_all(list(FURTHER), ["CLIP"], Path(folder))
    print(table(found, {name: others[first, name]["refused"].removeprefix("it: ") for name in REFUSED}, further))


if __name__ == "__main__":
    main()
