"""Trains the two small models of the toy example, a CLIP vision tower and a Qwen2 chat model, from random weights.

    PYTHONPATH=. python examples/scenes/make_parts.py --output_dir output/parts

The tower learns what stands in the quarter of each of its patches, which quarter that is, and the ground's colour. The
chat model never sees a picture. It learns to talk about scenes that are written out in words, in the place of each
patch: "dog top left red" and the same in Chinese. So all that is left for the training of a LLaVA is to bring the
tower's patches to the chat model's words.

Both see new scenes in every step, as training scenes are drawn, and only wordings of training. The two are trained at
the same time, each in a process of one thread. Models this small gain little from a second thread, and lose on a busy
machine.
"""

import argparse
import random
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

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

from examples.scenes.make_data import Turns, answer, conversation, held_out_questions, question
from examples.scenes.scenes import GROUNDS, MOTIFS, PICTURE_SIZE, Scene, draw_scene, names, paint
from examples.scenes.wordings import LANGUAGES, TRAINING, WORDINGS, joined, plural

PATCH_SIZE = 16  # pixels a side; a quarter of the picture has 3 x 3 patches
SIDE = PICTURE_SIZE // PATCH_SIZE  # patches
NOTHING = len(MOTIFS)  # what stands in an empty quarter
VOCABULARY = 1152  # tokens; every motif's name, English and Chinese, is one word
PATCH, NO_TOKEN = VOCABULARY, VOCABULARY + 1  # rows of the chat model's embedding that stand for no token

CLIP_STEPS, CLIP_BATCH, CLIP_LR = 3000, 32, 1.5e-3
QWEN2_STEPS, QWEN2_BATCH, QWEN2_LR, MUON_LR = 900, 32, 3e-3, 0.02
TURNS = 8  # at most, in a conversation of the chat model's training
KINDS = list(WORDINGS)
EASY = ["what", "at", "where", "ground", "is there", "count", "things"]  # the kinds to begin with
EASY_UNTIL, NOISE_FROM, SHORT_UNTIL = 0.2, 0.4, 0.65  # shares of the chat model's training
NOISE = 0.3  # of the words of patches, of their own size: the tower will not be sure, either

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
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=128,
    )
    tower = CLIPVisionModel(config)
    print(f"CLIP: {tower.num_parameters() / 1e6:.2f} M parameters, {CLIP_STEPS} steps")
    # Three linear layers, of training alone, read each patch of the last layer
    what, where, colour = (torch.nn.Linear(128, size) for size in (NOTHING + 1, 4, len(GROUNDS)))
    quarters = torch.tensor(patch_quarters())
    trained = torch.nn.ModuleList([tower, what, where, colour])
    optimizer = make_adamw(list(trained.parameters()), CLIP_LR)
    progress = tqdm(range(CLIP_STEPS), desc="CLIP", position=0)
    for step in progress:
        pixels, motifs, grounds = picture_batch(processor, CLIP_BATCH, rng)
        patches = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:].flatten(0, 1)
        loss = F.cross_entropy(what(patches), motifs[:, quarters].flatten())
        loss = loss + 0.1 * F.cross_entropy(where(patches), quarters.repeat(CLIP_BATCH))
        loss = loss + 0.1 * F.cross_entropy(colour(patches), grounds.repeat_interleave(len(quarters)))
        take_step([optimizer], loss, step / CLIP_STEPS)
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # How many things of held-out scenes are named right: the mean of their quarter's patches
    with torch.no_grad():
        pixels, motifs, _ = picture_batch(processor, 512, random.Random(2), held_out=True)
        logits = what(tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]).log_softmax(-1)
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


def patch_words(scene: Scene, quarter: int) -> str:
    """What a patch of the quarter stands for: " dog top left red" and the same in Chinese."""
    motif, words = scene.quarters[quarter], []
    for code, language in LANGUAGES.items():
        thing = language.nothing if motif is None else names(code)[motif]
        words += [thing, language.places[quarter], language.grounds[scene.ground]]
    return " " + " ".join(words[:3]) + "".join(words[3:])


