"""`explain`: how likely an answer is, where it comes from, and at which layer it appears; computed a second way."""

import json
import sys
from functools import partial
from math import exp

import numpy as np
import pytest
import torch
from conftest import IMAGES, turns
from PIL import Image

from examples.openmoji import check_map
from train_llava import explain
from train_llava.chat import chat_of
from train_llava.data import LlavaCollator, LlavaDataset
from train_llava.evaluation import generation
from train_llava.evaluation.generation import (
    assistant_message,
    generate,
    log_probabilities,
    user_message,
)
from train_llava.modeling.adapter import load_model

PROMPT = "What is this?"
ANSWERS = ["a red square", "a", "红色的方块"]


def by_hand(model, processor, image, answer):
    """The log-probability by the loss of transformers on training's own batch."""
    messages = [user_message(PROMPT, 1), assistant_message(answer)]
    batch = LlavaCollator(processor)([{"id": "1", "messages": messages, "images": [image]}])
    tokens = len(batch["shift_labels"])
    with torch.inference_mode():
        return -model(**batch).loss.item() * tokens, tokens


def test_answers_behind_shared_prompts_are_as_likely_as_in_training(opened, monkeypatch):
    monkeypatch.setattr(generation, "BATCH", 2)
    model, processor = opened
    chat, messages = chat_of(processor), [user_message(PROMPT, 1)]
    ours = log_probabilities(model, chat, messages, [[image] for image in IMAGES], ANSWERS)
    wanted = [[by_hand(model, processor, image, answer) for answer in ANSWERS] for image in IMAGES]
    torch.testing.assert_close(ours, torch.tensor(wanted)[..., 0], rtol=1e-4, atol=1e-4)
    assert len({count for _, count in wanted[0]}) == 3


def test_only_the_last_answer_counts(opened):
    model, processor = opened
    messages = [user_message(PROMPT, 1), assistant_message("a blue circle"), user_message("Why?", 0)]
    ours = log_probabilities(model, chat_of(processor), messages, [IMAGES[:1]], ["a"]).item()
    record = {"id": "1", "messages": [*messages, assistant_message("a")], "images": IMAGES[:1]}
    record["messages"][1] = record["messages"][1] | {"train": False}
    batch = LlavaCollator(processor)([record])
    with torch.inference_mode():
        assert ours == pytest.approx(-model(**batch).loss.item() * len(batch["shift_labels"]), rel=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (120, 40)])
