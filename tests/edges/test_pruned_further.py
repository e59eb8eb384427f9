"""Pruning further: a model that was pruned before is a starting point like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import (
    CASES,
    FAMILY_NAMES,
    LANGUAGE_MODELS,
    adapted,
    gap,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from transformers import PreTrainedModel

from apt_trainer import UserError, load_pruned
from apt_trainer.measure import count_parameters
from apt_trainer.models import HIDDEN, Space, family_of
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore

MODELS = {name: "ForSequenceClassification" for name in FAMILY_NAMES} | LANGUAGE_MODELS


def gone(spaces: list[Space]) -> list[str]:
    """An attention and a feed-forward that may vanish."""
    free = [space for space in spaces if not space.minimum and space.name != HIDDEN]
    attention = next(space.name for space in free if space.kind == "heads" and space.layer == 1)
    return [attention, next(space.name for space in free if space.kind == "neurons" and space.layer == 0)]


def pruned(model: PreTrainedModel, seed: int = 1) -> tuple[PreTrainedModel, PruningPlan]:
    """``model``, cut in place: unequal heads, neurons and hidden dimensions, two sublayers gone; and its plan."""
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed, vanish=gone(spaces))
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    return model, plan


@pytest.mark.parametrize("name", MODELS)
def test_masked_is_cut_on_a_model_that_was_cut_before(name: str, tmp_path) -> None:
    dense = tiny_model(name, MODELS[name])
    _, dense_spaces, whole = parts(dense)
    both = copy.deepcopy(dense)
    model, first = pruned(dense)
    model.save_pretrained(tmp_path / "first")
    model = load_pruned(tmp_path / "first").eval()
    family, start = family_of(model.config), starting_point(model)
    assert start.spaces == dense_spaces and start.plan == first and start.is_pruned
    assert parameter_cost(start.dense, family, start.spaces, blocks_only=False).total(first.counts) == count_parameters(model)
    second = random_plan(start.spaces, first, 5, vanish=gone_later(start.spaces, first))
    batch, before = tiny_batch(model), None
    store = MaskStore(model, start.spaces, family.sublayers(model))
    before = logits(model, batch)
    store.open(first.counts)
    store.move(first.survivors(second), 1.0)
    masked = logits(model, batch)
    store.close()
    apply_plan(model, family, start.spaces, first, second)
    as_pruned(model, family, second)
    after = logits(model, batch)
    assert gap(masked, after) < 1e-5 * max(1.0, float(after.abs().max())) and gap(before, after) > 1e-3
    apply_plan(both, family, dense_spaces, whole, second)
    assert torch.equal(logits(both, batch), after)
    model.save_pretrained(tmp_path / "second")
    again = load_pruned(tmp_path / "second").eval()
    assert gap(logits(again, batch), after) < 1e-6
    assert starting_point(again).plan == second


def gone_later(spaces: list[Space], plan: PruningPlan) -> list[str]:
    left = [s for s in spaces if plan.kept[s.name] and not s.minimum and s.name != HIDDEN]
    return [left[-1].name]
