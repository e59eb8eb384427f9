"""Settings of the training loop that ``TrainingArguments`` does not have."""

from __future__ import annotations

from dataclasses import dataclass

from apt_trainer.errors import UserError
from apt_trainer.settings.choices import setting


@dataclass
class LoopSettings:
    """When training ends before its last step."""

    early_stopping_patience: int | None = setting(
        None,
        "End training once metric_for_best_model (default: the metric of the task, in Python the loss) has not got "
        "better in so many evaluations, of those after the last change of shape. Needs eval_strategy; with "
        "load_best_model_at_end the best model is kept, else the last one.",
    )
    early_stopping_threshold: float = setting(0.0, "How much counts as better.")

    def check_loop(self) -> None:
        """Raise :class:`UserError` for the first setting that cannot work."""
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise UserError(f"early_stopping_patience={self.early_stopping_patience} must be at least 1.")
        if self.early_stopping_threshold < 0:
            raise UserError(f"early_stopping_threshold={self.early_stopping_threshold} must be at least 0.")
