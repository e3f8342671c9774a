"""Fewer tokens a picture (`--pixel_shuffle`): an Idefics3 of a SigLIP and a language model, and all that follows."""

import json
import subprocess
import sys
from pathlib import Path
from threading import Event, Lock

import numpy as np
import pytest
import torch
from conftest import NARROW, logged, run_train, run_zero2
from PIL import Image
from safetensors.torch import load_file, save_file
from test_anyres import ITEMS, SIZES, compare_with_plain, gradients, item, noise, photos  # noqa: F401 - a fixture
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from train_llava import check_data, evaluate, explain
from train_llava.build_model import BuildArguments, build_model
from train_llava.chat import Chat
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset, to_sample
from train_llava.dataset.images import levels, prepare_pictures, seen_part
from train_llava.dataset.lengths import count_tokens
from train_llava.dataset.packing import PackedDataset
from train_llava.evaluation.generation import assistant_message, generate, user_message
from train_llava.merge_lora import merge_lora
from train_llava.model import TRAIN_TYPES, LoraArguments, count_parameters, load_checkpoint, load_config, set_trainable
from train_llava.modeling.adapter import load_model
from train_llava.prepare_picture import as_seen
from train_llava.training.memory import SavedTensors, empty_model, forward_bytes, picture_features
from train_llava.web_demo import stream

SIDE = 28  # 4 x 4 patches of 7 pixels: 16 tokens, and folded 4


def save_siglip(folder: Path, side: int = SIDE, **settings) -> Path:
    """A tiny SigLIP whose norms and position table are random, too, with its image processor."""
    torch.manual_seed(0)
    tower = SiglipVisionModel(
        SiglipVisionConfig(**NARROW, num_hidden_layers=3, image_size=side, patch_size=7, **settings)
    )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tower.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip") / "tower")


def build(siglip: Path, parts: dict[str, Path], folder: Path, **options) -> Path:
    build_model(BuildArguments(str(siglip), str(parts["qwen2"]), str(folder), pixel_shuffle=2, **options))
    return folder


@pytest.fixture(scope="module", params=["crop", "anyres"])
def folded(siglip, parts, tmp_path_factory, request) -> Path:
    """The parts as an Idefics3, whose pictures are whole, or in tiles."""
    return build(siglip, parts, tmp_path_factory.mktemp("folded") / "model", image_aspect_ratio=request.param)


@pytest.fixture(scope="module")
def whole(siglip, parts, tmp_path_factory) -> Path:
    return build(siglip, parts, tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def tiled(siglip, parts, tmp_path_factory) -> Path:
    return build(siglip, parts, tmp_path_factory.mktemp("tiled") / "model", image_aspect_ratio="anyres")


def test_the_checkpoint_is_a_standard_idefics3_with_the_parts_weights(folded, siglip, parts):
    model, info = AutoModelForImageTextToText.from_pretrained(folded, output_loading_info=True)
    assert type(model) is Idefics3ForConditionalGeneration
    assert not any(info.values())
    tower = SiglipVisionModel.from_pretrained(siglip)
    theirs = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("head.")}
    ours = model.model.vision_model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    # The names that other engines look for
    names = load_file(folded / "model.safetensors").keys()
    assert {"model.vision_model.post_layernorm.weight", "model.connector.modality_projection.proj.weight"} <= names
    assert not any(str(parts["qwen2"].parent) in file.read_text() for file in folded.glob("*.json"))


def test_a_token_holds_the_features_of_four_neighbouring_patches(whole, siglip):
    """By hand: the tower's own output, two by two patches side by side, through the projector's matrix."""
    model, processor = load_checkpoint(str(whole))
    tower = SiglipVisionModel.from_pretrained(siglip)
    pixel_values = prepare_pictures(processor.image_processor, [noise(50, 90)])["pixel_values"]
    own = SiglipImageProcessorPil.from_pretrained(siglip)(noise(50, 90), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values[0], own)
    with torch.no_grad():
        grid = tower(own).last_hidden_state[0].view(4, 4, 32)
        matrix, expected = model.model.connector.modality_projection.proj.weight, []
        for row in (0, 2):
            for column in (0, 2):
                four = [grid[row + i, column + j] for i in (0, 1) for j in (0, 1)]
                expected.append(matrix @ torch.cat(four))
        features = model.get_image_features(pixel_values).pooler_output[0]
    assert torch.allclose(features, torch.stack(expected), atol=1e-5)


