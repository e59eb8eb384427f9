"""Calls what an :class:`APTTrainer` does between steps at the right moments of Hugging Face's loop; holds no logic."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from apt_trainer.models import norm_paths
from apt_trainer.training import norms


class MethodCallback(TrainerCallback):
    """``trainer``: has ``between_steps``, which one run after the other makes anew, and a ``pruner``."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.args.recompute_norms:
            norms.recompute(self.trainer.transformer, norm_paths(self.trainer.pruner.spaces))
        self.trainer.between_steps.start()

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        norms.plain(self.trainer.model)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.between_steps.before_step()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.pruner.observe()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.between_steps.after_step()
