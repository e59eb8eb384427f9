"""Families as tables of names, and what they say about a real model.

A new family is one :class:`ModelFamily` and one name in ``models/__init__.py``. Paths in a table are relative: those
of a sublayer to its layer, those of a stack and of a family to the base model, those of a head to the whole model.
Paths that a model does not have are left out. Not for what the spaces are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models.base import (
    HIDDEN,
    SizeAttribute,
    Slice,
    Space,
    Stack,
    Stub,
    Sublayer,
    exists,
    linear_shape,
    units_in,
)
from apt_trainer.settings.choices import POST_NORM_POLICIES

POST_NORM_POLICY = "apt_post_norm_policy"
"""Attribute of a model's config; absent where it is the default. Set by :meth:`ModelFamily.set_post_norm_policy`."""

Reads = Mapping[str, tuple[str, ...]]
"""Module that makes the units → its consecutive parts. A part is a word of letters whose widths add up: "q" the query
rows of a unit, "k" and "v" a key or value head, "n" one neuron, "u" one number for a unit. ("q", "k", "v") is a fused
projection with three parts, ("qkv",) one that is interleaved head by head."""

Amount = Literal["units", "queries", "channels", "kept"]


@dataclass(frozen=True)
class Removal:
    """What goes with the last unit of a sublayer, and the no-ops that then stand in its place."""

    modules: tuple[str, ...]
    stubs: tuple[Stub, ...]


@dataclass(frozen=True)
class ExpertsTable:
    """Experts in the place of a feed-forward, their weights fused into parameters [experts, ...] of ``module``.

    ``makes``: (parameter, dimension of its neurons, dimension of the hidden space), gate and value one behind the
    other; ``writes``: likewise. ``router``: has one row of its ``weight`` for each expert, and sends each token to
    ``top_k`` of them. ``activation``: its output has the neurons of one expert for each token sent there.
    """

    module: str = "mlp.experts"
    router: str = "mlp.gate"
    activation: str = "mlp.experts.act_fn"
    makes: tuple[str, int, int] = ("gate_up_proj", 1, 2)
    writes: tuple[str, int, int] = ("down_proj", 2, 1)


@dataclass(frozen=True)
class SublayerTable:
    """Names inside one layer. ``reads`` take the hidden space in; ``writes`` gives it back.

    ``norms``: on the hidden space; ``closing``: those of them between ``writes`` and the residual stream.
    ``inner``: norms over the units themselves. ``columns``: tables with columns for the units. ``head_dim`` and
    ``group`` (query heads per key and value head): (module, attribute) that holds the number. ``sizes``: (module,
    attribute, amount) that a forward pass reads.
    ``keeping_norm``: what goes instead of ``modules`` where the residual and its norm stay: y = norm(x).
    ``stays``: the sublayer keeps a unit in the first or the last layer. ``crosses``: it reads the other stack.
    ``experts``: there are some, and ``writes`` is the module that adds up what they give.
    """

    name: str
    kind: Literal["heads", "neurons"]
    reads: Reads
    writes: str
    modules: tuple[str, ...]
    stubs: tuple[Stub, ...]
    norms: tuple[str, ...]
    closing: tuple[str, ...] = ()
    inner: Reads = field(default_factory=dict)
    columns: Reads = field(default_factory=dict)
    head_dim: tuple[str, str] | None = None
    group: tuple[str, str] | None = None
    sizes: tuple[tuple[str, str, Amount], ...] = ()
    keeping_norm: Removal | None = None
    stays: Literal["first", "last"] | None = None
    crosses: bool = False
    experts: ExpertsTable | None = None


