"""Writes a LLaVA checkpoint as the two files that llama.cpp, Ollama and LM Studio load.

    python -m train_llava.export_gguf --model_name_or_path output/run --output_dir output/gguf

`model-f16.gguf` holds the language model with its tokenizer and chat template, `mmproj-f16.gguf` the vision
tower and the projector. `ollama create` takes the `Modelfile`. Merge an adapter first, with `merge_lora`.
"""

import io
import re
from dataclasses import dataclass
from typing import Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class ExportArguments:
    model_name_or_path: str = HfArg(help="A LLaVA checkpoint, a folder or a hub id.")
    output_dir: str = HfArg(help="The folder to write; it must not exist yet.")
    class_token: Literal["last", "first"] = HfArg(
        default="last", help="Where CLIP's class token goes: last in llama.cpp, first once its issue 25814 is mended."
    )


if __name__ == "__main__":
    parse_first(ExportArguments)  # before the imports that take seconds

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers import BaseImageProcessor, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from train_llava.dataset.images import levels, open_image
from train_llava.model import load_checkpoint
from train_llava.modeling import gguf_files
from train_llava.modeling.templates import ANSWER, QUESTION, end_of_turn_tokens, template_segments
from train_llava.prepare_picture import as_seen

PADDING = (122, 116, 104)  # llama.cpp pads a picture to a square with this colour, as LLaVA-1.5 did
SYSTEM = ("system", ("text",))