def test_a_picture_of_any_size_has_the_tokens_that_plain_transformers_gives_it(folded):
    model, processor = load_checkpoint(str(folded))
    plain, chat, lengths = AutoProcessor.from_pretrained(folded), Chat(processor), set()
    for size in SIZES:
        asked = user_message("What is this?", 1)
        text = plain.apply_chat_template([asked], add_generation_prompt=True)
        inputs = plain(images=noise(*size), text=text, add_special_tokens=False, return_tensors="pt")
        ours = chat.prompts([[asked]], [noise(*size)])
        assert torch.equal(ours["input_ids"], inputs["input_ids"]), size
        assert torch.equal(ours["pixel_values"], inputs["pixel_values"]), size
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        assert len(features) == chat.image_tokens(size) == (inputs["input_ids"] == plain.image_token_id).sum()
        lengths.add(len(features))
    assert lengths == ({4} if not chat.anyres else {4 * 3, 4 * 5})


def test_the_tokens_around_a_picture_are_one_each_and_no_text_may_hold_them(folded):
    _, processor = load_checkpoint(str(folded))
    chat = Chat(processor)
    ids = chat.picture_ids((90, 30))
    names = processor.tokenizer.convert_ids_to_tokens(ids[ids != processor.image_token_id])
    around = ["<fake_token_around_image>", "<global-img>", "<fake_token_around_image>"]
    tiles = [f"<row_1_col_{i}>" for i in (1, 2)]
    assert names[-3:] == around
    assert [name for name in names if name.startswith("<row")] == (tiles if chat.anyres else [])
    assert set(around) <= chat.control_tokens
    assert "<|im_start|>" in chat.control_tokens
    with pytest.raises(ValueError, match="the control token <global-img>"):
        chat.encode([*user_message("a <global-img> b", 0)["content"]] and [user_message("a <global-img> b", 0)])


def test_loss_and_gradients_equal_those_of_plain_transformers_and_of_packing(folded):
    _, grads = compare_with_plain(folded)
    assert "model.connector.modality_projection.proj.weight" in grads


def test_texts_alone_give_the_projector_a_zero_gradient(folded):
    model, processor = load_checkpoint(str(folded))
    _, grads = gradients(model, **LlavaCollator(processor)([ITEMS[2]]))
    assert not grads["model.connector.modality_projection.proj.weight"].any()


@pytest.mark.parametrize(("train_type", "packing"), zip(TRAIN_TYPES, ["true", "false"] * 3, strict=False))
def test_each_type_trains_its_parts(folded, photos, tmp_path, monkeypatch, train_type, packing):  # noqa: F811
    output = tmp_path / "run"
    options = ["--train_type", train_type, "--max_steps", "2", "--eval_data_path", photos, "--packing", packing]
    options += ["--learning_rate", "1e-2", *(["--lora_r", "4"] if "lora" in train_type else [])]
    losses = run_train(monkeypatch, folded, photos, output, *options)
    assert np.isfinite([*losses, *logged(output, "eval_loss")]).tolist() == [True] * 3
    if "lora" in train_type:
        names = {name.split(".")[3] for name in load_file(output / "adapter_model.safetensors")}
        assert names == {"connector", "text_model", *(["vision_model"] if train_type == "lora_all" else [])}
        return
    before, after = (load_file(folder / "model.safetensors") for folder in (folded, output))
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    trained = {"projector": set(), "freeze_vision": {"text_model"}, "full": {"text_model", "vision_model"}}
    assert changed - {"weight"} == {"connector"} | trained[train_type]
    # All of the tower is used: its last layer, and the norm behind it
    norm = "model.vision_model.post_layernorm.weight"
    assert torch.equal(before[norm], after[norm]) == (train_type != "full")


