"""Finds the records at a data path, in the forms that `docs/data.md` lists, and the place of their pictures.

Without `image_dir`, images are looked for in `images_dl/`, `images/` or `images.zip` beside the records, then in the
records' own folder. `FOLDER::test` names a split; without a name it is `train`.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from datasets.data_files import SPLIT_KEYWORDS

from train_llava.dataset import readers
from train_llava.dataset.annotations import LABELS_QUESTION, Annotations, companion, load_json, read_json
from train_llava.dataset.archives import is_archive, is_hidden, is_image
from train_llava.dataset.hub import HUB_ID, IMAGE_PLACES, METADATA, find_on_hub, rows_on_hub

READERS = {".json": read_json, ".jsonl": readers.read_jsonl, ".csv": readers.read_table, ".tsv": readers.read_table}
READERS |= {".parquet": readers.read_rows, ".arrow": readers.read_rows, ".tar": readers.read_tar}
PAIRS, CLASSES = "pictures with texts of the same name", "a folder for each class"
BY_CLASS = "folder:"  # begins a data path whose folders' names are the answers
ANCHORED = re.compile(r"[/\\]|[A-Za-z][\w+.-]*:")  # absolute names, addresses and data URIs
SPLITS = {word: str(split) for split, words in SPLIT_KEYWORDS.items() for word in words}
# The name of a file or folder of a split, as the hub reads it: train-00000-of-00001.parquet, test
SPLIT = re.compile(r"(?!data-)(.+)-\d{5}-of-\d{5}|([a-z]+)", re.IGNORECASE).match


def local_path(data_path: str) -> tuple[Path, str]:
    """The place on this disk that a data path names, whether or not it exists, and the split: `data::test`."""
    place, _, split = data_path.removeprefix(BY_CLASS).partition("::")
    return Path(place), SPLITS.get(split, split)


def form_of(data_path: str, file: PurePath) -> str:
    """The form of the records at a data path, for people to read, by one of their files."""
    suffix = file.suffix.lower()
    if suffix == ".json" and isinstance(content := load_json(file), Annotations):
        return "COCO" if content.images else "VQA"
    if isinstance(file, Path) and suffix not in READERS:
        return CLASSES if data_path.startswith(BY_CLASS) else PAIRS
    return f"imagefolder ({file.name})" if file.name in METADATA else suffix


def raw_records(data_path: str, files: list[PurePath]) -> Iterator[Any]:
    """The records of files, or of a data set on the hub (see `find_on_hub`); a good record is a dict."""
    folder, _ = local_path(data_path)
    for file in files:
        try:
            other = partial(_read_picture if isinstance(file, Path) else rows_on_hub, data_path)
            for record in READERS.get(file.suffix.lower(), other)(file):
                # Metadata in a folder below names pictures from there
                if file.name in METADATA and folder in file.parent.parents and isinstance(record, dict):
                    below = file.parent.relative_to(folder).as_posix()
                    record["images"] = [
                        f"{below}/{image}" if isinstance(image, str) and not ANCHORED.match(image) else image
                        for image in readers.images_of(record)
                    ]
                yield record
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not in UTF-8: save it anew with this encoding") from error
        except readers.ERRORS as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _read_picture(data_path: str, file: Path) -> Iterator[readers.Record | readers.BadRecordError]:
    """The record of a picture, with its folder's name as the answer or the text beside it as the caption."""
    name, text = file.relative_to(local_path(data_path)[0]).as_posix(), companion(file)
    if data_path.startswith(BY_CLASS):
        yield {"id": name, "image": name, "question": LABELS_QUESTION, "answer": PurePath(name).parent.name}
    elif text is None:
        yield readers.BadRecordError(name, "no text of its name is beside it")
    else:  # bytes outside UTF-8 make a bad record of it
        yield {"id": name, "image": name, "caption": text.read_text("utf-8-sig", "surrogateescape").rstrip("\r\n")}


def find_records(
    data_path: str, image_dir: str | None = None, streaming: bool = False
) -> tuple[list[PurePath], PurePath | None]:
    """The files of records at `data_path`, and the folder or archive of their images; see also `find_on_hub`.

    Raises:
        OSError, ValueError: one of them does not exist, or may be read in several ways; the message names it.
    """
    images = Path(image_dir) if image_dir else None
    if images is not None and not (images.is_dir() or (images.is_file() and is_archive(images))):
        raise FileNotFoundError(f"--image_dir {image_dir} does not exist as a folder or a .zip file")
    path, split = local_path(data_path)
    if not path.exists():  # it may be a data set on the hub
        if HUB_ID.fullmatch(data_path) and path.suffix.lower() not in READERS:
            files, images_on_hub = find_on_hub(data_path, READERS, images is None, streaming)
            return files, images or images_on_hub
        raise FileNotFoundError(f"--data_path {data_path} does not exist")
    by_class = data_path.startswith(BY_CLASS)
    if path.is_file() and (path.suffix.lower() not in READERS or by_class or split):
        raise FileNotFoundError(f"--data_path {data_path} is no folder, and none of {', '.join(READERS)}")
    folder, files = (path.parent, [path]) if path.is_file() else (path, _files_of_folder(path, split, by_class))

    # Images are beside the records; metadata and pictures are named from the data path
    places = [place / name for place in (files[0].parent, folder) for name in IMAGE_PLACES] + [files[0].parent]
    places = [folder] if files[0].name in METADATA or files[0].suffix.lower() not in READERS else places
    return files, images or next(filter(Path.exists, places))


def _files_of_folder(folder: Path, split: str, by_class: bool) -> list[Path]:
    """The files of records in a folder: `chat.json`, else all of one form in it and below it, and of one split."""
    if (folder / "chat.json").exists() and split in ("", "train") and not by_class:
        return [folder / "chat.json"]
    # All files but hidden ones. A folder to which several links lead counts once
    files, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        is_new = os.path.realpath(place) not in seen
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if is_new and not is_hidden(name)]
        files += [Path(place, name) for name in names if is_new and not is_hidden(name)]
    texts = {file.with_suffix("") for file in files if file.suffix.lower() == ".txt"}
    paired = any(is_image(file.name) and file.with_suffix("") in texts for file in files)

    # Those of each split and form. Names of pictures and classes are no splits
    found = defaultdict(list)
    for file in sorted(files):
        suffix, places = file.suffix.lower(), file.relative_to(folder).parts
        if is_image(file.name) and (by_class or paired):
            form, places = (CLASSES if by_class else PAIRS, None), places[: -2 if by_class else -1]
        elif suffix in READERS and suffix != ".json" and not by_class:
            form = (file.name, None) if file.name in METADATA else (suffix, file.parent)
        else:
            continue
        splits = [SPLITS.get(match[1] or match[2].lower(), match[1]) for match in map(SPLIT, places) if match]
        found[next(filter(None, splits), "train"), form].append(file)

    # One form of one split, so that a test split is not trained on by mistake
    chosen = [files for (name, _), files in found.items() if name == (split or "train")]
    chosen = chosen if chosen or split else list(found.values())
    if len(chosen) != 1:
        names = [f"{form} for {name} ({files[0].relative_to(folder)})" for (name, (form, _)), files in found.items()]
        names = " and ".join(names) or "no chat.json, and no other form of docs/data.md"
        remedy = f"name the files that are meant, a split (PATH::test), or {BY_CLASS}PATH if its folders are classes"
        raise ValueError(f"--data_path {folder} holds {names}: {remedy}")
    return chosen[0]
