"""One global batch cut in other ways: accumulation, gradient checkpointing and two processes give the same run, and
their checkpoints go on in each other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import TrainerCallback

import apt_trainer
from apt_trainer import APTTrainer
from integration.factories import (
    CHANGES,
    GLOBAL_BATCH,
    Fixed,
    Rows,
    events_of,
    losses_of,
    make_trainer,
    target_of,
    trained,
    weights_of,
)

ROOT = Path(apt_trainer.__file__).parents[1]
WORLDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "straight": (None, {}),
    "accumulated": (None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "again": ("straight/checkpoint-10", {}),
    "from_single": ("single/checkpoint-6", {}),
    "to_zero2": ("straight/checkpoint-6", {"deepspeed": 2}),
}
"""Runs of two processes, in batches of 4: name → (the checkpoint that it goes on from, other settings)."""


# Biases of keys are left out where weights are compared: softmax cancels them, so their gradient is rounding noise,
# which Adam scales up.


def _assert_close(one: APTTrainer, other: APTTrainer, tolerance: float, since: int = 0) -> None:
    """Up to step ``since``, where the parts of the loss may be those of one of several processes, only its whole."""
    assert one.pruner.plan == other.pruner.plan
    losses, others = losses_of(one), losses_of(other)
    assert losses.keys() == others.keys() and len(losses) == 20
    for step, values in losses.items():
        parts = None if step > since else 1
        assert others[step][:parts] == pytest.approx(values[:parts], abs=tolerance, rel=tolerance)
    for name, weight in weights_of(one.model).items():
        assert name.endswith("key.bias") or torch.allclose(weight, other.model.get_parameter(name), atol=tolerance)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_accumulated_batches_equal_one_batch(
    single: tuple[Path, APTTrainer], tmp_path: Path, micro_batch: int
) -> None:
    steps = GLOBAL_BATCH // micro_batch
    other = trained(tmp_path, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=steps)
    _assert_close(single[1], other, 1e-5)
    expected, got = (events_of(folder, "prune") for folder in (single[0], tmp_path))
    assert [record["ranks"] for record in expected] == [record["ranks"] for record in got]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, dropout: float) -> None:
    one = trained(tmp_path / "off", dropout=dropout)
    other = trained(tmp_path / "on", dropout=dropout, activation_checkpointing=True)
    assert other.model.is_activation_checkpointing
    _assert_close(one, other, 1e-5)


def test_rank_scores_and_other_rules_do_not_depend_on_accumulation(tmp_path: Path) -> None:
    """Rules that see each micro-batch, and rank scores from parameter gradients."""
    runs = [
        trained(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=GLOBAL_BATCH // size,
            importance="taylor",
            preset_overrides={"rank_score": "absolute"},
        )
        for size in (8, 2)
    ]
    _assert_close(*runs, 1e-5)


class Gradients(TrainerCallback):
    """Names, by step, of parameters that train but got no gradient."""

    def __init__(self) -> None:
        self.missing: dict[int, list[str]] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.missing[state.global_step + 1] = [name for name, p in named if p.requires_grad and p.grad is None]


def test_every_parameter_takes_part_in_every_step(tmp_path: Path) -> None:
    """What DDP waits for, also where sublayers are masked in full or no layer is left to compare with the teacher."""
    gone = {f"layers.{layer}.heads": 0.0 for layer in range(3)} | {"layers.2.neurons": 0.0}
    seen = Gradients()
    options = {"callbacks": [seen], "importance": Fixed(gone)}
    target = target_of(tiny_model("bert"), dict.fromkeys(gone, 0))
    trainer = make_trainer(tmp_path, options=options, **{**CHANGES, "round_to": 1, "target_sparsity": target})
    trainer.train()
    assert trainer.pruner.plan.counts == {**trainer.pruner.dense_plan.counts, **dict.fromkeys(gone, 0)}
    assert len(seen.missing) == 20
    assert {step: names for step, names in seen.missing.items() if names} == {}


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from integration.factories import SAVED, losses_of, trained, weights_of
from integration.test_processes import WORLDS
from integration.test_zero import deepspeed_config

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name, (source, changes) in WORLDS.items():
    changes = {{"ddp_backend": "gloo", "per_device_train_batch_size": 4}} | changes
    if "deepspeed" in changes:
        changes["deepspeed"] = deepspeed_config(changes["deepspeed"])
    trainer = trained(folder / name, SAVED, None if source is None else folder / source, **changes)
    save_file(weights_of(trainer.model), folder / f"{{name}}.{{rank}}.safetensors")
    trainer.save_model(str(folder / name / "model"))
    result = {{
        "world": trainer.args.world_size,
        "plan": trainer.pruner.plan.to_json(),
        "losses": losses_of(trainer),
        "files": sorted(file.name for file in (folder / name / "model").iterdir()) if rank == 0 else [],
    }}
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
os._exit(0)
"""


