"""State of an optimizer by parameter name, and how it follows a change of shape.

Knows tensors and edits only. Not for reading it out of an optimizer or putting it back: that is an engine's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from apt_trainer.surgery.slicing import Edit, Edits, Grow, Keep, NewValues
from apt_trainer.tensors.partitioned import cut_in_place

State = dict[str, dict[str, Any]]
"""Parameter name → {state name: tensor or number}."""

MASTER = "master"
"""State name of the float32 value of a parameter that trains in half precision."""
STEP = "step"
SCALES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "state2", "step_size")
"""State names of what an update is divided by (or, in Rprop, multiplied with), in the optimizers of torch and
bitsandbytes."""


def collect(model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Optimizer state of every trained parameter by name.

    State in another shape than its parameter (factored, quantised) cannot follow a cut and is left out.
    """
    named = [(name, p, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state]
    return {name: dict(state) for name, p, state in named if all(_has_shape(value, p) for value in state.values())}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Give ``state`` to the parameters of the same names; those without (new to training) start afresh."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name in state:
            optimizer.state[parameter] = state[name]


def carry(state: State, edits: Edits) -> State:
    """Optimizer state after ``edits``: entries of survivors as they were; new entries start at zero, but those
    of ``SCALES`` at the mean of the old ones, since Adam would otherwise move them several times too far."""
    carried: State = {}
    for name, of_parameter in state.items():
        carried[name] = {key: follow(value, key, edits.get(name, [])) for key, value in of_parameter.items()}
    return carried


def follow(value: Any, key: str, edits: list[Edit], in_place: bool = False) -> Any:
    """One entry of :func:`carry`; numbers and tensors without dimensions stay as they are.

    ``in_place``: ``value`` is cut in its own memory, all of which the result then keeps.
    """
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    for edit in edits:
        if isinstance(edit, Keep):
            select = cut_in_place if in_place else torch.index_select
            value = select(value, edit.dim, edit.index.to(value.device))
        elif isinstance(edit, Grow):
            shape = list(value.shape)
            shape[edit.dim] = edit.extra
            fill = value.mean() if key in SCALES else value.new_zeros(())
            value = torch.cat([value, fill.expand(shape)], edit.dim)
    return value


def follow_master(value: torch.Tensor, edits: list[Edit], new: torch.Tensor) -> torch.Tensor:
    """Float32 values after ``edits``: of survivors as they were, of new entries and new values those in ``new``, which
    has the shape after all edits."""
    survives = torch.ones_like(value, dtype=torch.bool)
    for edit in edits:
        if isinstance(edit, NewValues):
            survives = torch.zeros_like(survives)
        elif isinstance(edit, Grow):
            value, survives = _append_zeros(value, edit), _append_zeros(survives, edit)
        else:
            value = value.index_select(edit.dim, edit.index.to(value.device))
            survives = survives.index_select(edit.dim, edit.index.to(value.device))
    return torch.where(survives, value, new.to(value))


def add_masters(state: State, model: nn.Module) -> None:
    """Give ``state`` the float32 values of all that trains where it lacks them, before an engine rounds ``model``."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float32:
            state.setdefault(name, {}).setdefault(MASTER, parameter.detach().cpu().clone())


def step_tensor(steps: int, group: Mapping[str, Any], device: torch.device) -> torch.Tensor:
    """Count of ``steps`` where torch's optimizers want it: on the parameters' ``device`` if the kernels of ``group``
    read it there, else on the CPU."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    return torch.tensor(float(steps), device=device if on_device else "cpu")


def ages(state: State) -> dict[str, int]:
    """Steps that each parameter has trained for."""
    return {name: int(of_parameter[STEP]) for name, of_parameter in state.items() if STEP in of_parameter}


def _append_zeros(value: torch.Tensor, edit: Grow) -> torch.Tensor:
    shape = list(value.shape)
    shape[edit.dim] = edit.extra
    return torch.cat([value, value.new_zeros(shape)], edit.dim)


def _has_shape(value: Any, parameter: nn.Parameter) -> bool:
    return not torch.is_tensor(value) or value.dim() == 0 or value.shape == parameter.shape
