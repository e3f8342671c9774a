"""Writes the example's data in English: captions of the OpenMoji pictures, and SmolLM2's answers about the captions.

    python -m examples.smollm2.make_data --output_dir output/smollm2/data                           the data
    python -m examples.smollm2.make_data --output_dir output/smollm2/data --talk output/smollm2/lm  talk.json anew

`captions.json` asks for the caption of each training picture. `talk.json` asks another question about every
fourth picture. Its answers are SmolLM2's own, to the same question with the caption in place of the picture.
A language model can write about a picture that is described in words (Liu et al., 2023, "Visual Instruction
Tuning"). A projector trained on both does not learn that the caption answers every question. The answers take
some minutes to make, so they are committed. They contain no held-out picture and no question of
follow_ups.py.

The training records begin with a system turn of one word. The default system turn of SmolLM2's template would
be a third of their tokens.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from train_llava.cli import run_command
from train_llava.evaluation.metrics import words

HERE = Path(__file__).parent
TALK = HERE / "talk.json"
EVERY = 4  # one training picture in four is talked about
QUESTIONS = [
    "Write one sentence about it.",
    "What is special about it?",
    "Why do people like it?",
    "Describe a scene with it.",
    "What could it mean?",
    "What comes to mind when you see it?",
]
NEW_TOKENS, BATCH = 40, 96
SYSTEM = "Look."


def english(folder: Path) -> list[dict]:
    """The English records of draw_emoji.py."""
    records = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    return [record for record in records if record["language"] == "en"]


def talk_about(records: list[dict], language_model: str) -> list[dict]:
    """The language model's answers about every fourth caption, cut after the last complete sentence.

    Skips an answer without a complete sentence, and one without a word of the caption, which is off the topic.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    chosen, talk = records[::EVERY], []
    for start in tqdm(range(0, len(chosen), BATCH), desc="talking"):
        # each caption in words, with one of the questions in turn
        batch, conversations = [], []
        for i, record in enumerate(chosen[start : start + BATCH]):
            caption, question = record["conversations"][1]["value"], QUESTIONS[(start + i) % len(QUESTIONS)]
            batch.append((record["image"], caption, question))
            user = {"role": "user", "content": f"{caption}\n{question}"}
            conversations.append([{"role": "system", "content": SYSTEM}, user])
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (image, caption, question), answer in zip(batch, answers, strict=True):
            sentences = answer[: max(answer.rfind(end) for end in ".!?") + 1].strip()
            if set(words(caption)) & set(words(sentences)):
                talk.append({"image": image, "question": question, "answer": sentences})
    return talk


def record(image: str, question: str, answer: str) -> dict:
    """A conversation with one question about one picture."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": [{"from": "system", "value": SYSTEM}, *turns]}


def write(records: list[dict], path: Path) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder for train/ and heldout/.")
    parser.add_argument("--talk", metavar="MODEL", help="Only make talk.json anew, with this language model.")
    args = parser.parse_args()
    train, heldout = args.output_dir / "train", args.output_dir / "heldout"
    if args.talk is not None:
        write(talk_about(english(train), args.talk), TALK)
        return
    drawing = HERE / "draw_emoji.py"
    if subprocess.run([sys.executable, str(drawing), "--output_dir", str(args.output_dir)]).returncode != 0:
        sys.exit(1)  # it has printed the reason
    captions = [(r["image"], *(turn["value"] for turn in r["conversations"])) for r in english(train)]
    write([record(*caption) for caption in captions], train / "captions.json")
    talk = json.loads(TALK.read_text(encoding="utf-8"))
    write([record(t["image"], f"<image>\n{t['question']}", t["answer"]) for t in talk], train / "talk.json")
    write(english(heldout), heldout / "english.json")
    print(f"{len(captions)} captions and {len(talk)} answers about pictures to train on")


if __name__ == "__main__":
    run_command(main)
