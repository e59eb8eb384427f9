"""Seconds that choices rest on are equal on all processes, and measured once in a run, however often it is resumed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from apt_trainer import APTTrainer, impact_pass
from apt_trainer.measure.latency import Latency
from apt_trainer.pruning import latency_cost
from apt_trainer.sublayers.units import Unit
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


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from apt_trainer.pruning import latency_cost
from integration.factories import make_trainer
from integration.test_measured_seconds import LATENCY, clock_of, trained

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
latency_cost.compare_latency = clock_of(("heads", "neurons")[rank])
trainer = trained(folder / "run", **LATENCY, per_device_train_batch_size=4, ddp_backend="gloo")
assert trainer.args.world_size == 2
pruner = trainer.pruner
seconds = pruner.cost.total(pruner.dense_plan.counts)
(folder / f"{{rank}}.json").write_text(json.dumps([seconds, pruner.sparsity(), pruner.plan.to_json()]))
os._exit(0)
"""


@pytest.mark.distributed
def test_processes_choose_by_the_mean_of_their_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its own clock would take other units."""
    plans = []
    for favoured in ("heads", "neurons"):
        monkeypatch.setattr(latency_cost, "compare_latency", clock_of(favoured))
        plans.append(trained(tmp_path / favoured, **LATENCY).pruner.plan)
    assert plans[0] != plans[1]
    two_processes(tmp_path, WORKER, "0.json", "1.json")
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == pytest.approx(0.024 + 0.002, rel=1e-6)
    assert 0.5 <= first[1] < 0.6


def test_a_resumed_run_goes_on_with_the_seconds_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency_cost, "compare_latency", clock_of("heads"))
    whole = trained(tmp_path / "whole", (3, 12), **LATENCY)
    monkeypatch.setattr(latency_cost, "compare_latency", clock_of("neurons"))
    for step in (3, 12):
        resumed = trained(tmp_path / str(step), (), tmp_path / "whole" / f"checkpoint-{step}", **LATENCY)
        assert resumed.pruner.cost == whole.pruner.cost
        assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)
    other = trained(tmp_path / "other", **LATENCY)
    assert other.pruner.plan != whole.pruner.plan


def test_nri_by_seconds_goes_on_with_those_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured at every event, by costs that were measured at first."""
    numbers = itertools.count()

    def costs(model: nn.Module, units: Any, cost: str, shape: Any) -> dict[Unit, float]:
        """Other seconds each time they are measured."""
        assert cost == "latency"
        return {unit: 1.0 + (next(numbers) * 7) % 5 for unit in units.sublayers}

    monkeypatch.setattr(impact_pass, "unit_costs", costs)

    def run(name: str) -> APTTrainer:
        return during(
            tmp_path / name, "bert", nri_cost="latency", reference_length=8, save_strategy="steps", save_steps=3
        )

    whole = run("whole")
    whole.train()
    resumed = run("resumed")
    first = [trainer.pruner.impact.costs for trainer in (whole, resumed)]  # type: ignore[union-attr]
    assert first[0] != first[1]
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.pruner.plan == whole.pruner.plan and losses_of(resumed) == losses_of(whole)
    assert resumed.pruner.importance._impacts == whole.pruner.importance._impacts  # type: ignore[attr-defined]
