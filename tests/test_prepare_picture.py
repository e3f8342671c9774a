"""Pictures as a model was trained to see them: other programs read the written files as this package does."""

import sys

import numpy as np
import pytest
import torch
from conftest import user_message
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessor, SiglipImageProcessorPil, pipeline
from transformers.image_utils import load_image

from train_llava import prepare_picture
from train_llava.dataset.images import open_image, prepare_pictures
from train_llava.evaluation.generation import generate
from train_llava.export_gguf import tried_pictures
from train_llava.prepare_picture import as_seen


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare_picture", *map(str, words)])
    prepare_picture.main()


def test_other_programs_see_the_written_files_as_this_package_does(merged, opened, tmp_path, monkeypatch):
    model, processor = opened
    paths, images, otherwise = [], [], []
    for i, (words, file) in enumerate(tried_pictures(28)):
        paths.append(tmp_path / f"{i}.{words}")
        paths[-1].write_bytes(file)
        images.append(open_image(file, words))
    model_and_pictures = ["--model_name_or_path", merged, "--image", *paths]
    run(monkeypatch, *model_and_pictures, "--output_dir", tmp_path / "prepared")
    ours = prepare_pictures(processor.image_processor, images)["pixel_values"]
    written = [tmp_path / "prepared" / f"{i}.png" for i in range(len(paths))]
    assert sorted(written) == sorted((tmp_path / "prepared").iterdir())
    for path, before, pixels in zip(written, paths, ours, strict=True):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size, image.getexif()) == ("PNG", "RGB", (28, 28), {})
        theirs, unprepared = (
            processor.image_processor(load_image(str(p)), return_tensors="pt")["pixel_values"][0]
            for p in (path, before)
        )
        assert torch.allclose(theirs, pixels, atol=1e-5), before
        otherwise += [before.suffix] * (not torch.allclose(unprepared, pixels, atol=0.1))
    assert otherwise == [".transparent pictures"] * 2 + [".gray of 16 bits"]

    ask = user_message("<image>", "What is this?")
    answers = generate(model, processor, [ask] * len(images), images, 6)
    assert len(set(answers)) > 1
    pipe = pipeline("image-text-to-text", model=str(merged))
    for path, answer in zip(written, answers, strict=True):
        messages = [{"role": "user", "content": [{"type": "image", "path": str(path)}, *ask[0]["content"][1:]]}]
        (reply,) = pipe(text=messages, max_new_tokens=6, return_full_text=False)
        assert reply["generated_text"].strip() == answer.strip()


@pytest.mark.parametrize(
    "image_processor",
    [
        LlavaNextImageProcessor(image_grid_pinpoints=[[28, 56]]),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}),
        SiglipImageProcessorPil(size={"height": 28, "width": 28}, do_normalize=False),
    ],
)
def test_a_picture_stays_whole_if_a_second_pass_would_change_it(image_processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    assert as_seen(image_processor, image) is image


def test_no_file_is_overwritten_or_half_written(merged, tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-20])
    command = ["--model_name_or_path", merged, "--output_dir", tmp_path / "out", "--image", tmp_path / "a.png"]
    with pytest.raises(ValueError, match=r"^two pictures would become a\.png"):
        run(monkeypatch, *command, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"b\.jpg cannot be read as a picture"):
        run(monkeypatch, *command, tmp_path / "b.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.png", "b.jpg"]
    run(monkeypatch, *command)
    with pytest.raises(ValueError, match="exists already"):
        run(monkeypatch, *command)
