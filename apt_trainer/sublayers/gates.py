"""Sublayers switched off for a while: the model computes exactly what it will without them, and nothing moves.

While a gate is closed the modules of a sublayer do not run; their no-ops (``models.stubs``) do. Not for fading
(``pruning.masks``), nor for training: the weights behind a closed gate are not in the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from apt_trainer.models.stubs import STUBS
from apt_trainer.sublayers.units import Unit, Units


@contextmanager
def switched_off(model: nn.Module, units: Units, off: Iterable[Unit]) -> Iterator[None]:
    """Run ``model`` without the units ``off``; afterwards it is as before. May be nested."""
    spaces = {sublayer.space for unit in off for sublayer in units.members[unit]}
    before: list[tuple[nn.Module, Any]] = []
    try:
        for unit in units.sublayers:
            for sublayer in units.members[unit]:
                for stub in sublayer.stubs if sublayer.space in spaces else ():
                    module = model.get_submodule(stub.module)
                    before.append((module, vars(module).get("forward")))  # accelerate puts one there too
                    module.forward = STUBS[stub.kind](module).forward  # type: ignore[method-assign]
        yield
    finally:
        for module, forward in reversed(before):
            if forward is None:
                del module.forward
            else:
                module.forward = forward
