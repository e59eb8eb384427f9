"""How many parameters a model has, and how many bytes its weight files take.

Counts the tensors that exist; not for budgets of prunable units, which follow from the sizes of those units.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from apt_trainer.errors import UserError
from apt_trainer.tensors.partitioned import numel_of

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module; a tensor shared by several modules counts once.

    Under DeepSpeed ZeRO-3 the whole parameter is counted, not the part that this process holds.
    """
    return sum(numel_of(p) for p in module.parameters())


def trainable_parameters(module: nn.Module) -> int:
    """Count as :func:`count_parameters`, only what requires a gradient."""
    return sum(numel_of(p) for p in module.parameters() if p.requires_grad)


def size_on_disk(path: str | Path) -> int:
    """Add up the bytes of the weight files directly inside a folder that transformers would read; 0 where it has none.

    Links are followed, sub-folders such as checkpoints are not.

    Raises:
        UserError: ``path`` is not a folder.
    """
    return sum(file.stat().st_size for file in _weight_files(path))


def dtype_on_disk(path: str | Path) -> str | None:
    """Type that most of the weights in a folder are stored in, as "bfloat16"; None without a ``*.safetensors`` file.

    Raises:
        UserError: ``path`` is not a folder.
    """
    entries: Counter[str] = Counter()
    for file in _weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 — no mapping
                part = tensors.get_slice(name)
                entries[part.get_dtype()] += math.prod(part.get_shape())
    return None if not entries else _NAMES.get(entries.most_common(1)[0][0], entries.most_common(1)[0][0])


def _weight_files(path: str | Path) -> list[Path]:
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder of a saved model (*.safetensors).")
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if whole.is_file():
        return [whole]
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names) if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))
