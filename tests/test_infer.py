"""Asking, evaluating and merging: the right answers to the right questions, and one clear line for bad input."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import random_adapter, run_train, turns
from PIL import Image
from safetensors.torch import load_file, save_file

from train_llava import answers, evaluate, infer, reports
from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.infer import generate, load_model
from train_llava.merge_lora import merge_lora
from train_llava.model import load_checkpoint
from train_llava.questions import read_questions, unanswered

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def adapter(llava, tmp_path_factory) -> Path:
    """A LoRA adapter for the tiny LLaVA whose matrices and projector are random, so that it changes every answer."""
    return random_adapter(llava, tmp_path_factory.mktemp("adapter") / "run", seed=1)


@pytest.fixture(scope="module")
def merged(llava, adapter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "model"
    merge_lora(str(llava), str(adapter), str(folder))
    return folder


def question(*texts: str) -> list[dict]:
    parts = [{"type": "image"} if text == "<image>" else {"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": parts}]


QUESTIONS = [
    question("<image>", "What is this?"),
    question("Where is Paris?"),
    question("<image>", "<image>", "这是?"),
]
IMAGES = [Image.new("RGB", (40, 40), color) for color in ("red", "green", "blue")]


def test_an_adapter_saves_its_projector_and_changes_the_model(llava, adapter):
    names = load_file(adapter / "adapter_model.safetensors").keys()
    assert sum("multi_modal_projector" in name for name in names) == 4
    base, processor = load_model(str(llava))
    adapted, _ = load_model(str(llava), str(adapter))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    assert (adapted(**inputs).logits - base(**inputs).logits).abs().max() > 0.1


def test_a_merged_model_equals_base_and_adapter(llava, adapter, merged):
    adapted, processor = load_model(str(llava), str(adapter))
    plain, _ = load_model(str(merged))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    ours, theirs = plain(**inputs).logits, adapted(**inputs).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert generate(plain, processor, QUESTIONS, IMAGES, 8) == generate(adapted, processor, QUESTIONS, IMAGES, 8)


def test_batched_answers_equal_single_ones(merged):
    model, processor = load_model(str(merged))
    together = generate(model, processor, QUESTIONS, IMAGES, 8)
    shares = [IMAGES[:1], [], IMAGES[1:]]
    alone = [generate(model, processor, [q], images, 8)[0] for q, images in zip(QUESTIONS, shares, strict=True)]
    assert together == alone
    assert len(set(together)) == 3


def test_short_answers_do_not_wait_for_long_ones(merged, monkeypatch):
    """Ends are drawn, as it were: every twelfth token is one, so that answers have 1 token to 40."""
    model, processor = load_model(str(merged))
    chat, vocabulary = Chat(processor), len(processor.tokenizer)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, *range(1, vocabulary, 12)])
    texts = [f"What is {word}?" + " It is" * (i % 5) for i, word in enumerate("abcdefghijkl")]
    asked = [question(*["<image>"] * (i % 3), text) for i, text in enumerate(texts)]
    shown = [IMAGES[: i % 3] for i in range(len(texts))]
    alone = [generate(model, processor, [q], pictures, 40)[0] for q, pictures in zip(asked, shown, strict=True)]
    calls, real = [], model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda **given: calls.append((len(given["input_ids"]), given["max_new_tokens"])) or real(**given),
    )
    assert infer.generate_all(model, chat, asked, shown, 4, 40) == alone
    assert len(set(alone)) > 6
    assert calls[:3] == [(4, 16)] * 3
    later = sum(rows for rows, _ in calls[3:])
    assert 0 < later < 12
    assert all(tokens == 24 for _, tokens in calls[3:])
    calls.clear()
    assert infer.generate_all(model, chat, asked, shown, 12, 40) == alone
    assert calls == [(12, 40)]


def test_infer_prints_the_answer_alone(merged, corpus):
    picture = corpus / "images_dl" / "0.png"
    command = [sys.executable, "-m", "train_llava.infer", "--model_name_or_path", merged, "--image", picture]
    done = subprocess.run(
        [*command, "--prompt", "What is this?", "--max_new_tokens", "8"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    model, processor = load_model(str(merged))
    assert done.stdout == generate(model, processor, QUESTIONS[:1], [infer.open_image(picture)], 8)[0] + "\n"


def write_questions(corpus: Path, folder: Path) -> Path:
    names = [f"{corpus}/images_dl/{i}.png" for i in range(3)]
    lines = [
        {"id": "one", "image": names[0], "prompt": "What is this?"},
        {"prompt": "Where is Paris?"},
        {"id": 7, "image": names[1:], "prompt": "这是?"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "questions.jsonl"


def test_a_file_of_questions_is_answered_and_gone_on_with(merged, corpus, tmp_path, monkeypatch):
    questions, answers = write_questions(corpus, tmp_path), tmp_path / "answers.jsonl"
    model, processor = load_model(str(merged))
    infer.answer_file(model, processor, questions, answers, batch_size=2, max_new_tokens=8)
    whole = answers.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == ["one", "1", 7]
    images = [infer.open_image(corpus / "images_dl" / f"{i}.png") for i in range(3)]
    assert [line["answer"] for line in lines] == generate(model, processor, QUESTIONS, images, 8)
    answers.write_text(whole[: whole.index("\n") + 9])  # killed while it wrote the second answer
    asked = []
    ask = infer.generate_all
    monkeypatch.setattr(infer, "generate_all", lambda *args, **kw: asked.append(len(args[2])) or ask(*args, **kw))
    infer.answer_file(model, processor, questions, answers, batch_size=16, max_new_tokens=8)
    assert (answers.read_text(), asked) == (whole, [2])


def ask_file(merged, questions: Path, answers: Path, *records: object) -> list[dict]:
    """Writes a file of questions, answers it, and gives back the answers."""
    questions.write_text("\n".join(json.dumps(record) for record in records))
    infer.answer_file(*merged, questions, answers, batch_size=2, max_new_tokens=4)
    return [json.loads(line) for line in answers.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def opened(merged):
    return load_model(str(merged))


def test_every_question_has_its_answer_and_no_other(opened, corpus, tmp_path):
    questions, answers, picture = tmp_path / "q.jsonl", tmp_path / "a.jsonl", tmp_path / "0.png"
    shutil.copy(corpus / "images_dl" / "0.png", picture)
    same_id = [{"id": 7, "image": "0.png", "prompt": "What is this?"}, {"id": 7, "prompt": "Where is Paris?"}]
    first = ask_file(opened, questions, answers, *same_id, same_id[1])
    assert [(line["id"], line["prompt"]) for line in first] == [
        (7, "What is this?"),
        (7, "Where is Paris?"),
        (7, "Where is Paris?"),
    ]
    assert ask_file(opened, questions, answers, *same_id, same_id[1]) == first
    changed = same_id[0], {"id": 7, "prompt": "And London?"}
    assert [line["prompt"] for line in ask_file(opened, questions, answers, *changed)] == [
        "What is this?",
        "And London?",
    ]
    shutil.copy(corpus / "images_dl" / "1.png", picture)  # another picture of the same name
    second = ask_file(opened, questions, answers, *changed, {"id": "a", "prompt": "hi"})
    assert [line["prompt"] for line in second] == ["And London?", "What is this?", "hi"]
    assert second[1]["asked"] != first[0]["asked"]
    # what other questions were answered in this file stays
    assert len(ask_file(opened, questions, answers, {"id": "b", "prompt": "hi"})) == 4
    assert not list(tmp_path.glob(".*"))


def test_two_models_do_not_share_a_file_of_answers(opened, llava, tmp_path):
    files = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    ask_file(opened, *files, {"prompt": "hi"})
    before = files[1].read_bytes()
    with pytest.raises(ValueError, match="has answers of another model"):
        ask_file(load_model(str(llava)), *files, {"prompt": "hi"}, {"prompt": "and?"})
    assert files[1].read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["dear diary\nrain", "dear diary", '{"a": 1}', '{\n  "id": 1\n}\n', "[]\n", "null\n", "7",
     '{"id": 1, "prompt": "?"}\n{"id": ', '{"id": 5, "name": "x"}'],
)  # fmt: skip
def test_a_file_of_somebody_else_is_left_alone(opened, tmp_path, content):
    answers = tmp_path / "a.jsonl"
    answers.write_text(content)
    with pytest.raises(ValueError, match=r"a.jsonl, line \d, is no answer of this command"):
        ask_file(opened, tmp_path / "q.jsonl", answers, {"prompt": "?"})
    assert answers.read_text() == content


@pytest.mark.parametrize("spelling", ["q.jsonl", "folder/../q.jsonl", "soft.jsonl", "hard.jsonl"])
def test_questions_are_not_their_own_answers(opened, tmp_path, spelling):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "prompt": "?", "answer": "!"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.jsonl").symlink_to(questions)
    (tmp_path / "hard.jsonl").hardlink_to(questions)
    with pytest.raises(ValueError, match="is the file of the questions"):
        infer.answer_file(*opened, questions, tmp_path / spelling, batch_size=1)
    assert questions.read_text() == '{"id": 1, "prompt": "?", "answer": "!"}'


def test_a_kill_at_any_byte_is_gone_on_from(opened, tmp_path):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    whole = ask_file(opened, questions, answers, {"id": "一", "prompt": "这是?"}, {"id": 2, "prompt": "二\u2028?"})
    written = answers.read_bytes()
    for cut in range(len(written)):
        answers.write_bytes(written[:cut])
        left = unanswered(read_questions(questions), answers, whole[0]["model"])
        assert len(left) == 2 - max(
            written[:cut].count(b"\n"), cut == len(written) - 1 and 2, cut >= written.index(b"\n")
        )
        assert written.startswith(answers.read_bytes())
    answers.write_bytes(written[: written.index("这".encode()) + 1])
    infer.answer_file(*opened, questions, answers, batch_size=2, max_new_tokens=4)
    assert answers.read_bytes() == written
    assert [line["id"] for line in whole] == ["一", 2]


def test_a_question_names_its_pictures_as_a_record_does(opened, corpus, tmp_path):
    file = corpus / "images_dl" / "0.png"
    address = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    asked = [
        {"prompt": "What is this?", "image": str(file)},
        {"prompt": "What is this?", "images": [str(file)]},
        {"prompt": "What is this?", "image": address},
        {"prompt": "<image>\nWhat is this?", "image": str(file)},
        {"messages": question("<image>", "What is this?"), "images": [str(file)]},
        {"prompt": "What is this?", "image": None},
    ]
    answers = ask_file(opened, tmp_path / "q.jsonl", tmp_path / "a.jsonl", *asked)
    expected = [generate(*opened, QUESTIONS[:1], [infer.open_image(file)], 4)[0]] * 5
    expected += generate(*opened, [question("What is this?")], [], 4)
    assert [line["answer"] for line in answers] == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "question 1: it is no object"),
        ("7", "question 1: it is no object"),
        ('[{"prompt": "?"}]', "question 1: it is no object"),
        ('{"prompt": 7}', "question 1: it has no prompt"),
        ('{"prompt": "?", "image": [7]}', "question 1: a picture is neither a file nor an address"),
        ('{"prompt": "<image> and <image>", "image": "0.png"}', "question 1: 2 <image> tags for 1 pictures"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_one_question_that_cannot_be_asked_keeps_no_other_from_its_answer(opened, tmp_path, capsys):
    asked = [{"id": 1, "image": "none.png", "prompt": "?"}, {"id": 2, "prompt": "a" * 1000}, {"id": 3, "prompt": "hi"}]
    with pytest.raises(
        ValueError, match=r"2 of 3 questions could not be asked; question 1: .*none.png does not exist"
    ):
        ask_file(opened, tmp_path / "q.jsonl", tmp_path / "a.jsonl", *asked)
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [3]
    assert "question 2: the conversation has 10" in capsys.readouterr().err


def test_the_context_of_the_model_is_kept(opened):
    model, processor = opened
    length = Chat(processor).prompts([question("hi")], [])["input_ids"].shape[1]
    fits = question("hi" + "z" * (512 - length - 2))  # one token each
    assert infer.room_for_answer(model, Chat(processor), fits, []) == 2
    together = generate(model, processor, [fits, *QUESTIONS[:1]], IMAGES[:1], 8)
    assert together[1] == generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8)[0]
    with pytest.raises(ValueError, match="has 512 tokens, pictures included, and the model reads 512"):
        generate(model, processor, [question("hi" + "z" * (512 - length))], [], 8)


@pytest.mark.parametrize("token", ["<image>", "<|im_end|>", "<|im_start|>"])
def test_a_control_token_in_a_prompt_is_refused(opened, token):
    with pytest.raises(ValueError, match=re.escape(f"the control token {token} stands in a text")):
        generate(*opened, [question(f"What is {token} this?")], [], 4)


def test_a_chat_survives_whatever_a_turn_raises(opened, monkeypatch, capsys):
    typed = iter(["What is this?", "a" * 1000, "<image>", "/image nothing.png", "out of memory", "And this?", ""])
    asked = []

    def fail_once(model, processor, conversations, images, **options):
        asked.append(conversations[0])
        if "out of memory" in str(conversations):
            raise torch.OutOfMemoryError("no memory")
        return generate(model, processor, conversations, images, **options)

    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(infer, "generate", fail_once)
    infer.chat(*opened, [IMAGES[0]], max_new_tokens=4)
    assert capsys.readouterr().err.count("error: ") == 4
    assert [message["role"] for message in asked[-1]] == ["user", "assistant", "user"]


def test_a_chat_keeps_the_conversation_and_takes_pictures_on_the_way(merged, corpus, monkeypatch, capsys):
    typed = iter(["What is this?", f"/image {corpus}/images_dl/1.png", "/image nothing.png", "And this?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    asked = []

    def remember(model, processor, conversations, images, **options):
        asked.append((json.dumps(conversations[0]), len(images)))
        return generate(model, processor, conversations, images, **options)

    monkeypatch.setattr(infer, "generate", remember)
    model, processor = load_model(str(merged))
    infer.chat(model, processor, [IMAGES[0]], max_new_tokens=8)
    shown = capsys.readouterr()
    (first, one), (second, two) = asked
    assert (one, two) == (1, 2)
    messages = json.loads(second)
    assert messages[0] == json.loads(first)[0] == question("<image>", "What is this?")[0]
    assert messages[2] == question("<image>", "And this?")[0]
    assert messages[1]["content"][0]["text"] in shown.out
    assert "nothing.png does not exist" in shown.err


def test_a_picture_may_come_from_the_network_or_standard_input(merged, corpus, monkeypatch):
    path = corpus / "images_dl" / "3.png"
    expected = infer.open_image(path).tobytes()
    handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/3.png"
        assert infer.fetch_image(address).tobytes() == expected
        monkeypatch.setattr(infer, "MAX_BYTES", 10)
        with pytest.raises(ValueError, match="is larger than"):
            infer.fetch_image(address)
        with pytest.raises(OSError, match=r"99.png gives no picture.*404"):
            infer.fetch_image(address.replace("3.png", "99.png"))
        monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", lambda handler: handler.wfile.write(b"\0nonsense\r\n"))
        for nonsense in (address, "http://[", "http://no host/", "data:nothing", "http://127.0.0.1:1/图.png"):
            with pytest.raises(OSError, match=re.escape(nonsense)):
                infer.fetch_image(nonsense)
        server.shutdown()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    assert infer.fetch_image("-").tobytes() == expected


def test_sampling_draws_other_answers_and_is_off_by_default(merged):
    model, processor = load_model(str(merged))
    assert infer.sampling(0, 1) == {"do_sample": False}
    greedy = generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8)
    drawn = {generate(model, processor, QUESTIONS[:1], IMAGES[:1], 8, **infer.sampling(5.0, 1.0))[0] for _ in range(4)}
    assert len(drawn | set(greedy)) > 2


def run_evaluate(monkeypatch, model: Path, corpus: Path, output: Path, *arguments: str) -> dict:
    command = ["evaluate", "--model_name_or_path", model, "--data_path", corpus, "--output_dir", output, *arguments]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    evaluate.main()
    return json.loads((output / "metrics.json").read_text())


def test_evaluate_asks_every_question_and_counts_the_exact_answers(merged, corpus, tmp_path, monkeypatch):
    asked = []

    heights = {
        height: ("a red square", "a blue circle", "红")[height % 3] * (1 + height % 2) for height in range(30, 46)
    }

    def answer_by_heart(model, chat, conversations, images, *_):
        """Tells the pictures apart by their height, and is right for the English ones."""
        asked.extend(conversations)
        answers = []
        for conversation, shown in zip(conversations, images, strict=True):
            assert len(shown) == sum(part["type"] == "image" for part in conversation[0]["content"])
            picture = shown[0] if shown else None
            blank = picture is None or picture.getextrema() == ((255, 255),) * 3
            answers.append("a red square" if blank else heights[picture.height])
        return answers

    monkeypatch.setattr(answers, "generate_all", answer_by_heart)
    metrics = run_evaluate(
        monkeypatch, merged, corpus, tmp_path / "out", "--blank_control", "true", "--batch_size", "5"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(asked) == 2 * metrics["n"] == 2 * len(lines) == 34
    assert [line["id"] for line in lines].count("5") == 2
    assert lines[6]["prompt"] == "这是什么?"
    assert lines[0].keys() == {"id", "prompt", "reference", "prediction"}
    exact = sum(line["prediction"] == line["reference"] for line in lines)
    assert metrics["exact_match"] == exact / 17
    assert exact == 12  # eleven of the fifteen pictures are English, and one of the two questions without a picture
    assert metrics["controls"]["blank_pictures"]["exact_match"] == 4 / 17
    assert metrics["controls"]["most_frequent_answer"]["exact_match"] == pytest.approx(4 / 17)
    assert Image.open(tmp_path / "out" / "captions.png").size[0] > 1000


def test_evaluate_runs_a_real_model(merged, corpus, tmp_path, monkeypatch, capsys):
    metrics = run_evaluate(monkeypatch, merged, corpus, tmp_path / "out", "--max_new_tokens", "4")
    assert metrics["n"] == 17
    low, high = metrics["intervals"]["token_f1"]
    assert 0 <= low <= metrics["token_f1"] <= high <= 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    model, processor = load_model(str(merged))
    item = LlavaDataset(str(corpus))[3]
    assert lines[3]["prediction"] == generate(model, processor, [item["messages"][:1]], item["images"], 4)[0]
    assert "this model" in capsys.readouterr().out


def write_data(folder: Path, corpus: Path, *records: dict) -> Path:
    """A data set of these records, with the corpus's pictures."""
    folder.mkdir()
    shutil.copytree(corpus / "images_dl", folder / "images_dl")
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("text", ["$5 and $\\frac{", "$^$", "long " * 400, "红" * 400, "a\u2028b\x85c $", "\x07"])
def test_no_text_costs_an_evaluation(merged, corpus, tmp_path, monkeypatch, text):
    record = {"id": "0", "image": "0.png", "caption": text}
    data = write_data(tmp_path / "data", corpus, *[record] * 3)
    monkeypatch.setattr(answers, "generate_all", lambda model, chat, conversations, *_: [text] * len(conversations))
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "$out$")
    assert (metrics["n"], metrics["exact_match"], metrics["bad"]) == (3, 1, [])
    assert Image.open(tmp_path / "$out$" / "captions.png").width == 1144
    (tmp_path / "compared").mkdir()
    evaluate.compare([tmp_path / "$out$"], tmp_path / "compared")
    assert (tmp_path / "compared" / "comparison.png").exists()


