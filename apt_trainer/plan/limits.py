"""Which units may go: kinds, multiples and minimums; and warnings when too much has gone.

Not for choosing among them (``selection``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apt_trainer.models import HIDDEN, Space, Sublayer
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings import PruningSettings

SAFE_DEPTH = 0.3
"""Share of sublayers above which models are seldom good again, and tuning may harm more than it mends
(arXiv 2407.09298)."""

LEAST_DEPTH = 3
"""Of so many attentions, and of so many feed-forwards, one has to be left; ours: with less little can be learnt."""

COLLAPSE_MARGIN = 0.1
"""Loss above twice the one before a cut from which on the user is warned."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Multiples and minimums per kind, and which kinds may lose units at all.

    ``scoring.sublayers``: a whole attention or feed-forward may go in one piece, minimums and kinds notwithstanding.
    """

    targets: frozenset[str]
    round_to: Mapping[str, int]
    minimum: Mapping[str, int]
    sublayers: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of spaces that may shrink."""
        return self.targets | {"heads", "neurons"} if self.sublayers else self.targets

    def core(self, space: Space, left: int) -> int:
        """Units of ``space``, of which ``left`` are left, that stay or go together."""
        if space.kind not in self.targets:
            return left
        multiple = self.round_to[space.kind]
        minimum = min(left, max(self.minimum[space.kind], space.minimum))
        return min(left, -(-minimum // multiple) * multiple)

    def floor(self, space: Space, left: int) -> int:
        """Units that stay in any case."""
        whole = self.sublayers and space.kind != HIDDEN and space.minimum == 0
        return 0 if whole else self.core(space, left)


def limits_of(settings: PruningSettings) -> Limits:
    """The limits that a recipe sets."""
    return Limits(
        targets=frozenset(settings.prune_targets) - {"sublayers"},
        round_to={"heads": 1, "neurons": settings.round_to, "experts": 1, HIDDEN: settings.round_to},
        minimum={
            "heads": settings.min_heads,
            "neurons": settings.min_neurons,
            "experts": 1,  # a space keeps as many as its router sends a token to
            HIDDEN: settings.min_hidden,
        },
        sublayers="sublayers" in settings.prune_targets,
    )


def warn_of_depth(sublayers: Sequence[Sublayer], before: PruningPlan, after: PruningPlan) -> None:
    """Log a warning when ``after`` is the first plan that is without more than ``SAFE_DEPTH`` of the sublayers."""
    gone = [sum(plan.counts[s.space] == 0 for s in sublayers) / len(sublayers) for plan in (before, after)]
    if gone[0] <= SAFE_DEPTH < gone[1]:
        _log.warning(
            "%.0f %% of the attentions and feed-forwards are gone. Models seldom recover from more than %.0f %%; "
            "a lower target_sparsity, or prune_targets with heads and neurons, costs less.",
            100 * gone[1],
            100 * SAFE_DEPTH,
        )


def warn_of_collapse(step: int, loss_before: float | None, loss_after: float | None) -> None:
    """Log a warning when a cut more than doubled the loss of a batch; None: not measured."""
    if loss_before is None or loss_after is None or loss_after <= 2 * loss_before + COLLAPSE_MARGIN:
        return
    slower = "use pruning_time: early" if step == 0 else "raise num_pruning_events or mask_window"
    _log.warning(
        f"step {step}: the cut raised the loss of a batch from {loss_before:.3f} to {loss_after:.3f}. If it does not "
        f"recover, {slower}, or keep a floor with min_heads and min_neurons."
    )
