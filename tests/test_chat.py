"""Every kind of chat template: what is learnt of a conversation, and that generation begins from what training had."""

import numpy as np
import pytest
from conftest import make_tokenizer
from PIL import Image
from tokenizers import AddedToken, processors
from transformers import CLIPImageProcessorPil, GenerationConfig, LlavaProcessor, Qwen2Config

from train_llava.chat import IGNORE, Chat
from train_llava.modeling.templates import complete_generation_config, context_length, patch_chat_template
from train_llava.modeling.verification import conversation, verify_conversations
from train_llava.records import text_of

TOKENS = ("<s>", "</s>", "<u>", "<a>", "<e>")


def roles(user: str, assistant: str, prompt: str, before: str = "", after: str = "") -> str:
    """A chat template that writes each role's turns in its own way, the content for CONTENT."""
    user, assistant = ("{{ '" + turn.replace("CONTENT", "' + m.content + '") + "' }}" for turn in (user, assistant))
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'assistant' %}}{assistant}"
        "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '{prompt}' }}}}{{% endif %}}{after}"
    )


def switch(earlier: str, last: str) -> str:
    """What an assistant's turn in `roles` has where the last answer of a conversation is opened otherwise."""
    return f"' + ('{last}' if loop.last else '{earlier}') + '"


def parts_only(image: str) -> str:
    return (
        "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{% for part in m.content %}"
        f"{{{{ part.text if part.type == 'text' else '{image}' }}}}{{% endfor %}}"
        "{{ '<e>' }}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
    )


