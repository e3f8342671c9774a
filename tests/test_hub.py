"""A hub on this machine serves its own client, and data sets open by their id on it as they open from a folder."""

import json
import subprocess
import sys
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile

import datasets
import pytest
from conftest import turns
from hub import Hub
from record_files import ANSWERS, COLORS, FORMATS, PNGS, QUESTION, colors_of, shards, zipped

from train_llava.data import LlavaDataset

ROOT = Path(__file__).parent.parent

CLIENT = """
import json, os, sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
api, seen = HfApi(token="hf_x"), {}
seen["me"] = api.whoami()["name"]
seen["files"] = api.list_repo_files("a/model")
seen["info"] = [api.model_info("a/model").sha, api.dataset_info("a/data").id]
path = hf_hub_download("a/model", "config.json")
seen["content"], seen["sha"] = open(path).read(), path.split("/")[-2]
folder = snapshot_download("a/data", repo_type="dataset", allow_patterns="deep/*")
seen["snapshot"] = sorted(os.path.relpath(os.path.join(place, name), folder)
                          for place, _, names in os.walk(folder) for name in names)
file = HfFileSystem()
seen["part"] = file.cat_file("datasets/a/data/deep/large.bin", start=1000, end=1004).decode()
seen["size"] = file.info("datasets/a/data/deep/large.bin")["size"]
seen["glob"] = len(file.glob("datasets/a/data/many/*"))
url = api.create_repo("me/new", exist_ok=True), api.create_repo("me/new", exist_ok=True)
os.makedirs("up/sub")
for name, content in (("config.json", b"{}"), ("sub/model.safetensors", bytes(3000)), ("README.md", b"# new")):
    open(f"up/{name}", "wb").write(content)
api.upload_folder(repo_id="me/new", folder_path="up")
back = snapshot_download("me/new")
seen["back"] = [open(f"{back}/{name}", "rb").read() == open(f"up/{name}", "rb").read()
                for name in ("config.json", "sub/model.safetensors", "README.md")]
api.delete_file("config.json", "me/new")
seen["left"] = api.list_repo_files("me/new")
for name, call in (("missing", lambda: api.model_info("a/none")), ("gated", lambda: hf_hub_download("a/gated", "x")),
                   ("no file", lambda: hf_hub_download("a/model", "none"))):
    try:
        call()
    except (EntryNotFoundError, GatedRepoError, RepositoryNotFoundError) as error:
        seen[name] = type(error).__name__
print(json.dumps(seen))
"""


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub").serving() as served:
        yield served


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_the_client_of_the_hub_lists_fetches_and_pushes(hub, tmp_path):
    write(hub.folder("models", "a/model"), {"config.json": b'{"a": 1}', "model.safetensors": bytes(100)})
    large = bytes(range(97, 123)) * 100
    many = {f"many/{i}.txt": b"%d" % i for i in range(120)}
    write(hub.folder("datasets", "a/data"), {"deep/large.bin": large, "deep/small.txt": b"x", **many})
    write(hub.folder("models", "a/gated"), {"x": b""})
    hub.gated.add("a/gated")
    run = [sys.executable, "-c", CLIENT]
    done = subprocess.run(run, cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["me"] == "me"
    assert seen["files"] == ["config.json", "model.safetensors"]
    assert seen["info"] == [seen["sha"], "a/data"]
    assert seen["content"] == '{"a": 1}'
    assert seen["snapshot"] == ["deep/large.bin", "deep/small.txt"]
    assert (seen["part"], seen["size"], seen["glob"]) == (large[1000:1004].decode(), len(large), 120)
    assert seen["back"] == [True] * 3
    assert seen["left"] == ["README.md", "sub/model.safetensors"]
    assert (seen["missing"], seen["gated"]) == ("RepositoryNotFoundError", "GatedRepoError")
    assert seen["no file"] == "RemoteEntryNotFoundError"


OPEN = """
import json, shutil, sys
from itertools import islice
from pathlib import Path
import datasets
from huggingface_hub import constants
from transformers import AutoProcessor
from train_llava.chat import Chat
from train_llava.data import LlavaDataset
from train_llava.records import text_of
from train_llava.dataset.streaming import stream_items

def shown(item):
    return [text_of(item["messages"][-1]), [image.getpixel((3, 3)) for image in item["images"]]]

def listed(name):
    dataset = LlavaDataset(name)
    return [shown(dataset[i]) for i in range(len(dataset))]

def streamed(name):
    stream = stream_items(name, None, None, chat, Path("bad.jsonl"), max_bad_fraction=0)
    return sorted(shown(vars(sample)) for sample in islice(stream, 3))

def refused(name):
    try:
        return listed(name)
    except (OSError, ValueError) as error:
        return str(error)

ids, wrong, fetched = json.loads(sys.argv[1])
chat = Chat(AutoProcessor.from_pretrained(sys.argv[2]))
seen = {"streamed": [streamed(name) for name in ids]}
files = Path(constants.HF_HUB_CACHE).rglob("snapshots/*/**/*")
seen["fetched"] = sorted({path.suffix for path in files if path.is_file()})
seen["listed"] = [listed(name) for name in ids]
seen["refused"] = [refused(name) for name in wrong]
constants.HF_HUB_OFFLINE = True
seen["again"] = [listed(name) for name in fetched]
tables = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava"
for table in tables.iterdir():
    if table.is_dir():
        shutil.rmtree(table)
seen["offline"] = [refused(name) for name in fetched]
seen["unreached"] = refused("nobody/nothing")
print(json.dumps(seen))
"""


def imagefolder(root: Path, metadata: str, below: str = "") -> None:
    """As in the documentation of the hub. If it lies in the folder of a split, there is another split too."""
    rows = [{"file_name": f"{i}.png", "caption": ANSWERS[i]} for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    if metadata.endswith("csv"):
        lines = ["file_name,caption", *(",".join(row.values()) for row in rows)]
    write(root / below, {metadata: "\n".join(lines).encode(), **{f"{i}.png": PNGS[i] for i in range(3)}})
    if below:
        write(root / "test", {metadata: b'{"file_name": "a.png", "caption": "a"}', "a.png": PNGS[0]})


def in_an_archive(root: Path) -> None:
    """The same in one archive, which `datasets` reads."""
    with ZipFile(root / "train.zip", "w") as archive:
        rows = [{"file_name": f"{i}.png", "text": ANSWERS[i]} for i in range(3)]
        archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, rows)))
        for i in range(3):
            archive.writestr(f"{i}.png", PNGS[i])


