"""Opens files with a clear error, and writes files and folders that appear whole."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

if TYPE_CHECKING:
    pass
from train_llava.cli import _is_out_of_memory


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Turns whatever a library raises while it opens `name`, a file, a folder or an address, into one that names it.

    What libraries raise for a broken file is of any type, so this stands around their opening, and nothing else.

    Raises:
        ValueError: `name` cannot be opened; of a folder, the broken file is named. An `OSError` or `ValueError` that
            names it already passes as it is.
    """
    try:
        yield
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        broken, known = _broken_file(Path(name)), isinstance(error, (OSError, ValueError))
        if broken is None and known and name in str(error):
            raise
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        if broken is not None and _is_lfs_pointer(broken):
            reason = "it is a Git LFS pointer, and `git lfs pull` fetches the file that it stands for"
        raise ValueError(f"{broken or name} cannot be opened: {reason}") from error


def _broken_file(path: Path) -> Path | None:
    """The first file of a model's folder, or the file itself, that does not hold what its name says; None: all do."""
    for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                empty = not content and file.name.endswith(("config.json", "tokenizer.json"))
                if empty or not isinstance(content, dict):
                    return file
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix == ".jinja":
                file.read_text(encoding="utf-8")
        except Exception:  # SafetensorError is one
            return file
        if _is_lfs_pointer(file):
            return file
    return None


def _is_lfs_pointer(file: Path) -> bool:
    """Whether a file is what Git leaves in place of a large one where Git LFS is not installed."""
    with open(file, "rb") as content:
        return content.read(24) == b"version https://git-lfs."


@contextmanager
def writing(path: Path | str, remedy: str = "make room on its disk") -> Iterator[None]:
    """Names what a block writes where the disk is full, which libraries raise as errors of any type.

    Raises:
        OSError: it is, or a limit on files is reached. All else passes as it is.
    """
    try:
        yield
    except Exception as error:
        full = next((text for text in map(os.strerror, (ENOSPC, EDQUOT, EFBIG)) if text in str(error)), None)
        if full is None:
            raise
        raise OSError(f"{path} could not be written: {full.lower()}; {remedy}") from error


@contextmanager
def written_whole(output_dir: str, remedy: str = "make room on its disk") -> Iterator[Path]:
    """Yields a temporary folder beside `output_dir` that takes its name when the block ends without an error.

    So a folder under its final name is always complete. The block reads back what it wrote before it ends.

    Raises:
        ValueError: `output_dir` exists and is not an empty folder, or a disk is mounted there; nothing is overwritten.
        OSError: the disk is full; the message ends with the `remedy`.
    """
    target = Path(os.path.realpath(output_dir))  # behind a link, on the disk where it is to lie
    if os.path.ismount(target):
        raise ValueError(f"--output_dir {output_dir} is a disk of its own: name a folder in it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir} exists already: remove it or choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with writing(target, remedy):
            yield temporary
        apply_umask(temporary, *temporary.rglob("*"))
        if target.exists():
            target.rmdir()  # it is empty, and on Windows a folder takes no other's place
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` that takes its place when the block ends without an error: `path` is never half."""
    path = path.resolve()  # a link stays one
    beside = path.with_name(f".{path.name}.new")
    try:
        with writing(path):
            yield beside
        apply_umask(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def apply_umask(*paths: Path) -> None:
    """Gives new files and folders the modes of the process's umask: mkdtemp and safetensors make theirs private."""
    mask = _umask()
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    """The process's umask, which Python can only read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
