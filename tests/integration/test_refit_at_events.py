"""Weights that read what is left are solved for anew at cuts while the model trains, under every engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from transformers import TrainerCallback

from apt_trainer import APTTrainer
from apt_trainer.errors import UserError
from apt_trainer.settings import MethodSettings
from apt_trainer.surgery.slicing import Grow, Keep, NewValues
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.state import MASTER, State, follow
from apt_trainer.training.session import PruningSession
from integration.factories import (
    GLOBAL_BATCH,
    SHORT,
    Fixed,
    Recorder,
    Rows,
    SaveAt,
    events_of,
    losses_of,
    make_trainer,
    unpadded,
    watch,
    weights_of,
)
from integration.test_fsdp2 import FSDP
from integration.test_processes import two_processes
from integration.test_pruned_before import doubled
from integration.test_zero import deepspeed_config

REFIT: dict[str, Any] = {**SHORT, "refit": True, "calibration_samples": 20, "max_grad_norm": 1.0}
FULL: dict[str, Any] = {"tune": "full", "rank_growth": "none"}
EVENTS = (5, 8)
PHASES: dict[str, dict[str, Any]] = {"adapters": {}, "full": FULL}


def run_of(
    folder: Path, options: dict[str, Any] | None = None, name: str = "bert", **changes: Any
) -> tuple[APTTrainer, dict[str, Any]]:
    model, data, own = unpadded(name)
    options = {**own, **(options or {})}
    return make_trainer(folder, model, data, options, **{**REFIT, **changes}), options


@pytest.mark.parametrize("phase", PHASES)
def test_a_cut_of_what_others_can_say_loses_nearly_nothing_while_training(phase: str, tmp_path: Path) -> None:
    lost = []
    for refit in (False, True):
        folder, model = tmp_path / str(refit), tiny_model("bert")
        options = {"importance": Fixed(doubled(model))}
        changes = {"refit": refit, "target_sparsity": 0.1, "round_to": 1, "prune_targets": ["neurons"]}
        changes |= {
            "learning_rate": 1e-5,
            "num_pruning_events": 1,
            "pruning_start": 0,
            "pruning_end": 3,
            "mask_window": 0,
        }
        trainer = make_trainer(folder, model, Rows(40), options, **{**REFIT, **PHASES[phase], **changes})
        trainer.train()
        (record,) = events_of(folder, "prune")
        lost.append(abs(record["loss_after"] - record["loss_before"]))
    assert lost[1] < 0.2 * lost[0]


@pytest.mark.parametrize("phase", PHASES)
def test_survivors_get_new_values_and_keep_their_moments(phase: str, tmp_path: Path) -> None:
    before, after = Recorder(EVENTS), Recorder(EVENTS)
    trainer, _ = run_of(tmp_path, {"callbacks": [before]}, **PHASES[phase])
    events = watch(trainer, before, after)
    trainer.pruner.masks.open = None  # type: ignore[assignment, method-assign]  # units go at once
    trainer.train()
    events = [event for event in events if event.kind == "prune"]
    assert [event.step for event in events] == list(EVENTS)
    for event in events:
        old, new = before.at[event.step], after.at[event.step]
        renewed = {name for name, edits in event.edits.items() if NewValues() in edits}
        assert len(renewed) > 1 and not any(".lora_" in name for name in renewed)
        assert (phase == "full") == bool(renewed & new.trained)
        for name, value in new.weights.items():
            edits = list(event.edits.get(name, ()))
            if name.startswith("apt_transform.") or name not in old.weights:
                continue  # not the pruner's
            if not any(isinstance(edit, Grow) for edit in edits):
                assert torch.equal(value, follow(old.weights[name], "", edits)) == (name not in renewed), name
            for key, moment in old.moments.get(name, {}).items():
                assert torch.equal(new.moments[name][key], follow(moment, key, edits))


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_goes_on_bit_for_bit(phase: str, tmp_path: Path) -> None:
    whole, _ = run_of(tmp_path / "whole", {"callbacks": [SaveAt([4, 6])]}, "llama", **PHASES[phase])
    whole.train()
    for step in (4, 6):
        again, _ = run_of(tmp_path / "again", None, "llama", **PHASES[phase])
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        ours, theirs = weights_of(whole.model), weights_of(again.model)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------- every engine


ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"ddp_backend": "gloo"},
    "zero1": {"deepspeed": 1},
    "zero2": {"deepspeed": 2},
    "zero3": {"deepspeed": 3},
    "fsdp2": FSDP,
}
"""Settings of each; a number is the stage of ZeRO."""
CASES = {"full": FULL, "bf16": {**FULL, "bf16": True}, "adapters": {"calibration_samples": 17}}
"""The last row of ``adapters`` is of one process."""


class States(TrainerCallback):
    """Whole optimizer state before (given to the trainer) or after (added to it) the method's part of some steps."""

    def __init__(self) -> None:
        self.at: dict[int, State] = {}
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.trainer: APTTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in EVENTS:
            engine = engine_of(self.trainer)
            engine.settle()
            self.at[state.global_step] = copy.deepcopy(dict(engine.whole_states()))
            self.weights[state.global_step] = {name: value.clone() for name, value in engine.weights()}


