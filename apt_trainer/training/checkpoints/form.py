"""Whether the JSON parts of a checkpoint say what a run writes there, and no size that its tensors do not have.

Not for whether they fit the run that reads them, which the reader finds out (``resume``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from apt_trainer.errors import UserError
from apt_trainer.settings.choices import BASE_QUANTIZATION
from apt_trainer.surgery.adapters import ADAPTER
from apt_trainer.surgery.tuning import TRANSFORM

_Form = Mapping[str, Callable[[Any], bool]]


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_index(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_dict_of(of: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def _or_none(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or test(value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


_PRUNER: _Form = {
    "plan": _is_dict,
    "ranks": _is_dict_of(_is_count),
    "tune": _is_text,
    "adapter_parameters_at_start": _is_count,
    "observing": _is_bool,
}
_DISTILLATION: _Form = {
    "best_loss": _or_none(_is_number),
    "num_student": _or_none(_is_count),
    "num_hidden": _or_none(_is_count),
    "hidden_index": _or_none(_is_index),
    "transform_rank": _or_none(_is_count),
    "transform_index": _or_none(_is_index),
}
_OPTIMIZER: _Form = {
    "last_epoch": _is_count,
    "_step_count": _is_count,
    "numbers": _is_dict_of(_is_dict_of(_is_number)),
}


def check_state(described: Mapping[str, Any], state: Path, weights: Path) -> None:
    """Raise :class:`UserError` where ``described``, read from the file ``state``, is of another form, or names ranks
    and widths that the tensors in ``weights`` do not have."""
    parts = [("pruner", _PRUNER), ("distillation", _DISTILLATION)]
    if described.get("teacher_shape") is not None:
        parts.append(("teacher_shape", _PRUNER))
    for name, form in parts:
        _check(described.get(name), form, state, name)
        if form is _PRUNER and described[name].get("base_quantization") not in (None, *BASE_QUANTIZATION):
            raise UserError(_damaged(state, f"{name}: base_quantization"))
    if not _is_count(described.get("processes", 0)):
        raise UserError(_damaged(state, "processes"))
    shapes = _shapes(weights)
    ranks = {name.partition(".lora_A.")[0]: shape[0] for name, shape in shapes.items() if f".lora_A.{ADAPTER}" in name}
    for path, rank in described["pruner"]["ranks"].items():
        if not any(name.endswith(path) and rank == found for name, found in ranks.items()):
            raise UserError(f"{state} is damaged: it names an adapter of rank {rank} that {weights.name} lacks.")
    teacher = described.get("teacher_shape") or {"ranks": {}}
    of_transform = [shape for name, shape in shapes.items() if f"{TRANSFORM}." in name]
    for claimed, tensors in (
        (teacher["ranks"].values(), shapes.values()),  # less than the sides of a matrix
        (_widths(described["distillation"]), of_transform or shapes.values()),
    ):
        largest = max((side for shape in tensors for side in shape), default=0)
        if max(claimed, default=0) > largest:
            raise UserError(f"{state} is damaged: it names a size of {max(claimed)}, which no tensor beside it has.")


def check_optimizer(described: Any, file: Path) -> None:
    """Raise :class:`UserError` where ``described``, read from ``file``, is not of the form of an optimizer's part."""
    _check(described, _OPTIMIZER, file, "the optimizer")


def _widths(distillation: Mapping[str, Any]) -> list[int]:
    names = ("num_student", "num_hidden", "transform_rank") if distillation["transform_rank"] is not None else ()
    return [distillation[name] or 0 for name in names]


def _check(part: Any, form: _Form, file: Path, name: str) -> None:
    if not isinstance(part, dict):
        raise UserError(_damaged(file, name))
    for field, fits in form.items():
        if field not in part or not fits(part[field]):
            raise UserError(_damaged(file, f"{name}: {field}"))


def _damaged(file: Path, what: str) -> str:
    return f"{file} is damaged: {what} is missing or not what a run writes. Resume from an older checkpoint."


def _shapes(file: Path) -> dict[str, list[int]]:
    """Of every tensor in ``file``, read from its beginning."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}). Resume from an older checkpoint.") from error
