"""Scores of every unit of a model, written as JSON, as a table and as heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.report.sublayers import plot_scores, scores_markdown
from apt_trainer.scoring.sublayers.cosine import CosineScores, Watch, cosine_scores, unwatched
from apt_trainer.scoring.sublayers.costs import Shape, shares, unit_costs
from apt_trainer.scoring.sublayers.impact import Losses, impacts
from apt_trainer.scoring.sublayers.loss import loss_name
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.settings import ModelSettings
from apt_trainer.store.events import append_event, write_json
from apt_trainer.studies.choices import COSTS
from apt_trainer.studies.classes import layer_classes
from apt_trainer.studies.inputs import (
    PROGRESS_FILE,
    REMOVE_NORM,
    DataRequest,
    Loaded,
    open_folder,
    prepare,
    read_progress,
    stored_losses,
)

SCORES_FILE, TABLE_FILE, PLOT_FILE = "scores.json", "scores.md", "scores.png"


def analyze(
    settings: ModelSettings,
    request: DataRequest,
    output: str,
    methods: Sequence[str] = ("cosine", "nri"),
    cost: str = "params",
    device: str | None = None,
    resume: bool = False,
    watch: Watch = unwatched,
    post_norm_policy: str = REMOVE_NORM,
) -> dict[str, Any]:
    """Score every unit of a model; writes ``scores.json``, ``scores.md`` and ``scores.png`` to ``output``.

    Args:
        settings: Where the model is.
        request: Calibration data.
        output: Folder.
        methods: "cosine" (with the similarity of layers), "nri", or both.
        cost: What impact is divided by.
        device: Default: the accelerator if there is one.
        resume: Go on with a measurement that was stopped in ``output``.
        watch: Shows progress.
        post_norm_policy: What is left of a sublayer without which the loss is measured.

    Returns:
        The content of ``scores.json``.

    Raises:
        UserError: anything that cannot work, before the weights load; a model whose loss or hidden states are not
            finite, before anything is written.
    """
    for method in methods:
        if method not in ("cosine", "nri"):
            raise unknown_choice("methods", method, ("cosine", "nri"))
    if cost not in COSTS:
        raise unknown_choice("cost", cost, COSTS)
    at = prepare(settings, request, post_norm_policy)
    assert at.calibration is not None
    if "nri" in methods and not at.calibration.has_labels:
        raise UserError(
            f"{type(at.model).__name__} has no loss on plain text, which nri needs. Give rows with labels "
            "(.jsonl with text and label), or only the method cosine."
        )
    folder = open_folder(output, resume)
    at.load(device)
    read_progress(at, folder)
    losses = stored_losses(at, folder) if "nri" in methods else None
    shape = at.shape
    params = unit_costs(at.model, at.units, "params", shape)
    rows = {unit: _row(at.units, unit, params, shares(params, at.units)) for unit in at.units.members}
    found: dict[str, Any] = {
        **at.described(),
        "methods": list(methods),
        "layers": {stack: at.units.layers(stack) for stack in at.units.stacks},
        "loss_name": loss_name(at.model, at.units),
    }
    if "cosine" in methods:
        scores = _stored_cosine(at, folder, watch)
        for unit, score in scores.scores.items():
            rows[unit]["cosine"] = score
        found["tokens"] = scores.tokens
        found["similarity"] = {stack: matrix.tolist() for stack, matrix in scores.similarity.items()}
        found["layer_classes"] = {
            stack: layer_classes(matrix)._asdict() for stack, matrix in scores.similarity.items()
        }
    if losses is not None:
        found |= _add_impacts(at, losses, cost, shape, rows, watch)
    _rank(rows, methods)
    found["units"] = list(rows.values())
    write_json(folder / SCORES_FILE, found)
    (folder / TABLE_FILE).write_text(scores_markdown(found) + "\n", encoding="utf-8")
    plot_scores(found, folder / PLOT_FILE)
    (folder / PROGRESS_FILE).unlink()
    return found


def _stored_cosine(at: Loaded, folder: Path, watch: Watch) -> CosineScores:
    """Scores and similarities, which are kept in ``folder`` once the pass is over."""
    assert at.calibration is not None
    by_name = {unit.name: unit for unit in at.units.members}
    for event in read_progress(at, folder).earlier:
        if "cosine" in event:
            return CosineScores(
                {by_name[name]: score for name, score in event["cosine"].items()},
                {stack: torch.tensor(rows, dtype=torch.float64) for stack, rows in event["similarity"].items()},
                event["tokens"],
            )
    try:
        scores = cosine_scores(at.model, at.units, at.calibration.batches, similarity=True, watch=watch)
    except UserError:  # nothing that another try could go on with
        (folder / PROGRESS_FILE).unlink()
        raise
    record = {
        "cosine": {unit.name: score for unit, score in scores.scores.items()},
        "similarity": {stack: matrix.tolist() for stack, matrix in scores.similarity.items()},
        "tokens": scores.tokens,
    }
    append_event(folder / PROGRESS_FILE, record)
    return scores


def _add_impacts(
    at: Loaded, losses: Losses, cost: str, shape: Shape, rows: Mapping[Unit, dict[str, Any]], watch: Watch
) -> dict[str, Any]:
    candidates = [unit for unit in at.units.members if unit not in at.units.protected]
    share = shares(unit_costs(at.model, at.units, cost, shape), at.units)
    for impact in impacts(losses, candidates, (), share, watch=watch):
        rows[impact.unit] |= {
            "nri": _finite(impact.normalised),
            "relative_impact": _finite(impact.relative),
            "loss": _finite(impact.loss),
            "cost_share": impact.share,
            "order": list(impact.order) if math.isfinite(impact.relative) else None,
        }
    timed = {"timed_on": at.place} if cost == "latency" else {}
    return {"nri_definition": "apt_trainer", "cost": cost, **timed, "loss_dense": losses.without(())}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(units: Units, unit: Unit, params: Mapping[Unit, float], share: Mapping[Unit, float]) -> dict[str, Any]:
    return {
        "name": units.label(unit),
        "kind": unit.kind,
        "layer": unit.layer,
        "stack": unit.stack,
        "protected": unit in units.protected,
        "params": int(params[unit]),
        "share": share[unit],
        "rank": None,
    }


def _rank(rows: Mapping[Unit, dict[str, Any]], methods: Sequence[str]) -> None:
    """Number single sublayers and blocks, each from 1, by the first of ``methods``, least harmful first."""
    for blocks in (False, True):
        members = [row for unit, row in rows.items() if (unit.kind == "block") == blocks and not row["protected"]]
        key = "cosine" if "cosine" in methods else "order"
        ordered = sorted((row for row in members if row.get(key) is not None), key=lambda row: row[key])
        for number, row in enumerate(ordered, start=1):
            row["rank"] = number
    for row in rows.values():
        row.pop("order", None)
