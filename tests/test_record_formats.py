"""Every record format gives the same messages and images, and a bad record is refused with its reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import turns
from record_files import (
    ANSWERS,
    COLORS,
    FORMATS,
    PNGS,
    QUESTION,
    SCIENCE,
    URIS,
    colors_of,
    messages,
    reasons_of,
)

from train_llava.chat import IGNORE, Chat
from train_llava.data import BadRecordError, LlavaCollator, LlavaDataset, to_item, to_sample
from train_llava.dataset.readers import images_of
from train_llava.dataset.table import load_records, table_row
from train_llava.evaluation.answers import questions
from train_llava.records import text_of, to_messages


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_messages_and_images(tmp_path, name):
    dataset = LlavaDataset(FORMATS[name](tmp_path))
    assert len(dataset) == 3
    for i, color in enumerate(COLORS):
        item = dataset[i]
        question = "Describe this picture." if "caption" in name else "What is this?"
        assert item["id"] == str(i)
        assert [text_of(message) for message in item["messages"]] == [f"<image>\n{question}", ANSWERS[i]]
        assert [image.getpixel((3, 3)) for image in item["images"]] == [color]
        assert item["images"][0].size == (8, 6)


def test_ids_may_be_of_any_type_and_records_may_have_no_image(tmp_path):
    records = [
        {"id": 7, "image": "coco/a.png", "conversations": turns(QUESTION, "red"), "model": ""},
        {"id": "x", "conversations": turns("Hello", "Hi", "Bye", "Bye.")},
        {"conversations": turns("No id", "none")},
    ]
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "a.png").write_bytes(PNGS[0])
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps(records, indent=1))
    dataset = LlavaDataset(str(tmp_path / "llava_v1_5_mix665k.json"))
    assert [dataset[i]["id"] for i in range(3)] == ["7", "x", "2"]
    assert [len(dataset[i]["images"]) for i in range(3)] == [1, 0, 0]


def test_images_inside_a_record_and_in_files_keep_their_order(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(PNGS[1])
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in (URIS[0], "a.png", URIS[2])]
    truncated = [{"type": "image_url", "image_url": URIS[0][:-200]}]
    records = [{"messages": messages(0, content)} for content in (parts, truncated)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    assert colors_of(LlavaDataset(str(tmp_path))[0]) == ANSWERS
    assert len(reasons_of(tmp_path)["1"]) < 250
    row = {"images": ["a.png", {"bytes": PNGS[2], "path": None}], "messages": messages(0, "<image><image>")}
    item = to_item(table_row(row, 0), tmp_path / "images")
    assert colors_of(item) == ["green", "blue"]


def test_answers_and_references_are_kept(tmp_path):
    official = [{"answer": "yes", "answer_confidence": "maybe", "answer_id": 1}, {"answer": "no", "answer_id": 2}]
    records = [
        {"question": "?", "answer": "yes", "answers": answers} for answers in (official, ["yes", "no"], "yes", None)
    ]
    (tmp_path / "chat.json").write_text(json.dumps([*records, {"image": "a.png", "caption": ["red", "a red one"]}]))
    table = load_records(str(tmp_path))[0]
    assert table["answers"][:4] == [["yes", "no"], ["yes", "no"], ["yes"], []]
    assert table[4]["references"] == ["red", "a red one"]
    assert json.loads(table[4]["messages"])[1]["content"] == [{"type": "text", "text": "red"}]


PEOPLE = ["net", "nets", "net", "a net"]


@pytest.mark.parametrize(
    ("record", "name", "question", "answer", "answers"),
    [
        ({"question_id": 7, "image_id": "a1", "question": "?", "answers": PEOPLE}, "7", "?", "net", PEOPLE),
        ({"question_id": 7, "question": "?", "multiple_choice_answer": "net",
          "answers": [{"answer": text, "answer_id": i} for i, text in enumerate(PEOPLE)]}, "7", "?", "net", PEOPLE),
        ({"questionId": "49", "question": "?", "answers": ["1", "one"]}, "49", "?", "1", ["1", "one"]),
        ({"image_id": "a1", "question": "?", "answer": ["b", "a", "b"]}, "a1", "?", "b", ["b", "a", "b"]),
        ({"question_id": 0, "question": "?", "answer": 3}, "0", "?", "3", []),
        ({"id": "x", "question_id": 7, "question": "?", "answer": "as it is", "answers": PEOPLE}, "x", "?", "as it is",
         PEOPLE),
        (SCIENCE | {"answer": 1, "hint": "It barks."}, "0", "It barks.\nWhich?\ncat\ndog", "dog", []),
        (SCIENCE | {"answer": 0, "hint": ""}, "0", "Which?\ncat\ndog", "cat", []),
        (SCIENCE | {"answer": "B"}, "0", "Which?\ncat\ndog", "dog", []),
        ({"question": "How many?", "options": ["2", "1"], "answer": "1"}, "0", "How many?\n2\n1", "1", []),
    ],
)  # fmt: skip
def test_records_of_visual_questions_are_read_as_published(record, name, question, answer, answers):
    row = table_row(record, 0)
    assert row["error"] is None
    assert list(map(text_of, json.loads(row["messages"]))) == [question, answer]
    assert (row["id"], row["answers"]) == (name, answers)


def test_images_without_tags_come_before_the_first_question():
    texts = [{"user": "One?", "assistant": "1"}, {"user": "Two?", "assistant": "2"}]
    conversation = to_messages({"images": ["a", "b"], "texts": texts})
    assert list(map(text_of, conversation)) == ["<image>\n<image>\nOne?", "1", "Two?", "2"]
    system = [{"role": "system", "content": "Be brief."}, *messages(0, "And <image>?")]
    assert list(map(text_of, to_messages({"image": "a", "messages": system})))[1] == "And \n<image>\n?"
    system[1]["content"] = "What?"
    assert list(map(text_of, to_messages({"image": "a", "messages": system})))[:2] == ["Be brief.", "<image>\nWhat?"]


PART = {"type": "image", "image": "c"}


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"images": ["a", None, "", "b"], "image": "c"}, ["a", "b"]),
        ({"images": [], "image": "a", "image_bytes": b"c"}, ["a"]),
        ({"images": [None], "image": None, "image_bytes": [b"c"]}, [b"c"]),
        ({"images": "a"}, ["a"]),
        ({"image": {"bytes": b"c", "path": "a"}}, [{"bytes": b"c", "path": "a"}]),
        ({"messages": [{"content": [PART, {"type": "text", "text": "?", "path": "x"}]}]}, ["c"]),
        ({"conversations": [{"content": [PART]}, {"content": "text"}, "no turn"]}, ["c"]),
        ({"prompt": [{"content": [PART, "no part", PART]}]}, ["c", "c"]),
        ({"prompt": "<image>"}, []),
        ({"images": ["a"], "messages": [{"content": [PART]}]}, ["a"]),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {"url": "u"}}, {"url": "v"}]}]}, ["u", "v"]),
        (
            {"messages": [{"content": [{"image": {"bytes": b"c"}}, {"path": "p", "image": None}]}]},
            [{"bytes": b"c"}, "p"],
        ),
        ({"messages": [{"content": [{"type": "image"}, {"type": "image", "image_url": None}]}]}, []),
    ],
)
def test_a_record_names_its_images_under_several_keys(record, images):
    assert images_of(record) == images


@pytest.mark.parametrize(
    ("turn", "role", "text"),
    [
        ({"from": "human", "value": "a"}, "user", "a"),
        ({"from": None, "role": "user", "value": None, "content": "a"}, "user", "a"),
        ({"role": "user", "value": "a", "content": "b"}, "user", "a"),
        ({"from": "user", "content": [{"text": "a"}, {"type": "text", "text": "b"}]}, "user", "a\nb"),
        ({"from": "gpt", "value": "a"}, "assistant", "a"),
        ({"role": "assistant", "content": [{"type": "text", "text": "<b>"}]}, "assistant", "<b>"),
    ],
)
def test_a_turn_names_its_role_and_text_in_several_ways(turn, role, text):
    other = {"from": "gpt", "value": "x"} if role == "user" else {"from": "human", "value": "x"}
    conversation = to_messages({"conversations": [turn, other] if role == "user" else [other, turn]})
    message = conversation[role == "assistant"]
    assert (message["role"], text_of(message)) == (role, text)


@pytest.mark.parametrize(
    ("record", "images", "reason"),
    [
        ({"images": [None, "a.png", None]}, 1, None),
        ({"images": [None], "image": "a.png"}, 1, None),
        ({"images": None, "image": ["a.png"]}, 1, None),
        ({"images": [None, None]}, 1, "1 <image> tags for 0 pictures"),
        ({"image": "a.png", "conversations": turns(f"{QUESTION} <audio>", "x")}, 1, "a <video> or <audio> tag"),
        ({"image": "a.png", "conversations": [{"from": "system", "value": "<image>"}, *turns("?", "x")]}, 1,
         "<image> in a turn of role system"),
    ],
)  # fmt: skip
def test_nulls_count_as_absent_and_misplaced_tags_are_errors(tmp_path, record, images, reason):
    (tmp_path / "a.png").write_bytes(PNGS[0])
    record = {"id": 0, "conversations": turns(QUESTION, "x")} | record
    (tmp_path / "chat.json").write_text(json.dumps([{"id": None, "caption": "x"}, record]))
    (row,) = load_records(str(tmp_path))[0].select([1])
    assert row["id"] == "0"
    assert (reason is None and row["error"] is None) or reason in row["error"]
    assert len(row["images"]) == (images if reason is None else 0)


@pytest.mark.parametrize(("key", "off", "on"), [("weight", 0, 1), ("loss", False, True), ("train", False, None)])
def test_an_answer_that_is_not_to_be_learnt_has_no_labels_and_is_not_asked(tmp_path, processor, key, off, on):
    """As OpenAI, ms-swift and axolotl mark it, in JSON and in a column of Parquet."""
    texts = ["One?", "first", "Two?", "second", "Three?", "third"]
    flags = [on, off, off, on, None, off]
    records = []
    for names in (("from", "human", "gpt", "value"), ("role", "user", "assistant", "content")):
        marked = []
        for i, (text, flag) in enumerate(zip(texts, flags, strict=True)):
            marked.append({names[0]: names[1 + i % 2], names[3]: text, key: flag})
        records.append({"conversations": marked})
    records.append({"id": "none", "conversations": records[0]["conversations"][:2]})
    (tmp_path / "chat.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records[:1]), tmp_path / "a.parquet")
    chat = Chat(processor)
    for path in (tmp_path, tmp_path / "a.parquet"):
        dataset = LlavaDataset(str(path))
        for i in range(len(dataset) - (path == tmp_path)):
            sample = to_sample(dataset[i], chat)
            assert chat.tokenizer.decode(sample.labels[sample.labels != IGNORE]) == "second<|im_end|>"
            assert "first<|im_end|>" in chat.tokenizer.decode(sample.input_ids)
            assert [question["reference"] for question in questions(dataset[i])] == ["second"]
    with pytest.raises(BadRecordError, match="no token to learn"):
        to_sample(LlavaDataset(str(tmp_path))[2], chat)


def test_an_answer_alone_is_a_caption_and_a_caption_may_have_several_images():
    for key in ("caption", "text", "answer"):
        conversation = to_messages({"file_names": ["a", "b"], key: "red"})
        assert list(map(text_of, conversation)) == ["<image>\n<image>\nDescribe this picture.", "red"]
    assert table_row({"caption": "red"}, 0)["error"] == "1 <image> tags for 0 pictures"


@pytest.mark.parametrize("key", ["language", "references", "answers"])
def test_half_a_surrogate_pair_is_an_error_of_its_record(key):
    row = table_row({"prompt": "a", "completion": "b", key: "\ud800"}, 3)
    assert (row["id"], row["error"]) == (
        "3",
        "it is not in UTF-8 (save it anew with this encoding), or holds half of a surrogate pair",
    )
    assert table_row({"id": "\ud800", "prompt": "a"}, 3)["id"] == "\\ud800"


def test_every_bad_record_is_refused_with_its_reason(bad_data, processor):
    root, reasons = bad_data
    dataset, collator = LlavaDataset(str(root)), LlavaCollator(processor, max_length=200)
    refused = {}
    for i in range(len(dataset)):
        try:
            to_sample(dataset[i], collator.chat)
        except BadRecordError as error:
            refused[error.args[0]] = error.args[1]
    assert refused.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in refused[name], name
