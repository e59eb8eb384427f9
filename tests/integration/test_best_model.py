"""The best checkpoint within the final budget ends the run, whatever its ranks were, what was merged since, and what
engine trained."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from torch import nn

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.surgery import adapters as lora
from apt_trainer.training.checkpoints.state import check_complete
from apt_trainer.training.termination import Terminated
from integration.factories import SHORT, Rows, events_of, make_trainer, weights_of
from integration.test_processes import two_processes
from integration.test_termination import Kill
from integration.test_zero import deepspeed_config

BEST: dict[str, Any] = {**SHORT, "max_steps": 16, "load_best_model_at_end": True, "eval_strategy": "steps"}
BEST |= {"eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "distillation_end": 11}
BEFORE = {"pruning_time": "before", "pruning_start": None, "distillation": "none", "distillation_end": None}
LOSSES = {2: 0.01, 4: 0.02, 6: 0.03, 8: 0.9, 10: 0.4, 12: 0.6, 14: 0.5, 16: 0.8}
"""Evaluations at which the dense model is best and step 10 is the best within the budget, met at step 8."""


class Scripted(APTTrainer):
    """Evaluations give what ``losses`` says; the unmerged student's own logits are kept in ``logits``."""

    losses = LOSSES

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> dict[str, float]:
        step = self.state.global_step
        self.__dict__.setdefault("logits", {})[step] = _logits(self.model)
        self.__dict__.setdefault("ranks", {})[step] = lora.ranks(self.model)
        metrics = {"eval_loss": self.losses[step], "eval_accuracy": 1 - self.losses[step]}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    was_training, rows = model.training, Rows(8)
    logits = model.eval()(input_ids=rows.ids, attention_mask=rows.mask).logits
    model.train(was_training)
    return logits


def _trainer(folder: Path, *callbacks: Any, losses: dict[int, float] = LOSSES, **changes: Any) -> Scripted:
    options = {"eval_dataset": Rows(8), "callbacks": list(callbacks)}
    trainer = make_trainer(folder, tiny_model("bert", dropout=0.1), options=options, **{**BEST, **changes})
    trainer.__class__ = type("Scripted", (Scripted,), {"losses": losses})
    return trainer  # type: ignore[return-value]


def _finished_at(folder: Path, checkpoint: Path, **changes: Any) -> APTTrainer:
    """The model of ``checkpoint`` as a resumed run restores it, finished without a further step."""
    trainer = _trainer(folder, **changes, load_best_model_at_end=False)
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.finish()
    return trainer


def _assert_equal(one: nn.Module, other: nn.Module) -> None:
    expected, got = weights_of(one), weights_of(other)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert torch.equal(_logits(one), _logits(other))


def _steps(folder: Path) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")}


PHASES: dict[str, dict[str, Any]] = {
    "adapters": {},
    "merged since": {"tune_after_distillation": "full"},
    "merged before": {"tune_after_pruning": "full"},
    "full": {"tune": "full"},
    "best only": {"save_strategy": "best", "metric_for_best_model": "loss"},
    "mixed precision": {"bf16": True},
    "sublayers": {"prune_targets": ["sublayers"], "importance": "cosine", "target_sparsity": 0.4},
}


