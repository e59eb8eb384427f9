"""Measurements kept in a file one by one, so that a study that was killed goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.store.events import append_event, read_events

Line = dict[str, Any]


class Journal:
    """``earlier``: what ``file`` holds, whose first line is ``made_with``, what measurements depend on. Nothing is
    written before :meth:`write`.

    Raises :class:`UserError` where ``file`` was made with something else.
    """

    def __init__(self, file: Path, made_with: Line) -> None:
        events = read_events(file)
        if events and events[0] != made_with:
            raise UserError(f"{file} is of another model, data or tasks. Remove it, or give what it was started with.")
        self.earlier = events[1:]
        self._file = file
        self._held: list[Line] | None = [] if events else [made_with]

    def add(self, line: Line) -> None:
        """Keep one more."""
        if self._held is None:
            append_event(self._file, line)
        else:
            self._held.append(line)

    def write(self) -> None:
        """Write what was held back, and from now on at once."""
        held, self._held = self._held or [], None
        for line in held:
            self.add(line)
