"""How much harm each drop does, by kind of unit, ranking and number of units: curves of one model in one sweep.

Units are switched off by gates, which computes what the smaller model will (``scoring.sublayers.gates``), so nothing
is saved and a sweep over hundreds of drops loads the model once. See ``studies.drop`` for making the smaller model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.evaluate.harness import TaskOptions
from apt_trainer.report.curve import curve_markdown, plot_curve
from apt_trainer.scoring.sublayers.cosine import Watch, unwatched
from apt_trainer.scoring.sublayers.costs import block_shares, shares, unit_costs
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Losses
from apt_trainer.scoring.sublayers.loss import exp_loss, loss_name, refuse_broken
from apt_trainer.scoring.sublayers.units import Unit
from apt_trainer.scoring.sublayers.windows import Calibration
from apt_trainer.settings import ModelSettings
from apt_trainer.store.events import write_json
from apt_trainer.studies.choices import COSTS, CURVE_KINDS, DEFAULT_CURVE_KINDS, METHODS, NO_COSINE, STRATEGIES
from apt_trainer.studies.held_out import no_loss_on_text
from apt_trainer.studies.inputs import REMOVE_NORM, DataRequest, Loaded, check_folder, prepare, stored_losses
from apt_trainer.studies.journal import Journal
from apt_trainer.studies.metrics import sdr, sdr_relative
from apt_trainer.studies.plan_scores import measured
from apt_trainer.studies.select import (
    Budget,
    CosineRanker,
    ImpactRanker,
    RandomRanker,
    Ranker,
    ReverseRanker,
    candidates_of,
    choose,
)
from apt_trainer.studies.speed import composition, speedups

RESULTS_FILE, SUMMARY_FILE, TABLE_FILE = "results.jsonl", "curve.json", "curve.md"


class Ranking(NamedTuple):
    """A way to put units in order; its text is METHOD[:COST][:iterative], as in ``nri:latency``."""

    method: str
    cost: str | None = None
    strategy: str = "one_shot"

    def __str__(self) -> str:
        words = [self.method, *([self.cost] if self.cost else []), *([self.strategy] * (self.strategy != "one_shot"))]
        return ":".join(words)

    @classmethod
    def read(cls, text: str) -> Ranking:
        """Raises :class:`UserError` for a word that is unknown or does not go with the method."""
        method, *rest = text.split(":")
        if method not in METHODS:
            raise unknown_choice("ranking", method, METHODS)
        cost, strategy = "params" if method == "nri" else None, "one_shot"
        for word in rest:
            if word in STRATEGIES and method in ("cosine", "nri"):
                strategy = word
            elif word in COSTS and method == "nri":
                cost = word
            else:
                raise UserError(
                    f"ranking={text!r}: {word!r} does not go with {method}. A cost ({', '.join(COSTS)}) goes with "
                    "nri, iterative with cosine and nri."
                )
        return cls(method, cost, strategy)


@dataclass(frozen=True)
class CurveRequest(TaskOptions):
    """What to drop and what to measure.

    ``rankings``: texts of :class:`Ranking`; ``seeds``: how many random orders; ``speed``: time the smaller models.
    Tasks are run for the full model too; they and speed are measured with ``task_counts`` units dropped (None: all
    counts). ``head_counts``: counts of kind heads (None: ``counts``). ``post_norm_policy``: what is left of a sublayer
    that is off.
    """

    kinds: Sequence[str] = DEFAULT_CURVE_KINDS
    rankings: Sequence[str] = ("cosine", "nri:params", "reverse", "random")
    counts: Sequence[int] = (1, 2, 4, 8)
    head_counts: Sequence[int] | None = None
    seeds: int = 3
    protect: Sequence[int] = ()
    speed: bool = False
    task_counts: Sequence[int] | None = None
    post_norm_policy: str = REMOVE_NORM

    def read(self) -> list[Ranking]:
        """The rankings; raises :class:`UserError` for what cannot work whatever the model."""
        for kind in self.kinds:
            if kind not in CURVE_KINDS:
                raise unknown_choice("kind", kind, CURVE_KINDS)
        of_kinds = [self.counts_of(kind) for kind in self.kinds]
        if not of_kinds or any(not counts or counts[0] < 1 for counts in of_kinds):
            raise UserError(f"counts={list(self.counts)} must be numbers of units, 1 or more; so must head_counts.")
        counts = sorted(set().union(*of_kinds))
        if self.head_counts is not None and "heads" not in self.kinds:
            raise UserError("head_counts is for kind heads, which is not among kinds.")
        for count in self.task_counts or ():
            if count not in counts:
                raise unknown_choice("task_counts", str(count), [str(one) for one in counts])
        rankings = list(dict.fromkeys(Ranking.read(text) for text in self.rankings))
        if any(not rankings_of(kind, rankings) for kind in self.kinds):
            raise UserError(NO_COSINE)
        return rankings

    def counts_of(self, kind: str) -> list[int]:
        """How many units of ``kind`` to drop, in rising order."""
        return sorted(set(self.counts if kind != "heads" or self.head_counts is None else self.head_counts))


def rankings_of(kind: str, rankings: Sequence[Ranking]) -> list[Ranking]:
    """Those of ``rankings`` that order units of ``kind``: cosine does not order heads."""
    return [ranking for ranking in rankings if kind != "heads" or ranking.method != "cosine"]


@dataclass(frozen=True)
class Point:
    """One drop: the first ``count`` units in an order."""

    kind: str
    ranking: Ranking
    seed: int
    count: int
    units: tuple[Unit, ...]


def measure_curves(
    settings: ModelSettings,
    request: CurveRequest,
    output: str,
    data: DataRequest,
    test: DataRequest,
    device: str | None = None,
    resume: bool = False,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Rank units on ``data``, drop more and more of them, and measure each drop on ``test`` and on tasks.

    Writes to ``output``: ``results.jsonl`` (one line per measurement, at once), ``curve.json``, ``curve.md`` and
    ``curve.png``. What several curves share is measured once. A loss that is not finite is kept as null.

    Returns:
        The content of ``curve.json``.

    Raises:
        UserError: anything that cannot work, before anything is written.
    """
    rankings = request.read()
    at = prepare(settings, data, request.post_norm_policy)
    held_out = at.read(test)
    if not held_out.has_labels:
        raise no_loss_on_text(at)
    for kind in request.kinds:
        _budget(at, request, kind).check(candidates_of(at.units, kind, request.protect), kind)
    folder = check_folder(output, resume, RESULTS_FILE)
    at.load(device)
    results = _Results(at, request, held_out, folder / RESULTS_FILE)
    refuse_broken(results.loss(()), loss_name(at.model, at.units))
    folder.mkdir(parents=True, exist_ok=True)
    results.journal.write()
    points = list(_points(at, request, rankings, results, _Rankers(at, folder, watch)))
    for point in watch(points, "drops"):
        results.loss(point.units)
        if _in_full(request, point.count):
            results.tasks(point.units)
            results.speed(point.units)
    found = _summary(at, request, points, results)
    write_json(folder / SUMMARY_FILE, found)
    (folder / TABLE_FILE).write_text(curve_markdown(found) + "\n", encoding="utf-8")
    found["figures"] = plot_curve(found, folder)
    return found


