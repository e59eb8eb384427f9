"""Units: one attention, one feed-forward or one whole layer of a model, under its number in the dense model.

Not for the heads and neurons inside (``models.Space``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily, Space, Stack, Sublayer, family_of

UnitKind = Literal["attention", "cross_attention", "mlp", "block"]

MEMBERS: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("attention", "cross_attention"),
    "mlp": ("mlp",),
    "joint": ("attention", "cross_attention", "mlp"),
    "block": ("block",),
    "consecutive": ("block",),
}
"""Which units each kind of drop may take."""


@dataclass(frozen=True)
class Unit:
    """``layer``: position in its stack of the dense model, from 0; it never changes with what else is dropped."""

    kind: UnitKind
    layer: int
    stack: Stack = "decoder"

    @property
    def name(self) -> str:
        """For files: "decoder.3.attention"."""
        return f"{self.stack}.{self.layer}.{self.kind}"

    @property
    def label(self) -> str:
        """For people: "attention 3"."""
        return f"{self.kind.replace('_', '-')} {self.layer}"


@dataclass(frozen=True)
class Units:
    """All units of one dense model.

    ``members``: the sublayers behind each unit, in the order of a forward pass, blocks after all others.
    ``protected``: what always stays. ``parallel``: all sublayers of a layer read the input of the layer.
    """

    family: ModelFamily
    spaces: tuple[Space, ...]
    members: dict[Unit, tuple[Sublayer, ...]]
    protected: frozenset[Unit]
    parallel: bool

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(dict.fromkeys(unit.stack for unit in self.members))

    def layers(self, stack: Stack) -> int:
        """Layers of a stack."""
        return sum(unit.kind == "block" and unit.stack == stack for unit in self.members)

    @cached_property
    def sublayers(self) -> tuple[Unit, ...]:
        """Units of a single sublayer, in the order of a forward pass."""
        return tuple(unit for unit in self.members if unit.kind != "block")

    def of(self, kind: str) -> tuple[Unit, ...]:
        """Units that a drop of ``kind`` (``choices.KINDS``) may be about: attentions before feed-forwards."""
        return tuple(unit for member in MEMBERS[kind] for unit in self.members if unit.kind == member)

    def parts(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The sublayer units in ``units``, blocks taken apart, each once, in the order of a forward pass."""
        spaces = {sublayer.space for unit in units for sublayer in self.members[unit]}
        return tuple(unit for unit in self.sublayers if self.members[unit][0].space in spaces)

    def label(self, unit: Unit) -> str:
        """Name of a unit for people, with its stack where there are two."""
        return unit.label if len(self.stacks) == 1 else f"{unit.stack} {unit.label}"

    def check(self, units: Sequence[Unit]) -> None:
        """Raise :class:`UserError` for units that the model does not have, that stay, or that come twice."""
        for unit in units:
            if unit not in self.members:
                raise UserError(f"{unit.label} does not exist: the model has {self._described()}.")
        if len(set(units)) < len(units):
            twice = next(unit for unit in units if units.count(unit) > 1)
            raise UserError(f"{self.label(twice)} is listed twice.")
        staying = [self.label(unit) for unit in units if unit in self.protected]
        if staying:
            raise UserError(f"{', '.join(staying)} cannot be dropped: other layers of the model depend on it.")

    def _described(self) -> str:
        if len(self.stacks) == 1:
            return f"layers 0 to {self.layers(self.stacks[0]) - 1}"
        return " and ".join(f"{stack} layers 0 to {self.layers(stack) - 1}" for stack in self.stacks)


def find_units(model: nn.Module) -> Units:
    """Units of a dense ``model``, which may be on the meta device.

    Raises :class:`UserError` for a model without a family or one that has been pruned already.
    """
    config: Any = model.config
    if getattr(config, "apt_structure", None) is not None:
        raise UserError("The model is a pruned one already. Start from the dense model it was made from.")
    family = family_of(config)
    spaces = tuple(family.spaces(model))
    members: dict[Unit, list[Sublayer]] = {}
    blocks: dict[Unit, list[Sublayer]] = {}
    for sublayer in family.sublayers(model):
        kind: UnitKind = "cross_attention" if sublayer.crosses else sublayer.kind
        members[Unit(kind, sublayer.layer, sublayer.stack)] = [sublayer]
        blocks.setdefault(Unit("block", sublayer.layer, sublayer.stack), []).append(sublayer)
    members |= blocks
    stays = {space.name for space in spaces if space.minimum > 0}
    protected = {unit for unit, parts in members.items() if any(part.space in stays for part in parts)}
    fixed = {unit: tuple(parts) for unit, parts in members.items()}
    return Units(family, spaces, fixed, frozenset(protected), family.parallel(config))
