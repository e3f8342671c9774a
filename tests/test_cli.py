"""What every command shares: an error names its file, a folder appears whole, any operating system will do."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from train_llava.cli import run_command
from train_llava.common.files import opening, replacing, written_whole
from train_llava.model import load_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 12345\n"
PULL = "it is a Git LFS pointer, and `git lfs pull` fetches the file that it stands for"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        *((name, lambda content: POINTER, PULL) for name in ("config.json", "model.safetensors", "tokenizer.json")),
        ("chat_template.jinja", lambda content: POINTER, PULL),
        ("model.safetensors", lambda content: content[: len(content) // 2], "SafetensorError: .*not fully covered"),
        ("model.safetensors", lambda content: b"<html>not found</html>", "SafetensorError"),
        ("tokenizer.json", lambda content: content[: len(content) // 2], ""),
        ("tokenizer.json", lambda content: b"{}", "KeyError"),
        ("config.json", lambda content: b"{}", "Unrecognized model"),
        ("config.json", lambda content: b"null", "TypeError"),
        ("processor_config.json", lambda content: b"[]", "AttributeError"),
        ("tokenizer_config.json", lambda content: b"", "Expecting value"),
        ("generation_config.json", lambda content: content[:20], "not a valid JSON"),
        ("chat_template.jinja", lambda content: bytes(range(256)), "utf-8"),
    ],
)
def test_a_broken_file_of_a_model_is_named(llava, tmp_path, name: str, damage: Callable, reason: str):
    folder = tmp_path / "model"
    shutil.copytree(llava, folder)
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=f"^{folder / name} cannot be opened: .*{reason}"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("error", [KeyError("peft_type"), RuntimeError("x"), Exception("a bare one"), EOFError()])
def test_any_error_of_a_library_names_the_file_that_was_opened(error):
    with (
        pytest.raises(ValueError, match=f"^http://here/a cannot be opened: {type(error).__name__}: "),
        opening("http://here/a"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no file a.json"), torch.OutOfMemoryError("a.json"), KeyboardInterrupt()]
)
def test_an_error_that_says_enough_passes_as_it_is(error):
    with pytest.raises(type(error)) as raised, opening("a.json"):
        raise error
    assert raised.value is error


def test_a_new_folder_replaces_an_empty_one_and_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    with written_whole(str(tmp_path / "out")) as folder:
        (folder / "file").write_text("first")
    with pytest.raises(ValueError, match="exists already"), written_whole(str(tmp_path / "out")):
        pass
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_written_files_have_the_modes_of_the_umask(llava, tmp_path, umask):
    before = os.umask(umask)
    try:
        with written_whole(str(tmp_path / "out")) as folder:
            load_checkpoint(str(llava))[0].save_pretrained(folder)
            with replacing(folder / "config.json") as file:
                file.write_text("{}")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
    assert len(modes) >= 3


def test_a_file_is_replaced_as_a_whole_or_not_at_all_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(IsADirectoryError), replacing(tmp_path / "link") as file:
        file.write_bytes(b"half" + Path(tmp_path).read_bytes())
    assert (tmp_path / "there").read_text() == "old"
    with replacing(tmp_path / "link") as file:
        file.write_text("new")
        assert (tmp_path / "there").read_text() == "old"
    assert (tmp_path / "there").read_text() == "new"
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


@pytest.mark.parametrize("name", ["spiece.model", "adapter_model.bin", "config.json", "data.parquet"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_git_lfs_pointer_is_named_whatever_file_it_stands_for(tmp_path, name, alone):
    (tmp_path / name).write_bytes(POINTER)
    (tmp_path / "vocab.json").write_text('{"a": 1}')
    opened = str(tmp_path / name if alone else tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path / name} cannot be opened: {PULL}$"), opening(opened):
        raise ValueError(f"{opened} is wrong")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "error: CUDA out of memory: a smaller"),
        (KeyboardInterrupt(), "stopped"),
        (ValueError("Caught in worker 0.\nOriginal Traceback (most recent call last):\nValueError: a.png is torn"),
         "error: a.png is torn"),
        (ImportError("no  such\npackage"), "error: no such package"),
    ],
)  # fmt: skip
def test_an_error_that_the_user_can_mend_is_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code.startswith(line)
    assert "\n" not in ended.value.code


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("inconsistent tensor size")

    with pytest.raises(RuntimeError):
        run_command(main)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_may_lie_behind_a_link_and_a_mounted_disk_is_not_replaced(tmp_path, there):
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk" / "models").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "models")
    with written_whole(str(tmp_path / "out")) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "file").write_text("whole")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "models" / "file").read_text() == "whole"
    with pytest.raises(ValueError, match="a disk of its own"), written_whole("/proc"):
        pass


# Unix modules are missing for this package only: other packages look at the system's name before they import them
WITHOUT_UNIX = """
import builtins, importlib, pkgutil
import train_llava
unix, real = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog"}, builtins.__import__
def portable(name, globals=None, *args, **kwargs):
    if name in unix and globals["__name__"].startswith("train_llava"):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return real(name, globals, *args, **kwargs)
builtins.__import__ = portable
for module in pkgutil.walk_packages(train_llava.__path__, "train_llava."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_can_be_imported_without_unix():
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [path.relative_to(root).with_suffix("") for path in (root / "train_llava").rglob("[!_]*.py")]
    rooms = {"common", "dataset", "evaluation", "modeling", "training"}
    assert set(done.stdout.split()) == {".".join(path.parts) for path in files} | {f"train_llava.{r}" for r in rooms}


def test_unused_weights_are_reported_for_a_llava_and_not_for_its_parts(llava, parts, tmp_path, monkeypatch):
    reported = []
    handler = logging.Handler()
    handler.emit = lambda record: reported.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "handlers", [handler])
    shutil.copytree(parts["clip"], tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())["vision_config"]
    (tmp_path / "tower" / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    _, loading = AutoModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert any("text_model" in name for name in loading["unexpected_keys"])
    assert reported == []
    shutil.copytree(llava, tmp_path / "llava")
    weights = tmp_path / "llava" / "model.safetensors"
    save_file(load_file(weights) | {"image_newline": torch.zeros(4)}, weights, {"format": "pt"})
    load_checkpoint(str(tmp_path / "llava"))
    (line,) = reported
    assert "image_newline" in line


@pytest.mark.parametrize(("end", "code", "error"), [("pass", 0, ""), ("raise ValueError('no')", 1, "error: no\n")])
def test_a_rank_ends_without_the_interpreters_clean_up(tmp_path, end, code, error):
    """An object that aborts when it is deleted stands for DeepSpeed's threads; libraries' exit functions run."""
    (tmp_path / "command.py").write_text(
        "import atexit, os\n"
        "from train_llava.cli import run_command\n"
        "class Thread:\n    def __del__(self, abort=os.abort): abort()\n"
        "thread = Thread()\n"
        "atexit.register(print, 'report sent', end='')\n"
        f"def main():\n    print('done', end=' ')\n    {end}\n"
        "run_command(main)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "LOCAL_RANK": "0"}
    command = [sys.executable, str(tmp_path / "command.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "done report sent")
    assert ended.stderr.endswith(error)
