"""What a transformer is made of: prunable spaces, the weights that share them, and removable sublayers.

A family is a table of names (:class:`ModelFamily`); the sizes are read from the real modules. All weights that
name the same :class:`Space` are coupled: losing unit k of the space cuts k in every one of them.
Not for choosing units (``pruning.selection``) nor for cutting tensors (``pruning.surgery``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from apt_trainer.errors import UserError

Kind = Literal["heads", "neurons", "hidden"]
Side = Literal["in", "out"]

HIDDEN = "hidden"


@dataclass(frozen=True)
class Slice:
    """One side of one module that belongs to a space.

    ``parts`` are the rows per unit in each consecutive part of that side: (head_dim,) for a query projection,
    (q, k, v) for a fused one, (1,) for neurons and hidden dimensions.
    """

    module: str
    side: Side
    parts: tuple[int, ...] = (1,)

    def rows(self, units: torch.Tensor, size: int) -> torch.Tensor:
        """Rows [n·Σparts] of the module's side that belong to ``units`` [n] out of ``size`` units."""
        rows, start = [], 0
        for width in self.parts:
            rows.append((start + units[:, None] * width + torch.arange(width)[None, :]).reshape(-1))
            start += size * width
        return torch.cat(rows)


@dataclass(frozen=True)
class Space:
    """One prunable axis: ``size`` units, ``channels`` activations per unit.

    ``gate``: module whose *input* carries the units (output projection of an attention or feed-forward).
    ``norms``: for the hidden space, every normalisation that reads it. ``places``: modules whose *output* is
    observed for the hidden space.
    """

    name: str
    kind: Kind
    size: int
    slices: tuple[Slice, ...]
    channels: int = 1
    layer: int | None = None
    gate: str | None = None
    norms: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stub:
    """Which no-op replaces which module when a sublayer goes; kinds are defined in ``models.stubs``."""

    module: str
    kind: str


@dataclass(frozen=True)
class Sublayer:
    """A whole attention or feed-forward, residual branch included: what vanishes with its last unit."""

    kind: Literal["attention", "mlp"]
    layer: int
    space: str
    modules: tuple[str, ...]
    stubs: tuple[Stub, ...]


