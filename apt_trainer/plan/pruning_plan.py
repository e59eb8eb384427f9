"""The truth about a pruned model: which original units are left. Dry run, surgery, resume and reports derive from it.

Not for tensors: a plan knows names and indices only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, Space


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

    def by_kind(self, spaces: Sequence[Space]) -> dict[str, Any]:
        """Units left: {"heads": by layer, "neurons": by layer, "hidden": number}, for records."""
        units: dict[str, Any] = {"heads": {}, "neurons": {}}
        for space in spaces:
            if space.name == HIDDEN:
                units["hidden"] = self.counts[HIDDEN]
            else:
                units[space.kind][space.label] = self.counts[space.name]
        return units

    def digest(self) -> str:
        """Hash by which processes check that they decided the same."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"format_version": 1, "kept": {name: list(units) for name, units in self.kept.items()}}

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


def _is_sorted_units(units: Any) -> bool:
    return (
        isinstance(units, list)
        and all(type(unit) is int and unit >= 0 for unit in units)
        and units == sorted(set(units))
    )
