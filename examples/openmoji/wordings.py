"""The words of the scenes, in English and Chinese: questions by kind, places, numbers and colours.

Of a kind's wordings, the first eight are for training and the others for held-out questions. In a wording, `{one}` is
a motif with its article, `{x}` its name, `{many}` and `{more}` are motifs in the plural, `{place}` is a quarter of the
picture and `{side}` a direction.
"""

from collections.abc import Callable
from dataclasses import dataclass

Wordings = dict[str, dict[str, list[str]]]  # by kind and language
TRAINING = 8  # of the wordings of a kind
WORDINGS: Wordings = {
    "what": {
        "en": [
            "What is this?",
            "What do you see?",
            "Name this thing.",
            "Which thing is this?",
            "What is shown here?",
            "Tell me what you see.",
            "What can be seen here?",
            "What does the picture show?",
            "Tell me what this is.",
            "What thing do you see here?",
            "Say what this is.",
        ],
        "zh": [
            "这是什么？",
            "你看到了什么？",
            "说出这个东西的名字。",
            "这是什么东西？",
            "这里画的是什么？",
            "告诉我你看到了什么。",
            "图片上画的是什么？",
            "请说这是什么。",
            "告诉我这是什么。",
            "你看到的是什么东西？",
            "请问这里画的是什么东西？",
        ],
    },
    "list": {
        "en": [
            "What is in the picture?",
            "Which things are in the picture?",
            "List all things in the picture.",
            "What can you see in the picture?",
            "Name everything in the picture.",
            "Tell me what is in the picture.",
            "What are the things in this picture?",
            "List what you see.",
            "List everything that you can see in the picture.",
            "Which things can you see in the picture?",
            "Tell me which things are here.",
        ],
        "zh": [
            "图片里有什么？",
            "图片里有哪些东西？",
            "列出图片里的所有东西。",
            "你在图片里能看到什么？",
            "说出图片里所有的东西。",
            "告诉我图片里有什么。",
            "图中都有些什么？",
            "请列出你看到的东西。",
            "图片里能看到哪些东西？",
            "列出你在图片里看到的所有东西。",
            "请告诉我图片里有哪些东西。",
        ],
    },
    "where": {
        "en": [
            "Where is the {x}?",
            "In which corner is the {x}?",
            "Where do you see the {x}?",
            "Where in the picture is the {x}?",
            "Say where the {x} is.",
            "What is the position of the {x}?",
            "Which corner is the {x} in?",
            "Find the {x}.",
            "Tell me where the {x} is.",
            "Where can you see the {x}?",
            "In which corner do you see the {x}?",
        ],
        "zh": [
            "{x}在哪里？",
            "{x}在哪个角？",
            "你在哪里看到{x}？",
            "{x}在图片的哪里？",
            "请说{x}在哪里。",
            "{x}的位置在哪？",
            "图中{x}在什么地方？",
            "找一找{x}。",
            "告诉我{x}在哪里。",
            "在哪里能看到{x}？",
            "你看到{x}在哪个角？",
        ],
    },
    "at": {
        "en": [
            "What is at the {place}?",
            "What do you see at the {place}?",
            "Which thing is at the {place}?",
            "Name the thing at the {place}.",
            "What is in the {place} corner?",
            "What is in the {place}?",
            "Say what is at the {place}.",
            "At the {place}, what do you see?",
            "Tell me what is at the {place}.",
            "Which thing do you see in the {place} corner?",
            "What can you see at the {place}?",
        ],
        "zh": [
            "{place}有什么？",
            "{place}是什么？",
            "你在{place}看到什么？",
            "{place}角是什么东西？",
            "说出{place}的东西。",
            "请问{place}有什么东西？",
            "图片的{place}是什么？",
            "{place}能看到什么？",
            "告诉我{place}是什么。",
            "你在{place}角看到什么东西？",
            "请说{place}是什么。",
        ],
    },
    "beside": {
        "en": [
            "What is {side} the {x}?",
            "What do you see {side} the {x}?",
            "Which thing is {side} the {x}?",
            "Name the thing {side} the {x}.",
            "{Side} the {x}, what is there?",
            "What can be seen {side} the {x}?",
            "Say what is {side} the {x}.",
            "What stands {side} the {x}?",
            "Tell me what is {side} the {x}.",
            "Which thing do you see {side} the {x}?",
            "What can you see {side} the {x}?",
        ],
        "zh": [
            "{x}{side}是什么？",
            "{x}{side}有什么？",
            "你在{x}{side}看到什么？",
            "{x}的{side}是什么东西？",
            "说出{x}{side}的东西。",
            "请问{x}的{side}有什么？",
            "{x}{side}能看到什么？",
            "{x}的{side}画的是什么？",
            "告诉我{x}{side}是什么。",
            "你在{x}的{side}看到什么东西？",
            "请说{x}的{side}是什么。",
        ],
    },
    "count": {
        "en": [
            "How many {many} are there?",
            "How many {many} do you see?",
            "How many {many} are in the picture?",
            "Count the {many}.",
            "What is the number of {many}?",
            "How many {many} are shown here?",
            "Say how many {many} there are.",
            "How many {many} can be seen?",
            "How many {many} can you see in the picture?",
            "Tell me the number of {many}.",
            "Tell me how many {many} there are.",
        ],
        "zh": [
            "有几个{x}？",
            "你看到几个{x}？",
            "图片里有几个{x}？",
            "数一数{x}。",
            "{x}有多少个？",
            "图中{x}的数量是多少？",
            "请说有几个{x}。",
            "一共有多少{x}？",
            "图片里能看到几个{x}？",
            "数一数有多少个{x}。",
            "告诉我有几个{x}。",
        ],
    },
    "things": {
        "en": [
            "How many things are there?",
            "How many things do you see?",
            "How many things are in the picture?",
            "Count all things.",
            "What is the number of things?",
            "Tell me how many things there are.",
            "How many things are shown?",
            "How many things in all?",
            "How many things can you see in the picture?",
            "Tell me the number of things.",
            "Say how many things are here.",
        ],
        "zh": [
            "有几个东西？",
            "你看到几个东西？",
            "图片里有几个东西？",
            "数一数所有的东西。",
            "东西有多少个？",
            "告诉我有几个东西。",
            "图中一共有多少东西？",
            "东西的数量是多少？",
            "图片里能看到几个东西？",
            "数一数有多少个东西。",
            "请说一共有几个东西。",
        ],
    },
    "is there": {
        "en": [
            "Is there {one}?",
            "Do you see {one}?",
            "Can you see {one}?",
            "Is {one} in the picture?",
            "Is there {one} in the picture?",
            "Does the picture show {one}?",
            "Is {one} shown here?",
            "Can {one} be seen?",
            "Do you see {one} in the picture?",
            "Can you see {one} here?",
            "Tell me if there is {one}.",
        ],
        "zh": [
            "有{x}吗？",
            "你看到{x}了吗？",
            "能看到{x}吗？",
            "图片里有{x}吗？",
            "有没有{x}？",
            "图中有没有{x}？",
            "这里有{x}吗？",
            "告诉我有没有{x}。",
            "你能看到{x}吗？",
            "图片里有没有{x}？",
            "请问图片里有{x}吗？",
        ],
    },
    "ground": {
        "en": [
            "What colour is the ground?",
            "Which colour is the ground?",
            "What is the colour of the background?",
            "Which colour does the background have?",
            "Name the colour of the ground.",
            "Tell me what colour the background is.",
            "What is the background colour?",
            "Say which colour the ground has.",
            "What colour is the background?",
            "Tell me the colour of the ground.",
            "What colour does the background have?",
        ],
        "zh": [
            "背景是什么颜色？",
            "背景是哪种颜色？",
            "背景的颜色是什么？",
            "底色是什么？",
            "说出背景的颜色。",
            "请问背景是什么颜色？",
            "图片的背景是哪个颜色？",
            "告诉我底色。",
            "告诉我背景是什么颜色。",
            "底色是哪种颜色？",
            "请说背景的颜色。",
        ],
    },
    "more": {
        "en": [
            "Are there more {many} or more {more}?",
            "Which are there more of, {many} or {more}?",
            "Do you see more {many} or more {more}?",
            "More {many} or more {more}?",
            "Are more {many} or more {more} in the picture?",
            "Say if there are more {many} or {more}.",
            "What are there more of, {many} or {more}?",
            "Does the picture show more {many} or more {more}?",
            "Can you see more {many} or more {more}?",
            "Which do you see more of, {many} or {more}?",
            "Tell me if there are more {many} or more {more}.",
        ],
        "zh": [
            "{x}多还是{y}多？",
            "{x}和{y}哪个多？",
            "是{x}多还是{y}多？",
            "哪个更多，{x}还是{y}？",
            "图片里{x}多还是{y}多？",
            "请问{x}和{y}哪个更多？",
            "{x}比较多还是{y}比较多？",
            "告诉我{x}多还是{y}多。",
            "图片里{x}和{y}哪个更多？",
            "哪个多，{x}还是{y}？",
            "请说是{x}多还是{y}多。",
        ],
    },
    "describe": {
        "en": [
            "Describe the picture.",
            "Describe what you see.",
            "Tell me about the picture.",
            "Say where everything is.",
            "Give a description of the picture.",
            "Please describe this.",
            "Tell me where everything is.",
            "Describe all that is here.",
            "Describe everything in the picture.",
            "Give a description of what you see.",
            "Please describe what the picture shows.",
        ],
        "zh": [
            "描述这张图片。",
            "描述你看到的。",
            "讲一讲这张图片。",
            "说说每个东西在哪里。",
            "给出图片的描述。",
            "请描述一下。",
            "告诉我每个东西在哪里。",
            "用一句话描述图片。",
            "描述图片里的所有东西。",
            "给出这张图片的描述。",
            "请描述你看到的所有东西。",
        ],
    },
}
TRAINING_WORDINGS: Wordings = {
    kind: {code: texts[:TRAINING] for code, texts in languages.items()} for kind, languages in WORDINGS.items()
}


