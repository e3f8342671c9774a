"""Trains the two small models of the toy example, a CLIP vision tower and a Qwen2 chat model, from random weights.

    python -m examples.openmoji.make_parts --output_dir output/parts

The tower learns what stands in the quarter of each of its patches, which quarter that is, and the ground's colour. The
chat model never sees a picture. It learns to talk about scenes that are written out in words, in the place of each
patch: "dog top left red" and the same in Chinese. So all that is left for the training of a LLaVA is to bring the
tower's patches to the chat model's words.

The chat model has three lessons. First it learns to find a thing among the patches, from questions of a word or two.
Then it learns the wordings of training, with gaps and unknown words in half of them, so that it can follow wordings
that it has not seen. At last it learns whole conversations, in ChatML and with all patches.

Both see new scenes in every step, as training scenes are drawn. The two are trained at the same time, each in a
process of one thread. Models this small gain little from a second thread, and lose on a busy machine.
"""

import argparse
import random
import re
import string
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from examples.openmoji.make_data import Turns, answer, conversation, held_out_questions, question
from examples.openmoji.scenes import GROUNDS, MOTIFS, PICTURE_SIZE, Scene, draw_scene, names, paint
from examples.openmoji.wordings import LANGUAGES, TRAINING, TRAINING_WORDINGS, WORDINGS, Wordings, joined, plural

PATCH_SIZE = 16  # pixels a side; a quarter of the picture has 3 x 3 patches
SIDE = PICTURE_SIZE // PATCH_SIZE  # patches
NOTHING = len(MOTIFS)  # what stands in an empty quarter
VOCABULARY = 1152  # tokens; every motif's name, English and Chinese, is one word
PATCH, NO_TOKEN = VOCABULARY, VOCABULARY + 1  # rows of the chat model's embedding that stand for no token

CLIP_STEPS, CLIP_BATCH, CLIP_LR = 3000, 32, 1.5e-3
QWEN2_LR, MUON_LR = 3e-3, 0.02
NOISE = 0.7  # of a patch, of its size: the projector will not bring the tower's patches exactly to these words
GARBLED = 0.1  # of the words in half of the questions are left out, and as many replaced by unknown ones
TURNS = 8  # at most, in a conversation of the chat model's training
SHORT = {
    "where": {"en": [" where {x}"], "zh": ["哪里{x}"]},
    "at": {"en": [" at the {place}"], "zh": ["{place}"]},
    "beside": {"en": [" {side} the {x}"], "zh": ["{x}{side}"]},
    "count": {"en": [" count {x}"], "zh": ["几个{x}"]},
    "is there": {"en": [" there {x}"], "zh": ["有吗{x}"]},
    "more": {"en": [" more {x} {y}"], "zh": ["{x}多{y}"]},
}


class Lesson(NamedTuple):
    """A part of the chat model's training."""

    steps: int
    conversations: int  # in each step
    wordings: Wordings
    full: bool  # all patches and ChatML; otherwise one patch for each quarter, and questions and answers alone


# Qwen1.5's ChatML, without its default system prompt
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BEGIN = "<|im_start|>user\n"  # and the picture follows


def start_alone() -> random.Random:
    """Gives a training process one thread and its seeds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return random.Random(1)


def take_step(optimizers: list[torch.optim.Optimizer], loss: torch.Tensor, progress: float) -> None:
    """A step. The rates rise to their `peak` during the first 4 % of the training, and then fall to nothing."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(25 * progress, (1 - progress) / 0.96)
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()


