"""The paper's plans (arXiv 2407.09298) for a model of any depth, and all of them for every start layer.

``start`` counts as in the authors' code: layers 0 to start and the last ``start`` ones stay, the
``layers`` - 2 · start - 1 ones between are the middle. Imports nothing heavy, for command lines show the names.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from apt_trainer.errors import UserError
from apt_trainer.settings.execution_plan import Loop, Parallel, Plan, Stage, full

SWEPT = ("skip", "reverse", "random", "middle_repeat", "parallel", "looped_parallel")
"""Plans that change the whole middle: one per start layer."""

PROBES = ("skip_one", "switch")
"""Plans that change one layer, or two neighbours: one per layer."""

METHODS = SWEPT + PROBES


def middle(layers: int, start: int) -> tuple[int, ...]:
    """Layers between the beginning and the end; raises :class:`UserError` where there are none."""
    if not 0 <= start < (layers + 1) // 2 or layers - 2 * start - 1 < 1:
        raise UserError(
            f"start={start} leaves no middle: a model of {layers} layers has starts 0 to {(layers - 2) // 2}."
        )
    return tuple(range(start + 1, layers - start))


def _with_middle(layers: int, start: int, stages: Sequence[Stage]) -> Plan:
    return Plan(layers, (*range(start + 1), *stages, *range(layers - start, layers)))


def skip(layers: int, start: int) -> Plan:
    """Without the middle."""
    middle(layers, start)
    return _with_middle(layers, start, ())


def reverse(layers: int, start: int) -> Plan:
    """The middle backwards."""
    return _with_middle(layers, start, middle(layers, start)[::-1])


def shuffled(layers: int, start: int, seed: int) -> Plan:
    """The middle in random order; equal seeds give equal orders."""
    order = list(middle(layers, start))
    random.Random(seed).shuffle(order)
    return _with_middle(layers, start, order)


def middle_repeat(layers: int, start: int) -> Plan:
    """The centre layer in the place of every layer of the middle."""
    return _with_middle(layers, start, (Loop(len(middle(layers, start)), (layers // 2,)),))


def parallel(layers: int, start: int) -> Plan:
    """All of the middle side by side."""
    return _with_middle(layers, start, (Parallel(tuple((layer,) for layer in middle(layers, start))),))


def looped_parallel(layers: int, start: int, times: int) -> Plan:
    """All of the middle side by side, the mean fed back ``times`` times."""
    side_by_side = Parallel(tuple((layer,) for layer in middle(layers, start)))
    return _with_middle(layers, start, (Loop(times, (side_by_side,)),))


def skip_one(layers: int, layer: int) -> Plan:
    """Without one layer."""
    return Plan(layers, tuple(i for i in range(layers) if i != layer))


def switch(layers: int, layer: int) -> Plan:
    """``layer`` and the next one in each other's place."""
    order = list(range(layers))
    order[layer : layer + 2] = [layer + 1, layer]
    return Plan(layers, tuple(order))


@dataclass(frozen=True)
class Point:
    """A plan of a sweep and what it is called. ``affected``: layers that do not run as they do in the full model."""

    method: str
    plan: Plan
    start: int | None = None
    layer: int | None = None
    seed: int | None = None
    times: int | None = None
    affected: int = 0
    label: str | None = None

    @property
    def name(self) -> str:
        """For people; ``label`` for a plan that is not one of the paper's."""
        if self.label is not None:
            return self.label
        values = {"start": self.start, "layer": self.layer, "seed": self.seed, "times": self.times}
        words = [f"{key} {value}" for key, value in values.items() if value is not None]
        return ", ".join([self.method.replace("_", " "), *words])


def sweep_points(
    layers: int,
    methods: Sequence[str] = METHODS,
    starts: Sequence[int] | None = None,
    seeds: Sequence[int] = range(10),
    loops: Sequence[int] = (3,),
) -> list[Point]:
    """The full model and every plan of ``methods``, start by start from the smallest middle, then layer by layer.

    Args:
        layers: Of the model, at least 2.
        methods: Of :data:`METHODS`.
        starts: Start layers; default: all.
        seeds: One random order each.
        loops: How often the looped parallel middle runs, one plan each.
    """
    if layers < 2:
        raise UserError(f"Execution plans change the order of layers; the model has {layers}.")
    starts = range((layers - 2) // 2 + 1) if starts is None else starts
    points = [Point("full", full(layers))]
    for start in sorted(set(starts), reverse=True):
        points += _of_start(layers, start, methods, seeds, loops)
    single: dict[str, Callable[[int, int], Plan]] = {"skip_one": skip_one, "switch": switch}
    for method, make in single.items():
        if method in methods:
            count = layers - (method == "switch")
            affected = 2 if method == "switch" else 1
            points += [Point(method, make(layers, i), layer=i, affected=affected) for i in range(count)]
    return points


def _of_start(
    layers: int, start: int, methods: Sequence[str], seeds: Sequence[int], loops: Sequence[int]
) -> Iterator[Point]:
    affected = len(middle(layers, start))
    simple = {"skip": skip, "reverse": reverse, "middle_repeat": middle_repeat, "parallel": parallel}
    for method in (name for name in SWEPT if name in methods):
        if method in simple:
            yield Point(method, simple[method](layers, start), start, affected=affected)
        elif method == "random":
            for seed in dict.fromkeys(seeds):
                yield Point(method, shuffled(layers, start, seed), start, seed=seed, affected=affected)
        else:
            for times in dict.fromkeys(loops):
                yield Point(method, looped_parallel(layers, start, times), start, times=times, affected=affected)
