"""Files of questions: each gets its answer, whatever happens on the way."""

import base64
import json
from pathlib import Path

import pytest
from conftest import QUESTIONS, user_message

from train_llava import infer
from train_llava.common.files import held
from train_llava.evaluation import generation
from train_llava.evaluation import questions as question_files
from train_llava.evaluation.generation import generate
from train_llava.evaluation.questions import answered_before, read_questions
from train_llava.modeling.adapter import load_model

SETTINGS = {"model_name_or_path": "m", "max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0}


def write_questions(corpus: Path, folder: Path) -> Path:
    names = [f"{corpus}/images_dl/{i}.png" for i in range(3)]
    lines = [
        {"id": "one", "image": names[0], "prompt": "What is this?"},
        {"prompt": "Where is Paris?"},
        {"id": 7, "image": names[1:], "prompt": "这是?"},
    ]
    (folder / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder / "questions.jsonl"


def test_a_file_of_questions_is_answered_and_continued(merged, corpus, tmp_path, monkeypatch):
    questions, answers = write_questions(corpus, tmp_path), tmp_path / "answers.jsonl"
    model, processor = load_model(str(merged))
    settings = SETTINGS | {"max_new_tokens": 8}
    infer.answer_file(model, processor, questions, answers, settings, batch_size=2)
    whole = answers.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["id"] for line in lines] == ["one", "1", 7]
    images = [infer.open_image(corpus / "images_dl" / f"{i}.png") for i in range(3)]
    assert [line["answer"] for line in lines] == generate(model, processor, QUESTIONS, images, 8)
    answers.write_text(whole[: whole.index("\n") + 9])  # killed while it wrote the second answer
    asked = []
    ask = generation.generate_all
    monkeypatch.setattr(
        question_files, "generate_all", lambda *args, **options: asked.append(len(args[2])) or ask(*args, **options)
    )
    infer.answer_file(model, processor, questions, answers, settings)
    assert (answers.read_text(), asked) == (whole, [2])


def ask_file(merged, questions: Path, answers: Path, *records: object, **settings: object) -> list[dict]:
    """Writes a file of questions, answers it, and returns the answers."""
    questions.write_text("\n".join(json.dumps(record) for record in records))
    infer.answer_file(*merged, questions, answers, SETTINGS | settings, batch_size=2)
    return [json.loads(line) for line in answers.read_text().split("\n")[:-1]]


def test_every_question_has_its_answer_and_no_other(opened, corpus, tmp_path):
    files, picture = (tmp_path / "q.jsonl", tmp_path / "a.jsonl"), str(corpus / "images_dl" / "0.png")
    same_id = [{"id": 7, "image": picture, "prompt": "What is this?"}, {"id": 7, "prompt": "Where is Paris?"}]
    first = ask_file(opened, *files, *same_id, same_id[1])
    assert [(line["id"], line["prompt"]) for line in first] == [
        (7, "What is this?"),
        (7, "Where is Paris?"),
        (7, "Where is Paris?"),
    ]
    assert ask_file(opened, *files, *same_id, same_id[1]) == first
    assert ask_file(opened, *files, {"id": "a", "prompt": "hi"}, *same_id, same_id[1])[:3] == first  # one more
    written = files[1].read_bytes()
    changed = [same_id[0]], [{"id": 7, "prompt": "And London?"}], [{"id": "b", "prompt": "hi"}]
    for records, missing in zip(changed, ("Where is Paris", "What is this", "What is this"), strict=True):
        message = rf"a.jsonl answers question 7, '{missing}\?', which is not asked now: choose another name"
        with pytest.raises(ValueError, match=message):
            ask_file(opened, *files, *records)
    assert files[1].read_bytes() == written
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("name", "value"), [("model_name_or_path", "n"), ("max_new_tokens", 5), ("top_p", 0.5), ("weights", "abc")]
)
def test_answers_with_other_settings_are_not_continued(opened, tmp_path, name, value):
    files = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    ask_file(opened, *files, {"prompt": "hi"})
    before = files[1].read_bytes()
    message = f"a.jsonl was answered with {name} {SETTINGS.get(name)}, and now it is {value}: choose another name"
    with pytest.raises(ValueError, match=message):
        ask_file(opened, *files, {"prompt": "hi"}, {"prompt": "and?"}, **{name: value})
    assert files[1].read_bytes() == before


def test_the_settings_tell_models_apart_by_their_weights(opened, llava):
    arguments = infer.InferArguments("m", prompt="?", bits=4, top_p=0.5, temperature=1.0, max_new_tokens=7)
    settings = [question_files.settings_of(arguments, model) for model in (opened[0], load_model(str(llava))[0])]
    weights = [given.pop("weights") for given in settings]
    assert weights[0] != weights[1]
    named = {"model_name_or_path": "m", "adapter_name_or_path": None, "bits": 4}
    assert settings[0] == settings[1] == named | {"max_new_tokens": 7, "temperature": 1.0, "top_p": 0.5}


