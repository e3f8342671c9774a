"""What the model is shown and what it has to say: records, pictures, tokens, labels, and the loss over them."""

import json

import numpy as np
import pytest
import torch
from conftest import turns
from PIL import Image
from transformers import AutoProcessor

from train_llava.chat import Chat
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.dataset.images import open_image, upright_rgb
from train_llava.model import load_processor
from train_llava.modeling.verification import padding_is_invisible
from train_llava.records import text_of, to_messages

RED = Image.new("RGB", (40, 40), "red")
BLUE = Image.new("RGB", (60, 40), "blue")


def item(*texts: str, images=()) -> dict:
    record = {"id": "x", "image": ["name"] * len(images), "conversations": turns(*texts)}
    return {"id": "x", "messages": to_messages(record), "images": list(images)}


ITEMS = {
    "one turn": item("<image>\nWhat is this?", "a red square", images=[RED]),
    "tag behind": item("What is this?\n<image>", "a red square", images=[RED]),
    "several turns": item("<image>\nWhat is this?", "a red square", "And?", "It is red.\nYes.", images=[RED]),
    "Chinese": item("<image>\n这是什么?", "红色的方块", images=[RED]),
    "text alone": item("Where is Paris?", "Paris is in France."),
    "two pictures": item("<image>\nand\n<image>\nWhich is blue?", "the second", images=[RED, BLUE]),
}


@pytest.mark.parametrize("name", ITEMS)
def test_labels_are_the_answers_with_their_end_of_turn(processor, name):
    batch = LlavaCollator(processor)([ITEMS[name]])
    labels = batch["labels"][0]
    starts = [i for i in range(len(labels)) if labels[i] != -100 and (i == 0 or labels[i - 1] == -100)]
    said = []
    for start in starts:
        run = labels[start:].tolist()
        said.append(processor.tokenizer.decode(run[: run.index(-100)] if -100 in run else run))
    answers = [text_of(message) for message in ITEMS[name]["messages"] if message["role"] == "assistant"]
    assert said == [answer + "<|im_end|>" for answer in answers]
    assert torch.equal(labels[labels != -100], batch["input_ids"][0][labels != -100])


@pytest.mark.parametrize("name", ITEMS)
def test_ids_and_pictures_are_those_of_the_processor(processor, name):
    batch = LlavaCollator(processor)([ITEMS[name]])
    text = processor.apply_chat_template(ITEMS[name]["messages"])
    images = ITEMS[name]["images"] or None
    expected = processor(images=images, text=text, add_special_tokens=False, return_tensors="pt")
    length = expected["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], expected["input_ids"])
    assert batch["attention_mask"].sum() == length
    if images:
        assert torch.allclose(batch["pixel_values"], expected["pixel_values"], atol=1e-5)


def test_the_training_prompt_is_the_question_prompt(processor):
    conversation = ITEMS["one turn"]
    batch = LlavaCollator(processor)([conversation])
    asked = Chat(processor).prompts([conversation["messages"][:1]], conversation["images"])["input_ids"][0]
    first = int((batch["labels"][0] != -100).nonzero()[0])
    assert torch.equal(batch["input_ids"][0, :first], asked)


def test_a_batch_mixes_one_picture_several_and_none(processor, model):
    batch = LlavaCollator(processor)(list(ITEMS.values()))
    assert batch["pixel_values"].shape == (6, 3, 28, 28)
    assert (batch["input_ids"] == 300).sum(1).tolist() == [16, 16, 16, 16, 0, 32]
    assert torch.isfinite(model(**batch).loss)


def test_the_mask_is_not_the_pad_token(llava):
    processor = AutoProcessor.from_pretrained(llava)
    processor.tokenizer.pad_token = "<|im_end|>"
    batch = LlavaCollator(processor)([ITEMS["one turn"], ITEMS["several turns"]])
    lengths = [len(LlavaCollator(processor)([ITEMS[name]])["input_ids"][0]) for name in ("one turn", "several turns")]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["labels"][1] == processor.tokenizer.eos_token_id).sum() == 2


