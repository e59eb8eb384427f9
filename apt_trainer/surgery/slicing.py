"""How one type of module loses rows or columns, and a log of what happened to each parameter. Knows module types, not
models.

To support another type register a function on :func:`slice_module`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import singledispatch
from typing import TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.models.base import Side
from apt_trainer.tensors.partitioned import cut, parameter_like, shape_of


@dataclass(frozen=True)
class Keep:
    """``index`` [n] along ``dim`` survives."""

    dim: int
    index: torch.Tensor


@dataclass(frozen=True)
class Grow:
    """``extra`` entries were appended along ``dim``."""

    dim: int
    extra: int


@dataclass(frozen=True)
class NewValues:
    """The entries have new values, which the parameter itself holds when all edits are done.

    A copy in another precision (a float32 master) is to be taken from the parameter. Moments stay as they are.
    """


Edit: TypeAlias = Keep | Grow | NewValues
Edits: TypeAlias = dict[str, list[Edit]]
"""What happened to each parameter, by name, in order."""


@dataclass
class EditLog:
    """What happened to each parameter, by name, so that optimizer state can follow; also keeps tied weights tied.

    ``shared``: ids of parameters that are used outside the model too, as frozen ones by a teacher. Of the others only
    tied ones are kept until all is cut; the rest is let go one by one.
    """

    shared: Collection[int] = ()
    edits: Edits = field(default_factory=lambda: defaultdict(list))
    _tied: set[int] = field(default_factory=set)
    _done: dict[tuple[int, int], tuple[nn.Parameter, nn.Parameter]] = field(default_factory=dict)

    def expect_ties(self, model: nn.Module) -> None:
        """Find the parameters that are in several places of ``model``."""
        places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._tied |= {key for key, number in places.items() if number > 1}

    def keep(self, module: nn.Module, path: str, name: str, dim: int, index: torch.Tensor) -> None:
        """Cut parameter ``name`` of ``module`` to ``index`` along ``dim``; a parameter tied to it is cut once."""
        old = module._parameters.get(name)
        if old is None:
            return
        self.edits[f"{path}.{name}"].append(Keep(dim, index))
        done = self._done.get((id(old), dim))
        new = cut(old, dim, index, id(old) in self.shared) if done is None else done[1]
        if id(old) in self._tied:
            self._done[id(old), dim] = (old, new)  # the reference to old keeps its id from being reused
            self._tied.add(id(new))
        module._parameters[name] = new

    def grow(self, name: str, dim: int, extra: int) -> None:
        self.edits[name].append(Grow(dim, extra))

    def renew(self, module: nn.Module, path: str, name: str, value: torch.Tensor) -> None:
        """Give parameter ``name`` of ``module`` new values. It is replaced, so that a teacher which shares it keeps
        the old ones; collective.

        ``value``: of the same shape, whole and equal on all processes.
        """
        old = module._parameters[name]
        assert old is not None and id(old) not in self._tied, f"{path}.{name} is used in several places"
        self.edits[f"{path}.{name}"].append(NewValues())
        module._parameters[name] = parameter_like(old, value.to(old.dtype))


@singledispatch
def slice_module(module: nn.Module, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    """Keep ``index`` of one side of ``module``. The default serves norms, scales, tokens and positions: parameters of
    the module itself, all of them along their last dimension; it may have none at all."""
    own = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    assert side == "out" and len({shape[-1] for shape in own.values()}) <= 1, (
        f"{path}: {type(module).__name__} cannot be sliced"
    )
    for name, shape in own.items():
        log.keep(module, path, name, len(shape) - 1, index)
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = (len(index),)  # type: ignore[assignment]


@slice_module.register
def _(module: nn.Linear, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    log.keep(module, path, "weight", 0 if side == "out" else 1, index)
    if side == "out":
        log.keep(module, path, "bias", 0, index)
        module.out_features = len(index)
    else:
        module.in_features = len(index)


@slice_module.register
def _(module: nn.Conv2d, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    assert side == "out", f"{path}: only the channels that a convolution makes can be cut"
    log.keep(module, path, "weight", 0, index)
    log.keep(module, path, "bias", 0, index)
    module.out_channels = len(index)


@slice_module.register
def _(module: Conv1D, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    log.keep(module, path, "weight", 1 if side == "out" else 0, index)
    if side == "out":
        log.keep(module, path, "bias", 0, index)
        module.nf = len(index)
    else:
        module.nx = len(index)


@slice_module.register
def _(module: nn.Embedding, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    log.keep(module, path, "weight", 1, index)
    module.embedding_dim = len(index)


@slice_module.register
def _(module: LoraLayer, side: Side, index: torch.Tensor, path: str, log: EditLog) -> None:
    """Cuts the base weight, and the columns of every A (inputs) or the rows of every B (outputs)."""
    slice_module(module.base_layer, side, index, f"{path}.base_layer", log)
    factors, attribute = (module.lora_A, "in_features") if side == "in" else (module.lora_B, "out_features")
    factor_name = "lora_A" if side == "in" else "lora_B"
    for adapter, linear in factors.items():
        slice_module(linear, side, index, f"{path}.{factor_name}.{adapter}", log)
    setattr(module, attribute, len(index))
