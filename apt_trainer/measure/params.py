"""How many parameters a model has, and how many bytes its weight files take.

Counts the tensors that exist; not for budgets of prunable units, which follow from the sizes of those units.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.tensors.partitioned import numel_of


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module; a tensor shared by several modules counts once.

    Under DeepSpeed ZeRO-3 the whole parameter is counted, not the part that this process holds.
    """
    return sum(numel_of(p) for p in module.parameters())


def trainable_parameters(module: nn.Module) -> int:
    """Count as :func:`count_parameters`, only what requires a gradient."""
    return sum(numel_of(p) for p in module.parameters() if p.requires_grad)


def size_on_disk(path: str | Path) -> int:
    """Add up the bytes of all ``*.safetensors`` files directly inside a folder; 0 where it has none.

    Links are followed, sub-folders such as checkpoints are not.

    Raises:
        UserError: ``path`` is not a folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the folder of a saved model (*.safetensors).")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
