"""One cut before the first step, scored on rows of the training data; then a smaller model with growing ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import logits, randomise, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.models import HIDDEN, family_of
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.runs import dry_run, preflight
from apt_trainer.scoring import Importance
from apt_trainer.scoring.calibration import shares
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from integration.factories import (
    Fixed,
    Rows,
    SaveAt,
    config,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    weights_of,
)
from integration.test_processes import two_processes

BEFORE: dict[str, Any] = {"pruning_time": "before", "pruning_start": None, "pruning_end": 8, "num_pruning_events": 2}
BEFORE |= {
    "distillation": "none",
    "distillation_end": None,
    "max_steps": 12,
    "calibration_samples": 24,
    "refit": False,
}
MODELS = {"bert": ("ForSequenceClassification", "classification"), "llama": ("ForCausalLM", "text")}
OTHERS = {"gpt2": ("ForCausalLM", "text"), "t5": ("ForConditionalGeneration", "target")}
EVENTS = [(0, "prune"), (4, "grow"), (8, "grow")]


def before(
    folder: Path, name: str = "bert", options: Any = None, dropout: float = 0.0, rows: int = 110, **changes: Any
) -> APTTrainer:
    task, data = (MODELS | OTHERS)[name]
    model = tiny_model(name, task, dropout=dropout)
    return make_trainer(folder, model, Rows(rows, data), options, **{**BEFORE, **changes})


@dataclass
class Run:
    name: str
    trainer: APTTrainer
    folder: Path
    rows: list[list[int]] = field(default_factory=list)
    gradients: list[bool] = field(default_factory=list)
    in_optimizer: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in which calibration, the optimizer and masks were watched."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = before(folder, request.param)
    run = Run(request.param, trainer, folder)
    loss_of, make_optimizer, data = trainer.calibration.loss_of, trainer.create_optimizer, trainer.train_dataset

    def loss_spy(batch: dict[str, Any]) -> torch.Tensor:
        loss = loss_of(batch)
        run.losses.append(float(loss.detach()))
        run.rows.append([int((data.ids == row).all(1).nonzero()[0]) for row in batch["input_ids"]])
        run.gradients.append(any(p.requires_grad or p.grad is not None for p in trainer.model.parameters()))
        return loss

    def optimizer_spy(*args: Any) -> torch.optim.Optimizer:
        run.blocks.append(counted_block_parameters(trainer))
        optimizer = make_optimizer(*args)
        run.in_optimizer.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
        return optimizer

    def opened(*args: Any) -> None:
        raise AssertionError("masks are not needed")

    trainer.calibration.loss_of = loss_spy  # type: ignore[method-assign]
    trainer.create_optimizer = optimizer_spy  # type: ignore[method-assign]
    trainer.pruner.masks.open = opened  # type: ignore[method-assign]
    trainer.train()
    return run


# ---------------------------------------------------------------------------- one run


def test_scores_come_from_the_drawn_rows_without_a_gradient_of_any_weight(run: Run) -> None:
    assert run.rows == shares(110, 24, 8, seed=7) and [len(batch) for batch in run.rows] == [8, 8, 8]
    assert run.gradients == [False] * 3


def test_the_cut_is_that_of_scores_computed_on_those_rows(run: Run, tmp_path: Path) -> None:
    task, data = MODELS[run.name]
    model, rows = tiny_model(run.name, task), Rows(110, data)
    pruner = AdaptivePruner(model, config(tmp_path, **BEFORE))
    pruner.start(make_schedule(pruner.settings, 12))
    batches = [torch.utils.data.default_collate([rows[row] for row in batch]) for batch in run.rows]
    pruner.calibrate(batches, lambda batch: model(**batch).loss)
    pruner.step(0)
    assert pruner.plan == run.trainer.pruner.plan != run.trainer.pruner.dense_plan


def test_no_optimizer_ever_saw_the_dense_model(run: Run) -> None:
    records = events_of(run.folder)
    assert run.blocks == [records[0]["block_params"]] * 3
    assert run.in_optimizer == [record["trainable_params"] for record in records]


def test_the_target_is_met_before_the_first_step(run: Run) -> None:
    pruner, records = run.trainer.pruner, events_of(run.folder)
    assert [(record["step"], record["kind"]) for record in records] == EVENTS
    dense = pruner.block_cost.total(pruner.dense_plan.counts)
    largest = pruner.block_cost.marginal(HIDDEN, pruner.dense_plan.counts) * pruner.budget.limits.round_to[HIDDEN]
    kept = counted_block_parameters(run.trainer)
    assert kept <= 0.5 * dense < kept + largest
    assert {record["sparsity"] for record in records} == {1 - kept / dense}
    assert {record["block_params"] for record in records} == {kept}
    logged = [log["sparsity"] for log in run.trainer.state.log_history if "sparsity" in log]
    assert logged == [1 - kept / dense] * 12


def test_losses_before_and_after_are_those_of_one_batch(run: Run) -> None:
    first, *growths = events_of(run.folder)
    assert first["loss_before"] == pytest.approx(run.losses[0], rel=1e-5)
    assert first["loss_after"] != pytest.approx(first["loss_before"], rel=1e-3)
    for record in growths:
        assert record["loss_after"] == pytest.approx(record["loss_before"], rel=1e-6)
    assert all(record["seconds"] > 0 for record in (first, *growths))


def test_ranks_grow_at_the_events_within_the_budget_of_the_dense_model(run: Run) -> None:
    records, pruner = events_of(run.folder), run.trainer.pruner
    dense = before(run.folder / "dense", run.name).pruner
    widths = dense.growth.widths(pruner.plan)
    sizes = [sum(rank * widths[path] for path, rank in record["ranks"].items()) for record in records]
    assert pruner.growth.parameters_at_start == dense.growth.parameters_at_start
    assert set(records[0]["ranks"].values()) == {2}
    assert sizes[0] < sizes[1] < sizes[2] <= 4 * dense.growth.parameters_at_start
    assert sizes[1] <= 2.5 * dense.growth.parameters_at_start


def test_the_result_reloads_with_equal_outputs(run: Run) -> None:
    run.trainer.save_model(str(run.folder / "model"))
    batch = {name: value[:6] for name, value in (("input_ids", run.trainer.train_dataset.ids),)}
    again = load_pruned(run.folder / "model").eval()
    assert torch.equal(logits(again, batch), logits(run.trainer.model.eval(), batch))


# ---------------------------------------------------------------------------- resuming, several ways to compute


@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_bit_equal_and_scores_nothing_again(name: str, tmp_path: Path) -> None:
    steps = (2, 4, 6, 8, 10)
    whole = before(tmp_path / "whole", name, {"callbacks": [SaveAt(steps)]}, dropout=0.1)
    whole.train()
    for step in steps:
        folder = tmp_path / str(step)
        resumed = before(folder, name, dropout=0.1)
        resumed.calibration.loss_of = None  # type: ignore[assignment, method-assign]
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(whole) and resumed.pruner.plan == whole.pruner.plan
        expected, got = weights_of(whole.model), weights_of(resumed.model)
        assert expected.keys() == got.keys() and all(torch.equal(w, got[n]) for n, w in expected.items())
        later = [event for event in EVENTS if event[0] > step]
        written = events_of(folder) if later else []
        assert [(record["step"], record["kind"]) for record in written] == later


def test_what_is_drawn_for_scoring_leaves_the_run_that_follows_alone(tmp_path: Path) -> None:
    """A rule that ignores data gives the same run whatever is drawn, dropout included."""
    losses = []
    for samples in (8, 40):
        options = {"importance": Fixed(), "data_collator": _drawing}
        trainer = before(tmp_path / str(samples), dropout=0.1, options=options, calibration_samples=samples)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == losses[1]


def _drawing(rows: list[Any]) -> Any:
    """A collator that draws random numbers, as one that masks tokens does."""
    torch.rand(3)
    return torch.utils.data.default_collate(rows)


@pytest.mark.parametrize(
    "changes", [{"activation_checkpointing": True}, {"bf16": True}, {"calibration_batch_size": 24}]
)
def test_other_ways_to_compute(tmp_path: Path, changes: dict[str, Any]) -> None:
    plain, other = before(tmp_path / "plain"), before(tmp_path / "other", **changes)
    sizes = []
    loss_of = other.calibration.loss_of
    other.calibration.loss_of = lambda batch: sizes.append(len(batch["labels"])) or loss_of(batch)  # type: ignore[method-assign]
    plain.train()
    other.train()
    assert sizes == ([24] if "calibration_batch_size" in changes else [8, 8, 8])
    if "activation_checkpointing" in changes:
        assert other.pruner.plan == plain.pruner.plan
    assert other.pruner.sparsity() >= 0.5
    losses, others = losses_of(plain), losses_of(other)
    assert all(others[step][0] == pytest.approx(values[0], abs=0.3) for step, values in losses.items())


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(tmp_path: Path, name: str) -> None:
    trainer = before(tmp_path, name)
    trainer.train()
    assert [(record["step"], record["kind"]) for record in events_of(tmp_path)] == EVENTS
    assert counted_block_parameters(trainer) == events_of(tmp_path)[0]["block_params"]
    assert trainer.pruner.sparsity() >= 0.5


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration.factories import losses_of
from integration.test_pruned_before import in_world

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
trainer = in_world(folder / "run", per_device_train_batch_size=4, ddp_backend="gloo")
result = {{"world": trainer.args.world_size, "plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer)}}
(folder / f"result.{{rank}}.json").write_text(json.dumps(result))
os._exit(0)
"""


