"""Outlier term of the salience: how heavy-tailed the contributions of a unit are (APT, Eq. 5).

Contribution of channel j to output i is T[i, j] = mean input[j] · W[i, j]; the kurtosis of a unit's entries tells
whether it carries outliers, which the mean hides. Not for activations over tokens.
"""

from __future__ import annotations

import torch
from torch import nn

from apt_trainer.models.base import base_layer
from apt_trainer.surgery.adapters import with_adapters


def root_kurtosis(values: torch.Tensor) -> torch.Tensor:
    """√max(excess kurtosis, 0) along the last dim: [..., n] → [...] float32.

    Fisher's definition with the unbiased standard deviation; constant rows give 0.
    """
    centred = values.float()
    centred = centred - centred.mean(-1, keepdim=True)
    number = values.shape[-1]
    variance = centred.square().sum(-1) / max(number - 1, 1)
    fourth = centred.pow(4).mean(-1)
    kurtosis = torch.where(variance > 0, fourth / variance.square().clamp_min(1e-38), torch.zeros_like(fourth)) - 3.0
    return kurtosis.clamp_min(0.0).sqrt()


@torch.no_grad()
def contributions(module: nn.Module, mean_input: torch.Tensor) -> torch.Tensor:
    """T [out, in] of an output projection, with or without an adapter, for the mean signed input [in]."""
    weight = base_layer(module).weight.detach()
    assert isinstance(weight, torch.Tensor)
    weight = with_adapters(module, weight)
    if type(base_layer(module)).__name__ == "Conv1D":  # stored, like its adapter's product, as [in, out]
        weight = weight.t()
    return weight.float() * mean_input[None, :].float()
