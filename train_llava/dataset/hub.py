"""Data sets on the hub: which of its files one is of, fetched into the hub's cache or, in a stream, read as they come.

A file that stays on the hub is a `PurePosixPath`, `datasets/OWNER/NAME@COMMIT/FILE`; one on this disk a `Path`.
"""

import glob
import json
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import xopen
from filelock import FileLock
from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionResolutionError

from train_llava.common.files import replacing

BESIDE = ("images_dl", "images", "images.zip")  # where pictures are looked for beside a file of records
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the hub's `imagefolder`: records by file name
TEXTS = (".json", ".jsonl", ".csv", "metadata.parquet")  # files that name their pictures
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[^:/]*){0,2}")
ABOUT = re.compile(r"(^|[^a-z])(metadata|meta|dataset_infos?|config)\.jsonl?$")  # JSON files that are no records
BLOCKS = {"block_size": 8 << 20, "cache_type": "mmap"}  # what was read of a file lies in a temporary one


def opened(path: PurePath, mode: str = "rb", **settings: Any) -> IO[Any]:
    """A file of this disk or of the hub, opened to be read."""
    if isinstance(path, Path):
        return open(path, mode, **settings)
    try:
        return HfFileSystem().open(str(path), mode, **BLOCKS, **settings)
    except FileNotFoundError:  # its text is the path alone
        raise FileNotFoundError(f"{path} does not exist") from None


def is_file(path: PurePath) -> bool:
    """Whether there is such a file, on this disk or on the hub."""
    return path.is_file() if isinstance(path, Path) else HfFileSystem().isfile(str(path))


def find_on_hub(
    data_path: str, endings: Collection[str], pictures: bool, streaming: bool
) -> tuple[list[PurePath], PurePath]:
    """The files of a data set on the hub that have one of the `endings`, and the folder or archive of its pictures.

    Of a data set of other files there is its own name in their place: `rows_on_hub` reads it. Files are fetched, and
    pictures too where they are asked for; `streaming` leaves on the hub what can be read as it comes.

    Raises:
        OSError, ValueError: the hub does not give it, or it has no such configuration or split.
    """
    name, config, split = (*data_path.split(":"), "", "")[:3]
    settings = {"repo_type": "dataset"}
    try:
        settings["revision"] = revision = HfApi().resolve_revision(name, **settings).resolved
        on_hub = PurePosixPath("datasets", f"{name}@{revision}")
        found = _choose(data_path, on_hub, config, split or "train", endings)
        if found is None:
            return [on_hub], on_hub
        records, shown = found
        remote = streaming and not constants.HF_HUB_OFFLINE
        kept = [record for record in records if remote and not record.lower().endswith(".json")]
        patterns = [glob.escape(record) for record in records if record not in kept]
        # a table or shard has its pictures in it: of what it may name, each is read by itself
        stays = not shown.endswith(".zip") and (remote or not records[0].lower().endswith(TEXTS))
        if pictures and not stays:
            patterns += ["*"] if shown == "." else [glob.escape(shown), f"{glob.escape(shown)}/*"]
        if patterns:
            folder = Path(snapshot_download(name, **settings, allow_patterns=patterns))
        files = [(on_hub if record in kept else folder) / record for record in records]
        return files, (on_hub if stays or not pictures else folder) / shown
    except RevisionResolutionError:  # the hub is not reached; `datasets` may have it
        on_hub = PurePosixPath("datasets", name)
        return [on_hub], on_hub
    except GatedRepoError as error:
        remedy = f"ask for it at {constants.ENDPOINT}/datasets/{name}, then run `hf auth login`"
        raise ValueError(f"--data_path {data_path} is gated: {remedy}") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise ValueError(f"--data_path {data_path} is no folder here, and no data set that the hub gives") from error
    except FileNotFoundError as error:
        raise ValueError(f"--data_path {data_path}: {error}") from error
    except ValueError as error:
        reason = str(error).partition("\nExample of usage")[0]
        raise ValueError(f"--data_path {data_path}: {reason} (owner/name:config:split names them)") from error


