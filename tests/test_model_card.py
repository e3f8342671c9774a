"""The card of a model: written by every command that makes one, completed by an evaluation, pushed with the model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_train
from huggingface_hub import EvalResult, ModelCard

from train_llava import evaluate, model_card
from train_llava.merge_lora import merge_lora
from train_llava.reports import ancestors, plot_loss, write_card

SHORT = ["--max_steps", "1", "--preflight", "false", "--lora_r", "4"]


@pytest.fixture(scope="module")
def adapter(llava, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, llava, corpus, folder, *SHORT)
    return folder


def test_a_card_says_what_a_model_was_made_of_and_how(llava, parts, corpus, adapter, tmp_path):
    base, card = ModelCard.load(llava / "README.md"), ModelCard.load(adapter / "README.md")
    made_of = [parts["clip"].name, parts["qwen2"].name]
    assert base.data.made_of == made_of
    assert card.data.made_of == [*made_of, llava.name]
    assert str(llava.parent) not in (adapter / "README.md").read_text()
    assert card.data.library_name == "peft"
    for said in (
        *made_of,
        corpus.name,
        "lora_r 4",
        "| records | 16 |",
        "| learning rates | projector 2e-05, language model 0.0002 |",
        "loss, last",
        "LoRA ada",
    ):
        assert said in card.text, said
    assert (adapter / "loss.png").exists()
    merge_lora(str(llava), str(adapter), str(tmp_path / "merged"))
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers"
    assert "LoRA adapter" not in merged.text
    for text in (base.text, card.text, merged.text):
        assert text.count("python -m train_llava.prepare_picture") == 1
    assert (tmp_path / "merged" / "loss.png").exists()
    checkpoint = max(adapter.glob("checkpoint-*"))  # PEFT has written a card of its own there
    assert "made_of" not in ModelCard.load(checkpoint / "README.md").data
    merge_lora(str(llava), str(checkpoint), str(tmp_path / "of checkpoint"))
    merged = ModelCard.load(tmp_path / "of checkpoint" / "README.md")
    assert merged.data.made_of == [*made_of, llava.name]
    assert (merged.data.library_name, "More Information" in merged.text) == ("transformers", False)


def test_a_card_tells_how_far_a_run_came_and_the_scores_of_what_is_kept(llava, corpus, tmp_path, monkeypatch):
    judged = ["--eval_data_path", corpus, "--eval_strategy", "steps", "--eval_steps", "1", "--eval_answers", "0"]
    best = ["--load_best_model_at_end", "true", "--save_strategy", "best", "--metric_for_best_model", "loss"]
    best += ["--greater_is_better", "true"]  # the loss falls, and so the first step is the one that is kept
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *SHORT[2:], *judged, *best, "--max_steps", "3")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    first, *later = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert first > max(later)
    text = (tmp_path / "run" / "README.md").read_text()
    assert f"| held-out loss, of the step that is kept | {first:.4f} |" in text
    assert "| length | 3 of 3 steps, 1.5 epochs |" in text


def test_names_of_the_hub_are_linked(tmp_path):
    made_of = ["openai/clip-vit-large-patch14-336", "parts/of/mine", "Qwen/Qwen1.5-4B-Chat"]
    write_card(tmp_path, "m", made_of, ["liuhaotian/LLaVA-CC3M-Pretrain-595K"], [])
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == [made_of[0], made_of[2]]
    assert data.datasets == ["liuhaotian/LLaVA-CC3M-Pretrain-595K"]
    write_card(tmp_path, "m", [], ["HuggingFaceM4/the_cauldron:vqav2", "HuggingFaceM4/the_cauldron:ai2d:train"], [])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["HuggingFaceM4/the_cauldron"]
    assert "- `HuggingFaceM4/the_cauldron:ai2d:train`" in card.text
    write_card(tmp_path, "m", made_of, [], [], adapter_of="me/llava")
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["me/llava"]


def test_an_evaluation_is_put_into_the_card_once(llava, corpus, adapter, tmp_path, monkeypatch):
    command = ["evaluate", "--model_name_or_path", llava, "--adapter_name_or_path", adapter, "--data_path", corpus,
               "--output_dir", tmp_path / "evaluation", "--max_new_tokens", "4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evaluate.main()
    before = (adapter / "README.md").read_text()
    model_card.add_evaluation(adapter, tmp_path / "evaluation")
    once = (adapter / "README.md").read_text()
    model_card.add_evaluation(adapter, tmp_path / "evaluation")
    assert (adapter / "README.md").read_text() == once
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert f"| token F1 | {metrics['token_f1']:.1%} |" in once
    assert once.index("## Training") < once.index("## Held-out answers") < once.index("## Licence")
    assert (adapter / "captions.png").exists()
    results = {
        result.metric_type: result.metric_value for result in ModelCard.load(adapter / "README.md").data.eval_results
    }
    assert results["cider"] == round(metrics["cider"], 4)
    assert ModelCard.load(adapter / "README.md").data.made_of == ModelCard(before).data.made_of


def test_a_card_keeps_what_people_wrote(adapter, tmp_path):
    folder, evaluation = tmp_path / "run", tmp_path / "evaluation"
    folder.mkdir()
    evaluation.mkdir()
    scores = {"n": 4, "exact_match": 0.25, "intervals": {"exact_match": [0.1, 0.6]}}
    (evaluation / "metrics.json").write_text(json.dumps(scores))
    (evaluation / "captions.png").write_bytes(b"a sheet")
    card = ModelCard.load(adapter / "README.md")
    theirs = EvalResult("visual-question-answering", "vqa", "VQAv2", "accuracy", 0.5)
    card.data.license, card.data.language, card.data.co2 = "mit", ["zh"], {"emissions": 3}
    card.data.model_name, card.data.eval_results = "my name", [theirs]
    before, licence, after = card.text.partition("## Licence\n")
    notes = "## Notes\n\nMine.\n\n## Held-out answers by hand\n\n| a |\n|---|\n\n"
    card.text = f"{before}{notes}{licence}{after}\n## Thanks\n\nTo you.\n"
    card.save(folder / "README.md")
    model_card.add_evaluation(folder, evaluation)
    once = (folder / "README.md").read_text()
    theirs = "(captions.png)\n\n| benchmark | mine |\n|---|---|\n| MMBench | 61 |\n\nBelow the sheet.\n"
    text = once.replace("(captions.png)\n", theirs).replace(model_card.INTERVAL, f"Between.\n\n{model_card.INTERVAL}")
    (folder / "README.md").write_text(text)
    (evaluation / "metrics.json").write_text(json.dumps(scores | {"exact_match": 0.5}))
    (evaluation / "captions.png").unlink()  # it could not be drawn
    model_card.add_evaluation(folder, evaluation)
    text, data = (folder / "README.md").read_text(), ModelCard.load(folder / "README.md").data
    for written in (
        "Mine.",
        "answers by hand\n\n| a |\n|---|",
        "To you.",
        "Below the sheet.",
        "| MMBench | 61 |",
        "Between.",
        model_card.INTERVAL,
        "| exact match | 50.0% |",
    ):
        assert text.count(written) == 1, written
    assert "25.0%" not in text
    assert "captions.png" not in text
    assert (data.license, data.language, data.co2, data.model_name) == ("mit", ["zh"], {"emissions": 3}, "my name")
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.5), ("exact_match", 0.5)]


@pytest.mark.parametrize("content", ["{}", "[]", "null", "7", "nonsense", '{"n": 1, "exact_match": "x"}',
                                     '{"n": 1, "exact_match": 1, "intervals": {"exact_match": [1]}}',
                                     "version https://git-lfs.github.com/spec/v1"])  # fmt: skip
def test_what_is_no_evaluation_is_refused_and_the_card_stays(adapter, tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    before = (adapter / "README.md").read_bytes()
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no metrics.json that evaluate wrote"):
        model_card.add_evaluation(adapter, tmp_path)
    assert (adapter / "README.md").read_bytes() == before


def test_a_card_with_a_broken_head_is_named(adapter, tmp_path):
    (tmp_path / "metrics.json").write_text('{"n": 1, "exact_match": 1, "intervals": {"exact_match": [0, 1]}}')
    (tmp_path / "README.md").write_text("---\na: [\n---\nMine.\n")
    with pytest.raises(ValueError, match=r"README.md has a head that cannot be read"):
        model_card.add_evaluation(tmp_path, tmp_path)
    assert ancestors(str(tmp_path)) == [str(tmp_path)]


def test_a_run_that_logged_nothing_has_a_curve_without_a_warning(tmp_path, recwarn):
    plot_loss([], tmp_path / "loss.png")
    assert not recwarn.list
    assert (tmp_path / "loss.png").exists()


def test_what_has_no_card_or_no_metrics_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="holds no README"):
        model_card.add_evaluation(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="holds no metrics"):
        model_card.add_evaluation(adapter, tmp_path)


def test_a_push_takes_the_card_along(llava, corpus, tmp_path, monkeypatch):
    """The hub is played by an object that looks at what it is given."""
    pushed = []

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, folder_path, repo_id, **_):
            files = {path.name for path in Path(folder_path).iterdir()}
            pushed.append((repo_id, files, ModelCard.load(Path(folder_path) / "README.md").data.get("made_of")))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    arguments = ["--train_type", "projector", "--save_strategy", "no", "--push_to_hub", "true"]
    run_train(monkeypatch, llava, corpus, tmp_path / "run", *SHORT, *arguments, "--hub_model_id", "me/llava")
    ((name, files, made_of),) = pushed
    assert name == "me/llava"
    assert {"README.md", "loss.png", "model.safetensors", "processor_config.json"} <= files
    assert made_of[-1] == llava.name
