"""Scores of a model that does not train yet: one pass over rows of the training data (APT, for LLaMA: 256 rows).

No parameter needs a gradient here: gradients start at the input of the first layer, so beside the weights there are
only activations. Dropout is off, so that scores depend on the rows alone. The average over updates is a mean, which
ranks units as the sum does, and leaves an outlier term its share whatever the number of batches. Each label counts
alike, in the last batch, which may be short, and in a process that has fewer rows too. Not for making batches or
computing a loss: both are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily, Space
from apt_trainer.models.batch import real_tokens
from apt_trainer.models.class_weights import ClassWeights
from apt_trainer.models.shares import count
from apt_trainer.scoring.base import Batch, Importance, Reduce

NOT_FINITE = (
    "The loss of the model on the rows that calibration_samples draws is not finite, so nothing can be scored. Look "
    "at the data, the model's dtype and, where it has trained already, the learning rate."
)


def shares(
    rows: int, number: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
) -> list[list[int]]:
    """Row numbers of the batches of one process: ``number`` of ``rows`` (or all), drawn with ``seed``.

    Every process gets the same number of batches, so that all take part in every reduction; the last may be short, or
    empty where rows run out.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(rows, generator=generator)[:number]
    return [batch[process::processes].tolist() for batch in drawn.split(batch_size * processes)]


def calibrate(
    model: nn.Module,
    family: ModelFamily,
    spaces: Sequence[Space],
    importance: Importance,
    batches: Iterable[Batch | None],
    loss_of: Callable[[Batch], torch.Tensor],
    reduce: Reduce,
    processes: int,
    weights: ClassWeights | None = None,
) -> None:
    """Show ``batches`` (None: no rows are left for this process) to ``importance``, which observes ``model`` already.

    ``weights``: of the labels in the loss, if any. Raises :class:`UserError`, in all processes, when a loss is not
    finite.
    """
    decay, device = importance.decay, next(model.parameters()).device
    total, seen = torch.zeros((), device=device), 0.0
    with _frozen(model, family, spaces):
        for batch in batches:
            own = torch.zeros((), device=device)
            if batch is not None:
                importance.set_tokens(real_tokens(batch, family))
                loss = loss_of(batch)
                own += count(batch, family, model, weights)[0]
            labels = reduce(own.clone())  # of all processes
            if batch is not None:  # without labels its loss is no number
                torch.where(own == 0, 0.0, loss * (own * processes / labels.clamp_min(1e-9))).backward()
                total += torch.where(own == 0, 0.0, loss.detach().float())
            counted = float(labels) if importance.of_mean_loss else 1.0
            seen += counted
            importance.decay = 1 - counted / max(seen, 1e-9)
            importance.update(reduce, processes)
    importance.decay = decay
    if not bool(torch.isfinite(reduce(total))):
        raise UserError(NOT_FINITE)


@contextmanager
def _frozen(model: nn.Module, family: ModelFamily, spaces: Sequence[Space]) -> Iterator[None]:
    """No dropout and no gradient of a parameter; all is as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = {path: model.get_submodule(path) for path in family.layer_paths(model)}
    observed = {path for space in spaces for path in (space.gate, *space.places)}
    active = [module for path, module in model.named_modules() if path in observed]
    if getattr(model, "is_activation_checkpointing", False):
        active += layers.values()
    model.eval().requires_grad_(False)
    for module in active:
        module.training = True  # of itself only: taps and checkpointing ask for it, dropout is in other modules
    first = [layer for path, layer in layers.items() if path.endswith(".0")]
    handles = [layer.register_forward_pre_hook(_start_gradient, with_kwargs=True) for layer in first]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def _start_gradient(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let gradients begin at what enters the first layer of a stack, and nowhere before it."""
    if not args:
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs
