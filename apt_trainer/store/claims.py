"""Whether the files of a saved model are what they claim, before anything is allocated or built by them.

A config may say any size; weights say theirs at the beginning of their file, which is then as long as that takes. So a
model is built without memory first, and must not need more than its files hold. Not for whether every weight is there,
which is known once they are read (``saved_model``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from apt_trainer.errors import Retold, UserError, reason
from apt_trainer.models.modeling_apt import CODE_FILE, CODE_HASH, own_code, sha256
from apt_trainer.store.events import read_json_object
from apt_trainer.store.stock import DENSE_SIZES

MAX_LABELS = 2**20
PACKED = 8
"""Weights that one number of a file may stand for, where they are stored in fewer bits."""
OF_DENSE = 1000
"""Times that a dense model may be larger than what was cut from it."""
SMALL = 2**24
"""Numbers that a model may hold beyond its file, such as a pooler that it makes anew."""


def check_folder(path: Path, subfolder: str) -> None:
    """Raise :class:`UserError` for a folder without a model, with weights outside of it, or with files that were
    changed. A path that is none, of one or two parts, is a name on the hub."""
    is_path = path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in ((".",), ("..",), ("~",))
    if not path.exists() and not is_path:
        return
    folder = path / subfolder
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} holds no {CONFIG_NAME}. Give the folder that a run wrote its model to.")
    config, index = read_json_object(folder / CONFIG_NAME), folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        named = read_json_object(index).get("weight_map")
        if not isinstance(named, dict):
            raise UserError(f"{index} is damaged or incomplete: it has no weight_map.")
        outside = [str(name) for name in named.values() if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise UserError(f"{index} names {min(outside)}, which is outside of the folder.")
    code = folder / CODE_FILE
    if code.is_file() and CODE_FILE.removesuffix(".py") in str(config.get("auto_map")):
        text = code.read_bytes().decode(errors="replace")
        if text != own_code() and sha256(text) != config.get(CODE_HASH):  # else another version wrote it
            raise UserError(
                f"{code} is not the file that was saved with the model. It is never run here, but would be where "
                "apt_trainer is not installed: delete it, load the model and save it anew."
            )
    _check_numbers(folder, config)


def _check_numbers(folder: Path, config: dict[str, Any]) -> None:
    """Raise :class:`UserError` for a config that would make a list or a dictionary larger than its model."""
    structure = config.get("apt_structure")
    gone = structure.get("replaced") if isinstance(structure, dict) else None
    layers = sum(1 for _ in _shapes(folder)) + len(gone or ())  # each has a weight, or a no-op in its place
    check_counts(folder, config, layers)
    dense = config.get(DENSE_SIZES)
    check_counts(folder, dense if isinstance(dense, dict) else {}, OF_DENSE)


def check_counts(folder: Path, config: Mapping[str, Any], layers: int) -> None:
    """Raise :class:`UserError` for a ``config`` of more layers than there can be, or of very many labels."""
    for name, value in config.items():
        most = MAX_LABELS if name == "num_labels" else layers
        counts = name.endswith(("layers", "layer", "num_labels")) and not name.startswith("max")
        if counts and type(value) is int and value > most:
            raise UserError(f"{folder} is damaged: its config says {name}={value}, which its weights do not bear out.")


def check_sizes(folder: Path, cls: Any, config: Any, most: int = PACKED) -> None:
    """Raise :class:`UserError` where ``cls`` cannot be built from ``config``, which was read from ``folder``, or would
    need far more than ``most`` times the numbers that the files there hold. Of a name on the hub nothing is known."""
    if folder.is_dir():
        held = sum(math.prod(shape) for shape in _shapes(folder))
        check_needed(folder, numbers_of(folder, cls, config), most * held)


def check_needed(folder: Path, needed: int, held: int) -> None:
    """Raise :class:`UserError` for a model of far more numbers than there are."""
    if needed > held + SMALL:
        raise UserError(
            f"{folder} is damaged: its config describes a model of {needed:,} numbers, which its files do not hold."
        )


def numbers_of(folder: Path, cls: Any, config: Any) -> int:
    """How many numbers ``cls`` holds by ``config``, which ``folder`` says; raises :class:`UserError` where none is
    made of it. Takes no memory."""

    def retell(error: Exception) -> Exception:
        return UserError(f"{folder} is damaged: no {cls.__name__} is made from its config ({reason(error)}).")

    with Retold(retell), torch.device("meta"):
        model = cls(copy.deepcopy(config))
    return sum(value.numel() for value in (*model.parameters(), *model.buffers()))


def _shapes(folder: Path) -> Iterator[list[int]]:
    """Of every tensor in the weights of ``folder``, read from the beginning of the files."""
    for file in sorted(folder.glob(f"{SAFE_WEIGHTS_NAME.removesuffix('.safetensors')}*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or incomplete: {error}.") from error