def make_adamw(parameters: list[torch.nn.Parameter], peak: float) -> torch.optim.Optimizer:
    """AdamW without weight decay for biases and norms."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05, "peak": peak},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "peak": peak},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def patch_quarters() -> list[int]:
    """The quarter of the picture in which each patch lies."""
    return [row * 2 // SIDE * 2 + column * 2 // SIDE for row in range(SIDE) for column in range(SIDE)]


def picture_batch(
    processor: CLIPImageProcessorPil, size: int, rng: random.Random, held_out: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of scenes `(size, 3, side, side)`, prepared for the tower, with what they show.

    That is the motif in each quarter, or NOTHING, `(size, 4)`, and the number of the ground `(size,)`.
    """
    pictures, motifs, grounds = [], [], []
    for _ in range(size):
        scene = draw_scene(rng, held_out)
        pictures.append(np.asarray(paint(scene, rng)[0]))
        motifs.append([NOTHING if motif is None else motif for motif in scene.quarters])
        grounds.append(scene.ground)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    return (pixels - mean) / std, torch.tensor(motifs), torch.tensor(grounds)


def train_clip(output_dir: Path) -> None:
    """Trains a CLIP's vision tower from random weights; saves it in fp16 with its image processor."""
    rng = start_alone()
    side = {"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": PICTURE_SIZE}, crop_size=side)
    config = CLIPVisionConfig(
        image_size=PICTURE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        projection_dim=128,
    )
    tower = CLIPVisionModel(config)
    print(f"CLIP: {tower.num_parameters() / 1e6:.2f} M parameters, {CLIP_STEPS} steps")
    # Linear layers of training alone read each patch of the layer that a LLaVA reads: what stands in its quarter,
    # which quarter that is, the colour, and all three as a code of ones and zeros. From patches with such a code, a
    # projector soon finds the chat model's words
    sizes = [NOTHING + 1, 4, len(GROUNDS)]
    heads = torch.nn.ModuleList([torch.nn.Linear(128, size) for size in [*sizes, sum(sizes)]])
    quarters = torch.tensor(patch_quarters())
    optimizer = make_adamw([*tower.parameters(), *heads.parameters()], CLIP_LR)
    progress = tqdm(range(CLIP_STEPS), desc="CLIP", position=0)
    for step in progress:
        pixels, motifs, grounds = picture_batch(processor, CLIP_BATCH, rng)
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
        wanted = [motifs[:, quarters].flatten(), quarters.repeat(CLIP_BATCH), grounds.repeat_interleave(len(quarters))]
        code = torch.cat([F.one_hot(ids, size) for ids, size in zip(wanted, sizes, strict=True)], dim=1)
        loss = (heads[3](patches) - code).pow(2).sum(1).mean()
        for head, ids, weight in zip(heads, wanted, (1.0, 0.1, 0.1), strict=False):
            loss = loss + weight * F.cross_entropy(head(patches), ids)
        take_step([optimizer], loss, step / CLIP_STEPS)
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # How many things of held-out scenes are named right: the mean of their quarter's patches
    with torch.no_grad():
        pixels, motifs, _ = picture_batch(processor, 512, random.Random(2), held_out=True)
        logits = heads[0](tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]).log_softmax(-1)
    named = torch.stack([logits[:, quarters == quarter].mean(1) for quarter in range(4)], dim=1).argmax(-1)
    right = (named == motifs)[motifs != NOTHING].float()
    print(f"\nCLIP: {right.mean().item():.1%} of {len(right)} things in held-out scenes named right")
    for part in (tower.half(), processor):
        part.save_pretrained(output_dir)


