"""Removing units from a model: base weights, adapters, norms, embeddings, heads and whole sublayers.

Works on meta tensors too, which is how a dry run and a load use it. Not for choosing units, nor for optimizer
state: the returned edits say what its owner has to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apt_trainer.models import ModelFamily, Space, Sublayer
from apt_trainer.models.base import exists
from apt_trainer.models.modeling_apt import put_stub, set_size
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.slicing import EditLog, slice_module


def apply_plan(
    model: nn.Module,
    family: ModelFamily,
    spaces: Sequence[Space],
    current: PruningPlan,
    new: PruningPlan,
    log: EditLog | None = None,
) -> dict[str, torch.Tensor]:
    """Cut ``model`` in place from ``current`` to ``new``.

    ``spaces`` are those of the dense model. Returns the survivors per space that shrank, as positions in
    ``current``; edits of every parameter are appended to ``log``.
    """
    log = EditLog() if log is None else log
    log.expect_ties(model)
    survivors = current.survivors(new)
    gone = _remove_sublayers(model, family.sublayers(model), current, new)
    for space in spaces:
        if space.name not in survivors or new.counts[space.name] == 0:
            continue
        size = current.counts[space.name]
        for part in space.slices:
            if not any(part.module == path or part.module.startswith(path + ".") for path in gone):
                index, module = part.rows(survivors[space.name], size), model.get_submodule(part.module)
                if part.weight is None:
                    slice_module(module, part.side, index, part.module, log)
                else:
                    log.keep(module, part.module, *part.weight, index)
    for space in spaces:
        for path, attribute, value in space.sizes(new.kept[space.name]):
            if exists(model, path):  # else it went with the last unit of another space
                set_size(model.get_submodule(path), attribute, value)
    return survivors


def removed_sublayers(sublayers: Sequence[Sublayer], plan: PruningPlan) -> list[Sublayer]:
    """Sublayers whose last unit is gone."""
    return [sublayer for sublayer in sublayers if plan.counts[sublayer.space] == 0]


def _remove_sublayers(
    model: nn.Module, sublayers: Sequence[Sublayer], current: PruningPlan, new: PruningPlan
) -> list[str]:
    """Put stubs in the place of sublayers without units; returns the paths of all modules that are gone."""
    gone: list[str] = []
    for sublayer in removed_sublayers(sublayers, new):
        gone += sublayer.modules
        if current.counts[sublayer.space] == 0:
            continue
        for stub in sublayer.stubs:
            put_stub(model, stub.module, stub.kind)
    return gone