def test_a_map_shows_what_a_score_looks_at(size):
    """The score is the red of one place: covering it there costs all of it, and elsewhere nothing."""
    image, (x, y) = Image.new("RGB", size, "black"), (size[0] * 5 // 8 + 2, size[1] // 8 + 2)
    image.paste("red", (x, y, x + 1, y + 1))  # in the block of column 5, row 1
    falls = explain.occlusion_map(lambda images: torch.tensor([float(i.getpixel((x, y))[0]) for i in images]), image)
    wanted = torch.zeros(8, 8)
    near = (x - 0.5 * size[0] / 8) // (size[0] / 8), (y - 0.5 * size[1] / 8) // (size[1] / 8)  # half a block away
    wanted[int(near[1]) : int(near[1]) + 2, int(near[0]) : int(near[0]) + 2] = 255
    assert falls.equal(wanted)


def explained(monkeypatch, output, *arguments):
    monkeypatch.setattr(sys, "argv", ["explain", *map(str, arguments), "--output_dir", str(output)])
    explain.main()
    assert (output / "explanation.png").stat().st_size > 10_000
    return json.loads((output / "metrics.json").read_text())


def test_a_command_writes_what_the_model_alone_gives(monkeypatch, tmp_path, merged, opened, corpus):
    """The picture is three times as wide as high, and the model sees its middle alone."""
    model, processor = opened
    image = Image.effect_noise((96, 32), 90).convert("RGB")
    image.save(tmp_path / "wide.png")
    words = [
        "--model_name_or_path",
        merged,
        "--image",
        tmp_path / "wide.png",
        "--prompt",
        PROMPT,
        "--data_path",
        corpus,
    ]
    metrics = explained(monkeypatch, tmp_path / "out", *words, "--answer", ANSWERS[0])
    # How much
    wanted, count = by_hand(model, processor, image, ANSWERS[0])
    white, _ = by_hand(model, processor, Image.new("RGB", image.size, "white"), ANSWERS[0])
    assert metrics["log_probability"]["this picture"] == pytest.approx(wanted, rel=1e-4)
    assert metrics["log_probability"]["a white picture"] == pytest.approx(white, rel=1e-4)
    first = [
        record["images"][0] for record in map(LlavaDataset(str(corpus)).__getitem__, range(16)) if record["images"]
    ]
    others = [by_hand(model, processor, other, ANSWERS[0])[0] for other in first]
    assert metrics["log_probability"]["other pictures"] == pytest.approx(sum(others) / 15, rel=1e-4)
    # Where: a square around the block in row 2, column 3, and nothing that is cropped
    covered = image.copy()
    covered.paste(tuple(np.median(np.asarray(image), axis=(0, 1)).astype(int)), (30, 6, 54, 14))
    falls = torch.tensor(metrics["map"])
    assert falls[2, 3].item() == pytest.approx(wanted - by_hand(model, processor, covered, ANSWERS[0])[0], abs=1e-4)
    assert falls[:, [0, 1, 6, 7]].abs().max() < 1e-5 < falls[:, 2:6].abs().min()
    # When: the last layer is the model itself
    assert torch.tensor(metrics["probabilities"])[-1].log().sum().item() == pytest.approx(wanted, rel=1e-4)
    assert metrics["tokens"][-1] == "<|im_end|>"
    assert len(metrics["tokens"]) == len(metrics["layers"]) == count
    assert len(metrics["probabilities"]) == len(metrics["attention"]) == 2
    assert all(0 < share < 1 for share in metrics["attention"])


def test_a_token_appears_at_the_first_layer_from_which_on_it_stays(opened, monkeypatch):
    """A head is made in which "a" is the most likely after the first layer, "b" after the last, and "c" after both."""
    model, processor = opened
    chat, norm = chat_of(processor), model.model.language_model.norm
    inputs, tokens = chat.prompts([[user_message(PROMPT, 1)]], IMAGES[:1]), processor.tokenizer("abc")["input_ids"]
    with torch.no_grad():
        early, late = (layer[0, -1] for layer in model(**inputs, output_hidden_states=True).hidden_states[1:])
        early, weight = norm(early), torch.zeros_like(model.lm_head.weight)
    assert len(tokens) == 3
    for strength, layers in ((0, [[None], [2], [None]]), (2, [[None], [None], [1]])):
        weight[tokens] = torch.stack([early, late, strength * (early + late)])
        head = torch.nn.Linear(*weight.T.shape, bias=False)
        head.weight.data = weight.clone()
        monkeypatch.setitem(model._modules, "lm_head", head)
        found = [explain.read_layers(model, chat, PROMPT, text, IMAGES[0])["layers"][:1] for text in "abc"]
        assert found == layers
    model.set_attn_implementation("sdpa")


def test_an_empty_answer_is_refused(monkeypatch, tmp_path, merged, corpus):
    monkeypatch.setattr(explain, "generate", lambda *_: [" "])
    words = ["--model_name_or_path", merged, "--image", corpus / "images_dl/0.png", "--prompt", PROMPT]
    with pytest.raises(ValueError, match="the answer is empty: name one with --answer"):
        explained(monkeypatch, tmp_path / "out", *words)


def test_an_adapter_stands_beside_its_base(monkeypatch, tmp_path, llava, adapter, merged, corpus):
    words = ["--image", corpus / "images_dl/0.png", "--prompt", PROMPT, "--answer", "a"]
    both = explained(
        monkeypatch, tmp_path / "both", "--model_name_or_path", llava, "--adapter_name_or_path", adapter, *words
    )
    base = explained(monkeypatch, tmp_path / "base", "--model_name_or_path", llava, *words)
    ours = explained(monkeypatch, tmp_path / "merged", "--model_name_or_path", merged, *words)
    assert both["base_log_probability"] == pytest.approx(base["log_probability"], rel=1e-4)
    assert both["log_probability"] == pytest.approx(ours["log_probability"], rel=1e-3)
    assert both["layers"] == ours["layers"]


def test_without_an_answer_the_model_gives_one(monkeypatch, tmp_path, merged, opened, corpus, capsys):
    model, processor = opened
    picture = corpus / "images_dl/0.png"
    words = ["--model_name_or_path", merged, "--image", picture, "--prompt", PROMPT]
    monkeypatch.setattr(explain, "generate", partial(generate, max_new_tokens=4))
    metrics = explained(monkeypatch, tmp_path / "out", *words)
    assert metrics["answer"] == generate(model, processor, [[user_message(PROMPT, 1)]], [Image.open(picture)], 4)[0]
    share = exp(metrics["log_probability"]["this picture"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{metrics['answer']}\nprobability: {share:.1%} with this picture, ")


def test_data_without_another_picture_is_refused(monkeypatch, tmp_path, merged, corpus):
    (tmp_path / "chat.json").write_text(json.dumps([{"id": "1", "conversations": turns(PROMPT, "a")}]))
    words = ["--model_name_or_path", merged, "--image", corpus / "images_dl/0.png", "--prompt", PROMPT]
    with pytest.raises(ValueError, match="begins with no other picture: leave it out"):
        explained(monkeypatch, tmp_path / "out", *words, "--answer", "a", "--data_path", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "language", "question", "answer", "quarter"),
    [
        ("where", "en", "Where is the bus?", "at the bottom left", 2),
        ("at", "en", "What is at the top right?", "a bus", 1),
        ("at", "zh", "右下是什么？", "公共汽车", 3),
    ],
)
def test_the_quarter_that_a_question_is_about(kind, language, question, answer, quarter):
    record = {"kinds": [kind], "language": language, "conversations": turns(question, answer)}
    assert check_map.asked_quarter(record) == quarter
    highest = torch.zeros(8, 8)
    highest[5, 3] = 1
    assert check_map.quarter_of(highest) == 2


@pytest.mark.slow
def test_the_map_is_highest_where_the_thing_is(default_run):
    """In nine of ten scenes of four things that the toy example answers right; with random weights, by chance."""
    folder = default_run / "data" / "heldout"
    records = check_map.asked(folder)
    model, processor = load_model(str(default_run / "stage2"))
    hits = check_map.check(model, processor, records, folder, only_right=True)
    assert len(hits) > 25
    assert sum(hits) / len(hits) >= 0.9
    torch.manual_seed(0)
    hits = check_map.check(type(model)(model.config).eval(), processor, records, folder, only_right=False)
    assert sum(hits) / len(hits) < 0.5
