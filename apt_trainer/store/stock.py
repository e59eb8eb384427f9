"""Models whose layers are all cut alike: stock classes and stock configs with smaller numbers, which anything loads.

Whether a config can say what was cut is found out with the real classes: the stock class is built from the edited
config on the meta device and has to have the modules, shapes and numbers of the cut model. Layers that are gone as a
whole leave the list of layers here, and only here: while a model trains, no-ops stand in their place.
Not for models that differ from layer to layer (``saved_model``), nor for choosing equal layers (``plan.uniform``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from apt_trainer.models import HIDDEN, ModelFamily, Space
from apt_trainer.models.base import exists
from apt_trainer.models.family import POST_NORM_POLICY, StackTable
from apt_trainer.models.modeling_apt import get_size
from apt_trainer.plan.pruning_plan import PruningPlan

if TYPE_CHECKING:  # this module is imported as soon as AutoConfig is, as saved_model is
    from transformers import PreTrainedConfig, PreTrainedModel

DENSE_SIZES = "apt_dense_sizes"
"""Entry of a stock config: the numbers of the dense model in its place, for comparisons. No loader needs it."""


def become_stock(model: PreTrainedModel, family: ModelFamily, plan: PruningPlan) -> bool:
    """Make the cut ``model``, in place, what its stock class makes of a smaller config; False: no config says it.

    ``model.config`` is still that of the dense model. Weights stay the same objects, under the names that the layers
    left give them.
    """
    stock = matching(model, family, plan)
    if stock is None:
        return False
    old_name = _Renaming(model, family, plan).old_name
    for path, module in stock.named_modules():
        if path:
            old = model.get_submodule(old_name(path))
            module._parameters, module._buffers, module.training = old._parameters, old._buffers, old.training
    model._modules, model.config = stock._modules, stock.config
    return True


def with_dense_sizes(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` with the numbers of the dense model that its model was cut from, where it says them."""
    dense = copy.deepcopy(config)
    for name, value in (getattr(config, DENSE_SIZES, None) or {}).items():
        setattr(dense, name, value)
    vars(dense).pop(DENSE_SIZES, None)
    return dense


# ---------------------------------------------------------------------- what a config can say


def allowed_numbers(
    config: PreTrainedConfig, family: ModelFamily, spaces: Sequence[Space]
) -> Callable[[int, int], bool]:
    """Whether a config may have so many units of heads per layer and hidden dimensions, by its own check."""

    @cache
    def allowed(heads: int, hidden: int) -> bool:
        numbers = {"heads": heads, HIDDEN: hidden}
        sizes = _config_sizes(config, family, spaces, {k: v for k, v in numbers.items() if k in family.config_sizes})
        return _edited(config, sizes) is not None

    return allowed


def _config_sizes(
    config: PreTrainedConfig, family: ModelFamily, spaces: Sequence[Space], numbers: dict[str, int]
) -> dict[str, int]:
    """Config field → value for ``numbers`` of units by kind."""
    values: dict[str, int] = {}
    for kind, number in numbers.items():
        for name in family.config_sizes[kind]:
            dense = next(space.size for space in spaces if space.kind == kind)
            of_dense = getattr(config, name, None)
            # query heads come in groups, one for each unit
            factor = of_dense // dense if kind == "heads" and isinstance(of_dense, int) else 1
            values[name] = factor * number
    return values


def _edited(config: PreTrainedConfig, values: dict[str, Any]) -> PreTrainedConfig | None:
    """A copy of ``config`` with ``values``; None where it could not be loaded so."""
    edited = copy.deepcopy(config)  # not made anew: some configs read their own values differently the second time
    try:
        for name, value in values.items():
            setattr(edited, name, value)
        type(config).from_dict(edited.to_dict())
    except (ValueError, StrictDataclassError):
        return None
    return edited


def _stock_config(
    model: PreTrainedModel, family: ModelFamily, spaces: Sequence[Space], plan: PruningPlan
) -> PreTrainedConfig | None:
    """Config for ``plan``; None where layers differ or the family's table has no name for what is less."""
    config, renaming = model.config, _Renaming(model, family, plan)
    numbers: dict[str, int] = {}
    for space in spaces:
        count = plan.counts[space.name]
        if space.kind != HIDDEN and renaming.is_gone(space):
            continue
        if numbers.setdefault(space.kind, count) != count or count == 0:
            return None
    dense: dict[str, int] = {space.kind: space.size for space in spaces}
    less = {kind: number for kind, number in numbers.items() if number < dense[kind]}
    if not family.config_sizes.keys() >= less.keys():
        return None
    values: dict[str, Any] = dict(_config_sizes(config, family, spaces, less))
    if {"heads", HIDDEN} & less.keys():
        values |= {name: family.head_dim(model) for name in family.config_sizes.get("head_dim", ())}
    fields = family.config_sizes.get("layers", ())
    for number, (kept, layers) in enumerate(renaming.stacks.values()):
        if len(kept) < layers:
            if number >= len(fields):
                return None
            values[fields[number]] = len(kept)
            for listed in family.per_layer:
                of_layers = getattr(config, listed, None)
                if isinstance(of_layers, list):
                    values[listed] = [of_layers[i] for i in kept]
    edited = _edited(config, values)
    if edited is None:
        return None
    dense_values = {name: getattr(config, name, None) for name in values}
    setattr(edited, DENSE_SIZES, dense_values)
    vars(edited).pop(POST_NORM_POLICY, None)
    return edited


