"""A stream reads shards pass after pass, each rank and worker its own part, and stops at bad data as a table does."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context

import datasets
import pytest
from conftest import turns
from PIL import Image
from record_files import encoded
from torch.utils.data import DataLoader

from train_llava.chat import Chat
from train_llava.data import CheckedDataset, LlavaCollator, LlavaDataset
from train_llava.dataset.streaming import stream_items
from train_llava.training.extras import with_extras


def first(stream, number: int) -> list[str]:
    return [sample.id for sample in islice(stream, number)]


def test_a_stream_gives_every_good_record_in_a_new_order_each_pass(bad_data, processor, tmp_path):
    root, reasons = bad_data
    sources = (str(root), None, None, Chat(processor, 200), tmp_path / "bad.jsonl", "skip", 0.6)
    good = len(reasons)
    ids = first(stream_items(*sources, seed=1), 3 * good)
    passes = [ids[:good], ids[good : 2 * good], ids[2 * good :]]
    assert [sorted(ids) for ids in passes] == [sorted(f"good {i}" for i in range(good))] * 3
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert first(stream_items(*sources, seed=1), 3 * good) == ids
    assert first(stream_items(*sources, seed=2), 3 * good) != ids
    log = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["id"] for line in log) == sorted(reasons)


def test_a_stream_shuffles_shards_too(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("train_llava.dataset.streaming.BUFFER", 5)
    for i in range(9):
        lines = [json.dumps({"id": f"{i}{j}", "conversations": turns("?", "!")}) for j in range(10)]
        (tmp_path / f"{i}.jsonl").write_text("\n".join(lines))
    sources = [str(tmp_path / f"{i}.jsonl") for i in range(9)]
    ids = first(stream_items(sources, None, None, Chat(processor), tmp_path / "bad.jsonl"), 90)
    assert sorted(ids) == [f"{i:02}" for i in range(90)]
    shards = [int(name[0]) for name in ids[::10]]
    assert shards != sorted(shards)
    assert len({name[0] for name in ids[10:20]}) > 1
    ranks = [
        first(stream_items(sources, None, None, Chat(processor), tmp_path / "log").shard(2, i), 90) for i in (0, 1)
    ]
    assert not set(ranks[0]) & set(ranks[1])
    assert set(ranks[0]) | set(ranks[1]) == set(ids)


def test_every_rank_and_worker_reads_its_part_of_every_source(tmp_path, processor):
    for name, size in (("a", 40), ("b", 4)):
        (tmp_path / name).mkdir()
        for i in range(4):
            rows = [{"id": f"{name}{i}{j}", "conversations": turns("?", "!")} for j in range(size // 4)]
            datasets.Dataset.from_list(rows).to_parquet(tmp_path / name / f"{i}.parquet")
    stream = stream_items([str(tmp_path / name) for name in "ab"], None, None, Chat(processor), tmp_path / "log")
    ranks = [first(stream.shard(2, i), 22) for i in (0, 1)]
    assert [sum(name[0] == "b" for name in ids) for ids in ranks] == [2, 2]
    assert len({*ranks[0], *ranks[1]}) == 44
    workers = [sample.id for sample in islice(DataLoader(stream, None, num_workers=2), 44)]
    assert len(set(workers)) == 44
    assert [sum(name[0] == "b" for name in workers[i::2]) for i in (0, 1)] == [2, 2]


def test_a_worker_reads_all_that_it_streams_from_the_hub(processor, tmp_path, monkeypatch):
    """`datasets` would give a data-loading worker, which has its share already, a share of it."""

    def load_dataset(*_, **__):
        rows = [{"id": f"{i}", "prompt": "?", "completion": "!"} for i in range(40)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    stream = stream_items(["a/b", "c/d"], None, None, Chat(processor), tmp_path / "log")
    loader = DataLoader(stream, None, num_workers=2, multiprocessing_context="fork")
    ids = [sample.id for sample in islice(loader, 80)]
    assert sorted(ids) == sorted([f"{i}" for i in range(40)] * 2)


def test_a_stream_takes_each_source_by_its_weight(tmp_path, processor):
    for name in ("a", "b"):
        lines = [json.dumps({"id": f"{name}{i}", "conversations": turns("?", "!")}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths, chat, log = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")], Chat(processor), tmp_path / "log"
    ids = first(stream_items(paths, None, [2, 0.5], chat, log), 400)
    part = len({name for name in ids if name[0] == "b"})
    assert 14 <= part <= 26  # of 40, always the same
    of_one_pass = ids[: 80 + part]
    assert sorted(name for name in of_one_pass if name[0] == "a") == sorted([f"a{i}" for i in range(40)] * 2)
    with pytest.raises(ValueError, match="1 weights for 2 data paths"):
        stream_items(paths, None, [1], chat, log)
    with pytest.raises(ValueError, match="weights are numbers from 0"):
        stream_items(paths, None, [1, -1], chat, log)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(("error", 1.0), "^record "), (("skip", 0.4), r"(\d+) of \d+ records are bad, more than --max_bad_fraction")],
)
def test_a_stream_stops_at_bad_records_as_a_table_does(bad_data, processor, tmp_path, settings, message):
    stream = stream_items(str(bad_data[0]), None, None, Chat(processor, 200), tmp_path / "bad.jsonl", *settings)
    with pytest.raises(ValueError, match=message):
        first(stream, len(bad_data[1]) + 1)


def test_a_stream_without_a_good_record_stops(processor, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([{"conversations": []}] * 3))
    stream = stream_items(str(tmp_path), None, None, Chat(processor), tmp_path / "bad.jsonl", "skip", 1.0)
    with pytest.raises(ValueError, match=r"no record of .* is good"):
        first(stream, 1)


def test_a_stream_of_nothing_and_wrong_weights_are_refused(tmp_path, processor):
    (tmp_path / "chat.json").write_text("[]")
    log = tmp_path / "log"
    with pytest.raises(ValueError, match="gave a rank or worker nothing to read"):
        next(iter(stream_items(str(tmp_path), None, None, Chat(processor), log)))
    for weights, reason in (([-1], "from 0"), ([float("nan")], "from 0"), ([0], "from 0"), ([1, 1], "2 weights")):
        with pytest.raises(ValueError, match=reason):
            LlavaDataset(str(tmp_path), data_weights=weights)
        with pytest.raises(ValueError, match=reason):
            stream_items(str(tmp_path), None, weights, Chat(processor), log)


def test_a_stream_opens_large_images_small(tmp_path, processor):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (400, 300)), "JPEG", exif=exif))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "caption": "x"}))
    chat = Chat(processor)
    (sample,) = islice(stream_items(str(tmp_path / "a.jsonl"), None, None, chat, tmp_path / "log"), 1)
    assert chat.min_side == 28
    assert sample.images[0].size == (75, 100)
    checked = CheckedDataset(LlavaDataset(str(tmp_path / "a.jsonl")), chat, tmp_path / "log")
    assert (checked[0].is_replacement, checked[0].images[0].size) == (False, (75, 100))


def first_batch(data, collator: LlavaCollator) -> dict:
    collate = partial(with_extras, collator=collator)
    return next(iter(DataLoader(data, 4, collate_fn=collate)))


def test_a_spawned_process_reads_a_stream_and_a_table(bad_data, processor, tmp_path):
    """As workers start on macOS and Windows: everything that one needs is pickled."""
    collator, log = LlavaCollator(processor, 200), tmp_path / "bad.jsonl"
    stream = stream_items(str(bad_data[0]), None, None, collator.chat, log, "skip", 0.6)
    checked = CheckedDataset(LlavaDataset(str(bad_data[0])), collator.chat, log, "skip", 0.6)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        for batch in process.map(first_batch, (stream, checked), (collator, collator)):
            assert len(batch["extras"]["ids"]) == 4
            assert all(name.startswith("good") for name in batch["extras"]["ids"])
