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
from apt_trainer.models import ModelFamily, Space, Stack, family_of
from apt_trainer.models.batch import Tokens
from apt_trainer.plan import ranks as allocation
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.limits import limits_of, warn_of_depth
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.schedule import Schedule
from apt_trainer.plan.selection import select
from apt_trainer.pruning.agreed_seconds import Seconds, agree_on_seconds, use_seconds
from apt_trainer.pruning.budget import check_budget, cost_of, saved_without
from apt_trainer.pruning.given_model import check_given
from apt_trainer.pruning.impact_pass import ImpactPass
from apt_trainer.pruning.refit_pass import RefitPass, Rows
from apt_trainer.pruning.uniform_shape import uniform_shape
from apt_trainer.scoring import Importance, Nri, Reduce, make_importance
from apt_trainer.scoring.calibration import Batch, calibrate
from apt_trainer.scoring.observing import Observing
from apt_trainer.scoring.rank_score import RankScore
from apt_trainer.settings import MethodSettings
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.store.starting_point import starting_point
from apt_trainer.store.stock import DENSE_SIZES
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore
from apt_trainer.surgery.slicing import Edit, EditLog
from apt_trainer.surgery.tuning import set_trainable


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
    edits: Mapping[str, list[Edit]]
    record: dict[str, Any] = field(default_factory=dict)


