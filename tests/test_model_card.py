"""The card of a model: written by every command that makes one, completed by an evaluation, pushed with the model."""

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_train
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from PIL import Image

from train_llava import evaluate, model_card
from train_llava.evaluation.plots import draw_sample_grid, plot_loss
from train_llava.merge_lora import merge_lora
from train_llava.model import LoraArguments
from train_llava.training.cards import ancestors, copy_card, write_card, write_run_card

SHORT = ["--max_steps", "1", "--preflight", "false", "--lora_r", "4"]


@pytest.fixture(scope="module")
def adapter(llava, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, llava, corpus, folder, *SHORT)
    return folder


def test_a_card_names_the_models_the_data_and_the_settings(llava, parts, corpus, adapter, tmp_path):
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


def test_a_card_has_the_steps_done_and_the_scores_of_the_step_that_is_kept(llava, corpus, tmp_path, monkeypatch):
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


CARDS = [
    ({}, {}, {}),
    ({"bf16": True, "tokens_per_batch": 900}, {"precision": "bf16", "batch": "16200 tokens (900 x 3 x 6 ranks)"}, {}),
    ({"fp16": True, "train_type": "lora"},
     {"precision": "fp16", "what trained": "`lora`",
      "LoRA": "lora_r 8, lora_alpha 256, lora_dropout 0.0, use_dora False, use_rslora True, bits 4"}, {}),
    ({"load_best_model_at_end": True},
     {"held-out loss, of the step that is kept": "0.9000", "held-out CIDEr-D, of the step that is kept": "1.23",
      "held-out exact match, of the step that is kept": "50.0%"}, {}),
    ({}, {"records": "streamed"}, {"records": None}),
]  # fmt: skip


@pytest.mark.parametrize(("run", "otherwise", "replaced"), CARDS)
def test_every_setting_of_a_run_is_in_its_card(tmp_path, run, otherwise, replaced):
    args = SimpleNamespace(**{
        "output_dir": str(tmp_path), "train_type": "full", "tokens_per_batch": None, "train_batch_size": 5,
        "gradient_accumulation_steps": 3, "world_size": 6, "lr_scheduler_type": "linear", "warmup_steps": 0.07,
        "weight_decay": 0.2, "optim": "sgd", "bf16": False, "fp16": False, "seed": 17, "load_best_model_at_end": False,
    } | run)  # fmt: skip
    log = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 0.9, "eval_exact_match": 0.5, "eval_cider": 1.234},
        {"step": 3, "loss": 2.0},
        {"step": 4, "eval_loss": 1.5, "eval_exact_match": 0.25, "eval_cider": 0.5},
        {"step": 4, "train_loss": 2.5},
    ]
    state = SimpleNamespace(
        log_history=log, global_step=1004, max_steps=2000, epoch=1.256, best_model_checkpoint="x", best_global_step=2
    )
    model, data = (
        SimpleNamespace(model_name_or_path="me/base", adapter_name_or_path=None, bits=4),
        SimpleNamespace(max_length=99, data_path=["d"]),
    )
    lora = LoraArguments(lora_r=8, use_rslora=True)
    rates = {"projector": 2e-5, "language model": 3e-4}
    write_run_card((model, lora, data, args), *{"records": 1234, "rates": rates, **replaced}.values(), state)
    table = re.findall(r"\| (.+) \| (.+) \|", ModelCard.load(tmp_path / "README.md").text)
    expected = {
        "what trained": "`full`", "learning rates": "projector 2e-05, language model 0.0003",
        "schedule": "linear, warm-up 0.07, weight decay 0.2", "records": "1,234", "batch": "90 (5 x 3 x 6 ranks)",
        "length": "1,004 of 2,000 steps, 1.26 epochs", "longest conversation": "99 tokens", "optimizer": "sgd",
        "precision": "fp32", "seed": "17", "training loss, last": "2.0000", "training loss, mean": "2.5000",
        "held-out loss, last": "1.5000", "held-out exact match, last": "25.0%", "held-out CIDEr-D, last": "0.50",
    } | otherwise  # fmt: skip
    if args.load_best_model_at_end:
        expected = {name: value for name, value in expected.items() if "held-out" not in name or "last" not in name}
    assert dict(table) == expected


