"""Drop lists as JSON: ours, and the two lists of layer numbers that LLM-Drop keeps in a config.

One file is both where a model has one stack and no attention loses a part of its heads, which theirs cannot say:
``units`` is ours, ``drop_attn_list`` and ``drop_mlp_list`` are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from apt_trainer.errors import UserError
from apt_trainer.models import Stack
from apt_trainer.scoring.sublayers.units import HEAD_KINDS, Unit, UnitKind, Units

FORMAT_VERSION = 1
_THEIRS: dict[str, UnitKind] = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}


def to_json(units: Units, dropped: Iterable[Unit], model_type: str) -> dict[str, Any]:
    """A drop list; ``dropped`` in the order they were chosen."""
    dropped = tuple(dropped)
    data: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "model_type": model_type,
        "layers": {stack: units.layers(stack) for stack in units.stacks},
        "units": [_entry(unit) for unit in dropped],
    }
    if any(unit.head is not None for unit in dropped):
        data["heads"] = _heads(units)
    parts = units.parts(dropped)
    if len(units.stacks) == 1 and all(part.head is None for part in parts):
        data |= {name: [unit.layer for unit in parts if unit.kind == kind] for name, kind in _THEIRS.items()}
    return data


def _entry(unit: Unit) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": unit.kind, "layer": unit.layer, "stack": unit.stack}
    return entry if unit.head is None else entry | {"head": unit.head}


def _heads(units: Units) -> dict[str, int]:
    """Heads of an attention per stack; they number the same in all layers of a dense model."""
    return {
        stack: max(space.size for space in units.spaces if space.stack == stack and space.kind == "heads")
        for stack in units.stacks
    }


def read(path: str, units: Units, model_type: str) -> tuple[Unit, ...]:
    """Units of the drop list in ``path``: a list, a drop report that holds one, or a config of LLM-Drop.

    Raises :class:`UserError` for anything else, for a list of another model, and for units that the model lacks.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a drop list: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("drop_list"), dict):
        data = data["drop_list"]
    if not isinstance(data, dict) or not ({"units"} | _THEIRS.keys()) & data.keys():
        raise UserError(f"{path} is no drop list: it needs 'units', or 'drop_attn_list' and 'drop_mlp_list'.")
    try:
        found = from_json(data, units, model_type)
        units.check(found)
        _check_agreement(data, units, found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not found:
        raise UserError(f"{path} lists no unit.")
    return found


def from_json(data: Mapping[str, Any], units: Units, model_type: str) -> tuple[Unit, ...]:
    """Units of a drop list; whether the model has them is for :meth:`Units.check`."""
    layers = {stack: units.layers(stack) for stack in units.stacks}
    listed_type = data.get("model_type")
    if listed_type is not None and listed_type != model_type:
        raise UserError(f"the list is for a model of type {listed_type!r}, this one is {model_type!r}.")
    count = data.get("num_hidden_layers")  # where theirs is a whole config
    listed = data.get("layers") if count is None else dict.fromkeys(units.stacks, count)
    if listed is not None and listed != layers:
        raise UserError(f"the list is for a model with layers {listed}, this one has {layers}.")
    if data.get("heads") not in (None, _heads(units)):
        raise UserError(f"the list is for attentions with heads {data['heads']}, those here have {_heads(units)}.")
    if "units" in data:
        version = data.get("format_version")
        if version != FORMAT_VERSION or not isinstance(data["units"], list):
            raise UserError(f"not a drop list of format {FORMAT_VERSION} (format_version={version!r}).")
        return tuple(_unit(entry) for entry in data["units"])
    if len(units.stacks) > 1:
        raise UserError("drop_attn_list and drop_mlp_list are for models with one stack of layers. Give 'units'.")
    stack = units.stacks[0]
    return tuple(
        Unit(kind, layer, stack)
        for name, kind in _THEIRS.items()
        for layer in _layers(name, data.get(name) or [], layers[stack])
    )


def _check_agreement(data: Mapping[str, Any], units: Units, found: tuple[Unit, ...]) -> None:
    """Raise :class:`UserError` where a list of theirs beside ``units`` says otherwise: one of them was edited."""
    if "units" not in data or len(units.stacks) > 1:
        return
    parts = units.parts(found)
    for name, kind in _THEIRS.items():
        if data.get(name) is None:
            continue
        theirs = sorted(set(_layers(name, data[name], units.layers(units.stacks[0]))))
        ours = sorted(unit.layer for unit in parts if unit.kind == kind)
        if theirs != ours:
            raise UserError(
                f"{name}={theirs} disagrees with 'units', which drop the {kind}s of layers {ours}. Change both alike, "
                "or leave one of them out."
            )


def _unit(entry: Any) -> Unit:
    values = entry if isinstance(entry, dict) else {}
    kind: Any = values.get("kind")
    layer: Any = values.get("layer")
    stack: Any = values.get("stack")
    head: Any = values.get("head")
    known = kind in get_args(UnitKind) and type(layer) is int and stack in get_args(Stack)
    if not known or type(head) is not (int if kind in HEAD_KINDS.values() else type(None)):
        raise UserError(
            f'{entry!r} is no unit. One looks like {{"kind": "attention", "layer": 3, "stack": "decoder"}}, a head '
            'like {"kind": "head", "layer": 3, "stack": "decoder", "head": 1}.'
        )
    return Unit(kind, layer, stack, head)


def _layers(name: str, values: Any, layers: int) -> list[int]:
    """Layer numbers of one of their lists, which may also be one truth value per layer."""
    if isinstance(values, list) and values and all(type(value) is bool for value in values):
        if len(values) != layers:
            raise UserError(f"{name} has {len(values)} values, the model {layers} layers.")
        return [layer for layer, dropped in enumerate(values) if dropped]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError(f"{name} must be a list of layer numbers.")
    return values
