"""Trains the two small models of the toy example, a CLIP and a Qwen2 chat model, from random weights.

Both see only the training split. The CLIP learns which caption, English or Chinese, belongs to which picture.
The chat model never sees a picture. In place of the picture it gets the shuffled words of a caption. It
learns to answer with the caption in the language of the question.

The two are trained at the same time, each in a process of one thread. Models this small gain little from a
second thread, and lose on a busy machine.
"""

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    get_cosine_schedule_with_warmup,
)

LANGUAGES = ("en", "zh")
PICTURE_SIZE = 72  # pixels a side, as make_data.py draws them
TEXT_LENGTH = 32  # tokens, of which the longest caption takes 21
VOCABULARY = 2560  # tokens per tokenizer; common words, English and Chinese, are one token each

CLIP_EPOCHS, CLIP_BATCH, CLIP_LR = 200, 128, 2e-3
TONES_ALONE = 0.4  # the share of captions with a skin tone that are reduced to the tone
QWEN2_EPOCHS, QWEN2_BATCH, QWEN2_LR = 25, 16, 2e-3

# words that distinguish the pictures of one motif: "man farmer dark skin tone" and "woman farmer" are both a "farmer".
GENDERS = {"man", "men", "woman", "women", "person", "people"}
TONES = {"light", "medium-light", "medium", "medium-dark", "dark", "skin", "tone"}

# Qwen1.5's ChatML, with its default system prompt
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_data(data_dir: Path) -> tuple[list[Path], dict[str, list[str]], dict[str, list[str]]]:
    """Reads chat.json: picture files, their captions by language in the same order, and the questions by language."""
    chat_file = data_dir / "chat.json"
    if not chat_file.is_file():
        raise SystemExit(f"make_parts: no {chat_file}: run make_data.py, then pass its train folder as --data_dir")
    captions: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES}
    questions: dict[str, set[str]] = {language: set() for language in LANGUAGES}
    for record in json.loads(chat_file.read_text(encoding="utf-8")):
        question, answer = (turn["value"] for turn in record["conversations"])
        captions[record["language"]][record["image"]] = answer
        questions[record["language"]].add(question)
    images = list(captions["en"])
    return (
        [data_dir / "images_dl" / image for image in images],
        {language: [captions[language][image] for image in images] for language in LANGUAGES},
        {language: sorted(questions[language]) for language in LANGUAGES},
    )


def start_alone() -> None:
    """Gives a training process one thread and its seeds."""
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)


