"""Pictures in tiles (`--image_aspect_ratio anyres`): as many tokens as features, and all that follows from it."""

import io
import json
import subprocess
import sys
from pathlib import Path
from threading import Event, Lock

import numpy as np
import pytest
import torch
from conftest import logged, run_train, run_zero2, turns
from PIL import ExifTags, Image
from safetensors.torch import load_file
from test_explain import by_hand
from transformers import AutoModelForImageTextToText, AutoProcessor

from train_llava import evaluate
from train_llava.build_model import BuildArguments, build_model
from train_llava.chat import Chat, chat_of
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset, to_sample
from train_llava.dataset.images import open_image, picture_size
from train_llava.dataset.lengths import count_tokens
from train_llava.dataset.packing import PackedDataset
from train_llava.evaluation.generation import generate, log_probabilities, user_message
from train_llava.explain import read_layers
from train_llava.merge_lora import merge_lora
from train_llava.model import load_checkpoint
from train_llava.modeling.adapter import load_model
from train_llava.records import to_messages
from train_llava.web_demo import stream

SIZES = [(1, 1), (2, 1), (1, 2), (3, 2), (7, 5), (28, 28), (29, 27), (56, 28), (28, 56), (57, 56), (84, 28), (90, 30),
         (30, 90), (100, 99), (101, 67), (640, 480), (480, 640), (1000, 10), (10, 1000), (3000, 200)]  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def item(*texts: str, images=()) -> dict:
    record = {"id": "x", "image": ["name"] * len(images), "conversations": turns(*texts)}
    return {"id": "x", "messages": to_messages(record), "images": list(images)}


ITEMS = [
    item("<image>\nWhat is this?", "a red square", "And?", "It is red.", images=[noise(50, 50)]),
    item("<image>\nWhat is this?", "a blue circle", images=[noise(20, 90)]),
    item("Where is Paris?", "Paris is in France."),
    item("<image>\nand\n<image>\nWhich is blue?", "the second", images=[noise(90, 20), noise(28, 28)]),
]