def gradients(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_padding_on_the_right_needs_no_mask(processor, model):
    """On a GPU: lengths are multiples of 64, and loss and gradients are those of the masked batch."""
    items = list(ITEMS.values())
    masked = LlavaCollator(processor)(items)
    batch = LlavaCollator(processor, padding_mask=False, multiple=64)(items)
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape[1] == -(-masked["input_ids"].shape[1] // 64) * 64
    assert padding_is_invisible(model, Chat(processor))
    (loss, grads), (masked_loss, masked_grads) = gradients(model, **batch), gradients(model, **masked)
    assert abs(loss - masked_loss) <= 1e-6 * masked_loss
    for name, grad in masked_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-10, name


def test_a_model_that_sees_padding_keeps_its_mask(processor, model, monkeypatch):
    forward = model.model.language_model.forward

    def look_ahead(inputs_embeds, **kwargs):
        return forward(inputs_embeds=inputs_embeds + inputs_embeds.mean(1, keepdim=True), **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", look_ahead)
    assert not padding_is_invisible(model, Chat(processor))


def test_loss_and_gradients_equal_the_full_computation(processor, model):
    batch = LlavaCollator(processor)(list(ITEMS.values()))
    loss, grads = gradients(model, **batch)
    plain = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values", "labels")}
    full_loss, full_grads = gradients(model, **plain)
    assert abs(loss - full_loss) <= 1e-6 * full_loss
    assert grads.keys() == full_grads.keys()
    for name, grad in full_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
    assert model(**batch).logits.shape == (len(batch["shift_labels"]), 320)


def test_a_batch_without_pictures_gives_the_projector_a_zero_gradient(processor, model):
    texts = [ITEMS["text alone"], item("And?", "Yes.")]
    batch = LlavaCollator(processor)(texts)
    loss, grads = gradients(model, **batch)
    bare = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
    bare["input_ids"] = bare["input_ids"].masked_fill(bare["input_ids"] == 300, 0)
    bare_loss, bare_grads = gradients(model, **bare)
    assert abs(loss - bare_loss) <= 1e-6 * bare_loss
    projector = [grad for name, grad in grads.items() if "projector" in name]
    assert len(projector) == 4
    assert all((grad == 0).all() for grad in projector)
    for name, grad in bare_grads.items():
        assert (grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name


def test_too_long_a_conversation_is_refused_by_name(processor):
    length = len(LlavaCollator(processor)([ITEMS["one turn"]])["input_ids"][0])
    LlavaCollator(processor, max_length=length)([ITEMS["one turn"]])
    with pytest.raises(ValueError, match=rf"record 'x': {length} tokens, --max_length is {length - 1}"):
        LlavaCollator(processor, max_length=length - 1)([ITEMS["one turn"]])


def test_a_conversation_beyond_the_context_is_refused_whatever_max_length_says(llava):
    chat = Chat(load_processor(str(llava))[1], max_length=4096)
    with pytest.raises(ValueError, match=r"\d+ tokens, the model reads 512"):
        chat.encode(to_messages({"conversations": turns("What is this?", "z" * 600)}))


def test_dataset_reads_the_llava_layout(corpus):
    dataset = LlavaDataset(str(corpus))
    assert len(dataset) == 16
    assert dataset[1]["messages"][0]["content"] == [{"type": "text", "text": "What is this?"}, {"type": "image"}]
    assert dataset[1]["images"][0].size == (40, 31)
    assert dataset[5]["images"] == []
    assert [m["role"] for m in dataset[5]["messages"]] == ["user", "assistant"] * 2


def test_dataset_takes_a_file_and_a_picture_folder(corpus, tmp_path):
    (tmp_path / "records.json").write_text((corpus / "chat.json").read_text())
    dataset = LlavaDataset(str(tmp_path / "records.json"), str(corpus / "images_dl"))
    assert dataset[0]["images"][0].size == (40, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "no conversations"),
        ({"conversations": turns("<image>\nWhat?", "  ")}, "a turn of role assistant has no text"),
        ({"conversations": turns("<image>\nWhat?", None)}, "a turn of role assistant has no text"),
        ({"conversations": turns("<image>\nWhat?")}, "do not take turns"),
        ({"conversations": [{"from": "cat", "value": "?"}]}, "unknown role 'cat'"),
        ({"conversations": turns("What?", "this")}, "0 <image> tags for 1 pictures"),
        ({"conversations": turns("<image>\nWhat?", "<image>")}, "<image> in a turn of role assistant"),
        ({"image": ["a.png", "b.png"]}, "1 <image> tags for 2 pictures"),
    ],
)
def test_a_malformed_record_is_refused_by_name(tmp_path, change, message):
    record = {"id": 7, "image": "a.png", "conversations": turns("<image>\nWhat?", "this")} | change
    (tmp_path / "chat.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match=rf"record '7': .*{message}"):
        LlavaDataset(str(tmp_path))[0]


def test_a_picture_outside_the_folder_is_refused(tmp_path):
    RED.save(tmp_path / "outside.png")
    (tmp_path / "data" / "images").mkdir(parents=True)
    record = {"id": "x", "image": "../../outside.png", "conversations": turns("<image>\nWhat?", "this")}
    (tmp_path / "data" / "chat.json").write_text(json.dumps([record]))
    with pytest.raises(ValueError, match="outside the picture folder"):
        LlavaDataset(str(tmp_path / "data"))[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere", "does not exist"),
        (".", "holds no chat.json"),
        ("broken.json", "not JSON"),
        ("map.json", "not a list"),
    ],
)
def test_a_wrong_data_path_is_refused(tmp_path, path, message):
    (tmp_path / "broken.json").write_text("[{]")
    (tmp_path / "map.json").write_text("{}")
    with pytest.raises((OSError, ValueError), match=message):
        LlavaDataset(str(tmp_path / path))


def test_pictures_become_upright_rgb(tmp_path):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((0, 0)) == (128, 128, 128)
    # signed, as of computed tomography, where air is below 0
    signed = upright_rgb(Image.fromarray(np.array([[-1000, 0], [32896, 65535]], np.int32)))
    assert [value for value, _, _ in signed.getdata()] == [0, 0, 128, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


@pytest.mark.parametrize("name", ["truncated.png", "empty.png", "page.jpg", "folder"])
def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path, name):
    RED.save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.jpg").write_text("<html></html>")
    (tmp_path / "folder").mkdir()
    with pytest.raises((OSError, ValueError), match=name):
        open_image(tmp_path / name)
