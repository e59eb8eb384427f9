"""A model without some of its units: chosen or listed, measured before and after, removed, saved and checked."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.measure import count_parameters
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning.uniform_shape import check_start, check_stock, uniform_shape
from apt_trainer.scoring.sublayers.cosine import Watch, cosine_scores, unwatched
from apt_trainer.scoring.sublayers.costs import Shape, block_shares, cache_bytes, shares, unit_costs
from apt_trainer.scoring.sublayers.drop import (
    collapse_warning,
    depth_share,
    depth_share_of_dense,
    depth_warning,
    drop,
    head_share,
    plan_without,
)
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Losses
from apt_trainer.scoring.sublayers.loss import exp_loss, loss_name
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.settings import ModelSettings
from apt_trainer.settings.choices import SHAPES
from apt_trainer.store.events import METRICS_FILE, write_json
from apt_trainer.store.saving import save_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.studies import lists
from apt_trainer.studies.choices import BASELINES, COSTS, FRACTIONS, METHODS, NO_COSINE
from apt_trainer.studies.held_out import HeldOut, HeldOutRequest
from apt_trainer.studies.inputs import (
    PROGRESS_FILE,
    REMOVE_NORM,
    DataRequest,
    Loaded,
    analysed_losses,
    open_folder,
    prepare,
    stored_losses,
)
from apt_trainer.studies.select import (
    Budget,
    Choice,
    CosineRanker,
    ImpactRanker,
    RandomRanker,
    Ranked,
    Ranker,
    ReverseRanker,
    candidates_of,
    choose,
    choose_consecutive,
)

REPORT_FILE, LIST_FILE = "drop_report.json", "drop_list.json"
NOTHING = HeldOutRequest()


@dataclass(frozen=True)
class DropRequest:
    """What to drop, by which score; see ``studies.choices`` for the names.

    ``drop_list`` replaces all of it but ``post_norm_policy``, which says what is left of a sublayer, and ``shape``:
    uniform refuses what does not end as a stock checkpoint, and takes as many heads from each attention. ``scores``: a
    ``scores.json`` of ``analyze`` on the same model and data, whose losses nri does not measure anew.
    """

    kind: str = "attention"
    count: int | None = None
    fraction: float | None = None
    fraction_of: str = "params"
    method: str = "cosine"
    cost: str = "params"
    baseline: str = "current"
    strategy: str = "one_shot"
    protect: Sequence[int] = ()
    drop_list: str | None = None
    scores: str | None = None
    seed: int = 0
    post_norm_policy: str = REMOVE_NORM
    shape: str = SHAPES[0]

    @property
    def even(self) -> bool:
        """Whether the result has to be a stock checkpoint, with all layers alike."""
        return self.shape == "uniform"

    def check(self, has_data: bool) -> None:
        """Raise :class:`UserError` for what cannot work whatever the model."""
        for name, allowed in (
            ("method", METHODS),
            ("cost", COSTS),
            ("baseline", BASELINES),
            ("fraction_of", FRACTIONS),
            ("shape", SHAPES),
        ):
            if getattr(self, name) not in allowed:
                raise unknown_choice(name, getattr(self, name), allowed)
        if self.scores is not None and (self.method != "nri" or self.drop_list is not None):
            raise UserError("scores holds losses, which only method nri ranks by. Leave it out, or choose nri.")
        if self.even and self.drop_list is None and self.kind in ("attention", "mlp", "joint"):
            raise UserError(
                f"shape uniform takes whole layers (kind block or consecutive) or as many heads from each attention "
                f"(kind heads), not kind {self.kind}. Choose one of these, or shape free."
            )
        if self.drop_list is not None:
            if self.count is not None or self.fraction is not None:
                raise UserError("drop_list says what to drop; leave count and fraction out.")
            return
        if self.kind == "consecutive" and self.method not in ("cosine", "reverse"):
            raise UserError(f"kind consecutive is chosen by cosine or reverse, not by {self.method!r}.")
        if self.kind == "consecutive" and self.strategy == "iterative":
            raise UserError("kind consecutive takes one run of layers at once: strategy one_shot.")
        if self.kind == "heads" and self.method == "cosine":
            raise UserError(NO_COSINE)
        if self.method in ("cosine", "nri") and not has_data:
            raise UserError(
                f"method {self.method} needs data: give a text or a file. Methods without: reverse, random."
            )


def drop_units(
    settings: ModelSettings,
    request: DropRequest,
    output: str,
    data: DataRequest | None = None,
    device: str | None = None,
    resume: bool = False,
    watch: Watch = unwatched,
    held_out: HeldOutRequest = NOTHING,
) -> dict[str, Any]:
    """Drop units of a model and save the smaller one to ``output``, with ``drop_report.json`` and ``drop_list.json``.

    The loss without the units is measured before any weight moves; one that is not finite is refused. What
    ``held_out`` asks for is measured of the full and of the saved model, and written last, to ``metrics.json``.

    Returns:
        The content of ``drop_report.json``; ``warnings`` are sentences to show. ``metrics``: of ``metrics.json``.

    Raises:
        UserError: anything that cannot work.
    """
    request.check(data is not None)
    at = prepare(settings, data, request.post_norm_policy)
    listed, candidates, budget = _asked(at, request)
    analysed = None if request.scores is None else analysed_losses(at, request.scores)
    measures = HeldOut(at, held_out)
    folder = open_folder(output, resume)
    at.load(device)
    started = time.perf_counter()
    report: dict[str, Any] = {**at.described(), **{k: v for k, v in asdict(request).items() if v is not None}}
    report["method_name"] = {"nri": "NRI (apt_trainer definition)"}.get(request.method, request.method)
    if listed is not None:
        choice = Choice(listed, ())
    else:
        if request.fraction is not None and request.fraction_of == "latency":
            costs = unit_costs(at.model, at.units, "latency", at.shape, heads=request.kind == "heads")
            budget = Budget(None, request.fraction, shares(costs, at.units), at.units, request.even)
        losses = partial(stored_losses, at, folder, analysed)
        choice = _choose(at, request, candidates, budget, losses, watch)
    seconds, dropped = time.perf_counter() - started, choice.units
    if request.even:
        check_stock(at.model, at.units.family, plan_without(at.units, dropped))
    warnings = [depth_warning(at.units, dropped)]
    if at.calibration is not None and at.calibration.has_labels:
        name, batches = loss_name(at.model, at.units), at.calibration.batches
        before = exp_loss(at.model, at.units, batches)
        with switched_off(at.model, at.units, dropped):
            after = exp_loss(at.model, at.units, batches)
        warnings.append(collapse_warning(before, after, name))
        report |= {"loss_name": name, "loss_before": before, "loss_after": after}
    else:
        warnings.append(_unmeasured(at))
    if listed is None and "latency" in (request.fraction_of, request.cost):
        report["timed_on"] = at.place
    report |= _sizes(at, dropped)
    report |= {
        "dropped": [at.units.label(unit) for unit in dropped],
        "steps": [[_ranked(at.units, one) for one in step] for step in choice.steps],
        "drop_list": lists.to_json(at.units, dropped, at.model_type),
        "warnings": [warning for warning in warnings if warning],
    }
    measures.see_full()
    plan = drop(at.model, at.units, dropped)
    if at.units.is_pruned:
        report["of_dense"] = _of_dense(at, dropped, plan)
    report["parameters_after"] = count_parameters(at.model)
    (folder / METRICS_FILE).unlink(missing_ok=True)  # of the model that is replaced now
    report["reload_difference"] = save_pruned(at.model, folder, plan, at.tokenizer, at.units.plan)
    write_json(folder / REPORT_FILE, report)
    write_json(folder / LIST_FILE, report["drop_list"])
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    metrics = _metrics(report) | {"seed": request.seed, "choosing_seconds": seconds} | measures.metrics()
    write_json(folder / METRICS_FILE, metrics)  # the last of all, as of a training run
    return report | {"metrics": metrics}


def _metrics(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a table of several drops shows of a report."""
    of_dense = report.get("of_dense", report)
    found = {"sparsity": of_dense["block_parameter_share"], "depth_share": of_dense["depth_share"]}
    if of_dense is not report:
        found["sparsity_of_start"] = report["block_parameter_share"]
    found |= {"units": len(report["dropped"]), "total_params": report["parameters_after"]}
    return found | {key: report[key] for key in ("loss_before", "loss_after") if key in report}


