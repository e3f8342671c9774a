"""What a chat template writes around each text, and how a language model's template is made fit for a LLaVA.

Nothing is known by name. A template is asked: it renders conversations whose texts are marks, and what stands between
the marks is what it writes around a text (see `template_segments`).
"""

import json
import re
import sys
from itertools import count
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from train_llava.records import IMAGE_TOKEN, text_of

# of a generation config, what draws a token among the likely ones
DRAWING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

MARK = "\ue000{}\ue001"  # characters of Unicode's private use stand in no template
TurnStructure = tuple[
    tuple[str, tuple[str, ...]], ...
]  # the roles of a conversation, and of what kinds a message's parts are
QUESTION, ANSWER = ("user", ("text",)), ("assistant", ("text",))
TAG = r"[<\[]\w[\w:]*[>\]]"  # begins a thought, say
TWO_TURNS = (QUESTION, ANSWER, QUESTION, ANSWER)
AS_PARTS, AS_STRING, AS_ONE_PART, ENDED_ANSWERS = (
    Path(__file__).with_name(f"{name}.jinja").read_text(encoding="utf-8")
    for name in ("content_as_parts", "content_as_string", "content_as_one_part", "ended_answers")
)


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answer_next: bool = False) -> str:
    """A conversation as the chat template writes it; with `answer_next`, up to where the assistant's answer begins.

    Raises:
        ValueError: the template does not take such a conversation; the message is its reason.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    except Exception as error:  # a template is a program: besides its own refusals, anything
        raise ValueError(f"the chat template refuses it: {error}") from error


def template_segments(tokenizer: PreTrainedTokenizerBase, form: TurnStructure, answer_next: bool = False) -> list[str]:
    """What the chat template writes around the texts of a conversation: before the first, between two, after the last.

    Raises:
        ValueError: it does not take such a conversation, or does not write each text once, in order.
    """
    numbers, messages = count(), []
    for role, kinds in form:
        parts = [{"type": kind} | ({"text": MARK.format(next(numbers))} if kind == "text" else {}) for kind in kinds]
        messages.append({"role": role, "content": parts})
    text = render(tokenizer, messages, answer_next)
    if re.findall(MARK.format(r"(\d+)"), text) != [str(i) for i in range(next(numbers))]:
        roles = ", ".join(role for role, _ in form)
        raise ValueError(f"the chat template does not write each text of a conversation of {roles} once, in order")
    return re.split(MARK.format(r"\d+"), text)


def assistant_prefixes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """What the chat template writes in front of an earlier answer, the last one, and one that is to be generated."""
    _, earlier, _, last, _ = template_segments(tokenizer, TWO_TURNS)
    return earlier, last, template_segments(tokenizer, (QUESTION,), answer_next=True)[1]


def opens_like(opening: str, prompt: str) -> bool:
    """Whether an answer's opening is the generation prompt and, at most, white space, which the model has to say."""
    return opening.startswith(prompt) and not opening.removeprefix(prompt).strip()


