"""Puts a CLIP vision tower and a chat language model together into one LLaVA checkpoint, and proves that it did.

    python -m train_llava.build_model \
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 \
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat \
        --output_dir output/llava-qwen1.5-4b

Both models keep their weights; only the projector between them is new. The folder is a standard
`LlavaForConditionalGeneration` checkpoint: weights, processor, chat template and generation config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from train_llava.chat import complete_template, end_of_turn_tokens
from train_llava.checks import check_checkpoint, reference_outputs
from train_llava.cli import opening, parse_arguments, run_command, written_whole
from train_llava.model import complete_generation_config, count_parameters, pad_left
from train_llava.records import IMAGE_TOKEN
from train_llava.reports import write_card


@dataclass
class BuildArguments:
    vision_model_name_or_path: str = field(metadata={"help": "CLIP or SigLIP: a folder or a hub id."})
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
    image_aspect_ratio: Literal["crop", "pad"] = field(
        default="crop",
        metadata={
            "help": "crop: as the tower's own processor does; pad: to a square first, as LLaVA-1.5, sides kept."
        },
    )
    skip_checks: bool = field(default=False, metadata={"help": "Do not run the assembled model before naming it."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a tokenizer."})


def load_part(auto_class: Any, name_or_path: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """One of the two models, and the names of those of its weights that its folder lacks.

    Raises:
        ValueError: it cannot be opened, or not so that a LLaVA could hold it; the message says why.
    """
    with opening(name_or_path):
        settings, _ = PreTrainedConfig.get_config_dict(name_or_path)
        model_type = settings.get("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers has no code for a {model_type}, and a LLaVA checkpoint cannot bring its own"
            )
        if "quantization_config" in settings:
            raise ValueError("its weights are quantised: take the model that they were made from")
        config = AutoConfig.from_pretrained(name_or_path)
        if auto_class is AutoModelForCausalLM and type(config) not in auto_class._model_mapping:
            auto_class = AutoModelForImageTextToText  # it may have a language model in it
        if type(config) not in auto_class._model_mapping:
            raise ValueError(f"a {model_type} is no model of that kind")
        model, loading = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    return model.eval(), set(loading["missing_keys"])


def load_vision_tower(name_or_path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The vision transformer of a published CLIP or SigLIP, or of a checkpoint that holds the tower alone.

    Raises:
        ValueError: the checkpoint has no vision tower of that kind, or not all of its weights.
    """
    model, missing = load_part(AutoModel, name_or_path, dtype=dtype)
    tower = model.get_encoder("image")
    if tower.config.model_type == "siglip2_vision_model":
        raise ValueError(f"{name_or_path} takes pictures of any size (NaFlex): take a SigLIP 2 of one picture size")
    if tower.config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"{name_or_path} is a {model.config.model_type} model, not a CLIP or SigLIP vision tower")
    prefix = next(name for name, module in model.named_modules() if module is tower)
    if lacking := sorted(name for name in missing if name.startswith(prefix)):
        raise ValueError(f"{name_or_path} lacks weights of its vision tower, {lacking[0]} for one")
    return tower


def load_language_model(name_or_path: str, dtype: str) -> PreTrainedModel:
    """A causal language model; of one that comes with a vision tower of its own, such as Gemma 3, the text half.

    Raises:
        ValueError: there is none of that name, or not all of its weights.
    """
    model, missing = load_part(AutoModelForCausalLM, name_or_path, dtype=dtype)
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


def make_processor(
    vision_model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
    tower: PreTrainedModel,
    vision_feature_select_strategy: str,
    image_aspect_ratio: str = "crop",
) -> LlavaProcessor:
    """The processor that writes as many `<image>` tokens as the tower gives features, for this tower and tokenizer.

    Raises:
        ValueError: the tower's image processor makes pictures of another size than the tower takes.
    """
    with opening(vision_model_name_or_path):
        image_processor = AutoImageProcessor.from_pretrained(vision_model_name_or_path)
    if image_aspect_ratio == "pad":
        from transformers import LlavaImageProcessor  # here, since it warns of a missing torchvision when imported

        kept = ("resample", "image_mean", "image_std", "rescale_factor")
        settings = {name: value for name, value in image_processor.to_dict().items() if name in kept}
        size = {"height": tower.config.image_size, "width": tower.config.image_size}
        image_processor = LlavaImageProcessor(do_pad=True, do_center_crop=False, size=size, crop_size=size, **settings)
    made = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-1]
    if made != tower.config.image_size:
        raise ValueError(
            f"the image processor of {vision_model_name_or_path} makes pictures of {made} pixels a side, "
            f"its vision tower takes {tower.config.image_size}"
        )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=vision_feature_select_strategy,
        num_additional_image_tokens=number_of_class_tokens(tower),
        chat_template=tokenizer.chat_template,
    )


def number_of_class_tokens(tower: PreTrainedModel) -> int:
    """How many tokens the tower gives beside one per patch: 1 for CLIP, 0 for SigLIP."""
    return tower.embeddings.num_positions - tower.embeddings.num_patches


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
    pad_left(tokenizer)
    return tokenizer


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vision_feature_layer: int = -2,
    vision_feature_select_strategy: str = "default",
) -> LlavaForConditionalGeneration:
    """Joins the two models by a fresh projector (Liu et al., 2023, "Improved Baselines with Visual Instruction
    Tuning": two linear layers with a GELU), without copying a weight.

    The LLaVA is made on the meta device, which takes no memory, and the two models' own modules are put into it.
    """
    if len(tokenizer) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    config = LlavaConfig(
        vision_config=vision_tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=vision_tower.embeddings.num_positions - (vision_feature_select_strategy == "default"),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        pad_token_id=tokenizer.pad_token_id,
        dtype=language_model.dtype,
    )
    for part in (config, config.vision_config, config.text_config):
        part.name_or_path = ""  # where the parts lay on this machine is no business of the checkpoint
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.base_model
    model.lm_head = language_model.get_output_embeddings()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same command writes the same folder
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(language_model.dtype)

    model.generation_config = language_model.generation_config
    complete_generation_config(model.generation_config, tokenizer)
    return model.eval()


def published(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LLaVA's weights with the tower's named as in published checkpoints, which is what other engines look for.

    transformers renames the rest itself, and writes a checkpoint that it has read under the names it had.
    """
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
    with written_whole(given.output_dir) as folder:
        tokenizer = load_tokenizer(given.language_model_name_or_path, given.trust_remote_code)
        print(f"language model  {given.language_model_name_or_path}")
        language_model = load_language_model(given.language_model_name_or_path, given.dtype)
        print(f"vision tower    {given.vision_model_name_or_path}")
        vision_tower = load_vision_tower(given.vision_model_name_or_path, language_model.dtype)
        states = vision_tower.config.num_hidden_layers + 1
        if not -states <= layer < states:
            raise ValueError(f"--vision_feature_layer {layer}: the tower has hidden states {-states} to {states - 1}")
        if strategy == "auto":
            strategy = "default" if number_of_class_tokens(vision_tower) else "full"
        processor = make_processor(
            given.vision_model_name_or_path, tokenizer, vision_tower, strategy, given.image_aspect_ratio
        )
        if not given.skip_checks:
            references = reference_outputs(vision_tower, language_model, processor, layer)
        with running_as_one():
            model = assemble(vision_tower, language_model, tokenizer, layer, strategy)
        model.save_pretrained(folder, state_dict=published(model.state_dict()))
        processor.save_pretrained(folder)
        parts = [given.vision_model_name_or_path, given.language_model_name_or_path]
        note = "Put together and not trained yet: the projector is random."
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
