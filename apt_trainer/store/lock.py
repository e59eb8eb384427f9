"""One run or study at a time in an output folder.

A launcher that was killed can leave its workers training; started again, two runs would write to one folder. Not for
checkpoints that were cut off: those are recognised when they are read (``training.checkpoints``).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

from apt_trainer.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 30.0
"""Seconds in which the processes of a run that was told to end may do so."""


class FolderLock:
    """Context in which no other process that has one too goes on with the same ``folder``.

    The lock is the system's (``flock`` of the folder, which leaves no file beside a model) and ends with the process,
    however that ends, and with those that it gave its ``handles`` to; where the system or the file system has none,
    nothing is checked. Entering takes it if the folder exists; who makes the folder calls :meth:`take` then.
    ``patience``: seconds to wait for another process; default: :data:`PATIENCE`.
    """

    def __init__(self, folder: Path, patience: float | None = None) -> None:
        self.folder = folder
        self._patience = PATIENCE if patience is None else patience
        self._handle: int | None = None

    @property
    def handles(self) -> tuple[int, ...]:
        """File descriptors that keep the lock, none where there is no lock."""
        return () if self._handle is None else (self._handle,)

    def __enter__(self) -> FolderLock:
        if self.folder.is_dir():
            self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def take(self) -> None:
        """Wait for the lock, if it is not held already.

        Raises:
            UserError: when another process still has it after ``patience`` seconds.
        """
        if fcntl is None or self._handle is not None:
            return
        self._handle = os.open(self.folder, os.O_RDONLY)
        end = time.monotonic() + self._patience
        while not _locked(self._handle):
            if time.monotonic() > end:
                raise UserError(
                    f"Another run is writing to {self.folder}. Wait for it, end its processes, or choose another "
                    "output_dir."
                )
            time.sleep(0.2)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no locks
        return True
    return True
