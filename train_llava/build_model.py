"""Puts a vision tower and a chat language model together into one LLaVA checkpoint, and proves that it did.

    python -m train_llava.build_model \
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 \
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat \
        --output_dir output/llava-qwen1.5-4b

Both models keep their weights; only the projector between them is new. The folder is a standard checkpoint of
`LlavaForConditionalGeneration` or, with `--image_aspect_ratio anyres`, `LlavaNextForConditionalGeneration`: weights,
processor, chat template and generation config.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import parse_arguments, parse_first, run_command
from train_llava.common.files import opening, written_whole

PINPOINTS = ["1x2", "2x1", "2x2", "3x1", "1x3"]  # LLaVA-NeXT's


@dataclass
class BuildArguments:
    vision_model_name_or_path: str = field(
        metadata={"help": "A vision model over a grid of patches, such as CLIP, SigLIP, DINOv2: folder or hub id."}
    )
    language_model_name_or_path: str = field(metadata={"help": "A causal language model with a chat template."})
    output_dir: str = field(metadata={"help": "The LLaVA checkpoint to write; it must not exist yet."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "What the weights are written in; auto: the language model's own."}
    )
    vision_feature_layer: int = field(
        default=-2, metadata={"help": "Which of the tower's hidden states the projector reads."}
    )
    vision_feature_select_strategy: Literal["auto", "default", "full"] = field(
        default="auto",
        metadata={
            "help": "default drops the class token, full keeps all; auto: default where there is a class token."
        },
    )
    image_aspect_ratio: Literal["crop", "pad", "anyres"] = field(
        default="crop",
        metadata={
            "help": "crop: as the tower's own processor does; pad: to a square first, as LLaVA-1.5, sides kept; "
            "anyres: the whole picture and, at more pixels, its tiles, as LLaVA-NeXT."
        },
    )
    image_grid_pinpoints: list[str] | None = field(
        default=None,
        metadata={"help": f"With anyres, the grids that a picture may be cut into; default: {' '.join(PINPOINTS)}."},
    )
    projector: str | None = field(
        default=None,
        metadata={"help": "A trained projector: projector.safetensors of a run, or LLaVA's mm_projector.bin."},
    )
    skip_checks: bool = field(default=False, metadata={"help": "Do not run the assembled model before naming it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a tokenizer."})

    def __post_init__(self) -> None:
        if self.image_aspect_ratio != "anyres" and self.image_grid_pinpoints is not None:
            raise ValueError("--image_grid_pinpoints goes with --image_aspect_ratio anyres")
        for grid in self.image_grid_pinpoints or []:
            if not re.fullmatch("[1-9]x[1-9]", grid):
                raise ValueError(f"--image_grid_pinpoints {grid}: rows x columns of tiles, 1 to 9 each, such as 2x3")


if __name__ == "__main__":
    parse_first(BuildArguments)  # before the imports that take seconds

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.chat import Processor
from train_llava.dataset.images import is_anyres
from train_llava.model import Llava, count_parameters
from train_llava.modeling.parts import (
    decoder_of,
    load_image_processor,
    load_language_model,
    load_tokenizer,
    load_vision_tower,
    part_config,
    probe_tower,
    running_as_one,
)
from train_llava.modeling.templates import complete_generation_config
from train_llava.modeling.verification import reference_outputs, verify_in_fresh_process, verify_text_path
from train_llava.modeling.weights import PROJECTOR
from train_llava.records import IMAGE_TOKEN
from train_llava.training.cards import write_card


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    processor: Processor,
    image_seq_length: int,
    vision_feature_layer: int = -2,
) -> Llava:
    """Joins the two models by a fresh projector (Liu et al., 2023, "Improved Baselines with Visual Instruction
    Tuning": two linear layers with a GELU), without copying a weight.

    The LLaVA is made on the meta device, which takes no memory, and the two models' own modules are put into it.

    Raises:
        ValueError: it has no place for a tensor of the two, or they have none for a place; the message names it.
    """
    tokenizer, tiles = processor.tokenizer, is_anyres(processor.image_processor)
    decoder = decoder_of(language_model)
    if language_model.config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        raise ValueError(
            f"the output layer of a {decoder.config.model_type} is its embedding, and a LLaVA shares only one that is "
            "called embed_tokens"
        )
    if (rows := max(tokenizer.get_vocab().values()) + 1) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(rows, pad_to_multiple_of=64)
    grids = {"image_grid_pinpoints": processor.image_processor.image_grid_pinpoints} if tiles else {}
    config = (LlavaNextConfig if tiles else LlavaConfig)(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=image_seq_length,
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        pad_token_id=tokenizer.pad_token_id,
        dtype=language_model.dtype,
        tie_word_embeddings=language_model.config.tie_word_embeddings,
        **grids,
    )
    for part in (config, config.vision_config, config.text_config):
        part.name_or_path = ""  # where the parts lay on this machine is no business of the checkpoint
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    places = model.state_dict().keys()
    model.model.vision_tower = vision_tower
    model.model.language_model = decoder
    model.lm_head = language_model.get_output_embeddings()
    filled = model.state_dict(keep_vars=True)
    taken = {id(tensor) for name, tensor in filled.items() if name in places}
    for part, kind in ((vision_tower, "vision tower"), (language_model, "language model")):
        for name, tensor in part.state_dict(keep_vars=True).items():
            if id(tensor) not in taken:
                raise ValueError(f"a LLaVA has no place for {name} of this {kind}, a {part.config.model_type}")
    if lacking := places - filled.keys():
        raise ValueError(f"the two models lack what a LLaVA has of them, {min(lacking)} for one")
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same command writes the same folder
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(language_model.dtype)
        if tiles:
            width = config.text_config.hidden_size
            newline = torch.randn(width, dtype=language_model.dtype) / width**0.5  # as transformers begins it
            model.model.image_newline = torch.nn.Parameter(newline)

    model.generation_config = language_model.generation_config
    complete_generation_config(model.generation_config, tokenizer)
    return model.eval()


def load_projector(path: str) -> dict[str, torch.Tensor]:
    """A trained projector's tensors by the names that they have in a LLaVA, and `image_newline` where it has one.

    Args:
        path: a file of safetensors or of torch's, or the folder of a run that has trained the projector alone.

    Raises:
        OSError, ValueError: it cannot be opened, or is no projector of two linear layers.
    """
    if Path(path).is_dir():
        path = str(Path(path) / PROJECTOR)
    with opening(path):
        try:
            saved = load_file(path)
        except SafetensorError:
            saved = torch_tensors(path)
        names = {}
        for name, tensor in saved.items():
            # the authors of LLaVA count the projector's layers: 0, an activation, 2
            short = re.sub(r"^(model\.)?(mm_projector|multi_modal_projector)\.|^model\.(?=image_newline)", "", name)
            names[re.sub(r"^([02])\.", lambda m: f"linear_{int(m[1]) // 2 + 1}.", short)] = tensor
        layers = {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        if names.keys() - {"image_newline"} != layers:
            raise ValueError(f"it holds {', '.join(sorted(saved)[:5])}, and no projector of two linear layers")
    return names


def torch_tensors(path: str) -> dict[str, torch.Tensor]:
    """What `torch.save` has written of a dictionary of tensors.

    Raises:
        ValueError: it is something else. torch's own words would advise to let the file run code.
    """
    try:
        with open(path, "rb") as file:  # by its name alone torch would take it for safetensors
            saved = torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # of any type
        raise ValueError("it is neither safetensors nor torch's file of tensors") from error
    if not (isinstance(saved, dict) and all(isinstance(tensor, torch.Tensor) for tensor in saved.values())):
        raise ValueError("it is no dictionary of tensors")
    return saved


def put_projector(model: Llava, projector: dict[str, torch.Tensor], path: str) -> None:
    """Gives a LLaVA a trained projector.

    Raises:
        ValueError: a tensor of it has another shape; the message names it.
    """
    places = dict(model.model.multi_modal_projector.named_parameters())
    places |= dict(model.model.named_parameters(recurse=False))
    for name, tensor in projector.items():
        if name in places and tensor.shape != places[name].shape:
            raise ValueError(
                f"--projector {path}: {name} is {tuple(tensor.shape)}, and between these two models it would be "
                f"{tuple(places[name].shape)}"
            )
        if name in places:
            places[name].data = tensor.to(places[name].dtype)


def published_names(model: Llava) -> dict[str, torch.Tensor]:
    """A LLaVA's weights with the tower's named as in published checkpoints.

    Other engines look for these; they know CLIP and SigLIP as a LLaVA's towers. transformers renames the rest itself,
    and writes a checkpoint that it has read under the names it had.
    """
    weights = model.state_dict()
    if model.config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        return weights
    return {name.replace(".vision_tower.", ".vision_tower.vision_model."): tensor for name, tensor in weights.items()}


def build_model(*arguments: Any, **named: Any) -> None:
    """Writes a LLaVA checkpoint; takes what `BuildArguments` takes.

    Raises:
        OSError, ValueError: a part cannot be loaded or the outcome is not right; nothing is left behind.
    """
    given = BuildArguments(*arguments, **named)
    layer, strategy = given.vision_feature_layer, given.vision_feature_select_strategy
    projector = None if given.projector is None else load_projector(given.projector)
    with written_whole(given.output_dir) as folder:
        part_config(given.language_model_name_or_path)  # before code that comes with a tokenizer may run
        tokenizer = load_tokenizer(given.language_model_name_or_path, given.trust_remote_code)
        print(f"language model  {given.language_model_name_or_path}")
        language_model = load_language_model(given.language_model_name_or_path, given.dtype)
        print(f"vision tower    {given.vision_model_name_or_path}")
        vision_tower = load_vision_tower(given.vision_model_name_or_path, language_model.dtype)
        grids, side = given.image_grid_pinpoints or PINPOINTS, getattr(vision_tower.config, "image_size", None)
        image_processor = load_image_processor(given.vision_model_name_or_path, given.image_aspect_ratio, side, grids)
        tokens, beside, states = probe_tower(vision_tower, image_processor, given.vision_model_name_or_path)
        if not -states <= layer < states:
            raise ValueError(f"--vision_feature_layer {layer}: the tower has hidden states {-states} to {states - 1}")
        if strategy == "auto":
            strategy = "default" if beside else "full"
        if given.image_aspect_ratio == "anyres" and beside != (strategy == "default"):
            raise ValueError(
                f"anyres: {given.vision_model_name_or_path} gives {beside} tokens beside its patches, and with "
                f"--vision_feature_select_strategy {strategy} more than the patches would stand in the grid"
            )
        processor = (LlavaNextProcessor if given.image_aspect_ratio == "anyres" else LlavaProcessor)(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=vision_tower.config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=beside,
            chat_template=tokenizer.chat_template,
        )
        with running_as_one():
            if not given.skip_checks:
                verify_text_path(language_model, processor)
                references = reference_outputs(vision_tower, language_model, processor, layer)
            model = assemble(vision_tower, language_model, processor, tokens - (strategy == "default"), layer)
        if projector is not None:
            put_projector(model, projector, given.projector)
        model.save_pretrained(folder, state_dict=published_names(model))
        processor.save_pretrained(folder)
        parts = [given.vision_model_name_or_path, given.language_model_name_or_path]
        note = "Put together and not trained yet: the projector is random."
        if projector is not None:
            note = "Put together with a trained projector."
            if given.image_aspect_ratio == "anyres" and "image_newline" not in projector:
                untrained = "It has no image_newline, which ends a row of tiles: that is random, and wants training."
                note += f" {untrained}"
                print(f"--projector {given.projector}: {untrained}", file=sys.stderr)
        write_card(folder, Path(given.output_dir).name, parts, [], [note])
        sizes = [(part, f"{total:,} parameters") for part, (_, total) in count_parameters(model).items()]
        del model, vision_tower, language_model  # the checks load the saved model: never two in memory
        try:
            checks = [] if given.skip_checks else verify_in_fresh_process(folder, *references)
        except ValueError as error:
            raise ValueError(str(error).replace(str(folder), given.output_dir)) from error
    for what, outcome in [*sizes, *checks, ("written to", given.output_dir)]:
        print(f"{what:<26}{outcome}")


def main() -> None:
    (arguments,) = parse_arguments(BuildArguments)
    build_model(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
