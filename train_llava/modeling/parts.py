"""Opens the parts of a LLaVA: vision tower, language model, image processor and tokenizer.

Each function raises a ValueError where it cannot open a part, or where no LLaVA can hold it. The message
names the part and the reason.
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
    Idefics3VisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer

from train_llava.common.files import opening
from train_llava.dataset.images import is_anyres
from train_llava.model import refuse_adapter
from train_llava.modeling.kinds import MOST_TILES
from train_llava.modeling.templates import end_of_turn_tokens, patch_chat_template
from train_llava.modeling.towers import unused_parameters
from train_llava.records import IMAGE_TOKEN


@contextmanager
def running_as_one() -> Iterator[None]:
    """Turns any error of an architecture that does not run inside a LLaVA into one ValueError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        raise ValueError(f"the two do not run as one LLaVA of transformers: {error}") from error


def part_config(name_or_path: str) -> PreTrainedConfig:
    """Reads the configuration of one of the two models."""
    refuse_adapter(name_or_path)
    with opening(name_or_path):
        settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
        model_type = settings.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"transformers has no code for a {model_type}, and a LLaVA cannot bring its own")
        if settings.get("quantization_config"):
            raise ValueError("its weights are quantised: take the model that they were made from")
        return AutoConfig.from_pretrained(name_or_path)


