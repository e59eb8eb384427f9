"""Classification of images: one label each, from a folder for each label or a column of images.

Rows keep their images as they are stored. They become pixels when a batch is made, so that a data set is never held
decoded. Not for the labels (``labels``), nor for how images are scaled: that is the model's image processor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from transformers import BaseImageProcessor

from apt_trainer.errors import UserError
from apt_trainer.models.labels import SINGLE_LABEL
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    PART_NAMES,
    Splits,
    TaskData,
    check_column,
    keep_logits,
    only_column,
    parts_of,
)
from apt_trainer.tasks.classification import classification_metrics, is_label, numbered
from apt_trainer.tasks.labels import KnownLabels, class_weights

PIXELS = "pixel_values"
_NO_IMAGE = (UnidentifiedImageError, OSError, ValueError)
"""What Pillow raises for a file that holds none, or a damaged one."""

_ENDS, _TAIL = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}, 8
"""How whole files end; one that does not may be cut short, behind a head that tells nothing of it."""


@dataclass(frozen=True)
class ImageColumns:
    """Names of the columns in use."""

    image: str
    label: str

    @property
    def names(self) -> list[str]:
        return [self.image, self.label]


@dataclass(frozen=True)
class ImageCollator:
    """Rows with a Pillow image under ``pixel_values`` and a label → a batch: pixel_values [B, C, H, W], labels [B]."""

    processor: BaseImageProcessor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = pixels_of([row[PIXELS] for row in rows], self.processor)
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def open_image(cell: Mapping[str, Any], row: int) -> Pillow.Image:
    """The image of a cell, which holds ``bytes`` or a ``path``; raises :class:`UserError` where that is none."""
    try:
        with _opened(cell) as image:
            image.load()
            return image
    except _NO_IMAGE as error:
        raise UserError(f"{_name(cell, row)} cannot be read as an image. Leave it out, or save it anew.") from error


def _opened(cell: Mapping[str, Any]) -> Pillow.Image:
    return Pillow.open(cell["path"] if cell["bytes"] is None else BytesIO(cell["bytes"]))


def pixels_of(images: Sequence[Pillow.Image], processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """pixel_values [B, C, H, W] of Pillow images of any size and colours."""
    mode = "L" if len(getattr(processor, "image_mean", None) or "RGB") == 1 else "RGB"
    converted = [ImageOps.exif_transpose(image).convert(mode) for image in images]
    return dict(processor(images=converted, return_tensors="pt"))


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> ImageColumns:
    """Check the columns of every part; the column of images may be left open where there is but one."""
    label = data.label_column
    image = data.image_column or only_column(parts["train"], (label,), is_image, "images", "image_column")
    for part, rows in parts.items():
        check_column(rows, label, "label_column", part, is_label, "one label per row, all of one type")
        check_column(rows, image, "image_column", part, is_image, "images")
    return ImageColumns(image, label)


def is_image(feature: Any) -> bool:
    """Also of the bytes of image files, as Parquet files of other programs have them."""
    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def build(
    splits: Splits,
    columns: ImageColumns,
    data: DataSettings,
    processor: BaseImageProcessor,
    metric: str,
    known: KnownLabels | None = None,
) -> TaskData:
    """One label per image; ids as in ``labels``."""
    stored = {part: _stored(rows, columns.image) for part, rows in splits.parts.items()}
    looks = {part: list(_looks(rows, columns.image, part)) for part, rows in stored.items()}
    labels, ids = numbered(splits, columns.label, known)
    counts = labels.counts(ids["train"])
    rows = {
        part: of_part.select_columns([columns.image])
        .rename_column(columns.image, PIXELS)
        .cast_column(PIXELS, Image())
        .add_column("labels", ids[part])
        for part, of_part in stored.items()
    }
    digest = hashlib.sha256(json.dumps([looks["train"], ids["train"]]).encode())
    task = TaskData(
        **parts_of(rows),
        collator=ImageCollator(processor),
        model_class="AutoModelForImageClassification",
        model_kwargs={**labels.model_kwargs, "problem_type": SINGLE_LABEL},
        metric_name=metric,
        metrics=dict.fromkeys(("validation", "test"), classification_metrics),
        label_names=labels.names,
        fingerprint=digest.hexdigest()[:16],
        preprocess_logits=keep_logits,
        label_counts=counts,
    )
    return replace(task, class_weights=class_weights(data, counts, len(ids["train"]), multi=False))


def _stored(rows: Dataset, column: str) -> Dataset:
    """``rows`` with images as the bytes or paths that they are stored as."""
    return rows.cast_column(column, Image(decode=False))


def _looks(rows: Dataset, column: str, part: str) -> Iterator[tuple[Any, ...]]:
    """Format, size and colours of each image, which the beginning of its file says; raises :class:`UserError` for the
    first that is none."""
    for row, cell in enumerate(rows[column]):
        name = _name(cell, row)
        try:
            with _opened(cell) as image:
                if not _ends(cell, _ENDS.get(image.format or "", b"")):
                    image.load()  # raises what training would fail at, were the file cut short
                yield image.format, image.size, image.mode
        except _NO_IMAGE as error:
            raise UserError(
                f"image_column={column!r} of the {PART_NAMES[part]} data: {name} cannot be read as an image. Remove "
                "it, or save it anew."
            ) from error


def _ends(cell: Mapping[str, Any], mark: bytes) -> bool:
    """Whether the file of a cell ends with ``mark``, give or take a few bytes."""
    if cell["bytes"] is not None:
        return mark in cell["bytes"][-_TAIL:]
    with Path(cell["path"]).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        return mark in file.read()


def _name(cell: Mapping[str, Any], row: int) -> str:
    return f"row {row} of those used (counted from 0)" + (f", {cell['path']}," if cell["path"] else "")
