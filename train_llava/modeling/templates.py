r"""Measures a chat template by its output, and patches it so that it fits a LLaVA.

No template is known by name. It renders a conversation whose texts are marks. The template segments are the texts
between the marks. Around a question and an answer, for example, ChatML's segments are

    "<|im_start|>user\n"    "<|im_end|>\n<|im_start|>assistant\n"    "<|im_end|>\n"

A ValueError says why a template refuses a conversation, or cannot be used.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from train_llava.records import IMAGE_TOKEN, text_of

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")  # settings of a generation config
MARK = "\ue000{}\ue001"  # characters of Unicode's private use stand in no template
TAG = r"[<\[]\w[\w:]*[>\]]"  # begins a thought, for example: <think>
# A conversation's messages, as (role, the types of its parts)
TurnStructure = tuple[tuple[str, tuple[str, ...]], ...]
QUESTION, ANSWER = ("user", ("text",)), ("assistant", ("text",))
TWO_TURNS = (QUESTION, ANSWER, QUESTION, ANSWER)
# Put in front of a template, each changes the messages that it renders
AS_PARTS, AS_STRING, AS_ONE_PART, ENDED_ANSWERS = (
    Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("content_as_parts", "content_as_string", "content_as_one_part", "ended_answers")
)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answer_next: bool = False) -> str:
    """A conversation as the chat template writes it; with `answer_next`, up to where the answer begins."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(f"the chat template refuses it: {error}") from error


def template_segments(
    tokenizer: PreTrainedTokenizerBase, structure: TurnStructure, answer_next: bool = False
) -> list[str]:
    """A template's own text around the texts of a conversation: before the first, between two, after the last."""
    messages, numbers = [], []
    for role, part_types in structure:
        content = []
        for part_type in part_types:
            content.append({"type": part_type})
            if part_type == "text":
                numbers.append(str(len(numbers)))
                content[-1]["text"] = MARK.format(numbers[-1])
        messages.append({"role": role, "content": content})
    rendered = render(tokenizer, messages, answer_next)
    if re.findall(MARK.format(r"(\d+)"), rendered) != numbers:
        roles = ", ".join(role for role, _ in structure)
        raise ValueError(f"the chat template does not write each text of {roles} once, in order")
    return re.split(MARK.format(r"\d+"), rendered)


def assistant_prefixes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """A template's text before an earlier answer and before the last one, and its generation prompt."""
    _, earlier, _, last, _ = template_segments(tokenizer, TWO_TURNS)
    return earlier, last, template_segments(tokenizer, (QUESTION,), answer_next=True)[1]


def opens_like(prefix: str, prompt: str) -> bool:
    """Whether an answer's prefix is the generation prompt, perhaps with white space for the model to write."""
    return prefix.startswith(prompt) and not prefix.removeprefix(prompt).strip()


