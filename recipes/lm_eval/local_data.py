"""Rows of the tasks beside this file: json lines in the folder that the environment variable APT_TASK_DATA names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset

from apt_trainer.errors import UserError


def rows(data_files: dict[str, str], **_: Any) -> DatasetDict:
    """Split → rows; ``data_files``: split → file, relative to that folder (not set: to the working directory)."""
    folder = Path(os.environ.get("APT_TASK_DATA", "."))
    files = {split: folder / name for split, name in data_files.items()}
    for split, file in files.items():
        if not file.is_file():
            raise UserError(
                f"The data of this task of lm_eval are not there: {file.absolute()}. Set the environment variable "
                f"APT_TASK_DATA to the folder that holds {data_files[split]}, or name another file in a YAML of your "
                f"own, as {Path(__file__).with_name('piqa_local.yaml')} shows."
            )
    return load_dataset("json", data_files={split: str(file) for split, file in files.items()})