def jsonl(answers: list[str]) -> bytes:
    rows = [{"id": i, "image": f"{i}.png", "conversations": turns(QUESTION, text)} for i, text in enumerate(answers)]
    return "\n".join(map(json.dumps, rows)).encode()


def configurations(root: Path) -> None:
    """A card that names two configurations, each with two splits."""
    head = "configs:\n"
    for name in ("one", "two"):
        places = [f"  - {{split: {split}, path: {name}/{split}.jsonl}}\n" for split in ("train", "test")]
        head += f"- config_name: {name}\n  data_files:\n" + "".join(places)
        write(root / name, {"train.jsonl": jsonl(["no"]), "test.jsonl": jsonl(["no"])})
        write(root / name, {f"{i}.png": PNGS[i] for i in range(3)})
    write(root, {"README.md": f"---\n{head}---\n# Mine".encode(), "two/test.jsonl": jsonl(ANSWERS)})


def splits_beside_images(root: Path) -> None:
    images = {f"images/{i}.png": PNGS[i] for i in range(3)}
    write(root, {"data/train.json": jsonl(ANSWERS), "data/test.json": jsonl(["no"]), **images})


def pretrain(root: Path) -> None:
    """As LLaVA's 558K on the hub: a list, another about its images, and an archive of them."""
    zipped(root, ZIP_STORED)
    (root / "chat.json").rename(root / "blip_laion_cc_sbu_558k.json")
    write(root, {"blip_laion_cc_sbu_558k_meta.json": b'[{"id": 1, "blip_caption": "x"}]', "README.md": b"# LLaVA"})


