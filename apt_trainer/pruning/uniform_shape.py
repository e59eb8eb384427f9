"""What plans of equal layers have to keep to, so that a stock checkpoint comes out: found by trying, before a run.

Not for choosing such a plan (``plan.uniform``), nor for making the checkpoint (``store.stock``).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, ModelFamily, Space
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.uniform import Layer, UniformShape
from apt_trainer.store.stock import allowed_numbers, matching
from apt_trainer.surgery.cutting import apply_plan

_KIND_NAMES = {"heads": "heads", "neurons": "neurons", HIDDEN: "hidden dimensions", "layers": "layers"}


def uniform_shape(model: PreTrainedModel, family: ModelFamily, targets: Collection[str]) -> UniformShape:
    """What plans of equal layers of the dense ``model`` have to keep to, so that they are stock checkpoints.

    ``targets``: as ``prune_targets``. Raises :class:`UserError` for one that its config cannot say, and as
    :func:`check_start`.
    """
    check_start(model)
    spaces, config = family.spaces(model), model.config
    if any(space.kind == "experts" for space in spaces):
        raise UserError(
            "shape: uniform is not for a mixture of experts. Set shape: free; a result whose layers happen to keep as "
            "many experts each is a stock checkpoint all the same."
        )
    if "sublayers" in targets and family.keeps_norms(config):
        raise UserError(
            "shape: uniform takes layers out as a whole, but post_norm_policy: keep_norm keeps their norms. Set "
            "post_norm_policy: remove_norm, or shape: free."
        )
    allowed = allowed_numbers(config, family, spaces)
    layers = _layers(family, model, spaces)
    trial = _Trial(model, family, spaces, layers, allowed)
    asked = [*(kind for kind in _KIND_NAMES if kind in targets), *(["layers"] if "sublayers" in targets else [])]
    silent = [kind for kind in asked if not trial.can_say(kind)]
    if silent:
        can = [kind for kind in _KIND_NAMES if trial.can_say(kind)]
        named = [{"layers": "sublayers"}.get(kind, kind) for kind in can]
        raise UserError(
            f"shape: uniform makes a stock checkpoint, but the config of {config.model_type} cannot say fewer "
            f"{' or '.join(_KIND_NAMES[kind] for kind in silent)}: other numbers follow from theirs. Set "
            f"prune_targets: [{', '.join(named)}] (sublayers: whole layers) or fewer of these, or shape: free."
        )
    return UniformShape(trial.layers, allowed)


def check_start(model: PreTrainedModel) -> None:
    """Raise :class:`UserError` unless ``model`` is a stock one, which others of equal layers can come from."""
    if hasattr(model.config, "apt_structure"):
        raise UserError(
            "shape: uniform starts from a stock model, but this one was pruned to a shape that no stock config "
            "describes. Start from its dense original, or set shape: free to prune it further."
        )


def check_stock(model: PreTrainedModel, family: ModelFamily, plan: PruningPlan) -> None:
    """Raise :class:`UserError` unless the dense ``model``, which is not touched, is a stock one after ``plan``."""
    spaces = family.spaces(model)
    if not _is_stock(model, family, spaces, plan):
        raise UserError(
            f"Without these units no stock config of {model.config.model_type} describes the model: layers have to go "
            "as a whole, all others to keep as many heads, in a number that the config accepts. Drop more, fewer or "
            "others (protect names layers that stay), or choose shape free. Nothing was written."
        )


def _is_stock(model: PreTrainedModel, family: ModelFamily, spaces: Sequence[Space], plan: PruningPlan) -> bool:
    with torch.device("meta"):
        cut = type(model)(copy.deepcopy(model.config))
    apply_plan(cut, family, spaces, PruningPlan.dense(spaces), plan)
    return matching(cut, family, plan) is not None


class _Trial:
    """One plan a kind, to see whether a stock class has the same model. ``layers``: those that cannot go stay."""

    def __init__(
        self,
        model: PreTrainedModel,
        family: ModelFamily,
        spaces: Sequence[Space],
        layers: tuple[Layer, ...],
        allowed: Callable[[int, int], bool],
    ) -> None:
        self.family, self.spaces, self.layers, self.allowed = family, spaces, layers, allowed
        self.model = model
        self.dense = PruningPlan.dense(spaces)
        self._known: dict[str, bool] = {}

    def can_say(self, kind: str) -> bool:
        """Whether less of ``kind`` is a stock model; True where there is but one."""
        if kind not in self._known:
            self._known[kind] = self._layers_may_go() if kind == "layers" else self._fewer_units(kind)
        return self._known[kind]

    def _fewer_units(self, kind: str) -> bool:
        """Tries the largest number that is allowed, if need be beside fewer heads or dimensions."""
        size: dict[str, int] = {space.kind: space.size for space in self.spaces}
        if size[kind] == 1:
            return True
        pairs = itertools.product(range(size["heads"], 0, -1), range(size[HIDDEN], 0, -1))
        for heads, hidden in sorted(pairs, key=lambda pair: (pair[0] < size["heads"]) + (pair[1] < size[HIDDEN])):
            number = {**size, "heads": heads, HIDDEN: hidden}
            number["neurons"] -= kind == "neurons"
            if number[kind] < size[kind] and self.allowed(heads, hidden):
                kept = {space.name: self.dense.kept[space.name][: number[space.kind]] for space in self.spaces}
                return _is_stock(self.model, self.family, self.spaces, PruningPlan(kept))
        return False

    def _layers_may_go(self) -> bool:
        """Some layers are made otherwise where they are the first of their stack; those then stay."""
        for first_stays in (False, True):
            layers = tuple(
                Layer(layer.stack, layer.spaces, layer.stays or (first_stays and position == 0))
                for position, layer in self._positions()
            )
            going = [next((la for la in layers if la.stack == stack and not la.stays), None) for stack in self._stacks]
            gone = {name for layer in going if layer is not None for name in layer.spaces}
            if not gone:
                return first_stays is False  # there is nothing that could go
            kept = {name: () if name in gone else units for name, units in self.dense.kept.items()}
            if _is_stock(self.model, self.family, self.spaces, PruningPlan(kept)):
                self.layers = layers
                return True
        return False

    @property
    def _stacks(self) -> list[str]:
        return list(dict.fromkeys(layer.stack for layer in self.layers))

    def _positions(self) -> list[tuple[int, Layer]]:
        """Each layer and its position in its stack."""
        return [(i, la) for stack in self._stacks for i, la in enumerate(x for x in self.layers if x.stack == stack)]


def _layers(family: ModelFamily, model: nn.Module, spaces: Sequence[Space]) -> tuple[Layer, ...]:
    found: dict[str, list[Space]] = {}
    of_space = {space.name: space for space in spaces}
    for sublayer in family.sublayers(model):
        found.setdefault(sublayer.block, []).append(of_space[sublayer.space])
    return tuple(
        Layer(members[0].stack, tuple(space.name for space in members), any(space.minimum for space in members))
        for members in found.values()
    )
