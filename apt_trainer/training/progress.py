"""What a run says on standard error: one bar with a name where that is a terminal, and a line for all that happens.

In a notebook: the progress table of transformers, and above it the picture of the run, drawn anew at every event.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import has_length
from transformers.utils.import_utils import is_in_notebook

from apt_trainer.libraries.quiet import write_line
from apt_trainer.report.story import estimate_line, evaluation_line, event_line, progress_line
from apt_trainer.report.tables import format_seconds
from apt_trainer.training.event_callback import EventCallback

TIMED = 10
"""Steps after which the time to come is estimated."""
_SHARE, _SECONDS = 0.1, 60.0  # of all steps, and time, after which a log is a line of its own where there is no bar


@contextmanager
def unseen(trainer: Any) -> Iterator[None]:
    """Batches within it, of the method's own evaluations, show in no bar."""
    handler = trainer.callback_handler
    shown = handler.callbacks
    bars = (ProgressCallback, _notebook_table()) if is_in_notebook() else ProgressCallback
    handler.callbacks = [callback for callback in shown if not isinstance(callback, bars)]
    try:
        yield
    finally:
        handler.callbacks = shown


def use_run_progress(trainer: Any, name: str = "training", logs_too: bool = False) -> None:
    """Put :class:`RunProgress` in the place of transformers' own bar; ``logs_too``: of its printed logs as well. In a
    notebook, add the :class:`LivePicture`."""
    callbacks = trainer.callback_handler.callbacks
    replaced = (ProgressCallback, PrinterCallback, RunProgress) if logs_too else (ProgressCallback,)
    for i, callback in enumerate(callbacks):
        if type(callback) in replaced:
            callbacks[i] = RunProgress(name, trainer)
        elif is_in_notebook() and type(callback) is _notebook_table():
            from apt_trainer.training.live_picture import LivePicture  # which draws, so loads what draws

            callbacks.append(LivePicture())
            return


def _notebook_table() -> type[TrainerCallback]:
    from transformers.utils.notebook import NotebookProgressCallback

    return NotebookProgressCallback


class RunProgress(ProgressCallback, EventCallback):
    """Bar and lines of a run of ``trainer``, called ``name``; only the main process speaks."""

    training_bar: Any
    prediction_bar: Any

    def __init__(self, name: str, trainer: Any) -> None:
        super().__init__()
        self.name, self._trainer = name, trainer
        self._begun = self._started = self._line_at = 0.0
        self._seconds: list[float] = []
        self._steps_at_line = 0
        self._cut = False

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._begun = self._line_at = time.perf_counter()
        self._seconds, self._steps_at_line, self._cut = [], state.global_step, False
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.name,
            unit=" steps",
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
            disable=True if args.disable_tqdm else None,  # None: unless it is a terminal
        )

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        self.training_bar.update(state.global_step - self.training_bar.n)
        if len(self._seconds) >= TIMED:
            return
        self._seconds.append(time.perf_counter() - self._started)
        remaining = state.max_steps - state.global_step
        if len(self._seconds) == TIMED and remaining > TIMED:
            mean = sum(self._seconds) / TIMED
            write_line(estimate_line(state.global_step, mean, remaining, self._cut, self._cuts_are_to_come()))

    def on_model_event(
        self, args: Any, state: TrainerState, record: Mapping[str, Any], before: Mapping[str, Any]
    ) -> None:
        write_line(event_line(record, before, args.sparsity_metric))
        if record["kind"] == "prune" and state.global_step and not self._cuts_are_to_come():
            self._cut, self._seconds = True, []  # steps are timed anew

    def _cuts_are_to_come(self) -> bool:
        trainer = self._trainer
        prunes = hasattr(trainer, "pruner") and trainer.pruner.settings.prunes
        return prunes and not trainer.schedule.meets_budget(trainer.state.global_step)

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if not (state.is_world_process_zero and has_length(eval_dataloader)):
            return
        if self.prediction_bar is None:
            off = True if args.disable_tqdm else None
            total = len(eval_dataloader)
            self.prediction_bar = tqdm(total=total, desc="evaluating", leave=False, file=sys.stderr, disable=off)
        self.prediction_bar.update(1)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        if state.is_world_process_zero and metrics:
            write_line(evaluation_line(state.global_step, metrics, self.training_bar is not None))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or "loss" not in (logs or {}):
            return
        if not self.training_bar.disable:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.4g}", refresh=False)
            return
        steps, now = state.global_step - self._steps_at_line, time.perf_counter()
        if steps >= _SHARE * state.max_steps or now - self._line_at >= _SECONDS:
            self._steps_at_line, self._line_at = state.global_step, now
            write_line(progress_line(state.global_step, state.max_steps, logs))

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None
            done = format_seconds(time.perf_counter() - self._begun)
            write_line(f"step {state.global_step} · {self.name} has ended after {done}")