def test_one_process_at_a_time_writes_a_file(opened, tmp_path):
    files = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    with (
        held(tmp_path / ".a.jsonl.lock", ""),
        pytest.raises(ValueError, match=r"a.jsonl is being written by another process"),
    ):
        ask_file(opened, *files, {"prompt": "hi"})
    assert not files[1].exists()
    assert len(ask_file(opened, *files, {"prompt": "hi"})) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


def test_answers_that_were_cut_are_marked_and_counted(opened, tmp_path, capsys):
    files, asked = (tmp_path / "q.jsonl", tmp_path / "a.jsonl"), [{"prompt": "Where is Paris?"}, {"prompt": "hi"}]
    lines = ask_file(opened, *files, *asked)
    assert [line["cut"] for line in lines] == [True, True]
    assert "2 of 2 answers were cut at --max_new_tokens 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["dear diary\nrain", "dear diary", '{"a": 1}', '{\n  "id": 1\n}\n', "[]\n", "null\n", "7",
     '{"id": 1, "prompt": "?"}\n{"id": ', '{"id": 5, "name": "x"}'],
)  # fmt: skip
def test_a_file_of_another_program_is_refused(opened, tmp_path, content):
    answers = tmp_path / "a.jsonl"
    answers.write_text(content)
    with pytest.raises(ValueError, match=r"a.jsonl, line \d, is no answer of this command"):
        ask_file(opened, tmp_path / "q.jsonl", answers, {"prompt": "?"})
    assert answers.read_text() == content


@pytest.mark.parametrize("spelling", ["q.jsonl", "folder/../q.jsonl", "soft.jsonl", "hard.jsonl"])
def test_the_file_of_questions_cannot_be_the_file_of_answers(opened, tmp_path, spelling):
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "prompt": "?", "answer": "!"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "soft.jsonl").symlink_to(questions)
    (tmp_path / "hard.jsonl").hardlink_to(questions)
    with pytest.raises(ValueError, match="is the file of the questions"):
        infer.answer_file(*opened, questions, tmp_path / spelling, SETTINGS)
    assert questions.read_text() == '{"id": 1, "prompt": "?", "answer": "!"}'


def test_a_file_is_continued_after_a_kill_at_any_byte(opened, tmp_path):
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    whole = ask_file(opened, questions, answers, {"id": "一", "prompt": "这是?"}, {"id": 2, "prompt": "二\u2028?"})
    written = answers.read_bytes()
    asked = read_questions(questions)
    for cut in range(len(written)):
        answers.write_bytes(written[:cut])
        found = answered_before(answers, asked, SETTINGS)
        kept = written[:cut].count(b"\n")
        assert found == whole[:kept] + [None] * (2 - kept)
        assert answers.read_bytes() == written[: written[:cut].rfind(b"\n") + 1]
    answers.write_bytes(written[: written.index("这".encode()) + 1])
    infer.answer_file(*opened, questions, answers, SETTINGS, batch_size=2)
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
        {"messages": user_message("<image>", "What is this?"), "images": [str(file)]},
        {"prompt": "What is this?", "image": None},
    ]
    answers = ask_file(opened, tmp_path / "q.jsonl", tmp_path / "a.jsonl", *asked)
    expected = [generate(*opened, QUESTIONS[:1], [infer.open_image(file)], 4)[0]] * 5
    expected += generate(*opened, [user_message("What is this?")], [], 4)
    assert [line["answer"] for line in answers] == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "question 1: it is no object"),
        ("7", "question 1: it is no object"),
        ('[{"prompt": "?"}]', "question 1: it is no object"),
        ('{"prompt": 7}', "question 1: it has no prompt"),
        ('{"prompt": ""}', "question 1: a turn of role user has no text"),
        ('{"prompt": " ", "image": "0.png"}', "question 1: its prompt is empty"),
        ('{"prompt": "<image>", "image": "0.png"}', "question 1: its prompt is empty"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}], "image": "0.png"}', "its prompt is empty"),
        ('{"prompt": "?", "image": [7]}', "question 1: a picture is neither a file nor an address"),
        ('{"prompt": "<image> and <image>", "image": "0.png"}', "question 1: 2 <image> tags for 1 pictures"),
    ],
)
def test_a_line_that_is_no_question_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("key", ["id", "question_id", "questionId", "image_id"])
def test_questions_have_the_id_keys_of_records(tmp_path, key):
    lines = [{key: 0, "question": "?"}, {key: "b", "text": "and?", "question_type": "what"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(line["id"], line["prompt"]) for line in read_questions(tmp_path / "q.jsonl")] == [(0, "?"), ("b", "and?")]


def test_a_question_that_cannot_be_asked_is_reported_and_the_others_are_answered(opened, tmp_path, capsys):
    asked = [{"id": 1, "image": "none.png", "prompt": "?"}, {"id": 2, "prompt": "a" * 1000}, {"id": 3, "prompt": "hi"}]
    with pytest.raises(
        ValueError, match=r"2 of 3 questions could not be asked; question 1: .*none.png does not exist"
    ):
        ask_file(opened, tmp_path / "q.jsonl", tmp_path / "a.jsonl", *asked)
    assert [json.loads(line)["id"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == [3]
    assert "question 2: the conversation has 10" in capsys.readouterr().err
