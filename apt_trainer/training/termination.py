"""SIGTERM, as clusters send it before they take a machine away: a checkpoint at the next step, then exit code 143.

All processes stop at the same step, whichever of them was told. Their flags are exchanged while a step computes, so
that nobody waits for it. Not for Ctrl-C, which stops at once, nor before training begins or after it has ended.
"""

from __future__ import annotations

import signal
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from apt_trainer.training.engines.agreement import processes

EXIT_TERMINATED = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """Training was ended by SIGTERM after a checkpoint; ``step``: the one it was written at."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_TERMINATED)
        self.step = step


class StopOnSignal(TrainerCallback):
    """``stopped_at``: the step after which the loop was asked to end, or None."""

    def __init__(self) -> None:
        self.stopped_at: int | None = None
        self._asked = False
        self._previous: Any = None
        self._group: Any = None
        self._flag = torch.zeros((), dtype=torch.int32)
        self._exchange: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if processes() > 1 and self._group is None:
            timeout = timedelta(seconds=args.ddp_timeout)  # else a process that failed waits for a hanging one at exit
            self._group = dist.new_group(backend="gloo", timeout=timeout)  # flags stay on the CPU
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._group is not None:
            self._flag.fill_(self._asked)
            self._exchange = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = self._asked
        if self._exchange is not None:
            self._exchange.wait()
            asked, self._exchange = bool(self._flag), None
        if asked:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def leave(self) -> None:
        """Raise :class:`Terminated` if the loop was asked to end."""
        if self.stopped_at is not None:
            raise Terminated(self.stopped_at)

    def _ask(self, number: int, frame: Any) -> None:
        self._asked = True
