"""SIGTERM, as clusters send it before they take a machine away: a checkpoint at the next step, then exit code 143.

All processes stop at the same step, whichever of them was told. Their flags are exchanged while a step computes, so
that nobody waits for it. Ctrl-C stops at once, and so does SIGTERM before training begins and after it has ended; but
what is being saved then is saved (:func:`finishing`).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

from apt_trainer.training.engines.agreement import processes

EXIT_TERMINATED = 128 + signal.SIGTERM
_log = logging.getLogger(__name__)


class Terminated(SystemExit):
    """Training was ended by SIGTERM after a checkpoint; ``step``: the one it was written at."""

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_TERMINATED)
        self.step = step


@contextmanager
def finishing(what: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect when the block has ended; the second of them at once. ``what`` it does."""
    told: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if told:
            give_back()
            signal.raise_signal(number)
        told.append(number)
        _log.warning("Told to end: %s first. Once more ends at once.", what)

    def give_back() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, hold) for number in numbers}
    try:
        yield
    finally:
        give_back()
    if told:
        signal.raise_signal(told[0])


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as an exception does, so that processes it started and temporary folders go.

    Not in a process of a launcher: told to end while it waits for others, it has to end at once.
    """

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    alone = "RANK" not in os.environ and threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, leave) for number in ((signal.SIGTERM, signal.SIGHUP) if alone else ())}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


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