def _asked(at: Loaded, request: DropRequest) -> tuple[tuple[Unit, ...] | None, tuple[Unit, ...], Budget]:
    """(units of a list, candidates, budget); raises :class:`UserError` for what this model cannot give."""
    if request.even:
        check_start(at.model)
    if request.drop_list is not None:
        return lists.read(request.drop_list, at.units, at.model_type), (), Budget(count=1)
    if request.even:
        uniform_shape(at.model, at.units.family, ["heads" if request.kind == "heads" else "sublayers"])
    share = block_shares(at.model, at.units)
    budget = Budget(request.count, request.fraction, share, at.units, request.even)
    candidates = candidates_of(at.units, request.kind, request.protect)
    if request.fraction is None or request.fraction_of == "params":
        budget.check(candidates, request.kind)
    if request.method == "nri" and at.calibration is not None and not at.calibration.has_labels:
        raise UserError("method nri needs data with labels for this model: a .jsonl file of rows with text and label.")
    return None, candidates, budget


def _choose(
    at: Loaded,
    request: DropRequest,
    candidates: Sequence[Unit],
    budget: Budget,
    losses: Callable[[], Losses],
    watch: Watch,
) -> Choice:
    batches = () if at.calibration is None else at.calibration.batches
    if request.kind == "consecutive" and request.method == "cosine":
        found = cosine_scores(at.model, at.units, batches, similarity=True, watch=watch)
        return choose_consecutive(candidates, budget, found.similarity)
    ranker: Ranker
    if request.method == "cosine":
        ranker = CosineRanker(at.model, at.units, batches, watch)
    elif request.method == "nri":
        costs = unit_costs(at.model, at.units, request.cost, at.shape, heads=request.kind == "heads")
        share = shares(costs, at.units)
        ranker = ImpactRanker(losses(), share, request.baseline, watch)
    elif request.method == "reverse":
        ranker = ReverseRanker(at.units)
    else:
        ranker = RandomRanker(request.seed)
    return choose(candidates, request.kind, budget, ranker, request.strategy)


