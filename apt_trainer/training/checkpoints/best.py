"""``load_best_model_at_end`` for a model that is cut while it trains: only evaluations within the final budget count.

An evaluation before the last cut is one of a larger model, so it neither becomes the best nor keeps a checkpoint from
being cleared away. See ``distillation`` for choosing a teacher.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from apt_trainer.errors import UserError
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.schedule import Schedule
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.settings.config import APTConfig
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.frozen_base import freeze_base
from apt_trainer.surgery.tuning import TRANSFORM
from apt_trainer.training.checkpoints import state
from apt_trainer.training.checkpoints.whole import WholeCheckpoints
from apt_trainer.training.engines.agreement import agree
from apt_trainer.training.termination import StopOnSignal

logger = logging.getLogger(__name__)


def check_candidates(args: APTConfig, schedule: Schedule) -> Schedule:
    """``schedule``; raises :class:`UserError` where it leaves nothing to choose among, before anything is trained."""
    if args.early_stopping_patience is not None and schedule.end >= schedule.total:
        raise UserError(
            f"early_stopping_patience counts evaluations after the last change of shape, but that is at step "
            f"{schedule.end} of {schedule.total}. Remove it, or end pruning earlier (pruning_end)."
        )
    chooses = args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST
    if not chooses:
        return schedule
    setting = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy: best"
    if args.metric_for_best_model is None:
        raise UserError(f"{setting} needs metric_for_best_model, for example loss.")
    if not schedule.meets_budget(schedule.total - 1):
        raise UserError(
            f"{setting} chooses among models that meet the final budget, but units are cut until step {schedule.end} "
            f"of {schedule.total}, so that only the final model does. Remove it, or end pruning earlier."
        )
    if args.eval_strategy == "steps" and args.eval_delay > schedule.total:
        raise UserError(
            f"{setting} needs evaluations, but eval_delay={args.eval_delay} is more than the {schedule.total} steps. "
            "Lower eval_delay."
        )
    return schedule


def check_metric(args: APTConfig, metrics: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` at the first evaluation, not only at the first that counts, for an unknown metric."""
    name = args.metric_for_best_model
    if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
        known = ", ".join(sorted(metric.removeprefix("eval_") for metric in metrics))
        raise UserError(f"metric_for_best_model={name!r} is no metric of the evaluation. Choose one of {known}.")


def load_weights(path: Path, model: nn.Module, pruner: AdaptivePruner) -> bool:
    """Give the merged ``model`` the merged weights of a checkpoint of equal plan; False if its plan is another.

    The checkpoint may hold adapters of other ranks than the run ended with, or none: they are put back as they were,
    filled and merged again. Raises :class:`UserError` for an incomplete or damaged checkpoint.
    """
    described = state.read_description(path)["pruner"]
    if PruningPlan.from_json(described["plan"]) != pruner.plan:
        return False
    if described["ranks"]:
        lora.insert_of_ranks(pruner.model, described["ranks"], pruner.settings.lora_r, pruner.settings.lora_alpha)
    if described.get("base_quantization") is not None:
        freeze_base(pruner.model, pruner.family, described["base_quantization"])
    state.load_training_weights(path / state.WEIGHTS_FILE, model, leave_out=TRANSFORM)
    pruner.merge_adapters()
    return True


class BestWithinBudget(WholeCheckpoints):
    """Hugging Face's choice of the best checkpoint, from the step on at which the final budget is met."""

    args: APTConfig
    schedule: Schedule
    pruner: AdaptivePruner
    _stop: StopOnSignal
    _told = False

    def load_best(self) -> None:
        """Once adapters are merged: with ``load_best_model_at_end``, fill the model from the best checkpoint."""
        if not self.args.load_best_model_at_end:
            return
        found = self.state.best_model_checkpoint
        path = None if found is None or not Path(found).is_dir() else Path(found)
        damaged = [] if path is None else [f for f in state.OF_WEIGHTS if state.damage(path / f) is not None]
        if damaged:  # told, not raised: the final model is there
            self._tell(f"{', '.join(damaged)} of {path} is damaged or missing; the final model is kept.")
            found = path = None
        agree("the best checkpoint", self.state.global_step, None if path is None else path.name)
        if path is not None and load_weights(path, self.model, self.pruner):
            self._tell(
                f"Loaded the best checkpoint within the budget, {path.name} "
                f"({self.args.metric_for_best_model}: {self.state.best_metric:.6g})."
            )
        elif found is not None:
            self._tell(f"The best checkpoint {found} is gone or has another shape; the final model is kept.")
        elif not damaged:
            self._tell("No checkpoint was evaluated within the final budget; the final model is kept.")

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the model is the best within the budget; with ``save_strategy: best`` it is saved if this is True,
        and so is the one that SIGTERM stops at."""
        check_metric(self.args, metrics)
        stopped = self._stop.stopped_at is not None
        if self.schedule.meets_budget(self.state.global_step):
            return super()._determine_best_metric(metrics, trial) or stopped
        if self.args.metric_for_best_model is not None and not self._told:
            self._told = True
            self._tell(
                f"Evaluations before step {self.schedule.end}, where the final budget is met, do not count for the "
                "best checkpoint."
            )
        return stopped

    def _load_best_model(self) -> None:
        """Nothing: :meth:`load_best` comes when the model has left its engine."""

    def _finalize_training(self, *args: Any) -> Any:
        """Where SIGTERM ended the run, ``save_total_limit: 1`` must not clear away what resuming starts from."""
        if self._stop.stopped_at is not None:
            self.state.best_model_checkpoint = None
        return super()._finalize_training(*args)

    def _tell(self, message: str) -> None:
        if self.is_world_process_zero():
            logger.warning("%s", message)
