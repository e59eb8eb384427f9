"""How long a run trains until it is nearly as good as full fine-tuning (APT, Sec. 5.1: time to 97 % of its metric).

Only evaluations of the finished shape count: what reaches the mark before the last cut may fall below it again. The
time that evaluating takes is left out. Not for choosing when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState


class Evaluation(NamedTuple):
    """``value`` of the metric after ``step`` steps, which took ``seconds`` of training."""

    step: int
    seconds: float
    value: float


def first_reaching(
    evaluations: Sequence[Sequence[float]], mark: float, greater_is_better: bool = True
) -> Sequence[float] | None:
    """The first of the ``evaluations`` of a run (as :class:`Evaluation`) that reached ``mark``; None if none did."""
    sign = 1 if greater_is_better else -1
    return next((each for each in evaluations if sign * each[2] >= sign * mark), None)


class TimeToAccuracy(TrainerCallback, ExportableState):
    """Watches the evaluations of one run: ``evaluations`` are those of its finished shape.

    Args:
        metric: name in the evaluations, with its prefix ("eval_accuracy").
        is_pruned: whether the model has its final shape by now.

    What a resumed run had trained before counts.
    """

    def __init__(self, metric: str, is_pruned: Callable[[], bool] = lambda: True) -> None:
        self.metric, self.is_pruned = metric, is_pruned
        self.evaluations: list[Sequence[float]] = []
        self._trained = 0.0
        self._since: float | None = None

    def record(self, mark: float, greater_is_better: bool = True) -> dict[str, Any]:
        """``seconds`` and ``step`` of the first evaluation that reached ``mark``, both None if none did."""
        found = first_reaching(self.evaluations, mark, greater_is_better)
        step, seconds, _ = (None, None, None) if found is None else found
        return {"mark": mark, "seconds": seconds, "step": step}

    def state(self) -> dict[str, Any]:
        return {
            "args": {"metric": self.metric},
            "attributes": {"evaluations": self.evaluations, "_trained": self._elapsed()},
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
        if self.is_pruned():
            self.evaluations.append(Evaluation(state.global_step, self._trained, metrics[self.metric]))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._since = None

    def _elapsed(self) -> float:
        return self._trained + (time.perf_counter() - self._since if self._since is not None else 0.0)