@dataclass(frozen=True)
class Language:
    """The words of answers. Places are in reading order; sides are left, right, above and below."""

    places: list[str]
    sides: list[str]
    numbers: list[str]
    grounds: list[str]
    nothing: str
    yes_no: tuple[str, str]
    alike: str  # as many of one motif as of another
    one: Callable[[str], str]
    some: Callable[[str, int], str]
    listed: Callable[[list[str]], str]
    more: Callable[[str], str]
    at: Callable[[str], str]
    described: Callable[[list[tuple[str, str]], str], str]


IRREGULAR = {"mouse": "mice", "goose": "geese", "fish": "fish", "wolf": "wolves", "deer": "deer", "tooth": "teeth",
             "cactus": "cacti", "scarf": "scarves", "maple leaf": "maple leaves"}  # fmt: skip
IRREGULAR |= {name: f"{name}es" for name in ("potato", "tomato", "tornado", "volcano")}


def plural(name: str) -> str:
    """ "fox" -> "foxes"."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def with_article(name: str) -> str:
    """ "owl" -> "an owl"."""
    return f"an {name}" if name[0] in "aeio" or name == "umbrella" else f"a {name}"


def joined(parts: list[str], comma: str, last: str) -> str:
    """["a", "b", "c"], ", ", " and " -> "a, b and c"."""
    return last.join([*([comma.join(parts[:-1])] if parts[1:] else []), parts[-1]])


NUMBERS = ["none", "one", "two", "three", "four"]
ZH_NUMBERS = ["没有", "一个", "两个", "三个", "四个"]
ENGLISH = Language(
    places=["top left", "top right", "bottom left", "bottom right"],
    sides=["to the left of", "to the right of", "above", "below"],
    numbers=NUMBERS,
    grounds=["red", "orange", "yellow", "green", "blue", "purple", "pink", "grey"],
    nothing="nothing",
    yes_no=("yes", "no"),
    alike="as many of both",
    one=with_article,
    some=lambda name, n: with_article(name) if n == 1 else f"{NUMBERS[n]} {plural(name)}",
    listed=lambda parts: joined(parts, ", ", " and "),
    more=lambda name: f"more {plural(name)}",
    at=lambda place: f"at the {place}",
    described=lambda things, ground: (
        f"There is {joined([f'{with_article(name)} at the {place}' for name, place in things], ', ', ' and ')} "
        f"on {with_article(ground)} ground."
    ),
)
CHINESE = Language(
    places=["左上", "右上", "左下", "右下"],
    sides=["左边", "右边", "上面", "下面"],
    numbers=ZH_NUMBERS,
    grounds=["红色", "橙色", "黄色", "绿色", "蓝色", "紫色", "粉色", "灰色"],
    nothing="什么都没有",
    yes_no=("有", "没有"),
    alike="一样多",
    one=str,
    some=lambda name, n: name if n == 1 else f"{ZH_NUMBERS[n]}{name}",
    listed=lambda parts: joined(parts, "、", "和"),
    more=lambda name: f"{name}多",
    at=lambda place: f"在{place}",
    described=lambda things, ground: (
        f"{ground}的背景上，{joined([f'{place}有{name}' for name, place in things], '，', '，')}。"
    ),
)
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