@pytest.fixture(scope="module")
def anyres(parts, tmp_path_factory):
    """The tiny parts assembled with tiles of 28 pixels: 16 tokens each."""
    folder = tmp_path_factory.mktemp("anyres") / "model"
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(folder), image_aspect_ratio="anyres"))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Twenty records, a picture of another size each: answers that tell its shape."""
    (tmp_path / "images").mkdir()
    records = []
    for i, (width, height) in enumerate(SIZES):
        noise(width, height).save(tmp_path / "images" / f"{i}.png")
        answer = "a red square" if width > height else "a blue circle"
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns("<image>\nWhat is this?", answer)})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    return tmp_path


def test_rows_are_filled_by_the_tokens_of_each_picture(anyres, photos):
    _, processor = load_checkpoint(str(anyres))
    dataset, collator = LlavaDataset(str(photos)), LlavaCollator(processor, packing=True)
    checked = CheckedDataset(dataset, collator.chat, photos / "bad.jsonl")
    tokens = count_tokens(dataset, collator.chat)[:, 0].tolist()
    assert tokens == [len(to_sample(dataset[i], collator.chat).labels) for i in range(20)]
    rows = PackedDataset(checked, 400)
    assert len(rows) < 20
    assert max(collator(row)["input_ids"].shape[1] for row in rows) <= 400


def test_a_picture_of_any_size_has_as_many_tokens_as_features(anyres):
    model, processor = load_checkpoint(str(anyres))
    chat = Chat(processor)
    for size in SIZES:
        inputs = processor(images=noise(*size), text="<image>", return_tensors="pt")
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
        assert inputs["input_ids"].shape[1] == len(features) == chat.image_tokens(size), size
    assert len({chat.image_tokens(size) for size in SIZES}) > 10
    ours = chat.prompts([[user_message("What?", 1)]], [noise(90, 30)])
    assert (ours["input_ids"] == processor.image_token_id).sum() == chat.image_tokens((90, 30))


def test_features_are_the_towers_outputs_for_the_whole_picture_and_each_tile(anyres, parts):
    model, processor = load_checkpoint(str(anyres))
    prepared = processor.image_processor(noise(56, 56), return_tensors="pt")
    tower = load_checkpoint(str(anyres))[0].model.vision_tower
    assert prepared["pixel_values"].shape == (1, 5, 3, 28, 28)
    with torch.no_grad():
        hidden = tower(prepared["pixel_values"][0], output_hidden_states=True).hidden_states[-2][:, 1:]
        whole, *tiles = model.model.multi_modal_projector(hidden)
        rows = [whole]
        for pair in (tiles[:2], tiles[2:]):  # left and right
            for row in range(4):
                rows += [tile[4 * row : 4 * row + 4] for tile in pair] + [model.model.image_newline[None]]
        features = model.get_image_features(**prepared).pooler_output[0]
    assert torch.allclose(features, torch.cat(rows), atol=1e-6)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (anyres, parts["clip"]))
    for name in (name for name in ours if name.startswith("vision_tower.")):
        assert torch.equal(ours[name], theirs[name.removeprefix("vision_tower.")]), name


def gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare_with_plain(folder: Path) -> tuple[dict, dict]:
    """Compares the collator's batch, packed or not, with a plain processor and full logits, one sample at a time.

    Returns the batch and the gradients by name.
    """
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    batch = LlavaCollator(processor)(ITEMS)
    loss, grads = gradients(model, **batch)
    labels = [row[row != -100] for row in batch["labels"]]
    total, count = torch.zeros(()), 0
    model.zero_grad()
    for entry, row, mask in zip(ITEMS, batch["labels"], batch["attention_mask"], strict=True):
        text = processor.apply_chat_template(entry["messages"])
        plain = processor(images=entry["images"] or None, text=text, add_special_tokens=False, return_tensors="pt")
        assert plain["input_ids"].shape[1] == mask.sum()
        logits = model(**plain).logits[0, :-1]
        learnt = row[1 : 1 + len(logits)]
        total = total + torch.nn.functional.cross_entropy(logits, learnt, reduction="sum")
        count += int((learnt != -100).sum())
    assert count == sum(map(len, labels))
    (total / count).backward()
    assert abs(loss - total.detach() / count) <= 1e-5 * loss
    full_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    packed_loss, packed_grads = gradients(model, **LlavaCollator(processor, packing=True)(ITEMS))
    assert abs(loss - packed_loss) <= 1e-5 * loss
    assert grads.keys() == full_grads.keys()
    for name, grad in grads.items():
        assert (full_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, name
        assert (packed_grads[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, name
    return batch, grads


def test_loss_and_gradients_equal_those_of_plain_transformers_and_of_packing(anyres):
    batch, grads = compare_with_plain(anyres)
    assert batch["pixel_values"].shape[:2] == (4, 5)
    assert "model.image_newline" in grads


def test_texts_alone_give_the_projector_and_the_newline_a_zero_gradient(anyres):
    model, processor = load_checkpoint(str(anyres))
    _, grads = gradients(model, **LlavaCollator(processor)([ITEMS[2]]))
    projector = {name: grad for name, grad in grads.items() if "projector" in name or "newline" in name}
    assert len(projector) == 5
    assert all((grad == 0).all() for grad in projector.values())


@pytest.mark.parametrize("train_type", ["projector", "freeze_vision", "full"])
def test_the_newline_trains_with_the_projector(anyres, photos, tmp_path, monkeypatch, train_type):
    output = tmp_path / "run"
    options = ["--train_type", train_type, "--max_steps", "2", "--eval_data_path", photos, "--packing", "true"]
    losses = run_train(monkeypatch, anyres, photos, output, *options, "--learning_rate", "1e-2")
    assert np.isfinite([*losses, *logged(output, "eval_loss")]).tolist() == [True] * 3
    before, after = (load_file(folder / "model.safetensors") for folder in (anyres, output))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"image_newline", "multi_modal_projector.linear_1.weight"} <= changed
    assert any(name.startswith("language_model") for name in changed) == (train_type != "projector")
    assert any(name.startswith("vision_tower") for name in changed) == (train_type == "full")


def test_an_adapter_leaves_the_newline_and_merges_to_the_same_answers(anyres, photos, tmp_path, monkeypatch, capsys):
    options = ["--train_type", "lora", "--max_steps", "3", "--learning_rate", "1e-2", "--lora_r", "4"]
    options += ["--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size", "4"]
    run_train(monkeypatch, anyres, photos, tmp_path / "run", *options)
    assert "image_newline stays as it is" in capsys.readouterr().out
    assert not any("newline" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))
    merge_lora(str(anyres), str(tmp_path / "run"), str(tmp_path / "merged"))
    (adapted, processor), (merged, _) = (
        load_model(str(anyres), str(tmp_path / "run")),
        load_model(str(tmp_path / "merged")),
    )
    asked, images = [[user_message("What is this?", 1)] for _ in range(3)], [noise(*size) for size in SIZES[13:16]]
    inputs = Chat(processor).prompts(asked, images)
    ours, theirs = merged(**inputs).logits, adapted(**inputs).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    together = generate(merged, processor, asked, images, 8)
    assert together == generate(adapted, processor, asked, images, 8)
    assert together == [
        generate(merged, processor, [a], [image], 8)[0] for a, image in zip(asked, images, strict=True)
    ]
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


def test_lengths_are_counted_from_file_headers_alone(anyres, photos, tmp_path, monkeypatch):
    _, processor = load_checkpoint(str(anyres))
    chat = Chat(processor)
    dataset = LlavaDataset(str(photos))
    exact = [len(to_sample(dataset[i], chat).labels) for i in range(len(SIZES))]
    monkeypatch.setattr(Image.Image, "load", None)
    dataset.chat = chat
    measured = [dataset.read(i, decode=False) for i in range(len(SIZES))]
    assert [len(to_sample(item, chat).labels) for item in measured] == exact
    assert count_tokens(dataset, chat)[:, 0].tolist() == exact


def test_a_file_header_gives_the_size_of_the_upright_picture():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    noise(90, 30).save(file, "JPEG", exif=exif)
    assert picture_size(file.getvalue(), "x") == open_image(file.getvalue(), "x").size == (30, 90)
    cut = file.getvalue()[:700]
    assert picture_size(cut, "x") == (30, 90)
    with pytest.raises(ValueError, match="x cannot be read as a picture"):
        open_image(cut, "x")


def test_no_picture_is_decoded_at_a_smaller_size(anyres):
    assert Chat(load_checkpoint(str(anyres))[1]).min_side is None


def test_every_question_is_asked(anyres, photos, tmp_path):
    arguments = evaluate.EvaluateArguments(str(tmp_path / "out"), str(anyres), str(photos), blank_control=True)
    arguments.max_new_tokens = 4
    (tmp_path / "out").mkdir()
    metrics = evaluate.evaluate(arguments, tmp_path / "out")
    assert (metrics["n"], metrics["bad"]) == (20, [])
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model, processor = load_model(str(anyres))
    alone = [generate(model, processor, [[user_message("What is this?", 1)]], [noise(*size)], 4)[0] for size in SIZES]
    assert [line["prediction"] for line in lines] == alone


def test_an_answer_about_tiles_is_as_likely_as_in_training(anyres):
    """Of several pictures of one size, and by the last layer."""
    model, processor = load_model(str(anyres))
    prompt, images = "What is this?", [noise(90, 30), noise(90, 30).rotate(180)]
    pictures = [[image] for image in images]
    ours = log_probabilities(model, chat_of(processor), [user_message(prompt, 1)], pictures, ["a red square"])
    wanted = [by_hand(model, processor, image, "a red square")[0] for image in images]
    assert ours[:, 0].tolist() == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-4)
    layers = read_layers(model, chat_of(processor), prompt, "a red square", images[0])
    assert torch.tensor(layers["probabilities"])[-1].log().sum().item() == pytest.approx(wanted[0], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_grid_pinpoints": ["2x2"]}, "goes with --image_aspect_ratio anyres"),
        (
            {"image_aspect_ratio": "anyres", "image_grid_pinpoints": ["672x672"]},
            "rows x columns of tiles, 1 to 9 each",
        ),
        ({"image_aspect_ratio": "anyres", "vision_feature_select_strategy": "full"}, "drops 0 of the 1 tokens"),
    ],
)
def test_options_that_make_no_grid_are_refused(parts, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "out"), **options))
    assert not (tmp_path / "out").exists()


def test_users_can_choose_the_grids(parts, tmp_path):
    options = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": ["1x4", "3x3"]}
    build_model(BuildArguments(str(parts["clip"]), str(parts["qwen2"]), str(tmp_path / "out"), **options))
    config, processor = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "processor_config")
    )
    assert config["image_grid_pinpoints"] == [[28, 112], [84, 84]]
    assert processor["image_processor"]["image_grid_pinpoints"] == [[28, 112], [84, 84]]


@pytest.mark.parametrize("count", [0, 2])
def test_a_wrong_number_of_pictures_is_refused(anyres, count):
    model, processor = load_model(str(anyres))
    with pytest.raises(ValueError, match=f"1 <image> tags, {count} pictures"):
        generate(model, processor, [[user_message("What?", 1)]], [noise(28, 28)] * count)


def test_the_page_answers_as_infer_does(anyres):
    model, processor = load_model(str(anyres))
    asked, images = [user_message("What is this?", 1)], [noise(90, 30)]
    *_, answer = stream(model, processor, asked, images, Event(), Lock(), max_new_tokens=8)
    assert answer == generate(model, processor, [asked], images, 8)[0]


@pytest.mark.slow
def test_two_zero2_ranks_do_not_change_the_loss(anyres, photos, tmp_path, monkeypatch):
    settings = [
        "--train_type",
        "freeze_vision",
        "--max_steps",
        "4",
        "--learning_rate",
        "1e-3",
        "--save_strategy",
        "no",
    ]
    losses = run_train(monkeypatch, anyres, photos, tmp_path / "one", *settings, "--per_device_train_batch_size", "4")
    done = run_zero2(anyres, photos, tmp_path / "two", *settings, "--per_device_train_batch_size", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert logged(tmp_path / "two") == pytest.approx(losses, rel=1e-4)
