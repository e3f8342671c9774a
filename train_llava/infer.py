"""Asks a LLaVA checkpoint, with or without a LoRA adapter, about pictures; prints the answer alone.

python -m train_llava.infer --model_name_or_path output/run --image cat.jpg --prompt "What is in this picture?"
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from train_llava.build_model import load_checkpoint
from train_llava.cli import parse_arguments, run_command
from train_llava.data import encode_prompts
from train_llava.pictures import open_image


@dataclass
class InferArguments:
    model_name_or_path: str = field(metadata={"help": "A LLaVA checkpoint, a folder or a hub id."})
    prompt: str = field(metadata={"help": "What to ask."})
    image: list[str] = field(default_factory=list, metadata={"help": "One or more pictures the question is about."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "A LoRA adapter trained on that model."})
    max_new_tokens: int = field(default=128, metadata={"help": "The longest answer, in tokens."})


def load_model(
    model_name_or_path: str, adapter_name_or_path: str | None = None
) -> tuple[LlavaForConditionalGeneration | PeftModel, LlavaProcessor]:
    """Opens a checkpoint, and an adapter on top of it, on the accelerator where there is one.

    Raises:
        ValueError: either cannot be opened, or the adapter is not one of this model's.
    """
    model, processor = load_checkpoint(model_name_or_path)
    if adapter_name_or_path is not None:
        model = load_adapter(model, adapter_name_or_path, model_name_or_path)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return model.to(device).eval(), processor


def load_adapter(model: LlavaForConditionalGeneration, adapter_name_or_path: str, model_name: str) -> PeftModel:
    """Puts a LoRA adapter on a model, and makes sure that every tensor of it found its place there."""
    try:
        saved = load_peft_weights(adapter_name_or_path, device="cpu")
    except (OSError, ValueError) as error:
        raise ValueError(f"{adapter_name_or_path} is no adapter folder, and no adapter on the hub") from error
    try:
        adapted = PeftModel.from_pretrained(model, adapter_name_or_path)
        fits = get_peft_model_state_dict(adapted).keys() == saved.keys()
    except (RuntimeError, ValueError):  # shapes that differ; names that are not there
        fits = False
    if not fits:
        raise ValueError(f"the adapter {adapter_name_or_path} was trained on another model than {model_name}")
    return adapted


@torch.inference_mode()
def generate(
    model: LlavaForConditionalGeneration | PeftModel,
    processor: LlavaProcessor,
    conversations: list[list[dict[str, Any]]],
    images: list[Image.Image],
    max_new_tokens: int = 128,
) -> list[str]:
    """Greedy answers to conversations that end with a question; `images` in the order of their `<image>` tokens."""
    inputs = encode_prompts(processor, conversations, images).to(model.device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def main() -> None:
    (arguments,) = parse_arguments(InferArguments)
    images = [open_image(Path(name)) for name in arguments.image]
    model, processor = load_model(arguments.model_name_or_path, arguments.adapter_name_or_path)
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": arguments.prompt}]
    conversation = [{"role": "user", "content": content}]
    print(generate(model, processor, [conversation], images, arguments.max_new_tokens)[0])


if __name__ == "__main__":
    run_command(main)
