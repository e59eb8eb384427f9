"""The end of a run whose metric does not get better, counted from the last change of shape on.

A cut makes a model worse before it recovers, so that evaluations before it say nothing of what is to come. What counts
is read from the log of the run, so that a resumed run stops where a straight one does.
"""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

logger = logging.getLogger(__name__)


class EarlyStopping(TrainerCallback):
    """``trainer``: has a ``schedule``, and ``early_stopping_patience`` among its arguments."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def is_met(self, state: TrainerState) -> bool:
        """Whether a run with this log has come to its end, which its checkpoint does not say."""
        patience = self.trainer.args.early_stopping_patience
        return patience is not None and self._waited(state) >= patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_training_stop or not self.is_met(state):
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            kept = "" if args.load_best_model_at_end else "; load_best_model_at_end: true would keep the best model"
            logger.warning(
                "Training ends at step %d of %d: %s has not got better in %d evaluations%s.",
                state.global_step,
                state.max_steps,
                self._name,
                self._waited(state),
                kept,
            )

    @property
    def _name(self) -> str:
        return f"eval_{self.trainer.args.metric_for_best_model.removeprefix('eval_')}"

    def _waited(self, state: TrainerState) -> int:
        """How many evaluations have brought nothing."""
        args, end = self.trainer.args, self.trainer.schedule.end
        values = [log[self._name] for log in state.log_history if self._name in log and log["step"] >= end]
        return _since_the_best(values, args.greater_is_better, args.early_stopping_threshold)


def _since_the_best(values: list[float], greater_is_better: bool, threshold: float) -> int:
    """How many of ``values`` came after the last one that was better than all before it by more than ``threshold``."""
    best, waited = None, 0
    for value in values if greater_is_better else [-value for value in values]:
        if best is None or value > best + threshold:
            best, waited = value, 0
        else:
            waited += 1
    return waited