def _ranked(units: Units, one: Ranked) -> dict[str, Any]:
    values = {"score": one.score, **one.details}
    return {"unit": units.label(one.unit)} | {k: v for k, v in values.items() if v is not None and math.isfinite(v)}


def _unmeasured(at: Loaded) -> str:
    """A sentence for a drop whose harm nobody looked at."""
    data = "a text file" if at.calibration is None else "a .jsonl file of rows with text and label"
    return (
        f"The {loss_name(at.model, at.units)} was not measured, so nobody knows whether the smaller model works. "
        f"Name {data} by --data to have it measured before and after."
    )


def _sizes(at: Loaded, dropped: Sequence[Unit]) -> dict[str, Any]:
    """How much of the model goes: share of the parameters in blocks, of the sublayers, of the heads, and of the cache
    per token."""
    share = block_shares(at.model, at.units)
    parts = at.units.parts(dropped)
    found: dict[str, Any] = {
        "depth_share": depth_share(at.units, dropped),
        "block_parameter_share": sum(share[part] for part in parts),
    }
    if any(unit.head is not None for unit in dropped):
        found["head_share"] = head_share(at.units, dropped)
    if at.model.can_generate() and at.units.stacks == ("decoder",):
        token = Shape(1, 1)
        sizes = {
            u: cache_bytes(at.model, at.units, u, token) for u in at.units.every if u.kind not in ("mlp", "block")
        }
        total = sum(sizes[unit] for unit in at.units.sublayers if unit in sizes)
        gone = sum(sizes[part] for part in parts if part in sizes)
        found |= {"kv_bytes_per_token_before": total, "kv_bytes_per_token_after": total - gone}
    return found


def _of_dense(at: Loaded, dropped: Sequence[Unit], plan: PruningPlan) -> dict[str, Any]:
    """What the model, which was pruned before, lacks now of its dense original."""
    start = starting_point(at.model)
    cost = parameter_cost(start.dense, at.units.family, start.spaces)
    left = cost.total(plan.counts) / cost.total(PruningPlan.dense(start.spaces).counts)
    return {"depth_share": depth_share_of_dense(at.units, dropped), "block_parameter_share": 1 - left}


def report_text(report: Mapping[str, Any]) -> str:
    """What a drop did, in a few lines."""
    heads = f", {report['head_share']:.1%} of the heads" if "head_share" in report else ""
    lines = [
        f"dropped      {', '.join(report['dropped'])}",
        f"parameters   {report['parameters']:,} → {report['parameters_after']:,} "
        f"({report['block_parameter_share']:.1%} of the blocks, {report['depth_share']:.1%} of the sublayers{heads})",
    ]
    if "of_dense" in report:
        of_dense = report["of_dense"]
        lines.append(
            f"of dense     {of_dense['block_parameter_share']:.1%} of the blocks, {of_dense['depth_share']:.1%} of "
            "the sublayers, with what was gone before"
        )
    if "loss_before" in report:
        lines.append(f"{report['loss_name']:<12} {report['loss_before']:.4g} → {report['loss_after']:.4g}")
    else:
        lines.append("loss         not measured: no data with something to predict were given")
    if "kv_bytes_per_token_before" in report:
        lines.append(
            f"cache        {report['kv_bytes_per_token_before']:,} → {report['kv_bytes_per_token_after']:,} "
            "bytes per token"
        )
    return "\n".join(lines)
