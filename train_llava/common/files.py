"""Opens files with a clear error, and writes files and folders that appear whole."""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open

ROOM = "make room on its disk"


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is torch's error, by its name: importing torch for this would take seconds."""
    return type(error).__name__ == "OutOfMemoryError"


@contextmanager
def opening(name: str) -> Iterator[None]:
    """Turns any error of a library that opens `name`, a file, a folder or an address, into one that names it.

    Libraries raise errors of any type for a broken file, so the block holds their opening and nothing else. An error
    that names `name` already passes unchanged; any other becomes a ValueError that names the broken file of a folder.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A clear error passes; another one gets the name of the broken file
        broken, is_clear = _broken_file(Path(name)), isinstance(error, (OSError, ValueError))
        if broken is None and is_clear and name in str(error):
            raise
        reason = str(error) if is_clear else f"{type(error).__name__}: {error}"
        if broken is not None and _is_lfs_pointer(broken):
            reason = "it is a Git LFS pointer, and `git lfs pull` fetches the file that it stands for"
        raise ValueError(f"{broken or name} cannot be opened: {reason}") from error


def _broken_file(path: Path) -> Path | None:
    """The first broken file in a model's folder, or the file `path` if it is broken; None: no file is."""
    for file in filter(Path.is_file, sorted(path.iterdir()) if path.is_dir() else [path]):
        # Each format as its reader would open it
        try:
            if file.suffix == ".json":
                content = json.loads(file.read_bytes())
                is_empty = not content and file.name.endswith(("config.json", "tokenizer.json"))
                if is_empty or not isinstance(content, dict):
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
    """Whether Git left a pointer in place of a large file because Git LFS is not installed."""
    with open(file, "rb") as content:
        return content.read(24) == b"version https://git-lfs."


@contextmanager
def writing(path: Path | str, remedy: str = ROOM) -> Iterator[None]:
    """Turns a library's error on a full disk, of any type, into an OSError that names the file or folder."""
    try:
        yield
    except Exception as error:
        for reason in map(os.strerror, (ENOSPC, EDQUOT, EFBIG)):
            if reason in str(error):
                raise OSError(f"{path} could not be written: {reason.lower()}; {remedy}") from error
        raise


@contextmanager
def written_whole(output_dir: str, remedy: str = ROOM) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `output_dir` when the block ends without an error.

    So a folder under its final name is always complete. A ValueError says that `output_dir` is a disk, or no empty
    folder; nothing is overwritten. An OSError says that the disk is full, and the `remedy`.
    """
    # Check the target before anything is written
    target = Path(os.path.realpath(output_dir))  # behind a link, on the disk of its final place
    if os.path.ismount(target):
        raise ValueError(f"--output_dir {output_dir} is a disk of its own: name a folder in it")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"--output_dir {output_dir} exists already: remove it or choose another name")

    # Write beside it, on the same disk, and rename
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with writing(target, remedy):
            yield temporary
        apply_umask(temporary, *temporary.rglob("*"))
        if target.exists():
            target.rmdir()  # it is empty, and on Windows a folder cannot replace another
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a new file beside `path`, and puts it in its place when the block ends without an error."""
    path = path.resolve()  # a link stays one
    new = path.with_name(f".{path.name}.new")
    try:
        with writing(path):
            yield new
        apply_umask(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def held(lock_file: Path, taken: str, wait: bool = False) -> Iterator[None]:
    """Keeps all other processes out of the block. The lock ends with its process.

    While another process holds it, `taken` with that process's name is an error or, with `wait`, is printed.
    """
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=int(wait))  # a wait of a second is not worth a line
    except Timeout:
        message = f"{taken} ({lock_file.read_text()})"
        if not wait:
            raise ValueError(message) from None
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(message, flush=True)
        lock.acquire()
    try:
        lock_file.write_text(f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        if not wait:  # nobody waits for this file
            lock_file.unlink(missing_ok=True)
        lock.release()


def apply_umask(*paths: Path) -> None:
    """Gives new files and folders the modes of the umask: mkdtemp and safetensors make theirs private."""
    mask = os.umask(0)  # Python reads the umask only by setting it
    os.umask(mask)
    for path in paths:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
