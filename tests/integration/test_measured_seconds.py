"""Seconds that choices rest on are equal on all processes, and those that a run began with when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from apt_trainer import APTTrainer, UserError
from apt_trainer.measure.latency import Latency
from apt_trainer.pruning import latency_cost
from apt_trainer.scoring import nri
from apt_trainer.scoring.sublayers.costs import Shape
from apt_trainer.scoring.sublayers.units import Unit, Units
from integration.factories import losses_of, trained
from integration.test_nri_during import during
from integration.test_processes import two_processes

LATENCY: dict[str, Any] = {"sparsity_metric": "latency", "prune_targets": ["heads", "neurons"], "reference_length": 8}


def clock_of(favoured: str) -> Callable[[dict[str, nn.Module], list[int], int], dict[str, dict[int, Latency]]]:
    """A clock by which units of the kind ``favoured`` take twelve times as long as those of the other kind."""
    seconds = {"dense": 26.0, f"half_{favoured}": 14.0, f"no_{favoured}": 2.0}
    other = {"heads": "neurons", "neurons": "heads"}[favoured]
    seconds |= {f"half_{other}": 25.0, f"no_{other}": 24.0}

    def clock(models: dict[str, nn.Module], batch_sizes: list[int], length: int) -> dict[str, dict[int, Latency]]:
        return {name: dict.fromkeys(batch_sizes, Latency(seconds[name], 0.0, 1)) for name in models}

    return clock


def still(models: dict[str, nn.Module], batch_sizes: list[int], length: int) -> dict[str, dict[int, Latency]]:
    """A clock by which a model without heads or neurons takes as long as one with all."""
    return {name: dict.fromkeys(batch_sizes, Latency(26.0, 0.0, 1)) for name in models}


def costs_of(rank: int) -> Callable[..., dict[Unit, float]]:
    """Seconds of sublayers as a process measures them: 1, 2, … in the first, one more each in the second."""

    def costs(model: nn.Module, units: Units, cost: str, shape: Shape) -> dict[Unit, float]:
        assert cost == "latency"
        return {unit: 1.0 + number + rank for number, unit in enumerate(units.sublayers)}

    return costs


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from apt_trainer.pruning import latency_cost
from apt_trainer.scoring import nri
from integration.test_measured_seconds import LATENCY, clock_of, costs_of, during, trained
from integration.test_zero import deepspeed_config

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
latency_cost.compare_latency = clock_of(("heads", "neurons")[rank])
found = {{}}
for name, engine in (("ddp", {{"ddp_backend": "gloo"}}), ("zero3", {{"deepspeed": deepspeed_config(3)}})):
    trainer = trained(folder / name, **LATENCY, **engine, per_device_train_batch_size=4)
    assert trainer.args.world_size == 2
    pruner = trainer.pruner
    seconds = pruner.budget.cost.total(pruner.dense_plan.counts)
    found[name] = [seconds, pruner.sparsity(), pruner.plan.to_json()]
nri.unit_costs = costs_of(rank)
trainer = during(folder / "nri", "bert", nri_cost="latency", reference_length=8, per_device_train_batch_size=4)
trainer.train()
found["nri"] = [list(trainer.pruner.importance.costs.values()), trainer.pruner.plan.to_json()]
(folder / f"{{rank}}.json").write_text(json.dumps(found))
os._exit(0)
"""


@pytest.mark.distributed
def test_processes_choose_by_the_mean_of_their_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own clock would take other units; also where NRI is relative to seconds."""
    plans = []
    for favoured in ("heads", "neurons"):
        monkeypatch.setattr(latency_cost, "compare_latency", clock_of(favoured))
        plans.append(trained(tmp_path / favoured, **LATENCY).pruner.plan)
    assert plans[0] != plans[1]
    two_processes(tmp_path, WORKER, "0.json", "1.json")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for engine in ("ddp", "zero3"):
        seconds, sparsity, plan = first[engine]
        assert seconds == pytest.approx(0.024 + 0.002, rel=1e-6) and 0.5 <= sparsity < 0.6
        assert plan == first["ddp"][2]
    assert first["nri"][0] == [number + 1.5 for number in range(6)]


def test_a_resumed_run_goes_on_with_the_seconds_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_cost, "compare_latency", clock_of("heads"))
    whole = trained(tmp_path / "whole", (3, 12), **LATENCY)
    monkeypatch.setattr(latency_cost, "compare_latency", clock_of("neurons"))
    for step in (3, 12):
        resumed = trained(tmp_path / str(step), (), tmp_path / "whole" / f"checkpoint-{step}", **LATENCY)
        assert resumed.pruner.budget.cost == whole.pruner.budget.cost
        assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)
    monkeypatch.setattr(latency_cost, "compare_latency", still)
    resumed = trained(tmp_path / "still", (), tmp_path / "whole" / "checkpoint-12", **LATENCY)
    assert resumed.pruner.plan == whole.pruner.plan
    with pytest.raises(UserError, match="Neither heads nor neurons take time that can be measured"):
        trained(tmp_path / "refused", **LATENCY)
    monkeypatch.setattr(latency_cost, "compare_latency", clock_of("neurons"))
    other = trained(tmp_path / "other", **LATENCY)
    assert other.pruner.plan != whole.pruner.plan


def test_nri_by_seconds_goes_on_with_those_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at every event, by costs that were measured at first."""

    def run(name: str) -> APTTrainer:
        monkeypatch.setattr(nri, "unit_costs", costs_of(("whole", "resumed").index(name)))
        return during(
            tmp_path / name, "bert", nri_cost="latency", reference_length=8, save_strategy="steps", save_steps=3
        )

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    first = [trainer.pruner.importance.costs for trainer in (whole, resumed)]  # type: ignore[attr-defined]
    assert first[0] != first[1]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)
    assert resumed.pruner.importance._impacts == whole.pruner.importance._impacts  # type: ignore[attr-defined]
