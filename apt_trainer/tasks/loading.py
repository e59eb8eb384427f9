"""Reads raw rows from the hub, from files or from folders, and cuts them into parts. Not for tokenising.

Nothing here is shuffled unless rows are held out or left out; both follow the seeds alone.
"""

from __future__ import annotations

import csv
import glob
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetBuilder, DatasetDict, Image, load_dataset
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.packaged_modules.json.json import Json
from datasets.packaged_modules.parquet.parquet import Parquet
from sklearn.model_selection import train_test_split

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.settings import DataSettings, resolve_path
from apt_trainer.tasks.base import PART_NAMES, Splits

logger = logging.getLogger(__name__)

# The builders are used directly: load_dataset counts every use of them over the network, which may take seconds.
# Without keep_default_na=False an empty text, or the word "null", would be read as a missing cell.
# Tab-separated files have no quoting: a lone quotation mark must not swallow the rows that follow it.
FILE_FORMATS: dict[str, tuple[type[DatasetBuilder], dict[str, Any]]] = {
    ".json": (Json, {}),
    ".jsonl": (Json, {}),
    ".csv": (Csv, {"keep_default_na": False}),
    ".tsv": (Csv, {"keep_default_na": False, "delimiter": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": (Parquet, {}),
}
READ_ERRORS = (DatasetsError, ValueError, OSError)
PLAIN_TEXT = ".txt"
PIECE_CHARACTERS = 10_000


def read_parts(data: DataSettings, known: Mapping[str, Dataset] | None = None) -> dict[str, Dataset]:
    """All rows of "train" and, where given, "validation" and "test". A file takes the place of a split of the hub, and
    rows that are ``known`` that of both."""
    known = known or {}
    if data.train_file is None and data.dataset_name is None and "train" not in known:
        raise UserError(
            "No training data was given. Set dataset_name to a data set on the hub, or train_file to a json, jsonl, "
            "csv, tsv or parquet file, to a folder whose sub-folders are the labels, or to a txt file for "
            "language_modeling."
        )
    if data.train_file is not None and data.dataset_name is not None:
        raise UserError(
            f"Both dataset_name={data.dataset_name!r} and train_file={data.train_file!r} were given. Give one of them."
        )
    parts = {} if data.dataset_name is None else _read_hub(data)
    for part in PART_NAMES:
        path = getattr(data, f"{part}_file")
        if path is not None and part not in known:
            parts[part] = read_file(path, f"{part}_file", data.task)
    parts |= known
    for part, rows in parts.items():
        if len(rows) == 0:
            raise UserError(f"The {PART_NAMES[part]} data is empty. Give data with at least one row.")
    return parts


def read_file(path: str, setting: str, task: str) -> Dataset:
    """Rows of one local file, or of a folder of labelled texts or images; ``setting`` is for error messages."""
    found = Path(resolve_path(path)).expanduser()
    if found.is_dir():
        if task not in ("classification", "image_classification"):
            raise UserError(
                f"{setting}={path!r} is a folder of labelled texts or images, which fits task: classification and "
                "image_classification only."
            )
        return read_images(found, setting) if task == "image_classification" else read_folder(found, setting)
    if not found.is_file():
        raise UserError(f"{setting}={path!r} does not exist. Looked for {found.absolute()}.")
    if found.suffix.lower() == PLAIN_TEXT and task in ("language_modeling", "masked_language_modeling"):
        return read_text(found, setting)
    if found.suffix.lower() not in FILE_FORMATS:
        raise UserError(
            f"{setting}={path!r}: the format {found.suffix!r} is not known. Use one of: {', '.join(FILE_FORMATS)}; "
            "or a folder whose sub-folders are the labels."
        )
    format_builder, options = FILE_FORMATS[found.suffix.lower()]
    if found.stat().st_size == 0:
        raise UserError(f"{setting}={path!r} has no rows. Give data with at least one row.")
    try:
        builder = format_builder(data_files=glob.escape(str(found)), **options)
        builder.download_and_prepare()
    except READ_ERRORS as error:
        reason = _reason(error)
        encoded = "codec can't decode" in reason
        advice = "Save it in UTF-8 (a spreadsheet calls that CSV UTF-8)." if encoded else "Check the file."
        raise UserError(f"{setting}={path!r} cannot be read as {found.suffix}: {reason} {advice}") from error
    if builder.info.splits["train"].num_examples == 0:
        raise UserError(f"{setting}={path!r} has no rows. Give data with at least one row.")
    rows = builder.as_dataset(split="train")
    _check_delimiter(found, rows.column_names, setting)
    return rows


def _check_delimiter(file: Path, columns: list[str], setting: str) -> None:
    """Raise :class:`UserError` for a csv file of one column whose name holds what parts columns elsewhere."""
    other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
    if file.suffix.lower() == ".csv" and other is not None:
        raise UserError(
            f"{setting}={str(file)!r} has one column, {columns[0]!r}: columns seem to be parted by {other!r}. Part "
            "them by commas, or by tabs in a .tsv file."
        )


def read_folder(folder: Path, setting: str) -> Dataset:
    """Columns ``text`` and ``label`` from ``folder/LABEL/*.txt``, sorted by label, then by file name."""
    texts, labels = [], []
    for label in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(label.glob("*.txt")):
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
            labels.append(label.name)
    if not texts:
        raise UserError(
            f"{setting}: the folder {folder} has no sub-folders with *.txt files. "
            "Each sub-folder is a label and holds the texts with that label."
        )
    return Dataset.from_dict({"text": texts, "label": labels})


def read_images(folder: Path, setting: str) -> Dataset:
    """Columns ``image`` and ``label`` from the image files in ``folder/LABEL``, sorted by label, then by file name."""
    files = [file for label in sorted(folder.iterdir()) if label.is_dir() for file in sorted(label.iterdir())]
    files = [file for file in files if is_image_file(file)]
    if not files:
        raise UserError(
            f"{setting}: the folder {folder} has no sub-folders with image files (.png, .jpg, .webp and others). "
            "Each sub-folder is a label and holds the images with that label."
        )
    columns = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
    return Dataset.from_dict(columns).cast_column("image", Image())


def is_image_file(file: Path) -> bool:
    """By its name."""
    return file.suffix.lower() in ImageFolder.EXTENSIONS


def read_text(path: Path, setting: str) -> Dataset:
    """Column ``text`` with a running text in pieces of whole lines, at least PIECE_CHARACTERS long but for the last.

    The pieces in their order are the text. They are rows so that a part of the text can be held out.
    """
    text = text_of(path, setting)
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE_CHARACTERS:
            pieces.append(piece)
            piece = ""
    if piece:
        pieces.append(piece)
    if not text.strip():
        raise UserError(f"{setting}={str(path)!r} holds no text. Give a file with text.")
    return Dataset.from_dict({"text": pieces})


def text_of(path: Path, setting: str) -> str:
    """What is in a text file; raises :class:`UserError` where it has another encoding."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{setting}={str(path)!r} is not text in UTF-8: {error}. Convert the file.") from error


def _read_hub(data: DataSettings) -> dict[str, Dataset]:
    """The wanted splits; a missing validation split is an error only where the user named it."""
    assert data.dataset_name is not None
    try:
        loaded = load_dataset(resolve_path(data.dataset_name), data.dataset_config)
    except READ_ERRORS as error:
        raise UserError(
            f"dataset_name={data.dataset_name!r} with dataset_config={data.dataset_config!r} cannot be loaded: "
            f"{_reason(error)} Check both and the connection, or give local files with train_file."
        ) from error
    assert isinstance(loaded, DatasetDict)
    parts = {}
    for part in PART_NAMES:
        split = getattr(data, f"{part}_split")
        if split in loaded:
            parts[part] = loaded[split]
        elif split is None or getattr(data, f"{part}_file") is not None:
            continue
        elif part == "validation" and split == DataSettings.validation_split:
            logger.warning(
                "%s has no split %r (it has: %s); a part of the training data is held out instead.",
                data.dataset_name,
                split,
                ", ".join(loaded),
            )
        else:
            raise unknown_choice(f"{part}_split", split, list(loaded))
    return parts


def _reason(error: BaseException) -> str:
    """The innermost message: the outer ones of ``datasets`` only say that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."


def split_parts(
    parts: dict[str, Dataset], data: DataSettings, seed: int, split_seed: int, stratify_by: str | None
) -> Splits:
    """Hold out what was not given, then leave out what is too much.

    ``split_seed`` decides which rows are held out, ``seed`` which training rows max_train_samples keeps.
    ``stratify_by`` names the column whose values keep their shares in the held-out rows, where that is possible.
    """
    all_train = train = parts["train"]
    held_out = {}
    for part, share in (("test", data.test_fraction), ("validation", data.validation_fraction)):
        rows = parts.get(part)
        if rows is None and share > 0:
            train, rows = _hold_out(train, round(share * len(all_train)), split_seed, stratify_by, part)
        held_out[part] = rows
    if held_out["validation"] is None:
        raise UserError(
            "There is no validation data: none was given and validation_fraction is 0. "
            "Set validation_file or validation_split, or a validation_fraction such as 0.1."
        )
    if data.max_train_samples is not None and data.max_train_samples < len(train):
        kept = np.random.default_rng(seed).permutation(len(train))[: data.max_train_samples]
        train = train.select(kept, keep_in_memory=True)
    return Splits(
        train=train,
        validation=_first_rows(held_out["validation"], data.max_validation_samples),
        test=None if held_out["test"] is None else _first_rows(held_out["test"], data.max_test_samples),
        all_train=all_train,
    )


def _first_rows(rows: Dataset, limit: int | None) -> Dataset:
    return rows if limit is None or limit >= len(rows) else rows.select(range(limit))


def _hold_out(
    rows: Dataset, count: int, split_seed: int, stratify_by: str | None, part: str
) -> tuple[Dataset, Dataset]:
    """Split ``rows`` at random into the rest and ``count`` (at least one) held-out rows."""
    count = max(1, count)
    if count >= len(rows):
        raise UserError(
            f"The training data has {len(rows)} rows left, too few to hold out {count} of them as {part} data. "
            f"Give more data, set {part}_file, or lower validation_fraction and test_fraction."
        )
    classes = None
    if stratify_by is not None:
        _, classes, counts = np.unique(np.asarray(rows[stratify_by][:]), return_inverse=True, return_counts=True)
        if counts.min() < 2 or min(count, len(rows) - count) < len(counts):
            classes = None  # a class too small to be in both parts
    rest, held_out = train_test_split(np.arange(len(rows)), test_size=count, random_state=split_seed, stratify=classes)
    return rows.select(rest, keep_in_memory=True), rows.select(held_out, keep_in_memory=True)