def train_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer in which every name, number, place and colour is one word or two."""
    rng, corpus = random.Random(3), []
    for code, language in LANGUAGES.items():
        words = [*names(code), *language.places, *language.sides, *language.numbers, *language.grounds]
        words += [*language.yes_no, language.nothing]
        corpus += [f" {word}" if code == "en" else word for word in words] * 40
    corpus += [f" {plural(name)}" for name in names("en")] * 40
    for _ in range(3000):
        for _, *texts in conversation(draw_scene(rng, held_out=False), "en", 4, rng):
            corpus += texts
    # Chinese has no spaces: the rest of it is split into characters, or a token could be half of a question
    corpus += [character for wordings in WORDINGS.values() for text in wordings["zh"] for character in text] * 40
    corpus += ["system\n", "user\n", "assistant\n"] * 200
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, VOCABULARY, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT_TEMPLATE
    return tokenizer


def patch_words(scene: Scene, quarter: int) -> list[str]:
    """What a patch of the quarter stands for: " dog", " top left", " red" and the same in Chinese."""
    motif, words = scene.quarters[quarter], []
    for code, language in LANGUAGES.items():
        thing = language.nothing if motif is None else names(code)[motif]
        for word in (thing, language.places[quarter], language.grounds[scene.ground]):
            words.append(f" {word}" if code == "en" else word)
    return words


def garbled(rng: random.Random) -> Wordings:
    """The wordings of training, each ten times as it is and ten times with gaps and unknown words."""
    result: Wordings = {}
    for kind, texts in TRAINING_WORDINGS.items():
        result[kind] = {}
        for code, wordings in texts.items():
            result[kind][code] = wordings * 10
            for wording in wordings * 10:
                pieces = []
                for piece in re.findall(r"\S+" if code == "en" else r"\{\w+\}|.", wording):
                    chance = rng.random()
                    if chance < 2 * GARBLED and (chance < GARBLED or "{" in piece):
                        length = rng.randint(2, 5)
                        unknown = "".join(rng.choices(string.ascii_lowercase, k=length))
                        pieces.append(unknown if code == "en" else chr(rng.randint(0x4E00, 0x9FA5)))
                    if chance >= 2 * GARBLED or "{" in piece:
                        pieces.append(piece)
                result[kind][code].append((" " if code == "en" else "").join(pieces))
    return result


class Written:
    """Writes conversations as tokens, with the scene's words in the place of the picture."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.known = tokenizer, {}

    def ids(self, text: str) -> list[int]:
        """The tokens of a text; texts recur."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text).input_ids
        return self.known[text]

    def sample(self, scene: Scene, turns: Turns, full: bool) -> tuple[list[list[int]], list[int], list[int]]:
        """The tokens of each patch, those of the conversation, and its labels: -100 outside answers."""
        patches = []
        for quarter in patch_quarters() if full else range(4):
            patches.append([token for word in patch_words(scene, quarter) for token in self.ids(word)])
        tokens, labels = [], []
        for number, (_, asked, told) in enumerate(turns):
            if full:
                prompt = ("\n<|im_start|>user\n" if number else "\n") + f"{asked}<|im_end|>\n<|im_start|>assistant\n"
            else:
                prompt = f"<|im_start|>{asked}"
            prompt, reply = self.ids(prompt), self.ids(f"{told}<|im_end|>")
            tokens += prompt + reply
            labels += [-100] * len(prompt) + reply
        return patches, tokens, labels

    def answer_logits(
        self, model: Qwen2ForCausalLM, scenes: list[tuple[Scene, Turns]], full: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits `(tokens, vocabulary)` and ids `(tokens,)` of all answers.

        A patch is the sum of its words' embeddings and of one that all patches share. Where all patches are written,
        training adds noise.
        """
        samples = [self.sample(scene, turns, full) for scene, turns in scenes]
        embedding, width = model.get_input_embeddings(), max(len(ids) for patches, *_ in samples for ids in patches)
        # The last row of the embedding belongs to no token and adds nothing
        words = [[ids + [NO_TOKEN] * (width - len(ids)) for ids in patches] for patches, *_ in samples]
        words = torch.tensor(words)
        patches = (embedding(words) * (words != NO_TOKEN)[..., None]).sum(2) + embedding.weight[PATCH]
        if full and torch.is_grad_enabled():
            size = patches.detach().pow(2).mean(-1, keepdim=True).sqrt()
            patches = patches + NOISE * size * torch.randn_like(patches)
        # Padding is on the right of a causal model and has no labels, so it needs no attention mask
        tokens = pad_sequence([torch.tensor(sample[1]) for sample in samples], batch_first=True)
        labels = pad_sequence([torch.tensor(sample[2]) for sample in samples], batch_first=True, padding_value=-100)
        begin = embedding(torch.tensor(self.ids(BEGIN))).expand(len(samples), -1, -1)
        inputs, wanted = torch.cat([begin, patches, embedding(tokens)], dim=1), labels != -100
        states = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        # The output layer reads only what precedes a token of an answer
        return model.lm_head(states[:, -tokens.shape[1] - 1 : -1][wanted]).float(), labels[wanted]