def end_of_text(written: str, text: str, begin: int, before: str, after: str) -> int | None:
    """Where `text` ends in `written`, which from `begin` on holds `before`, the text and `after`.

    A template may strip white space from both ends of the text. None: it changes the text otherwise. For example,
    `end_of_text("<u>red <e>", " red \\n", 0, "<u>", "<e>")` is 7: the leading space and the line break are stripped.
    """
    core = text.strip()
    leading, trailing = text.split(core, 1)
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
    """The tokens that are no text: of these a template builds turns."""
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def end_of(tokenizer: PreTrainedTokenizerBase, piece: str) -> str | None:
    """The token that ends an answer: the first special one of what is written behind it; None where there is none.

    The token that texts begin with ends no answer, unless it ends texts, too.
    """
    tokens = special_tokens(tokenizer) - ({tokenizer.bos_token} - {tokenizer.eos_token})
    match = re.search("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))), piece)
    return match.group() if tokens and match else None


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens that end an answer, where generation must stop: a new answer's first, then an earlier one's.

    Most templates end both by the same token.

    Raises:
        ValueError: the template ends an answer with no special token.
    """
    *_, earlier, _, last = template_segments(tokenizer, TWO_TURNS)
    ends = [end_of(tokenizer, last), end_of(tokenizer, earlier)]
    # some templates write what opens a new answer behind every conversation, asked for or not
    if None in ends or (ends[0] != ends[1] and last == assistant_prefixes(tokenizer)[2]):
        raise ValueError("the chat template ends an answer with no special token")
    return list(dict.fromkeys(ends))


def patch_chat_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Makes a tokenizer and its chat template fit for a LLaVA, in place, and says what the template lacked.

    The tokenizer pads on the left, or batches that plain transformers pads get other answers. The template takes
    pictures, in strings and in lists of parts alike; begins a text as the tokenizer does; ends every answer with a
    special token; and writes the same in front of earlier, new and generated answers.

    Raises:
        ValueError: there is no chat template, or none that this can be done to; the message says which and why.
    """
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the second is what is saved
    name, template, lacked = tokenizer.name_or_path, tokenizer.chat_template, []
    if isinstance(template, dict):  # `default` beside others, such as `tool_use`
        template = template.get("default")
    if not template:
        raise ValueError(f"{name} has no chat template: take the model's chat version")
    tokenizer.chat_template = template
    try:
        prelude = _take_pictures(tokenizer)
        if prelude:
            lacked.append(f"a chat template that takes pictures{' in strings' * (prelude == AS_PARTS)}")
        begins = tokenizer("?")["input_ids"][0] == tokenizer.bos_token_id
        if begins and not template_segments(tokenizer, TWO_TURNS)[0].startswith(tokenizer.bos_token):
            tokenizer.chat_template = "{{- bos_token }}" + tokenizer.chat_template
            lacked.append(f"{tokenizer.bos_token} in its chat template")
        try:
            end_of_turn_tokens(tokenizer)
        except ValueError:
            if not tokenizer.eos_token:
                raise
            tokenizer.chat_template = ENDED_ANSWERS + tokenizer.chat_template
            end_of_turn_tokens(tokenizer)
            lacked.append("an end of the answers in its chat template")
        if _unify_prefixes(tokenizer):
            lacked.append("the same opening of earlier, new and generated answers")
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}") from error
    return lacked


def context_length(config: PreTrainedConfig) -> int:
    """How many tokens a language model reads: as its configuration says, or as far as its rotations are stretched.

    Some rotations change for all tokens once a text is longer than they were trained for. Beyond that, a cache holds
    the wrong ones, and a short text's depend on a long one in its batch: the context ends there.
    """
    positions, rope = getattr(config, "max_position_embeddings", sys.maxsize), getattr(config, "rope_parameters", None)
    ends, limits = [positions], []
    for settings in (rope, *(rope or {}).values()):  # those of all layers, or of each kind of them
        if not isinstance(settings, dict):
            continue
        begin = settings.get("original_max_position_embeddings") or positions
        if settings.get("rope_type") in ("longrope", "dynamic"):
            limits.append(begin if settings["rope_type"] == "longrope" else positions)
        elif settings.get("factor"):
            ends.append(int(settings["factor"] * begin))
    return min([max(ends), *limits])


