"""The truth about a pruned model: which original units are left. Dry run, surgery, resume and reports derive from it.

Not for tensors: a plan knows names and indices only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, Space, Stack, Sublayer

PLAN_FILE = "pruning_plan.json"


@dataclass(frozen=True)
class PruningPlan:
    """Kept units per space, as sorted indices into the dense model."""

    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def dense(cls, spaces: Sequence[Space]) -> PruningPlan:
        return cls({space.name: tuple(range(space.size)) for space in spaces})

    @property
    def counts(self) -> dict[str, int]:
        """Units left per space."""
        return {name: len(units) for name, units in self.kept.items()}

    def survivors(self, new: PruningPlan) -> dict[str, torch.Tensor]:
        """Positions [kept] of ``new``'s units inside this plan, per space that shrinks.

        Raises AssertionError when ``new`` keeps a unit that is already gone.
        """
        positions = {}
        for name, units in self.kept.items():
            if new.kept[name] == units:
                continue
            where = {unit: position for position, unit in enumerate(units)}
            assert set(new.kept[name]) <= where.keys(), f"{name}: a unit that is gone cannot come back"
            positions[name] = torch.tensor([where[unit] for unit in new.kept[name]], dtype=torch.long)
        return positions

    def narrowed(self, positions: Mapping[str, torch.Tensor]) -> PruningPlan:
        """Plan that keeps only ``positions`` (indices into this plan's units) of the named spaces."""
        kept = dict(self.kept)
        for name, index in positions.items():
            units = kept[name]
            kept[name] = tuple(units[i] for i in sorted(index.tolist()))
        return PruningPlan(kept)

    def alive_layers(self, sublayers: Sequence[Sublayer]) -> dict[Stack, list[bool]]:
        """Per stack, which layers still have every one of ``sublayers``, those of the dense model."""
        alive: dict[Stack, dict[int, bool]] = {}
        for sublayer in sublayers:
            layers = alive.setdefault(sublayer.stack, {})
            layers[sublayer.layer] = layers.get(sublayer.layer, True) and len(self.kept[sublayer.space]) > 0
        return {stack: [layers[layer] for layer in sorted(layers)] for stack, layers in alive.items()}

    def by_kind(self, spaces: Sequence[Space]) -> dict[str, Any]:
        """Units left: {"heads": by layer, "neurons": by layer, "hidden": number}, for records; "experts" by layer
        where there are some."""
        units: dict[str, Any] = {"heads": {}, "neurons": {}}
        for space in spaces:
            if space.name == HIDDEN:
                units["hidden"] = self.counts[HIDDEN]
            else:
                gone = space.within is not None and self.counts[space.within] == 0
                units.setdefault(space.kind, {})[space.label] = 0 if gone else self.counts[space.name]
        return units

    def digest(self) -> str:
        """Hash by which processes check that they decided the same."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self, start: PruningPlan | None = None) -> dict[str, Any]:
        """``kept``: units of the dense model. Where they were taken from ``start``, a model that was pruned before,
        ``kept_of_start``: the same by their positions in that one."""
        data = {"format_version": 1, "kept": {name: list(units) for name, units in self.kept.items()}}
        if start is not None:
            where = start.survivors(self)
            of_start = {
                name: where[name].tolist() if name in where else list(range(len(units)))
                for name, units in self.kept.items()
            }
            data |= {"kept_of_start": of_start} if of_start != data["kept"] else {}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PruningPlan:
        kept = data.get("kept") if isinstance(data, Mapping) and data.get("format_version") == 1 else None
        if not isinstance(kept, Mapping) or not all(_is_sorted_units(units) for units in kept.values()):
            version = data.get("format_version") if isinstance(data, Mapping) else None
            raise UserError(
                f"Not a pruning plan of format 1 (format_version={version!r}). "
                "It was written by another version of apt_trainer, or is damaged."
            )
        return cls({name: tuple(units) for name, units in kept.items()})

    def packed(self, spaces: Sequence[Space]) -> dict[str, str]:
        """Space that lost units → those left, unit k as bit k of a hexadecimal number; for configs."""
        shrunk = [space.name for space in spaces if len(self.kept[space.name]) < space.size]
        return {name: f"{sum(1 << unit for unit in self.kept[name]):x}" for name in shrunk}

    @classmethod
    def unpacked(cls, packed: Any, spaces: Sequence[Space]) -> PruningPlan:
        """The plan that :meth:`packed` gave; raises :class:`UserError` for anything else."""
        kept = dict(cls.dense(spaces).kept)
        if not isinstance(packed, Mapping):
            raise UserError(f"The config does not tell which units are left ({packed!r:.60}); it is damaged.")
        for name, bits in packed.items():
            if name not in kept:
                raise UserError(f"The config names units of {name!r:.60}, which its model does not have.")
            if not isinstance(bits, str) or re.fullmatch("[0-9a-f]+", bits) is None:
                raise UserError(f"The config does not tell which units of {name} are left ({bits!r:.60}).")
            number, size = int(bits, 16), len(kept[name])
            if number >> size:
                raise UserError(f"The config keeps units of {name} beyond the {size} of the dense model.")
            kept[name] = tuple(unit for unit in range(size) if number >> unit & 1)
        return cls(kept)

    def check_within(self, other: PruningPlan) -> None:
        """Raise :class:`UserError` unless this plan names the spaces of ``other`` and keeps no further units."""
        if self.kept.keys() != other.kept.keys():
            raise UserError("The pruning plan names other parts than the model has; it belongs to another model.")
        for name, units in self.kept.items():
            if not set(units) <= set(other.kept[name]):
                raise UserError(f"The pruning plan keeps units of {name} that the model does not have.")


def _is_sorted_units(units: Any) -> bool:
    return (
        isinstance(units, list)
        and all(type(unit) is int and unit >= 0 for unit in units)
        and units == sorted(set(units))
    )