@dataclass(frozen=True)
class StackTable:
    """One list of layers. ``spaces`` begins the names of its spaces. ``embedding_norms`` are on its input,
    ``final_norms`` on its output. ``added``: embeddings that come behind the ``embedding_norms``."""

    layers: str
    sublayers: tuple[SublayerTable, ...]
    stack: Stack = "encoder"
    spaces: str = "layers"
    embedding_norms: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    final_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Head:
    """What a task head reads from (and writes to) the hidden space, by the ending of the model's class name.

    ``reads`` names twice what reads two vectors of the hidden space side by side.
    ``next_token``: position t predicts the label of t + 1. ``masked_token``: tokens behind a mask are predicted.
    ``projected``: what it is in a model whose embeddings are projected, where that is something else.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()
    next_token: bool = False
    masked_token: bool = False
    projected: Head | None = None


@dataclass(frozen=True)
class Positions:
    """Relative positions that each attention reads beside its tokens: ``number`` of them, each compared with every
    token ``products`` times. Modules of a layer that project them: ``shared`` with the tokens, or their ``own``.
    """

    number: int
    products: int
    shared: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFamily:
    """Table of names for models that share a layout.

    ``post_norm``: the residual stream is normalised after each sublayer; otherwise it has no fixed scale.
    ``parallel``: whether, by the config, all sublayers of a layer read the input of that layer.
    ``residual_multiplier``: what, by the config, the output of a sublayer is multiplied by before it is added.
    ``repeats``: how often, by the config, the layers run one after the other. ``positions``: see there.
    ``tokens``: of one row, where the config says it: those of an image; None: as many as a text has.
    ``projection``: linear between embeddings and hidden space; where a model has it, embeddings and their norms are of
    another width. ``base_norms``: norms on the hidden space that are in no layer and not on the way through them.
    ``adapter_targets``: endings of the linears that get adapters by default, where a model has them.
    ``unsupported``: a sentence for a config outside what the table describes, else None.
    ``config_sizes``: kind of units, "layers" or "head_dim" → fields of the config that say it for all layers alike,
    of "layers" one a stack; ``per_layer``: fields that list something layer by layer.
    ``gguf``: model type → llama.cpp's architecture for it, and the one whose layers may differ in size.
    """

    model_types: tuple[str, ...]
    stacks: tuple[StackTable, ...]
    embeddings: tuple[str, ...]
    heads: dict[str, Head]
    trained_base: tuple[str, ...] = ()
    base_reads: tuple[str, ...] = ()
    base_norms: tuple[str, ...] = ()
    projection: str | None = None
    post_norm: bool = False
    adapter_targets: tuple[str, ...] = ()
    parallel: Callable[[Any], bool] = lambda config: False
    residual_multiplier: Callable[[Any], float] = lambda config: 1.0
    repeats: Callable[[Any], int] = lambda config: 1
    positions: Callable[[Any], Positions | None] = lambda config: None
    tokens: Callable[[Any], int | None] = lambda config: None
    unsupported: Callable[[Any], str | None] = lambda config: None
    config_sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    per_layer: tuple[str, ...] = ("layer_types",)
    gguf: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def prefix(self, model: nn.Module) -> str:
        """Path of the base model inside ``model`` with its dot; empty when ``model`` is the base model."""
        name = getattr(model, "base_model_prefix", "")
        return f"{name}." if name and hasattr(model, name) else ""

    def head(self, model: nn.Module) -> Head:
        """Task head of ``model``; raises :class:`UserError` for a class without an entry."""
        class_name = type(model).__name__
        for ending, head in self.described_heads(model).items():
            if class_name.endswith(ending):
                return head
        if not self.prefix(model) and "For" not in class_name:
            return Head()
        raise UserError(
            f"{class_name} has a task head that is not described. Described heads: {', '.join(self.heads)}. "
            f"Add an entry to the family of {', '.join(self.model_types)}."
        )

    def described_heads(self, model: nn.Module) -> dict[str, Head]:
        """``heads`` as they are on the base of ``model``."""
        if not self._projects(model):
            return self.heads
        return {ending: head.projected or head for ending, head in self.heads.items()}

    def _projects(self, model: nn.Module) -> bool:
        return self.projection is not None and exists(model, self.prefix(model) + self.projection)

    def layer_paths(self, model: nn.Module) -> list[str]:
        """Every layer of every stack."""
        return [layer for stack in self.stacks for layer in self._layers(model, stack)]

    @property
    def has_experts(self) -> bool:
        """Whether feed-forwards are mixtures of experts."""
        return any(table.experts is not None for stack in self.stacks for table in stack.sublayers)

    def block_modules(self, model: nn.Module) -> list[str]:
        return self.layer_paths(model)

    def spaces(self, model: nn.Module) -> list[Space]:
        """All prunable spaces of a dense model, layer by layer, the hidden space last."""
        return [*self._described(model), self._hidden(model)]

    def sublayers(self, model: nn.Module) -> list[Sublayer]:
        """Every attention and feed-forward; what goes with each of them is as the config of ``model`` says."""
        keeps_norms = self.keeps_norms(getattr(model, "config", None))
        found: list[Sublayer] = []
        for stack in self.stacks:
            for i, layer in enumerate(self._layers(model, stack)):
                for table in stack.sublayers:
                    kind: Literal["attention", "mlp"] = "attention" if table.kind == "heads" else "mlp"
                    gone = (table.keeping_norm if keeps_norms else None) or Removal(table.modules, table.stubs)
                    modules = tuple(f"{layer}.{name}" for name in gone.modules)
                    stubs = tuple(Stub(f"{layer}.{s.module}", s.kind, s.masked) for s in gone.stubs)
                    space = f"{stack.spaces}.{i}.{table.name}"
                    last = table.norms[-1] if self.post_norm else (*table.closing, table.writes)[0]
                    output = f"{layer}.{last}"
                    found.append(Sublayer(kind, i, space, modules, stubs, layer, output, stack.stack, table.crosses))
        return found

    def keeps_norms(self, config: Any) -> bool:
        """Whether a sublayer that is gone leaves its residual and norm in a model with ``config``.

        Raises :class:`UserError` for a policy that is unknown, or not for this family.
        """
        policy = getattr(config, POST_NORM_POLICY, POST_NORM_POLICIES[0])
        self._check_policy(policy)
        return bool(policy == "keep_norm")

    def set_post_norm_policy(self, config: Any, policy: str) -> None:
        """Make ``config``, and with it its model, one of ``policy``; raises as :meth:`keeps_norms`, and for a pruned
        model without sublayers that left something else."""
        self._check_policy(policy)
        before = getattr(config, POST_NORM_POLICY, POST_NORM_POLICIES[0])
        if policy != before and (getattr(config, "apt_structure", None) or {}).get("replaced"):
            raise UserError(
                f"The model lost attentions or feed-forwards with post_norm_policy={before!r}, and others cannot go "
                f"with {policy!r}. Set post_norm_policy: {before}."
            )
        if policy != POST_NORM_POLICIES[0]:
            setattr(config, POST_NORM_POLICY, policy)
        elif hasattr(config, POST_NORM_POLICY):
            delattr(config, POST_NORM_POLICY)

    def _check_policy(self, policy: Any) -> None:
        if policy not in POST_NORM_POLICIES:
            raise unknown_choice("post_norm_policy", policy, POST_NORM_POLICIES)
        tables = [table for stack in self.stacks for table in stack.sublayers]
        if policy == "keep_norm" and any(table.keeping_norm is None for table in tables):
            raise UserError(
                "post_norm_policy='keep_norm' is for models with a norm after each residual (BERT, RoBERTa, "
                f"DistilBERT and others), unlike {', '.join(self.model_types)}. Leave it out."
            )

    def default_targets(self, model: nn.Module) -> tuple[str, ...]:
        """``adapter_targets`` that ``model`` has."""
        prefixes = tuple(path + "." for path in self.layer_paths(model))
        paths = [path for path, _ in model.named_modules() if path.startswith(prefixes)]
        return tuple(target for target in self.adapter_targets if any(path.endswith("." + target) for path in paths))

    def head_dim(self, model: nn.Module) -> int:
        """Channels of one head, of the first attention that is there; for models that have one."""
        found = (
            (f"{layer}.{table.head_dim[0]}", table.head_dim[1])
            for stack in self.stacks
            for layer in self._layers(model, stack)
            for table in stack.sublayers
            if table.head_dim is not None
        )
        modules = ((model.get_submodule(path), name) for path, name in found if exists(model, path))
        return next(int(getattr(module, name)) for module, name in modules if hasattr(module, name))

    def trained_head(self, model: nn.Module) -> tuple[str, ...]:
        """Module paths of the task head, which trains in full in every mode."""
        prefix = self.prefix(model)
        paths = [prefix + name for name in self.trained_base] + list(self.head(model).trained)
        return tuple(p for p in paths if exists(model, p))

    def hidden_size(self, model: nn.Module) -> int:
        """Hidden dimensions that ``model``, dense or pruned, has."""
        name = str(self.projection) if self._projects(model) else self.embeddings[0]
        first = model.get_submodule(self.prefix(model) + name)
        size = getattr(first, "embedding_dim", None) or getattr(first, "out_channels", None)
        return int(size or linear_shape(first)[0])  # type: ignore[arg-type]

    def embedding_modules(self, model: nn.Module) -> tuple[str, ...]:
        prefix = self.prefix(model)
        return tuple(prefix + name for name in self.embeddings if exists(model, prefix + name))

    def _layers(self, model: nn.Module, stack: StackTable) -> list[str]:
        path = self.prefix(model) + stack.layers
        if not exists(model, path):
            return []
        return [f"{path}.{i}" for i in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]

    def _described(self, model: nn.Module) -> Iterator[Space]:
        """Spaces of every sublayer."""
        for stack in self.stacks:
            layers = self._layers(model, stack)
            stays = {"first": 0, "last": len(layers) - 1, None: None}
            for i, layer in enumerate(layers):
                for table in stack.sublayers:
                    minimum = int(stays[table.stays] == i)
                    name = f"{stack.spaces}.{i}.{table.name}"
                    if table.experts is None:
                        yield _space(model, name, i, layer, table, stack.stack, minimum)
                    else:
                        yield from _of_experts(model, name, i, layer, table.experts, stack.stack, minimum)

    def _hidden(self, model: nn.Module) -> Space:
        prefix, head = self.prefix(model), self.head(model)
        embeddings = (str(self.projection),) if self._projects(model) else self.embeddings
        slices = [Slice(prefix + name, "out") for name in embeddings]
        norms = [prefix + name for name in self.base_norms]
        writers: list[str] = []
        attributes: list[SizeAttribute] = []
        places: list[tuple[str, Stack]] = []
        for stack in self.stacks:
            opening = [prefix + name for name in stack.embedding_norms if embeddings is self.embeddings]
            opening = [path for path in opening if _is_norm(model, path)]
            norms += opening
            if self.post_norm:
                places += [(path, stack.stack) for path in opening]
            writers += [prefix + name for name in (stack.added if opening else _outermost(embeddings))]
            for layer in self._layers(model, stack):
                for table in stack.sublayers:
                    writes = f"{layer}.{table.writes}"
                    slices += [Slice(f"{layer}.{name}", "in") for name in table.reads]
                    if table.experts is None:
                        slices.append(Slice(writes, "out"))
                    else:
                        fused = _hidden_of_experts(layer, table.experts)
                        slices += fused
                        modules = dict.fromkeys(part.module for part in fused)
                        attributes += [SizeAttribute(path, "hidden_dim") for path in modules]
                    of_table = [f"{layer}.{name}" for name in table.norms]
                    norms += of_table
                    places += [(path, stack.stack) for path in (of_table if self.post_norm else [writes])]
                    closes = any(_is_norm(model, f"{layer}.{name}") for name in table.closing)
                    if not (self.post_norm or closes):
                        writers.append(writes)
            norms += [prefix + name for name in stack.final_norms]
        slices += [Slice(prefix + name, "in") for name in self.base_reads]
        reads = dict.fromkeys(head.reads)
        slices += [Slice(name, "in", (1,) * head.reads.count(name)) for name in reads]
        slices += [Slice(name, "out") for name in head.writes]
        norms = [path for path in (*norms, *head.norms) if _is_norm(model, path)]
        slices = [part for part in slices if exists(model, part.module)]
        return Space(
            HIDDEN,
            "hidden",
            self.hidden_size(model),
            (*slices, *(Slice(path, "out") for path in norms)),
            norms=tuple(norms),
            places=tuple(path for path, _ in places),
            place_stacks=tuple(stack for _, stack in places),
            writers=tuple(path for path in dict.fromkeys(writers) if exists(model, path)),
            attributes=tuple(attributes),
        )


def _space(model: nn.Module, name: str, i: int, layer: str, table: SublayerTable, stack: Stack, minimum: int) -> Space:
    widths = {"n": 1, "u": 1}
    queries = 1
    if table.head_dim is not None:
        width = _number(model, layer, table.head_dim)
        queries = 1 if table.group is None else _number(model, layer, table.group)
        widths |= {"q": queries * width, "k": width, "v": width}
    channels = widths["q" if table.kind == "heads" else "n"]
    makes = {**table.reads, **table.inner, **table.columns}
    slices = [
        Slice(f"{layer}.{module}", "out", tuple(sum(widths[letter] for letter in part) for part in parts))
        for module, parts in makes.items()
        if exists(model, f"{layer}.{module}")
    ]
    writes = Slice(f"{layer}.{table.writes}", "in", (channels,))
    amounts = {"units": 1, "queries": queries, "channels": channels, "kept": None}
    return Space(
        name,
        table.kind,
        linear_shape(model.get_submodule(writes.module))[1] // channels,
        (*slices, writes),
        channels,
        i,
        gate=writes.module,
        norms=tuple(f"{layer}.{module}" for module in table.inner),
        stack=stack,
        minimum=minimum,
        attributes=tuple(SizeAttribute(f"{layer}.{m}", attr, amounts[amount]) for m, attr, amount in table.sizes),
    )


def _of_experts(
    model: nn.Module, name: str, i: int, layer: str, table: ExpertsTable, stack: Stack, minimum: int
) -> Iterator[Space]:
    """The neurons of every expert alike, and the experts."""
    module, router = f"{layer}.{table.module}", f"{layer}.{table.router}"
    (made, rows, _), (written, columns, _) = table.makes, table.writes
    neurons = (Slice(module, "out", (1, 1), (made, rows)), Slice(module, "in", (1,), (written, columns)))
    experts = [Slice(path, "out", (1,), (each, 0)) for path, each in ((module, made), (module, written))]
    experts.append(Slice(router, "out", (1,), ("weight", 0)))
    yield Space(
        name,
        "neurons",
        units_in(model, neurons[1]),
        neurons,
        1,
        i,
        gate=f"{layer}.{table.activation}",
        gate_side="activation",
        stack=stack,
        minimum=minimum,
        attributes=(SizeAttribute(module, "intermediate_dim"),),
    )
    yield Space(
        f"{name.rpartition('.')[0]}.experts",
        "experts",
        units_in(model, experts[-1]),
        tuple(experts),
        1,
        i,
        gate=router,
        gate_side="routed",
        within=name,
        stack=stack,
        minimum=_number(model, layer, (table.router, "top_k")),
        attributes=tuple(SizeAttribute(path, "num_experts") for path in (module, router)),
    )


def _hidden_of_experts(layer: str, table: ExpertsTable) -> list[Slice]:
    """Sides of the hidden space of the weights of experts and of their router."""
    module, (made, _, reads), (written, _, writes) = f"{layer}.{table.module}", table.makes, table.writes
    return [
        Slice(module, "in", (1,), (made, reads)),
        Slice(module, "out", (1,), (written, writes)),
        Slice(f"{layer}.{table.router}", "in", (1,), ("weight", 1)),
    ]


def _number(model: nn.Module, layer: str, where: tuple[str, str]) -> int:
    module, name = where
    return int(getattr(model.get_submodule(f"{layer}.{module}"), name))


def _outermost(paths: tuple[str, ...]) -> list[str]:
    """Those of ``paths`` that are not inside of another: what comes out of that one is what both made."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def _is_norm(model: nn.Module, path: str) -> bool:
    """Whether there is a norm at ``path``; some layouts have an identity there, or nothing."""
    return exists(model, path) and not isinstance(model.get_submodule(path), nn.Identity)
