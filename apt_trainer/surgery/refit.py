"""Weights that read what is left of a sublayer, solved for anew when units go: damped least squares.

An attention or feed-forward that loses units gives W x_S where it gave W x. The weights W' that come closest to W x on
calibration tokens are W' = (W G[:, S] + λ W[:, S]) (G[S, S] + λ I)⁻¹ with G = Σ x xᵀ over tokens, S what is kept and
λ a share of the mean diagonal of G. Where there is a bias, x is centred and the bias takes the mean of what went. All
sublayers are solved for on inputs of the model as it is. (Kwon et al. 2022, arXiv 2204.09656, rescale units so; full
weights as in OBS.) Not for choosing units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.models import ModelFamily, Space
from apt_trainer.models.batch import Tokens, of_stack, real_tokens
from apt_trainer.plan.pruning_plan import PruningPlan

DAMPING = 0.01
GROUP_BYTES = 1 << 30
"""Memory that the matrices G of one pass over the batches may take; a larger one has a pass of its own."""

Batch = dict[str, Any]


@dataclass
class _Moments:
    """Σ x xᵀ [n, n], Σ x [n] and the number of real tokens at the input of a gate, in float32."""

    gram: Tensor
    total: Tensor
    tokens: Tensor


def refit(
    model: nn.Module,
    family: ModelFamily,
    spaces: Sequence[Space],
    current: PruningPlan,
    new: PruningPlan,
    batches: Callable[[], Iterable[Batch | None]],
    forward: Callable[[Batch], Any],
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[str]:
    """Prepare ``model``, which has the units of ``current``, for the cut to ``new``: base weights change in place.

    Args:
        spaces: of the dense model.
        batches: gives the calibration batches, anew at each call; None: no rows are left for this process.
        forward: runs the model on a batch.
        reduce: sums a tensor over processes, all of which take part.

    Returns:
        Paths of the modules whose weights were solved for.
    """
    survivors = current.survivors(new)
    shrinking = [space for space in spaces if space.gate and space.name in survivors and new.counts[space.name] > 0]
    for group in _groups(model, shrinking[::-1]):  # the last first: what it reads does not change by that
        moments = _observe(model, family, group, batches, forward)
        for space in group:
            found = moments[space.name]
            for tensor in (found.gram, found.total, found.tokens):
                tensor.copy_(reduce(tensor))
            part = next(p for p in space.slices if p.module == space.gate and p.side == "in")
            kept = part.rows(survivors[space.name], current.counts[space.name])
            _solve(model.get_submodule(str(space.gate)), found, kept.to(found.gram.device))
            del moments[space.name]
    return [str(space.gate) for space in shrinking]


def _groups(model: nn.Module, spaces: Sequence[Space]) -> Iterator[list[Space]]:
    group: list[Space] = []
    taken = 0
    for space in spaces:
        size = 4 * _inputs(model.get_submodule(str(space.gate))) ** 2
        if group and taken + size > GROUP_BYTES:
            yield group
            group, taken = [], 0
        group.append(space)
        taken += size
    if group:
        yield group


@torch.no_grad()
def _observe(
    model: nn.Module,
    family: ModelFamily,
    spaces: Sequence[Space],
    batches: Callable[[], Iterable[Batch | None]],
    forward: Callable[[Batch], Any],
) -> dict[str, _Moments]:
    """Moments by name of the space, of this process' real tokens."""
    moments: dict[str, _Moments] = {}
    handles: list[Any] = []
    real: dict[str, Tokens] = {}
    for space in spaces:
        gate = model.get_submodule(str(space.gate))
        size, device = _inputs(gate), _base(gate).weight.device
        moments[space.name] = _Moments(
            torch.zeros(size, size, device=device), torch.zeros(size, device=device), torch.zeros((), device=device)
        )

        def look(module: nn.Module, args: tuple[Any, ...], space: Space = space) -> None:
            found = moments[space.name]
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
            mask = of_stack(real["tokens"], space.stack)
            if mask is not None:
                rows = rows * mask.reshape(-1, 1).to(rows)
                found.tokens += mask.sum()
            else:
                found.tokens += len(rows)
            found.gram.addmm_(rows.T, rows)
            found.total += rows.sum(0)

        handles.append(gate.register_forward_pre_hook(look))
    try:
        with _evaluating(model):
            for batch in batches():
                if batch is not None:
                    real["tokens"] = real_tokens(batch, family)
                    forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


@torch.no_grad()
def _solve(gate: nn.Module, moments: _Moments, kept: Tensor) -> None:
    """Put W' in the columns ``kept`` of what ``gate`` computes with, its adapters being as they are."""
    base = _base(gate)
    transposed = isinstance(base, Conv1D)  # [in, out]
    weight: Any = base.weight.T if transposed else base.weight
    added = _added(gate)
    if transposed and isinstance(added, Tensor):
        added = added.T
    whole = weight.double() + added
    gram, mean = moments.gram.double(), moments.total.double() / moments.tokens.clamp(min=1).double()
    if base.bias is not None:
        gram = gram - moments.tokens.double() * torch.outer(mean, mean)
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    left = gram[kept][:, kept] + damping * torch.eye(len(kept), device=gram.device, dtype=gram.dtype)
    right = whole @ gram[:, kept] + damping * whole[:, kept]
    solved = torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T
    if base.bias is not None:
        base.bias += (whole @ mean - solved @ mean[kept]).to(base.bias.dtype)
    new = weight.clone()
    new[:, kept] = (solved - (added[:, kept] if isinstance(added, Tensor) else added)).to(weight.dtype)
    base.weight.copy_(new.T if transposed else new)


def _base(gate: nn.Module) -> Any:
    return gate.base_layer if isinstance(gate, LoraLayer) else gate


def _added(gate: nn.Module) -> Tensor | float:
    """What the adapters of ``gate`` add to its weights, in their shape."""
    if not isinstance(gate, LoraLayer):
        return 0.0
    deltas = [gate.get_delta_weight(name).double() for name in gate.active_adapters if name in gate.lora_A]
    return sum(deltas[1:], deltas[0]) if deltas else 0.0


def _inputs(gate: nn.Module) -> int:
    base = _base(gate)
    return int(base.weight.shape[0 if isinstance(base, Conv1D) else 1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
