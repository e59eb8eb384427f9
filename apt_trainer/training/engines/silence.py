"""When processes wait for one that no longer answers: which one it is.

Collective calls only say that their time (``ddp_timeout``) is over. Each process that got that far then reports in the
store through which they once met; who has not reported is named. Not for ending a wait: the back end does that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from apt_trainer.errors import RunError
from apt_trainer.training.engines.agreement import processes

PATIENCE = 10.0
"""Seconds that others may take to notice too."""
_KEY = "apt_trainer/answers/"


@contextmanager
def naming_the_silent(seconds: float) -> Iterator[None]:
    """Turn a time-out of a collective call into a :class:`RunError` with the ranks that do not answer.

    ``seconds``: the time after which calls give up, for the message.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own errors of back ends are such
        if processes() == 1 or not _is_timeout(error):
            raise
        silent = _silent()
        who = f"rank(s) {', '.join(map(str, silent))}" if silent else "a rank"
        raise RunError(
            f"{who} did not answer for {seconds:g} s (ddp_timeout), so this run ends. Look at that process and its "
            "machine, then go on with resume_from_checkpoint: true."
        ) from error


def _is_timeout(error: RuntimeError) -> bool:
    text = str(error).lower()
    return "timed out" in text or "timeout" in text


def _silent() -> list[int]:
    """Ranks that do not report within :data:`PATIENCE`; rank 0 where the store, which lives with it, is silent too."""
    found: list[list[int]] = []
    # In a thread of its own: calls to a store whose process is stopped never come back.
    asking = threading.Thread(target=lambda: found.append(_unreported()), daemon=True)
    asking.start()
    asking.join(2 * PATIENCE)
    return found[0] if found else [0]


def _unreported() -> list[int]:
    store = dist.distributed_c10d._get_default_store()
    waiting, deadline = set(range(processes())), time.monotonic() + PATIENCE
    try:
        store.set(f"{_KEY}{dist.get_rank()}", "1")
        while waiting and time.monotonic() < deadline:
            waiting = {rank for rank in waiting if not store.check([f"{_KEY}{rank}"])}
            time.sleep(0.1)
    except RuntimeError:  # its process has ended
        return [0]
    return sorted(waiting)
