"""Opens a data set: a local file or folder, or one of the Hub."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, first_line
from .files import READERS, Rows, read_file, text_lines

if TYPE_CHECKING:
    from datasets import Dataset

BUNDLED = "bundled text (Shakespeare, public domain)"
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# What is asked for when nobody said which split; a lone split of another name will then do.
_DEFAULTS = ("train", "validation")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_AUDIO = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")


def bundled_text() -> str:
    """The calibration text that comes with the package."""
    file = resources.files("hf_gradnas") / "data" / "shakespeare.txt"
    return file.read_text(encoding="utf-8")


def open_bundled() -> Rows:
    """The calibration text as rows: one per line that is not blank."""
    from datasets import Dataset

    text = bundled_text()
    return Rows(Dataset.from_dict({"text": text_lines(text)}), BUNDLED, text=text)


def open_dataset(
    name: str,
    *,
    split: str,
    seed: int,
    shuffle: bool = False,
    take: int | None = None,
    exact: bool = False,
) -> Rows:
    """Open `name`: a path if there is one, else a data set of the Hub.

    Args:
        name: File, folder, or Hub id with the config after a colon.
        split: Split to open, where the data set has several.
        seed: For `shuffle`.
        shuffle: Put the rows in a random order.
        take: Rows that are needed at most; a data set of the Hub is then streamed.
        exact: Whether a split was asked for, so that no other one will do.

    Raises:
        DataError: Nothing is there, it cannot be read, or it holds no example.
    """
    path = Path(name).expanduser()
    if path.is_file():
        rows = read_file(path)
    elif path.is_dir():
        rows = _read_folder(path, split, exact)
    elif _looks_like_path(name):
        raise DataError(f"{name}: there is no such file or folder; check the path.")
    else:
        rows = _read_hub(name, split, None if shuffle else take)
    if len(rows.dataset) == 0:
        raise DataError(f"{rows.origin}: holds no example; give one that is not empty.")
    if shuffle:
        rows = replace(rows, dataset=rows.dataset.shuffle(seed=seed))
    return rows


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in READERS


def _read_folder(folder: Path, split: str, exact: bool) -> Rows:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _read_saved(folder, split, exact)
    names = next((names for names in _SPLIT_NAMES.values() if split in names), (split,))
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in READERS and p.is_file())
    if all(path.stem == "metadata" for path in files):
        media = _media_kind(folder)
        if media is not None:
            return _read_media(folder, split, media, exact)
    matching = [p for p in files if any(p.stem.lower().startswith(name) for name in names)]
    found = matching if exact else matching or files
    if len(found) == 1:
        return read_file(found[0])
    what = ", ".join(p.name for p in matching or files) or "no data file, image or audio file"
    raise DataError(
        f"{folder}: found {what}, needed one file for split {split!r}; give the file itself or "
        "another --split."
    )


def _media_kind(folder: Path) -> str | None:
    """``image`` or ``audio`` when the folder holds such files at any depth."""
    for path in folder.rglob("*"):
        if path.suffix.lower() in _IMAGES:
            return "image"
        if path.suffix.lower() in _AUDIO:
            return "audio"
    return None


def _read_media(folder: Path, split: str, kind: str, exact: bool) -> Rows:
    """Images or audio through the folder builders of `datasets` (class folders, metadata files)."""
    from datasets import Audio, Features, Image, load_dataset
    from datasets.exceptions import DatasetsError

    from .._compat import sound_file_feature  # loads Accelerate

    # Names of files are data here: a folder called "test" is a split only beside others.
    load: Any = partial(load_dataset, f"{kind}folder", data_dir=str(folder))
    try:
        features = None
        if kind == "audio":
            columns = next(iter(load(streaming=True).values())).features
            features = Features({**columns, kind: sound_file_feature()})
        dataset = load(features=features)
    except (OSError, ValueError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) else None
        raise DataError(
            f"{folder}: cannot be read as a folder of {kind} files "
            f"({first_line(cause or error)}); put the "
            "files into one folder per class, or add a metadata.csv."
        ) from error
    rows = _pick_split(dataset, split, str(folder), exact)
    feature = Image() if kind == "image" else Audio(decode=False)
    return Rows(_with_names(rows.cast_column(kind, feature)), str(folder), folder=folder)


def _with_names(rows: Dataset) -> Dataset:
    """Names of the class folders in place of the numbers that their alphabetical order gives."""
    from datasets import ClassLabel

    feature = rows.features.get("label")
    if not isinstance(feature, ClassLabel):
        return rows
    names = [None if each is None else feature.names[each] for each in rows["label"]]
    return rows.remove_columns("label").add_column("label", names)


def _read_saved(folder: Path, split: str, exact: bool) -> Rows:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: cannot be read as a saved data set ({first_line(error)}); save it again "
            "with dataset.save_to_disk(folder)."
        ) from error
    rows = _pick_split(saved, split, str(folder), exact)
    return Rows(rows, str(folder), folder=folder)


def _read_hub(name: str, split: str, take: int | None) -> Rows:
    from datasets import Dataset, load_dataset

    path, _, config = name.partition(":")
    try:
        loaded: Any = load_dataset(path, config or None, split=split, streaming=take is not None)
        if take is not None:
            features = loaded.features
            loaded = Dataset.from_list(list(loaded.take(take)), features=features)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name}: is neither a local path nor a data set that could be opened, split "
            f"{split!r} ({first_line(error)}); check the name, its config after a colon "
            "(nyu-mll/glue:sst2) and --split."
        ) from error
    return Rows(loaded, name)


def _pick_split(loaded: Any, split: str, origin: str, exact: bool) -> Dataset:
    from datasets import DatasetDict

    if not isinstance(loaded, DatasetDict):
        if exact:
            raise DataError(f"{origin}: is one saved data set, without splits; omit {split!r}.")
        return loaded
    names = next((names for names in _SPLIT_NAMES.values() if split in names), (split,))
    only = tuple(loaded) if len(loaded) == 1 and split in _DEFAULTS and not exact else ()
    for name in (split, *names, *only):
        if name in loaded:
            return loaded[name]
    raise DataError(
        f"{origin}: has no split {split!r}, found {', '.join(loaded)}; choose one with --split."
    )
