"""Units: one attention, one of its heads, one feed-forward or one whole layer, under its number in the dense original.

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
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.starting_point import starting_point

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
    """All units that one model has, dense or pruned before; spaces and numbers are those of its dense original.

    ``plan``: what is left of ``spaces``. ``members``: the sublayers behind each unit but heads, in the order of a
    forward pass, blocks after all others. ``gone``: sublayers that the model lacks; ``blocks``: path of every layer,
    also of one that lost all. ``protected``: what always stays.
    """

    family: ModelFamily
    spaces: tuple[Space, ...]
    plan: PruningPlan
    members: dict[Unit, tuple[Sublayer, ...]]
    gone: tuple[Sublayer, ...]
    blocks: dict[Unit, str]
    protected: frozenset[Unit]

    @property
    def is_pruned(self) -> bool:
        """Whether the model lacks units of its dense original."""
        return self.plan != PruningPlan.dense(self.spaces)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return tuple(dict.fromkeys(unit.stack for unit in self.blocks))

    def layers(self, stack: Stack) -> int:
        """Layers of a stack."""
        return sum(unit.stack == stack for unit in self.blocks)

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
            for head in self.left(unit)
        }

    @cached_property
    def every(self) -> tuple[Unit, ...]:
        """All units, heads last."""
        return (*self.members, *self.heads)

    def space(self, unit: Unit) -> Space:
        """Heads or neurons of a sublayer; of a head, those that it is one of."""
        return self._spaces[self.members[self.heads[unit] if unit.head is not None else unit][0].space]

    def left(self, unit: Unit) -> tuple[int, ...]:
        """Heads or neurons that a sublayer has, by their numbers in the dense original; of a head, those beside it."""
        return self.plan.kept[self.space(unit).name]

    @cached_property
    def _spaces(self) -> dict[str, Space]:
        return {space.name: space for space in self.spaces}

    def of(self, kind: str) -> tuple[Unit, ...]:
        """Units that a drop of ``kind`` (``choices.KINDS``) may be about: attentions before feed-forwards."""
        return tuple(unit for member in MEMBERS[kind] for unit in self.every if unit.kind == member)

    def lost(self, units: Iterable[Unit]) -> dict[str, Collection[int]]:
        """Space → its units, as the dense original counts them, that go with ``units``: some heads, or all left."""
        found: dict[str, Collection[int]] = {}
        for unit in units:
            if unit.head is None:
                found |= {part.space: self.plan.kept[part.space] for part in self.members[unit]}
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
            if len(gone) == len(self.left(unit)):
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
            free = len(self.left(unit)) - space.minimum
            if unit not in self.protected and (unit.head is None or taken[space.name] < free):
                taken[space.name] += 1
                found.append(unit)
        return tuple(found)

    def _may_go(self, unit: Unit, lost: Mapping[str, Collection[int]]) -> bool:
        if unit.head is None:
            return unit not in self.protected
        space = self.space(unit)
        return len({*lost.get(space.name, ()), unit.head}) <= len(self.left(unit)) - space.minimum

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
        beside = [head.head for head in self.heads if (head.kind, head.layer, head.stack) == where]
        if beside:
            return f"heads {_numbers(beside)} in that attention"
        same = [other.layer for other in self.every if (other.kind, other.stack) == (unit.kind, unit.stack)]
        if self.gone and same:
            return f"units of kind {unit.kind!r} in layers {_numbers(list(dict.fromkeys(same)))}"
        if len(self.stacks) == 1:
            return f"layers 0 to {self.layers(self.stacks[0]) - 1}"
        return " and ".join(f"{stack} layers 0 to {self.layers(stack) - 1}" for stack in self.stacks)


def find_units(model: nn.Module) -> Units:
    """Units of a plain ``model``, which may be on the meta device.

    Raises :class:`UserError` as :func:`~apt_trainer.store.starting_point.starting_point`.
    """
    config: Any = model.config
    family, start = family_of(config), starting_point(model)  # type: ignore[arg-type]
    members: dict[Unit, list[Sublayer]] = {}
    blocks: dict[Unit, list[Sublayer]] = {}
    gone: list[Sublayer] = []
    paths: dict[Unit, str] = {}
    for sublayer in family.sublayers(model):
        kind: UnitKind = "cross_attention" if sublayer.crosses else sublayer.kind
        block = Unit("block", sublayer.layer, sublayer.stack)
        paths[block] = sublayer.block
        if not start.plan.kept[sublayer.space]:
            gone.append(sublayer)
            continue
        members[Unit(kind, sublayer.layer, sublayer.stack)] = [sublayer]
        blocks.setdefault(block, []).append(sublayer)
    members |= blocks
    stays = {space.name for space in start.spaces if space.minimum > 0}
    protected = {unit for unit, parts in members.items() if any(part.space in stays for part in parts)}
    fixed = {unit: tuple(parts) for unit, parts in members.items()}
    return Units(
        family,
        tuple(start.spaces),
        start.plan,
        fixed,
        tuple(gone),
        paths,
        frozenset(protected),
    )


def _numbers(values: Sequence[Any]) -> str:
    """``values``, which rise, as "0 to 3" where none is left out, else one by one."""
    first, last = values[0], values[-1]
    if last - first + 1 == len(values) > 1:
        return f"{first} to {last}"
    return ", ".join(map(str, values))
