"""Runs of model types that have no test of their own, and what they save in a process without this package."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import invariants
import pytest
import torch
from tiny import logits, tiny_batch
from unit.models.test_every_family import ONE_A_TABLE, OTHERS

from apt_trainer import APTTrainer, load_pruned
from integration.factories import (
    SHORT,
    Rows,
    SaveAt,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    weights_of,
)

RUN: dict[str, Any] = {**SHORT, "max_steps": 8, "pruning_end": 5, "distillation_end": 7, "round_to": 1}
MIXTURES = ("mixtral", "olmoe", "qwen3_moe")
OF_EXPERTS = {"round_to": 8, "prune_targets": ["heads", "neurons", "experts", "hidden"]}


def _trainer(folder: Path, model_type: str, save: tuple[int, ...] = ()) -> APTTrainer:
    model = invariants.model_of(model_type)
    data: Any = Rows(24, "target" if model.config.is_encoder_decoder else "text")
    if model.main_input_name == "pixel_values":
        images = tiny_batch(model, size=24)
        data = [{name: values[row] for name, values in images.items()} for row in range(24)]
    changes = {**RUN, **OF_EXPERTS} if model_type in MIXTURES else RUN
    return make_trainer(folder, model, data, {"callbacks": [SaveAt(save)]}, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each model type, with its model and the logits that it gives."""
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize("model_type", OTHERS)
def test_a_run_prunes_distils_and_resumes_bit_equal(model_type: str, saved: Path, tmp_path: Path) -> None:
    """Resumed, once a table, from between two events, while adapters have grown and a teacher is there."""
    whole = _trainer(tmp_path, model_type, (4,) if model_type in ONE_A_TABLE else ())
    whole.train()
    assert whole.pruner.sparsity() >= 0.5 and len(losses_of(whole)) == RUN["max_steps"]
    assert counted_block_parameters(whole) == events_of(tmp_path, "prune")[-1]["block_params"]
    assert events_of(tmp_path, "teacher")
    if model_type in ONE_A_TABLE:
        resumed = _trainer(tmp_path / "again", model_type)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        expected, got = weights_of(whole.model), weights_of(resumed.model)
        assert expected.keys() == got.keys()
        assert [key for key in expected if not torch.equal(expected[key], got[key])] == []
        assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)
    whole.save_model(str(saved / model_type))
    batch = {name: value for name, value in tiny_batch(whole.model).items() if name != "labels"}
    if whole.model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    found = logits(whole.model.eval(), batch)
    assert torch.equal(logits(load_pruned(saved / model_type).eval(), batch), found)
    torch.save((batch, found), saved / model_type / "expected.pt")


ELSEWHERE = """
import sys, torch, transformers
from pathlib import Path
for folder in sorted(Path(sys.argv[1]).iterdir()):
    batch, expected = torch.load(folder / "expected.pt")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = next(name for name in sys.argv[2:] if name in config.auto_map)
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        print(folder.name, torch.equal(model(**batch).logits, expected))
assert "apt_trainer" not in sys.modules
"""


def test_saved_folders_load_in_a_process_without_this_package(saved: Path, tmp_path: Path) -> None:
    autos = [auto.__name__ for auto in invariants.AUTO]
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(saved), *autos],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": ""},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split("\n")[:-1] == [f"{path.name} True" for path in sorted(saved.iterdir())]
