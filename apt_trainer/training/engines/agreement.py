"""Processes compare what they decided, so that a disagreement stops the run instead of spoiling the model.

Not for making decisions equal: they follow from reduced scores.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from apt_trainer.errors import RunError, UserError


class Disagreement(RunError):
    """Processes that should be equal are not."""


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agree(what: str, step: int, *parts: object) -> None:
    """Exchange a hash of ``parts``; must be called by all processes.

    Raises:
        Disagreement: on every process, with the ranks that differ from most (from rank 0 where that is a tie).
    """
    if processes() == 1:
        return
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    digests: list[Any] = [None] * processes()
    dist.all_gather_object(digests, digest)
    different = outliers(digests)
    if different:
        ranks = ", ".join(map(str, different))
        raise Disagreement(
            f"step {step}: processes disagree on {what}; rank(s) {ranks} differ from the others. "
            "Look at the devices and the software of those processes, then resume from the last checkpoint."
        )


@contextmanager
def failing_together() -> Iterator[None]:
    """Context that all processes enter and leave: a :class:`UserError` or :class:`RunError` of one of them is raised
    on all, so that none waits for those that have failed."""
    failure: UserError | RunError | None = None
    try:
        yield
    except (UserError, RunError) as error:
        failure = error
    failures: list[Any] = [failure and (isinstance(failure, UserError), str(failure))] * processes()
    if processes() > 1:
        dist.all_gather_object(failures, failures[0])
    if failure is not None:
        raise failure
    for told in failures:
        if told is not None:
            raise (UserError if told[0] else RunError)(told[1])


def outliers(digests: list[str]) -> list[int]:
    """Ranks whose digest is not the most common one; the first of equally common ones counts."""
    usual = Counter(digests).most_common(1)[0][0]
    return [rank for rank, digest in enumerate(digests) if digest != usual]
