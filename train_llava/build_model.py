"""Assembles a vision tower and a chat language model into one LLaVA checkpoint, and verifies it.

    python -m train_llava.build_model \
        --vision_model_name_or_path openai/clip-vit-large-patch14-336 \
        --language_model_name_or_path Qwen/Qwen1.5-4B-Chat \
        --output_dir output/llava-qwen1.5-4b

Both models keep their weights; only the projector between them is new. The folder is a standard checkpoint:
weights, processor, chat template and generation config. Its class is `LlavaForConditionalGeneration`; with
`--image_aspect_ratio anyres`, `LlavaNextForConditionalGeneration`; with `--pixel_shuffle 2`, which makes four times
fewer tokens of a picture, `Idefics3ForConditionalGeneration`.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from train_llava.cli import Dtype, parse_arguments, parse_first, run_command
from train_llava.common.files import opening, written_whole

FOLDED = {"modality_projection.proj.weight"}  # the projector of an Idefics3
PINPOINTS = ["1x2", "2x1", "2x2", "3x1", "1x3"]  # LLaVA-NeXT's


@dataclass
class BuildArguments:
    vision_model_name_or_path: str = HfArg(help="A tower over a grid of patches, such as CLIP: folder or hub id.")
    language_model_name_or_path: str = HfArg(help="A causal language model with a chat template.")
    output_dir: str = HfArg(help="The LLaVA checkpoint to write; it must not exist yet.")
    dtype: Dtype = HfArg(default="auto", help="What the weights are written in; auto: the language model's own.")
    vision_feature_layer: int | None = HfArg(default=None, help="The hidden state for the projector; default: -2.")
    vision_feature_select_strategy: Literal["auto", "default", "full"] = HfArg(
        default="auto", help="default drops the class token, full keeps all; auto: default if there is one."
    )
    image_aspect_ratio: Literal["crop", "pad", "anyres"] = HfArg(
        default="crop", help="crop: as the tower does; pad: to a square (LLaVA-1.5); anyres: tiles (LLaVA-NeXT)."
    )
    image_grid_pinpoints: list[str] | None = HfArg(default=None, help=f"Tile grids; default: {' '.join(PINPOINTS)}.")
    pixel_shuffle: int | None = HfArg(
        default=None, help="Fold N x N patches of a SigLIP into a token: N x N times fewer (Idefics3, as SmolVLM)."
    )
    projector: str | None = HfArg(default=None, help="A trained projector.safetensors, or LLaVA's mm_projector.bin.")
    skip_checks: bool = HfArg(default=False, help="Do not run the assembled model.")
    verbose: bool = HfArg(default=False, help="List the checks of the assembled model, with what each measured.")
    trust_remote_code: bool = HfArg(default=False, help="Run code that comes with a tokenizer.")

    def __post_init__(self) -> None:
        if self.image_aspect_ratio != "anyres" and self.image_grid_pinpoints is not None:
            raise ValueError("--image_grid_pinpoints goes with --image_aspect_ratio anyres")
        if self.pixel_shuffle is not None:
            if self.pixel_shuffle < 2:
                raise ValueError(f"--pixel_shuffle {self.pixel_shuffle}: 2 or more")
            if self.image_aspect_ratio == "pad":
                raise ValueError("--pixel_shuffle: an Idefics3 stretches pictures (crop) or cuts them (anyres)")
            if self.vision_feature_layer is not None or self.vision_feature_select_strategy != "auto":
                raise ValueError("--pixel_shuffle: an Idefics3 reads the tower's output, without --vision_feature_…")
        for grid in self.image_grid_pinpoints or []:
            if not re.fullmatch("[1-9]x[1-9]", grid):
                raise ValueError(f"--image_grid_pinpoints {grid}: rows x columns of tiles, 1 to 9 each, as in 2x3")


if __name__ == "__main__":
    parse_first(BuildArguments)  # before the imports that take seconds

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase

from train_llava.model import count_parameters, module_name
from train_llava.modeling import kinds, parts
from train_llava.modeling.kinds import Config, Llava
from train_llava.modeling.templates import complete_generation_config
from train_llava.modeling.verification import reference_outputs, verify_in_fresh_process, verify_text_path
from train_llava.modeling.weights import PROJECTOR
from train_llava.training.cards import write_card


def build_model(arguments: BuildArguments) -> None:
    """Writes a LLaVA checkpoint. An OSError or ValueError says why it cannot be; then nothing is left behind."""
    vision, language = arguments.vision_model_name_or_path, arguments.language_model_name_or_path
    output_dir, layer, projector = arguments.output_dir, arguments.vision_feature_layer, arguments.projector
    trained_projector = None if projector is None else load_projector(projector)
    aspect_ratio, grids, fold = arguments.image_aspect_ratio, arguments.image_grid_pinpoints, arguments.pixel_shuffle
    if fold is None:
        layer, grids = -2 if layer is None else layer, grids or PINPOINTS
    with written_whole(output_dir) as folder:
        # The parts; a configuration is checked before code that comes with a tokenizer may run
        parts.part_config(language)
        tokenizer = parts.load_tokenizer(language, arguments.trust_remote_code)
        print(f"language model  {language}")
        language_model = parts.load_language_model(language, arguments.dtype)
        print(f"vision tower    {vision}")
        vision_tower = parts.load_vision_tower(vision, language_model.dtype)
        image_processor = parts.load_image_processor(vision_tower, vision, aspect_ratio, grids, fold)

        # The tower's tokens for a picture, and which of them the projector reads
        tokens, num_prefix_tokens, states = parts.probe_tower(vision_tower, image_processor, vision)
        if layer is not None and not -states <= layer < states:
            raise ValueError(f"--vision_feature_layer {layer}: the tower has hidden states {-states} to {states - 1}")
        strategy = arguments.vision_feature_select_strategy
        if strategy == "auto":
            strategy = "default" if num_prefix_tokens else "full"
        part = vision_tower if fold is None else parts.as_idefics3(vision_tower, vision)
        patches = (tokens - num_prefix_tokens, vision_tower.config.patch_size, num_prefix_tokens)
        processor = kinds.make_processor(image_processor, tokenizer, *patches, strategy, fold)

        # The LLaVA
        with parts.running_as_one():
            if not arguments.skip_checks:
                verify_text_path(language_model, processor)
                references = reference_outputs(vision_tower, language_model, processor, layer)
            tokens -= int(strategy == "default")
            config = kinds.make_config(part, language_model, processor, tokens, layer, fold)
            model = assemble(part, language_model, processor.tokenizer, config)
        note = "Put together and not trained yet: the projector is random."  # in the model card
        if trained_projector is not None:
            put_projector(model, trained_projector, projector)
            note = "Put together with a trained projector."
            if hasattr(model.model, "image_newline") and "image_newline" not in trained_projector:
                untrained = "It has no image_newline, which ends a row of tiles: it is random and needs training."
                note += f" {untrained}"
                print(f"--projector {projector}: {untrained}", file=sys.stderr)

        # Its folder
        model.save_pretrained(folder, state_dict=published_names(model))
        processor.save_pretrained(folder)
        write_card(folder, Path(output_dir).name, [vision, language], [], [note])
        rows = [(part, f"{total:,} parameters") for part, (_, total) in count_parameters(model).items()]
        del model, part, vision_tower, language_model  # the checks load the saved model: never two in memory
        if not arguments.skip_checks:
            try:
                checks = verify_in_fresh_process(folder, *references)
            except ValueError as error:
                raise ValueError(str(error).replace(str(folder), output_dir)) from error
            rows += [check for check in checks if arguments.verbose or check[1].startswith("not equal")]
            if not arguments.verbose:
                rows.append(("verified", f"{len(checks)} checks: computes as its parts do (--verbose true lists all)"))
    for label, outcome in [*rows, ("written to", output_dir)]:
        print(f"{label:<26}{outcome}")


def assemble(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
) -> Llava:
    """Joins the two models by a new projector, without copying a weight.

    The projector is LLaVA-1.5's (Liu et al., 2023), two linear layers with a GELU, or Idefics3's, one linear layer
    over the features of neighbouring patches (Laurençon et al., 2024). The model is made on the meta device, which
    takes no memory, and the two models' own modules are put into it.
    """
    # The embedding gets rows for the tokenizer's new tokens
    decoder = parts.decoder_of(language_model)
    if language_model.config.tie_word_embeddings and not hasattr(decoder, "embed_tokens"):
        kind = f"the output layer of a {decoder.config.model_type} is its embedding"
        raise ValueError(f"{kind}, and a LLaVA shares only one that is called embed_tokens")
    if (rows := max(tokenizer.get_vocab().values()) + 1) > language_model.config.vocab_size:
        language_model.resize_token_embeddings(rows, pad_to_multiple_of=64)

    # An empty LLaVA; its configuration keeps no paths of this machine
    for part in (config, config.vision_config, config.text_config):
        part.name_or_path = ""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)

    # The two models' modules, each tensor in a place of the empty LLaVA
    places = model.state_dict().keys()
    model.set_encoder(vision_tower, "image")
    model.set_decoder(decoder)
    model.lm_head = language_model.get_output_embeddings()
    filled = model.state_dict(keep_vars=True)
    taken = {id(tensor) for name, tensor in filled.items() if name in places}
    for part, kind in ((vision_tower, "vision tower"), (language_model, "language model")):
        for name, tensor in part.state_dict(keep_vars=True).items():
            if id(tensor) not in taken:
                raise ValueError(f"a LLaVA has no place for {name} of this {kind}, a {part.config.model_type}")
    if missing := places - filled.keys():
        raise ValueError(f"the two models lack tensors that a LLaVA needs, for example {min(missing)}")

    # The projector; with a seed, so that the same command writes the same folder
    with torch.random.fork_rng():
        torch.manual_seed(0)
        name = module_name(model, "projector")
        projector = type(getattr(model.model, name))(config).to(language_model.dtype)
        setattr(model.model, name, projector)
        if hasattr(model.model, "image_newline"):
            width = config.text_config.hidden_size
            newline = torch.randn(width, dtype=language_model.dtype) / width**0.5  # as transformers begins it
            model.model.image_newline = torch.nn.Parameter(newline)

    model.generation_config = language_model.generation_config
    complete_generation_config(model.generation_config, tokenizer)
    return model.eval()


def load_projector(path: str) -> dict[str, torch.Tensor]:
    """Reads a trained projector: its tensors by their names in a LLaVA, and `image_newline` where it has one.

    `path` is a file of safetensors or of torch, or the folder of a run that trained the projector alone. An
    OSError or ValueError says why it cannot be read, or is no such projector.
    """
    if Path(path).is_dir():
        path = str(Path(path) / PROJECTOR)
    with opening(path):
        try:
            saved = load_file(path)
        except SafetensorError:
            saved = load_torch_tensors(path)
        # The names in a LLaVA
        projector = {}
        for name, tensor in saved.items():
            name = re.sub(r"^(model\.)?((mm_projector|multi_modal_projector|connector)\.)?", "", name)
            # LLaVA's authors number the layers: 0, an activation, 2
            projector[re.sub(r"^0\.", "linear_1.", re.sub(r"^2\.", "linear_2.", name))] = tensor
        layers = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
        if projector.keys() - {"image_newline"} not in (layers, FOLDED):
            raise ValueError(f"it holds {', '.join(sorted(saved)[:5])}, and no projector of two linear layers")
    return projector


def load_torch_tensors(path: str) -> dict[str, torch.Tensor]:
    """Reads a dictionary of tensors that `torch.save` wrote."""
    try:
        with open(path, "rb") as file:  # torch would believe the name of a path that ends with .safetensors
            saved = torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # of any type
        raise ValueError("it is neither safetensors nor torch's file of tensors") from error
    if not (isinstance(saved, dict) and all(isinstance(tensor, torch.Tensor) for tensor in saved.values())):
        raise ValueError("it is no dictionary of tensors")
    return saved


def put_projector(model: Llava, projector: dict[str, torch.Tensor], path: str) -> None:
    """Puts a trained projector into a LLaVA."""
    parameters = dict(getattr(model.model, module_name(model, "projector")).named_parameters())
    if lacking := parameters.keys() - projector.keys():
        without = "without --pixel_shuffle" if lacking == FOLDED else "with --pixel_shuffle"
        raise ValueError(f"--projector {path}: it was trained in a model made {without}")
    parameters |= dict(model.model.named_parameters(recurse=False))  # image_newline, with anyres
    for name in projector.keys() & parameters.keys():
        shape, needed = tuple(projector[name].shape), tuple(parameters[name].shape)
        if shape != needed:
            raise ValueError(f"--projector {path}: {name} is {shape}, and these two models need {needed}")
        parameters[name].data = projector[name].to(parameters[name].dtype)


def published_names(model: Llava) -> dict[str, torch.Tensor]:
    """A LLaVA's weights, those of CLIP and SigLIP under the published names that other engines look for."""
    known = model.config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model")
    prefix = ".vision_tower.vision_model." if known else ".vision_tower."
    return {name.replace(".vision_tower.", prefix): tensor for name, tensor in model.state_dict().items()}


def main() -> None:
    build_model(*parse_arguments(BuildArguments))


if __name__ == "__main__":
    run_command(main)
