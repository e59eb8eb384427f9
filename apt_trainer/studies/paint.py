"""Execution plans of a frozen model: measured one by one in a sweep that can be stopped, or one kept in a model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.evaluate.harness import TaskOptions
from apt_trainer.models.execution import check_plan, painted
from apt_trainer.models.labels import MULTI_LABEL, SINGLE_LABEL, problem_type
from apt_trainer.models.slots import layer_list_path
from apt_trainer.report.painting import paint_markdown, plot_paint
from apt_trainer.scoring.sublayers.cosine import Watch, cosine_scores, unwatched
from apt_trainer.scoring.sublayers.loss import exp_loss, loss_name, loss_sums, refuse_broken
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.execution_plan import Plan, full, plan_from_json, read_plan
from apt_trainer.store.events import METRICS_FILE, write_json
from apt_trainer.store.painted_model import paint
from apt_trainer.store.saving import save_pruned
from apt_trainer.studies.classes import layer_classes
from apt_trainer.studies.held_out import loss_with_interval, mean_of_tasks, no_loss_on_text
from apt_trainer.studies.inputs import DataRequest, Loaded, check_folder, prepare
from apt_trainer.studies.journal import Journal
from apt_trainer.studies.named_plans import METHODS, Point, sweep_points
from apt_trainer.studies.plan_scores import benchmarks_of, measured, summarise

RESULTS_FILE, SUMMARY_FILE, TABLE_FILE = "results.jsonl", "summary.json", "summary.md"
PLAN_FILE = "execution_plan.json"


@dataclass(frozen=True)
class PaintRequest(TaskOptions):
    """Which plans to measure, and on which tasks besides the text.

    ``methods`` to ``loops`` are those of :func:`~apt_trainer.studies.named_plans.sweep_points` (``seeds``: how many
    random orders); ``plans``: files of further plans.
    """

    methods: Sequence[str] = METHODS
    starts: Sequence[int] | None = None
    seeds: int = 3
    loops: Sequence[int] = (3,)
    plans: Sequence[str] = ()

    def points(self, layers: int, model_type: str) -> list[Point]:
        """The plans for a model; raises :class:`UserError` for what it cannot run."""
        for method in self.methods:
            if method not in METHODS:
                raise unknown_choice("methods", method, METHODS)
        points = sweep_points(layers, self.methods, self.starts, range(self.seeds), self.loops)
        for path in self.plans:
            plan = read_plan(path, model_type, layers)
            points.append(Point("file", plan, label=Path(path).stem))
        return points


def paint_sweep(
    settings: ModelSettings,
    request: PaintRequest,
    output: str,
    data: DataRequest | None = None,
    device: str | None = None,
    resume: bool = False,
    watch: Watch = unwatched,
) -> dict[str, Any]:
    """Measure a model under many execution plans.

    Writes to ``output``: ``results.jsonl`` (one line per plan, at once), ``summary.json``, ``summary.md``, figures
    and, last, ``metrics.json`` with the scores of each plan; those of an only plan beside the full model, or of the
    full model alone, stand at its top level. A plan that several names stand for is measured once. A loss that is not
    finite is kept as null.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: anything that cannot work; a full model without a finite loss before anything is written.
    """
    if data is None and not request.tasks:
        raise UserError("There is nothing to measure plans on. Give data, tasks of lm_eval, or both.")
    at = _prepare(settings, data)
    points = request.points(_layers(at), at.model_type)
    folder = check_folder(output, resume, RESULTS_FILE)
    at.load(device)
    for point in points:
        check_plan(at.model, point.plan)
    results = _Results(at, request, folder / RESULTS_FILE)
    whole = results.of(points[0])
    if at.calibration is not None:
        refuse_broken(whole["loss"], loss_name(at.model, at.units))
    results.journal.write()
    missing: dict[Any, Point] = {}
    for point in points:
        if not results.knows(point):
            missing.setdefault(point.plan.executions, point)
    for point in watch(list(missing.values()), "plans"):
        results.of(point)
    found = _summary(at, request, points, results)
    write_json(folder / SUMMARY_FILE, found)
    (folder / TABLE_FILE).write_text(paint_markdown(found) + "\n", encoding="utf-8")
    found["figures"] = plot_paint(found, folder)
    write_json(folder / METRICS_FILE, _metrics(points, results, found["rows"]))
    return found


def keep_plan(
    settings: ModelSettings, path: str, output: str, data: DataRequest | None = None, device: str | None = None
) -> dict[str, Any]:
    """Save a model that runs by the plan in ``path`` to ``output``, for fine-tuning or generation.

    Returns ``plan`` (its text), ``reload_difference`` and, with ``data``, the ``loss_name``, ``loss_before`` and
    ``loss_after``. Raises :class:`UserError` for a plan of another model, and for a loss that is not finite under it.
    """
    at = _prepare(settings, data)
    plan = read_plan(path, at.model_type, _layers(at))
    folder = check_folder(output, resume=False, progress=RESULTS_FILE)
    at.load(device)
    found: dict[str, Any] = {"plan": str(plan), "loss_name": loss_name(at.model, at.units)}
    if at.calibration is not None:
        batches = at.calibration.batches
        found["loss_before"] = exp_loss(at.model, at.units, batches)
        with painted(at.model, plan):
            found["loss_after"] = exp_loss(at.model, at.units, batches)
        if not math.isfinite(found["loss_after"]):
            raise UserError(f"{path}: under this plan the {found['loss_name']} is not finite. Nothing was written.")
    saved = plan.to_json(at.model_type)
    paint(at.model, plan)
    found["reload_difference"] = save_pruned(at.model, folder, at.units.plan, at.tokenizer)
    write_json(folder / PLAN_FILE, saved)
    return found


def _prepare(settings: ModelSettings, data: DataRequest | None) -> Loaded:
    at = prepare(settings, data, post_norm_policy=None)
    layer_list_path(at.model, at.units.family)
    if at.calibration is not None and not at.calibration.has_labels:
        raise no_loss_on_text(at)
    return at


def _layers(at: Loaded) -> int:
    return at.units.layers(at.units.stacks[0])


class _Results:
    """Measurements by what a plan executes, those in the ``journal`` included."""

    def __init__(self, at: Loaded, request: PaintRequest, file: Path) -> None:
        self._at, self._request = at, request
        self.journal = Journal(file, at.described() | {"lm_eval": request.described()})
        layers = _layers(at)
        self._known: dict[Any, dict[str, Any]] = {
            plan_from_json(event["plan"], at.model_type, layers).executions: event for event in self.journal.earlier
        }

    def knows(self, point: Point) -> bool:
        return point.plan.executions in self._known

    def of(self, point: Point) -> dict[str, Any]:
        """``loss`` and ``tasks`` under a plan, measured unless they are known."""
        if not self.knows(point):
            started = time.perf_counter()
            found = self._measure(point.plan)
            line = {"name": point.name, "text": str(point.plan), "plan": point.plan.to_json(self._at.model_type)}
            self.journal.add(line | found | {"seconds": round(time.perf_counter() - started, 3)})
            self._known[point.plan.executions] = found
        return self._known[point.plan.executions]

    def _measure(self, plan: Plan) -> dict[str, Any]:
        at, request = self._at, self._request
        text: dict[str, float | None] = {"value": None}
        tasks = {}
        with painted(at.model, plan):
            if at.calibration is not None:
                text = loss_with_interval(loss_sums(at.model, at.units, at.calibration.batches))
            if request.tasks:
                tasks = request.run_tasks(at.model, at.tokenizer)
        value = text.pop("value")
        return measured(None if value is None else math.log(value), tasks) | {"interval": text}


def _metrics(points: Sequence[Point], results: _Results, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores by plan, with 95 % intervals where a plan has one order of layers."""
    measurements = {point.name: results.of(point) for point in points}
    plans = {row["name"]: _of_plan(row, measurements.get(row["name"], {})) for row in rows}
    others = list(plans.values())[1:]
    return {"plans": plans} | (others[0] if len(others) == 1 else {} if others else next(iter(plans.values())))