def end_of_text(written: str, text: str, begin: int, before: str, after: str) -> int | None:
    """Where `text` ends in `written`, which from `begin` on holds `before`, the text and `after`.

    A template may strip white space from both ends of the text. None: it changes the text otherwise. For
    example, `end_of_text("<u>red <e>", " red \\n", 0, "<u>", "<e>")` is 7: the leading space and the line
    break are stripped.
    """
    core = text.strip()
    leading, trailing = text.split(core, 1)
    # As much of the leading white space as the template has kept, then of the trailing
    for first in range(len(leading) + 1):
        opening = before + leading[first:] + core
        if written.startswith(opening, begin):
            break
    else:
        return None
    end = begin + len(opening)
    for length in range(len(trailing), -1, -1):
        if written.startswith(trailing[:length] + after, end):
            return end + length
    return None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The special tokens, by which a template marks turns."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def end_of(tokenizer: PreTrainedTokenizerBase, segment: str) -> str | None:
    """The token that ends an answer: the first special one in the segment after it; None: there is none.

    The token that begins texts ends no answer, unless it also ends texts.
    """
    tokens = special_tokens(tokenizer) - ({tokenizer.bos_token} - {tokenizer.eos_token})
    match = re.search("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), segment)
    return match.group() if tokens and match else None


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that end a new answer and an earlier one, often the same: generation stops there."""
    *_, earlier, _, last = template_segments(tokenizer, TWO_TURNS)
    ends = [end_of(tokenizer, last), end_of(tokenizer, earlier)]
    # Some templates always write the generation prompt after a conversation
    if None in ends or (ends[0] != ends[1] and last == assistant_prefixes(tokenizer)[2]):
        raise ValueError("the chat template ends an answer with no special token")
    return list(dict.fromkeys(ends))


def patch_chat_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Makes a tokenizer and its chat template fit for a LLaVA, in place.

    The tokenizer pads on the left, as batched generation in plain transformers needs it. The template then
    takes pictures, in strings and in lists of parts alike, and begins a text as the tokenizer does. It ends
    every answer with a special token, and writes the same before earlier, last and generated answers.
    Returns, in words, each feature that it lacked.
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
    name, template, lacked = tokenizer.name_or_path, tokenizer.chat_template, []
    if isinstance(template, dict):  # `default` and others, such as `tool_use`
        template = template.get("default")
    if not template:
        raise ValueError(f"{name} has no chat template: take the model's chat version")
    tokenizer.chat_template = template
    try:
        # Pictures
        if prelude := _take_pictures(tokenizer):
            kind = " in strings" if prelude == AS_PARTS else ""
            lacked.append(f"a chat template that takes pictures{kind}")
        # The token that begins a text
        begins = tokenizer("?")["input_ids"][0] == tokenizer.bos_token_id
        if begins and not template_segments(tokenizer, TWO_TURNS)[0].startswith(tokenizer.bos_token):
            tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
            lacked.append(f"{tokenizer.bos_token} in its chat template")
        # The token that ends an answer
        try:
            end_of_turn_tokens(tokenizer)
        except ValueError:
            if not tokenizer.eos_token:
                raise
            tokenizer.chat_template = ENDED_ANSWERS + tokenizer.chat_template
            end_of_turn_tokens(tokenizer)
            lacked.append("an end of the answers in its chat template")
        # The assistant prefix
        if _unify_prefixes(tokenizer):
            lacked.append("the same opening of earlier, new and generated answers")
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    return lacked


def _take_pictures(tokenizer: PreTrainedTokenizerBase) -> str:
    """Makes the chat template write strings and lists of parts alike, with `<image>` for a picture.

    Returns what was put in front of it: nothing where it already does so.
    """
    # Conversations that the template has to write, as lists of parts and as strings
    text, template, required = {"type": "text", "text": "?"}, tokenizer.chat_template, []
    question = {"role": "user", "content": [text, {"type": "image"}, text]}
    turns = [question, {"role": "assistant", "content": [text]}]
    for messages in (turns, [{"role": "system", "content": [text]}, *turns]):
        strings = [message | {"content": text_of(message)} for message in messages]
        try:
            render(tokenizer, strings)
            required.append((messages, strings))
        except ValueError:  # a template need not take a system turn, and some take no strings yet
            if messages is turns:
                required.append((messages, strings))

    # The first prelude with which it writes both alike
    for prelude in ("", AS_PARTS, AS_STRING, AS_STRING + AS_ONE_PART):
        tokenizer.chat_template = prelude + template
        try:
            pairs = [(render(tokenizer, parts), render(tokenizer, strings)) for parts, strings in required]
        except ValueError as error:
            reason = str(error)
            continue
        if all(parts == strings and parts.count(IMAGE_TOKEN) == 1 for parts, strings in pairs):
            return prelude
        reason = f"the chat template does not write {IMAGE_TOKEN} where a text holds it"
    raise ValueError(reason)


def _unify_prefixes(tokenizer: PreTrainedTokenizerBase) -> bool:
    r"""Makes the chat template write one assistant prefix everywhere. Returns whether it had to be changed.

    Otherwise generation would continue a text that training never saw. For example, Qwen3's template writes

        before an earlier answer    "<|im_start|>assistant\n"
        before the last answer      "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        to generate an answer       "<|im_start|>assistant\n"

    and, once patched, the second of these everywhere.
    """
    earlier, last, prompt = assistant_prefixes(tokenizer)
    added = [re.escape(token) for token in tokenizer.get_added_vocab()]
    if opens_like(earlier, prompt) and opens_like(last, prompt):
        # The three differ by white space, which is left for the model to write
        longest, prefix, prefixes = max(earlier, last, key=len), prompt, [prompt]
    else:
        longest = prefix = _longest_prefix(earlier, last, prompt, "|".join([*added, TAG]))
        if earlier.rstrip() == last.rstrip() == prompt.rstrip() and not prompt.startswith((earlier, last)):
            longest = prefix = prompt  # other white space: the model was trained with that of its prompt
        prefixes = sorted({earlier, last, prefix}, key=len)
    new_prompt = _without_loose_end(tokenizer, prefix, longest)
    if prompt == new_prompt and len(prefixes) == 1:
        return False
    if len(prefixes) > 1 and not all(re.search("|".join(added), each) for each in prefixes):
        raise ValueError(f"the chat template opens answers with {earlier!r} and {last!r}, and no token tells where")

    # All prefixes become the shortest, the longest first; the shortest becomes the one that all are to have
    changes = []
    if len(prefixes) > 1:
        changes = [(each, prefixes[0]) for each in prefixes[:0:-1]] + [(prefixes[0], prefix)]
    filters = "".join(f" | replace({_quoted(old)}, {_quoted(new)})" for old, new in changes)
    # The new template renders the old one, cuts its generation prompt off, and writes the new prompt
    template = tokenizer.chat_template.removesuffix("\n")  # Jinja drops one at the end of a template
    tokenizer.chat_template = (
        f"{{%- set rendered %}}\n{template}{{{{ '' }}}}{{% endset -%}}"
        f"{{%- set prompt = {_quoted(prompt)} -%}}"
        "{%- if not add_generation_prompt or not rendered.endswith(prompt) -%}"
        "{%- set prompt = '' -%}{%- endif -%}"
        f"{{{{- rendered[:rendered | length - prompt | length]{filters} -}}}}"
        f"{{%- if prompt -%}}{{{{- {_quoted(new_prompt)} -}}}}{{%- endif -%}}"
    )
    earlier, last, prompt = assistant_prefixes(tokenizer)
    if not (opens_like(earlier, prompt) and opens_like(last, prompt)):
        raise ValueError(f"the chat template opens answers with {earlier!r} and {last!r}, a new one with {prompt!r}")
    return True


def _longest_prefix(earlier: str, last: str, prompt: str, tokens: str) -> str:
    r"""The longest prefix that the template writes before an answer, or the prompt where that adds a thought.

    An open thought is closed: "<a>", "<a>" and the prompt "<a><think>\n" give "<a><think>\n\n</think>\n\n".
    `tokens` is a pattern of special tokens and tags.
    """
    longest, shortest = max(earlier, last, key=len), min(earlier, last, prompt, key=len)
    # The prompt instead, where it goes on with a tag or with several tokens
    more = re.findall(tokens, prompt.removeprefix(longest))
    if prompt.startswith(longest) and (len(more) > 1 or re.fullmatch(TAG, "".join(more))):
        longest = prompt
    # A single tag of the prompt is a thought that stays open
    more = re.findall(tokens, longest.removeprefix(shortest))
    if len(more) == 1 and more[0] in prompt and re.fullmatch(TAG, more[0]):
        longest += f"\n{more[0][0]}/{more[0][1:]}\n\n"
    return longest


def _without_loose_end(tokenizer: PreTrainedTokenizerBase, prompt: str, prefix: str) -> str:
    """Cuts the white space off a generation prompt that the tokenizer joins with an answer's beginning."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for end in range(len(prompt), len(prompt.rstrip()) - 1, -1):
        prompt_ids = ids(prompt[:end])
        answers = [ids(prefix + answer) for answer in ("The", "a", "red", "1", "红")]
        if all(answer_ids[: len(prompt_ids)] == prompt_ids for answer_ids in answers):
            return prompt[:end]
    return prompt


def _quoted(text: str) -> str:
    """A text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def context_length(config: PreTrainedConfig) -> int:
    """How many tokens a language model reads: its positions, or more if its rotary embedding is scaled.

    Two kinds of rotary embedding (longrope, dynamic) change for all tokens of a longer text. Then a cache holds
    wrong values, and a short text depends on a long one in its batch. So the context ends before.
    """
    positions = getattr(config, "max_position_embeddings", sys.maxsize)
    rope = getattr(config, "rope_parameters", None)
    stretched, limits = [positions], []
    for settings in (rope, *(rope or {}).values()):  # of all layers, or of each kind of layer
        if not isinstance(settings, dict):
            continue
        pretrained = settings.get("original_max_position_embeddings") or positions
        if settings.get("rope_type") in ("longrope", "dynamic"):
            limits.append(pretrained if settings["rope_type"] == "longrope" else positions)
        elif settings.get("factor"):
            stretched.append(int(settings["factor"] * pretrained))
    return min([max(stretched), *limits])


def complete_generation_config(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes generation stop at every token that ends an answer, and pad, in place.

    The language model's other rules are dropped, except its settings of sampling. Its penalty on words that
    the conversation already has, for example, would keep greedy generation from the most likely answer.
    """
    for name, default in GenerationConfig().to_dict().items():
        if name not in ("bos_token_id", "eos_token_id", "do_sample", *SAMPLING):
            setattr(config, name, default)
    stops = config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    ends = tokenizer.convert_tokens_to_ids(end_of_turn_tokens(tokenizer))
    config.eos_token_id = [*(end for end in ends if end not in stops), *stops]
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:  # transformers refuses to save settings of sampling without sampling
        for name in SAMPLING:
            setattr(config, name, None)