# ---------------------------------------------------------------------- whether two models are the same


class _Renaming:
    """Which layers a plan leaves, and how what is in them was called in the dense model.

    ``stacks``: path of each list of layers → (positions of the layers left, layers of the dense model).
    """

    def __init__(self, model: nn.Module, family: ModelFamily, plan: PruningPlan) -> None:
        self.stacks: dict[str, tuple[list[int], int]] = {}
        self._gone: set[tuple[str, int]] = set()
        whole = not family.keeps_norms(getattr(model, "config", None))
        for stack in family.stacks:
            path = family.prefix(model) + stack.layers
            if not exists(model, path):
                continue
            layers = len(model.get_submodule(path))  # type: ignore[arg-type]
            gone = {i for i in range(layers) if whole and _is_empty(stack, i, plan)}
            self._gone |= {(stack.spaces, i) for i in gone}
            self.stacks[path] = ([i for i in range(layers) if i not in gone], layers)

    def is_gone(self, space: Space) -> bool:
        """Whether the layer of ``space`` is."""
        return any(space.name.startswith(f"{stack}.{layer}.") for stack, layer in self._gone)

    def old_name(self, path: str) -> str:
        """What is called ``path`` once the layers that are gone have left."""
        for layers, (kept, _) in self.stacks.items():
            if path.startswith(layers + "."):
                number, dot, rest = path.removeprefix(layers + ".").partition(".")
                return f"{layers}.{kept[int(number)]}{dot}{rest}"
        return path


def _is_empty(stack: StackTable, layer: int, plan: PruningPlan) -> bool:
    return all(not plan.kept[f"{stack.spaces}.{layer}.{table.name}"] for table in stack.sublayers)


def matching(model: PreTrainedModel, family: ModelFamily, plan: PruningPlan) -> PreTrainedModel | None:
    """The stock model without weights that computes what the cut ``model`` does; None: there is none."""
    cls, renaming = type(model), _Renaming(model, family, plan)
    with torch.device("meta"):
        spaces = family.spaces(cls(copy.deepcopy(model.config)))
        config = _stock_config(model, family, spaces, plan)
        if config is None:
            return None
        try:
            stock = cls(config)
        except ValueError:  # sizes that do not go together
            return None
    inside = tuple(path + "." for path in renaming.stacks)
    for path, module in stock.named_modules():
        old_path = renaming.old_name(path)
        if not exists(model, old_path) and path:
            return None
        old = model.get_submodule(old_path)
        if not _same(old, module, path.startswith(inside), path in renaming.stacks):
            return None
    return stock if _same_numbers(model, stock, family, renaming) else None


def _same(old: nn.Module, new: nn.Module, in_layer: bool, is_list: bool) -> bool:
    """Whether ``old`` is a module like ``new``: class, parts, shapes, and what is no size of the model."""
    if type(old) is not type(new) or (not is_list and old._modules.keys() != new._modules.keys()):
        return False
    shapes = [{n: None if p is None else p.shape for n, p in m._parameters.items()} for m in (old, new)]
    if shapes[0] != shapes[1] or not old._buffers.keys() >= new._buffers.keys():
        return False
    kinds: tuple[type, ...] = (float, bool, str, type(None)) if in_layer else (float,)
    for name in vars(old).keys() & vars(new).keys():
        ours, theirs = vars(old)[name], vars(new)[name]
        if name.startswith("_") or name in ("training", "gradient_checkpointing"):
            continue
        if (isinstance(ours, kinds) or isinstance(theirs, kinds)) and ours != theirs:
            return False
    return True


def _same_numbers(model: nn.Module, stock: nn.Module, family: ModelFamily, renaming: _Renaming) -> bool:
    """Whether all sizes agree that a forward pass of a layer reads."""
    for stack in family.stacks:
        layers = family.prefix(stock) + stack.layers
        for i in range(len(renaming.stacks[layers][0]) if layers in renaming.stacks else 0):
            for table in stack.sublayers:
                numbers = [(module, name) for module, name, _ in table.sizes]
                for module, name in [*numbers, *(w for w in (table.head_dim, table.group) if w is not None)]:
                    path = f"{layers}.{i}.{module}"
                    old = model.get_submodule(renaming.old_name(path))
                    if get_size(old, name) != get_size(stock.get_submodule(path), name):
                        return False
    return True