def two_processes(folder: Path, code: str, *results: str) -> None:
    """Let two processes run ``code`` with ``folder`` as argument; it must write the files ``results``.

    They start warm, as a launcher starts them: starting Python takes longer than most of these runs. Launchers are in
    ``test_launchers``.
    """
    worker = folder / "worker.py"
    worker.write_text(code.format(root=str(ROOT), tests=str(Path(__file__).parents[1])))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        environment = os.environ | {name: str(number) for name, number in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        with (folder / f"{rank}.log").open("w") as log:
            command = [warm.python(), str(worker), str(folder)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + 280
    while all(rank.poll() is None for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
    for rank in ranks:  # once one has failed, the other waits for it in vain
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(timeout=60)
        rank.kill()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-4000:] for rank in range(2))
    assert [rank.wait() for rank in ranks] == [0, 0], logs
    assert all((folder / name).exists() for name in results), logs


def _read(folder: Path, name: str, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / f"{name}.{rank}.json").read_text()), load_file(folder / f"{name}.{rank}.safetensors")


def _events(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["kind"], r["block_params"], r["ranks"]) for r in events_of(folder)]


@pytest.mark.distributed
def test_two_processes_equal_one_and_go_on_from_each_other(single: tuple[Path, APTTrainer], tmp_path: Path) -> None:
    """One test for all entries of ``WORLDS``, since starting two processes takes longer than the rest."""
    (tmp_path / "single").symlink_to(single[0])
    two_processes(tmp_path, WORKER, *(f"{name}.{rank}.json" for name in WORLDS for rank in (0, 1)))
    expected = single[1]
    for name, (source, _) in WORLDS.items():
        (first, weights), (second, others) = (_read(tmp_path, name, rank) for rank in (0, 1))
        assert first["world"] == second["world"] == 2
        assert first["plan"] == second["plan"] == expected.pruner.plan.to_json()
        assert weights.keys() == others.keys() == weights_of(expected.model).keys()
        assert all(torch.equal(weight, others[key]) for key, weight in weights.items())
        for step, values in losses_of(expected).items():
            assert first["losses"][str(step)] == pytest.approx(list(values), rel=1e-4, abs=2e-7)  # float32 near 0
        for key, weight in weights.items():
            assert key.endswith("key.bias") or torch.allclose(weight, expected.model.get_parameter(key), atol=1e-4)
        saved = ["README.md", "config.json", "model.safetensors", "modeling_apt.py", "pruning_plan.json"]
        assert first["files"] == saved
        start = 0 if source is None else int(source.rpartition("-")[2])
        assert _events(tmp_path / name) == [record for record in _events(single[0]) if record[0] > start]

    (straight, weights), (again, others) = (_read(tmp_path, name, 0) for name in ("straight", "again"))
    assert straight["losses"] == again["losses"] and len(straight["losses"]) == 20
    assert [key for key, weight in weights.items() if not torch.equal(weight, others[key])] == []

    for source in ("straight/checkpoint-6", "straight/checkpoint-10", "to_zero2/checkpoint-10"):  # back to one process
        back = trained(tmp_path / "back" / source, resume=tmp_path / source, per_device_train_batch_size=GLOBAL_BATCH)
        assert back.args.world_size == 1
        _assert_close(expected, back, 1e-4, since=int(source[-2:].strip("-")))


EVALUATOR = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration.factories import Rows, make_trainer
from tiny import tiny_model

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
seen = []
def rows(prediction):
    seen.append(prediction.label_ids.tolist())
    return {{"rows": len(prediction.label_ids)}}
options = {{"eval_dataset": Rows(11), "compute_metrics": rows}}
trainer = make_trainer(
    folder / "run", tiny_model("bert"), Rows(8), options, ddp_backend="gloo", per_device_eval_batch_size=4
)
loss = trainer.evaluate()["eval_loss"]
trainer.predict(Rows(11))
(folder / f"rows.{{rank}}.json").write_text(json.dumps({{"seen": seen, "loss": loss}}))
os._exit(0)
"""


@pytest.mark.distributed
def test_two_processes_evaluate_each_row_once(tmp_path: Path) -> None:
    """11 rows in batches of 2 × 4: the last batch is filled up with rows that must not count twice."""
    two_processes(tmp_path, EVALUATOR, "rows.0.json", "rows.1.json")
    expected = [int(row["labels"]) for row in Rows(11)]
    alone = make_trainer(tmp_path / "alone", tiny_model("bert"), Rows(8), per_device_eval_batch_size=8)
    loss = alone.evaluate(Rows(11))["eval_loss"]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rows.{rank}.json").read_text())
        assert found["seen"] == [expected, expected]
        assert found["loss"] == pytest.approx(loss, rel=1e-6)
