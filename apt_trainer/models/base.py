"""What a transformer is made of: prunable spaces, the weights that share them, and removable sublayers.

A family is a table of names (``models.family``); the sizes are read from the real modules. All weights that name the
same :class:`Space` are coupled: losing unit k of the space cuts k in every one of them.
Not for choosing units (``plan.selection``) nor for cutting tensors (``surgery.cutting``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Kind = Literal["heads", "neurons", "experts", "hidden"]
Side = Literal["in", "out"]
GateSide = Literal["input", "activation", "routed"]
Stack = Literal["encoder", "decoder"]

HIDDEN = "hidden"


@dataclass(frozen=True)
class Slice:
    """One side of one module that belongs to a space.

    ``parts`` are the rows per unit in each consecutive part of that side: (head_dim,) for a query projection,
    (q, k, v) for a fused one, whose parts may differ in width, (1,) for neurons and hidden dimensions.
    ``weight``: (name, dimension) of the parameter that has this side, in a module that is neither linear nor norm.
    """

    module: str
    side: Side
    parts: tuple[int, ...] = (1,)
    weight: tuple[str, int] | None = None

    def rows(self, units: torch.Tensor, size: int) -> torch.Tensor:
        """Rows [n·Σparts] of the module's side that belong to ``units`` [n] out of ``size`` units."""
        rows, start = [], 0
        for width in self.parts:
            rows.append((start + units[:, None] * width + torch.arange(width)[None, :]).reshape(-1))
            start += size * width
        return torch.cat(rows)


@dataclass(frozen=True)
class SizeAttribute:
    """A number that a module keeps about its own size: ``per_unit`` times the units left, or, where that is None,
    the units themselves. How it is set: ``modeling_apt``."""

    module: str
    name: str
    per_unit: int | None = 1


@dataclass(frozen=True)
class Space:
    """One prunable axis: ``size`` units, ``channels`` activations per unit. ``minimum``: units that stay in any case.

    A unit of an attention is a key and value head with all query heads that read it; one of "neurons" inside of
    experts is that neuron of each of them, since their weights are fused.
    ``gate``: module whose ``gate_side`` carries the units: the *input* of an output projection, what an *activation*
    inside of experts gives (a row for each token that one gets, in no known order), or what a router has *routed*,
    (logits [tokens, experts], weights [tokens, k], experts [tokens, k]).
    ``within``: space whose last unit takes all of these along.
    ``norms``: every normalisation over the space. ``places``: modules whose *output* is observed for the hidden space,
    and ``place_stacks`` where each of them is. ``writers``: modules whose output enters the residual stream without a
    norm. ``stack``: whose tokens the gate sees.
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    channels: int = 1
    layer: int | None = None
    gate: str | None = None
    gate_side: GateSide = "input"
    within: str | None = None
    norms: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    place_stacks: tuple[Stack, ...] = ()
    writers: tuple[str, ...] = ()
    stack: Stack = "encoder"
    minimum: int = 0
    attributes: tuple[SizeAttribute, ...] = ()

    @property
    def label(self) -> str:
        """Name of its layer in reports: "3", or "decoder.3" and "decoder.3.cross" where there are two stacks."""
        stem, _, last = self.name.removeprefix("layers.").rpartition(".")
        prefix = last.removesuffix("heads").removesuffix("neurons").removesuffix("experts").removesuffix("_")
        return f"{stem}.{prefix}" if prefix else stem

    def stack_of(self, path: str) -> Stack:
        """Whose tokens the module at ``path`` (gate or place) sees."""
        return dict(zip(self.places, self.place_stacks, strict=True)).get(path, self.stack)

    def width(self, path: str) -> int:
        """Channels per unit at the output of the module at ``path``."""
        return next(sum(part.parts) for part in self.slices if part.module == path and part.side == "out")

    def sizes(self, kept: Sequence[int]) -> Iterator[tuple[str, str, int | tuple[int, ...]]]:
        """(module path, attribute, value) once only the units ``kept`` of the dense model are left.

        Nothing for a space without units, whose modules are gone.
        """
        if not kept:
            return
        for attribute in self.attributes:
            if attribute.per_unit is not None:
                yield attribute.module, attribute.name, attribute.per_unit * len(kept)
            elif len(kept) < self.size:
                yield attribute.module, attribute.name, tuple(kept)


@dataclass(frozen=True)
class Stub:
    """Which no-op replaces which module when a sublayer goes; kinds are defined in ``models.modeling_apt``.

    ``masked``: whether it already acts while every unit is only masked. False for what stands before the units,
    since it is enough to replace what comes after them.
    """

    module: str
    kind: str
    masked: bool = True


@dataclass(frozen=True)
class Sublayer:
    """A whole attention or feed-forward: what vanishes with its last unit, its residual branch and norm as a rule too.

    ``block``: path of its layer. ``output``: module whose output is added to the residual stream or, in a post-norm
    model, is the stream after the sublayer. ``crosses``: an attention that reads the other stack.
    """

    kind: Literal["attention", "mlp"]
    layer: int
    space: str
    modules: tuple[str, ...]
    stubs: tuple[Stub, ...]
    block: str
    output: str
    stack: Stack = "encoder"
    crosses: bool = False


def norm_paths(spaces: Sequence[Space]) -> list[str]:
    """Norms of the dense model on the residual stream and over all heads of an attention together."""
    return [path for space in spaces for path in space.norms]


def exists(model: nn.Module, path: str) -> bool:
    """Whether there is a module at ``path``."""
    module: nn.Module | None = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


_CENTRING = ("Cohere2LayerNorm", "CohereLayerNorm", "OlmoLayerNorm")


def centres(norm: nn.Module) -> bool:
    """Whether ``norm`` subtracts the mean; others are taken to be of RMS type."""
    return isinstance(norm, nn.LayerNorm) or type(norm).__name__ in _CENTRING


def base_layer(module: nn.Module) -> nn.Module:
    """The plain module under an adapter, or the module itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear, with or without an adapter round it; channels of a convolution."""
    weight = base_layer(module).weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape[:2]
    return (columns, rows) if isinstance(base_layer(module), Conv1D) else (rows, columns)


def units_in(model: nn.Module, part: Slice) -> int:
    """Units that ``part`` of ``model`` has; 0 where a no-op stands in the place of its module."""
    if not exists(model, part.module):
        return 0
    module = base_layer(model.get_submodule(part.module))
    named = dict(module.named_parameters(recurse=False))
    if part.weight is not None:
        found = [(named[part.weight[0]], part.weight[1])] if part.weight[0] in named else []
    else:
        found = [(p, d) for p in named.values() if (d := unit_dim(module, p, part.side)) is not None]
    return int(found[0][0].shape[found[0][1]]) // sum(part.parts) if found else 0


def unit_dim(module: nn.Module, parameter: torch.Tensor, side: Side) -> int | None:
    """Dimension of ``parameter``, one of ``module`` itself, that belongs to ``side``; None where it has no such one.

    Linears and convolutions have two sides. All else (norms, embeddings, tokens and positions) is along its last.
    """
    if parameter.dim() == 1 or not isinstance(module, nn.Linear | nn.Conv2d | Conv1D):
        return parameter.dim() - 1 if side == "out" else None
    first = "in" if isinstance(module, Conv1D) else "out"
    return 0 if side == first else 1
