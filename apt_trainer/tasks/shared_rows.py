"""Tokenised rows that a run hands to one that it starts on the same data, which would make the same ones again.

Not a cache: who hands rows over sees to it that the model and the settings of the data are the same, and both have the
same version of everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, load_from_disk

FOLDER = "APT_TRAINER_ROWS"
"""Environment variable that names the folder with rows to the process that is started."""
_kept: dict[str, Dataset] | None = None


@contextmanager
def keeping_rows() -> Iterator[dict[str, Dataset]]:
    """What is tokenised within the block, by key, for :func:`hand_over`."""
    global _kept
    kept: dict[str, Dataset] = {}
    _kept = kept
    try:
        yield kept
    finally:
        _kept = None


def hand_over(kept: Mapping[str, Dataset], folder: Path) -> dict[str, str]:
    """Write rows to ``folder``; returns what the environment of the process that reads them needs."""
    for key, rows in kept.items():
        rows.save_to_disk(str(folder / key))
    return {FOLDER: str(folder)} if kept else {}


def is_sharing() -> bool:
    """Whether rows are kept, or were handed over to this process."""
    return _kept is not None or FOLDER in os.environ


def shared(key: str, make: Callable[[], Dataset]) -> Dataset:
    """What was handed to this process as ``key``, else what ``make`` gives."""
    file = Path(os.environ.get(FOLDER, "")) / key
    if FOLDER in os.environ and file.is_dir():
        return load_from_disk(str(file), keep_in_memory=True)
    rows = make()
    if _kept is not None:
        _kept[key] = rows
    return rows
