"""A stock model that runs its layers by a plan: no copied weights, no copied modelling code, an exact cache.

The list of layers is replaced by one that holds the same layers under the same names, but that modelling code, going
through it, meets in the order of the plan. Each run is an entry of its own there, so it gets its own mask, rotary
positions and slot of the key-value cache; of several runs side by side too, whose outputs are averaged. The authors'
code averages their keys and values in one slot instead, so that their cached generation is not that of the plan.
Parameters, their names, adapters and hooks stay where they are. Not for saving (``painted_model``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.slots import layer_list_path, per_layer_values, set_slot, slot_holders
from apt_trainer.settings.execution_plan import Execution, Plan


class PaintedLayers(nn.ModuleList):
    """The layers of a model, by number and in ``state_dict`` as ever; iteration and slices give the runs of ``plan``.

    ``len`` and single numbers are about the layers. One iteration is for one forward pass, from first to last.
    """

    def __init__(self, layers: nn.ModuleList, plan: Plan) -> None:
        super().__init__(layers)
        self.plan = plan
        self._holders = tuple(slot_holders(layer) for layer in layers)

    def __iter__(self) -> Iterator[Any]:
        forks: list[_Fork] = []
        for slot, execution in enumerate(self.plan.executions):
            layer = self._modules[str(execution.layer)]  # looked up now: adapters and wrappers may have replaced it
            assert layer is not None
            yield _Run(layer, self._holders[execution.layer], slot, execution, forks)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index] if isinstance(index, slice) else super().__getitem__(index)

    def extra_repr(self) -> str:
        return str(self.plan)

    __repr__ = nn.Module.__repr__


class _Fork:
    """An input that several branches read, and the sum of their outputs so far, at least in single precision."""

    def __init__(self, states: torch.Tensor) -> None:
        self.input, self.count = states, 0
        self.total: torch.Tensor | None = None

    def add(self, output: torch.Tensor) -> None:
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        self.total = wide if self.total is None else self.total + wide
        self.count += 1

    def mean(self) -> torch.Tensor:
        assert self.total is not None
        return (self.total / self.count).to(self.input.dtype)


class _Run:
    """One run of a layer, called like the layer; whatever else modelling code reads from it is the layer's."""

    def __init__(
        self, layer: nn.Module, holders: tuple[str, ...], slot: int, execution: Execution, forks: list[_Fork]
    ) -> None:
        self._layer, self._holders, self._slot = layer, holders, slot
        self._execution, self._forks = execution, forks

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        forks = self._forks
        for step in self._execution.before:
            if step == "fork":
                forks.append(_Fork(hidden_states))
            hidden_states = forks[-1].input
        set_slot(self._layer, self._holders, self._slot)
        output: torch.Tensor = self._layer(hidden_states, *args, **kwargs)
        for after in self._execution.after:
            forks[-1].add(output)
            if after == "join":
                output = forks.pop().mean()
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


def check_plan(model: PreTrainedModel, plan: Plan) -> None:
    """Raise :class:`UserError` where ``model`` cannot run by ``plan``: a family without a table or with two stacks, a
    plan of another model, a second plan, or layers left out at random."""
    layers = model.get_submodule(layer_list_path(model, family_of(model.config)))
    assert isinstance(layers, nn.ModuleList)
    plan.check()
    if isinstance(layers, PaintedLayers):
        raise UserError("The model runs by an execution plan already. Start from the model without one.")
    if plan.layers != len(layers):
        raise UserError(f"The plan is for a model with {plan.layers} layers, this one has {len(layers)}.")
    if getattr(model.config, "layerdrop", 0) > 0:
        raise UserError("The config leaves out layers at random (layerdrop). Set layerdrop=0 for an execution plan.")


def put_plan(model: PreTrainedModel, plan: Plan) -> dict[str, Any]:
    """Let ``model`` run by ``plan`` from now on, in place; no weight moves.

    ``model.config`` says how many runs there are and, where it lists types of layers, the type of each run: masks and
    caches follow it. Returns what it said before, for :func:`take_plan`. Raises as :func:`check_plan` does.
    """
    check_plan(model, plan)
    path = layer_list_path(model, family_of(model.config))
    order, dense = plan.order, per_layer_values(model.config)
    model.set_submodule(path, PaintedLayers(model.get_submodule(path), plan))  # type: ignore[arg-type]
    for name, value in dense.items():
        setattr(model.config, name, len(order) if name == "num_hidden_layers" else [value[i] for i in order])
    return dense


def take_plan(model: PreTrainedModel, dense: dict[str, Any]) -> None:
    """Undo :func:`put_plan`."""
    path = layer_list_path(model, family_of(model.config))
    layers = model.get_submodule(path)
    assert isinstance(layers, PaintedLayers)
    for number, (layer, holders) in enumerate(zip(layers.children(), layers._holders, strict=True)):
        set_slot(layer, holders, number)
    model.set_submodule(path, nn.ModuleList(layers.children()))
    for name, value in dense.items():
        setattr(model.config, name, value)


@contextmanager
def painted(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Run ``model`` by ``plan``; afterwards it is as before."""
    dense = put_plan(model, plan)
    try:
        yield
    finally:
        take_plan(model, dense)
