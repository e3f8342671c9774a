"""Boxes and points: from the pixels of a file to what the model sees, for each way of fitting a picture in."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import turns
from matplotlib.figure import Figure
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from train_llava.chat import chat_of
from train_llava.data import LlavaCollator, LlavaDataset, to_sample
from train_llava.dataset.images import is_anyres, prepare_pictures, seen_part
from train_llava.dataset.readers import BadRecordError
from train_llava.evaluation.answers import questions
from train_llava.evaluation.metrics import score_group
from train_llava.evaluation.plots import _draw_picture, outline
from train_llava.model import load_checkpoint

CROP = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PROCESSORS = {
    "crop": CLIPImageProcessorPil(**CROP),
    "stretched": SiglipImageProcessorPil(size={"height": 56, "width": 56}),
    "pad": LlavaImageProcessorPil(**CROP, do_pad=True),
    "anyres": LlavaNextImageProcessorPil(**CROP, image_grid_pinpoints=[[56, 112], [112, 56]]),
}
BOX = (60, 20, 90, 70)  # white in a black picture of 150 x 100 pixels, or another one


def picture(turn: int = 1, size: tuple[int, int] = (150, 100)) -> bytes:
    """A PNG whose pixels are black but for `BOX`, to be turned by this EXIF orientation."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    return file.getvalue()


def chat_with(image_processor, keep_cut_boxes=False) -> SimpleNamespace:
    """What is needed of a `Chat`."""
    return SimpleNamespace(
        seen_part=lambda size: seen_part(image_processor, 56, size),
        keep_cut_boxes=keep_cut_boxes,
        anyres=False,
        min_side=None,
    )


def write_data(folder, *records, **files) -> LlavaDataset:
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    (folder / "chat.json").write_text(json.dumps(records))
    return LlavaDataset(str(folder), str(folder))


def record(text: str, objects, image="a.png") -> dict:
    return {"image": image, "objects": objects, "conversations": turns("<image>\nWhere is it?", text)}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", PROCESSORS)
def test_a_box_is_where_the_model_sees_its_object(tmp_path, name, turn):
    """The white pixels of the prepared picture, against the numbers in the text."""
    dataset = write_data(tmp_path, record("<box>", [{"label": "it", "box": BOX}]), a=picture(turn))
    dataset.chat = chat_with(PROCESSORS[name])
    item = dataset[0]
    (place,) = item["messages"][1]["places"]
    assert item["messages"][1]["content"][0]["text"] == str(place)
    pixels = prepare_pictures(PROCESSORS[name], item["images"])["pixel_values"]
    pixels = (pixels[:, 0] if name == "anyres" else pixels)[0].mean(0)
    rows, columns = np.where(pixels > (pixels.max() + pixels.min()) / 2)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert np.allclose(place, 1000 / 56 * np.array(seen), atol=10)  # half a pixel of 56
    # And back in the picture as people see it
    xs, ys = outline(place, item["images"][0].size, dataset.chat.seen_part(item["images"][0].size))
    left, top, right, bottom = item["images"][0].getbbox()
    assert np.allclose([min(xs), min(ys), max(xs), max(ys)], [left, top, right, bottom], atol=0.5)


@pytest.mark.parametrize("turn", [1, 6, 7])
@pytest.mark.parametrize("name", [*PROCESSORS, None])
def test_an_object_without_a_tag_is_drawn_on_what_the_model_sees(tmp_path, name, turn):
    objects = [{"label": "it", "box": BOX}]
    records = record("It is here.", objects), record("no box", [{"box": "left"}]), record("not here", objects)
    dataset = write_data(tmp_path, *records, a=picture(turn))
    if name is not None:
        image_processor = PROCESSORS[name]
        dataset.chat = chat_with(image_processor)
        dataset.chat.processor = SimpleNamespace(image_processor=image_processor)
        dataset.chat.anyres, dataset.chat.side = is_anyres(image_processor), 56
    assert dataset[0]["objects"] == []  # it is not learnt
    axes = Figure().add_subplot()
    size = "100 x 150" if turn >= 5 else "150 x 100"
    assert _draw_picture(axes, dataset, 0) == f"0  {size}"
    (line,), (shown,) = axes.lines, axes.images
    rows, columns = np.where(shown.get_array().mean(axis=2) > 128)
    ends = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    xy = line.get_xydata()
    assert np.allclose([*xy.min(axis=0), *xy.max(axis=0)], ends, atol=1)
    _draw_picture(axes := Figure().add_subplot(), dataset, 1)
    assert not axes.lines


