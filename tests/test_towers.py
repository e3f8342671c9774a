"""Vision towers of every kind, assembled by one command: their own features, tokens, gradients, adapters, batches."""

import json
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NARROW, random_adapter
from PIL import Image
from safetensors.torch import load_file
from test_data import gradients, item
from test_families import OUTSIDE
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    AltCLIPConfig,
    AltCLIPModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BeitConfig,
    BeitModel,
    BitImageProcessorPil,
    BlipConfig,
    BlipModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Gemma4ImageProcessorPil,
    Gemma4VisionConfig,
    Gemma4VisionModel,
    GemmaConfig,
    GroupViTConfig,
    GroupViTModel,
    IdeficsConfig,
    IdeficsModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MetaClip2Config,
    MetaClip2Model,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PixtralVisionModel,
    Qwen2Config,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipVisionConfig,
    SmolVLMVisionConfig,
    SmolVLMVisionTransformer,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

from train_llava.build_model import BuildArguments, build_model
from train_llava.data import LlavaCollator
from train_llava.evaluation.generation import generate
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments, load_checkpoint, set_trainable
from train_llava.modeling.adapter import load_model
from train_llava.modeling.towers import unused_parameters
from train_llava.modeling.verification import verify_in_fresh_process
from train_llava.training.memory import empty_model, flops_per_token

VISION = NARROW | {"num_hidden_layers": 3, "image_size": 28, "patch_size": 7}
TEXT = NARROW | {"num_hidden_layers": 1, "vocab_size": 64, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
TWO = {"text_config": TEXT, "vision_config": VISION}
CROP = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
DINO = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
SQUARE = SiglipImageProcessorPil(size={"height": 28, "width": 28})
VIT = ViTImageProcessorPil(size={"height": 28, "width": 28})
PALIGEMMA = PaliGemmaConfig(
    vision_config=SiglipVisionConfig(**VISION, projection_dim=32),
    text_config=GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=16),
    image_token_index=5,
    projection_dim=32,
)

# The model that is published, its image processor, tokens that stand beside the 16 patches (the first is dropped)
TOWERS = {
    "CLIP": (CLIPModel, CLIPConfig(**TWO), CROP, 1),
    "SigLIP": (SiglipModel, SiglipConfig(**TWO), SQUARE, 0),
    "SigLIP 2": (  # of one size: SigLIP's classes
        SiglipModel, SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VISION), SQUARE, 0
    ),
    "DINOv2": (Dinov2Model, Dinov2Config(**VISION | {"image_size": 63}), DINO, 1),  # positions are interpolated
    "DINOv2 with registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**VISION | {"image_size": 63}, num_register_tokens=4), DINO, 5,
    ),
    "DINOv3 ViT": (DINOv3ViTModel, DINOv3ViTConfig(**VISION, num_register_tokens=4), SQUARE, 5),
    "AIMv2": (Aimv2VisionModel, Aimv2VisionConfig(**VISION), CROP, 0),
    "AIMv2 with text": (Aimv2Model, Aimv2Config(**TWO), CROP, 0),
    "ViT": (ViTModel, ViTConfig(**VISION), VIT, 1),
    "ViT classifier": (ViTForImageClassification, ViTConfig(**VISION), VIT, 1),
    "MetaCLIP 2": (MetaClip2Model, MetaClip2Config(**TWO), CROP, 1),
    "AltCLIP": (AltCLIPModel, AltCLIPConfig(**TWO), CROP, 1),
    "PaliGemma's": (PaliGemmaForConditionalGeneration, PALIGEMMA, SQUARE, 0),
    "BEiT": (BeitModel, BeitConfig(**VISION, use_relative_position_bias=True), VIT, 1),
    "SmolVLM's": (SmolVLMVisionTransformer, SmolVLMVisionConfig(**VISION), SQUARE, 0),
}  # fmt: skip


def save_tower(folder, model_class, config, image_processor) -> None:
    """A tiny random model with its image processor, as they are published."""
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if not parameter.any():  # biases, and relative positions
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory):
    """Every tower assembled once with the tiny Qwen2: name -> (its own folder, LLaVA folder)."""

    @cache
    def build(name):
        root = tmp_path_factory.mktemp("tower")
        save_tower(root / "tower", *TOWERS[name][:-1])
        build_model(BuildArguments(str(root / "tower"), str(parts["qwen2"]), str(root / "llava")))
        return root / "tower", root / "llava"

    return build


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def opened(folder):
    """By plain transformers."""
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