def make_optimizer(
    model: torch.nn.Module, lr: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW without weight decay for biases and norms, with a short warm-up and a cosine down to zero."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    return optimizer, get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=100, num_training_steps=steps)


def take_step(
    model: torch.nn.Module,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def is_tone(word: str) -> bool:
    """Whether a word of a caption, English or Chinese, is about skin tones."""
    return word in TONES or "肤色" in word


def tones_of(caption: str) -> str:
    """ "woman farmer dark skin tone" -> "dark skin tone"."""
    return " ".join(filter(is_tone, caption.split()))


def without_tones(caption: str) -> str:
    """ "woman farmer dark skin tone" -> "woman farmer"."""
    return " ".join(word for word in caption.split() if not is_tone(word))


def contrastive_batches(captions: list[str], alike: Callable[[str], str]) -> list[list[int]]:
    """One epoch of picture indices. A batch has up to 3 pictures of one motif, then of the next, and so on.

    These are hard negatives: a motif's pictures differ only in skin tone, gender and hair, so the features
    have to show these. In random batches such pictures would rarely meet. A motif's pictures are sorted by the
    caption that `alike` leaves, so that most groups of 3 share it.
    """
    motifs = defaultdict(list)
    for index, caption in enumerate(captions):
        motif = [word for word in without_tones(caption).split() if word not in GENDERS]
        motifs[" ".join(motif)].append(index)
    runs = []
    for members in motifs.values():
        random.shuffle(members)
        members.sort(key=lambda index: alike(captions[index]))
        runs += [members[start : start + 3] for start in range(0, len(members), 3)]
    random.shuffle(runs)
    order = [index for run in runs for index in run]
    return [order[start : start + CLIP_BATCH] for start in range(0, len(order) - CLIP_BATCH + 1, CLIP_BATCH)]


def recoloured(pictures: torch.Tensor) -> torch.Tensor:
    """RGB pictures [b, 3, h, w] from 0 to 1 in random other colours; black stays black and white stays white.

    Random weights that sum to one mix the channels. A random exponent makes each channel stronger or weaker.
    """
    ink = 1 - pictures
    weights = torch.softmax(3 * torch.randn(len(pictures), 3, 3), dim=-1)
    exponents = torch.exp(0.5 * torch.randn(len(pictures), 3, 1, 1))
    return 1 - torch.einsum("bij,bjhw->bihw", weights, ink).clamp(1e-6, 1) ** exponents


def train_clip(files: list[Path], captions: dict[str, list[str]], output_dir: Path) -> None:
    """Trains a CLIP contrastively from random weights; saves it in fp16 with its image processor and tokenizer."""
    start_alone()
    everything = [caption for language in LANGUAGES for caption in captions[language]]
    tokenizer = CLIPTokenizer().train_new_from_iterator(everything, VOCABULARY, show_progress=False)
    tokenizer.model_max_length = TEXT_LENGTH
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_SIZE}, crop_size={"height": PICTURE_SIZE, "width": PICTURE_SIZE}
    )
    pictures = [Image.open(file) for file in tqdm(files, desc="reading pictures")]
    # no random rotations or shifts: the font draws a motif at the same place in every skin tone, and short trials with
    # them learned several times more slowly
    rgb = processor(pictures, do_normalize=False, return_tensors="pt").pixel_values  # [n, 3, 72, 72], from 0 to 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))

    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    # 16 patches of 18 pixels learned more in the same time than 36 patches of 12, and make shorter prompts
    vision_config = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": PICTURE_SIZE,
        "patch_size": 18,
    }
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=128))
    print(f"CLIP: {model.num_parameters() / 1e6:.2f} M parameters, {len(files)} pictures, {CLIP_EPOCHS} epochs")
    optimizer, schedule = make_optimizer(model, CLIP_LR, CLIP_EPOCHS * (len(files) // CLIP_BATCH))
    for epoch in (progress := tqdm(range(CLIP_EPOCHS), desc="CLIP epochs", position=0)):
        # Every other epoch, pictures are recoloured and captions lose their skin tones. Only the lines of a
        # picture then tell its motif, as they have to in a new skin tone. In the other epochs, captions are
        # whole or reduced to their skin tones, which the lines do not show.
        recolour = epoch % 2 == 1
        losses = []
        for batch in contrastive_batches(captions["en"], alike=tones_of if recolour else without_tones):
            # how each caption is reduced: to its motif, to its skin tone, or not at all (str)
            names, pixels = [captions["en"][index] for index in batch], rgb[batch]
            if recolour:
                reductions, pixels = [without_tones] * len(batch), recoloured(pixels)
            else:
                reductions = [tones_of if tones_of(name) and random.random() < TONES_ALONE else str for name in names]
            # a picture meets its caption in one language, drawn anew each time
            texts = [
                reduce(captions[random.choice(LANGUAGES)][index])
                for reduce, index in zip(reductions, batch, strict=True)
            ]
            # a text belongs to every picture with the same caption, once all captions are reduced as that text was
            reduced = {}
            for reduce in set(reductions):
                reduced[reduce] = [reduce(name) for name in names]
            belongs = []
            for i, reduce in enumerate(reductions):
                belongs.append([float(name == reduced[reduce][i]) for name in reduced[reduce]])
            belongs = torch.tensor(belongs)
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
            text = F.normalize(model.text_projection(model.text_model(**inputs).pooler_output), dim=-1)
            vision = model.vision_model(pixel_values=(pixels - mean) / std, output_hidden_states=True)
            # A LLaVA drops the class token and reads the patches of the last layer but one. So their mean is
            # matched to the caption, too. Otherwise only the class token might describe the whole picture.
            patches = model.vision_model.post_layernorm(vision.hidden_states[-2][:, 1:].mean(dim=1))
            loss = torch.zeros(())
            for pooled in (vision.pooler_output, patches):
                picture = F.normalize(model.visual_projection(pooled), dim=-1)
                logits = model.logit_scale.exp() * text @ picture.T
                for scores, targets in ((logits, belongs), (logits.T, belongs.T)):
                    loss = loss + F.cross_entropy(scores, targets / targets.sum(dim=1, keepdim=True)) / 4
            take_step(model, loss, optimizer, schedule)
            losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
    for part in (model.half(), processor, tokenizer):
        part.save_pretrained(output_dir)


def shuffled_words(caption: str) -> str:
    """The caption's words in random order, some of them twice: like the features of patches, but as text."""
    words = [word for word in caption.split() for _ in range(random.randint(1, 2))]
    random.shuffle(words)
    return " ".join(words)


def train_qwen2(captions: dict[str, list[str]], questions: dict[str, list[str]], output_dir: Path) -> None:
    """Trains a Qwen2 chat model on text alone from random weights; saves it in fp16 with its tokenizer."""
    start_alone()
    frame = ["system\nYou are a helpful assistant", "user\n", "assistant\n"]
    all_captions, all_questions = [], []
    for language in LANGUAGES:
        all_captions += captions[language]
        all_questions += [question.replace("<image>", "").strip() for question in questions[language]]
    # a caption's words stand at the start or after a space; words of every prompt get tokens, too
    corpus = all_captions + [" " + caption for caption in all_captions] + 200 * (frame + all_questions)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        corpus, VOCABULARY, new_special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False
    )
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT_TEMPLATE

    # as in the published models, the embedding has rows to spare, so that <image> needs no resizing
    config = Qwen2Config(
        vocab_size=VOCABULARY + 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    print(
        f"Qwen2: {model.num_parameters() / 1e6:.2f} M parameters, {len(all_captions)} captions, {QWEN2_EPOCHS} epochs"
    )

    def encode(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels (-100 outside answers) of a chat about one caption, in both languages in turn."""
        ids: list[int] = []
        labels: list[int] = []
        messages: list[dict[str, str]] = []
        for language in random.sample(LANGUAGES, 2):
            words = shuffled_words(captions[random.choice(LANGUAGES)][index])
            question = random.choice(questions[language]).replace("<image>", "" if messages else words).strip()
            messages.append({"role": "user", "content": question})
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt_ids = tokenizer(prompt).input_ids
            answer_ids = tokenizer(captions[language][index] + "<|im_end|>").input_ids
            labels += [-100] * (len(prompt_ids) - len(ids)) + answer_ids
            ids = prompt_ids + answer_ids
            messages.append({"role": "assistant", "content": captions[language][index]})
        return torch.tensor(ids), torch.tensor(labels)

    order = list(range(len(captions["en"])))
    steps_per_epoch = math.ceil(len(order) / QWEN2_BATCH)
    optimizer, schedule = make_optimizer(model, QWEN2_LR, QWEN2_EPOCHS * steps_per_epoch)
    for _ in (progress := tqdm(range(QWEN2_EPOCHS), desc="Qwen2 epochs", position=1)):
        random.shuffle(order)
        losses = []
        for start in range(0, len(order), QWEN2_BATCH):
            input_ids, labels = zip(*map(encode, order[start : start + QWEN2_BATCH]), strict=True)
            # padding is on the right of a causal model and has no labels, so it needs no attention mask
            input_ids = pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
            labels = pad_sequence(labels, batch_first=True, padding_value=-100)
            loss = model(input_ids=input_ids, labels=labels).loss
            take_step(model, loss, optimizer, schedule)
            losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    for part in (model.half(), tokenizer):
        part.save_pretrained(output_dir)


@torch.inference_mode()
def report(
    parts_dir: Path, files: list[Path], captions: dict[str, list[str]], questions: dict[str, list[str]]
) -> None:
    """Loads both parts from disk; prints their size and how well each does on training data."""
    clip = CLIPModel.from_pretrained(parts_dir / "clip", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(parts_dir / "clip")
    pixels = AutoImageProcessor.from_pretrained(parts_dir / "clip")(
        [Image.open(file) for file in files], return_tensors="pt"
    )
    for language in LANGUAGES:
        inputs = tokenizer(captions[language], padding=True, return_tensors="pt")
        nearest = clip(**inputs, **pixels).logits_per_image.argmax(dim=1)
        share = (nearest == torch.arange(len(files))).float().mean()
        print(f"CLIP: {share:.1%} of {len(files)} pictures lie nearest to their own caption ({language})")

    qwen2 = Qwen2ForCausalLM.from_pretrained(parts_dir / "qwen2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(parts_dir / "qwen2", padding_side="left")
    sample = random.sample(range(len(files)), 200)
    for language in LANGUAGES:
        chats = []
        for index in sample:
            question = questions[language][0].replace("<image>", shuffled_words(captions["en"][index]))
            chats.append([{"role": "user", "content": question}])
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        output = qwen2.generate(**inputs, max_new_tokens=TEXT_LENGTH, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = sum(answer == captions[language][index] for answer, index in zip(answers, sample, strict=True))
        print(
            f"Qwen2: {right / len(sample):.1%} of {len(sample)} shuffled English captions answered right ({language})"
        )
    size = sum(file.stat().st_size for file in parts_dir.rglob("*") if file.is_file())
    print(f"{parts_dir}: {size / 2**20:.1f} MiB")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data_dir", type=Path, default=here / "data" / "train", help="The train/ folder of make_data.py."
    )
    parser.add_argument("--output_dir", type=Path, default=here / "parts", help="The folder for clip/ and qwen2/.")
    args = parser.parse_args()

    files, captions, questions = read_data(args.data_dir)
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(train_clip, files, captions, args.output_dir / "clip"),
            pool.submit(train_qwen2, captions, questions, args.output_dir / "qwen2"),
        ]
        for part in running:
            part.result()
    print(f"trained both parts in {(time.monotonic() - start) / 60:.1f} min")
    random.seed(0)
    report(args.output_dir, files, captions, questions)


if __name__ == "__main__":
    main()
