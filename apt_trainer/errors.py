"""The exceptions a user is meant to see. Not for internal invariants: those are plain ``assert``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from types import TracebackType


class UserError(ValueError):
    """Something the user gave cannot work: says what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on although its settings are right; the command line prints it and exits with status 1."""


class Retold:
    """Context in which whatever fails is raised as ``retell(error)``, from the error; signals and exits pass.

    For code of others, which may raise anything. ``retell`` returns the error itself where nothing is to be added.
    """

    def __init__(self, retell: Callable[[Exception], Exception]) -> None:
        self.retell = retell

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            told = self.retell(error)
            if told is not error:
                raise told from error


class Noted:
    """Context in which whatever fails is given to ``note``, and what follows is done all the same; signals and exits
    pass."""

    def __init__(self, note: Callable[[Exception], None]) -> None:
        self.note = note

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        self.note(error)
        return True


def reason(error: Exception) -> str:
    """The first line of what ``error`` says, after the name of its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def unknown_choice(setting: str, given: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a closed list, naming the nearest allowed one."""
    allowed = list(allowed)
    close = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"{setting}={given!r} is not known. Choose one of: {', '.join(allowed)}.{hint}")