towers = pytest.mark.parametrize("name", TOWERS)


@towers
def test_the_projector_reads_the_towers_own_features(built, name):
    folder, llava = built(name)
    model, processor = opened(llava)
    model_class, _, image_processor, beside = TOWERS[name]
    pictures = [noise(40, 30), noise(100, 30), noise(20, 90)]
    tower = model_class.from_pretrained(folder).get_encoder("image")
    pixel_values = image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        own = tower(pixel_values, output_hidden_states=True).hidden_states[-2]
        read = []
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        model.get_image_features(processor.image_processor(pictures, return_tensors="pt")["pixel_values"])
    own = own[:, min(beside, 1) :]
    assert read[0].shape == own.shape == (3, 16 + max(beside - 1, 0), 32)
    assert (read[0] - own).abs().max() <= 1e-5
    assert (own[0] - own[1]).abs().max() > 1e-2  # they are seen


SIZES = [(1, 1), (1, 2), (2, 1), (1, 50), (50, 1), (7, 7), (13, 29), (27, 28), (28, 28), (29, 28), (32, 32), (45, 63),
         (64, 48), (97, 31), (120, 160), (224, 224), (336, 500), (640, 480), (200, 3000), (3000, 200)]  # fmt: skip


@towers
def test_image_tokens_equal_the_towers_features(built, name):
    model, processor = opened(built(name)[1])
    chat = LlavaCollator(processor).chat
    given = set()
    for size in SIZES:
        picture = noise(*size)
        inputs = processor(images=picture, text="<image>", return_tensors="pt")
        labelled = item("<image>\nWhat is this?", "A picture.", images=[picture])
        with torch.inference_mode():
            features = len(model.get_image_features(inputs["pixel_values"]).pooler_output[0])
        learnt = (chat.encode(labelled["messages"])[0] == processor.image_token_id).sum()
        assert inputs["input_ids"].shape[1] == learnt == features, size
        given.add(features)
    assert given == {16 + max(TOWERS[name][-1] - 1, 0)}


@towers
def test_loss_and_gradients_equal_plain_transformers(built, name):
    model, processor = load_checkpoint(str(built(name)[1]))
    batch = LlavaCollator(processor)([
        item("<image>\nWhat is this?", "A red square.", "And this?", "A bus.", images=[noise(40, 30)]),
        item("Compare <image> and <image>.", "One is larger.", images=[noise(30, 80), noise(50, 50)]),
    ])  # fmt: skip
    set_trainable(model, "full", LoraArguments())
    loss, grads = gradients(model, **batch)
    plain, _ = opened(built(name)[1])
    keys = ("input_ids", "attention_mask", "pixel_values", "labels")
    full_loss, full_grads = gradients(plain, **{key: batch[key] for key in keys})
    assert abs(loss - full_loss) <= 1e-6 * full_loss
    assert any("vision_tower" in parameter for parameter in grads)
    assert {parameter for parameter, grad in full_grads.items() if grad.any()} <= grads.keys()
    for parameter, grad in grads.items():
        assert (full_grads[parameter] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-9, parameter


@towers
def test_lora_all_reaches_every_linear_layer_that_the_projector_reads(built, name):
    model, processor = load_checkpoint(str(built(name)[1]))
    set_trainable(model, "full", LoraArguments())
    modules, linear = dict(model.named_modules()), set()
    for parameter, values in model.named_parameters():
        module = parameter.rpartition(".")[0]
        if "vision_tower" in parameter and values.requires_grad and isinstance(modules[module], torch.nn.Linear):
            linear.add(module)
    adapted = set_trainable(model, "lora_all", LoraArguments(lora_r=4))
    for parameter, values in adapted.named_parameters():
        if "lora_B" in parameter:  # at zero, it would keep the gradient from lora_A
            torch.nn.init.normal_(values, std=0.02)
    batch = LlavaCollator(processor)([item("<image>\nWhat is this?", "A red square.", images=[noise(40, 30)])])
    _, grads = gradients(adapted, **batch)
    reached = {parameter for parameter, grad in grads.items() if "vision_tower" in parameter and grad.any()}
    assert linear
    assert reached == {f"base_model.model.{layer}.lora_{m}.default.weight" for layer in linear for m in "AB"}


def logits_of(model, processor, texts: list[str], pictures: list[Image.Image]) -> torch.Tensor:
    """The next token's, one row a text."""
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[:, -1]


@towers
def test_merged_equals_unmerged(built, tmp_path, name):
    llava = str(built(name)[1])
    adapter = str(random_adapter(llava, tmp_path / "adapter", 0, "lora_all"))
    merge_lora(llava, adapter, str(tmp_path / "merged"))
    asked = ["<image>\nWhat is this?"], [noise(40, 30)]
    merged = logits_of(*opened(tmp_path / "merged"), *asked)
    unmerged = logits_of(*load_model(llava, adapter), *asked)
    assert (merged - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()
    assert (merged - logits_of(*opened(llava), *asked)).abs().max() > 1e-2 * unmerged.abs().max()


@towers
def test_batched_equals_single(built, name):
    model, processor = opened(built(name)[1])
    texts, pictures = ["<image>\nhi", "<image> What is this, and what is it not?"], [noise(40, 30), noise(30, 90)]
    batched = logits_of(model, processor, texts, pictures)
    single = [logits_of(model, processor, [text], [picture]) for text, picture in zip(texts, pictures, strict=True)]
    assert (batched - torch.cat(single)).abs().max() <= 1e-5 * batched.abs().max()


def test_a_process_without_this_package_gives_the_same_answers(built, tmp_path):
    folders = [built(name)[1] for name in TOWERS]
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *folders], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    parts, picture = [{"type": "image"}, {"type": "text", "text": "What is this?"}], Image.new("RGB", (50, 30), "red")
    for folder, line in zip(folders, done.stdout.splitlines(), strict=True):
        ours = generate(*load_checkpoint(str(folder)), [[{"role": "user", "content": parts}]], [picture], 8)
        assert [answer.strip() for answer in json.loads(line)] == [answer.strip() for answer in ours] * 3


def test_a_clip_under_another_name_is_written_as_clip(built):
    folder, llava = built("MetaCLIP 2")
    tower = opened(llava)[0].model.vision_tower
    assert type(tower) is CLIPVisionModel
    theirs = MetaClip2Model.from_pretrained(folder).vision_model.state_dict()
    assert tower.state_dict().keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in tower.state_dict().items())
    assert any(name.startswith("vision_tower.vision_model.") for name in load_file(llava / "model.safetensors"))