def _budget(at: Loaded, request: CurveRequest, kind: str) -> Budget:
    return Budget(request.counts_of(kind)[-1], units=at.units)


class _Rankers:
    """Rankers of one model; losses and costs are measured when first asked for."""

    def __init__(self, at: Loaded, folder: Path, watch: Watch) -> None:
        self._at, self._folder, self._watch = at, folder, watch
        self._losses: Losses | None = None
        self._shares: dict[tuple[str, bool], dict[Unit, float]] = {}

    def of(self, kind: str, ranking: Ranking, seed: int) -> Ranker:
        at = self._at
        if ranking.method == "cosine":
            assert at.calibration is not None
            return CosineRanker(at.model, at.units, at.calibration.batches)
        if ranking.method == "nri":
            cost, heads = ranking.cost or "params", kind == "heads"
            if (cost, heads) not in self._shares:
                self._shares[cost, heads] = shares(unit_costs(at.model, at.units, cost, at.shape, heads), at.units)
            self._losses = self._losses or stored_losses(at, self._folder)
            return ImpactRanker(self._losses, self._shares[cost, heads], watch=self._watch)
        return ReverseRanker(at.units) if ranking.method == "reverse" else RandomRanker(seed)


def _points(
    at: Loaded, request: CurveRequest, rankings: Sequence[Ranking], results: _Results, rankers: _Rankers
) -> Iterator[Point]:
    for kind in request.kinds:
        budget = _budget(at, request, kind)
        candidates = candidates_of(at.units, kind, request.protect)
        for ranking in rankings_of(kind, rankings):
            for seed in range(request.seeds) if ranking.method == "random" else (0,):
                ranker = partial(rankers.of, kind, ranking, seed)  # asked for only if the order is not stored
                ordered = partial(_ordered, candidates, kind, budget, ranker, ranking.strategy)
                order = results.order((kind, str(ranking), seed), ordered)
                for count in request.counts_of(kind):
                    yield Point(kind, ranking, seed, count, order[:count])


def _ordered(
    candidates: Sequence[Unit], kind: str, budget: Budget, ranker: Callable[[], Ranker], strategy: str
) -> tuple[Unit, ...]:
    return choose(candidates, kind, budget, ranker(), strategy).units


