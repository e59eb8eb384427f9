"""Sublayers and heads switched off for a while: the model computes what it will without them, and nothing moves.

While a gate is closed the modules of a sublayer do not run; their no-ops (``models.modeling_apt``) do. Single heads
run, and a mask takes what they give (``surgery.masks``), which equals the smaller model up to the order of a sum. Not
for fading, nor for training: the weights behind a closed gate are not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apt_trainer.models.modeling_apt import STUBS
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.surgery.masks import MaskStore


@contextmanager
def switched_off(model: nn.Module, units: Units, off: Iterable[Unit]) -> Iterator[None]:
    """Run ``model`` without the units ``off``; afterwards it is as before.

    May be nested, but not for heads of one attention.
    """
    parts = units.parts(off)
    masks = _masks(model, units, [part for part in parts if part.head is not None])
    before: list[tuple[nn.Module, Any]] = []
    try:
        for sublayer in (one for part in parts if part.head is None for one in units.members[part]):
            for stub in sublayer.stubs:
                module = model.get_submodule(stub.module)
                before.append((module, vars(module).get("forward")))  # accelerate puts one there too
                module.forward = STUBS[stub.kind](module).forward  # type: ignore[method-assign]
        yield
    finally:
        masks.close()
        for module, forward in reversed(before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _masks(model: nn.Module, units: Units, heads: Sequence[Unit]) -> MaskStore:
    """Masks that are zero for ``heads`` and one for the others of their attentions; to be closed."""
    spaces = {space.name: space for space in map(units.space, heads)}
    gone = units.lost(heads)
    masks = MaskStore(model, list(spaces.values()), ())
    masks.open({name: len(units.plan.kept[name]) for name in spaces})
    masks.move(
        {
            name: torch.tensor([at for at, head in enumerate(units.plan.kept[name]) if head not in gone[name]])
            for name in spaces
        },
        1.0,
    )
    return masks
