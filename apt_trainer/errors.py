"""The exceptions a user is meant to see. Not for internal invariants: those are plain ``assert``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot work: says what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that cannot go on although its settings are right; the command line prints it and exits with status 1."""


def unknown_choice(setting: str, given: object, allowed: Iterable[str]) -> UserError:
    """Build the error for a value outside a closed list, naming the nearest allowed one."""
    allowed = list(allowed)
    close = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"{setting}={given!r} is not known. Choose one of: {', '.join(allowed)}.{hint}")