def in_world(folder: Path, **changes: Any) -> APTTrainer:
    """A run whose global batches are equal however many processes share them; the last of 22 rows is short."""
    data = Rows(96, padded=False)
    trainer = make_trainer(folder, tiny_model("bert"), data, **{**BEFORE, "calibration_samples": 22, **changes})
    trainer.train()
    return trainer


@pytest.mark.distributed
def test_two_processes_share_the_scoring_and_agree(tmp_path: Path) -> None:
    single = in_world(tmp_path / "single")
    two_processes(tmp_path, WORKER, "result.0.json", "result.1.json")
    first, second = (json.loads((tmp_path / f"result.{rank}.json").read_text()) for rank in (0, 1))
    assert first["world"] == second["world"] == 2
    assert first["plan"] == second["plan"] == single.pruner.plan.to_json()
    for step, values in losses_of(single).items():
        assert first["losses"][str(step)][0] == pytest.approx(values[0], rel=1e-4)
    records, expected = events_of(tmp_path / "run"), events_of(tmp_path / "single")
    assert [(r["step"], r["kind"], r["ranks"]) for r in records] == [
        (r["step"], r["kind"], r["ranks"]) for r in expected
    ]


# ---------------------------------------------------------------------------- weights that are solved for anew


@torch.no_grad()
def doubled(model: PreTrainedModel) -> dict[str, list[float]]:
    """Let the second half of all neurons be a copy of the first; scores by which the copies go first."""
    scores = {}
    for space in family_of(model.config).spaces(model):
        if space.kind != "neurons":
            continue
        half = space.size // 2
        scores[space.name] = [1.0] * half + [0.0] * (space.size - half)
        for part in space.slices:
            if part.side == "out":
                for parameter in model.get_submodule(part.module).parameters():
                    rows = parameter.T if type(model.get_submodule(part.module)).__name__ == "Conv1D" else parameter
                    rows[half : 2 * half] = rows[:half]
    return scores


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_refit_makes_up_for_what_others_can_say(name: str, tmp_path: Path) -> None:
    """Neurons go that others double: without a refit their part is lost, with one nearly nothing is."""
    lost = []
    for refit in (False, True):
        task, data = (MODELS | OTHERS)[name]
        model = tiny_model(name, task)
        options = {"importance": Fixed(doubled(model))}
        changes = {"refit": refit, "target_sparsity": 0.1, "round_to": 1, "prune_targets": ["neurons"]}
        trainer = make_trainer(tmp_path / str(refit), model, Rows(40, data), options, **{**BEFORE, **changes})
        trainer.train()
        record = events_of(tmp_path / str(refit))[0]
        lost.append(abs(record["loss_after"] - record["loss_before"]))
    assert lost[1] < 0.2 * lost[0]


