"""Which table of module names comes nearest to a model that has none, and what sets the two apart.

Compares names of modules with weights inside the first layer of each stack; it builds the model without weights. Not
for whether a table fits: that takes what ``tests/invariants.py`` checks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt_trainer.models.base import exists
from apt_trainer.models.family import ModelFamily, StackTable, SublayerTable


@dataclass(frozen=True)
class Difference:
    """What sets a model apart from ``family``. Names are relative to a layer, except ``elsewhere``: a list of layers
    that the table names and that lies at another path (or nowhere)."""

    family: ModelFamily
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    elsewhere: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.missing) + len(self.extra) + len(self.elsewhere)

    def __str__(self) -> str:
        parts = []
        if self.elsewhere:
            parts.append(f"its layers are not at {_listed(self.elsewhere)}")
        if self.missing:
            parts.append(f"they have no {_listed(self.missing)}")
        if self.extra:
            parts.append(f"they also have {_listed(self.extra)}")
        return "; ".join(parts) or "all names in its layers are the same"


def nearest(config: Any, families: Iterable[ModelFamily]) -> list[Difference]:
    """Differences from each of ``families``, the nearest first; none where no model can be made of ``config``."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):  # no such class, or a damaged config
        return []
    return sorted((difference(model, family) for family in families), key=lambda found: found.size)


def difference(model: nn.Module, family: ModelFamily) -> Difference:
    """Of ``model``, on any device, from ``family``."""
    missing: list[str] = []
    extra: list[str] = []
    elsewhere: list[str] = []
    for stack in family.stacks:
        path = family.prefix(model) + stack.layers
        if not exists(model, path):
            elsewhere.append(stack.layers)
        layer = _first(model, path)
        found = {name for name, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))}
        expected = _names(stack)
        absent = sorted(name for name in expected - found if not _has_other(name, stack, found))
        missing += [name for name in absent if name not in missing]
        extra += [name for name in sorted(found - expected) if name not in extra]
    return Difference(family, tuple(missing), tuple(extra), tuple(elsewhere))


def _names(stack: StackTable) -> set[str]:
    """Modules with weights that a layer of ``stack`` may have by its table."""
    return {
        name
        for table in stack.sublayers
        for name in (*table.reads, *_written_by(table), *table.norms, *table.inner, *table.columns)
    }


def _written_by(table: SublayerTable) -> tuple[str, ...]:
    return (table.writes,) if table.experts is None else (table.experts.module, table.experts.router)


def _has_other(name: str, stack: StackTable, found: set[str]) -> bool:
    """Whether ``name`` is one of several that a sublayer reads through, some of which are there."""
    return any(name in table.reads and not found.isdisjoint(table.reads) for table in stack.sublayers)


def _first(model: nn.Module, path: str) -> nn.Module:
    """First layer of the list at ``path``; where there is none, of the longest list of ``model``."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if exists(model, path):
        lists = [model.get_submodule(path)]  # type: ignore[list-item]
    return max(lists, key=len)[0] if lists else model


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:6])
    return shown if len(names) <= 6 else f"{shown} and {len(names) - 6} more"
