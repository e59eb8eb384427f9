"""Execution plans as data: layer numbers, side by side or in loops, and the flat list of executions they mean.

Knows no model; whether a plan fits one is told by its number of layers and model type. Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from apt_trainer.errors import UserError

FORMAT_VERSION = 1
MOST = 4096
"""Executions of layers that a plan may have: more is a slip, and each takes a slot of the cache."""


@dataclass(frozen=True)
class Parallel:
    """Branches that all read the same input; the mean of their outputs, residual stream included, goes on."""

    branches: tuple[tuple[Stage, ...], ...]


@dataclass(frozen=True)
class Loop:
    """``stages``, ``times`` times in a row."""

    times: int
    stages: tuple[Stage, ...]


Stage: TypeAlias = int | Parallel | Loop
Before = Literal["fork", "switch"]
After = Literal["add", "join"]


@dataclass(frozen=True)
class Execution:
    """One run of one layer, and what happens to the hidden states round it, in order.

    ``before``: "fork" remembers the input for several branches, "switch" goes back to it. ``after``: "add" puts the
    output aside, "join" does too and goes on with the mean of all outputs put aside since the fork.
    """

    layer: int
    before: tuple[Before, ...] = ()
    after: tuple[After, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What runs instead of layers 0 to ``layers`` - 1 in order. Two plans that mean the same have equal
    ``executions``."""

    layers: int
    stages: tuple[Stage, ...]

    @cached_property
    def executions(self) -> tuple[Execution, ...]:
        """The runs in order, loops unrolled; raises :class:`UserError` for a plan that cannot run."""
        if _count(self.stages) > MOST:
            raise UserError(f"The plan runs {_count(self.stages):,} layers; at most {MOST:,} are allowed.")
        found = tuple(_flat(self.stages))
        if not found:
            raise UserError("The plan runs no layer.")
        for execution in found:
            if not 0 <= execution.layer < self.layers:
                raise UserError(f"The plan runs layer {execution.layer}, the model has layers 0 to {self.layers - 1}.")
        return found

    def check(self) -> None:
        """Raise :class:`UserError` for a plan that cannot run on any model."""
        _ = self.executions

    @property
    def order(self) -> tuple[int, ...]:
        """Layers in the order they run, those side by side one after the other."""
        return tuple(execution.layer for execution in self.executions)

    def __str__(self) -> str:
        """For people: "0-3 (4|5|6)×2 7"."""
        return _text(self.stages)

    def to_json(self, model_type: str) -> dict[str, Any]:
        """Content of a plan file."""
        return {
            "format_version": FORMAT_VERSION,
            "model_type": model_type,
            "layers": self.layers,
            "stages": [_stage_to_json(stage) for stage in self.stages],
        }


def full(layers: int) -> Plan:
    """The model as it is."""
    return Plan(layers, tuple(range(layers)))


def read_plan(path: str, model_type: str, layers: int) -> Plan:
    """The plan in a JSON file, for a model of ``layers`` layers.

    The file holds a plan, or an object with a plan under "plan", as a line of the results of a sweep is. Raises
    :class:`UserError` for anything else and for a plan of another model.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a plan: {error}.") from error
    if isinstance(data, dict) and isinstance(data.get("plan"), dict):
        data = data["plan"]
    try:
        return plan_from_json(data, model_type, layers)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def plan_from_json(data: Any, model_type: str, layers: int) -> Plan:
    """The plan that ``data`` (:meth:`Plan.to_json`) describes, checked against a model."""
    if not isinstance(data, Mapping) or not isinstance(data.get("stages"), list):
        raise UserError('not a plan. One looks like {"format_version": 1, "layers": 4, "stages": [0, 2, 1, 3]}.')
    if data.get("format_version") != FORMAT_VERSION:
        raise UserError(f"not a plan of format {FORMAT_VERSION} (format_version={data.get('format_version')!r}).")
    if data.get("model_type", model_type) != model_type:
        raise UserError(f"the plan is for a model of type {data['model_type']!r}, this one is {model_type!r}.")
    if data.get("layers", layers) != layers:
        raise UserError(f"the plan is for a model with {data['layers']} layers, this one has {layers}.")
    plan = Plan(layers, _stages_from_json(data["stages"]))
    plan.check()
    return plan


def _flat(stages: Sequence[Stage]) -> Iterator[Execution]:
    for stage in stages:
        if isinstance(stage, int):
            yield Execution(stage)
        elif isinstance(stage, Loop):
            for _ in range(stage.times):
                yield from _flat(stage.stages)
        elif len(stage.branches) == 1:
            yield from _flat(stage.branches[0])
        else:
            yield from _side_by_side(stage.branches)


def _side_by_side(branches: Sequence[Sequence[Stage]]) -> Iterator[Execution]:
    for number, branch in enumerate(branches):
        runs = list(_flat(branch))
        if not runs:
            raise UserError("A branch of the plan runs no layer.")
        start: tuple[Before, ...] = ("switch",) if number else ("fork",)
        end: tuple[After, ...] = ("join",) if number == len(branches) - 1 else ("add",)
        runs[0] = Execution(runs[0].layer, start + runs[0].before, runs[0].after)
        runs[-1] = Execution(runs[-1].layer, runs[-1].before, runs[-1].after + end)
        yield from runs


def _count(stages: Sequence[Stage]) -> int:
    """Executions, without unrolling anything."""
    total = 0
    for stage in stages:
        if isinstance(stage, int):
            total += 1
        elif isinstance(stage, Loop):
            total += stage.times * _count(stage.stages)
        else:
            total += sum(_count(branch) for branch in stage.branches)
    return total


def _text(stages: Sequence[Stage]) -> str:
    words: list[str] = []
    run: list[int] = []
    for stage in (*stages, None):
        if isinstance(stage, int) and (not run or stage == run[-1] + 1):
            run.append(stage)
            continue
        if run:
            words.append(f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)))
        run = [stage] if isinstance(stage, int) else []
        if isinstance(stage, Parallel):
            words.append("(" + "|".join(_text(branch) for branch in stage.branches) + ")")
        elif isinstance(stage, Loop):
            inner = _text(stage.stages)
            alone = len(stage.stages) == 1 and isinstance(stage.stages[0], int | Parallel)
            words.append(f"{inner if alone else f'[{inner}]'}×{stage.times}")
    return " ".join(words)


def _stage_to_json(stage: Stage) -> Any:
    if isinstance(stage, int):
        return stage
    if isinstance(stage, Loop):
        return {"loop": stage.times, "stages": [_stage_to_json(one) for one in stage.stages]}
    return {
        "parallel": [
            branch[0] if len(branch) == 1 and isinstance(branch[0], int) else [_stage_to_json(one) for one in branch]
            for branch in stage.branches
        ]
    }


def _stages_from_json(values: Sequence[Any]) -> tuple[Stage, ...]:
    return tuple(_stage_from_json(value) for value in values)


def _stage_from_json(value: Any) -> Stage:
    if type(value) is int:
        return value
    if isinstance(value, dict):
        branches = value.get("parallel")
        if value.keys() == {"parallel"} and isinstance(branches, list) and branches:
            return Parallel(tuple(_stages_from_json(b if isinstance(b, list) else [b]) for b in branches))
        times, stages = value.get("loop"), value.get("stages")
        if value.keys() == {"loop", "stages"} and type(times) is int and times > 0 and isinstance(stages, list):
            return Loop(times, _stages_from_json(stages))
    raise UserError(
        f'{json.dumps(value)[:80]} is no stage: a layer number, {{"parallel": [1, [2, 3]]}} or '
        '{"loop": 2, "stages": [1, 2]}.'
    )