def test_a_run_with_a_refit_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = before(tmp_path / "whole", "llama", {"callbacks": [SaveAt([5])]}, refit=True)
    whole.train()
    resumed = before(tmp_path / "resumed", "llama", refit=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("importance", ["magnitude", "salience"])
def test_a_refit_takes_one_pass_which_is_that_of_the_scores_where_there_is_one(
    tmp_path: Path, importance: str
) -> None:
    trainer, seen = before(tmp_path, importance=importance, refit=True), []
    loss_of = trainer.calibration.loss_of
    trainer.calibration.loss_of = lambda batch: seen.append(batch) or loss_of(batch)  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 3


# ---------------------------------------------------------------------------- rules, phases, teachers, records


@pytest.mark.parametrize(("importance", "batches"), [("magnitude", 0), ("random", 0), ("taylor", 3), ("salience", 3)])
def test_rules_that_need_no_data_are_shown_none(tmp_path: Path, importance: str, batches: int) -> None:
    trainer, seen = before(tmp_path, importance=importance), []
    loss_of = trainer.calibration.loss_of
    trainer.calibration.loss_of = lambda batch: seen.append(batch) or loss_of(batch)  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == batches
    assert trainer.pruner.sparsity() >= 0.5
    assert None not in (events_of(tmp_path)[0]["loss_before"], events_of(tmp_path)[0]["loss_after"])


def test_a_rule_of_the_users_own_decides(tmp_path: Path) -> None:
    own = Fixed({"layers.0.heads": 0.0, "layers.2.neurons": 1e-3})
    trainer = before(tmp_path, options={"importance": own}, prune_targets=["heads", "neurons"], target_sparsity=0.3)
    trainer.train()
    assert own.updates == 3  # batches before training, and no step of it
    assert trainer.pruner.plan.kept["layers.0.heads"] == ()


def test_fewer_rows_than_samples_are_all_used(tmp_path: Path) -> None:
    trainer, seen = before(tmp_path, rows=13, calibration_samples=256), []
    loss_of = trainer.calibration.loss_of
    trainer.calibration.loss_of = lambda batch: seen.extend(batch["labels"]) or loss_of(batch)  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 13


def test_what_trains_widens_at_the_last_event(tmp_path: Path) -> None:
    trainer = before(tmp_path, tune_after_pruning="full")
    trainer.train()
    records = [(r["step"], r["kind"], r["tune"]) for r in events_of(tmp_path)]
    assert records == [(0, "prune", "adapters"), (4, "grow", "adapters"), (8, "phase", "full")]


@pytest.mark.parametrize("changes", [{"tune": "full"}, {"rank_growth": "none"}])
def test_without_growth_there_is_one_event(tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer = before(tmp_path, **changes)
    trainer.train()
    assert [(record["step"], record["kind"]) for record in events_of(tmp_path)] == EVENTS[:1]
    assert trainer.pruner.sparsity() >= 0.5


def test_without_a_target_nothing_is_scored(tmp_path: Path) -> None:
    trainer = before(tmp_path, target_sparsity=None)
    trainer.calibration.loss_of = None  # type: ignore[assignment, method-assign]
    trainer.train()
    assert not (tmp_path / "events.jsonl").exists() and len(losses_of(trainer)) == 12


@pytest.mark.parametrize("width", [16, 24])
def test_a_model_as_teacher(tmp_path: Path, width: int) -> None:
    teacher: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        tiny_config("bert", num_labels=3, hidden_size=width, intermediate_size=32)
    )
    randomise(teacher, seed=5)
    changes = {"distillation": "model", "teacher_name_or_path": "given", "distillation_end": 10}
    trainer = before(tmp_path, options={"teacher": teacher}, prune_targets=["hidden"], target_sparsity=0.4, **changes)
    trainer.train()
    assert trainer.pruner.plan.counts[HIDDEN] < 16
    losses = losses_of(trainer)
    assert {step for step, values in losses.items() if len(values) == 3} == set(range(1, 11))
    for step, values in losses.items():
        mu = min(1.0, step / 8)
        assert len(values) < 3 or values[0] == pytest.approx((1 - mu) * values[1] + mu * values[2], rel=1e-3)


def test_records_of_an_older_run_in_the_folder_are_dropped(tmp_path: Path) -> None:
    for _ in range(2):
        before(tmp_path).train()
        assert [(record["step"], record["kind"]) for record in events_of(tmp_path)] == EVENTS


def test_a_cut_that_ruins_the_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, losses = before(tmp_path), iter([1.0, 2.2, 1.0, 1.0, 1.0, 1.0])
    trainer.between_steps._probe_loss = lambda: next(losses)  # type: ignore[method-assign]
    trainer.train()
    (told,) = [record.message for record in caplog.records if record.name == "apt_trainer.plan.limits"]
    assert "step 0: the cut raised the loss of a batch from 1.000 to 2.200" in told and "pruning_time: early" in told


# ---------------------------------------------------------------------------- what cannot work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distillation": "self"}, "pruning_time: before removes.*Use distillation: none, or distillation: model"),
        ({"pruning_start": 3}, "pruning_time: before cuts before the first step, so pruning_start=3 has no meaning"),
        ({"calibration_samples": 0}, "calibration_samples=0 must be at least 1"),
        ({"calibration_batch_size": 0}, "calibration_batch_size=0 must be at least 1"),
        ({"pruning_end": 0}, "begin at step 0 and end at step 0 of"),
        ({"target_sparsity": 0.9, "prune_targets": ["hidden"]}, "Lower target_sparsity"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        before(tmp_path / "run", **changes)
    assert list(tmp_path.rglob("*.*")) == []


class Broken(Importance):
    def attach(self, model: Any, spaces: Any, counts: Any) -> None:
        self.counts = {space.name: counts[space.name] for space in spaces}

    def scores(self, model: Any) -> dict[str, torch.Tensor]:
        return {name: torch.full((count,), float("nan")) for name, count in self.counts.items()}


@pytest.mark.parametrize("what", ["loss", "scores"])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, what: str) -> None:
    trainer = before(tmp_path, options={"importance": Broken()} if what == "scores" else None)
    if what == "loss":
        with torch.no_grad():
            trainer.model.bert.embeddings.word_embeddings.weight[5:] = float("inf")
    with pytest.raises(UserError, match="loss of the model" if what == "loss" else "Scores of .* are not finite"):
        trainer.train()
    assert not (tmp_path / "events.jsonl").exists()


# ---------------------------------------------------------------------------- dry run


def test_the_plan_shows_the_cut_before_the_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = (
        tiny_model("bert"),
        SimpleNamespace(train=Rows(), validation=Rows(4), test=Rows(4), test_name="test", label_counts=None),
    )
    monkeypatch.setattr(dry_run, "load_inputs", lambda model_settings, recipe: (None, model.config, data))
    monkeypatch.setattr(dry_run, "build_model", lambda *args: model)
    monkeypatch.setattr(preflight, "build_model", lambda *args: tiny_model("bert"))
    monkeypatch.setattr(dry_run, "set_task_arguments", lambda *args: None)
    args = config(tmp_path, **BEFORE, tune_after_pruning="full", measure_latency=False)
    text = dry_run.plan(Recipe(ModelSettings("m"), DataSettings(), args, {}, None))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if "50.0%" in line and "target" not in line
    ]
    assert [row[0] for row in rows] == ["0, cut", "4", "8"] and len({row[2] for row in rows}) == 1
    assert "the dense model is scored on 24 training rows and cut before the first step, after which only" in text
    assert "adapters → full (after ranks have grown)" in text
    assert "of the dense model; the cut before it frees about" in text
