"""Teaches a projector SmolLM2's words for what a patch shows, before any training with SmolLM2 itself.

    python -m examples.smollm2.make_projector --language_model output/smollm2/lm --output_file words.safetensors

For each patch of a drawn scene, the projector learns the sum of three vectors: SmolLM2's embeddings of the thing in
the patch's quarter (or "nothing"), of the quarter, and of the ground's colour. A word of several tokens, such as
" top left", is the mean of their embeddings. The loss is the squared distance. This takes a minute, since the language
model does not run. `build_model --projector` puts the result into a LLaVA.

That even a linear map can bring pictures into a language model's words was found by Merullo et al. (2023, "Linearly
Mapping from Image to Text Space").
"""

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPImageProcessorPil, CLIPVisionModel

from examples.openmoji.make_parts import patch_quarters, patch_words
from examples.openmoji.scenes import Scene, draw_scene, paint
from train_llava.cli import run_command
from train_llava.common.files import replacing

CLIP = Path("examples/openmoji/parts/clip")
SCENES, STEPS, PATCHES, RATE = 2000, 600, 2048, 5e-3  # scenes in all; patches a step


def look_at(scenes: list[Scene], rng: random.Random) -> torch.Tensor:
    """The tower's patches of the scenes, `(scenes, patches, width)`, in the layer that a LLaVA reads."""
    tower, processor = CLIPVisionModel.from_pretrained(CLIP).float(), CLIPImageProcessorPil.from_pretrained(CLIP)
    patches = []
    for start in tqdm(range(0, len(scenes), 50), desc="looking"):
        pictures = [paint(scene, rng)[0] for scene in scenes[start : start + 50]]
        pixels = processor(pictures, return_tensors="pt").pixel_values
        with torch.no_grad():
            patches.append(tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:])
    return torch.cat(patches)


def words_of(scenes: list[Scene], language_model: str) -> torch.Tensor:
    """The sum of the embeddings of each patch's English words, `(scenes, patches, width of the language model)`."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    embedding = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32).get_input_embeddings()
    vectors = {}
    sums = []
    for scene in scenes:
        quarters = []
        for quarter in range(4):
            english = patch_words(scene, quarter)[:3]
            for word in english:
                if word not in vectors:
                    vectors[word] = embedding.weight.detach()[tokenizer(word).input_ids].mean(0)
            quarters.append(sum(vectors[word] for word in english))
        sums.append(torch.stack([quarters[quarter] for quarter in patch_quarters()]))
    return torch.stack(sums)


def train_projector(patches: torch.Tensor, wanted: torch.Tensor) -> dict[str, torch.Tensor]:
    """A LLaVA's projector, trained to turn patches into the wanted vectors, by the names of its weights."""
    layers = torch.nn.Linear(patches.shape[-1], wanted.shape[-1]), torch.nn.Linear(wanted.shape[-1], wanted.shape[-1])
    projector = torch.nn.Sequential(layers[0], torch.nn.GELU(), layers[1])
    patches, wanted = patches.flatten(0, 1), wanted.flatten(0, 1)
    optimizer = torch.optim.AdamW(projector.parameters(), RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 20) * (1 - step / STEPS))
    progress = tqdm(range(STEPS), desc="projector")
    for _ in progress:
        chosen = torch.randint(len(patches), (PATCHES,))
        loss = (projector(patches[chosen]) - wanted[chosen]).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
    spread = (wanted - wanted.mean(0)).pow(2).sum(-1).mean()
    print(f"loss {loss.item():.2f}; {spread.item():.2f} if every patch gave the same vector")
    weights = {}
    for number, layer in enumerate(layers, start=1):
        for name, value in layer.state_dict().items():
            weights[f"multi_modal_projector.linear_{number}.{name}"] = value
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language_model", required=True, help="The folder of SmolLM2.")
    parser.add_argument("--output_file", type=Path, required=True, help="The .safetensors file to write.")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    scenes = [draw_scene(rng, held_out=False) for _ in range(SCENES)]
    weights = train_projector(look_at(scenes, rng), words_of(scenes, args.language_model))
    with replacing(args.output_file) as file:
        save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    run_command(main)
