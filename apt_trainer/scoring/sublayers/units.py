"""Units: one attention, one of its heads, one feed-forward or one whole layer, under its number in the dense model.

Not for neurons, nor for the weights behind a head (``models.Space``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily, Space, Stack, Sublayer, family_of

UnitKind = Literal["attention", "cross_attention", "mlp", "block", "head", "cross_head"]

MEMBERS: dict[str, tuple[UnitKind, ...]] = {
    "attention": ("attention", "cross_attention"),
    "mlp": ("mlp",),
    "joint": ("attention", "cross_attention", "mlp"),
    "block": ("block",),
    "consecutive": ("block",),
    "heads": ("head", "cross_head"),
}
"""Which units each kind of drop may take."""

HEAD_KINDS: dict[UnitKind, UnitKind] = {"attention": "head", "cross_attention": "cross_head"}
"""What a head of each kind of attention is called."""


@dataclass(frozen=True)
class Unit:
    """``layer``: position in its stack of the dense model, from 0; it never changes with what else is dropped.
    ``head``: position in its attention, of a key and value head with all query heads that read it; else None."""

    kind: UnitKind
    layer: int
    stack: Stack = "decoder"
    head: int | None = None

    @property
    def name(self) -> str:
        """For files: "decoder.3.attention", "decoder.3.head.1"."""
        return f"{self.stack}.{self.layer}.{self.kind}" + ("" if self.head is None else f".{self.head}")

    @property
    def label(self) -> str:
        """For people: "attention 3", "head 3.1"."""
        return f"{self.kind.replace('_', '-')} {self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True)
class Units:
    """All units of one dense model.

    ``members``: the sublayers behind each unit but heads, in the order of a forward pass, blocks after all others.
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

    @cached_property
    def heads(self) -> dict[Unit, Unit]:
        """Every head and the attention that it is in, in the order of a forward pass."""
        return {
            Unit(HEAD_KINDS[unit.kind], unit.layer, unit.stack, head): unit
            for unit in self.sublayers
            if unit.kind in HEAD_KINDS
            for head in range(self.space(unit).size)
        }

    @cached_property
    def every(self) -> tuple[Unit, ...]:
        """All units, heads last."""
        return (*self.members, *self.heads)

    def space(self, unit: Unit) -> Space:
        """Heads or neurons of a sublayer; of a head, those that it is one of."""
        return self._spaces[self.members[self.heads[unit] if unit.head is not None else unit][0].space]

    @cached_property
    def _spaces(self) -> dict[str, Space]:
        return {space.name: space for space in self.spaces}

    def of(self, kind: str) -> tuple[Unit, ...]:
        """Units that a drop of ``kind`` (``choices.KINDS``) may be about: attentions before feed-forwards."""
        return tuple(unit for member in MEMBERS[kind] for unit in self.every if unit.kind == member)

    def lost(self, units: Iterable[Unit]) -> dict[str, Collection[int]]:
        """Space → positions in it that go with ``units``: some heads, or all that there is."""
        found: dict[str, Collection[int]] = {}
        for unit in units:
            if unit.head is None:
                found |= {part.space: range(self._spaces[part.space].size) for part in self.members[unit]}
            else:
                name = self.space(unit).name
                found[name] = {*found.get(name, ()), unit.head}
        return found

    def parts(self, units: Iterable[Unit]) -> tuple[Unit, ...]:
        """The sublayers and heads in ``units``, each once, in the order of a forward pass.

        Blocks are taken apart; an attention all of whose heads are there stands for them.
        """
        lost = self.lost(units)
        found: list[Unit] = []
        for unit in self.sublayers:
            space = self.space(unit)
            gone = lost.get(space.name, ())
            if len(gone) == space.size:
                found.append(unit)
            elif gone:
                found += [Unit(HEAD_KINDS[unit.kind], unit.layer, unit.stack, head) for head in sorted(gone)]
        return tuple(found)

    def free(self, candidates: Iterable[Unit], dropped: Collection[Unit]) -> tuple[Unit, ...]:
        """Those of ``candidates`` that may go, each by itself, after ``dropped``: no attention that stays loses its
        last head."""
        lost, dropped = self.lost(dropped), set(dropped)
        return tuple(unit for unit in candidates if unit not in dropped and self._may_go(unit, lost))

    def together(self, candidates: Iterable[Unit]) -> tuple[Unit, ...]:
        """As many of ``candidates``, each listed once, as may go together, the first ones."""
        taken: Counter[str] = Counter()
        found = []
        for unit in candidates:
            space = self.space(unit)
            if unit not in self.protected and (unit.head is None or taken[space.name] < space.size - space.minimum):
                taken[space.name] += 1
                found.append(unit)
        return tuple(found)

    def _may_go(self, unit: Unit, lost: Mapping[str, Collection[int]]) -> bool:
        if unit.head is None:
            return unit not in self.protected
        space = self.space(unit)
        return len({*lost.get(space.name, ()), unit.head}) <= space.size - space.minimum

    def label(self, unit: Unit) -> str:
        """Name of a unit for people, with its stack where there are two."""
        return unit.label if len(self.stacks) == 1 else f"{unit.stack} {unit.label}"

    def check(self, units: Sequence[Unit]) -> None:
        """Raise :class:`UserError` for units that the model does not have, that stay, or that come twice."""
        for unit in units:
            if unit not in self.heads and unit not in self.members:
                raise UserError(f"{unit.label} does not exist: the model has {self._described(unit)}.")
        if len(set(units)) < len(units):
            twice = next(unit for unit in units if units.count(unit) > 1)
            raise UserError(f"{self.label(twice)} is listed twice.")
        staying = [unit for unit in units if unit in self.protected]
        staying = staying or [unit for unit in self.parts(units) if unit in self.protected]
        if staying:
            raise UserError(
                f"{', '.join(map(self.label, staying))} cannot be dropped: other layers of the model depend on it."
            )

    def _described(self, unit: Unit) -> str:
        """What there is instead of ``unit``."""
        where = (unit.kind, unit.layer, unit.stack)
        beside = sum((head.kind, head.layer, head.stack) == where for head in self.heads)
        if beside:
            return f"heads 0 to {beside - 1} in that attention"
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
