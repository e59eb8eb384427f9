"""What is done in one way here and in others by the paper and by its code, and that nobody varies by itself.

Recipes of before there were presets set each of these values by a key; :func:`with_presets` reads them still.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from apt_trainer.errors import UserError, unknown_choice


@dataclass(frozen=True)
class Preset:
    """``outlier_scaling``: "mean" brings the outlier term of the salience to the mean of its kind, times
    ``outlier_weight``; "none" adds it as it is. ``rank_rule``: "fill_budget" gives the most salient half of the
    adapters all new parameters, "paper" makes r' = r·Δ'/Δ. ``rank_score``: "signed" is |Σ A·∂A| per rank, "absolute"
    Σ|B·∂B|, which needs gradients of whole parameters. ``distillation_transform``: from student to teacher dimensions,
    the identity plus "lora", or "identity" alone. ``train_head``: or the task head keeps its random values.
    """

    outlier_scaling: str = "mean"
    outlier_weight: float = 0.1
    rank_rule: str = "fill_budget"
    rank_score: str = "signed"
    distillation_transform: str = "lora"
    train_head: bool = True


PRESETS = {
    "ours": Preset(),
    "paper": Preset(outlier_scaling="none", rank_rule="paper", rank_score="absolute"),
    "official": Preset(outlier_scaling="none", train_head=False),
}
KEYS: dict[str, Any] = get_type_hints(Preset)
"""Keys of older recipes, with their types."""
_CHOICES = {
    "outlier_scaling": ("none", "mean"),
    "rank_rule": ("fill_budget", "paper"),
    "rank_score": ("signed", "absolute"),
    "distillation_transform": ("lora", "identity"),
}


def with_presets(source: str, values: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
    """``values`` of a recipe, of which those of older keys have gone to ``preset_overrides``, with one warning."""
    old = {key: value for key, value in values.items() if key in KEYS}
    if not old:
        return dict(values)
    overrides = {**(values.get("preset_overrides") or {}), **old}
    if warn:
        warnings.warn(
            f"{source}: {', '.join(old)} are values of a preset now. Set preset: {', '.join(PRESETS)}, or "
            f"preset_overrides: {overrides}.",
            FutureWarning,
            stacklevel=3,
        )
    return {key: value for key, value in values.items() if key not in KEYS} | {"preset_overrides": overrides}


def resolve(name: str, overrides: Mapping[str, Any] | None) -> Preset:
    """The preset ``name`` with ``overrides``; raises :class:`UserError` for a value that it cannot have."""
    for key, value in (overrides or {}).items():
        if key not in KEYS:
            raise unknown_choice("preset_overrides: key", key, [each.name for each in fields(Preset)])
        if key in _CHOICES and value not in _CHOICES[key]:
            raise unknown_choice(key, value, _CHOICES[key])
    preset = replace(PRESETS[name], **(overrides or {}))
    if not (isinstance(preset.outlier_weight, (int, float)) and preset.outlier_weight >= 0):
        raise UserError(f"outlier_weight={preset.outlier_weight} must be a number from 0.")
    if not isinstance(preset.train_head, bool):
        raise UserError(f"train_head={preset.train_head!r} must be true or false.")
    return preset