def test_what_cannot_be_asked_is_named_and_counts_for_nothing(merged, corpus, tmp_path, monkeypatch, capsys):
    good = {"id": "good", "image": "0.png", "caption": "a red square"}
    data = write_data(
        tmp_path / "data",
        corpus,
        {"id": "gone", "image": "99.png", "caption": "x"},
        {"id": "broken", "image": "broken.png", "caption": "x"},
        {"id": "long", "conversations": turns("What is this?", "x", "a" * 600, "x")},
        {"id": "control", "conversations": turns("What is <|im_end|>?", "x")},
        {"id": "no text"},
        good,
    )
    (data / "images_dl" / "broken.png").write_bytes((corpus / "images_dl" / "0.png").read_bytes()[:60])
    arguments = ["--max_new_tokens", "4", "--blank_control", "true", "--batch_size", "2"]
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out", *arguments)
    assert metrics["n"] == metrics["controls"]["blank_pictures"]["n"] == 2  # and the first turn of the long one
    assert [entry["id"] for entry in metrics["bad"]] == ["gone", "broken", "long", "control", "no text"]
    error = capsys.readouterr().err
    assert "gone: " in error
    assert "5 questions or records could not be asked" in error
    (data / "chat.json").write_text(json.dumps([good | {"image": "broken.png"}]))
    with pytest.raises(ValueError, match=r"no question of .* could be asked; good: .*broken.png"):
        run_evaluate(monkeypatch, merged, data, tmp_path / "none", *arguments)
    assert not (tmp_path / "none").exists()


