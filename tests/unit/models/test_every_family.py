"""What must hold for every model type with a table. Those of ``test_families.py`` have more tests there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import invariants
import pytest
from tiny import FAMILY_NAMES, LANGUAGE_MODELS
from transformers import PreTrainedModel

from apt_trainer.models import FAMILIES

OTHERS = sorted(FAMILIES.keys() - {*LANGUAGE_MODELS, *FAMILY_NAMES})


@pytest.fixture(scope="module", params=OTHERS)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """Built once for all tests of its type, none of which changes it."""
    yield invariants.model_of(request.param)


def test_every_width_is_claimed(model: PreTrainedModel) -> None:
    invariants.every_width_is_claimed(model)


@pytest.mark.parametrize("gone", [False, True])
def test_masks_equal_the_cut(model: PreTrainedModel, gone: bool) -> None:
    invariants.masks_equal_the_cut(model, gone=gone)


def test_zeroed_outputs_equal_the_cut(model: PreTrainedModel) -> None:
    invariants.zeroed_outputs_equal_the_cut(model)


def test_removed_sublayers_add_nothing(model: PreTrainedModel) -> None:
    invariants.removed_sublayers_add_nothing(model)


def test_costs_are_real(model: PreTrainedModel) -> None:
    invariants.costs_are_real(model)


def test_growth_changes_nothing(model: PreTrainedModel) -> None:
    invariants.growth_changes_nothing(model)


def test_saves_loads_and_generates(model: PreTrainedModel, tmp_path: Path) -> None:
    invariants.generates_with_a_cache(invariants.saves_and_loads(model, tmp_path))


@pytest.mark.parametrize("model_type", OTHERS)
def test_heads_are_described(model_type: str, tmp_path: Path) -> None:
    invariants.heads_are_described(model_type, tmp_path)
