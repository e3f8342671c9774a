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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from train_llava.cli import opening, parse_arguments, parse_first, run_command, written_whole

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
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.chat import Processor
from train_llava.checks import check_checkpoint, reference_outputs
from train_llava.model import Llava, count_parameters, tower_states
from train_llava.pictures import is_anyres
from train_llava.records import IMAGE_TOKEN
from train_llava.reports import write_card
from train_llava.template import complete_generation_config, complete_template, end_of_turn_tokens


def part_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of one of the two models.

    Raises:
        ValueError: it cannot be opened, or no LLaVA could hold such a model; the message says why.
    """
    with opening(name_or_path):
        settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
        if (model_type := settings.get("model_type")) not in CONFIG_MAPPING:
            raise ValueError(f"transformers has no code for a {model_type}, and a LLaVA cannot bring its own")
        if "quantization_config" in settings:
            raise ValueError("its weights are quantised: take the model that they were made from")
        return AutoConfig.from_pretrained(name_or_path)


def load_part(auto_class: Any, name_or_path: str, dtype: Any) -> tuple[PreTrainedModel, set[str]]:
    """One of the two models, and the names of those of its weights that its folder lacks.

    Raises:
        ValueError: it cannot be opened, or is no model of that kind; the message says which.
    """
    config = part_config(name_or_path)
    if auto_class is AutoModelForCausalLM and type(config) not in auto_class._model_mapping:
        auto_class = AutoModelForImageTextToText  # it may have a language model in it
    if type(config) not in auto_class._model_mapping:
        opener = auto_class.__name__
        raise ValueError(
            f"{name_or_path} is a {config.model_type}, which is no model of that kind: no {opener} has it"
        )
    with opening(name_or_path):
        model, loading = auto_class.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    return model.eval(), set(loading["missing_keys"])


def load_vision_tower(name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A vision model's encoder, of a checkpoint that holds it alone or inside a larger model, such as CLIP.

    Raises:
        ValueError: the checkpoint has no vision tower that a LLaVA could hold, or not all of its weights.
    """
    model, missing = load_part(AutoModel, name_or_path, dtype)
    tower, kind = model.get_encoder("image"), model.config.model_type
    takes = signature(tower.forward).parameters
    if "pixel_values" not in takes or "input_ids" in takes:
        raise ValueError(
            f"{name_or_path} is a {kind} model, not a vision tower, nor does transformers find one in it that takes "
            "plain pictures"
        )
    if not isinstance(tower, PreTrainedModel):
        raise ValueError(f"{name_or_path} is a {kind}, whose vision tower is no model by itself in transformers")
    prefix = next(name for name, module in model.named_modules() if module is tower)
    lacking = {name[len(prefix) :].lstrip(".") for name in missing if name.startswith(prefix)}
    if type(tower.config) not in AutoModel._model_mapping:
        tower = as_clip(tower, name_or_path)
    if lacking:
        fill_unread(tower, lacking, name_or_path)
    return tower


def as_clip(tower: PreTrainedModel, name: str) -> PreTrainedModel:
    """A tower that transformers opens inside its larger model only, as the CLIP that it is but for its name.

    So are those of MetaCLIP 2, AltCLIP and CLIPSeg.

    Raises:
        ValueError: its weights have other names or shapes than a CLIP's, or give other features.
    """
    kind = tower.config.model_type
    config = CLIPVisionConfig.from_dict(tower.config.to_dict() | {"model_type": CLIPVisionConfig.model_type})
    try:
        clip = CLIPVisionModel(config).to(tower.dtype).eval()
        clip.load_state_dict(tower.state_dict())
        with torch.inference_mode():
            picture = torch.linspace(-2, 2, 3 * config.image_size**2).reshape(1, 3, config.image_size, -1)
            ours, theirs = (
                torch.stack(model(picture.to(model.dtype), output_hidden_states=True).hidden_states)
                for model in (clip, tower)
            )
        if not ours.equal(theirs):
            raise ValueError("its features are others")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: transformers opens a {kind} inside its larger model only, and it is no CLIP under another name"
        ) from error
    return clip


def fill_unread(tower: PreTrainedModel, lacking: set[str], name: str) -> None:
    """Sets to zero those of a tower's `lacking` weights that no hidden state depends on, such as the pooler of a ViT
    that was published as a classifier.

    Raises:
        ValueError: a hidden state depends on one.
    """
    with running_as_one():
        copy, states = tower_states(LlavaConfig(vision_config=tower.config), tower.config.image_size)
        states[-1].sum().backward()
    unread = {weight for weight, parameter in copy.named_parameters() if parameter.grad is None}
    if broken := sorted(lacking - unread):
        raise ValueError(f"{name} lacks weights of its vision tower, {broken[0]} for one")
    for weight in lacking:
        torch.nn.init.zeros_(tower.get_parameter(weight))


def load_language_model(name_or_path: str, dtype: str) -> PreTrainedModel:
    """A causal language model; of one that comes with a vision tower of its own, such as Gemma 3, the text half.

    Raises:
        ValueError: there is none of that name, or not all of its weights.
    """
    model, missing = load_part(AutoModelForCausalLM, name_or_path, dtype)
    if missing:
        raise ValueError(f"{name_or_path} lacks weights of the language model, {min(missing)} for one")
    if model.get_decoder() is model.base_model:
        return model
    with torch.device("meta"):
        half = AutoModelForCausalLM.from_config(model.config.get_text_config(decoder=True))
    setattr(half, half.base_model_prefix, model.get_decoder())
    half.set_output_embeddings(model.get_output_embeddings())
    half.generation_config = model.generation_config
    return half.eval()


