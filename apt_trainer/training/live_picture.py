"""In a notebook: the picture of the run, drawn anew whenever the model has changed."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from transformers import TrainerControl, TrainerState

from apt_trainer.report.plots import plot_run
from apt_trainer.training.event_callback import EventCallback

DPI = 50


class LivePicture(EventCallback):
    """What is left of each layer, losses and ranks, in one output of the cell."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._shown: Any = None

    def on_model_event(
        self, args: Any, state: TrainerState, record: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        self._events.append(dict(record))
        self._draw(state, f"step {state.global_step} of {state.max_steps}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._events:
            self._draw(state, f"{state.global_step} steps")

    def _draw(self, state: TrainerState, title: str) -> None:
        from IPython.display import Image, display

        file = io.BytesIO()
        plot_run(self._events, state.log_history, file, title, dpi=DPI)
        picture = Image(data=file.getvalue(), format="png")
        if self._shown is None:
            self._shown = display(picture, display_id=True)
        else:
            self._shown.update(picture)
