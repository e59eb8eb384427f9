"""Which versions of other libraries this package is tested with, and what is said about others.

Only reads versions; imports none of these libraries. Names of theirs that are relied on are in ``private_names``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import Version

from apt_trainer.errors import UserError

_log = logging.getLogger(__name__)


class Tested(NamedTuple):
    """``oldest`` and ``newest`` are what tests run with; ``refused`` is the first version that is not tried."""

    oldest: str
    newest: str
    refused: str


TESTED = {
    "torch": Tested("2.13", "2.14", "3"),
    "transformers": Tested("5.23", "5.24", "6"),
    "peft": Tested("0.19", "0.21", "1"),
    "accelerate": Tested("1.12", "1.15", "2"),
}
"""What every use needs. ``pyproject.toml`` says the same, ``scripts/constraints*.txt`` pin the two ends."""

DEEPSPEED = {"deepspeed": Tested("0.19.8", "0.19.8", "1")}
SENTENCE_TRANSFORMERS = {"sentence-transformers": Tested("6.2", "6.2", "7")}


def installed(package: str) -> str | None:
    """The version that runs, with its local part ("2.13.0+cpu"), or that would; None where there is none."""
    running = getattr(sys.modules.get(package), "__version__", None)
    if running is not None:
        return str(running)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_versions(packages: Mapping[str, Tested] = TESTED) -> None:
    """Raise :class:`UserError` for :func:`refusal`; what is only :func:`newer` is said in the log, once."""
    refused = refusal(packages)
    if refused is not None:
        raise UserError(refused)
    for remark in newer(packages):
        _warn_once(remark)


def refusal(packages: Mapping[str, Tested] = TESTED) -> str | None:
    """What is wrong with the installed ``packages`` where one is too old, or too new to be tried; else None."""
    found = {package: installed(package) for package in packages}
    wrong = [
        f"{package} {found[package]}"
        for package, tested in packages.items()
        if not _release(tested.oldest) <= _release(found[package] or tested.oldest) < _release(tested.refused)
    ]
    if not wrong:
        return None
    wanted = " ".join(f"'{package}>={tested.oldest},<{tested.refused}'" for package, tested in packages.items())
    return (
        f"{' and '.join(wrong)} cannot be used: apt_trainer is tested with {tested_ranges(packages)}. "
        f"Install such versions: pip install {wanted}"
    )


def newer(packages: Mapping[str, Tested] = TESTED) -> list[str]:
    """A sentence for each of ``packages`` that is newer than the newest tested; a fix of that one is not."""
    remarks = []
    for package, tested in packages.items():
        found, newest = installed(package), _release(tested.newest)
        if found is not None and _release(found)[: len(newest)] > newest:
            remarks.append(
                f"{package} {found} is newer than {tested.newest}, the newest that apt_trainer is tested with. "
                "If something is odd, try that one."
            )
    return remarks


def tested_ranges(packages: Mapping[str, Tested] = TESTED) -> str:
    """What is tested, for messages."""
    return ", ".join(f"{package} {_range(tested)}" for package, tested in packages.items())


def _range(tested: Tested) -> str:
    return tested.oldest if tested.oldest == tested.newest else f"{tested.oldest} to {tested.newest}"


def _release(text: str) -> tuple[int, ...]:
    """(major, minor, ...) without what follows: a preview of 5.24 counts as 5.24, "2.13.0+cpu" as 2.13.0."""
    return Version(text).release


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)
