"""Writes pictures as a model was trained to see them, for programs that read the same files differently.

    python -m train_llava.prepare_picture --model_name_or_path output/run --image cat.jpg --output_dir prepared

Training rotates a picture by its EXIF, puts transparency on white and scales 16 bits to 8 (`upright_rgb`).
`pipeline`, llama.cpp and others do some of this, or none. Each picture becomes a PNG that needs none of it.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import written_whole


@dataclass
class PictureArguments:
    model_name_or_path: str = HfArg(help="The LLaVA that will be asked, a folder or a hub id.")
    image: list[str] = HfArg(help="One or more pictures.")
    output_dir: str = HfArg(help="The folder to write; it must not exist yet.")


if __name__ == "__main__":
    parse_first(PictureArguments)  # before the imports that take seconds

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import BaseImageProcessor

from train_llava.dataset.images import is_anyres, levels, open_image
from train_llava.model import load_processor


def as_seen(image_processor: BaseImageProcessor, image: Image.Image) -> Image.Image:
    """An RGB picture as the image processor crops, pads and resizes it.

    It stays as it is if a second pass would change it again, or if the model cuts it into tiles.
    """
    if is_anyres(image_processor) or not image_processor.do_normalize:
        return image
    seen = levels(image_processor, image)
    square = Image.fromarray(seen.round().clip(0, 255).astype(np.uint8))
    return square if np.abs(levels(image_processor, square) - seen).max() < 0.5 else image


def prepare_picture(model_name_or_path: str, image: list[str], output_dir: str) -> None:
    """Writes `NAME.png` to a new folder for each picture `NAME.*`; a ValueError if two have one name."""
    names = [f"{Path(path).stem}.png" for path in image]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two pictures would become {name}: give them to two commands")
    with written_whole(output_dir) as folder:
        _, processor = load_processor(model_name_or_path)
        for path, name in zip(tqdm(image, "pictures"), names, strict=True):
            as_seen(processor.image_processor, open_image(Path(path))).save(folder / name)


def main() -> None:
    (arguments,) = parse_arguments(PictureArguments)
    prepare_picture(**vars(arguments))
    print(f"written to {arguments.output_dir}")


if __name__ == "__main__":
    run_command(main)
