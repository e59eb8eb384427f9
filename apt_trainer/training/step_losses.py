"""Losses of optimizer steps: what each micro-batch weighs, whether all were finite, the means that are logged.

Waits for the device only when it is asked for a verdict or for means. Not for computing a loss (``trainer``,
``distillation.session``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily
from apt_trainer.models.class_weights import ClassWeights
from apt_trainer.models.shares import Shares, count


class StepLosses:
    """``together``: whether the micro-batches of all processes of ``accelerator`` are weighed as one batch; otherwise
    those of each are, and processes count alike. ``weights``: of the labels in the task's loss."""

    def __init__(
        self, family: ModelFamily, accelerator: Any, together: bool = True, weights: ClassWeights | None = None
    ) -> None:
        self.family, self.accelerator, self.together, self.weights = family, accelerator, together, weights
        self._counted: torch.Tensor | None = None
        self._finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        self._noted: dict[str, dict[int, torch.Tensor]] = {}

    def begin(self, batches: Sequence[Mapping[str, Any]], model: nn.Module) -> None:
        """Count over all micro-batches of a step; collective where processes are weighed together."""
        if batches:
            counted = torch.stack([count(batch, self.family, model, self.weights) for batch in batches]).sum(0)
            counted = counted.to(self.accelerator.device)
            self._counted = self.accelerator.reduce(counted, reduction="sum") if self.together else counted

    def end(self) -> None:
        """After the last backward pass of a step."""
        self._counted = None

    def shares(self, inputs: Mapping[str, Any], model: nn.Module) -> Shares:
        """What a micro-batch of the step counts; outside of a step a batch stands alone."""
        if self._counted is None:
            return Shares.whole(self.family)
        counted = count(inputs, self.family, model, self.weights)
        return Shares.of(counted, self._counted, self.processes, self.family)

    @property
    def processes(self) -> int:
        """How many processes are weighed together."""
        return int(self.accelerator.num_processes) if self.together else 1

    def labels(self) -> torch.Tensor | None:
        """How many labels the losses of the step are means over; None outside of a step."""
        return None if self._counted is None else self._counted[0]

    def note(self, name: str, value: torch.Tensor, step: int) -> None:
        """Add the part of one micro-batch to a loss of ``step``."""
        of_steps, value = self._noted.setdefault(name, {}), value.detach()
        of_steps[step] = of_steps[step] + value if step in of_steps else value

    def means(self) -> dict[str, float]:
        """Mean of each noted loss over steps and processes since this was last called; collective."""
        parts = {name: torch.stack(list(of_steps.values())).mean() for name, of_steps in self._noted.items()}
        self._noted.clear()
        return {name: float(self.accelerator.reduce(part, reduction="mean")) for name, part in parts.items()}

    def look_at(self, loss: torch.Tensor) -> None:
        """Remember whether ``loss`` is finite."""
        self._finite.logical_and_(torch.isfinite(loss))

    def check_finite(self, step: int) -> None:
        """Raise :class:`UserError` if any loss so far was not finite."""
        if not bool(self._finite):
            raise UserError(
                f"The training loss is not finite at or before step {step}; nothing was saved. "
                "Lower learning_rate or full_learning_rate, or look at the data."
            )
