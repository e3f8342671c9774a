"""The toy example's data and lessons: what is held out, answers that are true of their scenes, boxes that hold the
things, and what its chat model learns from."""

import json
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from examples.openmoji import make_data
from examples.openmoji.make_parts import BEGIN, SHORT, Written, garbled, patch_quarters, patch_words
from examples.openmoji.scenes import GROUNDS, MOTIFS, PICTURE_SIZE, Scene, draw_scene, held_out_pairs, names, paint
from examples.openmoji.wordings import LANGUAGES, TRAINING, TRAINING_WORDINGS, WORDINGS
from train_llava.data import LlavaDataset

PARTS = Path(__file__).parents[1] / "examples/openmoji/parts"
SLOT = r"\{\w+\}"


def test_held_out_pairs_never_stand_together_in_training():
    rng, pairs = random.Random(1), held_out_pairs()
    for held_out in (False, True):
        scenes = [draw_scene(rng, held_out) for _ in range(300)]
        together = [pairs[a][b] for scene in scenes for a, b in combinations(scene.counts, 2)]
        assert len(together) > 100
        assert set(together) == {held_out}
    share = np.mean([pairs[a][b] for a, b in combinations(range(len(pairs)), 2)])
    assert 0.2 < share < 0.3


def test_boxes_hold_the_things_and_the_ground_is_its_colour():
    rng = random.Random(2)
    for _ in range(30):
        scene = draw_scene(rng, held_out=False)
        picture, boxes = paint(scene, rng)
        pixels = np.asarray(picture).astype(int)
        outside = np.ones(pixels.shape[:2], dtype=bool)
        for (place, _), (x1, y1, x2, y2) in zip(scene.things, boxes, strict=True):
            outside[y1:y2, x1:x2] = False
            half = PICTURE_SIZE // 2
            assert (x1 // half, y1 // half) == ((x2 - 1) // half, (y2 - 1) // half) == (place % 2, place // 2)
            assert np.ptp(pixels[y1:y2, x1:x2], axis=(0, 1)).max() > 20  # something is drawn there
        (colour,) = np.unique(pixels[outside], axis=0)
        assert np.abs(colour - GROUNDS[scene.ground]).max() <= 10


def test_answers_are_true_of_their_scenes():
    """Read back from the words: the sentence about the whole tells all that the other answers tell."""
    rng, english = random.Random(3), LANGUAGES["en"]
    asked = Counter()
    for _ in range(400):
        scene = draw_scene(rng, held_out=False)
        described = make_data.answer("describe", scene, None, "en")
        listed = {place: next((n for n in names("en") if f"{english.one(n)} at the {place}" in described), None)
                  for place in english.places}  # fmt: skip
        things = [name for name in listed.values() if name]
        for kind, _, told in make_data.conversation(scene, "en", 11, rng):
            asked[kind] += 1
            if kind == "things":
                assert told == english.numbers[len(things)]
            if kind == "ground":
                assert f"on a{'n' * (told[0] in 'aeiou')} {told} ground" in described
        for place, motif in scene.things:
            if scene.counts[motif] == 1:
                assert make_data.answer("where", scene, motif, "en").endswith(english.places[place])
            assert make_data.answer("count", scene, motif, "en") == english.numbers[things.count(names("en")[motif])]
        assert make_data.answer("is there", scene, scene.things[0][1], "en") == "yes"
    assert asked.keys() == WORDINGS.keys()


def test_the_written_data_is_read_and_balanced(tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "TRAIN", 20)
    monkeypatch.setattr("sys.argv", ["make_data", "--output_dir", str(tmp_path)])
    make_data.main()
    training = json.loads((tmp_path / "train/chat.json").read_text())
    questions = {turn["value"] for record in training for turn in record["conversations"][::2]}
    heldout = LlavaDataset(str(tmp_path / "heldout"))
    assert len(heldout) == 2 * len(WORDINGS) * make_data.HELDOUT
    assert heldout[0]["images"][0].size == (PICTURE_SIZE, PICTURE_SIZE)
    answers: dict[str, Counter] = {}
    for record in json.loads((tmp_path / "heldout/chat.json").read_text()):
        assert record["conversations"][0]["value"] not in questions
        if record["language"] == "en":
            answers.setdefault(record["kinds"][0], Counter())[record["conversations"][1]["value"]] += 1
    assert answers["is there"] == {"yes": 20, "no": 20}
    assert max(answers["ground"].values()) == 5
    assert Image.open(tmp_path / "talk/images_dl/00000.png").mode == "RGB"


def test_no_held_out_wording_is_taught():
    for kind, languages in WORDINGS.items():
        for code, wordings in languages.items():
            assert TRAINING_WORDINGS[kind][code] == wordings[:TRAINING]
            assert len(set(wordings)) == len(wordings) > TRAINING
            taught = garbled(random.Random(5))[kind][code] + SHORT.get(kind, {}).get(code, [])
            assert not set(wordings[TRAINING:]) & set(taught)


def test_a_garbled_wording_keeps_its_slots():
    wordings = garbled(random.Random(4))
    for kind, languages in TRAINING_WORDINGS.items():
        for code, texts in languages.items():
            plain, changed = wordings[kind][code][: 10 * TRAINING], wordings[kind][code][10 * TRAINING :]
            assert plain == texts * 10
            assert len(changed) == len(plain)
            assert 0.2 < np.mean([a != b for a, b in zip(plain, changed, strict=True)]) < 1
            assert list(map(slots, changed)) == list(map(slots, plain))


def slots(wording: str) -> list[str]:
    return re.findall(SLOT, wording)


def test_a_patch_is_written_in_the_words_of_both_languages():
    cat, names_zh = names("en").index("cat"), names("zh")
    scene = Scene(ground=4, quarters=(None, cat, None, None))
    assert patch_words(scene, 1) == [" cat", " top right", " blue", names_zh[cat], "右上", "蓝色"]
    assert patch_words(scene, 2) == [" nothing", " bottom left", " blue", "什么都没有", "左下", "蓝色"]
    quarters = np.array(patch_quarters()).reshape(6, 6)
    assert quarters.tolist() == [[0] * 3 + [1] * 3] * 3 + [[2] * 3 + [3] * 3] * 3


@pytest.mark.parametrize("full", [False, True], ids=["short lessons", "whole conversations"])
def test_the_labels_of_a_lesson_are_its_answers_and_their_ends(full):
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "qwen2")
    written, rng = Written(tokenizer), random.Random(6)
    for code in LANGUAGES:
        scene = draw_scene(rng, held_out=False)
        turns = make_data.conversation(scene, code, 4, rng)
        patches, tokens, labels = written.sample(scene, turns, full)
        assert len(patches) == (36 if full else 4)
        assert tokenizer.decode(patches[0]) == "".join(patch_words(scene, 0))
        assert all(label in (-100, token) for label, token in zip(labels, tokens, strict=True))
        answered = tokenizer.decode([label for label in labels if label != -100])
        assert answered == "".join(f"{told}<|im_end|>" for _, _, told in turns)
        if full:  # behind BEGIN and the patches, the chat template's own text
            messages = []
            for _, asked, told in turns:
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]
            template = tokenizer.apply_chat_template(messages, tokenize=False)
            assert f"{BEGIN}{tokenizer.decode(tokens).removeprefix(chr(10))}" == template.removesuffix("\n")


def test_every_name_is_a_word_of_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(PARTS / "qwen2")
    lengths = [len(tokenizer(f" {name}").input_ids) for name in names("en")]
    lengths += [len(tokenizer(name).input_ids) for name in names("zh")]
    assert len(lengths) == 2 * len(MOTIFS)
    assert max(lengths) <= 2
