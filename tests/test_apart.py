"""`--eval_fraction` keeps records apart by their pictures, alike in a resume, and writes both sides into the run."""

import io
import json
import sys

import networkx
import numpy as np
import pytest
from conftest import run_train, turns
from PIL import Image
from test_trainer import FAST

from train_llava import check_data
from train_llava.data import LlavaDataset
from train_llava.dataset.apart import divided, keep_apart, look_alike

RUN = [*FAST, "--train_type", "projector", "--max_steps", "2", "--save_steps", "1", "--eval_fraction", "0.25"]


def photo(seed: int, size: int = 96) -> Image.Image:
    """Random patches of color, softly drawn."""
    patches = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Records of which 0 to 7 share a picture: its bytes, its pixels, smaller, as a JPEG, brighter, or by another."""
    files = {f"{i}.png": encoded(photo(i)) for i in range(20)}
    first = photo(0)
    files["1.png"], files["2.png"] = files["0.png"], encoded(first, compress_level=0)
    files["3.png"], files["4.png"] = encoded(first.resize((48, 48))), encoded(first, "JPEG", quality=60)
    files["5.png"] = encoded(first.point(lambda level: min(level + 2, 255)))
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    records = []
    for i in range(20):
        images = ["6.png", "0.png"] if i == 6 else ["7.png", "6.png"] if i == 7 else [f"{i}.png"]
        texts = turns("<image>" * len(images) + "What?", f"answer {i}")
        records.append({"id": str(i), "images": images, "conversations": texts, "references": [f"r{i}"]})
    records += [{"id": "bad", "image": "missing.png", "conversations": turns("<image>What?", "a")}]
    (folder / "chat.json").write_text(json.dumps(records))
    return folder


def ids(dataset: LlavaDataset) -> list[str]:
    return [dataset.read(i, decode=False)["id"] for i in range(len(dataset))]


def test_records_whose_pictures_are_alike_stay_together(photos):
    records, sides = LlavaDataset(str(photos), data_weights=[2]), []
    for seed in range(30):
        apart = keep_apart(records, 0.5, seed)
        assert apart == keep_apart(LlavaDataset(str(photos)), 0.5, seed)
        train, heldout = map(ids, divided(records, apart))
        assert sorted(train + 2 * heldout, key=str) == sorted(2 * [*map(str, range(20)), "bad"], key=str)
        assert len(heldout) == len(apart) <= 10 and "bad" not in heldout  # noqa: PT018
        assert len({*map(str, range(8))} & {*heldout}) in (0, 8)
        sides.append(tuple(heldout))
    assert len(set(sides)) > 20
    assert {"0", "12"} <= {name for side in sides for name in side}
    assert len(keep_apart(records, 0.001, 0)) == 1


def test_looks_are_grouped_as_by_comparing_all_with_all():
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 250, (1400, 192), dtype=np.uint8)
    for i in range(1, 200):  # chains: each is like the one before, and unlike the first
        looks[5 * i] = looks[5 * i - 5] + (rng.random(192) < 0.2) * 3 if i % 20 else looks[5 * i]
    looks[1000:1100] = 128 + rng.integers(0, 3, (100, 192))
    near = np.linalg.norm(looks[:, None].astype(np.float32) - looks[None], axis=2) < 3 * 192**0.5
    graph = networkx.from_numpy_array(near)
    found = look_alike(looks.tobytes())
    assert {frozenset(np.flatnonzero(found == one).tolist()) for one in set(found.tolist())} == {
        frozenset(group) for group in networkx.connected_components(graph)
    }
    assert len(set(found.tolist())) < 1200
    assert look_alike(b"").shape == (0,)


def test_none_can_be_kept_apart_where_all_are_alike(photos):
    for i in range(20):
        (photos / "images" / f"{i}.png").write_bytes(encoded(photo(0)))
    with pytest.raises(ValueError, match=r"--eval_fraction 0.3 keeps none of 21 records apart: too many look alike"):
        keep_apart(LlavaDataset(str(photos)), 0.3, 0)


def test_a_run_writes_both_sides_and_a_resume_keeps_them(llava, photos, tmp_path, monkeypatch):
    run = tmp_path / "run"
    arguments = [llava, photos, run, *RUN, "--max_bad_fraction", "0.1", "--eval_answers", "3"]
    run_train(monkeypatch, *arguments)
    sides = [LlavaDataset(str(run / f"{name}.jsonl"), str(photos / "images")) for name in ("train", "heldout")]
    assert (len(sides[0]), len(sides[1])) == (16, 5)
    assert sorted(ids(sides[0]) + ids(sides[1])) == sorted([*map(str, range(20)), "bad"])
    # The side kept apart has its pictures, and is as it was
    original, heldout = LlavaDataset(str(photos)), LlavaDataset(str(run / "heldout.jsonl"))
    for item in map(heldout.__getitem__, range(len(heldout))):
        assert item == original[int(item["id"])]
    assert (run / "answers" / "step-000002.jsonl").exists()
    # Again, and with another fraction
    before = (run / "heldout.jsonl").read_text()
    run_train(monkeypatch, *arguments, "--max_steps", "3", "--resume_from_checkpoint", "true")
    assert (run / "heldout.jsonl").read_text() == before
    with pytest.raises(
        ValueError, match=r"--eval_fraction 0.5: .* was trained with 0.25, which a resume cannot change"
    ):
        run_train(
            monkeypatch, *arguments, "--eval_fraction", "0.5", "--max_steps", "4", "--resume_from_checkpoint", "true"
        )


def test_pictures_inside_the_data_are_kept_apart_too(photos, tmp_path):
    import datasets

    rows = [{"image": {"bytes": encoded(photo(i)), "path": None}, "caption": f"{i}"} for i in range(4)]
    datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    records = LlavaDataset([str(tmp_path / "a.parquet"), str(photos)])
    keep_apart(records, 0.8, 1, tmp_path)
    heldout = LlavaDataset(str(tmp_path / "heldout.jsonl"))
    pixels = [np.asarray(item["images"][0]).tolist() for item in map(heldout.__getitem__, range(len(heldout)))]
    assert any(np.asarray(photo(i)).tolist() in pixels for i in range(4))


def test_check_data_tells_how_many_are_kept_apart(photos, monkeypatch, capsys):
    command = ["check_data", "--data_path", str(photos), "--eval_fraction", "0.25", "--num_proc", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        check_data.main()
    assert "--eval_fraction 0.25 keeps 5 of the records apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "reason"),
    [("1", r"--eval_fraction 1.0: it has to lie in \(0, 1\)"), ("0", r"it has to lie in \(0, 1\)")]
    + [(f"0.1 {other}", "--eval_fraction not with --eval_data_path, --streaming, or --push_to_hub")
        for other in ("--push_to_hub true", "--eval_image_dir .", "--eval_data_path .", "--streaming true")],
)  # fmt: skip
def test_what_a_fraction_cannot_go_with_is_refused(llava, photos, tmp_path, monkeypatch, words, reason):
    with pytest.raises(ValueError, match=reason):
        run_train(monkeypatch, llava, photos, tmp_path / "run", *RUN[:-1], *words.split())