def load_part(auto_class: Any, name_or_path: str, dtype: Any) -> tuple[PreTrainedModel, set[str]]:
    """Opens one of the two models. Returns it, and the names of the weights that its folder lacks."""
    # The class of transformers that opens it
    config = part_config(name_or_path)
    model = f"{name_or_path} is a {config.model_type}"
    if auto_class is AutoModelForCausalLM and type(config) not in auto_class._model_mapping:
        auto_class = AutoModelForImageTextToText  # a model of another kind may contain a language model
    if type(config) not in auto_class._model_mapping:
        raise ValueError(f"{model}, which is no model of that kind: no {auto_class.__name__} has it")
    if auto_class is AutoModelForImageTextToText:
        text_config = config.get_text_config(decoder=True)
        if type(text_config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{model}, whose text half transformers never opens alone")
    with opening(name_or_path):
        part, loading_info = auto_class.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    return part.eval(), set(loading_info["missing_keys"])


def load_vision_tower(name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """Opens a vision tower, from a checkpoint that holds it alone or inside a larger model, such as CLIP."""
    model, missing = load_part(AutoModel, name_or_path, dtype)
    tower, kind = model.get_encoder("image"), model.config.model_type

    # The tower takes pictures, and nothing else
    parameters = signature(tower.forward).parameters
    if "pixel_values" not in parameters or "input_ids" in parameters:
        none = "nor does transformers find one in it that takes plain pictures"
        raise ValueError(f"{name_or_path} is a {kind} model, not a vision tower, {none}")
    required = [name for name, parameter in parameters.items() if parameter.default is Parameter.empty]
    its_tower = f"{name_or_path} is a {kind}, whose vision tower"
    if others := [name for name in required if name not in ("pixel_values", "args", "kwargs")]:
        raise ValueError(f"{its_tower} takes {' and '.join(others)} with a picture, which no LLaVA gives it")
    if not isinstance(tower, PreTrainedModel):
        raise ValueError(f"{its_tower} is no model by itself in transformers")

    # Missing weights that no hidden state uses are zero, such as the pooler of a ViT classifier
    prefix = next(name for name, module in model.named_modules() if module is tower)
    missing = {name.removeprefix(prefix).lstrip(".") for name in missing if name.startswith(prefix)}
    if type(tower.config) not in AutoModel._model_mapping:
        tower = as_clip(tower, name_or_path)
    if missing:
        with running_as_one():
            unused = unused_parameters(tower.config, -1)
        if used := missing - unused:
            raise ValueError(f"{name_or_path} lacks weights of its vision tower, for example {min(used)}")
        for name in missing:
            torch.nn.init.zeros_(tower.get_parameter(name))
    return tower


@torch.no_grad()
def as_clip(tower: PreTrainedModel, name: str) -> PreTrainedModel:
    """Makes a CLIP of a tower that transformers opens only inside its larger model, such as MetaCLIP 2."""
    config = CLIPVisionConfig.from_dict(tower.config.to_dict() | {"model_type": CLIPVisionConfig.model_type})
    try:
        clip = CLIPVisionModel(config).to(tower.dtype).eval()
        clip.load_state_dict(tower.state_dict())
        picture = torch.linspace(-2, 2, 3 * config.image_size**2, dtype=tower.dtype)
        picture = picture.reshape(1, 3, config.image_size, -1)
        ours = clip(picture, output_hidden_states=True).hidden_states
        theirs = tower(picture, output_hidden_states=True).hidden_states
        if not torch.stack(ours).equal(torch.stack(theirs)):
            raise ValueError("its features are others")
    except (RuntimeError, TypeError, ValueError) as error:
        opened = f"transformers opens a {tower.config.model_type} inside its larger model only"
        raise ValueError(f"{name}: {opened}, and it is no CLIP under another name") from error
    return clip


@torch.no_grad()
def as_idefics3(tower: PreTrainedModel, name: str) -> PreTrainedModel:
    """Makes an Idefics3's tower of a SigLIP, or of one that is a SigLIP but for its name, without copying a weight."""
    no_siglip = f"--pixel_shuffle: {name} is a {tower.config.model_type}, and the tower of an Idefics3 is a SigLIP"
    settings = tower.config.to_dict() | {"model_type": Idefics3VisionConfig.model_type}
    with running_as_one():
        unused, config = unused_parameters(tower.config, None), Idefics3VisionConfig.from_dict(settings)
    with torch.device("meta"):
        siglip = Idefics3VisionTransformer(config).eval()
    tensors = {name: tensor for name, tensor in tower.state_dict().items() if name not in unused}
    places = siglip.state_dict()
    for name in sorted(tensors.keys() | places.keys()):
        if name not in tensors or name not in places or tensors[name].shape != places[name].shape:
            raise ValueError(f"{no_siglip}: {name} is in one of them alone")
    siglip.load_state_dict(tensors, assign=True)

    # Both on a picture. transformers places the patches of some grids, such as 19 x 19, wrongly in an Idefics3
    picture = torch.linspace(-2, 2, 3 * config.image_size**2, dtype=tower.dtype).reshape(1, 3, config.image_size, -1)
    if not siglip(picture).last_hidden_state.equal(tower(picture).last_hidden_state):
        grid = config.image_size // config.patch_size
        raise ValueError(f"{no_siglip} with other features, or places {grid} x {grid} patches otherwise")
    return siglip


def load_language_model(name_or_path: str, dtype: str) -> PreTrainedModel:
    """Opens a causal language model, or the text half of a model with its own vision tower, such as Gemma 3."""
    # All weights of the decoder and of the output layer have to be there
    model, missing = load_part(AutoModelForCausalLM, name_or_path, dtype)
    decoder, output_layer = decoder_of(model), model.get_output_embeddings()
    needed = [*decoder.state_dict(keep_vars=True).values(), *output_layer.state_dict(keep_vars=True).values()]
    needed_ids = {id(tensor) for tensor in needed}
    tensors = model.state_dict(keep_vars=True).items()
    if lacking := [name for name, tensor in tensors if name in missing and id(tensor) in needed_ids]:
        raise ValueError(f"{name_or_path} lacks weights of the language model, for example {min(lacking)}")

    # A model with its own vision tower: its modules in the class of its text half
    text_config = model.config.get_text_config(decoder=True)
    if text_config is model.config:
        return model
    with torch.device("meta"):
        text_half = AutoModelForCausalLM.from_config(text_config)
    place = next(name for name, module in text_half.named_modules() if module is decoder_of(text_half))
    text_half.set_submodule(place, decoder)
    text_half.set_output_embeddings(output_layer)
    text_half.generation_config = model.generation_config
    return text_half.eval()


def decoder_of(language_model: PreTrainedModel) -> PreTrainedModel:
    """Finds a language model's decoder, by the class that transformers opens without an output layer."""
    config = language_model.config.get_text_config(decoder=True)
    decoder_class = AutoModel._model_mapping.get(type(config), None)
    for module in language_model.modules():
        if type(module) is decoder_class:
            return module
    raise ValueError(f"transformers has no {config.model_type} without its output layer: no LLaVA holds it")


def load_image_processor(
    vision_tower: PreTrainedModel, name: str, image_aspect_ratio: str, grids: list[str] | None, fold: int | None
) -> BaseImageProcessor:
    """Opens the tower's image processor. For `pad` or `anyres`, LLaVA-1.5's or LLaVA-NeXT's takes its place.

    `grids` are the grids of tiles of `anyres`, such as "2x3". With `fold`, an Idefics3's takes its place. It has one
    grid: the most tiles, 2 x 2 by default.
    """
    # Its output for a square and for a wide picture
    with opening(name):
        image_processor = AutoImageProcessor.from_pretrained(name)
        square = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")
        wide = image_processor(Image.new("RGB", (128, 64)), return_tensors="pt")
        pixel_values = square["pixel_values"]
        if pixel_values.ndim not in (4, 5) or pixel_values.shape[-1] != pixel_values.shape[-2]:
            raise ValueError("it cuts pictures of any size (as NaFlex): take a tower of one square picture size")

    if image_aspect_ratio == "crop" and fold is None:
        take = "take --image_aspect_ratio pad"
        if pixel_values.ndim == 5:
            raise ValueError(f"{name} cuts pictures into tiles: {take} or anyres")
        if pixel_values.shape != wide["pixel_values"].shape:
            raise ValueError(f"{name} makes no square of a wide picture: {take}")
        if others := square.keys() - {"pixel_values"}:
            raise ValueError(f"{name} gives {min(others)} with a picture, which no LLaVA takes: {take}")
        return image_processor

    # The models' own processors, with its numbers; imported here, since they warn of a missing torchvision
    from transformers import Idefics3ImageProcessor, LlavaImageProcessor, LlavaNextImageProcessor

    taken_over = ("resample", "image_mean", "image_std", "rescale_factor")
    settings = {name: value for name, value in image_processor.to_dict().items() if name in taken_over}
    if image_aspect_ratio == "pad":
        size = {"height": pixel_values.shape[-1], "width": pixel_values.shape[-1]}
        return LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size, crop_size=size, **settings)
    side = getattr(vision_tower.config, "image_size", None)
    if not isinstance(side, int):
        raise ValueError(f"anyres: {name} takes pictures of {side} pixels, and tiles are squares of one size")
    if fold is not None:
        anyres = image_aspect_ratio == "anyres"
        tiles = max(int(n) for grid in grids or ["2x2"] for n in grid[::2]) if anyres else 1
        if tiles > MOST_TILES:
            raise ValueError(f"--image_grid_pinpoints: an Idefics3 has at most {MOST_TILES} tiles a side")
        settings |= {"size": {"longest_edge": tiles * side}, "max_image_size": {"longest_edge": side}}
        ours = Idefics3ImageProcessor(do_image_splitting=anyres, do_resize=anyres, **settings)
        # It stretches a picture to a square. Without tiles, the tower's own has to do so, too
        noise = Image.effect_noise((128, 64), 100).convert("RGB")
        both = [one(noise, return_tensors="pt")["pixel_values"].flatten(0, -4)[0] for one in (ours, image_processor)]
        if not anyres and (both[0] - both[1]).abs().max() > 2 * ours.rescale_factor / min(ours.image_std):
            stretches = "an Idefics3 stretches them: take --image_aspect_ratio anyres"
            raise ValueError(f"{name} crops or pads pictures, and {stretches}")
        return ours
    pinpoints = []
    for grid in grids:
        rows, columns = grid.split("x")
        pinpoints.append([int(rows) * side, int(columns) * side])
    settings["crop_size"] = {"height": side, "width": side}
    return LlavaNextImageProcessor(image_grid_pinpoints=pinpoints, size={"shortest_edge": side}, **settings)


@torch.no_grad()
def probe_tower(tower: PreTrainedModel, image_processor: BaseImageProcessor, name: str) -> tuple[int, int, int]:
    """Runs a tower on two pictures from its image processor.

    Returns:
        Three numbers: tokens for a picture; those of them that are no patches (class token, registers); hidden states.
    """
    # Two pictures, or tiles, of the size that the image processor makes
    picture = Image.new("RGB", (64, 64))
    pixel_values = image_processor([picture, picture], return_tensors="pt")["pixel_values"].to(tower.dtype)
    pixel_values = pixel_values.flatten(0, -4)[:2]
    side, kind = pixel_values.shape[-1], tower.config.model_type
    patch_size, image_size = (getattr(tower.config, size, None) for size in ("patch_size", "image_size"))
    try:
        states = tower(pixel_values, output_hidden_states=True).hidden_states
    except (RuntimeError, TypeError, ValueError) as error:
        made, taken = f"makes pictures of {side} pixels a side", "others" if image_size is None else image_size
        raise ValueError(f"the image processor of {name} {made}, its vision tower takes {taken}: {error}") from error

    # One grid of patches for each picture
    for size in (patch_size, image_size):
        if isinstance(size, (list, tuple)):
            raise ValueError(f"{name} is a {kind} of sizes in pairs, {size}: a LLaVA takes one number")
    if states is None or not isinstance(patch_size, int) or len({state.shape for state in states}) > 1:
        raise ValueError(f"{name} is a {kind}, whose hidden states are not one grid of patches")
    # Some towers, such as Pixtral's, put the patches of all pictures into one row
    in_one_row = len(states[0]) == 1
    if in_one_row and is_anyres(image_processor):
        raise ValueError(f"anyres: a {kind} puts the patches of all tiles into one row: take --image_aspect_ratio pad")
    tokens, patches = states[0].shape[-2] // (1 + in_one_row), (side // patch_size) ** 2
    if states[0].ndim != 3 or tokens < patches:
        raise ValueError(f"{name} gives {tokens} tokens for {patches} patches, which are no grid")
    return tokens, tokens - patches, len(states)


def load_tokenizer(language_model_name_or_path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Opens the language model's tokenizer, and adds `<image>`, a pad token and a patched chat template."""
    with opening(language_model_name_or_path):
        # Mistral's own format, which is read where its package is installed, has no chat template
        settings = {"trust_remote_code": trust_remote_code, "mistral_format": False}
        tokenizer = AutoTokenizer.from_pretrained(language_model_name_or_path, **settings)
        patch_chat_template(tokenizer)
    # <image>, with an id of its own
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if words := [word for word, i in tokenizer.get_vocab().items() if i == image_id and word != IMAGE_TOKEN]:
        hole = f"the ids of its vocabulary have a hole, and {IMAGE_TOKEN} would get that of {words[0]!r}"
        raise ValueError(f"{language_model_name_or_path}: {hole}: give the missing ids a token each")
    if hasattr(tokenizer, "image_token"):  # tokenizers of vision models have their own, which the processor would take
        tokenizer.image_token = IMAGE_TOKEN
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or end_of_turn_tokens(tokenizer)[0]
    return tokenizer