def test_an_adapter_merges_to_the_same_answers_and_others_give_them(folded, photos, tmp_path, monkeypatch):  # noqa: F811
    options = ["--train_type", "lora", "--max_steps", "3", "--learning_rate", "1e-2", "--lora_r", "4"]
    options += ["--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", "4"]
    run_train(monkeypatch, folded, photos, tmp_path / "run", *options)
    merge_lora(str(folded), str(tmp_path / "run"), str(tmp_path / "merged"))
    adapted, processor = load_model(str(folded), str(tmp_path / "run"))
    merged, _ = load_model(str(tmp_path / "merged"))
    asked, images = [[user_message("What is this?", 1)] for _ in range(3)], [noise(*size) for size in SIZES[13:16]]
    inputs = Chat(processor).prompts(asked, images)
    ours, theirs = merged(**inputs).logits, adapted(**inputs).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    together = generate(merged, processor, asked, images, 8)
    alone = [generate(merged, processor, [a], [image], 8)[0] for a, image in zip(asked, images, strict=True)]
    assert together == alone == generate(adapted, processor, asked, images, 8)
    *_, streamed = stream(merged, processor, asked[0], images[:1], Event(), Lock(), max_new_tokens=8)
    assert streamed == together[0]
    outside = (
        "import sys, torch; from PIL import Image; from transformers import pipeline\n"
        "sys.modules['train_llava'] = None\n"
        f"ask = pipeline('image-text-to-text', {str(tmp_path / 'merged')!r}, dtype=torch.float32)\n"
        f"picture = Image.open({str(photos / 'images' / '14.png')!r})\n"
        "parts = [{'type': 'image', 'image': picture}, {'type': 'text', 'text': 'What is this?'}]\n"
        "print(ask(text=[{'role': 'user', 'content': parts}], return_full_text=False,\n"
        "          generate_kwargs={'max_new_tokens': 8, 'do_sample': False})[0]['generated_text'].strip())"
    )
    done = subprocess.run([sys.executable, "-c", outside], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == together[1].strip()


def test_lengths_are_counted_from_file_headers_alone(folded, photos, monkeypatch):  # noqa: F811
    chat = Chat(load_checkpoint(str(folded))[1])
    dataset = LlavaDataset(str(photos))
    samples = [to_sample(dataset[i], chat) for i in range(len(SIZES))]
    dataset.chat = chat
    monkeypatch.setattr(Image.Image, "load", None)
    counts = count_tokens(dataset, chat)
    assert counts[:, 0].tolist() == [len(sample.labels) for sample in samples]
    assert counts[:, 1].tolist() == [int((s.input_ids == chat.processor.image_token_id).sum()) for s in samples]


def test_the_model_sees_the_whole_picture_stretched(whole, tiled):
    """A picture of four colors, 3 x 1: its corners stay in their corners, in the tiles put together, too."""
    colors = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    image = Image.fromarray(np.array(colors, dtype=np.uint8).reshape(2, 2, 3)).resize((300, 100), Image.Resampling.BOX)
    for folder, shape in ((whole, (SIDE, SIDE, 3)), (tiled, (SIDE, 2 * SIDE, 3))):
        processor = load_checkpoint(str(folder))[1]
        seen = levels(processor.image_processor, image)
        assert seen.shape == shape
        corners = [seen[row, column] for row in (0, -1) for column in (0, -1)]
        assert np.allclose(corners, colors, atol=1)
        assert np.allclose(seen_part(processor.image_processor, SIDE, image.size), [0, 0, 1, 1], atol=0.02)
    assert Chat(processor).min_side is None  # with tiles, a picture keeps its size
    prepared = as_seen(load_checkpoint(str(whole))[1].image_processor, image)
    assert np.abs(levels(load_checkpoint(str(whole))[1].image_processor, prepared) - np.asarray(prepared)).max() < 1


def test_the_commands_take_it(folded, photos, tmp_path, monkeypatch):  # noqa: F811
    report = tmp_path / "report.json"
    command = ["check_data", "--data_path", photos, "--model_name_or_path", folded, "--report", report]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--num_proc", "1"])
    with pytest.raises(SystemExit, match="0"):
        check_data.main()
    assert json.loads(report.read_text())["records"] == len(SIZES)
    (tmp_path / "out").mkdir()
    arguments = evaluate.EvaluateArguments(str(tmp_path / "out"), str(folded), str(photos), blank_control=True)
    arguments.max_new_tokens = 4
    metrics = evaluate.evaluate(arguments, tmp_path / "out")
    assert (metrics["n"], metrics["bad"]) == (20, [])
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model, processor = load_model(str(folded))
    alone = [generate(model, processor, [[user_message("What is this?", 1)]], [noise(*size)], 4)[0] for size in SIZES]
    assert [line["prediction"] for line in lines] == alone


def test_rows_are_filled_by_all_tokens_of_pictures(folded, corpus, tmp_path):
    """Also by those around an image, and those of the blank one in a row without."""
    processor = load_checkpoint(str(folded))[1]
    dataset, collator = LlavaDataset(str(corpus)), LlavaCollator(processor, packing=True)
    checked = CheckedDataset(dataset, collator.chat, tmp_path / "bad.jsonl")
    longest = max(collator([checked[i]])["input_ids"].shape[1] for i in range(16))
    for budget in (longest, 2 * longest):
        lengths = [collator(row)["input_ids"].shape[1] for row in PackedDataset(checked, budget)]
        assert max(lengths) <= budget


def test_an_answer_is_explained(folded, photos, tmp_path):  # noqa: F811
    image = str(photos / "images" / "14.png")
    metrics, _ = explain.explain(
        explain.ExplainArguments(str(folded), image, "What is this?", str(tmp_path / "out"), answer="a red square")
    )
    model, processor = load_model(str(folded))
    record = ITEMS[0] | {"messages": [user_message("What is this?", 1), assistant_message("a red square")]}
    batch = LlavaCollator(processor)([record | {"images": [Image.open(image)]}])
    with torch.inference_mode():
        by_hand = -model(**batch).loss.item() * len(batch["shift_labels"])
    assert metrics["log_probability"]["this picture"] == pytest.approx(by_hand, rel=1e-4)
    assert len(metrics["tokens"]) == len(batch["shift_labels"])
    assert 0 < min(metrics["attention"]) < max(metrics["attention"]) < 1


@pytest.mark.parametrize("train_type", TRAIN_TYPES)
def test_the_memory_estimate_is_that_of_a_real_step(folded, train_type):
    lora = LoraArguments(lora_r=4, lora_dropout=0.0)
    llava, processor = load_checkpoint(str(folded), torch.float32)
    batch = LlavaCollator(processor)([ITEMS[0], item("<image>\nWhat?", "a red square", images=[noise(40, 40)])])
    model = set_trainable(llava, train_type, lora).train()
    llava.get_decoder().config.use_cache = False
    empty, _ = empty_model(load_config(str(folded)), train_type, lora, torch.float32)
    assert count_parameters(empty) == count_parameters(llava)
    assert len(picture_features(empty, 1)) == Chat(processor).image_tokens((50, 50))
    with (saved := SavedTensors(model)):
        model(**batch, num_items_in_batch=4)
    shape = (*batch["input_ids"].shape, 2, len(batch["shift_labels"]))
    indices, mask = 2 * 8 * len(batch["shift_labels"]), batch["logits_to_keep"].nbytes
    assert forward_bytes(empty, *shape)[0] - indices == pytest.approx(saved.nbytes - mask, rel=0.01)


def test_a_trained_projector_is_taken_by_its_own_kind_alone(whole, siglip, parts, tmp_path):
    name = "connector.modality_projection.proj.weight"
    save_file({name: torch.ones(32, 128)}, tmp_path / "projector.safetensors")
    again = build(siglip, parts, tmp_path / "again", projector=str(tmp_path / "projector.safetensors"))
    assert torch.equal(load_file(again / "model.safetensors")[f"model.{name}"], torch.ones(32, 128))
    with pytest.raises(ValueError, match="it was trained in a model made with --pixel_shuffle"):
        build_model(
            BuildArguments(
                str(siglip),
                str(parts["qwen2"]),
                str(tmp_path / "no"),
                projector=str(tmp_path / "projector.safetensors"),
            )
        )
    layers = {"linear_1.weight": (32, 32), "linear_1.bias": (32,), "linear_2.weight": (32, 32), "linear_2.bias": (32,)}
    save_file({name: torch.ones(shape) for name, shape in layers.items()}, tmp_path / "mlp.safetensors")
    with pytest.raises(ValueError, match="it was trained in a model made without --pixel_shuffle"):
        build(siglip, parts, tmp_path / "no", projector=str(tmp_path / "mlp.safetensors"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_shuffle": 3}, "4 x 4 patches fold by 2, 4"),
        ({"pixel_shuffle": 1}, "--pixel_shuffle 1: 2 or more"),
        ({"image_aspect_ratio": "pad"}, "an Idefics3 stretches pictures"),
        ({"vision_feature_layer": -2}, "reads the tower's output"),
        ({"vision_feature_select_strategy": "full"}, "reads the tower's output"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": ["1x7"]}, "at most 6 tiles a side"),
    ],
)
def test_what_an_idefics3_cannot_do_is_refused(siglip, parts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(
            BuildArguments(str(siglip), str(parts["qwen2"]), str(tmp_path / "out"), **{"pixel_shuffle": 2} | options)
        )
    assert not (tmp_path / "out").exists()


def test_a_tower_that_is_no_siglip_is_refused(parts, siglip, tmp_path):
    with pytest.raises(ValueError, match=r"is a clip\w*, and the tower of an Idefics3 is a SigLIP: \S+ is in one"):
        build(parts["clip"], parts, tmp_path / "out", image_aspect_ratio="anyres")
    # transformers rounds the places of 19 patches a side to other rows of the position table
    with pytest.raises(ValueError, match="places 19 x 19 patches otherwise"):
        build_model(
            BuildArguments(
                str(save_siglip(tmp_path / "19", 19 * 7)), str(parts["qwen2"]), str(tmp_path / "out"), pixel_shuffle=19
            )
        )
    # A SigLIP whose image processor crops
    crops = json.loads((siglip / "preprocessor_config.json").read_text())
    crops |= {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}}
    crops |= {"do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE}}
    folder = save_siglip(tmp_path / "crops")
    (folder / "preprocessor_config.json").write_text(json.dumps(crops))
    with pytest.raises(ValueError, match="crops or pads pictures, and an Idefics3 stretches them"):
        build(folder, parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tower_of_an_idefics3_is_taken_and_users_choose_the_most_tiles(whole, parts, tmp_path):
    options = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": ["3x3"]}
    model, processor = load_checkpoint(str(build(whole, parts, tmp_path / "model", **options)))
    assert Chat(processor).image_tokens((50, 50)) == 4 * (9 + 1)
    theirs = load_checkpoint(str(whole))[0].model.vision_model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.model.vision_model.state_dict().items())


@pytest.mark.slow
def test_two_zero2_ranks_do_not_change_the_loss(folded, photos, tmp_path, monkeypatch):  # noqa: F811
    settings = ["--train_type", "full", "--max_steps", "4", "--learning_rate", "1e-3", "--save_strategy", "no"]
    losses = run_train(monkeypatch, folded, photos, tmp_path / "one", *settings, "--per_device_train_batch_size", "4")
    done = run_zero2(folded, photos, tmp_path / "two", *settings, "--per_device_train_batch_size", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert logged(tmp_path / "two") == pytest.approx(losses, rel=1e-4)