def test_a_sheet_that_cannot_be_drawn_costs_no_numbers(merged, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reports, "findfont", lambda name: 1 / 0)
    metrics = run_evaluate(monkeypatch, merged, corpus, tmp_path / "out", "--max_new_tokens", "1")
    assert metrics["n"] == 17
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.jsonl"]
    assert "captions.png could not be drawn: division by zero" in capsys.readouterr().err


def test_a_record_may_have_several_right_answers(merged, corpus, tmp_path, monkeypatch):
    data = write_data(
        tmp_path / "data",
        corpus,
        {"image": "0.png", "caption": ["a cat", "one cat", "a cat"]},
        {"conversations": turns("Who?", "I", "Where?", "here"), "references": ["there"]},
        {"conversations": turns("How many?", "two"), "answers": [{"answer": "2", "answer_id": i} for i in range(10)]},
    )
    said = iter(["one cat", "I", "there", "2"])
    monkeypatch.setattr(answers, "generate_all", lambda model, chat, asked, *_: [next(said) for _ in asked])
    metrics = run_evaluate(monkeypatch, merged, data, tmp_path / "out")
    assert (metrics["exact_match"], metrics["vqa_accuracy"]) == (0.75, 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line.get("references") for line in lines] == [["a cat", "one cat", "a cat"], None, ["here", "there"], None]
    evaluate.compare([tmp_path / "out"], tmp_path)  # reads them back


