"""Opens data sets of the hub: chooses their files, and fetches them into the hub's cache or streams them.

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
from datasets.table import embed_table_storage
from filelock import FileLock
from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionResolutionError

from train_llava.common.files import replacing

IMAGE_PLACES = ("images_dl", "images", "images.zip")  # beside a file of records
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of the hub's `imagefolder`
NAMES_IMAGES = (".json", ".jsonl", ".csv", ".tsv", "metadata.parquet")  # their records only name images
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[^:/]*){0,2}")
NOT_RECORDS = re.compile(r"(^|[^a-z])(metadata|meta|dataset_infos?|config)\.jsonl?$")
BLOCKS = {"block_size": 8 << 20, "cache_type": "mmap"}  # blocks that were read stay in a temporary file


def opened(path: PurePath, mode: str = "rb", **options: Any) -> IO[Any]:
    """Opens a file of this disk or of the hub for reading."""
    if isinstance(path, Path):
        return open(path, mode, **options)
    try:
        return HfFileSystem().open(str(path), mode, **BLOCKS, **options)
    except FileNotFoundError:  # its text is only the path
        raise FileNotFoundError(f"{path} does not exist") from None


def is_file(path: PurePath) -> bool:
    """Whether a file exists, on this disk or on the hub."""
    return path.is_file() if isinstance(path, Path) else HfFileSystem().isfile(str(path))


def _split_id(data_path: str) -> tuple[str, str, str]:
    """Name, configuration and split: `owner/name::test` → `("owner/name", "", "test")`."""
    name, config, split = (*data_path.split(":"), "", "")[:3]
    return name, config, split or "train"


def find_on_hub(
    data_path: str, extensions: Collection[str], with_images: bool, streaming: bool
) -> tuple[list[PurePath], PurePath]:
    """The files of records of a data set on the hub, and the folder or archive of its images.

    Files with one of the `extensions` are fetched, with `with_images` their images too. `streaming` leaves on the
    hub what can be read piece by piece. If no file has such an extension, the path of the data set itself is
    returned, which `rows_on_hub` reads. An OSError or ValueError says why the hub does not give it.
    """
    name, *_ = _split_id(data_path)
    try:
        revision = HfApi().resolve_revision(name, repo_type="dataset").resolved
        on_hub = PurePosixPath("datasets", f"{name}@{revision}")
        choice = _choose_files(data_path, on_hub, extensions)
        if choice is None:
            return [on_hub], on_hub
        records, images = choice

        # What stays on the hub: images of an archive are fetched, those that a table names are read one by one
        remote = streaming and not constants.HF_HUB_OFFLINE
        streamed = [record for record in records if remote and not record.lower().endswith(".json")]
        one_by_one = remote or not records[0].lower().endswith(NAMES_IMAGES)
        images_stay = one_by_one and not images.endswith(".zip")

        # Fetch the rest
        patterns = [glob.escape(record) for record in records if record not in streamed]
        if with_images and not images_stay:
            patterns += ["*"] if images == "." else [glob.escape(images), f"{glob.escape(images)}/*"]
        folder = on_hub
        if patterns:
            options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns}
            folder = Path(snapshot_download(name, **options))
        files = [(on_hub if record in streamed else folder) / record for record in records]
        return files, (on_hub if images_stay or not with_images else folder) / images
    except RevisionResolutionError:  # the hub cannot be reached, but `datasets` may have a copy
        on_hub = PurePosixPath("datasets", name)
        return [on_hub], on_hub
    except GatedRepoError as error:
        remedy = f"ask for it at {constants.ENDPOINT}/datasets/{name}, then run `hf auth login`"
        raise ValueError(f"--data_path {data_path} is gated: {remedy}") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):
            raise
        raise ValueError(f"--data_path {data_path} is no folder here, and no data set that the hub gives") from error
    except (FileNotFoundError, ValueError) as error:
        reason = str(error).partition("\nExample of usage")[0]
        raise ValueError(f"--data_path {data_path}: {reason} (owner/name:config:split names them)") from error


def _choose_files(data_path: str, on_hub: PurePath, extensions: Collection[str]) -> tuple[list[str], str] | None:
    """A data set's files of records and its images' place, stored for use offline; None: `datasets` has to read it."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "train_llava"
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / (sha256(f"{data_path} {on_hub}".encode()).hexdigest()[:24] + ".json")
    with FileLock(f"{stored}.lock"):
        if stored.exists():
            return json.loads(stored.read_text())
        if constants.HF_HUB_OFFLINE:
            return None
        name, _, revision = str(on_hub.relative_to("datasets")).partition("@")
        names = HfApi().list_repo_files(name, repo_type="dataset", revision=revision)
        choice = None
        if records := _choose_records(data_path, on_hub, names, extensions):
            # Images lie where they lie in a folder on this disk, or at the top of the repository
            parent, places = PurePath(records[0]).parent, []
            if records[0].lower().endswith(NAMES_IMAGES) and PurePath(records[0]).name not in METADATA:
                places = [str(parent / place) for place in IMAGE_PLACES] + list(IMAGE_PLACES)

            def exists(place: str) -> bool:
                return any(f"{name}/".startswith(f"{place}/") for name in names)

            choice = records, next(filter(exists, places), str(parent))
        with replacing(stored) as file:
            file.write_text(json.dumps(choice))
        return choice


def _choose_records(data_path: str, on_hub: PurePath, names: list[str], extensions: Collection[str]) -> list[str]:
    """The files of records among the `names` of a repository: chat.json, else those that `datasets` finds."""
    name, config, split = _split_id(data_path)
    if "chat.json" in names and config in ("", "default") and split == "train":
        return ["chat.json"]
    builder = datasets.load_dataset_builder(name, config or None, revision=on_hub.name.partition("@")[2])
    splits = builder.config.data_files
    if split not in splits:
        raise ValueError(f"it has no split {split}, but {', '.join(map(str, splits))}")
    records = [file.removeprefix(f"hf://{on_hub}/") for file in splits[split]]
    if isinstance(builder, ImageFolder):
        # Where images outnumber records, `datasets` sees only the images. Take the metadata if it is one file,
        # and else the files of records, by their split where names tell it
        metadata = [record for record in records if PurePath(record).name in METADATA]
        texts = [name for name in names if PurePath(name).suffix.lower() in extensions]
        of_split = [text for text in texts if split in re.split("[^a-z]", text.lower())]
        records = of_split or texts
        if metadata:
            records = metadata if len(metadata) == 1 else []
    records = [record for record in records if PurePath(record).suffix.lower() in extensions]
    return [record for record in records if not NOT_RECORDS.search(record)] or records


def rows_on_hub(data_path: str, on_hub: PurePath) -> Iterator[dict[str, Any]]:
    """The rows of a data set on the hub as `datasets` reads them, with their images as bytes."""
    name, config, split = _split_id(data_path)
    revision = on_hub.name.partition("@")[2] or None
    try:
        rows = datasets.load_dataset(name, config or None, split=split, revision=revision, streaming=True)
    except ConnectionError as error:
        raise ValueError(f"--data_path {data_path} is no folder here, and the hub cannot be reached") from error
    if rows.features is not None:
        rows = rows.decode(False)
    # In batches, because `datasets` gives a data-loading worker only a share of single rows. As Arrow, because
    # it takes any features
    for table in rows.with_format("arrow").iter(batch_size=1):
        with suppress(OSError):  # a missing file makes a bad record
            table = embed_table_storage(table, local_files=False)  # bytes of images that are named by their address
        yield from table.to_pylist()