def _of_plan(row: Mapping[str, Any], measurement: Mapping[str, Any]) -> dict[str, Any]:
    """``measurement``: empty for a mean over several orders."""
    found: dict[str, Any] = {"score": row["median"], "affected": row["affected"]}
    if row["perplexity"] is not None:
        found["perplexity"] = {"value": row["perplexity"], **measurement.get("interval", {})}
    if row["values"]:
        kept = measurement.get("tasks", {})
        ends = {name: {end: kept[name][end] for end in ("low", "high") if end in kept[name]} for name in kept}
        found["tasks"] = {name: {"value": value, **ends.get(name, {})} for name, value in row["values"].items()}
        found["accuracy"] = mean_of_tasks(found["tasks"])
    return found


def _summary(at: Loaded, request: PaintRequest, points: Sequence[Point], results: _Results) -> dict[str, Any]:
    whole = results.of(points[0])
    benchmarks, warnings = benchmarks_of(whole, _guess(at))
    rows = summarise(points, [results.of(point) for point in points], benchmarks)
    broken = [row["name"] for row in rows if at.calibration is not None and row["loss"] is None]
    if broken:
        warnings.append(f"The loss is not finite under {len(broken)} plans, such as {broken[0]}.")
    found: dict[str, Any] = {
        **at.described(),
        "layers": _layers(at),
        "full": str(full(_layers(at))),
        "loss_name": loss_name(at.model, at.units) if at.calibration is not None else None,
        "benchmarks": [benchmark._asdict() for benchmark in benchmarks],
        "rows": rows,
        "warnings": warnings,
    }
    if at.calibration is not None:
        matrix = cosine_scores(at.model, at.units, at.calibration.batches, similarity=True).similarity
        similarity = matrix[at.units.stacks[0]]
        found |= {"similarity": similarity.tolist(), "layer_classes": layer_classes(similarity)._asdict()}
    return found


def _guess(at: Loaded) -> float | None:
    """Loss in nats of a uniform guess; None for a head that chooses between no fixed number of classes."""
    if at.calibration is None:
        return None
    head, config = at.units.family.head(at.model), at.model.config
    if head.next_token or head.masked_token:
        return math.log(config.vocab_size)
    problem = problem_type(config, at.calibration.batches[0].get("labels"))
    if problem == MULTI_LABEL:  # each label is a choice of two
        return math.log(2)
    return math.log(config.num_labels) if problem == SINGLE_LABEL and config.num_labels > 1 else None