def names_in_a_table(root: Path, ending: str) -> None:
    """Rows that name images of the repository."""
    rows = {"image": [f"sub/{i}.png" for i in range(3)], "caption": ANSWERS}
    write(root, {f"sub/{i}.png": PNGS[i] for i in range(3)})
    head = f"---\nconfigs:\n- config_name: default\n  data_files: train.{ending}\n---\n"
    write(root, {"README.md": head.encode()})
    table = datasets.Dataset.from_dict(rows)
    (table.to_csv if ending == "csv" else table.to_parquet)(root / f"train.{ending}")


def shards_in_a_folder(root: Path) -> None:
    (root / "data").mkdir(parents=True)
    shards(root / "data")


BY_ID = ("LLaVA, beside", "LLaVA, stored zip", "captions in parquet")


@pytest.mark.parametrize(
    ("data_path", "config", "split"),
    [
        ("a/b", None, "train"),
        ("a/b:c:validation", "c", "validation"),
        ("a/b::test", None, "test"),
        ("a/b:c", "c", "train"),
    ],
)
def test_a_hub_data_set_has_a_configuration_and_a_split(monkeypatch, data_path, config, split):
    calls = []

    def load_dataset(*args, **options):
        calls.append((*args, options["split"]))
        rows = [{"image": PNGS[i], "caption": ANSWERS[i]} for i in range(3)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = LlavaDataset(data_path)
    assert [colors_of(dataset[i]) for i in range(3)] == [["red"], ["green"], ["blue"]]
    assert calls == [("a/b", config, split)]


def test_a_data_set_opens_by_its_id_as_it_opens_from_a_folder(hub, tmp_path, llava):
    ids = []

    def published(make, name: str = "") -> None:
        folder = hub.folder("datasets", f"a/set-{len(ids)}")
        folder.mkdir(parents=True)
        make(folder)
        ids.append(f"a/set-{len(ids)}{name}")

    for name in BY_ID:
        published(FORMATS[name])
    published(lambda root: imagefolder(root, "metadata.csv"))
    published(lambda root: imagefolder(root, "metadata.jsonl", "train"))
    published(in_an_archive)
    published(lambda root: names_in_a_table(root, "csv"))
    published(lambda root: names_in_a_table(root, "parquet"))
    published(configurations, ":two:test")
    published(splits_beside_images)
    published(pretrain)
    published(shards_in_a_folder)
    write(hub.folder("datasets", "a/gated"), {"chat.json": b"[]"})
    hub.gated.add("a/gated")
    by_datasets, naming, (two, *_), shards = ids[5], ids[7], ids[8].split(":"), ids[-1]
    page = f"{hub.address}/datasets/a/gated"
    wrong = {
        "a/none": " is no folder here, and no data set that the hub gives",
        "a/gated": f" is gated: ask for it at {page}, then run `hf auth login`",
        f"{shards}::test": ": it has no split test, but train (owner/",
        two: ": Config name is missing.\nPlease pick one among the available configs: ['one', 'two'] (owner/",
        f"{two}:three": ": BuilderConfig 'three' not found. Available: ['one', 'two'] (owner/",
    }
    fetched = [name for name in ids if name != naming]  # images that a table names are read one by one
    run = [sys.executable, "-c", OPEN, json.dumps([ids, list(wrong), fetched]), str(llava)]
    environment = hub.environment(tmp_path / "home")
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    right = [[answer, [list(color)]] for answer, color in zip(ANSWERS, COLORS, strict=True)]
    for way, names in (("listed", ids), ("again", fetched)):
        assert dict(zip(names, seen[way], strict=True)) == dict.fromkeys(names, right), way
    assert dict(zip(ids, seen["streamed"], strict=True)) == dict.fromkeys(ids, sorted(right))
    assert set(seen["fetched"]) <= {".json", ".zip", ".md"}  # nothing that could be streamed
    for name, message in zip(wrong, seen["refused"], strict=True):
        assert message.startswith(f"--data_path {name}{wrong[name]}")
    unreached = "is no folder here, and the hub cannot be reached"
    assert seen["unreached"] == f"--data_path nobody/nothing {unreached}"
    for name, outcome in zip(fetched, seen["offline"], strict=True):  # all but the one of `datasets` is on this disk
        assert outcome == (f"--data_path {name} {unreached}" if name == by_datasets else right)