def load_image_processor(
    name_or_path: str, image_aspect_ratio: str, side: int | None, grids: list[str] = PINPOINTS
) -> BaseImageProcessor:
    """The vision tower's own image processor, or one that pads to a square of the same size, as LLaVA-1.5's does, or
    one that cuts a picture into tiles, as LLaVA-NeXT's does, of the `side` that the tower's configuration has.

    Raises:
        ValueError: there is none of that name, or none that makes one picture of one size.
    """
    with opening(name_or_path):
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        pixel_values = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
        if pixel_values.ndim != 4 or pixel_values.shape[-1] != pixel_values.shape[-2]:
            raise ValueError("it cuts pictures of any size (as NaFlex does): take a tower of one square picture size")
    if image_aspect_ratio == "crop":
        return image_processor
    # here, since they warn of a missing torchvision when imported
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor

    kept = ("resample", "image_mean", "image_std", "rescale_factor")
    settings = {name: value for name, value in image_processor.to_dict().items() if name in kept}
    if image_aspect_ratio == "pad":
        size = {"height": pixel_values.shape[-1], "width": pixel_values.shape[-1]}
        return LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size, crop_size=size, **settings)
    if not isinstance(side, int):
        raise ValueError(f"anyres: {name_or_path} takes pictures of {side} pixels, and tiles are squares of one size")
    pinpoints = [[int(rows) * side, int(columns) * side] for rows, columns in (grid.split("x") for grid in grids)]
    settings["crop_size"] = {"height": side, "width": side}
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, size={"shortest_edge": side}, **settings)


@torch.inference_mode()
def ask_tower(tower: PreTrainedModel, image_processor: BaseImageProcessor, name: str) -> tuple[int, int, int]:
    """What a tower does with a picture of the size that its image processor makes.

    Returns:
        How many tokens it gives, how many of these stand beside those of the patches, and how many hidden states.

    Raises:
        ValueError: it does not take such a picture, or gives no grid of patches.
    """
    pixel_values = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].to(tower.dtype)
    pixel_values = pixel_values.flatten(0, -4)[:1]
    side, patch = pixel_values.shape[-1], getattr(tower.config, "patch_size", None)
    try:
        states = tower(pixel_values, output_hidden_states=True).hidden_states
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the image processor of {name} makes pictures of {side} pixels a side, its vision tower takes "
            f"{getattr(tower.config, 'image_size', 'others')}: {error}"
        ) from error
    for size in (patch, getattr(tower.config, "image_size", None)):
        if isinstance(size, (list, tuple)):
            raise ValueError(
                f"{name} is a {tower.config.model_type} of sizes in pairs, {size}: a LLaVA takes one number"
            )
    if states is None or not isinstance(patch, int) or len({state.shape for state in states}) > 1:
        raise ValueError(f"{name} is a {tower.config.model_type}, whose hidden states are not one grid of patches")
    tokens, patches = states[0].shape[-2], (side // patch) ** 2
    if states[0].ndim != 3 or tokens < patches:
        raise ValueError(f"{name} gives {tokens} tokens for {patches} patches, which are no grid")
    return tokens, tokens - patches, len(states)


def load_tokenizer(language_model_name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `<image>`, a pad token, and a template fit for a LLaVA.

    Raises:
        ValueError: it has no chat template, so the model is not a chat model.
    """
    with opening(language_model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(language_model_name_or_path, trust_remote_code=trust_remote_code)
        complete_template(tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or end_of_turn_tokens(tokenizer)[0]
    return tokenizer


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
    """
    tokenizer, tiles = processor.tokenizer, is_anyres(processor.image_processor)
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
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
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
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

    Raises:
        ValueError: it cannot be opened, or is no projector of two linear layers.
    """
    with opening(path):
        saved = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
        names = {}
        for name, tensor in saved.items():
            # the authors of LLaVA count the projector's layers: 0, an activation, 2
            short = re.sub(r"^(model\.)?(mm_projector|multi_modal_projector)\.|^model\.(?=image_newline)", "", name)
            names[re.sub(r"^([02])\.", lambda m: f"linear_{int(m[1]) // 2 + 1}.", short)] = tensor
        layers = {f"linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
        if names.keys() - {"image_newline"} != layers:
            raise ValueError(f"it holds {', '.join(sorted(names)[:5])}, and no projector of two linear layers")
    return names


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


@contextmanager
def running_as_one() -> Iterator[None]:
    """Turns what an architecture raises that cannot be a LLaVA's language model or tower into one ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"the two do not run as one LLaVA of transformers: {error}") from error


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
        tokens, beside, states = ask_tower(vision_tower, image_processor, given.vision_model_name_or_path)
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
        if not given.skip_checks:
            references = reference_outputs(vision_tower, language_model, processor, layer)
        with running_as_one():
            model = assemble(vision_tower, language_model, processor, tokens - (strategy == "default"), layer)
        if projector is not None:
            put_projector(model, projector, given.projector)
        model.save_pretrained(folder, state_dict=published_names(model))
        processor.save_pretrained(folder)
        parts = [given.vision_model_name_or_path, given.language_model_name_or_path]
        note = "Put together and not trained yet: the projector is random."
        if projector is not None:
            note = "Put together with a trained projector."
        write_card(folder, Path(given.output_dir).name, parts, [], [note])
        sizes = [(part, f"{total:,} parameters") for part, (_, total) in count_parameters(model).items()]
        del model, vision_tower, language_model  # the checks load the saved model: never two in memory
        with running_as_one():
            checks = [] if given.skip_checks else check_checkpoint(folder, *references)
    for what, outcome in [*sizes, *checks, ("written to", given.output_dir)]:
        print(f"{what:<26}{outcome}")


def main() -> None:
    (arguments,) = parse_arguments(BuildArguments)
    build_model(**vars(arguments))


if __name__ == "__main__":
    run_command(main)