def test_a_missing_pooler_is_zero_and_all_else_is_kept(built):
    folder, llava = built("ViT classifier")
    tower = opened(llava)[0].model.vision_tower
    classifier = ViTForImageClassification.from_pretrained(folder).vit.state_dict()
    for name, weight in tower.state_dict().items():
        assert torch.equal(weight, classifier.get(name, torch.zeros_like(weight))), name
    assert {name for name in tower.state_dict() if name not in classifier} == {
        "pooler.dense.weight",
        "pooler.dense.bias",
    }


RELATIVE = BeitConfig(**VISION | {"image_size": 42}, use_relative_position_bias=True)  # a size that no other test has


def test_measuring_a_tower_leaves_the_caches_of_transformers_right():
    """Relative positions are kept by size for the whole process, and so on the device of the first who needs them."""
    text = Qwen2Config(**TEXT, num_key_value_heads=1)
    config = LlavaConfig(vision_config=RELATIVE, text_config=text, vision_feature_layer=-2)
    unread = unused_parameters(config.vision_config, -2)
    empty_model(config, "full", LoraArguments(), torch.float32)
    args = SimpleNamespace(train_type="full", activation_checkpointing=False, deepspeed=None, frozen_parts=())
    flops_per_token(config, LoraArguments(), args)
    kept = BeitRelativePositionBias.generate_relative_position_index
    assert torch.equal(kept((6, 6)), kept.__wrapped__((6, 6)))
    assert {name.split(".")[1] for name in unread if name.startswith("layers.")} == {"2"}


def test_a_fresh_process_finds_what_a_corrupted_one_hides(parts, tmp_path, monkeypatch):
    save_tower(tmp_path / "tower", BeitModel, RELATIVE, ViTImageProcessorPil(size={"height": 42, "width": 42}))
    wrong = torch.zeros(37, 37, dtype=torch.long)
    monkeypatch.setattr(BeitRelativePositionBias, "generate_relative_position_index", staticmethod(lambda _: wrong))
    monkeypatch.setattr("train_llava.build_model.verify_in_fresh_process", verify_in_fresh_process)
    with pytest.raises(ValueError, match="the vision features differ from the part's own") as refusal:
        build_model(BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "out" / "llava")))
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "out").iterdir()) == []


