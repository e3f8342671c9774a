"""Writes the log of records that could not be used, `bad_samples.jsonl`."""

import json
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

_logs: dict[Path, tuple[int, set[int | str]]] = {}  # for each log: bytes read, and records in them


def log_bad_sample(log: Path, record: int | str, record_id: str, reason: str) -> int:
    """Adds a bad record to a log that ranks and workers share, once; returns the number of records in it.

    `record` is the record's place in the data, because ids may be missing or repeat. A process reads only the
    lines added since its last call, because a long log would be read again at each bad record of each epoch.
    """
    position, records = _logs.get(log, (0, set()))
    size = log.stat().st_size if log.exists() else 0
    if size < position:  # a new run began the log anew
        position, records = 0, set()
    if record in records:
        return len(records)
    log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(log.with_suffix(".lock")), open(log, "ab+") as file:
        # What other processes have written; a full disk may have torn a line
        file.seek(position)
        added = file.read()
        for line in added.splitlines():
            with suppress(ValueError):
                records.add(json.loads(line)["record"])
        if record not in records:
            entry = json.dumps({"record": record, "id": record_id, "reason": reason}, ensure_ascii=False)
            line_break = b"\n" if added and not added.endswith(b"\n") else b""
            file.write(line_break + entry.encode(errors="backslashreplace") + b"\n")
            records.add(record)
        _logs[log] = file.tell(), records
    return len(records)