def test_an_evaluation_becomes_a_table_by_language_and_results_for_the_hub(adapter, tmp_path):
    scores = {"n": 1200, "exact_match": 0.25, "cider": 1.234}
    chinese = {"n": 7, "exact_match": 0.5, "intervals": {"exact_match": [0.2, 0.8]}}
    metrics = scores | {"intervals": {"exact_match": [0.1, 0.625]}, "by_language": {"zh": chinese}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "captions.png").write_bytes(b"a sheet")
    (tmp_path / "README.md").write_bytes((adapter / "README.md").read_bytes())
    (tmp_path / "run").mkdir()
    (tmp_path / "README.md").rename(tmp_path / "run" / "README.md")
    model_card.add_evaluation(tmp_path / "run", tmp_path)
    card = ModelCard.load(tmp_path / "run" / "README.md")
    section = card.text.partition("## Held-out answers\n\n")[2].partition("\n## ")[0]
    assert section.rstrip() == (
        "|  | all | zh |\n|---|---|---|\n| exact match | 25.0% | 50.0% |\n| CIDEr-D | 1.23 |  |\n"
        "| questions | 1,200 | 7 |\n\nThe exact match of all lies between 10.0% and 62.5% (95 %).\n\n"
        "![Held-out pictures, references and answers](captions.png)"
    )
    assert (tmp_path / "run" / "captions.png").read_bytes() == b"a sheet"
    assert card.data.model_name == "run"
    results = [
        (r.task_type, r.dataset_type, r.dataset_name, r.metric_type, r.metric_name, r.metric_value)
        for r in card.data.eval_results
    ]
    same = ("image-text-to-text", "held-out", "held-out pictures")
    assert results == [(*same, "exact_match", "exact match", 0.25), (*same, "cider", "CIDEr-D", 1.234)]


def test_a_merged_model_has_the_pictures_of_its_adapters_card(llava, adapter, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(adapter, folder)
    (folder / "captions.png").write_bytes(b"a sheet")
    (tmp_path / "merged").mkdir()
    copy_card(str(folder), str(llava), tmp_path / "merged", "merged")
    assert (tmp_path / "merged" / "captions.png").read_bytes() == b"a sheet"
    assert (tmp_path / "merged" / "loss.png").read_bytes() == (adapter / "loss.png").read_bytes()


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are drawn, in place of files."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_the_curves_show_the_logged_values(drawn, tmp_path):
    log = [
        {"step": 5, "loss": 3.0},
        {"step": 10, "loss": 2.0},
        {"step": 10, "eval_loss": 1.5, "eval_token_f1": 0.25, "eval_cider": 4.0},
    ]
    plot_loss(log, tmp_path / "loss.png")
    plot_loss(log[:2], tmp_path / "loss.png")
    lines = [
        {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.get_lines()}
        for figure in drawn
    ]
    training = {"training": [[5, 3], [10, 2]]}
    assert lines[0] == training | {"held out": [[10, 1.5]], "token F1": [[10, 0.25]], "CIDEr-D": [[10, 4]]}
    assert lines[1] == training
    assert [axes.get_ylabel() for axes in drawn[1].axes] == ["loss per answer token"]


def test_the_sample_grid_spreads_the_questions_evenly_and_marks_correct_answers(drawn, tmp_path):
    pictures = [{"images": [Image.new("RGB", (9, 9), (i, 0, 0))]} for i in range(6)]
    predictions = [
        {"prompt": f"<image>\nQ{i}", "reference": f"r{i}", "prediction": f"r{i}" if i < 3 else "no",
         "pictures": 1, "index": i}
        for i in range(6)
    ]  # fmt: skip
    predictions.insert(0, predictions[0] | {"pictures": 0})  # there is none to draw
    draw_sample_grid(pictures, predictions, tmp_path / "sheet.png", (1, 3))
    cells = []
    for axes in drawn[0].axes:
        (text,), (image,) = axes.texts, axes.images
        cells.append((axes.get_title(), text.get_text(), text.get_color(), int(image.get_array()[0, 0, 0])))
    titles = [f"Q{i}\nr{i}" for i in (0, 2, 4)]
    answers = [("r0", "green", 0), ("r2", "green", 2), ("no", "firebrick", 4)]
    assert cells == [(title, *answer) for title, answer in zip(titles, answers, strict=True)]


def test_hub_ids_are_linked(tmp_path):
    made_of = ["openai/clip-vit-large-patch14-336", "parts/of/mine", "Qwen/Qwen1.5-4B-Chat"]
    write_card(tmp_path, "m", made_of, ["liuhaotian/LLaVA-CC3M-Pretrain-595K"], [])
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.pipeline_tag, data.library_name, data.tags) == ("image-text-to-text", "transformers", ["llava"])
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


def test_a_card_keeps_the_notes_of_people(adapter, tmp_path):
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
def test_a_broken_evaluation_is_refused_and_the_card_stays(adapter, tmp_path, content):
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


def test_an_empty_log_gives_a_curve_without_a_warning(tmp_path, recwarn):
    plot_loss([], tmp_path / "loss.png")
    assert not recwarn.list
    assert (tmp_path / "loss.png").exists()


def test_a_folder_without_a_card_or_metrics_is_refused(adapter, tmp_path):
    with pytest.raises(ValueError, match="holds no README"):
        model_card.add_evaluation(tmp_path, tmp_path)
    with pytest.raises(ValueError, match="holds no metrics"):
        model_card.add_evaluation(adapter, tmp_path)


def test_a_push_to_the_hub_includes_the_card(llava, corpus, tmp_path, monkeypatch):
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
