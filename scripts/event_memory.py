"""How many bytes of tensors one process holds while its model changes shape, for ``measure_engines.py`` and tests.

What is measured is ``runtime.reshape``: the cut itself and the making of a new engine, not the evaluations round it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from live_bytes import LiveBytes
from torch import nn

from apt_trainer.tensors.partitioned import numel_of
from apt_trainer.training import reshape as runtime


@dataclass(frozen=True)
class ChangeOfShape:
    """Bytes in one process: in the old engine, at the most while the model is taken out of it; once that engine has
    let go of all that it had made whole, at the most from then on, and with the new engine; and of the largest layer
    of the model, were it whole."""

    step: int
    in_engine: int
    taking_out: int
    before: int
    most: int
    after: int
    layer: int

    @property
    def more(self) -> int:
        """Above what is there anyway, before or after."""
        return max(self.taking_out - self.in_engine, self.most - max(self.before, self.after))


def watch_changes() -> list[ChangeOfShape]:
    """From now on every change of shape in this process is added to the list that is returned."""
    found: list[ChangeOfShape] = []
    reshape = runtime.reshape

    def watched(trainer: Any, change: Callable[[], Any]) -> None:
        layer, live, first = largest_layer(trainer), LiveBytes(), []

        def changed() -> Any:
            first.extend((live.before, live.most))
            live.forget_most()
            return change()

        with live:
            reshape(trainer, changed)
        found.append(ChangeOfShape(trainer.state.global_step, *first, live.before, live.most, live.after, layer))

    runtime.reshape = watched
    return found


def largest_layer(trainer: Any) -> int:
    """Bytes of the block that has most, its adapters included, or of all that is in no block if that is more."""
    model: nn.Module = trainer.model
    blocks = [model.get_submodule(path) for path in trainer.pruner.family.block_modules(model)]
    in_blocks = {id(parameter) for block in blocks for parameter in block.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]
    layers = [list(block.parameters()) for block in blocks]
    return max(sum(numel_of(p) * p.element_size() for p in layer) for layer in [*layers, others])