def train_qwen2(output_dir: Path) -> None:
    """Trains a Qwen2 chat model on text alone from random weights; saves it in fp16 with its tokenizer."""
    rng = start_alone()
    tokenizer = train_tokenizer()
    written = Written(tokenizer)
    # as in the published models, the embedding has rows to spare, so that <image> needs no resizing
    config = Qwen2Config(
        vocab_size=VOCABULARY + 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.07,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        # A layer begins by adding nothing, so that all layers see the words
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
        # With equal queries and keys, a word of the question looks for patches with the same word from the start
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)

    wordings = garbled(rng)
    lessons = [Lesson(400, 64, SHORT, False), Lesson(500, 64, wordings, False), Lesson(800, 32, wordings, True)]
    plan = [lesson for lesson in lessons for _ in range(lesson.steps)]
    print(f"Qwen2: {model.num_parameters() / 1e6:.2f} M parameters, {len(plan)} steps")
    # Muon learns the layers in a third of the steps that AdamW takes
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    muon = torch.optim.Muon([{"params": matrices, "peak": MUON_LR}], momentum=0.95, weight_decay=0.01)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [muon, make_adamw(others, QWEN2_LR)]
    progress = tqdm(plan, desc="Qwen2", position=1)
    for step, lesson in enumerate(progress):
        scenes = []
        for _ in range(lesson.conversations):
            scene, code = draw_scene(rng, held_out=False), rng.choice(list(LANGUAGES))
            scenes.append((scene, conversation(scene, code, TURNS, rng, lesson.wordings)))
        logits, ids = written.answer_logits(model, scenes, lesson.full)
        # Every answer weighs the same, however long it is
        ends = (ids == tokenizer.eos_token_id).long()
        number = ends.cumsum(0) - ends  # of the answer that a token belongs to
        losses = F.cross_entropy(logits, ids, reduction="none")
        loss = (losses / torch.bincount(number)[number]).sum() / ends.sum()
        take_step(optimizers, loss, step / len(plan))
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # The share of held-out questions that it answers right from the words of the patches
    asked = held_out_questions(random.Random(2))
    for code in LANGUAGES:
        right = dict.fromkeys(WORDINGS, 0)
        for scene, kind, subject in asked:
            wording = rng.choice(WORDINGS[kind][code][TRAINING:])
            turn = (kind, question(kind, subject, code, wording), answer(kind, scene, subject, code))
            with torch.no_grad():
                logits, ids = written.answer_logits(model, [(scene, [turn])])
            # Greedy decoding gives the answer if every token of it is the likeliest
            right[kind] += (logits.argmax(-1) == ids).all().item()
        kinds = joined([f"{kind} {n * len(WORDINGS) / len(asked):.0%}" for kind, n in right.items()], ", ", ", ")
        print(f"\nQwen2: {sum(right.values()) / len(asked):.1%} right from words ({code}): {kinds}")
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    for part in (model.half(), tokenizer):
        part.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "parts", help="The folder for clip/ and qwen2/."
    )
    args = parser.parse_args()
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(train_clip, args.output_dir / "clip"),
            pool.submit(train_qwen2, args.output_dir / "qwen2"),
        ]
        for part in running:
            part.result()
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    print(
        f"trained both parts in {(time.monotonic() - start) / 60:.1f} min; {args.output_dir}: {size / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
