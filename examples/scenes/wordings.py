"""The words of the scenes, in English and Chinese: questions by kind, places, numbers and colours.

Of a kind's wordings, the first five are for training and the others for held-out questions. In a wording, `{one}` is a
motif with its article, `{x}` its name, `{many}` and `{more}` are motifs in the plural, `{place}` is a quarter of the
picture and `{side}` a direction.
"""

from collections.abc import Callable
from dataclasses import dataclass

TRAINING = 5  # of the wordings of a kind
WORDINGS = {
    "what": {
        "en": [
            "What is this?",
            "What do you see?",
            "Name this thing.",
            "Which thing is this?",
            "What is shown here?",
            "Tell me what this is.",
            "What thing do you see here?",
        ],
        "zh": [
            "这是什么？",
            "你看到了什么？",
            "说出这个东西的名字。",
            "这是什么东西？",
            "这里画的是什么？",
            "告诉我这是什么。",
            "你看到的是什么东西？",
        ],
    },
    "list": {
        "en": [
            "What is in the picture?",
            "Which things are in the picture?",
            "List all things in the picture.",
            "What can you see in the picture?",
            "Name everything in the picture.",
            "List everything that you can see in the picture.",
            "Which things can you see in the picture?",
        ],
        "zh": [
            "图片里有什么？",
            "图片里有哪些东西？",
            "列出图片里的所有东西。",
            "你在图片里能看到什么？",
            "说出图片里所有的东西。",
            "图片里能看到哪些东西？",
            "列出你在图片里看到的所有东西。",
        ],
    },
    "where": {
        "en": [
            "Where is the {x}?",
            "In which corner is the {x}?",
            "Where do you see the {x}?",
            "Where in the picture is the {x}?",
            "Tell me where the {x} is.",
            "Where can you see the {x}?",
            "In which corner do you see the {x}?",
        ],
        "zh": [
            "{x}在哪里？",
            "{x}在哪个角？",
            "你在哪里看到{x}？",
            "{x}在图片的哪里？",
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
            "Tell me what is at the {place}.",
            "Which thing do you see in the {place} corner?",
        ],
        "zh": [
            "{place}有什么？",
            "{place}是什么？",
            "你在{place}看到什么？",
            "{place}角是什么东西？",
            "说出{place}的东西。",
            "告诉我{place}是什么。",
            "你在{place}角看到什么东西？",
        ],
    },
    "beside": {
        "en": [
            "What is {side} the {x}?",
            "What do you see {side} the {x}?",
            "Which thing is {side} the {x}?",
            "Name the thing {side} the {x}.",
            "{Side} the {x}, what is there?",
            "Tell me what is {side} the {x}.",
            "Which thing do you see {side} the {x}?",
        ],
        "zh": [
            "{x}{side}是什么？",
            "{x}{side}有什么？",
            "你在{x}{side}看到什么？",
            "{x}的{side}是什么东西？",
            "说出{x}{side}的东西。",
            "告诉我{x}{side}是什么。",
            "你在{x}的{side}看到什么东西？",
        ],
    },
    "count": {
        "en": [
            "How many {many} are there?",
            "How many {many} do you see?",
            "How many {many} are in the picture?",
            "Count the {many}.",
            "What is the number of {many}?",
            "How many {many} can you see in the picture?",
            "Tell me the number of {many}.",
        ],
        "zh": [
            "有几个{x}？",
            "你看到几个{x}？",
            "图片里有几个{x}？",
            "数一数{x}。",
            "{x}有多少个？",
            "图片里能看到几个{x}？",
            "数一数有多少个{x}。",
        ],
    },
    "things": {
        "en": [
            "How many things are there?",
            "How many things do you see?",
            "How many things are in the picture?",
            "Count all things.",
            "What is the number of things?",
            "How many things can you see in the picture?",
            "Tell me the number of things.",
        ],
        "zh": [
            "有几个东西？",
            "你看到几个东西？",
            "图片里有几个东西？",
            "数一数所有的东西。",
            "东西有多少个？",
            "图片里能看到几个东西？",
            "数一数有多少个东西。",
        ],
    },
    "is there": {
        "en": [
            "Is there {one}?",
            "Do you see {one}?",
            "Can you see {one}?",
            "Is {one} in the picture?",
            "Is there {one} in the picture?",
            "Do you see {one} in the picture?",
            "Can you see {one} here?",
        ],
        "zh": [
            "有{x}吗？",
            "你看到{x}了吗？",
            "能看到{x}吗？",
            "图片里有{x}吗？",
            "有没有{x}？",
            "你能看到{x}吗？",
            "图片里有没有{x}？",
        ],
    },
    "ground": {
        "en": [
            "What colour is the ground?",
            "Which colour is the ground?",
            "What is the colour of the background?",
            "Which colour does the background have?",
            "Name the colour of the ground.",
            "What colour is the background?",
            "Tell me the colour of the ground.",
        ],
        "zh": [
            "背景是什么颜色？",
            "背景是哪种颜色？",
            "背景的颜色是什么？",
            "底色是什么？",
            "说出背景的颜色。",
            "告诉我背景是什么颜色。",
            "底色是哪种颜色？",
        ],
    },
    "more": {
        "en": [
            "Are there more {many} or more {more}?",
            "Which are there more of, {many} or {more}?",
            "Do you see more {many} or more {more}?",
            "More {many} or more {more}?",
            "Are more {many} or more {more} in the picture?",
            "Can you see more {many} or more {more}?",
            "Which do you see more of, {many} or {more}?",
        ],
        "zh": [
            "{x}多还是{y}多？",
            "{x}和{y}哪个多？",
            "是{x}多还是{y}多？",
            "哪个更多，{x}还是{y}？",
            "图片里{x}多还是{y}多？",
            "图片里{x}和{y}哪个更多？",
            "哪个多，{x}还是{y}？",
        ],
    },
    "describe": {
        "en": [
            "Describe the picture.",
            "Describe what you see.",
            "Tell me about the picture.",
            "Say where everything is.",
            "Give a description of the picture.",
            "Describe everything in the picture.",
            "Give a description of what you see.",
        ],
        "zh": [
            "描述这张图片。",
            "描述你看到的。",
            "讲一讲这张图片。",
            "说说每个东西在哪里。",
            "给出图片的描述。",
            "描述图片里的所有东西。",
            "给出这张图片的描述。",
        ],
    },
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
