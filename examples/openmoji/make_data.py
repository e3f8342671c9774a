"""Draws scenes of everyday things and writes conversations about them: LLaVA chat data with a held-out split.

    python -m examples.openmoji.make_data --output_dir output/openmoji/data

A scene has one to four things, each in a quarter of the picture, on a ground of one colour. Things are drawings of
OpenMoji. Their names are the English and Chinese short names of the Unicode CLDR. Written are

    train/chat.json       a scene has a record in each language, with one to four questions
    heldout/chat.json     a scene has a record in each language, with one question
    talk/chat.json        held-out scenes with four questions each, to look at
    */images_dl/*.png     the pictures, 96 x 96

A record is `{"id", "image", "language", "kinds", "conversations", "objects"}`. `kinds` has a key of `WORDINGS` for
each question. `objects` are the things in reading order, `{"label", "box": [x1, y1, x2, y2]}` in pixels.

**Held out** are pairs of motifs, by the SHA-256 of their two names. In a training scene no two motifs are a held-out
pair; in a held-out scene any two are. Training uses the first eight wordings of a kind, held-out questions the others.
"""

import argparse
import json
import random
from collections import Counter
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from examples.openmoji.scenes import MOTIFS, Scene, draw_scene, names, paint
from examples.openmoji.wordings import LANGUAGES, TRAINING, TRAINING_WORDINGS, WORDINGS, Wordings

TRAIN, HELDOUT, TALK = 6000, 40, 24  # scenes; held-out ones of each kind
Turns = list[tuple[str, str, str]]  # the kind, question and answer of each turn
Conversations = list[tuple[Scene, dict[str, Turns]]]  # scenes, each with a conversation by language


def neighbour(place: int, side: int) -> int | None:
    """The quarter to the left (0) or right (1) of another, above (2) or below (3) it."""
    column, row = place % 2, place // 2
    along = column if side < 2 else row
    if along == side % 2:
        return None  # the edge of the picture
    return place ^ (1 if side < 2 else 2)


def subjects(kind: str, scene: Scene, rng: random.Random) -> list:
    """What a question of this kind can be about in this scene; empty if it cannot be asked.

    Half of "is there" asks for something that is not there, and a fifth of "count", "at" and "beside".
    """
    counts = scene.counts
    present, absent = list(counts), [motif for motif in range(len(MOTIFS)) if motif not in counts]
    single = [(place, motif) for place, motif in scene.things if counts[motif] == 1]
    if kind in ("list", "things", "ground", "describe"):
        return [None]
    if kind == "what":
        return [None] if len(scene.things) == 1 else []
    if kind == "where":
        return [motif for _, motif in single]
    if kind == "more":
        return list(combinations(rng.sample(present, len(present)), 2))
    if kind in ("count", "is there"):
        return present if rng.random() < (0.5 if kind == "is there" else 0.8) else absent
    # "at" and "beside": where something stands, and where nothing does
    if kind == "at":
        seen = [(place, scene.quarters[place]) for place in range(4)]
    else:
        seen = []
        for place, motif in single:
            for side in range(4):
                other = neighbour(place, side)
                seen.append(((motif, side), None if other is None else scene.quarters[other]))
    nothing = rng.random() < 0.2
    return [subject for subject, motif in seen if (motif is None) == nothing]


def answer(kind: str, scene: Scene, subject: object, code: str) -> str:
    """The answer to a question about one of its `subjects`."""
    language, name, counts = LANGUAGES[code], names(code), scene.counts
    if kind in ("what", "list"):
        return language.listed([language.some(name[motif], n) for motif, n in counts.items()])
    if kind == "where":
        return language.at(language.places[scene.quarters.index(subject)])
    if kind in ("at", "beside"):
        place = subject if kind == "at" else neighbour(scene.quarters.index(subject[0]), subject[1])
        motif = None if place is None else scene.quarters[place]
        return language.nothing if motif is None else language.one(name[motif])
    if kind == "count":
        return language.numbers[counts[subject]]
    if kind == "things":
        return language.numbers[len(scene.things)]
    if kind == "is there":
        return language.yes_no[subject not in counts]
    if kind == "ground":
        return language.grounds[scene.ground]
    if kind == "more":
        a, b = subject
        return language.alike if counts[a] == counts[b] else language.more(name[a if counts[a] > counts[b] else b])
    things = [(name[motif], language.places[place]) for place, motif in scene.things]
    return language.described(things, language.grounds[scene.ground])


def question(kind: str, subject: object, code: str, wording: str) -> str:
    """A question in one of the kind's `WORDINGS`."""
    language, slots = LANGUAGES[code], {}
    if kind == "at":
        slots["place"] = language.places[subject]
    elif kind == "beside":
        subject, side = subject
        slots["side"] = language.sides[side]
        slots["Side"] = slots["side"].capitalize()
    if kind in ("where", "beside", "count", "is there", "more"):
        motifs = subject if kind == "more" else (subject,)
        x, y = (names(code)[motif] for motif in (motifs[0], motifs[-1]))
        slots |= {"x": x, "y": y, "one": language.one(x)}
        slots |= {"many": language.some(x, 2).split(" ", 1)[-1], "more": language.some(y, 2).split(" ", 1)[-1]}
    return wording.format(**slots)


