"""White space is text: code and Chinese paragraphs are learnt, asked and answered as the data have them."""

from pathlib import Path

import numpy as np
import pytest
from test_chat import CASES, PLAIN, chat_of, marked, parts_only, roles

from train_llava.chat import IGNORE
from train_llava.evaluation.generation import answer_text
from train_llava.evaluation.questions import read_question
from train_llava.records import IMAGE_TOKEN, text_of, to_messages

ANSWERS = [
    "    return x",
    "　　第一段。\n\n　　第二段。",
    "\n\nred",
    "\tred\n",
    " red ",
    "a\n\n\nb \n",
    "\u00a0red\u2003",
]


def parts_of(text: str) -> list[str]:
    pictures = text.count(IMAGE_TOKEN)
    record = {"images": ["a.png"] * pictures, "prompt": text, "completion": "x"}
    return [part.get("text", IMAGE_TOKEN) for part in to_messages(record)[0]["content"]]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>\nWhat?", ["<image>", "What?"]),
        ("What?\n<image>", ["What?", "<image>"]),
        ("<image>\r\nWhat?\r\n<image>", ["<image>", "What?", "<image>"]),
        ("<image>\n\n  What?\n", ["<image>", "\n  What?\n"]),
        ("a\n\n<image>\n\nb", ["a\n", "<image>", "\nb"]),
        ("And <image>?", ["And ", "<image>", "?"]),
        ("<image><image>\n<image>\n?", ["<image>", "<image>", "<image>", "?"]),
        ("<image> \n\n <image>\n  ", ["<image>", "<image>"]),
        ("　　什么？\n", ["　　什么？\n"]),
        ("  a\n  <image>\n    b", ["  a\n  ", "<image>", "    b"]),
    ],
)
def test_only_the_line_break_at_a_tag_is_removed(text, parts):
    assert parts_of(text) == parts


STRIPS = {
    "all": ("m.content | trim", str.strip),
    "line breaks in front": ("m.content.lstrip('\\n')", lambda text: text.lstrip("\n")),
    "line breaks around": ("m.content.strip('\\n')", lambda text: text.strip("\n")),
    "behind": ("m.content.rstrip()", str.rstrip),
}


def trimming(how: str) -> str:
    return PLAIN.replace("m.content", f"({STRIPS[how][0]})")


def learnt(chat, answer: str, question: str = "What?") -> str:
    text = marked(chat, question, answer, question, answer)
    first, last = text.split("»")[1:]
    assert first.partition("«")[0] == last.partition("«")[0]
    return first.partition("«")[0]


@pytest.mark.parametrize("name", ["the same for all", "white space around answers", "a prompt that ends with a space"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_supervised_with_its_white_space(tmp_path, name, answer):
    chat = chat_of(tmp_path, CASES[name][0])
    around = CASES[name][1].partition("»")[2].partition("«")[0].split("red")
    assert learnt(chat, answer) == f"{around[0]}{answer}{around[1]}"
    record = {"prompt": "What?", "completion": answer}
    input_ids, labels = chat.encode(to_messages(record))
    assert answer_text(chat, input_ids[labels != IGNORE].tolist()) == answer.rstrip()
    begin = int(np.flatnonzero(labels != IGNORE)[0])
    asked = chat.prompts([read_question({"prompt": "What?"}, 0, Path())["messages"]], [])["input_ids"][0]
    assert asked.tolist() == input_ids[:begin].tolist()


@pytest.mark.parametrize("how", STRIPS)
@pytest.mark.parametrize("text", ANSWERS)
def test_a_template_may_strip_the_ends_of_texts(tmp_path, how, text):
    chat = chat_of(tmp_path, trimming(how))
    stripped = STRIPS[how][1]
    assert learnt(chat, text, text) == f"{stripped(text)}<e>"
    assert f"<u>{stripped(f'<image>{chr(10)}{text}')}<e>" in marked(chat, text, "x")


def test_a_template_that_changes_more_than_the_ends_is_refused(tmp_path):
    for change in ("replace(' ', '')", "replace('　', '')", "replace('c', '')"):
        chat = chat_of(tmp_path, PLAIN.replace("m.content", f"(m.content | {change})"))
        with pytest.raises(ValueError, match="the chat template changes the text of a turn of role assistant"):
            marked(chat, "?", "　a b　c")


def test_a_line_break_that_the_tokenizer_joins_to_the_prompt_is_supervised_apart(tmp_path, monkeypatch):
    """Generation goes on from the prompt's own tokens, and so does training."""
    monkeypatch.setattr("conftest.SENTENCES", ["a red square", "two line breaks\n\n"])  # which are one token
    chat = chat_of(tmp_path, roles("<u>CONTENT<e>\\n", "<a>x\\nCONTENT<e>\\n", "<a>x\\n"))
    assert len(chat.tokenizer("\n\n")["input_ids"]) == 1
    for answer in ("\nred", "\n\nred\n\n", "red"):
        assert learnt(chat, answer) == f"{answer}<e>"
        messages = to_messages({"prompt": "What?", "completion": answer})
        input_ids, labels = chat.encode(messages)
        begin = int(np.flatnonzero(labels != IGNORE)[0])
        assert chat.prompts([messages[:1]], [])["input_ids"][0].tolist() == input_ids[:begin].tolist()
        assert chat.tokenizer.decode(input_ids) == chat.answer_spans(messages)[0]


@pytest.mark.parametrize("template", [PLAIN, parts_only("<image>"), parts_only("<pic>"), trimming("all")])
@pytest.mark.parametrize("text", ["<image>\n  a\n", "a \n<image>\n\n b", " a\n<image>", "<image>\n<image>\n　a"])
def test_strings_and_parts_are_written_alike(tmp_path, template, text):
    """As pipelines send strings, and this repo sends parts."""
    chat = chat_of(tmp_path, template)
    record = {"images": ["a.png"] * text.count(IMAGE_TOKEN), "prompt": text, "completion": "    x\n"}
    messages = to_messages(record)
    strings = [message | {"content": text_of(message)} for message in messages]
    written = [chat.processor.apply_chat_template(each) for each in (messages, strings)]
    assert written[0] == written[1]
