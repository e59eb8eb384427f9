"""A loss in which each label has a weight, and what its mean is taken over. Not for choosing weights (``tasks``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from apt_trainer.errors import UserError
from apt_trainer.models.batch import IGNORED
from apt_trainer.models.labels import LABEL_HEADS, MULTI_LABEL, REGRESSION, TOKEN_HEAD, head_of, problem_type


class ClassWeights:
    """``weights``: one per label. Labels of classes: torch's weighted cross-entropy, a mean over weights. Labels that
    are 0 or 1 for each class [rows, labels], in floating point: binary cross-entropy, in which ``weights`` multiply
    the part of the ones (``pos_weight``), a mean over rows and labels.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = torch.tensor(weights, dtype=torch.float32)
        self._copies: dict[torch.device, torch.Tensor] = {}

    def check(self, model: Any) -> None:
        """Raise :class:`UserError` for a model that has no or other labels."""
        head, config = head_of(model), model.config
        if head not in LABEL_HEADS or (head != TOKEN_HEAD and problem_type(config) == REGRESSION):
            raise UserError(
                f"class_weights is for classification, and {type(model).__name__} does something else. Remove it."
            )
        if len(self._weights) != config.num_labels:
            raise UserError(
                f"class_weights gives {len(self._weights)} weights and the model has {config.num_labels} labels. "
                "Give one for each."
            )

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of ``logits`` [..., labels]; scalar float32."""
        weights = self._on(logits.device)
        if labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weights)
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), weights, ignore_index=IGNORED)

    def total(self, labels: torch.Tensor) -> torch.Tensor:
        """What :meth:`loss` is a mean over: the sum of weights, or the number of rows and labels; scalar float32."""
        if labels.is_floating_point():
            return labels.new_full((), labels.numel(), dtype=torch.float32)
        counted = labels != IGNORED
        return (self._on(labels.device)[labels.where(counted, 0)] * counted).sum()

    def _on(self, device: torch.device) -> torch.Tensor:
        if device not in self._copies:
            self._copies[device] = self._weights.to(device)
        return self._copies[device]


def check_smoothing(factor: float, problem: str | None, weighed: bool) -> None:
    """Raise :class:`UserError` where label smoothing would replace another loss than the one it is made for.

    ``problem``: the ``problem_type`` of a model with one output per label; ``weighed``: whether labels have weights.
    """
    if factor > 0 and (weighed or problem in (MULTI_LABEL, REGRESSION)):
        other = "class_weights" if weighed else f"a model for {problem}"
        raise UserError(
            f"label_smoothing_factor={factor} makes a loss of its own for one label per row, and {other} another. "
            "Remove one of them."
        )