@pytest.mark.parametrize("content", ["{}", "[]", "null", "nonsense"])
def test_what_is_no_evaluation_is_not_compared(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=r"holds no metrics.json that evaluate wrote"):
        evaluate.compare([tmp_path], tmp_path)
    (tmp_path / "metrics.json").write_text('{"n": 1, "exact_match": 1, "intervals": {"exact_match": [0, 1]}}')
    (tmp_path / "predictions.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"predictions.jsonl"):
        evaluate.compare([tmp_path], tmp_path)


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_that_have_to_be_above_0(name, number):
    for make in (partial(infer.InferArguments, "m", prompt="?"), partial(evaluate.EvaluateArguments, "o", "m", "d")):
        with pytest.raises(ValueError, match=f"--{name} {number}: it has to be above 0"):
            make(**{name: number})


@pytest.fixture(scope="module")
def foreign_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with wider layers."""
    folder = tmp_path_factory.mktemp("foreign")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    wider = {name: torch.cat([t, t], dim=-1) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def deeper_adapter(adapter, tmp_path_factory) -> Path:
    """An adapter of a model with more layers, its shapes the same."""
    folder = tmp_path_factory.mktemp("deeper")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | more, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("names", [r"model\.language_model\..*", "list"])
def test_an_adapter_with_the_names_of_older_versions_is_the_same(llava, adapter, tmp_path, names):
    """Transformers before 4.52 held a whole language model where today its body and its head stand apart."""
    old = [("model.language_model.", "language_model.model."), ("model.multi_modal", "multi_modal")]
    tensors = {}
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        tail = name.removeprefix("base_model.model.")
        for today, before in old:
            tail = tail.replace(today, before)
        tensors[f"base_model.model.{tail}"] = tensor
    assert any(".language_model.model.layers.0." in name for name in tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    target = config["target_modules"]
    assert target.startswith(r"model\.language_model\..*")
    config["target_modules"] = (
        target.replace(r"model\.language_model", r"language_model\.model")
        if names != "list"
        else [f"language_model.model.layers.{i}.{part}" for i in range(2) for part in
              ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
    )  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (ours, processor), (theirs, _) = load_model(str(llava), str(tmp_path)), load_model(str(llava), str(adapter))
    inputs = Chat(processor).prompts(QUESTIONS, IMAGES)
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.fixture(scope="module")
def trained_adapter(llava, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_train(patch, llava, corpus, folder, "--max_steps", "1", "--preflight", "false", "--lora_r", "4")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_knows_its_base_in_any_precision(llava, trained_adapter, tmp_path, dtype):
    model, processor = load_checkpoint(str(llava))
    model.to(dtype).save_pretrained(tmp_path / "same")
    processor.save_pretrained(tmp_path / "same")
    load_model(str(tmp_path / "same"), str(trained_adapter))
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight[0, 3] += 0.01
    model.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was trained on another model than .*other"):
        load_model(str(tmp_path / "other"), str(trained_adapter))
    (trained := tmp_path / "elsewhere").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained_adapter / name, trained)
    load_model(str(tmp_path / "other"), str(trained))


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_goes_on_its_base_in_few_bits(llava, trained_adapter, bits):
    load_model(str(llava), str(trained_adapter), bits=bits)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"nonsense", b"version https://git-lfs.github.com/spec/v1\n"]
)
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base_fingerprint.json"])
def test_a_broken_file_of_an_adapter_is_named(llava, trained_adapter, tmp_path, name, content):
    folder = shutil.copytree(trained_adapter, tmp_path / "run")
    (folder / name).write_bytes(content)
    if (name, content) == ("base_fingerprint.json", b"{}"):
        load_model(str(llava), str(folder))
        return
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        load_model(str(llava), str(folder))


def test_a_torn_adapter_is_named(llava, trained_adapter, tmp_path):
    folder = shutil.copytree(trained_adapter, tmp_path / "run")
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors cannot be read"):
        load_model(str(llava), str(folder))


@pytest.mark.parametrize("kind", ["foreign_adapter", "deeper_adapter"])
def test_an_adapter_of_another_model_is_refused(llava, tmp_path, kind, request):
    folder = request.getfixturevalue(kind)
    with pytest.raises(ValueError, match="was trained on another model"):
        load_model(str(llava), str(folder))
    with pytest.raises(ValueError, match="was trained on another model"):
        merge_lora(str(llava), str(folder), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("infer --model_name_or_path nowhere --prompt hi", "nowhere is no folder"),
        ("infer --model_name_or_path {qwen2} --prompt hi", "is a qwen2 model, not a LLaVA"),
        ("infer --model_name_or_path {llava} --prompt hi --image {corpus}/chat.json", "cannot be read as a picture"),
        ("infer --model_name_or_path {llava} --prompt hi --image nothing.png", "nothing.png does not exist"),
        ("infer --model_name_or_path {llava} --prompt hi --image {corpus}", "{corpus} is a folder"),
        ("infer --model_name_or_path {llava} --prompt hi --adapter_name_or_path {corpus}", "is no adapter folder"),
        ("infer --model_name_or_path {llava}", "one of --prompt, --interactive true and --questions"),
        ("infer --model_name_or_path {llava} --questions {corpus}/chat.json", "--questions and --answers go together"),
        ("infer --model_name_or_path {llava} --questions no.jsonl --answers {tmp}/a.jsonl", "no.jsonl"),
        ("evaluate --model_name_or_path {llava} --data_path {llava} --output_dir {tmp}/out", "holds no chat.json"),
        ("evaluate --model_name_or_path nowhere --data_path {corpus} --output_dir {tmp}/out", "nowhere is no folder"),
        ("evaluate --model_name_or_path {llava} --data_path {corpus} --output_dir {llava}", "exists already"),
        ("evaluate --model_name_or_path {llava} --output_dir {tmp}/out", "pass --model_name_or_path with --data_path"),
        ("evaluate --compare {corpus} --output_dir {tmp}/out", "{corpus} holds no metrics.json"),
        ("merge_lora --model_name_or_path {llava} --adapter_name_or_path no --output_dir {tmp}/out", "no is no f"),
        ("build_model --vision_model_name_or_path {corpus} --language_model_name_or_path {qwen2} "
         "--output_dir {tmp}/out", "{corpus}"),
    ],
)  # fmt: skip
def test_bad_input_ends_with_one_line_and_leaves_nothing(llava, parts, corpus, tmp_path, command, message):
    names = {"llava": llava, "qwen2": parts["qwen2"], "corpus": corpus, "tmp": tmp_path}
    done = subprocess.run(
        [sys.executable, "-m", *f"train_llava.{command}".format(**names).split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert message.format(**names) in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