@pytest.mark.parametrize("phase", PHASES)
def test_the_best_checkpoint_within_the_budget_ends_the_run(
    tmp_path: Path, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path / "run", **PHASES[phase])
    with caplog.at_level(logging.INFO, logger="apt_trainer"):
        trainer.train()
    best = tmp_path / "run" / "checkpoint-10"
    assert (trainer.state.best_global_step, trainer.state.best_model_checkpoint) == (10, str(best))
    _assert_equal(_finished_at(tmp_path / "again", best, **PHASES[phase]).model, trainer.model)
    tolerance = 2e-2 if "bf16" in PHASES[phase] else 1e-5
    assert torch.allclose(_logits(trainer.model), trainer.__dict__["logits"][10], atol=tolerance)
    assert not torch.allclose(_logits(trainer.model), trainer.__dict__["logits"][16], atol=1e-4)
    said = [record.getMessage() for record in caplog.records if record.name == "apt_trainer.training.checkpoints.best"]
    assert said == [
        "Evaluations before step 8, where the final budget is met, do not count for the best checkpoint.",
        "Loaded the best checkpoint within the budget, checkpoint-10 (loss: 0.4).",
    ]
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(_logits(load_pruned(tmp_path / "model")), _logits(trainer.model))
    assert all(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.parametrize("tune_after", [None, "full"])
def test_after_a_cut_before_training_all_evaluations_count_and_ranks_are_those_of_the_best(
    tmp_path: Path, tune_after: str | None
) -> None:
    changes = {**BEFORE, "tune_after_pruning": tune_after}
    trainer = _trainer(tmp_path / "run", **changes)
    trainer.train()
    ranks = trainer.__dict__["ranks"]
    assert trainer.state.best_global_step == 2 and ranks[2] != ranks[16]
    assert ranks[2] and (tune_after is None) == bool(ranks[16])
    best = tmp_path / "run" / "checkpoint-2"
    _assert_equal(_finished_at(tmp_path / "again", best, **changes).model, trainer.model)
    assert torch.allclose(_logits(trainer.model), trainer.__dict__["logits"][2], atol=1e-5)


def test_without_pruning_every_evaluation_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"target_sparsity": None, "distillation": "none", "distillation_end": None}
    trainer = _trainer(tmp_path, metric_for_best_model="eval_accuracy", **changes)
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == pytest.approx(0.99)
    assert "do not count" not in caplog.text


def test_the_direction_of_the_metric_is_that_of_transformers(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, metric_for_best_model="accuracy", greater_is_better=False)
    trainer.train()
    assert trainer.state.best_global_step == 8


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_keeps_the_best(tmp_path: Path, limit: int) -> None:
    whole = _trainer(tmp_path / "whole")
    whole.train()
    limited = _trainer(tmp_path / "limited", save_total_limit=limit)
    limited.train()
    assert _steps(tmp_path / "limited") == ({10} if limit == 1 else {10, 16})
    _assert_equal(whole.model, limited.model)


