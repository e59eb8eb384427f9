"""One object that scores, decides and cuts; it needs no Trainer.

In a plain loop: ``pruner.begin(t)``, forward, backward, ``pruner.observe()``, optimizer step, ``pruner.step(t + 1)``;
when an event comes back, make a new optimizer and carry its state by ``event.edits`` (see ``training.engines.state``).
Where pruning_time is "before": ``pruner.calibrate(batches, loss_of)`` and ``pruner.step(0)`` come first; with NRI else
``pruner.measure_impact(batches, loss_of)`` before it where ``pruner.measures_impact(t + 1)``. Not for data or saving.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import check_names
from apt_trainer.measure import trainable_parameters
from apt_trainer.measure.latency import shared_timings
from apt_trainer.models import ModelFamily, Space, family_of, norm_paths
from apt_trainer.models.batch import Tokens
from apt_trainer.plan.limits import warn_of_depth
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.schedule import Schedule
from apt_trainer.pruning.budget import Budget
from apt_trainer.pruning.given_model import check_given
from apt_trainer.pruning.observers import Observers, part_of
from apt_trainer.pruning.rank_growth import RankGrowth
from apt_trainer.pruning.refit_pass import RefitPass, Rows
from apt_trainer.scoring import Importance, Reduce, make_importance
from apt_trainer.scoring.base import Batch
from apt_trainer.scoring.calibration import calibrate
from apt_trainer.settings import MethodSettings
from apt_trainer.settings.packages import BITSANDBYTES, require
from apt_trainer.store.starting_point import starting_point
from apt_trainer.store.stock import DENSE_SIZES
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.frozen_base import check_base, freeze_base, frozen_bytes, make_plain
from apt_trainer.surgery.masks import MaskStore
from apt_trainer.surgery.slicing import EditLog, Edits
from apt_trainer.surgery.tuning import set_trainable, tune_at


@dataclass(frozen=True)
class Decision:
    """What will change, before anything does; equal on all processes.

    ``kind``: "prune" (units go, ranks may grow), "grow" (ranks only) or "phase" (only what trains).
    """

    plan: PruningPlan
    ranks: Mapping[str, int]
    tune: str
    kind: str

    def digest(self) -> str:
        return self.plan.digest() + repr(sorted(self.ranks.items())) + self.tune


@dataclass(frozen=True)
class PruningEvent:
    """What changed. ``survivors``: space → kept positions before this cut; ``edits``: per parameter name."""

    step: int
    kind: str
    survivors: Mapping[str, torch.Tensor]
    edits: Edits
    record: dict[str, Any] = field(default_factory=dict)


class AdaptivePruner:
    """Scores units and adapters while ``model`` trains, and changes its shape when the schedule says so.

    ``model`` must be a plain Hugging Face model, dense or pruned before; adapters are inserted here when the settings
    ask for them. ``origin``: what it began with. ``dense_plan``: of the dense original. ``block_cost``: its parameters
    in blocks. ``seconds``: what was timed, if anything, and all processes have agreed on. What is chosen by seconds
    is timed on ``timed_on``, where the model is going to run; default: where it is.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: MethodSettings,
        *,
        importance: Importance | None = None,
        seed: int = 0,
        timed_on: torch.device | None = None,
    ) -> None:
        check_names("loading", "method")
        settings.check()
        check_given(model, is_copied=settings.distillation == "self" and settings.prunes)
        self.model, self.settings, self.seed = model, settings, seed
        self.family = family_of(model.config)
        self.family.set_post_norm_policy(model.config, settings.post_norm_policy)
        self.origin = starting_point(model)
        vars(model.config).pop(DENSE_SIZES, None)  # a stock model is a dense one of its own, whatever it was cut from
        self.spaces, self.plan = self.origin.spaces, self.origin.plan
        self.sublayers = self.family.sublayers(model)
        self.dense_plan = PruningPlan.dense(self.spaces)
        self.budget = Budget(model, self.family, self.origin, settings, timed_on)
        self.block_cost = self.budget.blocks
        if not self.budget.is_timed:  # else once processes have agreed on seconds
            self.budget.check()
        if settings.base_quantization is not None:
            require(BITSANDBYTES, f"base_quantization: {settings.base_quantization}")
            check_base(model, self.family, settings.base_quantization)
        self.importance = importance or make_importance(settings, seed)
        if settings.prunes:
            self.importance.prepare(model, settings, timed_on)
        shrinking = [space for space in self.spaces if space.kind in self.budget.limits.targets]
        self.refit = RefitPass(model, self.family, shrinking) if settings.refits else None
        self.seconds: dict[str, list[float]] | None = None
        self.growth = RankGrowth(model, self.family, self.spaces, self.sublayers, settings)
        self.tune = settings.tune
        self.kept_adapters: dict[str, torch.Tensor] | None = None
        self.set_tune(self.tune)
        self.masks = MaskStore(model, self.spaces, self.sublayers)
        of_units = not settings.prunes_before
        self.observers = Observers(model, self.budget.scored, self.importance, self.growth.score, of_units)
        self.schedule: Schedule | None = None
        self._fading: tuple[int, PruningPlan] | None = None  # event, and the choice that masks follow
        self._reduce: Reduce = lambda tensor: tensor
        self._processes = 1

    # ------------------------------------------------------------------ one step

    def start(self, schedule: Schedule, step: int = 0, reduce: Reduce | None = None, processes: int = 1) -> None:
        """Begin (or go on) at ``step`` completed steps; ``reduce`` sums a tensor over ``processes``."""
        self.schedule, self._processes = schedule, processes
        if reduce is not None:
            self._reduce = reduce
        if self.seconds is None:
            timings = {"budget": self.budget.seconds()}
            if self.settings.prunes:
                timings["impact"] = self.importance.seconds()
            device = next(self.model.parameters()).device
            self._use_seconds(shared_timings(timings, self._reduce, processes, device))
            self.budget.check()
        self._follow_schedule(step)

    def calibrate(self, batches: Iterable[Batch | None], loss_of: Callable[[Batch], torch.Tensor]) -> None:
        """Score the dense model on ``batches``, for the cut at step 0; see ``scoring.calibration``."""
        self.observers.detach()
        self.importance.attach(self.model, self.budget.scored, self.plan.counts)
        if self.importance.scored == "cut":
            self.measure_impact(batches, loss_of)
        elif self.importance.scored == "steps":
            model, family, spaces, refit = self.model, self.family, self.spaces, self.refit
            with nullcontext(loss_of) if refit is None else refit.beside_scores(loss_of, self.plan.counts) as run:
                weights, reduce = self.importance.class_weights, self._reduce
                calibrate(model, family, spaces, self.importance, batches, run, reduce, self._processes, weights)
        self.importance.detach()

    @property
    def scores_at_cuts(self) -> bool:
        """Whether units are scored on rows right before each cut, not in the steps between."""
        return self.settings.prunes and self.importance.scored == "cut"

    def measures_impact(self, step: int) -> bool:
        """Whether :meth:`measure_impact` is due after ``step`` completed steps, while the model trains."""
        schedule, due = self.schedule, self.scores_at_cuts and not self.settings.prunes_before
        return due and schedule is not None and schedule.event_at(step) is not None

    def measure_impact(self, batches: Iterable[Batch | None], loss_of: Callable[[Batch], torch.Tensor]) -> None:
        """Score what is left by the model as it is, on ``batches``; see :meth:`Importance.measure`."""
        if not self.scores_at_cuts:
            raise UserError("measure_impact is for importance: nri; other rules observe the steps themselves.")
        saved = self.budget.saved_without(self.plan)
        self.importance.measure(self.model, batches, loss_of, self._reduce, self.plan.counts, saved)

    def begin(self, step: int) -> None:
        """Before the forward pass of step ``step`` + 1: attach what the schedule needs and move masks."""
        assert self.schedule is not None
        self._follow_schedule(step)
        self.observers.rest(not self.schedule.observes(step))
        event = self.schedule.in_window(step)
        if event is not None and not self.scores_at_cuts and self.refit is None:  # else units go at once
            if not self.masks.is_open:
                self.masks.open(self.plan.counts, self.budget.limits.kinds)
            if step > self.schedule.start:
                if self._fading is None or self._fading[0] != event:
                    self._fading = event, self._select(event)
                self.masks.move(self.plan.survivors(self._fading[1]), self.schedule.mask_step)

    def set_tokens(self, mask: Tokens) -> None:
        """Tell which tokens of the next forward pass are real: [batch, length], or one such per stack."""
        self.observers.set_tokens(mask)

    def set_scored_tokens(self, mask: Tokens) -> None:
        """As :meth:`set_tokens`, of a pass of :meth:`calibrate` or of a refit, where a batch takes several passes."""
        self.importance.set_tokens(mask)
        if self.refit is not None:
            self.refit.set_tokens(mask)

    def observe(self) -> None:
        """After the last backward pass of a step, before gradients are cleared."""
        if self.observers.watching:
            self.observers.update(self._reduce, self._processes)
            self._fading = None  # scores have changed

    def step(self, step: int, rows: Rows | None = None) -> PruningEvent | None:
        """After ``step`` completed steps: decide and apply in one go (for loops without an engine)."""
        decision = self.decide(step)
        return None if decision is None else self.apply(decision, step, rows=rows)

    # ------------------------------------------------------------------ one event

    def decide(self, step: int) -> Decision | None:
        """What changes after ``step`` completed steps, or None. Changes nothing itself."""
        assert self.schedule is not None
        before = self.settings.prunes_before
        event = self.schedule.event_at(step)
        tune = tune_at(self.settings, self.schedule, step, self.tune)
        cuts = step == 0 if before else event is not None
        if cuts:
            self.importance.check_observed()
        plan = self._select(event) if cuts else self.plan
        merging = tune == "full"
        ranks = {} if event is None or merging else self.growth.choose(plan, self.schedule.tuning_share(event))
        if not cuts and not ranks and tune == self.tune:
            return None
        return Decision(plan, ranks, tune, "prune" if cuts else "grow" if ranks else "phase")

    def apply(
        self, decision: Decision, step: int, shared: Collection[int] = (), rows: Rows | None = None
    ) -> PruningEvent:
        """Carry ``decision`` out on the plain model; collective.

        ``shared``: see ``EditLog``. ``rows``: what weights are refitted on, where the settings ask for that; without,
        they are not, and ``refit: true`` is a :class:`UserError`.
        """
        cuts = decision.kind == "prune"
        if cuts and rows is None and self.settings.refit:
            raise UserError(
                "refit: true solves for weights on rows of data. Give apply or step rows, or set it to null."
            )
        self.observers.detach()
        log = EditLog(shared)
        self.masks.close()
        if self.refit is not None and rows is not None and cuts:
            log.expect_ties(self.model)
            self.refit(self.plan, decision.plan, rows, self._reduce, log)
        survivors = apply_plan(self.model, self.family, self.spaces, self.plan, decision.plan, log)
        self.observers.follow(survivors)
        warn_of_depth(self.sublayers, self.plan, decision.plan)
        self.plan, self._fading = decision.plan, None
        self.growth.grow(decision.ranks, self.seed * 1_000_003 + step, log)
        if cuts and self.settings.base_quantization is not None:
            freeze_base(self.model, self.family, self.settings.base_quantization)
        self.set_tune(decision.tune)
        self._follow_schedule(step)
        return PruningEvent(step, decision.kind, survivors, dict(log.edits), self.describe(step, decision.kind))

    def set_tune(self, tune: str) -> None:
        """Change what trains; "full" merges the adapters into the base weights first."""
        if tune == "full" and self.tune != "full":
            self.merge_adapters()
        self.tune = tune
        set_trainable(self.model, self.family, tune, self.settings, norm_paths(self.spaces))

    def merge_adapters(self) -> None:
        """Add the adapters to the base weights, which are plain again then; with ``keep_adapters`` they are in
        ``kept_adapters`` from then on."""
        if self.settings.keep_adapters:
            self.kept_adapters = lora.adapter_state(self.model)
        make_plain(self.model)
        lora.merge_adapters(self.model)

    def detach(self) -> None:
        """Take every observing hook out of the model (masks excepted)."""
        self.observers.detach()

    @property
    def is_hooked(self) -> bool:
        """Whether hooks of observers or masks are in the model."""
        return self.observers.attached or self.masks.is_open

    def sparsity(self) -> float:
        """Share of the prunable budget of the dense original that is gone, in the unit of ``sparsity_metric``."""
        return self.budget.removed(self.plan)

    def describe(self, step: int, kind: str) -> dict[str, Any]:
        """One record of ``events.jsonl``, without times and losses."""
        return {
            "step": step,
            "kind": kind,
            "sparsity": self.sparsity(),
            "block_params": int(self.block_cost.total(self.plan.counts)),
            "trainable_params": trainable_parameters(self.model),
            **self.plan.by_kind(self.spaces),
            "dense": self.dense_plan.by_kind(self.spaces),
            "ranks": lora.ranks(self.model),
            "tune": self.tune,
            **({"frozen_base": base} if (base := frozen_bytes(self.model)) else {}),
        }

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(JSON part, tensor part) of everything that is not a weight of the model."""
        json_part = {
            "plan": self.plan.to_json(),
            "start": self.origin.plan.digest(),
            "ranks": lora.ranks(self.model),
            "tune": self.tune,
            "adapter_parameters_at_start": self.growth.parameters_at_start,
            "observing": self.observers.attached,
            "seconds": self.seconds,
            "base_quantization": self.settings.base_quantization,
        }
        tensors = {f"masks/{name}": value for name, value in self.masks.state_dict().items()}
        tensors |= self.observers.state_dict()
        return json_part, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def restore_shapes(self, description: Mapping[str, Any]) -> None:
        """Give the model, as it was when the run began, the shapes of a checkpoint, before its weights are loaded.

        Raises as :func:`give_shapes`.
        """
        self.plan = give_shapes(self.model, self.family, self.spaces, self.plan, description)
        self.growth.parameters_at_start = description["adapter_parameters_at_start"]
        if description.get("seconds") is not None:
            self._use_seconds(description["seconds"])
        self.tune = description["tune"]
        self.set_tune(self.tune)

    def restore_scores(self, json_part: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put scores and masks of a checkpoint back, after its shapes."""
        if json_part["observing"]:
            self.observers.attach(self.plan.counts)
            self.observers.load_state_dict(tensors)
        self.masks.load_state_dict(part_of(tensors, "masks/"))

    # ------------------------------------------------------------------ inside

    def _use_seconds(self, seconds: Mapping[str, list[float]]) -> None:
        """Choose by ``seconds`` instead of those that this process has measured."""
        self.seconds = dict(seconds)
        if "budget" in seconds:
            self.budget.use_seconds(seconds["budget"])
        if "impact" in seconds:
            self.importance.use_seconds(seconds["impact"])

    def _follow_schedule(self, step: int) -> None:
        """Observe from the start of pruning until its last event, and only then; after a cut before training, ranks
        alone."""
        assert self.schedule is not None
        wanted = self.schedule.next_event(step) is not None and step >= self.schedule.start
        if not wanted:
            self.observers.detach()
        elif not self.observers.attached:
            self.observers.attach(self.plan.counts)

    def _select(self, event: int | None) -> PruningPlan:
        """Plan for ``event``; None: the cut before training."""
        assert self.schedule is not None
        lost = self.budget.removed(self.origin.plan)
        sparsity = self.schedule.target_sparsity if event is None else self.schedule.sparsity(event, lost)
        scores, densities = self.importance.scores(self.model), self.importance.densities
        plan = self.budget.choose(scores, self.plan, sparsity, densities)
        self.importance.check_kept(plan.counts)
        return plan


def give_shapes(
    model: nn.Module, family: ModelFamily, spaces: list[Space], start: PruningPlan, description: Mapping[str, Any]
) -> PruningPlan:
    """Cut ``model``, which has the units of ``start`` and fresh adapters, to what :meth:`AdaptivePruner.state` said;
    load values after it.

    Raises :class:`UserError` where the run began with a model of other units.
    """
    if description.get("start", start.digest()) != start.digest():
        raise UserError("The checkpoint does not fit the model: its run began with one of other units. Give that one.")
    plan = PruningPlan.from_json(description["plan"])
    plan.check_within(start)
    apply_plan(model, family, spaces, start, plan)
    lora.grow_to(model, description["ranks"])
    if description.get("base_quantization") is not None:
        freeze_base(model, family, description["base_quantization"])
    if description["tune"] == "full":
        lora.merge_adapters(model)
    return plan
