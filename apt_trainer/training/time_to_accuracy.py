"""How long a run trains until it is nearly as good as full fine-tuning (APT, Sec. 5.1: time to 97 % of its metric).

Only evaluations of the finished shape count: what reaches the mark before the last cut may fall below it again. The
time that evaluating takes is left out. Not for choosing when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState


class TimeToAccuracy(TrainerCallback, ExportableState):
    """Watches the evaluations of one run.

    Args:
        metric: name in the evaluations, with its prefix ("eval_accuracy").
        mark: value to be reached.
        greater_is_better: False for perplexity and the like.
        is_pruned: whether the model has its final shape by now.

    After training ``record()`` holds ``seconds`` and ``step`` of the first evaluation that reached the mark, both None
    if none did. What a resumed run had trained before counts.
    """

    def __init__(
        self, metric: str, mark: float, greater_is_better: bool = True, is_pruned: Callable[[], bool] = lambda: True
    ) -> None:
        self.metric, self.mark, self.greater_is_better, self.is_pruned = metric, mark, greater_is_better, is_pruned
        self.seconds: float | None = None
        self.step: int | None = None
        self._trained = 0.0
        self._since: float | None = None

    def record(self) -> dict[str, Any]:
        return {"mark": self.mark, "seconds": self.seconds, "step": self.step}

    def state(self) -> dict[str, Any]:
        return {
            "args": {"metric": self.metric, "mark": self.mark, "greater_is_better": self.greater_is_better},
            "attributes": {"seconds": self.seconds, "step": self.step, "_trained": self._elapsed()},
        }

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = time.perf_counter()
        found = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        for name, value in (found or {}).get("attributes", {}).items():
            setattr(self, name, value)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._since is None or metrics is None or self.metric not in metrics:
            return
        now = time.perf_counter()
        self._trained += now - self._since - metrics.get(f"{self.metric.partition('_')[0]}_runtime", 0.0)
        self._since = now
        value = metrics[self.metric]
        reached = value >= self.mark if self.greater_is_better else value <= self.mark
        if reached and self.seconds is None and self.is_pruned():
            self.seconds, self.step = self._trained, state.global_step

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = None

    def _elapsed(self) -> float:
        return self._trained + (time.perf_counter() - self._since if self._since is not None else 0.0)