@pytest.mark.parametrize("limit", [1, None])
@pytest.mark.parametrize("step", [5, 10, 12, 13])
def test_a_run_that_was_ended_goes_on_to_the_same_best(tmp_path: Path, step: int, limit: int | None) -> None:
    """Also when the best lies before the checkpoint that is resumed from, which no limit clears away."""
    whole = _trainer(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "run"
    with pytest.raises(Terminated):
        _trainer(folder, Kill(step), save_total_limit=limit).train()
    check_complete(folder / f"checkpoint-{step}")
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert state["best_metric"] == (0.4 if step >= 10 else None)
    resumed = _trainer(folder, save_total_limit=limit)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.best_model_checkpoint == str(folder / "checkpoint-10")
    _assert_equal(whole.model, resumed.model)


def test_where_only_the_best_are_saved_sigterm_saves_too(tmp_path: Path) -> None:
    """At a step whose evaluation is no new best."""
    with pytest.raises(Terminated):
        _trainer(tmp_path, Kill(12), save_strategy="best").train()
    assert _steps(tmp_path) == {8, 10, 12}


def test_only_weights_are_enough_to_choose_among(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, save_only_model=True)
    trainer.train()
    assert torch.allclose(_logits(trainer.model), trainer.__dict__["logits"][10], atol=1e-5)


def test_without_an_evaluation_that_counts_the_final_model_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(tmp_path, losses=dict.fromkeys(LOSSES, float("nan")))
    trainer.train()
    assert "No checkpoint was evaluated within the final budget; the final model is kept." in caplog.text
    assert torch.allclose(_logits(trainer.model), trainer.__dict__["logits"][16], atol=1e-5)


def test_a_best_checkpoint_of_another_shape_is_not_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _trainer(tmp_path, load_best_model_at_end=False, metric_for_best_model="loss")
    trainer.train()
    final = _logits(trainer.model)
    trainer.args.load_best_model_at_end = True
    for gone in (tmp_path / "checkpoint-4", tmp_path / "checkpoint-99"):
        trainer.state.best_model_checkpoint = str(gone)
        trainer.load_best()
        assert f"{gone} is gone or has another shape" in caplog.text
    assert torch.equal(_logits(trainer.model), final)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruning_time": "after", "pruning_start": None, "pruning_end": None}, "only the final model"),
        ({"pruning_end": 16}, "until step 16 of 16"),
        ({"pruning_end": 16, "load_best_model_at_end": False, "save_strategy": "best"}, "save_strategy: best"),
        ({"eval_delay": 17}, "eval_delay=17"),
    ],
)
def test_a_run_without_a_choice_is_refused_before_it_starts(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rest = {"distillation": "none", "distillation_end": None, "metric_for_best_model": "loss"}
    with pytest.raises(UserError, match=message):
        _trainer(tmp_path, **rest, **changes)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_metric_stops_the_run_at_its_first_evaluation(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, metric_for_best_model="f1")
    with pytest.raises(UserError, match="metric_for_best_model='f1'.*accuracy, loss"):
        trainer.train()
    assert trainer.state.global_step == 2


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from safetensors.torch import save_file
from integration.factories import weights_of
from integration.test_best_model import ENGINES, _logits, _trainer

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
for name, changes in ENGINES["KIND"].items():
    trainer = _trainer(folder / name, per_device_train_batch_size=4, save_total_limit=1, **changes)
    trainer.train()
    at_best = trainer.logits[10]
    tensors = {{"logits": _logits(trainer.model), "at_best": at_best, **weights_of(trainer.model)}}
    save_file({{key: value.contiguous() for key, value in tensors.items()}}, folder / f"{{name}}.{{rank}}.safetensors")
    trainer.save_model(str(folder / name / "model"))
torch.distributed.barrier()
os._exit(0)
"""

ENGINES: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {"adapters": {"ddp_backend": "gloo"}},
    "zero": {
        "zero2": {"deepspeed": deepspeed_config(2)},
        "zero3": {"deepspeed": deepspeed_config(3)},
        "zero3 merged": {"deepspeed": deepspeed_config(3), "tune_after_distillation": "full"},
        "zero3 bf16": {"deepspeed": deepspeed_config(3), "bf16": True},
    },
}
"""Runs of two processes, by how they are started."""


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ENGINES)
def test_two_processes_load_the_same_best(kind: str, tmp_path: Path) -> None:
    files = [f"{name}.{rank}.safetensors" for name in ENGINES[kind] for rank in (0, 1)]
    two_processes(tmp_path, WORKER.replace("KIND", kind), *files)
    for name, changes in ENGINES[kind].items():
        assert _steps(tmp_path / name) == {10}
        first, second = (load_file(tmp_path / f"{name}.{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[key], second[key]) for key in first if key != "at_best")
        whole = "bf16" not in changes
        logits = first.pop("logits")
        assert torch.allclose(logits.float(), first.pop("at_best").float(), atol=1e-5 if whole else 2e-2)
        assert torch.equal(_logits(load_pruned(tmp_path / name / "model")), logits)
        settings = {key: value for key, value in changes.items() if key.startswith("tune")}
        expected = weights_of(_finished_at(tmp_path / "again", tmp_path / name / "checkpoint-10", **settings).model)
        assert first.keys() == second.keys() - {"logits", "at_best"} == expected.keys()
        if whole:
            assert all(torch.equal(first[key], expected[key]) for key in first)
        assert [record["step"] for record in events_of(tmp_path / name, "prune")] == [5, 8]
