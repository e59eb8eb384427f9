"""What the losses of a batch are means over, and what each counts among the micro-batches of its optimizer step.

The task's loss is a mean over labels, a distance to a teacher one over predictions or over the real tokens of a stack.
Weighed by its share, the sum over the micro-batches of a step and the mean over processes, which engines take, make
the mean over all of them, however the rows are spread. Not for the losses themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from apt_trainer.models.base import Stack
from apt_trainer.models.batch import IGNORED, has_label_per_token, of_stack, predicted_tokens, real_tokens
from apt_trainer.models.class_weights import ClassWeights
from apt_trainer.models.family import ModelFamily


@dataclass(frozen=True)
class Shares:
    """Weights of the means of one micro-batch, scalars on its device: 1 for a batch that is the whole step.

    ``labels``: of the task's loss; ``predictions`` and ``tokens``, by stack: of the distances to a teacher.
    """

    labels: torch.Tensor
    predictions: torch.Tensor
    tokens: Mapping[Stack, torch.Tensor]

    @classmethod
    def of(cls, counted: torch.Tensor, all_counted: torch.Tensor, processes: int, family: ModelFamily) -> Shares:
        """``counted``: :func:`count` of the micro-batch; ``all_counted``: its sum over the step and ``processes``."""
        labels, predictions, *tokens = (counted * processes / all_counted).unbind()
        stacks = (table.stack for table in family.stacks)
        return cls(labels, predictions, dict(zip(stacks, tokens, strict=True)))

    @classmethod
    def whole(cls, family: ModelFamily) -> Shares:
        """Those of a batch that stands alone."""
        one = torch.ones(())
        return cls(one, one, {table.stack: one for table in family.stacks})

    def of_task(self, loss: torch.Tensor) -> torch.Tensor:
        """The weighed ``loss`` of the task: 0 without labels, where it is no number. A step without any stays one."""
        return torch.where(self.labels == 0, 0.0, self.labels * loss)


def count(
    inputs: Mapping[str, Any], family: ModelFamily, model: nn.Module, weights: ClassWeights | None = None
) -> torch.Tensor:
    """[2 + stacks] int64 of a batch: labels, predictions, real tokens of each stack of ``family``.

    Labels and predictions are rows where there is none, or not one per token. With ``weights``, labels are the sum of
    theirs and all numbers float32.
    """
    stacks = [table.stack for table in family.stacks]
    labels, tokens = inputs.get("labels"), real_tokens(inputs, family)
    rows = _positions(inputs, stacks[0]).flatten(1)[:, 0]
    counted, places = None, rows
    if labels is not None and labels.is_floating_point():  # numbers, of which none is ignored
        places = labels
    elif labels is not None:
        counted = (labels[:, 1:] if family.head(model).next_token else labels) != IGNORED
    numbers = [_number(counted, places), _number(None, rows)]
    if has_label_per_token(inputs):
        numbers[1] = _number(predicted_tokens(inputs, family, model), inputs["labels"])
    numbers += (_number(of_stack(tokens, stack), _positions(inputs, stack)) for stack in stacks)
    if weights is None or labels is None:
        return torch.stack(numbers)
    return torch.stack([weights.total(labels), *(number.float() for number in numbers[1:])])


def _number(mask: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor:
    """How many of ``places`` are in ``mask``, None being all of them; without waiting for the device."""
    return places.new_full((), places.numel(), dtype=torch.long) if mask is None else (mask != 0).sum()


def _positions(inputs: Mapping[str, Any], stack: Stack) -> torch.Tensor:
    """[batch, length]: one number for each position that goes into a stack."""
    if stack == "decoder" and "decoder_input_ids" in inputs:
        return inputs["decoder_input_ids"]  # type: ignore[no-any-return]
    if inputs.get("input_ids") is not None:
        return inputs["input_ids"]  # type: ignore[no-any-return]
    if inputs.get("inputs_embeds") is not None:
        return inputs["inputs_embeds"][..., 0]  # type: ignore[no-any-return]
    for value in inputs.values():  # tokens go by other names: rows alone are counted
        if torch.is_tensor(value) and value.dim() > 0:
            return value.reshape(len(value), -1)[:, :1]
    return torch.zeros(next(len(value) for value in inputs.values() if isinstance(value, list)), 1)  # texts