def tried_pictures(side: int) -> list[tuple[str, bytes]]:
    """Kinds of pictures that programs read differently, each with a file: noise, 2 * `side` pixels square."""
    # Noise in several modes; 16-bit gray, a palette of 4 colours, and an EXIF that turns by a quarter
    noise = np.random.default_rng(0).integers(0, 256, (2 * side, 2 * side, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(noise), Image.fromarray(noise[..., :3])
    gray, palette, exif = Image.fromarray(noise[..., 0] * np.uint16(257)), rgb.quantize(4), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    first_color = tuple(palette.getpalette()[:3])
    kinds = [
        ("square pictures", rgb, "PNG", {}),
        ("pictures that are not square", rgb.resize((2 * side, side)), "PNG", {}),
        ("transparent pictures", rgba, "PNG", {}),
        ("transparent pictures", rgba.convert("LA"), "PNG", {}),
        ("transparent pictures", palette, "PNG", {"transparency": 0}),
        ("transparent pictures", palette.convert("RGB"), "PNG", {"transparency": first_color}),
        ("transparent pictures", palette, "GIF", {"transparency": 0}),
        ("JPEGs that EXIF turns", rgb, "JPEG", {"exif": exif}),
        ("PNGs that EXIF turns", rgb, "PNG", {"exif": exif}),
        ("gray of 16 bits", gray, "PNG", {}),
        ("CMYK", rgb.convert("CMYK"), "JPEG", {}),
        ("animations", rgb, "GIF", {"save_all": True, "append_images": [rgb.rotate(90)]}),
    ]
    # Each as the bytes of a file
    files = []
    for kind, image, file_format, options in kinds:
        image.save(file := io.BytesIO(), file_format, **options)
        files.append((kind, file.getvalue()))
    return files


def read_as_llama_cpp(file: bytes) -> Image.Image:
    """Reads a picture as llama.cpp does by stb_image: no EXIF, no transparency, the upper byte of 16 bits."""
    image = Image.open(io.BytesIO(file))
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGBA").convert("RGB")


def differing_kinds(image_processor: BaseImageProcessor, side: int, prepared: bool = False) -> list[str]:
    """The kinds of pictures for which llama.cpp computes other pixels than training did.

    llama.cpp resizes a picture bicubically to fit into a square of `side` pixels, and pads the rest. If
    `prepared`, it gets the pictures that `prepare_picture` writes.
    """
    kinds = []
    for kind, file in tried_pictures(side):
        image = open_image(file, kind)
        read = as_seen(image_processor, image) if prepared else read_as_llama_cpp(file)
        theirs = np.array(ImageOps.pad(read, (side, side), Image.Resampling.BICUBIC, color=PADDING))
        # On average 3 of 256 levels. Rounding in Pillow and in torch differs by less than one
        if np.abs(levels(image_processor, image) - theirs).mean() > 3 and kind not in kinds:
            kinds.append(kind)
    return kinds


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes the date: it then fails without the function that gives the date."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, strftime_now=None)
    except Exception:  # a template is a program and raises errors of any type
        return True
    return False


def go_text(text: str) -> str:
    """A text in a Go template, quoted if it has braces, quotes or invisible characters: { becomes {{ "{" }}."""
    if not re.search(r'[{}"]', text) and text.replace("\n", "").isprintable():
        return text
    escaped = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'{{{{ "{"".join(escaped)}" }}}}'


def modelfile(tokenizer: PreTrainedTokenizerBase) -> str:
    """Ollama's description of the model: both files, the chat template in Go, the tokens that end an answer.

    A ValueError says that the template writes other text around a message when the conversation is longer.
    """
    # What the chat template writes before, between and after the texts of a conversation
    segments = template_segments(tokenizer, (QUESTION, ANSWER, QUESTION), answer_next=True)
    first, to_answer, to_question, to_generate = segments
    turn = [to_answer, to_question]
    expected = {
        (QUESTION,): [first, to_generate],
        (QUESTION, ANSWER, QUESTION, ANSWER, QUESTION): [first, *turn, *turn, to_generate],
    }
    try:
        before_system, after_system, _ = template_segments(tokenizer, (SYSTEM, QUESTION), answer_next=True)
        expected[SYSTEM, QUESTION, ANSWER, QUESTION] = [before_system, after_system, *turn, to_generate]
    except ValueError:  # the chat template takes no system message
        before_system = None
    for structure, segments in expected.items():
        if template_segments(tokenizer, structure, answer_next=True) != segments:
            roles = ", ".join(role for role, _ in structure)
            raise ValueError(f"Ollama cannot write a conversation of {roles} as the chat template does")

    # The same texts in Go's template language, without the first token (BOS), which Ollama writes itself
    bos = tokenizer.bos_token if gguf_files.writes_bos(tokenizer) else ""
    question = go_text(first.removeprefix(bos))
    system = question
    if before_system is not None:
        system = go_text(before_system.removeprefix(bos)) + "{{ $m.Content }}" + go_text(after_system)
    to_answer, to_question, to_generate = go_text(to_answer), go_text(to_question), go_text(to_generate)
    template = (
        "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq $m.Role "system" }}' + system + "{{ end }}"
        '{{ if eq $m.Role "user" }}{{ if eq $i 0 }}' + question + "{{ end }}{{ $m.Content }}"
        "{{ if $last }}" + to_generate + "{{ else }}" + to_answer + "{{ end }}{{ end }}"
        '{{ if eq $m.Role "assistant" }}{{ $m.Content }}{{ if not $last }}' + to_question + "{{ end }}{{ end }}"
        "{{ end }}"
    )  # fmt: skip
    stops = "".join(f'PARAMETER stop "{token}"\n' for token in end_of_turn_tokens(tokenizer))
    return (
        f'FROM ./model-f16.gguf\nFROM ./mmproj-f16.gguf\nTEMPLATE """{template}"""\n'
        f"{stops}PARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )


def export_gguf(model_name_or_path: str, output_dir: str, class_token: str = "last") -> None:
    """Writes `model-f16.gguf`, `mmproj-f16.gguf` and `Modelfile` to a new folder; see `ExportArguments`.

    Prints which pictures and texts the engines read differently, and the remedy. Where llama.cpp would compute
    other numbers, a ValueError says why, and nothing is written.
    """
    if not is_gguf_available():
        raise ValueError("this needs a package that is not installed: pip install gguf")
    with written_whole(output_dir) as folder:
        model, processor = load_checkpoint(model_name_or_path)
        gguf_files.check_exportable(model.config)

        # What the engines read differently
        image_processor, side = processor.image_processor, model.config.vision_config.image_size
        if kinds := differing_kinds(image_processor, side):
            remedy = "give it the files that python -m train_llava.prepare_picture writes"
            print(f"llama.cpp reads {', '.join(kinds)} differently, and its answers may differ: {remedy}")
        if kinds := differing_kinds(image_processor, side, prepared=True):
            print(f"prepare_picture does not help with {', '.join(kinds)}")
        if gguf_files.check_tokenizer(processor.tokenizer):
            remedy = "write é as one character, not as e and an accent"
            print(f"llama.cpp does not compose characters, as the tokenizer does (NFC): {remedy}")
        if writes_date(processor.tokenizer):
            print("the chat template writes the date: the Modelfile keeps today's, llama.cpp the current one")

        (folder / "Modelfile").write_text(modelfile(processor.tokenizer), encoding="utf-8", newline="\n")
        gguf_files.export_text(model, processor, folder / "model-f16.gguf")
        gguf_files.export_pictures(model, processor, class_token, folder / "mmproj-f16.gguf")


def main() -> None:
    (arguments,) = parse_arguments(ExportArguments)
    export_gguf(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
