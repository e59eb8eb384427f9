"""Benchmarks on one scale: 0 is guessing, 1 the full model; a plan's score is the median over its benchmarks.

So in arXiv 2407.09298. That the loss on a text joins in, with a uniform guess over tokens or classes at 0, is ours.
Numbers only: knows neither models nor files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from apt_trainer.studies.named_plans import Point

TEXT = "text"
_METRICS = ("acc_norm", "acc", "exact_match")


class Benchmark(NamedTuple):
    """What a benchmark's values mean: higher is better, and they are negative losses for :data:`TEXT`."""

    name: str
    metric: str
    chance: float
    full: float

    def normalised(self, value: float | None) -> float:
        """``value`` between guessing and the full model; minus infinity for one that is not finite."""
        if value is None or not math.isfinite(value):
            return -math.inf
        return (value - self.chance) / (self.full - self.chance)


def measured(loss: float | None, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a measurement: the ``loss`` in nats and, per task, the metric that the paper's figures show.

    ``tasks``: as :func:`apt_trainer.evaluate.harness.run_tasks` gives them. Without a ``chance``, guessing scores 0.
    A group of tasks is left out, its tasks are not.
    """
    kept: dict[str, dict[str, Any]] = {}
    for name, found in tasks.items():
        metrics = found["metrics"]
        metric = next((key for wanted in _METRICS for key in metrics if key.split(" (")[0] == wanted), None)
        if metric is not None and found["examples"]:
            kept[name] = {"metric": metric, **metrics[metric], "chance": found.get("chance", 0.0)}
    return {"loss": loss, "tasks": kept}


def benchmarks_of(full: Mapping[str, Any], guess: float | None) -> tuple[list[Benchmark], list[str]]:
    """Benchmarks that can be normalised, from the measurement of the full model, and sentences about the others.

    ``guess``: loss of a uniform guess, None where there is none.
    """
    found = [Benchmark(name, one["metric"], one["chance"], one["value"]) for name, one in full["tasks"].items()]
    if full["loss"] is not None and guess is not None:
        found.insert(0, Benchmark(TEXT, "loss", -guess, -full["loss"]))
    useless = [one for one in found if not one.full > one.chance]
    told = [
        f"{one.name} is left out of the medians: the full model ({one.full:.3g}) is no better than guessing "
        f"({one.chance:.3g})."
        for one in useless
    ]
    return [one for one in found if one not in useless], told


def summarise(
    points: Sequence[Point], measurements: Sequence[Mapping[str, Any]], benchmarks: Sequence[Benchmark]
) -> list[dict[str, Any]]:
    """One row per plan, those that differ in their seed alone averaged; numbers that are not finite are None.

    Per row: ``loss``, ``perplexity`` (its exp), ``values`` and ``normalised`` by benchmark, ``median`` over benchmarks
    and ``medians`` of each seed.
    """
    groups: dict[Any, list[tuple[Point, Mapping[str, Any]]]] = {}
    for point, one in zip(points, measurements, strict=True):
        groups.setdefault((point.method, point.start, point.layer, point.times, point.label), []).append((point, one))
    return [_row(members, benchmarks) for members in groups.values()]


def _row(members: Sequence[tuple[Point, Mapping[str, Any]]], benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    first = members[0][0]
    losses = [one["loss"] for _, one in members]
    loss = None if None in losses else statistics.fmean(losses)
    values = [[_value(one, benchmark) for benchmark in benchmarks] for _, one in members]
    scores = [[b.normalised(v) for b, v in zip(benchmarks, row, strict=True)] for row in values]
    normalised = {b.name: statistics.fmean(row[i] for row in scores) for i, b in enumerate(benchmarks)}
    tasks = members[0][1]["tasks"]
    return {
        "method": first.method,
        "name": first.name if len(members) == 1 else first.method.replace("_", " ") + f", start {first.start}",
        "start": first.start,
        "layer": first.layer,
        "times": first.times,
        "label": first.label,
        "affected": first.affected,
        "runs": len(first.plan.executions),
        "seeds": len(members),
        "plan": str(first.plan) if len(members) == 1 else None,
        "loss": loss,
        "perplexity": None if loss is None else _finite(_exp(loss)),
        "values": {task: statistics.fmean(one["tasks"][task]["value"] for _, one in members) for task in tasks},
        "normalised": {name: _finite(score) for name, score in normalised.items()},
        "median": _finite(statistics.median(normalised.values())) if normalised else None,
        "medians": [_finite(statistics.median(row)) for row in scores] if normalised else [],
    }


def _value(one: Mapping[str, Any], benchmark: Benchmark) -> float | None:
    if benchmark.name == TEXT and benchmark.metric == "loss":
        return None if one["loss"] is None else -one["loss"]
    return float(one["tasks"][benchmark.name]["value"])


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
