"""From the token ids of an answer to its text."""

from functools import lru_cache

from train_llava.chat import Chat


def answer_text(chat: Chat, token_ids: list[int]) -> str:
    """The text of an answer's tokens. Its own indentation stays; the template's white space does not."""
    text, prefix = decode(chat, token_ids).rstrip(), answer_prefix(chat)
    return text.lstrip() if prefix is None else text.removeprefix(prefix)


@lru_cache(maxsize=8)
def answer_prefix(chat: Chat) -> str | None:
    """The white space before an answer, measured on one; None if no answer can be supervised."""
    messages = [{"role": role, "content": [{"type": "text", "text": "red"}]} for role in ("user", "assistant")]
    try:
        token_ids, supervised = chat.tokenize(messages)
    except ValueError:
        return None
    return decode(chat, token_ids[supervised].tolist()).partition("red")[0]


def decode(chat: Chat, token_ids: list[int]) -> str:
    """Tokens as text without special tokens. They are decoded behind an "a": first in a text, a space is lost."""
    before = chat.tokenizer("a", add_special_tokens=False)["input_ids"]
    texts = [chat.tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, [*before, *token_ids])]
    return texts[1].removeprefix(texts[0])
