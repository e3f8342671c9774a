"""Writes the example's data: captions of the OpenMoji pictures, and what SmolLM2 says of the captions, in English.

    python -m examples.smollm2.make_data --output_dir output/smollm2/data                           the data
    python -m examples.smollm2.make_data --output_dir output/smollm2/data --talk output/smollm2/lm  talk.json anew

`captions.json` asks for the caption of each training picture; `talk.json` asks something else about every fourth. Its
answers are SmolLM2's own, to the same question with the caption's words in place of the picture: a language model can
write about a picture that somebody has put into words (Liu et al., 2023, "Visual Instruction Tuning"), and a projector
that is trained on both does not learn that whatever is asked, the caption is the answer. They are committed, since
they take some minutes. Of held-out pictures there is nothing in them, and none of what follow_ups.py asks.

The records to train on begin with a system turn of one word: the one that SmolLM2's template writes by itself would be
a third of their tokens.
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
EVERY = 4  # of the training pictures, one is talked about
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
    """The English records that examples/openmoji/make_data.py has written."""
    records = json.loads((folder / "chat.json").read_text(encoding="utf-8"))
    return [record for record in records if record["language"] == "en"]


def talk_about(records: list[dict], language_model: str) -> list[dict]:
    """What the language model says of every fourth caption, cut behind its last whole sentence.

    Left out is what has no whole sentence, and what has none of the caption's words: it is about something else.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(language_model).eval()
    chosen, talk = records[::EVERY], []
    for start in tqdm(range(0, len(chosen), BATCH), desc="talking"):
        batch = [
            (record["image"], record["conversations"][1]["value"], QUESTIONS[(start + i) % len(QUESTIONS)])
            for i, record in enumerate(chosen[start : start + BATCH])
        ]
        asked = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{caption}\n{question}"}]
            for _, caption, question in batch
        ]
        inputs = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (image, caption, question), answer in zip(batch, answers, strict=True):
            whole = answer[: max(answer.rfind(end) for end in ".!?") + 1].strip()
            if set(words(caption)) & set(words(whole)):
                talk.append({"image": image, "question": question, "answer": whole})
    return talk


def record(image: str, question: str, answer: str) -> dict:
    """A conversation of one question about one picture."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": [{"from": "system", "value": SYSTEM}, *turns]}


def write(records: list[dict], path: Path) -> None:
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write train/ and heldout/ into.")
    parser.add_argument("--talk", metavar="MODEL", help="Only ask this language model anew, for talk.json.")
    args = parser.parse_args()
    train, heldout = args.output_dir / "train", args.output_dir / "heldout"
    if args.talk is not None:
        write(talk_about(english(train), args.talk), TALK)
        return
    drawing = HERE.parent / "openmoji" / "make_data.py"
    if subprocess.run([sys.executable, str(drawing), "--output_dir", str(args.output_dir)]).returncode != 0:
        sys.exit(1)  # it has said why
    captions = [(r["image"], *(turn["value"] for turn in r["conversations"])) for r in english(train)]
    write([record(*caption) for caption in captions], train / "captions.json")
    talk = json.loads(TALK.read_text(encoding="utf-8"))
    write([record(t["image"], f"<image>\n{t['question']}", t["answer"]) for t in talk], train / "talk.json")
    write(english(heldout), heldout / "english.json")
    print(f"{len(captions)} captions and {len(talk)} answers about pictures to train on")


if __name__ == "__main__":
    run_command(main)
