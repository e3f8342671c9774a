"""The table of pairs that were tried is what measuring them gives."""

from pathlib import Path

import pytest

from benchmarks.pairs import measure_all, table

WRITTEN = Path(__file__).parent.parent / "benchmarks/results/pairs.md"


def cells(text: str) -> dict[str, list[str]]:
    """First cell -> the others, of the first row that begins so in the tables of a Markdown text."""
    rows = [line.strip("| ").replace(r"\|", "¦").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in reversed(rows)}


@pytest.mark.slow
def test_the_table_of_pairs_equals_the_measurements(tmp_path):
    families, towers = ["Qwen3", "LFM2"], ["CLIP", "DINOv2 with registers"]
    found, written = (
        cells(table(measure_all(families, towers, tmp_path), {}, measure_all(["arcee"], towers[:1], tmp_path))),
        cells(WRITTEN.read_text()),
    )
    for family in families:
        logits, learnt, packing, batching, assembled, _ = found[family]
        assert [logits, learnt, packing] == written[family][:3]
        assert float(batching) <= 1e-5
        assert assembled == "2 of 2"
        assert written[family][4] == "15 of 15"
    for tower in towers:
        assert found[tower][:3] == written[tower][:3]
        assert found[tower][3] == "2 of 2"
