"""A hub on this machine: its own client against it, then what opens by a hub id."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub

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


def test_the_hubs_own_client(hub, tmp_path):
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
