"""The log of samples that could not be read."""

import json
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from train_llava.training.checkpointing import _known


def log_bad_sample(log: Path, record: int | str, record_id: str, reason: str) -> int:
    """Adds a bad record to a log that ranks and workers share, unless it is there; returns how many there are.

    `record` is its place in the data, since ids may be missing or the same. A process reads what others have added
    since it last looked, and nothing twice: there may be many, and each is met again in every pass.
    """
    read, known = _known.get(log, (0, set()))
    size = log.stat().st_size if log.exists() else 0
    if size < read:  # another run's
        read, known = 0, set()
    if record not in known:
        log.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(log.with_suffix(".lock")), open(log, "ab+") as file:
            file.seek(read)
            added = file.read()
            for line in added.splitlines():
                with suppress(ValueError):  # torn, by a full disk
                    known.add(json.loads(line)["record"])
            if record not in known:
                line = json.dumps({"record": record, "id": record_id, "reason": reason}, ensure_ascii=False)
                torn = b"\n" if added and not added.endswith(b"\n") else b""
                file.write(torn + line.encode(errors="backslashreplace") + b"\n")
                known.add(record)
            _known[log] = file.tell(), known
    return len(known)
