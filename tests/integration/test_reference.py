"""What version 0.1.0 did is done still: the same plans and losses from the same seeds, and its folders load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apt_trainer import load_pruned
from integration.reference_cases import RUNS, answers, models, run

SAVED = Path(__file__).parent / "v0_1"
EXPECTED: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_runs_with_a_fixed_seed_are_as_they_were(name: str, tmp_path: Path) -> None:
    expected, (_, found) = EXPECTED[name], run(name, tmp_path, refit=False)  # a refit came later
    assert found["plan"] == expected["plan"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-3)


@pytest.mark.parametrize("name", EXPECTED)
def test_saved_models_load(name: str) -> None:
    model = load_pruned(SAVED / name)
    assert torch.tensor(answers(model)).allclose(torch.tensor(EXPECTED[name]["logits"]), atol=1e-5)


def test_models_that_are_cut_the_same_answer_the_same() -> None:
    for name, model in models().items():
        assert answers(model) == pytest.approx(EXPECTED[name]["logits"], abs=1e-5)
