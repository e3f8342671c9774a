"""Opens the parts that a LLaVA is assembled from, and refuses by name what no LLaVA could hold.

A vision tower, a language model, an image processor and a tokenizer, each from its own folder or the hub.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from PIL import Image
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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train_llava.common.files import opening
from train_llava.dataset.images import is_anyres
from train_llava.model import refuse_adapter, unused_parameters
from train_llava.modeling.templates import end_of_turn_tokens, patch_chat_template
from train_llava.records import IMAGE_TOKEN


@contextmanager
def running_as_one() -> Iterator[None]:
    """Turns what an architecture raises that cannot be a LLaVA's language model or tower into one ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"the two do not run as one LLaVA of transformers: {error}") from error


def part_config(name_or_path: str) -> PreTrainedConfig:
    """The configuration of one of the two models.

    Raises:
        ValueError: it cannot be opened, or no LLaVA could hold such a model; the message says why.
    """
    refuse_adapter(name_or_path)
    with opening(name_or_path):
        settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
        if (model_type := settings.get("model_type")) not in CONFIG_MAPPING:
            raise ValueError(f"transformers has no code for a {model_type}, and a LLaVA cannot bring its own")
        if settings.get("quantization_config"):
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
    if auto_class is AutoModelForImageTextToText:
        half = config.get_text_config(decoder=True)
        if type(half) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(
                f"{name_or_path} is a {config.model_type}, whose text half transformers never opens alone"
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
    needed = [name for name, parameter in takes.items() if parameter.default is Parameter.empty]
    if more := [name for name in needed if name not in ("pixel_values", "args", "kwargs")]:
        raise ValueError(
            f"{name_or_path} is a {kind}, whose vision tower takes {' and '.join(more)} with a picture, "
            "which no LLaVA gives it"
        )
    if not isinstance(tower, PreTrainedModel):
        raise ValueError(f"{name_or_path} is a {kind}, whose vision tower is no model by itself in transformers")
    prefix = next(name for name, module in model.named_modules() if module is tower)
    lacking = {name[len(prefix) :].lstrip(".") for name in missing if name.startswith(prefix)}
    if type(tower.config) not in AutoModel._model_mapping:
        tower = as_clip(tower, name_or_path)
    if lacking:
        fill_unused(tower, lacking, name_or_path)
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
        with torch.no_grad():
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


def fill_unused(tower: PreTrainedModel, lacking: set[str], name: str) -> None:
    """Sets to zero those of a tower's `lacking` weights that no hidden state depends on, such as the pooler of a ViT
    that was published as a classifier.

    Raises:
        ValueError: a hidden state depends on one.
    """
    with running_as_one():
        unread = unused_parameters(tower.config, -1)
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
    parts = (decoder_of(model), model.get_output_embeddings())
    taken = {id(tensor) for part in parts for tensor in part.state_dict(keep_vars=True).values()}
    tensors = model.state_dict(keep_vars=True).items()
    if lacking := [name for name, tensor in tensors if name in missing and id(tensor) in taken]:
        raise ValueError(f"{name_or_path} lacks weights of the language model, {min(lacking)} for one")
    config = model.config.get_text_config(decoder=True)
    if config is model.config:
        return model
    with torch.device("meta"):
        half = AutoModelForCausalLM.from_config(config)
    place = next(name for name, module in half.named_modules() if module is decoder_of(half))
    half.set_submodule(place, decoder_of(model))
    half.set_output_embeddings(model.get_output_embeddings())
    half.generation_config = model.generation_config
    return half.eval()


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """What a LLaVA takes of a language model besides its output layer: the module of the class that transformers
    opens for the same configuration without one.

    Raises:
        ValueError: there is none in it.
    """
    config = language_model.config.get_text_config(decoder=True)
    kind = AutoModel._model_mapping.get(type(config), None)
    for module in language_model.modules():
        if type(module) is kind:
            return module
    raise ValueError(f"a {config.model_type} without its output layer is no model of transformers: no LLaVA holds it")


def load_image_processor(
    name_or_path: str, image_aspect_ratio: str, side: int | None, grids: list[str]
) -> BaseImageProcessor:
    """The vision tower's own image processor, or one that pads to a square of the same size, as LLaVA-1.5's does, or
    one that cuts a picture into tiles, as LLaVA-NeXT's does, of the `side` that the tower's configuration has.

    Raises:
        ValueError: there is none of that name, or none that makes one picture of one size.
    """
    with opening(name_or_path):
        image_processor = AutoImageProcessor.from_pretrained(name_or_path)
        square, wide = (image_processor(Image.new("RGB", size), return_tensors="pt") for size in ((64, 64), (128, 64)))
        pixel_values = square["pixel_values"]
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[-1] != pixel_values.shape[-2]:
            raise ValueError("it cuts pictures of any size (as NaFlex does): take a tower of one square picture size")
    if image_aspect_ratio == "crop":
        if pixel_values.ndim == 5:
            raise ValueError(f"{name_or_path} cuts pictures into tiles: take --image_aspect_ratio pad or anyres")
        if pixel_values.shape != wide["pixel_values"].shape:
            raise ValueError(f"{name_or_path} makes no square of a wide picture: take --image_aspect_ratio pad")
        if more := square.keys() - {"pixel_values"}:
            raise ValueError(f"{name_or_path} gives {min(more)} with a picture, and no LLaVA takes it: have it padded")
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


@torch.no_grad()
def probe_tower(tower: PreTrainedModel, image_processor: BaseImageProcessor, name: str) -> tuple[int, int, int]:
    """What a tower does with pictures of the size that its image processor makes.

    Returns:
        How many tokens it gives, how many of these stand beside those of the patches, and how many hidden states.

    Raises:
        ValueError: it does not take such pictures, or gives no grid of patches.
    """
    picture = Image.new("RGB", (64, 64))
    pixel_values = image_processor([picture, picture], return_tensors="pt")["pixel_values"].to(tower.dtype)
    pixel_values = pixel_values.flatten(0, -4)[:2]
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
    in_one_row = len(states[0]) == 1  # both pictures
    if in_one_row and is_anyres(image_processor):
        raise ValueError(
            f"anyres: {name} is a {tower.config.model_type}, which puts the patches of all tiles into one row: take "
            "--image_aspect_ratio pad"
        )
    tokens, patches = states[0].shape[-2] // (1 + in_one_row), (side // patch) ** 2
    if states[0].ndim != 3 or tokens < patches:
        raise ValueError(f"{name} gives {tokens} tokens for {patches} patches, which are no grid")
    return tokens, tokens - patches, len(states)


def load_tokenizer(language_model_name_or_path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `<image>`, a pad token, and a template fit for a LLaVA.

    Raises:
        ValueError: it has no chat template, so the model is not a chat model.
    """
    with opening(language_model_name_or_path):
        # Mistral's own format, where its package is installed, has no chat template
        settings = {"trust_remote_code": trust_remote_code, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(language_model_name_or_path, **settings)
        patch_chat_template(tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if words := [word for word, i in tokenizer.get_vocab().items() if i == image_id and word != IMAGE_TOKEN]:
        raise ValueError(
            f"{language_model_name_or_path}: the ids of its vocabulary have a hole, and {IMAGE_TOKEN} would get "
            f"{image_id}, which is {words[0]!r}: give the missing ids a token each"
        )
    if hasattr(tokenizer, "image_token"):  # another, of a family that sees, which the processor would take
        tokenizer.image_token = IMAGE_TOKEN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or end_of_turn_tokens(tokenizer)[0]
    return tokenizer
