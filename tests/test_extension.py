"""DeepSpeed's extensions: a build is said aloud, a dead lock is removed, a living one waited for."""

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from train_llava.training import extension
from train_llava.training.extension import build_extension

NAME = "deepspeed_none"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder of an extension whose build takes no time."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / NAME

    def load(verbose: bool) -> None:
        assert not (folder / "lock").exists()  # torch would wait for ever
        (folder / f"{NAME}.so").touch()

    builder = SimpleNamespace(name=NAME, load=load)
    monkeypatch.setattr(extension, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda _: builder))
    folder.mkdir()
    return folder


def hold(what: str, folder: Path, ready: Connection) -> None:
    """Builds for two seconds, by torch alone or as another start of a run."""
    if what == "torch":
        file = os.open(folder / "lock", os.O_CREAT | os.O_EXCL)
        ready.send("")
        time.sleep(2)
        os.close(file)
        (folder / "lock").unlink()
        return
    builder = extension.get_accelerator().create_op_builder("")
    builder.load = lambda verbose: ready.send("") or time.sleep(4)
    build_extension("")


def started(what: str, folder: Path) -> multiprocessing.Process:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=hold, args=(what, folder, there))
    process.start()
    here.recv()
    return process


def test_a_first_build_is_said_aloud_and_a_later_one_is_silent(folder, capsys):
    build_extension("")
    assert capsys.readouterr().out == f"building DeepSpeed's CPU extension {NAME}, about a minute\n"
    build_extension("")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("killed", ["torch", "ours", None])
def test_a_lock_that_no_process_holds_is_removed(folder, capsys, killed):
    if killed:
        process = started(killed, folder)
        process.kill()
        process.join()
    (folder / "lock").touch()
    build_extension("")
    removed, building = capsys.readouterr().out.splitlines()[-2:]
    assert removed == f"{folder}/lock was left by a build that was interrupted: removed"
    assert building.startswith("building ")


@pytest.mark.parametrize("what", ["torch", "ours"])
def test_a_living_build_is_named_and_waited_for(folder, capsys, what):
    process = started(what, folder)
    build_extension("")
    process.join()
    out = capsys.readouterr().out
    assert "waiting for " in out
    assert f"process {process.pid}" in out
    assert "removed" not in out
    assert (folder / f"{NAME}.so").exists()


def test_a_lock_of_another_user_is_not_removed(folder, capsys, monkeypatch):
    """Whose processes cannot be looked into."""
    (folder / "lock").touch()
    monkeypatch.setattr(extension.os, "getuid", lambda: 1234)
    monkeypatch.setattr(psutil.Process, "username", lambda _: "somebody")
    monkeypatch.setattr(extension.time, "sleep", lambda _: (folder / "lock").unlink())
    build_extension("")
    out = capsys.readouterr().out
    assert f"waiting for {folder}/lock of the user " in out
    assert "removed" not in out