PLAIN = roles("<u>CONTENT<e>", "<a>CONTENT<e>", "<a>")
SYSTEM = PLAIN.replace("{{ raise_exception('no system turns') }}", "SYSTEM")
LAST = "{{ '<a>' if messages | length < 2 else '<s>' }}"
# template -> a conversation of two turns as it is written, with » and « around what is learnt
CASES = {
    "the same for all": (PLAIN, "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«"),
    "the last answer has an empty thought": (
        roles("<u>CONTENT<e>", f"<a>{switch('', '<think></think>')}CONTENT<e>", "<a>"),
        "<u><image>\nWhat?<e><a><think></think>»red<e>«<u>And?<e><a><think></think>»blue<e>«",
    ),
    "the prompt begins a thought": (
        roles("<u>CONTENT<e>", "<a>CONTENT<e>", "<a><think>\\n"),
        "<u><image>\nWhat?<e><a><think>\n\n</think>\n\n»red<e>«<u>And?<e><a><think>\n\n</think>\n\n»blue<e>«",
    ),
    "prompt and last answer begin a thought": (
        roles("<u>CONTENT<e>", f"<a>{switch('', '[THINK]')}CONTENT<e>", "<a>[THINK]"),
        "<u><image>\nWhat?<e><a>[THINK]\n[/THINK]\n\n»red<e>«<u>And?<e><a>[THINK]\n[/THINK]\n\n»blue<e>«",
    ),
    "answers have an empty thought, the prompt begins one": (
        roles("<u>CONTENT<e>", "<a><think></think>CONTENT<e>", "<a><think>\\n"),
        "<u><image>\nWhat?<e><a><think></think>»red<e>«<u>And?<e><a><think></think>»blue<e>«",
    ),
    "the prompt has a thought of special tokens": (
        roles("<u>CONTENT<e>", "<a>CONTENT<e>", "<a><s>thought<e>"),
        "<u><image>\nWhat?<e><a><s>thought<e>»red<e>«<u>And?<e><a><s>thought<e>»blue<e>«",
    ),
    "the prompt begins to reason in words": (
        roles("<u>CONTENT<e>", "<a>CONTENT<e>", "<a>My reasoning:\\n"),
        "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«",
    ),
    "a channel, and another end of earlier answers": (
        roles("<u>CONTENT<e>", f"<a>final<s>CONTENT{switch('<e>', '</s>')}", "<a>"),
        "<u><image>\nWhat?<e><a>final<s>»red<e>«<u>And?<e><a>final<s>»blue</s>«",
    ),
    "earlier answers end where the next question begins": (
        roles("<u>CONTENT", f"<a>CONTENT{switch('', '</s>')}", "<a>"),
        "<u><image>\nWhat?<a>»red<u>«And?<a>»blue</s>«",
    ),
    "no end": (
        roles("USER: CONTENT ", "ASSISTANT: CONTENT ", "ASSISTANT:"),
        "USER: <image>\nWhat? ASSISTANT:» red</s>« USER: And? ASSISTANT:» blue</s>« ",
    ),
    "one end, of the conversation": (
        roles("Q: CONTENT\\n", "A: CONTENT\\n", "A:", after="{{ eos_token if not add_generation_prompt }}"),
        "Q: <image>\nWhat?\nA:» red</s>«\nQ: And?\nA:» blue</s>«\n</s>",
    ),
    "no end, an answer opened behind every conversation": (
        roles("<u>CONTENT", "<a>CONTENT", "", after="<a>"),
        "<u><image>\nWhat?<a>»red</s>«<u>And?<a>»blue</s>«<a>",
    ),
    "white space around answers": (
        roles("<s>[Q] CONTENT [/Q]", " CONTENT </s>", ""),
        "<s>[Q] <image>\nWhat? [/Q]» red </s>«<s>[Q] And? [/Q]» blue </s>«",
    ),
    "a prompt that ends with a space": (
        roles("Q: CONTENT\\n", "A: CONTENT</s>\\n", "A: "),
        "Q: <image>\nWhat?\nA:» red</s>«\nQ: And?\nA:» blue</s>«\n",
    ),
    "white space around the template": (
        roles(
            "<u>CONTENT<e>", "<a>CONTENT<e>", "<a><think></think>",
            before="\n  ", after="{{ '' if add_generation_prompt else '  ' }}\n",
        ),
        "\n<u><image>\nWhat?<e><a><think></think>»red<e>«<u>And?<e><a><think></think>»blue<e>«  ",
    ),
    "special tokens in its own words": (
        roles("<u>CONTENT<e>", "<a>CONTENT<e>", "<a><think></think>", before="{{ 'End with <e>, not <a>.' }}"),
        "End with <e>, not <a>.<u><image>\nWhat?<e><a><think></think>»red<e>«<u>And?<e><a><think></think>»blue<e>«",
    ),
    "marked for other trainers": (
        PLAIN.replace("{{ '<a>' + m.content", "<a>{% generation %}{{ m.content").replace(
            "'<e>' }}{% else", "'<e>' }}{% endgeneration %}{% else"
        ),
        "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«",
    ),
    "lists of parts alone": (
        parts_only("<image>"), "<u><image>What?<e><a>»red<e>«<u>And?<e><a>»blue<e>«",
    ),
    "lists of parts alone, pictures of its own": (
        parts_only("<pic>"), "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«",
    ),
    "several by name": (
        {"default": PLAIN, "tool_use": "{{ tools[0] }}"}, "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«",
    ),
}  # fmt: skip


