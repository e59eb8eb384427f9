"""A cut before the first step that NRI decides: whole sublayers by the loss without them, then tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, tiny_batch, tiny_model
from transformers import PreTrainedModel

from apt_trainer import APTTrainer, load_pruned
from apt_trainer.models import HIDDEN
from apt_trainer.scoring.calibration import shares as rows_of
from apt_trainer.scoring.nri import Nri
from apt_trainer.scoring.sublayers.costs import Shape, shares, unit_costs
from apt_trainer.scoring.sublayers.impact import Losses
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.studies.select import Budget, ImpactRanker, candidates_of, choose
from integration.factories import (
    Rows,
    SaveAt,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    target_of,
    weights_of,
)
from integration.test_processes import two_processes
from integration.test_pruned_before import BEFORE, EVENTS, MODELS, OTHERS

NRI: dict[str, Any] = {**BEFORE, "prune_targets": ["sublayers"], "importance": "nri", "target_sparsity": 0.3}
FAMILIES = MODELS | OTHERS


def before(folder: Path, name: str, options: Any = None, dropout: float = 0.0, **changes: Any) -> APTTrainer:
    task, data = FAMILIES[name]
    model = tiny_model(name, task, dropout=dropout)
    return make_trainer(folder, model, Rows(110, data), options, **{**NRI, **changes})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_cuts_what_the_command_drops_and_reloads_equal(name: str, tmp_path: Path) -> None:
    task, data = FAMILIES[name]
    model, rows = tiny_model(name, task), Rows(110, data)
    drawn = [torch.utils.data.default_collate([rows[row] for row in batch]) for batch in rows_of(110, 24, 8, seed=7)]
    units = find_units(model)
    candidates = candidates_of(units, "joint")
    ranker = ImpactRanker(Losses(model, units, drawn), shares(unit_costs(model, units, "params", Shape()), units))
    chosen = [units.members[unit][0].space for unit in choose(candidates, "joint", Budget(2), ranker).units]
    trainer = before(tmp_path, name, target_sparsity=target_of(model, dict.fromkeys(chosen, 0)))
    trainer.train()
    counts = trainer.pruner.plan.counts
    assert sorted(space for space, count in counts.items() if count == 0) == sorted(chosen)
    assert counts[HIDDEN] == trainer.pruner.dense_plan.counts[HIDDEN]
    records = events_of(tmp_path)
    assert [(record["step"], record["kind"]) for record in records] == EVENTS
    assert {record["block_params"] for record in records} == {counted_block_parameters(trainer)}
    assert sum(records[0]["ranks"].values()) < sum(records[-1]["ranks"].values())
    trainer.save_model(str(tmp_path / "model"))
    again: PreTrainedModel = load_pruned(tmp_path / "model").eval()
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_bit_equal_and_measures_nothing_again(name: str, tmp_path: Path) -> None:
    steps = (2, 6, 10)
    whole = before(tmp_path / "whole", name, {"callbacks": [SaveAt(steps)]}, dropout=0.1)
    whole.train()
    for step in steps:
        resumed = before(tmp_path / str(step), name, dropout=0.1)
        resumed.calibration.loss_of = None  # type: ignore[assignment, method-assign]
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(whole) and resumed.pruner.plan == whole.pruner.plan
        expected, got = weights_of(whole.model), weights_of(resumed.model)
        assert expected.keys() == got.keys() and all(torch.equal(w, got[n]) for n, w in expected.items())


def test_an_object_is_as_good_as_a_setting(tmp_path: Path) -> None:
    named = before(tmp_path / "named", "llama", nri_cost="none")
    given = before(tmp_path / "given", "llama", {"importance": Nri("none")}, importance="random")
    for trainer in (named, given):
        trainer.train()
    assert given.pruner.plan == named.pruner.plan != named.pruner.dense_plan
    assert losses_of(given) == losses_of(named)


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"bf16": True}])
def test_other_ways_to_compute(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, other = before(tmp_path / "plain", "llama"), before(tmp_path / "other", "llama", **changes)
    for trainer in (plain, other):
        trainer.train()
        assert 0.3 <= trainer.pruner.sparsity() < 0.5
    if "activation_checkpointing" in changes:
        assert other.pruner.plan == plain.pruner.plan
    impacts = [trainer.pruner.importance._impacts for trainer in (plain, other)]
    assert impacts[0] == pytest.approx(impacts[1], rel=0.3, abs=0.3)


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
from apt_trainer.scoring import nri
from integration.test_nri_before import in_world

nri.Shape = partial(nri.Shape, max_seconds=0.5)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
result = {{}}
for cost in ("params", "latency"):
    trainer = in_world(folder / cost, nri_cost=cost, per_device_train_batch_size=4, ddp_backend="gloo")
    assert trainer.args.world_size == 2
    result[cost] = [trainer.pruner.importance._impacts, trainer.pruner.plan.to_json()]
(folder / f"result.{{rank}}.json").write_text(json.dumps(result))
os._exit(0)
"""


def in_world(folder: Path, **changes: Any) -> APTTrainer:
    """A run whose global batches are equal however many processes share them. The last of 22 rows is short, and rows
    are padded to different lengths, so that the batches of two processes predict different numbers of tokens."""
    model, data = tiny_model("llama", "ForCausalLM"), Rows(96, "text")
    trainer = make_trainer(folder, model, data, **{**NRI, "calibration_samples": 22, "reference_length": 8, **changes})
    trainer.train()
    return trainer


@pytest.mark.distributed
def test_two_processes_measure_what_one_does_and_agree(tmp_path: Path) -> None:
    """Each has its own seconds, of which both take the sum."""
    single = in_world(tmp_path / "single")
    two_processes(tmp_path, WORKER, "result.0.json", "result.1.json")
    first, second = (json.loads((tmp_path / f"result.{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["params"] != first["latency"]
    impacts, plan = first["params"]
    assert impacts == pytest.approx(single.pruner.importance._impacts, rel=1e-5, abs=1e-5)  # type: ignore[attr-defined]
    assert plan == single.pruner.plan.to_json()