def test_tags_take_the_objects_in_their_order(tmp_path):
    objects = [{"label": "a", "box": [0, 0, 75, 50]}, {"label": "b", "box": [75, 50, 150, 100]}, {"box": [150, 0]}]
    swift = {"ref": ["dog"], "bbox": [[0, 0, 0.5, 0.5]], "bbox_type": "norm1"}
    dataset = write_data(
        tmp_path,
        {"image": "a.png", "objects": objects, "conversations": turns("<image>\nWhat is at <box>?", "<point>, <box>")},
        record("the <ref-object> at <bbox>", swift),
        record("no tag", objects),
        record("<box> in letters", None),
        a=picture(),
    )
    dataset.chat = chat_with(PROCESSORS["stretched"])
    texts = [[part.get("text") for part in message["content"]] for i in range(4) for message in dataset[i]["messages"]]
    assert texts[0] == [None, "What is at [0, 0, 500, 500]?"]
    assert texts[1] == ["[750, 750], [1000, 0]"]
    assert texts[3] == ["the dog at [0, 0, 500, 500]"]
    assert texts[5:8:2] == [["no tag"], ["<box> in letters"]]
    assert dataset[0]["messages"][1]["places"] == [[500, 500, 1000, 1000], [1000, 0]]


@pytest.mark.parametrize(
    ("objects", "text", "reason"),
    [
        ([{"box": BOX}], "<box> <box>", r"2 <box> or <point> tags and 0 <ref-object> tags for 1 objects"),
        ([{"box": [1, 2, 3]}], "<box>", r"the box of an object is \[1, 2, 3\], not"),
        ([{"box": [9, 2, 3, 8]}], "<box>", "the box of an object is"),
        ([{"box": ["1", 2, 3, 8]}], "<box>", "the box of an object is"),
        ([7], "<box>", "its objects are no list of objects with a label and a box"),
        ([{"box": BOX, "image": 1}], "<box>", "an object lies in a picture that the record has not: it has 1"),
        ([{"label": "it", "box": [0, 0, 9, 9]}], "<box>", "the model does not see all of the object it: take"),
        ([{"label": "it", "box": [160, 0, 170, 9]}], "<box>", "the object it at .* lies outside its picture"),
        ([{"label": "it", "box": [75, -9]}], "<point>", "the object it at .* lies outside its picture"),
        ("a dog", "<box>", "its objects are no list of objects with a label and a box"),
    ],
)
def test_an_object_that_cannot_be_written_makes_its_record_bad(tmp_path, objects, text, reason):
    dataset = write_data(tmp_path, record(text, objects), a=picture())
    dataset.chat = chat_with(PROCESSORS["crop"])
    with pytest.raises(BadRecordError, match=reason):
        dataset[0]


def test_a_cut_box_is_kept_on_demand_as_far_as_it_is_seen(tmp_path):
    half, gone = [{"box": [0, 0, 50, 100]}], [{"box": [0, 0, 20, 100]}]
    dataset = write_data(tmp_path, record("<box>", half), record("<box>", gone), a=picture())
    dataset.chat = chat_with(PROCESSORS["crop"], keep_cut_boxes=True)
    assert dataset[0]["messages"][1]["places"] == [[0, 0, 250, 1000]]
    with pytest.raises(BadRecordError, match="the model does not see all of the object"):
        dataset[1]


def test_answers_are_scored_by_their_boxes():
    asked = {"reference": "[100, 100, 300, 300] [0, 0, 9, 9]", "places": [[100, 100, 300, 300], [0, 0, 9, 9]]}
    asked |= {"references": [], "answers": [], "language": None}
    answers = {"[100, 100, 300, 290], [500, 0, 509, 9]": (0.5, 0.5), "at [290, 290]": (0.0, 0.5), "nowhere": (0, 0)}
    for text, (iou, pointing) in answers.items():
        scores = score_group([asked | {"prediction": text}])
        assert (scores["iou_50"], scores["pointing"]) == (iou, pointing), text
    assert "iou_50" not in score_group([asked | {"prediction": "red", "places": []}])


def test_the_model_learns_the_numbers(llava, tmp_path):
    _, processor = load_checkpoint(str(llava))
    chat = chat_of(processor)
    dataset = write_data(tmp_path, record("<box>", [{"box": BOX}]), a=picture())
    with pytest.raises(BadRecordError, match="its boxes are not written"):
        LlavaCollator(processor)([to_sample(dataset[0], chat)])
    dataset.chat = chat
    sample = to_sample(dataset[0], chat)
    (place,) = questions(dataset[0])[0]["places"]
    learnt = processor.tokenizer.decode(sample.labels[sample.labels >= 0])
    assert str(place) in learnt