NAFLEX = Siglip2Config(text_config=TEXT, vision_config=NARROW | {"num_hidden_layers": 2, "patch_size": 7})
INTERNVL = InternVLVisionConfig(**VISION | {"image_size": [28, 28], "patch_size": [7, 7]})
SWIN = SwinConfig(image_size=28, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
GROUPS = NARROW | {"depths": [1, 1, 1], "num_group_tokens": [4, 4, 0], "num_output_groups": [4, 4, 0]}
IDEFICS = IdeficsConfig(
    **TEXT,
    vision_config={"embed_dim": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    perceiver_config={"use_resampler": False},
)

TILES = {"image_grid_pinpoints": [[28, 56], [56, 28]]}
ONEVISION = LlavaOnevisionConfig(
    vision_config=SiglipVisionConfig(**VISION, vision_use_head=False), text_config=Qwen2Config(**TEXT), **TILES,
    image_token_index=5, video_token_index=6,
)  # fmt: skip
GEMMA4 = Gemma4VisionConfig(**VISION, num_key_value_heads=2, head_dim=16)

# The model that is published, its image processor, what the refusal says
REFUSED = {
    "SigLIP 2 NaFlex": (
        Siglip2Model, NAFLEX, Siglip2ImageProcessorPil(patch_size=7),
        "tower takes pixel_attention_mask and spatial_shapes with a picture",
    ),
    "Swin": (SwinModel, SWIN, VIT, "a swin, whose hidden states are not one grid of patches"),
    "ConvNeXt": (
        ConvNextModel, CONVNEXT, ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=1.0),
        "a convnext, whose hidden states are not one grid of patches",
    ),
    "InternViT": (InternVLVisionModel, INTERNVL, VIT, r"a internvl_vision of sizes in pairs, \[7, 7\]"),
    "BLIP": (
        BlipModel, BlipConfig(**TWO), CROP, "a blip_vision_model inside its larger model only, and it is no CLIP"
    ),
    "GroupViT": (
        GroupViTModel, GroupViTConfig(text_config=TEXT, vision_config=GROUPS), CROP,
        "a groupvit, whose vision tower is no model by itself",
    ),
    "Idefics": (IdeficsModel, IDEFICS, CROP, "a idefics, whose vision tower is no model by itself"),
    "Gemma 4's": (
        Gemma4VisionModel, GEMMA4, Gemma4ImageProcessorPil(), "tower takes pixel_position_ids with a picture"
    ),
    "LLaVA-OneVision, cropped": (
        LlavaOnevisionForConditionalGeneration, ONEVISION,
        LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, **TILES),
        "cuts pictures into tiles: take --image_aspect_ratio pad or anyres",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_that_a_llava_cannot_hold_is_refused_with_the_reason(parts, tmp_path, name):
    *tower, reason = REFUSED[name]
    save_tower(tmp_path / "tower", *tower)
    with pytest.raises(ValueError, match=reason) as refusal:
        build_model(BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "out" / "llava")))
    assert "\n" not in str(refusal.value)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("ratio", ["pad", "anyres"])
def test_a_model_that_cuts_tiles_lends_its_tower(parts, tmp_path, ratio):
    save_tower(tmp_path / "tower", *REFUSED["LLaVA-OneVision, cropped"][:-1])
    build_model(
        BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "llava"), image_aspect_ratio=ratio)
    )
    lent = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "tower").model.vision_tower.state_dict()
    ours = opened(tmp_path / "llava")[0].model.vision_tower.state_dict()
    assert ours.keys() == lent.keys()
    assert all(torch.equal(ours[name], lent[name]) for name in ours)


def test_a_tower_that_puts_its_pictures_into_one_row_takes_no_tiles(parts, tmp_path):
    pictures = PixtralImageProcessorPil(patch_size=7, size={"longest_edge": 28})
    save_tower(tmp_path / "tower", PixtralVisionModel, PixtralVisionConfig(**VISION), pictures)
    build_model(
        BuildArguments(str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "pad"), image_aspect_ratio="pad")
    )
    with pytest.raises(ValueError, match=r"anyres: a pixtral puts the patches of all tiles into one row"):
        build_model(
            BuildArguments(
                str(tmp_path / "tower"), str(parts["qwen2"]), str(tmp_path / "any"), image_aspect_ratio="anyres"
            )
        )