def conversation(
    scene: Scene, code: str, number: int, rng: random.Random, wordings: Wordings = TRAINING_WORDINGS
) -> Turns:
    """The kind, question and answer of each of at most `number` turns, of different kinds."""
    turns = []
    for kind in rng.sample(list(wordings), len(wordings)):
        about = subjects(kind, scene, rng)
        if about and len(turns) < number:
            subject, wording = rng.choice(about), rng.choice(wordings[kind][code])
            turns.append((kind, question(kind, subject, code, wording), answer(kind, scene, subject, code)))
    return turns


def held_out_questions(rng: random.Random) -> list[tuple[Scene, str, object]]:
    """HELDOUT scenes of each kind with what is asked, shuffled; no answer is given more often than by its share."""
    # the most questions with one answer; answers that name motifs are rare, and "nothing" counts as one of five
    shares = {"where": 4, "count": 5, "things": 4, "is there": 2, "ground": 8, "at": 5, "beside": 5}
    result = []
    for kind in WORDINGS:
        given = Counter()
        while given.total() < HELDOUT:
            scene = draw_scene(rng, held_out=True)
            about = subjects(kind, scene, rng)
            if not about:
                continue
            subject = rng.choice(about)
            text = answer(kind, scene, subject, "en")
            # as many questions about more of one motif as of the other, and as about as many of both
            share = 3 / (2 if text != LANGUAGES["en"].alike else 1) if kind == "more" else shares.get(kind, 1)
            text = "more" if kind == "more" and text != LANGUAGES["en"].alike else text
            if given[text] < HELDOUT / share:
                given[text] += 1
                result.append((scene, kind, subject))
    rng.shuffle(result)
    return result


def training_conversations(rng: random.Random) -> Conversations:
    """TRAIN scenes with one to four questions in each language."""
    train = []
    for _ in range(TRAIN):
        scene = draw_scene(rng, held_out=False)
        train.append((scene, {code: conversation(scene, code, rng.randint(1, 4), rng) for code in LANGUAGES}))
    return train


def held_out_conversations(rng: random.Random) -> Conversations:
    """The held-out scenes with a question in each language, in a wording that training has not."""
    heldout = []
    for scene, kind, subject in held_out_questions(rng):
        number = rng.randrange(TRAINING, len(WORDINGS[kind]["en"]))
        texts = {}
        for code in LANGUAGES:
            asked = question(kind, subject, code, WORDINGS[kind][code][number])
            texts[code] = [(kind, asked, answer(kind, scene, subject, code))]
        heldout.append((scene, texts))
    return heldout


def talk_conversations(rng: random.Random) -> Conversations:
    """TALK held-out scenes with four questions in each language."""
    talk = []
    for _ in range(TALK):
        scene = draw_scene(rng, held_out=True)
        talk.append((scene, {code: conversation(scene, code, 4, rng) for code in LANGUAGES}))
    return talk


def record(name: str, code: str, turns: Turns, scene: Scene, boxes: list[list[int]], system: str | None) -> dict:
    """A record of the scene's conversation in one language."""
    messages = []
    for _, asked, told in turns:
        messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    messages[0]["value"] = f"<image>\n{messages[0]['value']}"
    if system is not None:
        messages.insert(0, {"from": "system", "value": system})
    labels = [names(code)[motif] for _, motif in scene.things]
    objects = [{"label": label, "box": box} for label, box in zip(labels, boxes, strict=True)]
    kinds = [kind for kind, _, _ in turns]
    return {"id": f"{name}-{code}", "image": f"{name}.png", "language": code, "kinds": kinds,
            "conversations": messages, "objects": objects}  # fmt: skip


def write(directory: Path, scenes: Conversations, rng: random.Random, system: str | None = None) -> None:
    """Writes the scenes' pictures and chat.json, with a record for each of a scene's conversations.

    `system` is the system turn of each record, if any.
    """
    (directory / "images_dl").mkdir(parents=True, exist_ok=True)
    records = []
    for index, (scene, conversations) in enumerate(tqdm(scenes, desc=f"writing {directory}")):
        picture, boxes = paint(scene, rng)
        picture.save(directory / "images_dl" / f"{index:05}.png", compress_level=1)
        records += [record(f"{index:05}", code, turns, scene, boxes, system) for code, turns in conversations.items()]
    (directory / "chat.json").write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="The folder for train/, heldout/ and talk/.")
    args = parser.parse_args()

    rng = random.Random(0)
    train, heldout, talk = training_conversations(rng), held_out_conversations(rng), talk_conversations(rng)
    for name, scenes in (("train", train), ("heldout", heldout), ("talk", talk)):
        write(args.output_dir / name, scenes, rng)
    print(f"{len(train)} scenes to train on, {len(heldout)} held out, {len(talk)} to talk about, in {args.output_dir}")


if __name__ == "__main__":
    main()
