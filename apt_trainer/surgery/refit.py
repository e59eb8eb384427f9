"""Weights that read what is left of a sublayer, solved for anew when units go: damped least squares.

An attention or feed-forward that loses units gives W x_S where it gave W x. The weights W' that come closest to W x on
calibration tokens are W' = (W G[:, S] + λ W[:, S]) (G[S, S] + λ I)⁻¹ with G = Σ x xᵀ over tokens, S what is kept and
λ a share of the mean diagonal of G. Where there is a bias, x is centred and the bias takes the mean of what went. All
sublayers are solved for on inputs of the model as it is. (Kwon et al. 2022, arXiv 2204.09656, rescale units so; full
weights as in OBS.) See ``pruning.refit_pass`` for where G comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.models.base import base_layer
from apt_trainer.surgery.slicing import EditLog
from apt_trainer.tensors.partitioned import whole_modules

DAMPING = 0.01


@dataclass
class Moments:
    """Σ x xᵀ [n, n], Σ x [n] and the number of real tokens at the input of a module, in float32."""

    gram: Tensor
    total: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, size: int, device: torch.device) -> Moments:
        """Of no token yet, at an input of ``size`` channels."""
        return cls(*(torch.zeros(shape, device=device) for shape in ((size, size), (size,), ())))

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Take in ``x`` [..., n]; ``weights``: 1 for each real token, 0 for others."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if weights is None:
            self.tokens += len(rows)
        else:
            rows = rows * weights.to(rows)[:, None]
            self.tokens += weights.sum().to(self.tokens)
        self.gram.addmm_(rows.T, rows)
        self.total += rows.sum(0)


@torch.no_grad()
def refit(gate: nn.Module, path: str, moments: Moments, kept: Tensor, log: EditLog) -> None:
    """Put W' in the columns ``kept`` of what ``gate``, at ``path``, computes with; collective.

    Its base weight and bias are replaced by new ones, and the edits appended to ``log``; adapters stay as they are.
    """
    base: Any = base_layer(gate)
    transposed = isinstance(base, Conv1D)  # [in, out]
    kept = kept.to(moments.gram.device)
    with whole_modules(*gate.modules()):
        weight = base.weight.T if transposed else base.weight
        added = _added(gate)
        if transposed and isinstance(added, Tensor):
            added = added.T
        before = weight.double() + added
        gram, mean = moments.gram.double(), moments.total.double() / moments.tokens.clamp(min=1).double()
        if base.bias is not None:
            gram = gram - moments.tokens.double() * torch.outer(mean, mean)
        damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
        left = gram[kept][:, kept] + damping * torch.eye(len(kept), device=gram.device, dtype=gram.dtype)
        right = before @ gram[:, kept] + damping * before[:, kept]
        solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T
        new, bias = weight.double(), None
        new[:, kept] = solved - (added[:, kept] if isinstance(added, Tensor) else added)
        if base.bias is not None:
            bias = base.bias + before @ mean - solved @ mean[kept]
    where = f"{path}.base_layer" if isinstance(gate, LoraLayer) else path
    log.renew(base, where, "weight", new.T if transposed else new)
    if bias is not None:
        log.renew(base, where, "bias", bias)


def _added(gate: nn.Module) -> Tensor | float:
    """What the adapters of ``gate`` add to its weights, in their shape."""
    if not isinstance(gate, LoraLayer):
        return 0.0
    deltas = [gate.get_delta_weight(name).double() for name in gate.active_adapters if name in gate.lora_A]
    return sum(deltas[1:], deltas[0]) if deltas else 0.0
