"""How well a model does on fixed batches: exp of its mean loss, which for a language model is its perplexity.

Token-weighted: Σ negative log-likelihood / Σ predicted tokens, in float64 over the batches. A loss that is not per
token counts once per row. Never raises for a loss that is not finite: the harm of a drop may be infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from apt_trainer.errors import UserError
from apt_trainer.measure import evaluating
from apt_trainer.measure.likelihood import bounded_exp, summed_loss
from apt_trainer.models.batch import IGNORED
from apt_trainer.scoring.sublayers.cosine import Batch
from apt_trainer.scoring.sublayers.units import Units


def refuse_broken(loss: float | None, name: str) -> None:
    """Raise :class:`UserError` for a ``loss`` of the full model that is not finite; ``name``: what it measures."""
    if loss is None or not math.isfinite(loss):
        raise UserError(
            f"The {name} of the full model is not finite, so nothing was written. Load it in float32 or bfloat16; if "
            "that does not help, its weights are damaged."
        )


def loss_name(model: Any, units: Units) -> str:
    """What :func:`exp_loss` is called: "perplexity" of a model that predicts the next token, else "exp(loss)"."""
    return "perplexity" if units.family.head(model).next_token else "exp(loss)"


def exp_loss(model: Any, units: Units, batches: Sequence[Batch]) -> float:
    """exp of the mean loss of ``model`` on ``batches``, which hold labels; infinite where it is not finite."""
    sums = loss_sums(model, units, batches)
    return bounded_exp(sum(total for total, _ in sums) / sum(count for _, count in sums))


def loss_sums(model: Any, units: Units, batches: Sequence[Batch]) -> list[tuple[float, int]]:
    """(Σ loss in nats, what it was summed over) of each batch; raises :class:`UserError` for nothing to predict."""
    device = next(model.parameters()).device
    with evaluating(model):
        sums = [_sum(model, units, {name: value.to(device) for name, value in batch.items()}) for batch in batches]
    if not any(count for _, count in sums):
        raise UserError("The calibration data hold nothing to predict. Give more text, or rows with labels.")
    return sums


def _sum(model: Any, units: Units, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """(Σ loss, what it was summed over)."""
    labels = inputs.get("labels")
    head = units.family.head(model)
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point():
        kept = {} if model.config.is_encoder_decoder else {"labels": None}
        uncached = {"use_cache": False} if model.can_generate() else {}
        logits = model(**(inputs | kept), **uncached).logits
        shift = 1 if head.next_token else 0
        return _token_losses(logits[:, : logits.shape[1] - shift], labels[:, shift:])
    loss = model(**inputs).loss
    if loss is None:
        raise UserError(
            f"{type(model).__name__} gives no loss on these data, so the impact of a drop cannot be measured. "
            "Give rows with labels, or use the method cosine."
        )
    rows = len(next(iter(inputs.values())))
    return float(loss.double()) * rows, rows


def _token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    real = labels != IGNORED
    targets = labels[real]
    return summed_loss(logits[real], targets), len(targets)
