"""What differs between the three kinds of models: LLaVA, LLaVA-NeXT (with tiles) and Idefics3 (with fewer tokens).

Their processors and configurations, and the tokens of a picture. Their batches of pictures are in images.py.
"""

import math
from typing import Any

import torch
from transformers import (
    BaseImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train_llava.dataset.images import is_anyres
from train_llava.modeling.towers import tower_states
from train_llava.records import IMAGE_TOKEN

Config = LlavaConfig | LlavaNextConfig | Idefics3Config
Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | Idefics3ForConditionalGeneration
Processor = LlavaProcessor | LlavaNextProcessor | Idefics3Processor
MOST_TILES = 6  # a side, for which an Idefics3's processor has tokens
# The modules of the parts: their names in LLaVA and LLaVA-NeXT, and in Idefics3. The language model has all others
PARTS = {
    "vision tower": {"vision_tower", "vision_model"},
    "projector": {"multi_modal_projector", "image_newline", "connector"},
}


def make_processor(
    image_processor: BaseImageProcessor,
    tokenizer: PreTrainedTokenizerBase,
    patches: int,
    patch_size: int,
    num_prefix_tokens: int,
    strategy: str,
    pixel_shuffle: int | None,
) -> Processor:
    """The processor of a new model, whose tower gives `num_prefix_tokens` and `patches` for a picture.

    A ValueError says that patches cannot be folded (`pixel_shuffle`), or that `strategy` leaves no grid for tiles.
    """
    options = {"image_processor": image_processor, "tokenizer": tokenizer, "chat_template": tokenizer.chat_template}
    anyres, dropped = is_anyres(image_processor), int(strategy == "default")
    if pixel_shuffle is not None:
        side = math.isqrt(patches)
        if side % pixel_shuffle:
            folds = [str(n) for n in range(2, side + 1) if side % n == 0]
            raise ValueError(f"--pixel_shuffle {pixel_shuffle}: {side} x {side} patches fold by {', '.join(folds)}")
        # Without rows of their own, the tokens in front of pictures and tiles would be read as words
        tokens = ["<global-img>"]
        if anyres:
            tokens += [f"<row_{i + 1}_col_{j + 1}>" for i in range(MOST_TILES) for j in range(MOST_TILES)]
        tokenizer.add_tokens(tokens, special_tokens=True)
        return Idefics3Processor(image_seq_len=patches // pixel_shuffle**2, **options)
    if anyres and num_prefix_tokens != dropped:
        beside = f"of the {num_prefix_tokens} tokens beside the patches of the tower"
        raise ValueError(f"anyres: --vision_feature_select_strategy {strategy} drops {dropped} {beside}")
    return (LlavaNextProcessor if anyres else LlavaProcessor)(
        patch_size=patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=num_prefix_tokens,
        **options,
    )


def make_config(
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    processor: Processor,
    tokens: int,
    layer: int | None,
    pixel_shuffle: int | None,
) -> Config:
    """The configuration of a new model. A picture has `tokens` tokens; `layer`: see `tower_features`."""
    image_processor, image_token_id = processor.image_processor, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    settings: dict[str, Any] = {
        "vision_config": vision_tower.config,
        "text_config": language_model.config,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "dtype": language_model.dtype,
        "tie_word_embeddings": language_model.config.tie_word_embeddings,
    }
    if pixel_shuffle is not None:
        vision_tower.config.size = dict(image_processor.size)  # of the largest picture in tiles, for the memory
        return Idefics3Config(image_token_id=image_token_id, scale_factor=pixel_shuffle, **settings)
    if is_anyres(image_processor):
        settings["image_grid_pinpoints"] = image_processor.image_grid_pinpoints
    return (LlavaNextConfig if is_anyres(image_processor) else LlavaConfig)(
        image_token_index=image_token_id,
        image_seq_length=tokens,
        vision_feature_layer=layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        **settings,
    )


def picture_text(processor: Processor, side: int, size: tuple[int, int]) -> str:
    """What stands for a picture of this width and height: an `<image>` for each feature, and what goes around them.

    `side`: see `chat.image_size`.
    """
    prepared: dict[str, Any] = {"pixel_values": torch.empty(1, 3, side, side), "image_sizes": [size[::-1]]}
    if isinstance(processor, Idefics3Processor):
        _, rows, columns = processor.image_processor.get_number_of_image_patches(*size[::-1])
        prepared = {"rows": [[rows]], "cols": [[columns]]}
    return processor.replace_image_token(prepared, 0)


def complete_processor(processor: Processor, config: Config, side: int) -> bool:
    """Sets a LLaVA's number of tokens a picture, measured on the tower. Returns whether it was another, or unsaved."""
    if isinstance(processor, Idefics3Processor):
        return False
    saved = None if processor.patch_size is None else picture_text(processor, side, (side, side))
    processor.patch_size = config.vision_config.patch_size
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    _, output = tower_states(config.vision_config, side, num_hidden_layers=1)
    processor.num_additional_image_tokens = output.hidden_states[0].shape[1] - (side // processor.patch_size) ** 2
    return saved != picture_text(processor, side, (side, side))


def picture_features(llava: Llava, pictures: int) -> torch.Tensor:
    """The projector's output `(tokens, width)`, on the meta device, for pictures of the size with the most tokens."""
    side = llava.config.vision_config.image_size
    if isinstance(llava.config, Idefics3Config):
        # Its own functions look at numbers, which are not there
        tower, grid = llava.model.vision_model, side // llava.config.vision_config.patch_size
        tiles = getattr(llava.config.vision_config, "size", {}).get("longest_edge", side) // side
        images = pictures * (1 + tiles**2 if tiles > 1 else 1)
        pixel_values = torch.empty(images, 3, side, side, dtype=llava.dtype, device="meta")
        mask = torch.empty(images, grid, grid, dtype=torch.bool, device="meta")
        states = tower.encoder(inputs_embeds=tower.embeddings(pixel_values, mask)).last_hidden_state
        return llava.model.connector(tower.post_layernorm(states)).flatten(0, 1)
    shape, options = (pictures, 3, side, side), {}
    if isinstance(llava.config, LlavaNextConfig):
        largest = max(llava.config.image_grid_pinpoints, key=math.prod)
        options["image_sizes"] = [tuple(largest)] * pictures
        shape = (pictures, 1 + math.prod(largest) // side**2, 3, side, side)
    pixel_values = torch.empty(shape, dtype=llava.dtype, device="meta")
    return torch.cat(list(llava.model.get_image_features(pixel_values, **options).pooler_output))
