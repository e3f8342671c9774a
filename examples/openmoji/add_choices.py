"""Writes the held-out questions of eight kinds with all answers that their kind has, to score them by `choices`.

    python -m examples.openmoji.add_choices --output_dir output/openmoji/choices

`chat.json` has the records of output/openmoji/data/heldout, each with its `choices`; `yes_no.json` the English ones of
the kind "is there". Their pictures stay where they are: pass `--image_dir output/openmoji/data/heldout/images_dl`.
"""

import argparse
import json
from pathlib import Path

from examples.openmoji.scenes import names
from examples.openmoji.wordings import LANGUAGES

HELDOUT = Path("output/openmoji/data/heldout/chat.json")


def choices_of(kind: str, code: str) -> list[str]:
    """All answers that a kind of question has in a language; none for answers that list or compare things."""
    language, motifs = LANGUAGES[code], names(code)
    if kind == "what":
        return [language.some(name, number) for number in range(1, 5) for name in motifs]
    if kind in ("at", "beside"):
        return [*map(language.one, motifs), language.nothing]
    fixed = {"where": [*map(language.at, language.places)], "count": language.numbers, "things": language.numbers[1:]}
    return fixed.get(kind) or {"is there": list(language.yes_no), "ground": language.grounds}.get(kind, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    records = json.loads(HELDOUT.read_text(encoding="utf-8"))
    for record in records:
        record["choices"] = choices_of(record["kinds"][0], record["language"])
        answer = record["conversations"][1]["value"]
        assert not record["choices"] or answer in record["choices"], record
    chosen = [record for record in records if record["choices"]]
    yes_no = [record for record in chosen if record["kinds"] == ["is there"] and record["language"] == "en"]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, some in (("chat.json", chosen), ("yes_no.json", yes_no)):
        (args.output_dir / name).write_text(json.dumps(some, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"{len(chosen)} questions with choices, {len(yes_no)} of them with yes and no, in {args.output_dir}")


if __name__ == "__main__":
    main()