@dataclass(frozen=True)
class SublayerTable:
    """Names inside one layer. ``reads`` take the hidden space in; ``writes`` gives it back."""

    reads: tuple[str, ...]
    writes: str
    modules: tuple[str, ...]
    stubs: tuple[Stub, ...]
    norms: tuple[str, ...]
    head_dim: tuple[str, str] | None = None
    unit_attributes: tuple[tuple[str, str], ...] = ()
    channel_attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Head:
    """What a task head reads from (and writes to) the hidden space, by the ending of the model's class name."""

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFamily:
    """Table of names for models that share a layout. ``layers`` and ``embeddings`` are below the base model."""

    model_types: tuple[str, ...]
    layers: str
    attention: SublayerTable
    mlp: SublayerTable
    embeddings: tuple[str, ...]
    embedding_norms: tuple[str, ...]
    heads: dict[str, Head]
    trained_base: tuple[str, ...] = ()
    base_reads: tuple[str, ...] = ()
    post_norm: bool = True
    adapter_targets: tuple[str, ...] = field(default=())

    def prefix(self, model: nn.Module) -> str:
        """Path of the base model inside ``model`` with its dot; empty when ``model`` is the base model."""
        name = getattr(model, "base_model_prefix", "")
        return f"{name}." if name and hasattr(model, name) else ""

    def head(self, model: nn.Module) -> Head:
        """Task head of ``model``; raises :class:`UserError` for a class without an entry."""
        if not self.prefix(model):
            return Head()
        class_name = type(model).__name__
        for ending, head in self.heads.items():
            if class_name.endswith(ending):
                return head
        raise UserError(
            f"{class_name} has a task head that is not described. Described heads: {', '.join(self.heads)}. "
            f"Add an entry to the family of {', '.join(self.model_types)}."
        )

    def layer_paths(self, model: nn.Module) -> list[str]:
        path = self.prefix(model) + self.layers
        return [f"{path}.{i}" for i in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]

    def spaces(self, model: nn.Module) -> list[Space]:
        """All prunable spaces of a dense model, layer by layer, the hidden space last."""
        spaces = []
        for i, layer in enumerate(self.layer_paths(model)):
            spaces += [self._heads(model, i, layer), self._neurons(model, i, layer)]
        return [*spaces, self._hidden(model)]

    def sublayers(self, model: nn.Module) -> list[Sublayer]:
        found: list[Sublayer] = []
        for i, layer in enumerate(self.layer_paths(model)):
            found.append(_sublayer("attention", i, layer, self.attention, f"layers.{i}.heads"))
            found.append(_sublayer("mlp", i, layer, self.mlp, f"layers.{i}.neurons"))
        return found

    def attributes(self, model: nn.Module, counts: dict[str, int]) -> Iterator[tuple[str, str, int]]:
        """(module path, attribute, value) that modules keep about their own size, given units left per space."""
        for i, layer in enumerate(self.layer_paths(model)):
            for table, space in ((self.attention, f"layers.{i}.heads"), (self.mlp, f"layers.{i}.neurons")):
                units = counts[space]
                if units == 0:
                    continue
                width = _head_dim(model, layer, table) if table.head_dim else 1
                for module, name in table.unit_attributes:
                    yield f"{layer}.{module}", name, units
                for module, name in table.channel_attributes:
                    yield f"{layer}.{module}", name, units * width

    def block_modules(self, model: nn.Module) -> list[str]:
        return self.layer_paths(model)

    def _heads(self, model: nn.Module, i: int, layer: str) -> Space:
        table, width = self.attention, _head_dim(model, layer, self.attention)
        reads = tuple(Slice(f"{layer}.{name}", "out", (width,)) for name in table.reads)
        writes = Slice(f"{layer}.{table.writes}", "in", (width,))
        size = linear_shape(model.get_submodule(writes.module))[1] // width
        return Space(f"layers.{i}.heads", "heads", size, (*reads, writes), width, i, gate=writes.module)

    def _neurons(self, model: nn.Module, i: int, layer: str) -> Space:
        reads = tuple(Slice(f"{layer}.{name}", "out") for name in self.mlp.reads)
        writes = Slice(f"{layer}.{self.mlp.writes}", "in")
        size = linear_shape(model.get_submodule(writes.module))[1]
        return Space(f"layers.{i}.neurons", "neurons", size, (*reads, writes), 1, i, gate=writes.module)

    def _hidden(self, model: nn.Module) -> Space:
        prefix, head = self.prefix(model), self.head(model)
        slices = [Slice(prefix + name, "out") for name in self.embeddings]
        norms = [prefix + name for name in self.embedding_norms]
        places = list(norms) if self.post_norm else []
        for layer in self.layer_paths(model):
            for table in (self.attention, self.mlp):
                slices += [Slice(f"{layer}.{name}", "in") for name in table.reads]
                slices.append(Slice(f"{layer}.{table.writes}", "out"))
                norms += [f"{layer}.{name}" for name in table.norms]
                places += [f"{layer}.{name}" for name in (table.norms if self.post_norm else (table.writes,))]
        slices += [Slice(prefix + name, "in") for name in self.base_reads if _exists(model, prefix + name)]
        slices += [Slice(name, "in") for name in head.reads] + [Slice(name, "out") for name in head.writes]
        norms += list(head.norms)
        slices = [s for s in slices if _exists(model, s.module)]
        size = model.get_submodule(slices[0].module).weight.shape[1]
        slices += [Slice(name, "out") for name in norms]
        return Space(HIDDEN, "hidden", int(size), tuple(slices), norms=tuple(norms), places=tuple(places))  # type: ignore[arg-type]

    def trained_head(self, model: nn.Module) -> tuple[str, ...]:
        """Module paths of the task head, which trains in full in every mode."""
        prefix = self.prefix(model)
        paths = [prefix + name for name in self.trained_base] + list(self.head(model).trained)
        return tuple(p for p in paths if _exists(model, p))

    def embedding_modules(self, model: nn.Module) -> tuple[str, ...]:
        prefix = self.prefix(model)
        return tuple(prefix + name for name in self.embeddings if _exists(model, prefix + name))


def _sublayer(kind: Literal["attention", "mlp"], i: int, layer: str, table: SublayerTable, space: str) -> Sublayer:
    modules = tuple(f"{layer}.{name}" for name in table.modules)
    stubs = tuple(Stub(f"{layer}.{stub.module}", stub.kind) for stub in table.stubs)
    return Sublayer(kind, i, space, modules, stubs)


def _exists(model: nn.Module, path: str) -> bool:
    module: nn.Module | None = model
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return False
    return True


def _head_dim(model: nn.Module, layer: str, table: SublayerTable) -> int:
    assert table.head_dim is not None
    module, name = table.head_dim
    return int(getattr(model.get_submodule(f"{layer}.{module}"), name))


def base_layer(module: nn.Module) -> nn.Module:
    """The plain module under an adapter, or the module itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear, with or without an adapter round it."""
    weight = base_layer(module).weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if type(base_layer(module)).__name__ == "Conv1D" else (rows, columns)


def counts_of(spaces: Sequence[Space]) -> dict[str, int]:
    return {space.name: space.size for space in spaces}