def watched(folder: Path, engine: str, case: str) -> dict[str, Any]:
    """A run under ``engine``: its losses, and how many values were found to be carried as they should."""
    changes = {**CASES[case], **ENGINES[engine]}
    if "deepspeed" in changes:
        changes["deepspeed"] = deepspeed_config(changes["deepspeed"])
    before, after = States(), States()
    trainer, _ = run_of(folder, {"callbacks": [before]}, per_device_train_batch_size=GLOBAL_BATCH // 2, **changes)
    before.trainer = after.trainer = trainer
    trainer.add_callback(after)
    events: dict[int, Any] = {}
    apply = trainer.pruner.apply

    def spy(*args: Any, **kwargs: Any) -> Any:
        event = apply(*args, **kwargs)
        events[event.step] = event
        return event

    trainer.pruner.apply = spy  # type: ignore[method-assign]
    trainer.train()
    found = {"moments": 0, "masters": 0, "renewed": 0}
    for step in EVENTS:
        for name, edits in events[step].edits.items():
            renewed = any(isinstance(edit, NewValues) for edit in edits)
            found["renewed"] += renewed
            for key, value in before.at[step].get(name, {}).items() if name in after.at[step] else ():
                new = after.at[step][name][key]
                if key == MASTER and renewed:
                    assert torch.equal(new.view(-1), after.weights[step][name].float().view(-1)), (step, name)
                    found["masters"] += 1
                elif key != MASTER or all(isinstance(edit, Keep) for edit in edits):
                    assert not torch.is_tensor(value) or torch.equal(new, follow(value, key, edits)), (step, name, key)
                    found["moments"] += renewed
    return found | {"losses": losses_of(trainer), "plan": trainer.pruner.plan.to_json()}


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from integration.test_refit_at_events import CASES, watched

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for case in CASES:
    result = watched(folder / case, "ENGINE", case)
    (folder / f"{{case}}.{{rank}}.json").write_text(json.dumps(result))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, APTTrainer]:
    """The cases in one process."""
    runs = {}
    for case, changes in CASES.items():
        runs[case], _ = run_of(tmp_path_factory.mktemp(case), None, **changes)
        runs[case].train()
    return runs


@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_applies_new_values_as_one_process(
    engine: str, alone: dict[str, APTTrainer], tmp_path: Path
) -> None:
    """Moments of survivors stay bit for bit, and float32 masters are taken from the new values."""
    two_processes(
        tmp_path, WORKER.replace("ENGINE", engine), *(f"{case}.{rank}.json" for case in CASES for rank in (0, 1))
    )
    for case in CASES:
        expected = alone[case]
        for rank in (0, 1):
            result = json.loads((tmp_path / f"{case}.{rank}.json").read_text())
            assert result["plan"] == expected.pruner.plan.to_json()
            assert result["renewed"] > 4
            assert (result["moments"] > 0) == (case != "adapters")
            assert (result["masters"] > 0) == (case == "bf16" and engine.startswith("zero"))
            tolerance = 0.03 if case == "bf16" else 1e-5
            for step, values in losses_of(expected).items():
                assert result["losses"][str(step)][0] == pytest.approx(values[0], rel=tolerance), (case, step)


def test_rows_of_several_data_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_dataset holds several data sets"):
        make_trainer(tmp_path, tiny_model("bert"), {"one": Rows(20)}, {"heldout_dataset": Rows(8)}, **REFIT)


def test_a_refit_without_rows_is_refused(tmp_path: Path) -> None:
    settings = MethodSettings(target_sparsity=0.3, refit=True, distillation="none", prune_targets=["neurons"])
    with pytest.raises(UserError, match="refit: true solves for weights on batches"):
        PruningSession(tiny_model("bert"), settings, 10, torch.optim.AdamW)
