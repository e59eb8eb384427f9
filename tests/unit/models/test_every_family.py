"""What must hold for every model type with a table. Those of ``test_families.py`` have more tests there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import invariants
import pytest
from tiny import FAMILY_NAMES, LANGUAGE_MODELS
from transformers import PreTrainedModel

import apt_trainer
from apt_trainer.cli import main
from apt_trainer.models import FAMILIES

OTHERS = sorted(FAMILIES.keys() - {*LANGUAGE_MODELS, *FAMILY_NAMES})
ONE_A_TABLE = sorted({id(FAMILIES[name]): name for name in reversed(OTHERS)}.values())
"""For what takes long and depends on the table more than on the type."""


@pytest.fixture(scope="module", params=OTHERS)
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """Built once for all tests of its type, none of which changes it."""
    yield invariants.model_of(request.param)


def test_every_width_is_claimed(model: PreTrainedModel) -> None:
    invariants.every_width_is_claimed(model)


def test_masks_equal_the_cut(model: PreTrainedModel) -> None:
    invariants.masks_equal_the_cut(model, gone=True)


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


@pytest.mark.parametrize("model_type", ONE_A_TABLE)
def test_equal_layers_are_stock_or_refused(model_type: str, tmp_path: Path) -> None:
    invariants.equal_layers_are_stock_or_refused(invariants.model_of(model_type), tmp_path)


@pytest.mark.parametrize("model_type", OTHERS)
def test_heads_are_described(model_type: str, tmp_path: Path) -> None:
    invariants.heads_are_described(model_type, tmp_path)


def test_the_readme_lists_every_type() -> None:
    text = " ".join((Path(apt_trainer.__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())
    listed = text.partition("what each can lose): ")[2].partition(". Heads")[0]
    assert listed == ", ".join(f"`{name}`" for name in sorted(FAMILIES)) and len(FAMILIES) >= 60


def test_the_overview_is_that_of_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families"]) == 0
    printed = capsys.readouterr().out
    rows = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in printed.split("\n"))
        if cells
    }
    assert rows.keys() - {"model type", "-"} >= FAMILIES.keys() and f"{len(FAMILIES)} model types" in printed
    assert rows["llama"][0] == "decoder" and rows["llama"][-1] == "yes" and "language modelling" in rows["llama"][3]
    assert rows["bart"][0] == "encoder–decoder" and rows["bart"][2] == "a head in the last decoder.cross_heads"
    assert rows["granite"][3] == "language modelling"  # transformers has no other class