class AdaptivePruner:
    """Scores units and adapters while ``model`` trains, and changes its shape when the schedule says so.

    ``model`` must be a plain Hugging Face model, dense or pruned before; adapters are inserted here when the settings
    ask for them. ``origin``: what it began with. ``dense_plan``: of the dense original. What is chosen by seconds is
    timed on ``timed_on``, where the model is going to run; default: where it is.
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
        self.block_cost = parameter_cost(self.origin.dense, self.family, self.spaces)
        timed = settings.sparsity_metric == "latency" and self.origin.is_pruned  # which needs weights
        dense = dense_copy(model) if timed else self.origin.dense
        self.cost = cost_of(dense, self.family, self.spaces, settings, timed_on)
        self.limits = limits_of(settings)
        uniform = settings.prunes and settings.shape == "uniform"
        self.shape = uniform_shape(model, self.family, settings.prune_targets) if uniform else None
        if settings.sparsity_metric != "latency":  # else once processes have agreed on seconds
            self._check_budget()
        self.importance = importance or make_importance(settings, seed)
        nri = self.importance if settings.prunes and isinstance(self.importance, Nri) else None
        self.impact = None if nri is None else ImpactPass(model, nri.cost, settings, timed_on)
        shrinking = [space for space in self.spaces if space.kind in self.limits.targets]
        self.refit = RefitPass(model, self.family, shrinking) if settings.refits else None
        self.seconds: Seconds | None = None
        self.tune = settings.tune
        self._insert_adapters()
        self.adapter_parameters_at_start = lora.adapter_parameters(model)
        self.set_tune(self.tune)
        self.masks = MaskStore(model, self.spaces, self.sublayers)
        self.rank_score = RankScore(settings.salience_decay, absolute=settings.rank_score == "absolute")
        self.schedule: Schedule | None = None
        self._observing = False
        self._resting = False
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
            agree_on_seconds(self, self._reduce, processes)
            self._check_budget()
        self._follow_schedule(step)

    def calibrate(self, batches: Iterable[Batch | None], loss_of: Callable[[Batch], torch.Tensor]) -> None:
        """Score the dense model on ``batches``, for the cut at step 0; see ``scoring.calibration``, and for NRI
        ``impact_pass``."""
        self.detach()
        self.importance.attach(self.model, self._scored(), self.plan.counts)
        if self.impact is not None:
            self.measure_impact(batches, loss_of)
        elif self.importance.needs_data:
            model, family, spaces, refit = self.model, self.family, self.spaces, self.refit
            with nullcontext(loss_of) if refit is None else refit.beside_scores(loss_of, self.plan.counts) as run:
                calibrate(model, family, spaces, self.importance, batches, run, self._reduce, self._processes)
        self.importance.detach()

    def measures_impact(self, step: int) -> bool:
        """Whether :meth:`measure_impact` is due after ``step`` completed steps, while the model trains."""
        schedule, watched = self.schedule, self.impact is not None and not self.settings.prunes_before
        return watched and schedule is not None and schedule.event_at(step) is not None

    def measure_impact(self, batches: Iterable[Batch | None], loss_of: Callable[[Batch], torch.Tensor]) -> None:
        """Score the sublayers that are left by NRI on ``batches``; see ``impact_pass``."""
        if self.impact is None or not isinstance(self.importance, Nri):
            raise UserError("measure_impact is for importance: nri; other rules observe the steps themselves.")
        impacts = self.impact.measure(batches, loss_of, self._reduce, self.plan.counts)
        self.importance.take(impacts, saved_without(self._scored(), self.plan.counts, self.cost))

    def begin(self, step: int) -> None:
        """Before the forward pass of step ``step`` + 1: attach what the schedule needs and move masks."""
        assert self.schedule is not None
        self._follow_schedule(step)
        self._rest(not self.schedule.observes(step))
        event = self.schedule.in_window(step)
        if event is not None and self.impact is None and self.refit is None:  # else units go at the event alone
            if not self.masks.is_open:
                self.masks.open(self.plan.counts, self.limits.kinds)
            if step > self.schedule.start:
                if self._fading is None or self._fading[0] != event:
                    self._fading = event, self._select(event)
                self.masks.move(self.plan.survivors(self._fading[1]), self.schedule.mask_step)

    def set_tokens(self, mask: Tokens) -> None:
        """Tell which tokens of the next forward pass are real: [batch, length], or one such per stack."""
        if self._observing and not self._resting and not self.settings.prunes_before:
            self.importance.set_tokens(mask)

    def set_scored_tokens(self, mask: Tokens) -> None:
        """As :meth:`set_tokens`, of a pass of :meth:`calibrate` or of a refit, where a batch takes several passes."""
        self.importance.set_tokens(mask)
        if self.refit is not None:
            self.refit.set_tokens(mask)

    def observe(self) -> None:
        """After the last backward pass of a step, before gradients are cleared."""
        if self._observing and not self._resting:
            if not self.settings.prunes_before:
                self._check_observed()
                self.importance.update(self._reduce, self._processes)
            self.rank_score.update(self._reduce, self._processes)
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
        tune = self._tune_at(step)
        cuts = step == 0 if before else event is not None
        if cuts and isinstance(self.importance, Observing) and self.importance.is_blank():
            raise UserError(
                "Nothing finite was observed that units could be scored by: all gradients were zero or not finite. "
                "With fp16, train a few steps before pruning_start, until the loss scale has settled, or use bf16."
            )
        plan = self._select(event) if cuts else self.plan
        merging = tune == "full"
        ranks = {} if event is None or merging else self._new_ranks(event, plan)
        if not cuts and not ranks and tune == self.tune:
            return None
        return Decision(plan, ranks, tune, "prune" if cuts else "grow" if ranks else "phase")

    def apply(
        self, decision: Decision, step: int, shared: Collection[int] = (), rows: Rows | None = None
    ) -> PruningEvent:
        """Carry ``decision`` out on the plain model; collective.

        ``shared``: see ``EditLog``. ``rows``: what weights are refitted on, where the settings ask for that; None:
        they are not.
        """
        self.detach()
        log = EditLog(shared)
        self.masks.close()
        if self.refit is not None and rows is not None and decision.kind == "prune":
            log.expect_ties(self.model)
            self.refit(self.plan, decision.plan, rows, self._reduce, log)
        survivors = apply_plan(self.model, self.family, self.spaces, self.plan, decision.plan, log)
        if not self.settings.prunes_before:  # else scores have served their purpose
            followed = {name: index for name, index in survivors.items() if name in self._scored_names()}
            self.importance.follow(followed)
        warn_of_depth(self.sublayers, self.plan, decision.plan)
        self.plan, self._fading = decision.plan, None
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for path, layer in lora.adapters(self.model):
            if path in decision.ranks:
                lora.grow_rank(path, layer, decision.ranks[path], generator, log)
        self.set_tune(decision.tune)
        self._follow_schedule(step)
        return PruningEvent(step, decision.kind, survivors, dict(log.edits), self.describe(step, decision.kind))

    def set_tune(self, tune: str) -> None:
        """Change what trains; "full" merges the adapters into the base weights first."""
        if tune == "full" and self.tune != "full":
            lora.merge_adapters(self.model)
        self.tune = tune
        set_trainable(self.model, self.family, tune, self.settings, self.norm_paths())

    def detach(self) -> None:
        """Take every observing hook out of the model (masks excepted)."""
        if self._observing:
            self.importance.detach()
            self.rank_score.detach()
            self._observing = False

    @property
    def is_hooked(self) -> bool:
        """Whether hooks of observers or masks are in the model."""
        return self._observing or self.masks.is_open

    def sparsity(self) -> float:
        """Share of the prunable budget of the dense original that is gone, in the unit of ``sparsity_metric``."""
        return 1 - self.cost.total(self.plan.counts) / self.cost.total(self.dense_plan.counts)

    def sparsity_of_start(self) -> float:
        """As :meth:`sparsity`, but of what the model had when it was given here."""
        return 1 - self.cost.total(self.plan.counts) / self.cost.total(self.origin.plan.counts)

    def norm_paths(self) -> list[str]:
        """Norms of the dense model on the residual stream and over all heads of an attention together."""
        return [path for space in self.spaces for path in space.norms]

    def alive_layers(self) -> dict[Stack, list[bool]]:
        """Per stack, which layers still have every sublayer."""
        alive: dict[Stack, dict[int, bool]] = {}
        for sublayer in self.sublayers:
            layers = alive.setdefault(sublayer.stack, {})
            layers[sublayer.layer] = layers.get(sublayer.layer, True) and self.plan.counts[sublayer.space] > 0
        return {stack: [layers[layer] for layer in sorted(layers)] for stack, layers in alive.items()}

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
        }

    def choose(
        self, scores: Mapping[str, torch.Tensor], current: PruningPlan, budget: float, densities: bool
    ) -> PruningPlan:
        """Plan below ``current`` within ``budget``, of the shape that the settings ask for; see ``plan.selection``."""
        choose = select if self.shape is None else self.shape.select
        return choose(scores, self.spaces, current, self.cost, budget, self.limits, densities)

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """(JSON part, tensor part) of everything that is not a weight of the model."""
        json_part = {
            "plan": self.plan.to_json(),
            "start": self.origin.plan.digest(),
            "ranks": lora.ranks(self.model),
            "tune": self.tune,
            "adapter_parameters_at_start": self.adapter_parameters_at_start,
            "observing": self._observing,
            "seconds": self.seconds,
        }
        tensors = {f"masks/{name}": value for name, value in self.masks.state_dict().items()}
        if not self.settings.prunes_before:
            tensors |= {f"importance/{name}": value for name, value in self.importance.state_dict().items()}
        tensors |= {f"ranks/{name}": value for name, value in self.rank_score.state_dict().items()}
        return json_part, {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    def restore_shapes(self, description: Mapping[str, Any]) -> None:
        """Give the model, as it was when the run began, the shapes of a checkpoint, before its weights are loaded.

        Raises as :func:`give_shapes`.
        """
        self.plan = give_shapes(self.model, self.family, self.spaces, self.plan, description)
        self.adapter_parameters_at_start = description["adapter_parameters_at_start"]
        if description.get("seconds") is not None:
            use_seconds(self, description["seconds"])
        self.tune = description["tune"]
        self.set_tune(self.tune)

    def restore_scores(self, json_part: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Put scores and masks of a checkpoint back, after its shapes."""

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        if json_part["observing"]:
            self._attach()
            if not self.settings.prunes_before:
                self.importance.load_state_dict(part("importance/"))
            self.rank_score.load_state_dict(part("ranks/"))
        self.masks.load_state_dict(part("masks/"))

    # ------------------------------------------------------------------ inside

    def _check_budget(self) -> None:
        sparsity = self.settings.target_sparsity
        start, limits = self.origin.plan, self.limits
        least = None if self.shape is None else self.shape.least(self.spaces, start, self.cost, limits)
        check_budget(self.spaces, self.sublayers, start, self.cost, limits, sparsity, least)

    def _insert_adapters(self) -> None:
        s = self.settings
        if s.uses_adapters:
            targets = s.lora_target_modules or self.family.default_targets(self.model)
            layers = self.family.layer_paths(self.model)
            lora.insert_adapters(self.model, targets, s.lora_r, s.lora_alpha, s.lora_dropout, layers)

    def _check_observed(self) -> None:
        if isinstance(self.importance, Observing) and not self.importance.has_observed():
            raise UserError(
                "A step is to be observed, but no forward pass of the model's layers was seen in training mode with "
                "gradients: it would be pruned without scores. Call the model itself in compute_loss (not a copy, not "
                "under no_grad, not after model.eval()), or take importance: magnitude."
            )

    def _scored(self) -> list[Space]:
        return [space for space in self.spaces if space.kind in self.limits.kinds]

    def _scored_names(self) -> set[str]:
        return {space.name for space in self._scored()}

    def _follow_schedule(self, step: int) -> None:
        """Observe from the start of pruning until its last event, and only then; after a cut before training, ranks
        alone."""
        assert self.schedule is not None
        wanted = self.schedule.next_event(step) is not None and step >= self.schedule.start
        if wanted and not self._observing:
            self._attach()
        elif not wanted:
            self.detach()

    def _attach(self) -> None:
        if not self.settings.prunes_before:
            self.importance.attach(self.model, self._scored(), self.plan.counts)
        self.rank_score.attach(self.model)
        self._observing = True

    def _rest(self, resting: bool) -> None:
        self._resting = resting
        self.importance.rest(resting)
        self.rank_score.rest(resting)

    def _select(self, event: int | None) -> PruningPlan:
        """Plan for ``event``; None: the cut before training."""
        assert self.schedule is not None
        dense = self.cost.total(self.dense_plan.counts)
        lost = 1 - self.cost.total(self.origin.plan.counts) / dense
        sparsity = self.schedule.target_sparsity if event is None else self.schedule.sparsity(event, lost)
        budget = (1 - sparsity) * dense
        plan = self.choose(self.importance.scores(self.model), self.plan, budget, self.importance.densities)
        self.importance.check_kept(plan.counts)
        return plan

    def _tune_at(self, step: int) -> str:
        assert self.schedule is not None
        s, tune = self.settings, self.tune
        if s.tune_after_pruning and self.schedule.events and step >= self.schedule.end:
            tune = s.tune_after_pruning
        ended = step >= max(self.schedule.distillation_end, self.schedule.end)
        if s.tune_after_distillation and ended and step > 0:
            tune = s.tune_after_distillation
        return tune

    def _new_ranks(self, event: int, plan: PruningPlan) -> dict[str, int]:
        assert self.schedule is not None
        s = self.settings
        widths = self._adapter_widths(plan)
        ranks = lora.ranks(self.model)
        sizes = [allocation.AdapterSize(path, ranks[path], widths[path]) for path in ranks if path in widths]
        growth = self.schedule.tuning_share(event) * (s.tuning_growth - 1)
        budget = self.adapter_parameters_at_start * (1 + growth)
        return allocation.allocate(sizes, self.rank_score.scores(), budget, s.max_rank, s.rank_growth, s.rank_rule)

    def _adapter_widths(self, plan: PruningPlan) -> dict[str, int]:
        """in + out features of every adapted linear once ``plan`` is applied; those that vanish are left out."""
        sides: dict[tuple[str, str], int] = {}
        for space in self.spaces:
            for part in space.slices:
                sides[part.module, part.side] = plan.counts[space.name] * sum(part.parts)
        gone = tuple(path for sub in self.sublayers if plan.counts[sub.space] == 0 for path in sub.modules)
        widths = {}
        for path, layer in lora.adapters(self.model):
            if not any(path == module or path.startswith(module + ".") for module in gone):
                inputs = sides.get((path, "in"), layer.in_features)
                widths[path] = inputs + sides.get((path, "out"), layer.out_features)
        return widths


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
    apply_plan(model, family, spaces, start, plan)
    lora.grow_to(model, description["ranks"])
    if description["tune"] == "full":
        lora.merge_adapters(model)
    return plan
