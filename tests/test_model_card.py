"""The card of a model: written by every command that makes one, completed by an evaluation, pushed with the model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_train
from huggingface_hub import ModelCard

from train_llava import evaluate, model_card
from train_llava.merge_lora import merge_lora

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
    assert (tmp_path / "merged" / "loss.png").exists()


def test_names_of_the_hub_are_linked(tmp_path):
    made_of = ["openai/clip-vit-large-patch14-336", "parts/of/mine", "Qwen/Qwen1.5-4B-Chat"]
    model_card.write_card(tmp_path, "m", made_of, ["liuhaotian/LLaVA-CC3M-Pretrain-595K"], [])
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == [made_of[0], made_of[2]]
    assert data.datasets == ["liuhaotian/LLaVA-CC3M-Pretrain-595K"]
    model_card.write_card(tmp_path, "m", made_of, [], [], adapter_of="me/llava")
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
