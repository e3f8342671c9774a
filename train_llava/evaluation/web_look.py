"""How the chat page looks: its texts in two languages, its style and script, its header and its layout."""

import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel
from PIL import Image, ImageDraw

from train_llava.dataset.boxes import GRID
from train_llava.evaluation.metrics import places_in
from train_llava.evaluation.plots import outline
from train_llava.model import Llava, count_parameters
from train_llava.training.checkpointing import RECIPE

# Read by Gradio when it is imported; pages with a common folder would delete each other's uploads
UPLOADS = tempfile.TemporaryDirectory(prefix="gradio-")
os.environ["GRADIO_TEMP_DIR"] = UPLOADS.name
if find_spec("gradio"):
    import gradio as gr

HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "web_demo.json").read_text(encoding="utf-8"))
DOTS = '<span class="dots"><i></i><i></i><i></i></span>'  # shown until an answer has its first word


@dataclass
class Turn:
    """A question with its pictures, and the answer of each chat on the page, some with a picture of its boxes."""

    text: str
    files: list[str]
    answers: list[str]
    drawings: dict[int, str] = field(default_factory=dict)


def shown(turns: list[Turn], column: int, waiting: bool = False) -> list[dict[str, Any]]:
    """One chat as Gradio's messages, in HTML; if `waiting`, dots stand for a last answer that has no word yet."""
    messages = []
    for turn in turns:
        answer_html = escape(turn.answers[column]) or DOTS * (waiting and turn is turns[-1])
        question = [{"path": file} for file in turn.files] + [{"type": "text", "text": escape(turn.text)}]
        messages.append({"role": "user", "content": question})
        drawing = [{"path": turn.drawings[column]}] if column in turn.drawings else []
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer_html}, *drawing]})
    return messages


def drawing_of(answer: str, image: Image.Image, seen: list[float]) -> str | None:
    """A file of the picture with the boxes and points of an answer, or None without any. `seen`: see `seen_part`."""
    places = [place for place in places_in(answer) if max(place) <= GRID]
    if not places:
        return None
    drawing, width = image.copy(), max(image.size) // 200 + 1
    pen = ImageDraw.Draw(drawing)
    for place in places:
        corners = list(zip(*outline(place, image.size, seen), strict=True))
        pen.line(corners, "red", width)
        for corner in corners:
            pen.circle(corner, 2 * width, "red")
    with tempfile.NamedTemporaryFile(dir=UPLOADS.name, suffix=".png", delete=False) as file:
        drawing.save(file)
    return file.name


def example_pictures(folder: str | None, model: str) -> list[str]:
    """The pictures of a folder, by name, or a ValueError if it has none; without one, a model's held-out pictures."""
    folders, recipe = [folder], Path(model) / RECIPE
    if folder is None:
        data = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("eval_data_path") if recipe.exists() else None
        folders = filter(os.path.isdir, (f"{data}/images_dl", f"{data}/images"))
    files = [file for name in folders for file in Path(name).absolute().iterdir()]
    suffixes = Image.registered_extensions()
    paths = sorted(str(path) for path in files if path.suffix.lower() in suffixes)
    if folder is not None and not paths:
        raise ValueError(f"--examples {folder} has no picture in it")
    return paths


def header(model: Llava | PeftModel, title: str, made_of: list[str], language: str) -> str:
    """The page's header as HTML: the model's name, its parts with their sizes, and the models it was made of."""
    texts = TEXTS[language]
    sizes = {part: total for part, (_, total) in count_parameters(model).items()}
    details = {
        "vision tower": model.config.vision_config.model_type.removesuffix("_vision_model") + " ",
        "language model": model.config.get_text_config().model_type + " ",
    }
    if isinstance(model, PeftModel):  # the adapter's matrices were counted as the language model's
        sizes["adapter"] = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        sizes["language model"] -= sizes["adapter"]
        details["adapter"] = f"r = {model.active_peft_config.r}, "

    # The parts with their sizes, and the models under them
    items = []
    for part, size in sizes.items():
        millions = f"{size / 1e6:,.0f} M" if size >= 1e7 else f"{size / 1e6:,.2f} M"
        items.append(f"{texts[part]} <b>{details.get(part, '')}{millions}</b>")
    html = f"<h1>{escape(title)}<small>{texts['what_it_is']}</small></h1><ul><li>{'</li><li>'.join(items)}</li></ul>"
    if made_of:
        html += f"<p>{texts['made_of']}{escape(' · '.join(made_of))}</p>"
    return html.replace("{", "&#123;").replace("}", "&#125;")  # in Gradio's translations, braces mark a variable


def translations(model: Llava | PeftModel, title: str, made_of: list[str]) -> "gr.I18n":
    """The page's texts and header in every language. Gradio shows them in the browser's language."""
    headers = {language: {"model_header": header(model, title, made_of, language)} for language in TEXTS}
    return gr.I18n(**{language: TEXTS[language] | headers[language] for language in TEXTS})


def lay_out(words: "gr.I18n", two_chats: bool, examples: list[str]) -> tuple[Any, ...]:
    """Places the page's components from top to bottom, and returns those that events need."""
    # The header and the chats
    gr.HTML(words("model_header"), elem_id="model", padding=False)
    with gr.Row(elem_id="chats"):
        height = f"calc(100dvh - {400 if examples else 300}px)"
        look = {"height": height, "min_height": 240, "buttons": ["copy"], "show_label": two_chats}
        plain_text = {"render_markdown": False, "latex_delimiters": [], "placeholder": words("nothing_yet")}
        labels = ["with_adapter", "without_adapter"] if two_chats else ["chat"]
        chats = [gr.Chatbot(label=words(label), **look, **plain_text) for label in labels]
    # The question and the controls
    status = gr.HTML(elem_id="waiting", padding=False)
    box = gr.MultimodalTextbox(
        placeholder=words("ask_here"),
        file_count="multiple",
        file_types=["image"],
        max_plain_text_length=1 << 20,  # a longer text that is pasted becomes a file, which is refused
        show_label=False,
        autofocus=True,
        elem_id="box",
    )
    with gr.Row(elem_id="controls"):
        stop = gr.Button(words("stop"), interactive=False)
        retry, clear = (gr.Button(words(name), interactive=False) for name in ("retry", "clear"))
        temperature = gr.Slider(0, 2, 0, step=0.1, label=words("temperature"), elem_id="temperature")
    with gr.Row(elem_id="examples", visible=bool(examples)):
        names = [re.sub(r".*\d.*", "", Path(path).stem).replace("_", " ") for path in examples]  # no 00012
        pictures = [gr.Button(name, icon=path) for name, path in zip(names, examples, strict=True)]
    return chats, status, box, stop, retry, clear, temperature, pictures


def style() -> dict[str, Any]:
    """The arguments of `launch` for the page's style and script."""
    font = gr.themes.Font
    fonts = {"font": [font("system-ui"), font("sans-serif")], "font_mono": [font("monospace")]}
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="lg", **fonts)
    css, script = ((HERE / f"web_demo.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return {"css": css, "js": script, "theme": theme}