class _Results:
    """Orders and measurements, those in the ``journal`` included."""

    def __init__(self, at: Loaded, request: CurveRequest, test: Calibration, file: Path) -> None:
        self._at, self._request, self._test = at, request, test
        same = at.described() | {
            "test": {"rows": test.rows, "length": test.length, "sha256": test.sha256},
            "protect": list(request.protect),
            "lm_eval": request.described(),
        }
        self.journal = Journal(file, same)
        self._labels = {at.units.label(unit): unit for unit in at.units.every}
        self._known: dict[Any, Any] = {_key(event): event["value"] for event in self.journal.earlier}

    def order(self, of: tuple[str, str, int], ordered: Callable[[], tuple[Unit, ...]]) -> tuple[Unit, ...]:
        """Units in the order ``of`` a curve; a stored one that is long enough is taken."""
        kept = self._known.get(_key({"what": "order", "of": of}), [])
        if len(kept) < self._request.counts_of(of[0])[-1]:
            kept = [self._at.units.label(unit) for unit in ordered()]
            self._keep({"what": "order", "of": list(of), "value": kept})
        return tuple(self._labels[label] for label in kept)

    def loss(self, units: Sequence[Unit]) -> float | None:
        """Loss in nats without ``units``; None where it is not finite."""

        def measure() -> float | None:
            loss = math.log(exp_loss(self._at.model, self._at.units, self._test.batches))
            return loss if math.isfinite(loss) else None

        return self._of("loss", units, measure)

    def tasks(self, units: Sequence[Unit]) -> dict[str, Any]:
        """By task its metric, without ``units``."""
        at, of = self._at, self._request

        def measure() -> dict[str, Any]:
            return measured(None, of.run_tasks(at.model, at.tokenizer))["tasks"]

        return self._of("tasks", units, measure) if of.tasks else {}

    def speed(self, units: Sequence[Unit]) -> dict[str, float]:
        """As :func:`~apt_trainer.studies.speed.speedups`; what has as many sublayers of each kind is as fast."""
        at = self._at
        line = {"what": "speed", "of": composition(at.units, units), "device": at.place}
        if self._request.speed and _key(line) not in self._known:
            self._keep(line | {"value": speedups(at.model, at.units, units, at.shape.length)})
        return self._known[_key(line)] if self._request.speed else {}

    def _of(self, what: str, units: Sequence[Unit], measure: Callable[[], Any]) -> Any:
        line = {"what": what, "of": sorted(self._at.units.label(unit) for unit in units)}
        if _key(line) not in self._known:
            with switched_off(self._at.model, self._at.units, units):
                self._keep(line | {"value": measure()})
        return self._known[_key(line)]

    def _keep(self, line: dict[str, Any]) -> None:
        self.journal.add(line)
        self._known[_key(line)] = line["value"]


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Seconds of one device are not those of another."""
    return (line["what"], *line["of"], line.get("device"))


def _in_full(request: CurveRequest, count: int) -> bool:
    return request.task_counts is None or count in request.task_counts


def _summary(at: Loaded, request: CurveRequest, points: Sequence[Point], results: _Results) -> dict[str, Any]:
    share = block_shares(at.model, at.units)
    curves: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        curves.setdefault((point.kind, str(point.ranking), point.count), []).append(point)
    tasks = _mean_tasks([results.tasks(())])
    rows = []
    for (kind, ranking, count), members in curves.items():
        losses = [results.loss(point.units) for point in members]
        finite = [loss for loss in losses if loss is not None]
        row: dict[str, Any] = {
            "kind": kind,
            "ranking": ranking,
            "count": count,
            "seeds": len(members),
            "parameter_share": statistics.fmean(
                sum(share[part] for part in at.units.parts(point.units)) for point in members
            ),
            "loss": statistics.fmean(finite) if len(finite) == len(losses) else None,
            "losses": losses,
            "units": [at.units.label(unit) for unit in members[0].units] if len(members) == 1 else None,
        }
        row["perplexity"] = None if row["loss"] is None else math.exp(row["loss"])
        if _in_full(request, count):
            row["tasks"] = _mean_tasks([results.tasks(point.units) for point in members])
            row["speedup"] = _mean([results.speed(point.units) for point in members])
            row |= _degradation(tasks, row["tasks"], row["speedup"].get("whole"))
        rows.append(row)
    whole = results.loss(())
    assert whole is not None
    return at.described() | {
        "loss_name": loss_name(at.model, at.units),
        "full": {"loss": whole, "perplexity": math.exp(whole), "tasks": tasks},
        **({"timed_on": at.place} if request.speed else {}),
        "rows": rows,
    }


def _mean_tasks(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    return _mean([{task: one["value"] for task, one in of_seed.items()} for of_seed in found])


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(one[name] for one in found) for name in found[0]}


def _degradation(full: Mapping[str, float], new: Mapping[str, float], speedup: float | None) -> dict[str, Any]:
    """Mean over tasks, and SDR: points lost per percent of speed gained in a whole generation."""
    if not full:
        return {}
    base, mean = statistics.fmean(full.values()), statistics.fmean(new.values())
    if speedup is None:
        return {"mean": mean}
    return {
        "mean": mean,
        "sdr": sdr(100 * base, 100 * mean, speedup),
        "sdr_relative": sdr_relative(base, mean, speedup),
    }
