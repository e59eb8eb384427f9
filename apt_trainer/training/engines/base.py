"""What a change of shape needs from an engine, and the engine of one process or DDP.

An engine is made anew for each change, of the :class:`Parts` of a run: ``unwrap`` gives the plain model, the change
edits it, ``export_state`` gives the optimizer state that follows the edits, ``release`` drops what is left of the old
engine, the owner has a new one made (``wrap`` before, ``repair`` after), and ``import_state`` puts the state in.
``finalize`` ends it all. No engine knows the Trainer: see ``training.reshape``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils.logging import get_logger

from apt_trainer.libraries.private_names import Use
from apt_trainer.models import ModelFamily
from apt_trainer.surgery.slicing import Edits
from apt_trainer.tensors.partitioned import copy_of, split_as, whole_value
from apt_trainer.training.engines.state import MASTER, State, carry, collect, restore

_log = get_logger(__name__)
_STARTS_AFRESH = (
    "{} keeps state in another shape than its parameters, which cannot follow a change of shape: for these parameters "
    "it starts afresh at each."
)


@dataclass(frozen=True)
class Parts:
    """What of a run an engine works with, at one moment."""

    wrapped: Any
    """The model in whatever it trains in: DDP's or DeepSpeed's wrapper, or the model itself."""
    optimizer: Any
    """As accelerate has prepared it; None before."""
    accelerator: Any
    family: ModelFamily
    device: torch.device
    dtype: torch.dtype
    """The type that computes."""
    steps: int
    """Optimizer steps done."""
    writes: bool
    """Whether this process writes checkpoints."""
    timeout: timedelta
    """Of collective calls."""
    groups: Callable[[nn.Module], list[dict[str, Any]]]
    """Groups of the parameters that train in a model, as the optimizer has them."""


class Engine:
    """One process, or DDP: parameters and optimizer state are whole on every process."""

    needs: tuple[Use, ...] = ()
    """What of ``libraries.private_names`` it relies on."""

    one_dtype = False
    """Whether all parameters get the type of the model, adapters too."""

    groups_by_age = False
    """Whether parameters that trained for different numbers of steps must be in different groups."""

    leaves_cycles = False
    """Whether parameters that are cut lie in cycles of references, so that only the garbage collector frees them."""

    splits = False
    """Whether each process keeps a part of every parameter, in memory of its own."""

    callbacks: tuple[type[TrainerCallback], ...] = ()
    """What has to watch the steps that it takes."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._state: State = {}

    @property
    def model(self) -> Any:
        """The model under all wrappers; its forward has accelerate's mixed precision."""
        return self.parts.accelerator.unwrap_model(self.parts.wrapped)

    # ------------------------------------------------------------------ before there is one

    def place_teacher(self, model: nn.Module) -> nn.Module:
        """A teacher that was made before there is an engine, where it waits for one."""
        return model.to(self.parts.device)

    def place_student(self, model: nn.Module) -> None:
        """Put the student where it can be scored before there is an engine; the Trainer has, for this one."""

    # ------------------------------------------------------------------ its making

    def wrap(self, model: nn.Module) -> None:
        """Before an engine is made round ``model``, the whole one of each process or one that was taken out of another
        engine: what has to be done to it; collective."""

    def repair(self) -> None:
        """Once an engine is made: put right what its makers have left wrong."""

    # ------------------------------------------------------------------ a change of shape

    def settle(self) -> None:
        """Wait for what the engine has begun on its own, before parameters are read outside a forward pass."""

    def unwrap(self) -> Any:
        """Take the model out of the engine: ordinary parameters, none of which an old hook can reach."""
        model, optimizer = self.model, plain_optimizer(self.parts)
        restore_forward(model)
        self._state = collect(model, optimizer)
        if any(p in optimizer.state and name not in self._state for name, p in model.named_parameters()):
            _log.warning_once(_STARTS_AFRESH.format(type(optimizer).__name__))
        optimizer.state.clear()
        optimizer.param_groups.clear()
        fresh_leaves(model)
        return model

    def export_state(self, edits: Edits) -> State:
        """Optimizer state after ``edits``; that from before goes as it is carried, so that it is not there twice."""
        state, self._state = self._state, {}
        return {name: carry({name: state.pop(name)}, edits)[name] for name in list(state)}

    def release(self) -> None:
        """Drop what the old engine holds, which frames of the training loop may still refer to."""
        self._state = {}

    def import_state(self, state: State) -> None:
        """Put ``state`` from :meth:`export_state` of the old engine into this one."""
        restore(self.model, plain_optimizer(self.parts), state)

    # ------------------------------------------------------------------ checkpoints

    def weights(self, model: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters and buffers of a checkpoint, tied ones once, none a view of other memory; collective.

        ``model``: by default the one that trains; else its teacher.
        """
        model = self.model if model is None else model
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            yield name, _own(self.whole(parameter))
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, buffer in model.state_dict().items():
            if name not in tied:
                yield name, _own(buffer)

    def weights_to_save(self, model: Any = None) -> dict[str, torch.Tensor]:
        """All of :meth:`weights` on the process that writes checkpoints, none on the others; collective."""
        return {name: value for name, value in self.weights(model) if self.parts.writes}

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The value of a parameter of the model, of which a process may hold only a part; collective."""
        return parameter.detach()

    def whole_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Whole state of one parameter after the other, on the CPU; all processes must go through it together."""
        optimizer = plain_optimizer(self.parts)
        for name, parameter in self.model.named_parameters():
            if parameter in optimizer.state:
                yield name, {key: _to_cpu(value) for key, value in optimizer.state[parameter].items()}

    def import_whole(self, state: State) -> None:
        """Put what :meth:`whole_states` of any engine gave, into this one."""
        optimizer = plain_optimizer(self.parts)
        names = {id(p): name for name, p in self.model.named_parameters()}
        described = optimizer.state_dict()
        described["state"] = {}
        members = [p for group in optimizer.param_groups for p in group["params"]]
        for number, parameter in enumerate(members):
            of_parameter = dict(state.get(names[id(parameter)], {}))
            if MASTER in of_parameter:
                parameter.data.copy_(split_as(of_parameter.pop(MASTER), parameter))
            if of_parameter:
                described["state"][number] = {key: _split(value, parameter) for key, value in of_parameter.items()}
        optimizer.load_state_dict(described)

    # ------------------------------------------------------------------ end

    def finalize(self) -> Any:
        """The plain model after training, on every process."""
        model = self.model
        restore_forward(model)
        return model


def plain_optimizer(owner: Any) -> torch.optim.Optimizer:
    """The torch optimizer under all wrappers of a run's, or of a schedule's."""
    optimizer: Any = owner.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer  # type: ignore[no-any-return]


def restore_forward(model: nn.Module) -> None:
    """Take accelerate's mixed precision off ``model.forward``, in place.

    ``unwrap_model(keep_fp32_wrapper=False)`` would take the decorators of the model's own forward off with it.
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.__dict__["forward"]
        if original != model.forward:
            model.forward = original


def fresh_leaves(model: nn.Module, copy: bool = False) -> None:
    """New Parameter objects for everything that trains, so that hooks of an old reducer cannot fire on them.

    ``copy``: give them memory of their own too.
    """
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                if id(parameter) not in fresh:
                    fresh[id(parameter)] = copy_of(parameter, True) if copy else nn.Parameter(parameter.data)
                module._parameters[name] = fresh[id(parameter)]
    for parameter in model.parameters():
        parameter.grad = None


def _own(value: torch.Tensor) -> torch.Tensor:
    """``value`` in memory that belongs to nothing else; itself where that is so already."""
    shares = value.untyped_storage().nbytes() != value.nbytes or not value.is_contiguous()
    return value.detach().clone(memory_format=torch.contiguous_format) if shares else value.detach()


def _to_cpu(value: Any) -> Any:
    return whole_value(value).cpu() if torch.is_tensor(value) else value


def _split(value: Any, parameter: nn.Parameter) -> Any:
    """A state tensor as its parameter is split; numbers, and tensors of other shapes, as they are."""
    return split_as(value, parameter) if torch.is_tensor(value) and value.shape == parameter.shape else value