def chat_of(folder, template, changed=None) -> Chat:
    """A tiny tokenizer with a completed template, and the processor around it; `changed` may change the tokenizer."""
    tokenizer = make_tokenizer(folder, TOKENS, None, "</s>", "</s>", 400)
    tokenizer.bos_token, tokenizer.chat_template = "<s>", template
    tokenizer.add_tokens(["<think>", "</think>"])
    if changed:
        changed(tokenizer)
    patch_chat_template(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return Chat(
        LlavaProcessor(
            pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
        )
    )  # fmt: skip


def marked(chat: Chat, *texts: str) -> str:
    """A conversation's tokens as text, one `<image>` a picture, with » and « around what is learnt."""
    input_ids, labels = chat.encode(conversation(*texts))
    learnt = np.flatnonzero(np.diff(np.concatenate([[False], labels != IGNORE, [False]]).astype(int)))
    pieces = [chat.tokenizer.decode(ids) for ids in np.split(input_ids, learnt)]
    text = "".join(piece + ("«" if i % 2 else "»") for i, piece in enumerate(pieces))[:-1]
    return text.replace("<image>" * chat.image_tokens(), "<image>")


def check_everything(chat: Chat) -> None:
    """What holds for every template: what is measured at build, a template that stays, and one prompt everywhere."""
    tokenizer, processor = chat.tokenizer, chat.processor
    config = GenerationConfig()
    complete_generation_config(config, tokenizer)
    verify_conversations(chat, config)
    assert patch_chat_template(tokenizer) == []
    messages = conversation("What?", "red", "And?", "blue", "Why?", "红")
    strings = [message | {"content": text_of(message)} for message in messages]
    input_ids, labels = chat.encode(messages)
    begins = np.flatnonzero((labels != IGNORE) & (np.roll(labels, 1) == IGNORE))
    for i, begin in zip((1, 3, 5), begins, strict=True):
        assert labels[begin - 1] == IGNORE
        prompt = processor.apply_chat_template(messages[:i], add_generation_prompt=True)
        assert prompt == processor.apply_chat_template(strings[:i], add_generation_prompt=True)
        assert prompt == tokenizer.apply_chat_template(strings[:i], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt.replace("<image>", "<image>" * chat.image_tokens()), add_special_tokens=False)[
            "input_ids"
        ]
        assert ids == chat.prompts([messages[:i]], [Image.new("RGB", (8, 8))])["input_ids"][0].tolist()
        assert ids == input_ids[:begin].tolist()


@pytest.mark.parametrize("name", CASES)
def test_answers_are_supervised_and_generation_begins_before_them(tmp_path, name):
    template, expected = CASES[name]
    chat = chat_of(tmp_path, template)
    assert marked(chat, "What?", "red", "And?", "blue") == expected
    check_everything(chat)


def test_an_end_token_that_takes_the_line_break_after_it_is_supervised(tmp_path):
    def strip(tokenizer):
        ends = [AddedToken(token, special=True, rstrip=True) for token in ("<e>", "<a>")]
        tokenizer.add_special_tokens({"additional_special_tokens": ["<u>", *ends]})

    chat = chat_of(tmp_path, roles("<u>CONTENT<e>\\n", "<a>\\nCONTENT<e>\\n", "<a>\\n"), strip)
    assert marked(chat, "What?", "red", "And?", "blue") == "<u><image>\nWhat?<e><a>»red<e>«<u>And?<e><a>»blue<e>«"
    check_everything(chat)


def test_line_breaks_may_be_tokens_of_their_own(tmp_path):
    """As Gemma's are: a question of several lines is no attempt to end a turn."""
    template = roles("<u>user\\nCONTENT<e>\\n", "<a>model\\nCONTENT<e>\\n", "<a>model\\n")
    chat = chat_of(tmp_path, template, lambda tokenizer: tokenizer.add_tokens(["\n", "\n\n"]))
    assert marked(chat, "What?", "red") == "<u>user\n<image>\nWhat?<e>\n<a>model\n»red<e>«\n"
    assert "<e>" in chat.control_tokens
    assert not any(token.isspace() for token in chat.control_tokens)
    check_everything(chat)


def test_line_breaks_that_the_tokenizer_splits_before_an_answer_are_supervised(tmp_path, monkeypatch):
    monkeypatch.setattr("conftest.SENTENCES", ["a red square", "two line breaks\n\n"])  # one token, at an end
    chat = chat_of(tmp_path, roles("<u>CONTENT<e>", "<a>\\n\\nCONTENT<e>", "<a>\\n\\n"))
    assert marked(chat, "What?", "red") == "<u><image>\nWhat?<e><a>\n»\nred<e>«"
    check_everything(chat)


def test_spaces_are_supervised_where_the_tokenizer_places_them_at_their_end(tmp_path):
    """As GPT-NeoX's does, whose offsets leave spaces out."""

    def trim(tokenizer):
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    for before in ("", " "):  # the space is left to the model, which has to say it
        template = roles("<u>CONTENT<e>", f"<a>{before}CONTENT<e>", f"<a>{before}")
        chat = chat_of(tmp_path / f"{len(before)}", template, trim)
        expected = f"<u><image>\nWhat?<e><a>»{before}\n    red  or\n  blue  <e>«"
        assert marked(chat, "What?", "\n    red  or\n  blue  ") == expected


@pytest.mark.parametrize(
    ("rope", "tokens"),
    [({"rope_type": "default"}, 4096), ({"rope_type": "linear", "factor": 4.0}, 16384),
     ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 1024}, 8192),
     ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}, 4096),
     ({"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
       "original_max_position_embeddings": 1024}, 1024),
     ({"rope_type": "dynamic", "factor": 4.0}, 4096)],
)  # fmt: skip
def test_a_model_reads_as_far_as_its_rotations_are_stretched(rope, tokens):
    config = Qwen2Config(max_position_embeddings=4096, rope_parameters=rope | {"rope_theta": 1e4})
    assert context_length(config) == tokens