def _choose(
    data_path: str, on_hub: PurePath, config: str, split: str, endings: Collection[str]
) -> tuple[list[str], str] | None:
    """The files of records of a data set, and where its pictures lie; None: `datasets` is to read it.

    What was chosen is kept for this commit, also for a time without the hub.
    """
    memo = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava"
    memo.mkdir(parents=True, exist_ok=True)
    memo /= sha256(f"{data_path} {on_hub}".encode()).hexdigest()[:24] + ".json"
    with FileLock(f"{memo}.lock"):
        if memo.exists():
            return json.loads(memo.read_text())
        if constants.HF_HUB_OFFLINE:
            return None

        # Its records: LLaVA's chat.json, or what `datasets` finds in its card or by the names of its files
        name, _, revision = str(on_hub.relative_to("datasets")).partition("@")
        names = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
        records = ["chat.json"]
        if "chat.json" not in names or config not in ("", "default") or split != "train":
            builder = datasets.load_dataset_builder(name, config or None, revision=revision)
            files = builder.config.data_files
            if split not in files:
                raise ValueError(f"it has no split {split}, but {', '.join(map(str, files))}")
            records = [file.removeprefix(f"hf://{on_hub}/") for file in files[split]]
            if isinstance(builder, ImageFolder):  # where pictures outnumber records it sees the pictures alone
                metadata = [record for record in records if PurePath(record).name in METADATA]
                texts = [name for name in names if PurePath(name).suffix.lower() in endings]
                texts = [text for text in texts if split in re.split("[^a-z]", text.lower())] or texts
                records = metadata * (len(metadata) == 1) if metadata else texts  # several are of a folder each
            records = [name for name in records if PurePath(name).suffix.lower() in endings]
            records = [name for name in records if not ABOUT.search(name)] or records

        # Its pictures, as a folder has them
        chosen = None
        if records:
            parent, beside = PurePath(records[0]).parent, BESIDE * records[0].lower().endswith(TEXTS)
            beside *= PurePath(records[0]).name not in METADATA
            places = [str(folder / name) for folder in (parent, PurePath()) for name in beside]
            found = [place for place in places if any(f"{name}/".startswith(f"{place}/") for name in names)]
            chosen = (records, found[0] if found else str(parent))
        with replacing(memo) as file:
            file.write_text(json.dumps(chosen))
        return chosen


def rows_on_hub(data_path: str, place: PurePath) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub as `datasets` reads them, with the bytes of their pictures.

    Raises:
        OSError, ValueError: the hub is not reached, or does not give it.
    """
    name, config, split = (*data_path.split(":"), "", "")[:3]
    revision = place.name.partition("@")[2] or None
    try:
        hub = datasets.load_dataset(name, config or None, split=split or "train", revision=revision, streaming=True)
    except ConnectionError as error:
        what = f"--data_path {data_path} is no folder here, and the hub cannot be reached to ask for it"
        raise ValueError(what) from error
    if hub.features is not None:
        hub = hub.decode(False)
    # in batches: iterated as it is, it would give a loading worker a share of its rows; as Arrow: of any features
    for table in hub.with_format("arrow").iter(batch_size=1):
        yield from map(_with_pictures, table.to_pylist())


def _with_pictures(value: Any) -> Any:
    """A row, or a part of one, in which pictures that are named by their place on the hub are there in bytes."""
    if isinstance(value, list):
        return [_with_pictures(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"bytes", "path"}:
        if value["bytes"] is None and "://" in (value["path"] or ""):
            with suppress(OSError), xopen(value["path"], "rb") as file:  # what is not there makes a bad record
                return value | {"bytes": file.read()}
        return value
    return {name: _with_pictures(part) for name, part in value.items()}