def complete_generation_config(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Has generation stop at every token that ends an answer, pad, and be greedy unless it was to sample, in place.

    Of what the language model brings beside that, only how it draws is kept. A chat model's penalty on words that the
    conversation has already would keep greedy generation from the likeliest answer, and penalise a caption's words.
    """
    for name, default in GenerationConfig().to_dict().items():
        if name not in ("bos_token_id", "eos_token_id", "do_sample", *DRAWING):
            setattr(config, name, default)
    stops = config.eos_token_id
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    ends = tokenizer.convert_tokens_to_ids(end_of_turn_tokens(tokenizer))
    config.eos_token_id = [*(end for end in ends if end not in stops), *stops]
    config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:  # settings of sampling that does not take place cannot be saved
        for name in DRAWING:
            setattr(config, name, None)


def _take_pictures(tokenizer: PreTrainedTokenizerBase) -> str:
    """Has the chat template write strings and lists of parts alike, with `<image>` for a picture.

    Returns what was put in front of it: nothing where it does so by itself.
    """
    text, template, required = {"type": "text", "text": "?"}, tokenizer.chat_template, []
    turns = [{"role": "user", "content": [text, {"type": "image"}, text]}, {"role": "assistant", "content": [text]}]
    for messages in (turns, [{"role": "system", "content": [text]}, *turns]):
        strings = [message | {"content": text_of(message)} for message in messages]
        try:
            render(tokenizer, strings)
            required.append((messages, strings))
        except ValueError:  # no template has to take a system turn, and some take no strings
            required += [(messages, strings)] * (messages is turns)
    for prelude in ("", AS_PARTS, AS_STRING, AS_STRING + AS_ONE_PART):
        tokenizer.chat_template = prelude + template
        try:
            pairs = [[render(tokenizer, messages) for messages in pair] for pair in required]
        except ValueError as error:
            reason = str(error)
            continue
        if all(parts == strings and parts.count(IMAGE_TOKEN) == 1 for parts, strings in pairs):
            return prelude
        reason = f"the chat template does not write {IMAGE_TOKEN} where a text holds it"
    raise ValueError(reason)


def _unify_prefixes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Has the chat template open every answer alike, unless it does.

    A template with a thinking switch opens a new answer with a thought, if only an empty one, and an earlier answer
    without; or it begins a thought in the generation prompt that no answer it renders has. Generation would then go on
    from what training never saw. All get the longest opening of an answer that it renders; or the generation prompt
    where that adds a thought to it, closed. White space that the prompt lacks, or that the tokenizer joins to what
    follows, is left for the model to say.
    """
    earlier, last, prompt = assistant_prefixes(tokenizer)
    added = [re.escape(token) for token in tokenizer.get_added_vocab()]
    opening, shortest = max(earlier, last, key=len), min(earlier, last, prompt, key=len)
    if opens_like(earlier, prompt) and opens_like(last, prompt):
        earlier = last = target = prompt
    else:
        tokens = "|".join([*added, TAG])
        thought = re.findall(tokens, prompt.removeprefix(opening))
        if prompt.startswith(opening) and (len(thought) > 1 or re.fullmatch(TAG, "".join(thought))):
            opening = prompt
        thought = re.findall(tokens, opening.removeprefix(shortest))
        if len(thought) == 1 and thought[0] in prompt and re.fullmatch(TAG, thought[0]):
            opening += f"\n{thought[0][0]}/{thought[0][1:]}\n\n"
        target = opening
    generated = _without_loose_end(tokenizer, target, opening)
    forms = sorted({earlier, last, target}, key=len)
    if prompt == generated and len(forms) == 1:
        return False
    if len(forms) > 1 and not all(re.search("|".join(added), form) for form in forms):
        raise ValueError(f"the chat template opens answers with {earlier!r} and {last!r}, and no token tells where")
    changes = [*((form, forms[0]) for form in forms[:0:-1]), (forms[0], target)] * (len(forms) > 1)
    filters = "".join(f" | replace({_quoted(old)}, {_quoted(new)})" for old, new in changes)
    template = tokenizer.chat_template.removesuffix("\n")  # Jinja drops one at the end of a template
    tokenizer.chat_template = (
        f"{{%- set rendered %}}\n{template}{{{{ '' }}}}{{% endset -%}}"
        f"{{%- set prompt = {_quoted(prompt)} -%}}"
        "{%- if not add_generation_prompt or not rendered.endswith(prompt) -%}{%- set prompt = '' -%}{%- endif -%}"
        f"{{{{- rendered[:rendered | length - prompt | length]{filters} -}}}}"
        f"{{%- if prompt -%}}{{{{- {_quoted(generated)} -}}}}{{%- endif -%}}"
    )
    earlier, last, prompt = assistant_prefixes(tokenizer)
    if not (opens_like(earlier, prompt) and opens_like(last, prompt)):
        raise ValueError(f"the chat template opens answers with {earlier!r} and {last!r}, a new one with {prompt!r}")
    return True


def _without_loose_end(tokenizer: PreTrainedTokenizerBase, prompt: str, opening: str) -> str:
    """A generation prompt without the white space at its end that the tokenizer joins to what follows in answers."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for end in range(len(prompt), len(prompt.rstrip()) - 1, -1):
        begin = ids(prompt[:end])
        if all(ids(opening + answer)[: len(begin)] == begin for answer in ("The", "a", "red", "1", "红")):
            return prompt[:end]
    return prompt


def _quoted(text: str) -> str:
    """A text as Jinja writes it in a template."""
    return json.dumps(text, ensure_ascii=False)