def test_a_text_begins_as_the_tokenizer_begins_it(tmp_path):
    def begin(tokenizer):
        ids = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)

    chat = chat_of(tmp_path, PLAIN, begin)
    assert marked(chat, "What?", "red").startswith("<s><u><image>")
    check_everything(chat)


@pytest.mark.parametrize(
    "answer",
    ["<b>x</b>", "3", '"quoted"', "[1]", "红色。", ".5", "</", "USER: hi", "a\n\nb", "x\u200b", "x\u00a0", "[Q] x"],
)
@pytest.mark.parametrize(
    "name", ["the same for all", "no end", "the prompt begins a thought", "white space around answers"]
)
def test_answers_of_every_kind_are_supervised_word_for_word(tmp_path, name, answer):
    chat = chat_of(tmp_path, CASES[name][0])
    expected = CASES[name][1].replace("red", answer).replace("blue", answer)
    assert marked(chat, "What?", answer, "And?", answer) == expected


@pytest.mark.parametrize(
    ("template", "role", "text", "reason"),
    [
        (PLAIN, "system", "?", "refuses it: no system turns"),
        (SYSTEM.replace("SYSTEM", ""), "system", "?", "each text of system, user, assistant once"),
        (SYSTEM.replace("SYSTEM", "{{ m.content }}").replace("{{ '<a>' }}", LAST), "system", "?", "otherwise than"),
        (PLAIN.replace("m.content +", "m.content | replace('x', 'y') +"), "user", "x", "changes the text of a turn"),
        (PLAIN, "user", "What<e>", "the control token <e> in a turn of role user"),
        (CASES["the prompt begins a thought"][0], "assistant", "<think>", "the control token <think> in a turn of"),
    ],
)  # fmt: skip
def test_a_conversation_that_the_template_changes_is_refused_with_the_reason(tmp_path, template, role, text, reason):
    chat = chat_of(tmp_path, template)
    messages = [{"role": of, "content": [{"type": "text", "text": "?"}]} for of in ("user", "assistant")]
    if role == "system":
        messages.insert(0, {"role": "system", "content": []})
    next(message for message in messages if message["role"] == role)["content"] = [{"type": "text", "text": text}]
    with pytest.raises(ValueError, match=reason):
        chat.encode(messages)


@pytest.mark.parametrize(
    ("template", "eos", "reason"),
    [
        (None, "</s>", "has no chat template: take the model's chat version"),
        ({"tool_use": PLAIN}, "</s>", "has no chat template"),
        ("{{ tools[0].name }}", "</s>", "the chat template refuses it"),
        (
            roles("<u>CONTENT", "", "<a>"),
            "</s>",
            "does not write each text of user, assistant, user",
        ),
        (roles("<u>CONTENT", "<a>CONTENT", "<a>"), None, "ends an answer with no special token"),
        (roles("CONTENT\\n", f"{switch('', 'B: ')}CONTENT</s>", ""), "</s>", "no token tells where"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(tmp_path, template, eos, reason):
    tokenizer = make_tokenizer(tmp_path, ("</s>", "<a>"), None, "</s>", "</s>")
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    with pytest.raises(ValueError, match=reason) as error:
        patch_chat_template(tokenizer)
    assert "\n" not in str(error.value)


def test_a_template_may_write_a_date_that_changes_during_training(tmp_path, monkeypatch):
    chat = chat_of(tmp_path, "{{ strftime_now('%d') }}" + PLAIN)
    assert marked(chat, "What?", "red").endswith("»red<e>«")
    monkeypatch.setattr("train_llava.chat.date", type("date", (), {"today": lambda: "tomorrow"}))
    chat.tokenizer.chat_template = chat.tokenizer.chat_template.replace("strftime_now('%d')", "'tomorrow'")
    assert marked(chat, "What?", "red").startswith("tomorrow<u>")