class Written:
    """Writes conversations as tokens, with the scene's words in the place of the picture.

    In the `short` form, for the first part of the training, a picture has two patches for each quarter, and ChatML's
    words around questions and answers are left out: all of them take half of the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.known = tokenizer, {}

    def ids(self, text: str) -> list[int]:
        """The tokens of a text; texts recur."""
        if text not in self.known:
            self.known[text] = self.tokenizer(text).input_ids
        return self.known[text]

    def sample(self, scene: Scene, turns: Turns, short: bool) -> tuple[list[list[int]], list[int], list[int]]:
        """The tokens of each patch, those of the conversation, and its labels: -100 outside answers."""
        quarters = [quarter for quarter in range(4) for _ in range(2)] if short else patch_quarters()
        patches = [self.ids(patch_words(scene, quarter)) for quarter in quarters]
        tokens, labels = [], []
        for number, (_, asked, told) in enumerate(turns):
            if short:
                prompt = ("<|im_start|>" if number else "") + f"{asked}\n"
            else:
                prompt = ("\n<|im_start|>user\n" if number else "\n") + f"{asked}<|im_end|>\n<|im_start|>assistant\n"
            prompt, reply = self.ids(prompt), self.ids(f"{told}<|im_end|>")
            tokens += prompt + reply
            labels += [-100] * len(prompt) + reply
        return patches, tokens, labels

    def answer_logits(
        self, model: Qwen2ForCausalLM, scenes: list[tuple[Scene, Turns]], short: bool, noise: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits `(tokens, vocabulary)` and ids `(tokens,)` of all answers.

        A patch is the sum of its words' embeddings, with one that all patches share, and with noise.
        """
        samples = [self.sample(scene, turns, short) for scene, turns in scenes]
        embedding, width = model.get_input_embeddings(), max(len(ids) for patches, *_ in samples for ids in patches)
        # The last row of the embedding belongs to no token and adds nothing
        words = [[ids + [NO_TOKEN] * (width - len(ids)) for ids in patches] for patches, *_ in samples]
        words = torch.tensor(words)
        patches = (embedding(words) * (words != NO_TOKEN)[..., None]).sum(2) + 3 * embedding.weight[PATCH]
        size = patches.detach().pow(2).mean(-1, keepdim=True).sqrt()
        patches = patches + noise * size * torch.randn_like(patches)
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
    # A layer begins by adding nothing, so that all layers see the words
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    print(f"Qwen2: {model.num_parameters() / 1e6:.2f} M parameters, {QWEN2_STEPS} steps")
    # Muon learns the layers in a third of the steps that AdamW takes
    matrices = [p for p in model.model.layers.parameters() if p.ndim > 1]
    groups = [{"params": matrices, "peak": MUON_LR}]
    muon = torch.optim.Muon(groups, momentum=0.95, weight_decay=0.01)
    others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [muon, make_adamw(others, QWEN2_LR)]
    progress = tqdm(range(QWEN2_STEPS), desc="Qwen2", position=1)
    for step in progress:
        done, scenes = step / QWEN2_STEPS, []
        for _ in range(QWEN2_BATCH):
            scene, code = draw_scene(rng, held_out=False), rng.choice(list(LANGUAGES))
            scenes.append((scene, conversation(scene, code, TURNS, rng, EASY if done < EASY_UNTIL else KINDS)))
        with torch.autocast("cpu", torch.bfloat16):
            noise = NOISE if done > NOISE_FROM else 0
            logits, ids = written.answer_logits(model, scenes, short=done < SHORT_UNTIL, noise=noise)
        loss = F.cross_entropy(logits, ids)
        take_step(optimizers, loss, done)
        progress.set_postfix(loss=f"{loss.item():.3f}")

    # The share of held-out questions that it answers right from the words of the patches
    asked = held_out_questions(random.Random(2))
    for code in LANGUAGES:
        right = dict.fromkeys(WORDINGS, 0)
        for scene, kind, subject in asked:
            wording = rng.choice(WORDINGS[kind][code][TRAINING:])
            turn = (kind, question(kind, subject, code, wording), answer(kind, scene, subject, code))
            with torch.no_grad():
                logits, ids = written.answer_logits(model, [(scene, [turn])], short=False, noise=0)
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
