"""Numbers that a Trainer gathers in ``compute_loss`` to log them, as those of TRL do: kept to what it logs itself.

So is what it does beside an evaluation, as the ``evaluator`` of those of sentence-transformers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_GATHERED = ("_metrics", "_total_train_tokens", "accum_loss_components")
_BESIDE = "evaluator"


@contextmanager
def left_alone(trainer: Any) -> Iterator[None]:
    """Passes within it, of the method's own, are not counted in what ``trainer`` logs."""
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in _GATHERED if name in vars(trainer)}
    if _BESIDE in vars(trainer):
        before[_BESIDE], trainer.evaluator = trainer.evaluator, None
    try:
        yield
    finally:
        vars(trainer).update(before)
