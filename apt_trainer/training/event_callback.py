"""Callbacks that hear of what changes the model: cuts, ranks, teachers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerState

from apt_trainer.errors import Noted

logger = logging.getLogger(__name__)


class EventCallback(TrainerCallback):
    """Also hears of each record of ``events.jsonl``, in the process that writes it."""

    def on_model_event(
        self, args: Any, state: TrainerState, record: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        """``before``: sizes, ranks and what trained right before it."""


def tell_event(trainer: Any, record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Let the callbacks of ``trainer`` hear of ``record``. Where one fails, training goes on: the other processes do
    not hear of it, and would wait for this one."""

    def note(error: Exception) -> None:
        logger.warning("Step %s goes on, but telling of it failed.", record["step"], exc_info=error)

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EventCallback):
            with Noted(note):
                callback.on_model_event(trainer.args, trainer.state, record, before)
