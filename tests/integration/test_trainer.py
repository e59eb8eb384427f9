"""One run from the first step to the merged model: what is cut, grown, taught, trained and recorded at each event."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import adapted, logits, parts, randomise, tiny_batch, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, TrainerCallback

from apt_trainer import APTTrainer, load_pruned
from apt_trainer.errors import UserError
from apt_trainer.measure import Latency
from apt_trainer.models import HIDDEN
from apt_trainer.pruning import latency_cost
from apt_trainer.pruning.pruner import PruningEvent
from apt_trainer.scoring.salience import Salience
from apt_trainer.surgery.slicing import Grow, Keep
from apt_trainer.training import reshape as runtime
from integration.factories import (
    EVENTS,
    SHORT,
    Fixed,
    Moment,
    Recorder,
    Rows,
    counted_block_parameters,
    cut_copy,
    events_of,
    losses_of,
    make_trainer,
    watch,
    weights_of,
)

PHASE = 40
FIELDS = {"step", "kind", "sparsity", "block_params", "trainable_params", "heads", "neurons", "hidden", "dense"}
FIELDS |= {"ranks", "tune", "seconds", "loss_before", "loss_after"}


@dataclass
class Run:
    trainer: APTTrainer
    folder: Path
    before: dict[int, Moment]
    after: dict[int, Moment]
    events: dict[int, PruningEvent]
    counted: dict[tuple[int, str], tuple[int, int, int]]
    snapshots: dict[int, float]


def _watched_run(folder: Path, **changes: Any) -> Run:
    """Train with everything recorded round the events and at the step after each."""
    steps = {step + late for step in (*EVENTS, PHASE) for late in (0, 1)} | {5, PHASE - 1}
    before, after = Recorder(steps), Recorder(steps)
    trainer = make_trainer(folder, options={"callbacks": [before]}, max_steps=60, max_rank=16, **changes)
    events = watch(trainer, before, after)
    counted: dict[tuple[int, str], tuple[int, int, int]] = {}
    snapshots: dict[int, float] = {}
    write, offer = trainer.between_steps._write_record, trainer.distillation.offer
    batch = tiny_batch(trainer.model)

    def record_spy(record: dict[str, Any], before: dict[str, Any]) -> None:
        named = [(name, p.numel(), p.requires_grad) for name, p in trainer.model.named_parameters()]
        adapters = sum(size for name, size, _ in named if ".lora_" in name and "apt_transform" not in name)
        trained = sum(size for _, size, trains in named if trains)
        counted[record["step"], record["kind"]] = counted_block_parameters(trainer), adapters, trained
        write(record, before)

    def offer_spy(student: nn.Module, loss: float) -> bool:
        taken = offer(student, loss)
        if taken:
            student.eval()
            teacher = trainer.distillation.teacher.forward(batch)["logits"]
            snapshots[trainer.state.global_step] = float((teacher - logits(student, batch)).abs().max())
            student.train()
        return taken

    trainer.between_steps._write_record = record_spy  # type: ignore[method-assign]
    trainer.distillation.offer = offer_spy  # type: ignore[method-assign]
    trainer.train()
    return Run(trainer, folder, before.at, after.at, {event.step: event for event in events}, counted, snapshots)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Heads and neurons pruned, adapters growing, self-distillation, then everything trained."""
    folder = tmp_path_factory.mktemp("run")
    return _watched_run(folder, prune_targets=["heads", "neurons"], tune_after_distillation="full")


@pytest.fixture(scope="module")
def wide_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Hidden dimensions pruned too."""
    return _watched_run(tmp_path_factory.mktemp("wide"))


# ---------------------------------------------------------------------------- sizes and records


def test_the_target_is_met_within_one_unit(run: Run) -> None:
    pruner = run.trainer.pruner
    dense = pruner.block_cost.total(pruner.dense_plan.counts)
    kept = counted_block_parameters(run.trainer)
    largest = max(
        pruner.block_cost.marginal(space.name, pruner.dense_plan.counts) * pruner.budget.limits.round_to[space.kind]
        for space in pruner.spaces
        if space.name != HIDDEN
    )
    assert dense == counted_blocks_of_dense()
    assert kept <= 0.5 * dense < kept + largest
    assert pruner.sparsity() == 1 - kept / dense


def counted_blocks_of_dense() -> int:
    model = tiny_model("bert")
    return sum(p.numel() for p in model.bert.encoder.parameters())


def test_the_budget_is_kept_where_hidden_dimensions_go_too(wide_run: Run) -> None:
    pruner = wide_run.trainer.pruner
    assert counted_block_parameters(wide_run.trainer) <= 0.5 * counted_blocks_of_dense()
    assert pruner.plan.counts[HIDDEN] % 4 == 0
    assert wide_run.trainer.model.bert.embeddings.word_embeddings.weight.shape[1] == pruner.plan.counts[HIDDEN]


def test_every_event_has_one_record_with_all_fields(run: Run) -> None:
    records = events_of(run.folder, "prune", "phase")
    assert [record["step"] for record in records] == [*EVENTS, PHASE]
    assert [record["kind"] for record in records] == ["prune", "prune", "prune", "phase"]
    assert all(record.keys() >= FIELDS for record in records)
    assert all(record["seconds"] > 0 for record in records)
    steps = [record["step"] for record in events_of(run.folder)]
    assert steps == sorted(steps)
    teachers = events_of(run.folder, "teacher")
    assert teachers[0]["step"] == 6
    assert {record["step"] for record in teachers} <= {6, *EVENTS[:-1]}
    heldout = [record["heldout_loss"] for record in teachers]
    assert heldout == sorted(heldout, reverse=True)


@pytest.mark.parametrize("name", ["run", "wide_run"])
def test_records_tell_the_real_sizes(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    schedule, dense = run.trainer.schedule, counted_blocks_of_dense()
    records = events_of(run.folder, "prune")
    for number, record in enumerate(records):
        blocks, adapters, trained = run.counted[record["step"], "prune"]
        assert record["block_params"] == blocks
        assert blocks <= (1 - schedule.sparsity(number)) * dense
        assert record["sparsity"] == 1 - blocks / dense
        assert record["trainable_params"] == trained
        assert adapters <= run.trainer.pruner.growth.parameters_at_start * (1 + 3 * (number + 1) / 3)
    assert [record["block_params"] for record in records] == sorted((r["block_params"] for r in records), reverse=True)


def test_ranks_grow_and_never_shrink(run: Run) -> None:
    records = events_of(run.folder, "prune")
    ranks = [{path: 2 for path in run.events[14].record["ranks"]}, *[record["ranks"] for record in records]]
    for old, new in zip(ranks, ranks[1:], strict=False):
        assert all(new[path] >= old[path] for path in new)
    assert max(ranks[-1].values()) > 2
    assert sum(ranks[-1].values()) > sum(ranks[0].values())
    assert records[-1]["tune"] == "adapters"
    assert events_of(run.folder, "phase")[0]["ranks"] == {}


def test_a_cut_changes_nothing_that_the_masks_had_not_done_already(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, options={"importance": Fixed({"layers.1.heads": 0.0})}, **SHORT)
    trainer.train()
    records = events_of(tmp_path, "prune")
    assert len(records) == 2 and records[-1]["heads"]["1"] == 0
    for record in records:
        assert record["loss_after"] == pytest.approx(record["loss_before"], rel=1e-5)


# ---------------------------------------------------------------------------- teacher


def test_a_snapshot_gives_the_logits_of_the_student(run: Run, wide_run: Run) -> None:
    for each in (run, wide_run):
        assert list(each.snapshots) == [record["step"] for record in events_of(each.folder, "teacher")]
        assert set(each.snapshots.values()) == {0.0}


@pytest.mark.parametrize("tune", ["adapters_and_norms", "full"])
def test_a_teacher_stays_as_it_was_while_the_student_is_cut_and_trained(tmp_path: Path, tune: str) -> None:
    trainer = make_trainer(tmp_path, tune_after_pruning=tune)
    trainer.between_steps._heldout_loss = lambda: float(trainer.state.global_step)  # type: ignore[method-assign]
    batch, seen = tiny_batch(trainer.model), {}
    before, after = Recorder([]), Recorder([7, 15, 31, 39])
    events = watch(trainer, before, after)
    teacher = trainer.distillation.teacher
    original = after.on_step_end

    def look(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(args, state, control, **kwargs)
        if teacher.model is not None:
            seen[state.global_step] = teacher.forward(batch)["logits"].clone()

    after.on_step_end = look  # type: ignore[method-assign]
    trainer.train()
    assert [event.kind for event in events][-1] == "prune" and trainer.pruner.tune == "full"
    assert list(seen) == list(range(6, PHASE))
    assert all(torch.equal(value, seen[6]) for value in seen.values())
    assert not torch.equal(after.at[31].weights[_norm(after.at[31])], after.at[39].weights[_norm(after.at[39])])


def _norm(moment: Moment) -> str:
    return next(name for name in sorted(moment.trained) if "LayerNorm" in name)


def test_distillation_takes_part_exactly_between_its_first_snapshot_and_its_end(run: Run) -> None:
    losses = losses_of(run.trainer)
    assert {step for step, values in losses.items() if len(values) == 3} == set(range(7, PHASE + 1))
    for step, values in losses.items():
        if len(values) == 3:
            mu = run.trainer.schedule.mu(step - 1)
            assert values[0] == pytest.approx((1 - mu) * values[1] + mu * values[2], rel=1e-4)
    assert run.trainer.schedule.mu(29) == 1.0


# ---------------------------------------------------------------------------- optimizer and schedule


def test_the_learning_rate_goes_on_as_without_events(run: Run, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, target_sparsity=None, max_steps=60)
    plain.train()
    rates = [[log["learning_rate"] for log in t.state.log_history if "loss" in log] for t in (plain, run.trainer)]
    assert len(rates[0]) == 60
    assert rates[0] == rates[1]
    for step in (*EVENTS, PHASE):
        assert run.before[step].rates[0] == run.after[step].rates[0] == rates[0][step]
        assert len(set(run.after[step].rates)) == 1


@pytest.mark.parametrize("name", ["run", "wide_run"])
def test_weights_and_moments_of_survivors_are_carried_over_an_event(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    compared = 0
    for step in EVENTS:
        before, after, edits = run.before[step], run.after[step], run.events[step].edits
        for parameter in after.trained - {"apt_transform.lora_A", "apt_transform.lora_B"}:
            old = {"weight": before.weights[parameter], **before.moments[parameter]}
            new = {"weight": after.weights[parameter], **after.moments[parameter]}
            assert old.keys() == new.keys() == {"weight", "step", "exp_avg", "exp_avg_sq"}
            for key, value in old.items():
                kept, grown = _follow(value, new[key], edits.get(parameter, []))
                assert torch.equal(kept, value if key == "step" else _cut(value, edits.get(parameter, [])))
                if key == "exp_avg":
                    assert not grown.any()
                compared += 1
    assert compared > 100


def _cut(value: torch.Tensor, edits: list[Keep | Grow]) -> torch.Tensor:
    for edit in edits:
        if isinstance(edit, Keep):
            value = value.index_select(edit.dim, edit.index)
    return value


def _follow(old: torch.Tensor, new: torch.Tensor, edits: list[Keep | Grow]) -> tuple[torch.Tensor, torch.Tensor]:
    """(survivors, appended part) of ``new``."""
    if old.dim() == 0:
        return new, new.new_zeros(1)
    for edit in edits:
        if isinstance(edit, Grow):
            size = new.shape[edit.dim] - edit.extra
            return new.narrow(edit.dim, 0, size), new.narrow(edit.dim, size, edit.extra)
    return new, new.new_zeros(1)


@pytest.mark.parametrize("name", ["run", "wide_run"])
def test_the_optimizer_holds_what_trains_and_moves_it_after_every_event(
    name: str, request: pytest.FixtureRequest
) -> None:
    run: Run = request.getfixturevalue(name)
    for step in (*EVENTS, PHASE):
        now, later = run.after[step], run.after[step + 1]
        assert now.in_optimizer == now.trained == later.trained
        moved = {n for n in now.weights if not torch.equal(now.weights[n], later.weights[n])}
        assert moved <= now.trained
        assert {n for n in now.trained - moved if not n.endswith("key.bias")} == set()  # softmax cancels that bias


def test_new_ranks_start_at_zero_and_learn_at_once(run: Run) -> None:
    grown = 0
    for step in EVENTS:
        for name, edits in run.events[step].edits.items():
            for extra in (edit.extra for edit in edits if isinstance(edit, Grow) and ".lora_B." in name):
                now, later = (at.weights[name][:, -extra:] for at in (run.after[step], run.after[step + 1]))
                assert not now.any() and (later != 0).any(0).all()
                grown += 1
    assert grown >= 4


def test_the_last_phase_trains_all_but_embeddings(run: Run, wide_run: Run) -> None:
    assert run.after[PHASE].trained == run.after[PHASE].weights.keys() - _embeddings(run)
    assert all(".lora_" in n or n.startswith(("classifier.", "bert.pooler.")) for n in wide_run.after[PHASE].trained)


def _embeddings(run: Run) -> set[str]:
    return {name for name in run.after[PHASE].weights if "_embeddings." in name}


def test_two_learning_rates_where_base_weights_have_their_own(tmp_path: Path) -> None:
    changes = {**SHORT, "tune_after_pruning": "full", "full_learning_rate": 1e-5, "lr_scheduler_type": "constant"}
    recorder = Recorder([7, 9])
    trainer = make_trainer(tmp_path, warmup_steps=0, **changes)
    watch(trainer, Recorder([]), recorder)
    trainer.train()
    assert set(recorder.at[7].rates) == {1e-3}
    assert set(recorder.at[9].rates) == {1e-5, 1e-3}


# ---------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("name", ["run", "wide_run"])
def test_base_weights_stay_bit_equal_while_only_adapters_train(name: str, request: pytest.FixtureRequest) -> None:
    run: Run = request.getfixturevalue(name)
    last = run.after[PHASE - 1]
    assert last.tune == "adapters"
    pretrained = dict(cut_copy(tiny_model("bert"), last.plan).named_parameters())
    base = {n: w for n, w in last.weights.items() if ".lora_" not in n and "apt_transform" not in n}
    assert {n.replace(".base_layer.", ".") for n in base} == pretrained.keys()
    changed = {n for n, w in base.items() if not torch.equal(w, pretrained[n.replace(".base_layer.", ".")])}
    assert changed == {n for n in base if n.startswith(("classifier.", "bert.pooler."))}


def test_every_base_weight_but_embeddings_trains_in_the_last_phase(run: Run) -> None:
    start, end = run.after[PHASE].weights, weights_of(run.trainer.model)
    assert start.keys() == end.keys()
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert same == _embeddings(run)


def own_hooks(model: nn.Module) -> list[str]:
    """Hooks of this package that hang in ``model``."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind).values()]
    return [hook.__qualname__ for hook in found if hook.__module__.startswith("apt_trainer")]


def test_merging_changes_no_output(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SHORT)
    batch, seen = tiny_batch(trainer.model), []
    finish = trainer.finish

    def spy() -> None:
        assert not own_hooks(trainer.model)
        trainer.model.eval()
        seen.append(logits(trainer.model, batch))
        finish()

    trainer.finish = spy  # type: ignore[method-assign]
    trainer.train()
    assert not [name for name, _ in trainer.model.named_parameters() if "lora_" in name or "apt_" in name]
    assert not own_hooks(trainer.model)
    trainer.model.eval()
    assert torch.allclose(logits(trainer.model, batch), seen[0], atol=1e-5)


# ---------------------------------------------------------------------------- other ways to run


def test_pruning_late_cuts_in_the_second_half(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, max_steps=20, pruning_time="late", pruning_start=None, pruning_end=None, distillation_end=None
    )
    trainer.train()
    assert [record["step"] for record in events_of(tmp_path, "prune")] == [12, 13, 15]
    assert trainer.pruner.sparsity() >= 0.5


@pytest.mark.parametrize("mask_window", [6, 200])
def test_pruning_after_training_cuts_once_at_the_end(tmp_path: Path, mask_window: int) -> None:
    changes = {"pruning_time": "after", "distillation": "none", "max_steps": 12, "mask_window": mask_window}
    trainer = make_trainer(tmp_path, **changes)
    unpruned = make_trainer(tmp_path / "plain", max_steps=12, distillation="none", target_sparsity=None)
    trainer.train()
    unpruned.train()
    assert [record["step"] for record in events_of(tmp_path)] == [12]
    assert trainer.pruner.sparsity() >= 0.5
    assert losses_of(trainer) == losses_of(unpruned)


def test_an_importance_of_the_users_own_decides(tmp_path: Path) -> None:
    own = Fixed({"layers.0.heads": 0.0, "layers.1.neurons": [2.0] * 12 + [1e-3] * 12, "layers.2.neurons": 1e-3})
    trainer = make_trainer(tmp_path, options={"importance": own}, prune_targets=["heads", "neurons"], **SHORT)
    trainer.train()
    kept = trainer.pruner.plan.kept
    assert own.updates == 6  # steps 3 to 8, from the start of pruning to its last event
    assert kept["layers.0.heads"] == kept["layers.2.neurons"] == ()
    assert kept["layers.1.neurons"] == tuple(range(len(kept["layers.1.neurons"])))
    assert kept["layers.0.neurons"] == tuple(range(24))


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_every_importance_meets_the_target(tmp_path: Path, importance: str) -> None:
    trainer = make_trainer(tmp_path, importance=importance, prune_targets=["heads", "neurons"], **SHORT)
    trainer.train()
    assert 0.5 <= trainer.pruner.sparsity() < 0.55


@pytest.mark.parametrize("importance", ["salience", "cosine", "random"])
@pytest.mark.parametrize("time", ["early", "before"])
def test_sublayers_go_as_a_whole(tmp_path: Path, importance: str, time: str) -> None:
    changes = {**SHORT, "prune_targets": ["sublayers"], "target_sparsity": 0.3, "importance": importance}
    if time == "before":
        changes |= {"pruning_time": "before", "pruning_start": None, "distillation": "none", "distillation_end": None}
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    dense = trainer.pruner.dense_plan.counts
    gone = {name for name, count in trainer.pruner.plan.counts.items() if count == 0}
    assert gone and {name: dense[name] for name in dense.keys() - gone} == {
        name: count for name, count in trainer.pruner.plan.counts.items() if count
    }
    assert 0.3 <= trainer.pruner.sparsity() < 0.65
    assert counted_block_parameters(trainer) == events_of(tmp_path, "prune")[-1]["block_params"]
    trainer.save_model(str(tmp_path / "saved"))
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(tmp_path / "saved").eval(), batch), logits(trainer.model.eval(), batch))


def test_sublayers_go_beside_heads_and_neurons(tmp_path: Path) -> None:
    """One feed-forward is worth nothing, and goes although no other may fall below 12 neurons."""
    own = Fixed({"layers.1.neurons": 0.0})
    changes = {**SHORT, "prune_targets": ["heads", "neurons", "sublayers"], "min_heads": 1, "min_neurons": 12}
    trainer = make_trainer(tmp_path, options={"importance": own}, **changes)
    trainer.train()
    counts = trainer.pruner.plan.counts
    assert counts["layers.1.neurons"] == 0
    assert all(count == 0 or count >= (1 if "heads" in name else 12) for name, count in counts.items())
    assert len(set(counts.values()) - {0}) > 2  # and others lost single units
    assert 0.5 <= trainer.pruner.sparsity() < 0.55


def test_a_warning_when_much_depth_goes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {**SHORT, "prune_targets": ["sublayers"], "target_sparsity": 0.6, "distillation": "none"}
    trainer = make_trainer(
        tmp_path, distillation_end=None, **{k: v for k, v in changes.items() if k != "distillation_end"}
    )
    trainer.train()
    assert sum("Models seldom recover" in message for message in caplog.messages) == 1


def test_without_a_target_nothing_is_pruned_and_the_class_stays(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, target_sparsity=None, max_steps=12, distillation_end=None)
    trainer.train()
    assert not (tmp_path / "events.jsonl").exists()
    assert type(trainer.model) is BertForSequenceClassification
    assert trainer.pruner.sparsity() == 0
    trainer.save_model(str(tmp_path / "saved"))
    again = BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    batch = tiny_batch(again)
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))


def test_without_distillation_there_is_only_the_task_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, distillation="none", **SHORT)
    assert len(trainer.train_dataset) == 110
    trainer.train()
    assert {len(values) for values in losses_of(trainer).values()} == {1}
    assert [record["kind"] for record in events_of(tmp_path)] == ["prune", "prune"]


@pytest.mark.parametrize("width", [16, 24])
def test_an_external_teacher_of_another_size(tmp_path: Path, width: int) -> None:
    sizes = {"hidden_size": width, "intermediate_size": 3 * width}
    teacher = AutoModelForSequenceClassification.from_config(tiny_config("bert", 2, num_labels=3, **sizes))
    randomise(teacher, seed=5)
    weights = weights_of(teacher)
    changes = {**SHORT, "distillation": "model", "teacher_name_or_path": "given"}
    trainer = make_trainer(tmp_path, options={"teacher": teacher}, **changes)
    assert len(trainer.train_dataset) == 110
    trainer.train()
    losses = losses_of(trainer)
    assert {step for step, values in losses.items() if len(values) == 3} == set(range(3, 11))
    assert all(values[2] > 0 for values in losses.values() if len(values) == 3)
    assert all(torch.equal(w, weights[n]) for n, w in teacher.named_parameters())
    assert not [name for name, _ in trainer.model.named_parameters() if "apt_" in name]


@pytest.mark.parametrize("metric", ["flops", "memory"])
def test_other_budgets_are_kept(tmp_path: Path, metric: str) -> None:
    share = {"flops": 0.5, "memory": 0.3}[metric]
    changes = {**SHORT, "sparsity_metric": metric, "target_sparsity": share, "reference_length": 16}
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    pruner = trainer.pruner
    total = pruner.budget.cost.total
    assert 0 < total(pruner.plan.counts) <= (1 - share) * total(pruner.dense_plan.counts)
    assert pruner.sparsity() >= share


def test_a_latency_budget_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed by a clock that takes one nanosecond per parameter of a block, so that the outcome is known."""
    timed: list[dict[str, float]] = []

    def clock(models: dict[str, nn.Module], batch_sizes: list[int], length: int) -> dict[str, dict[int, Latency]]:
        timed.append({name: _milliseconds(model) for name, model in models.items()})
        return {name: {batch: Latency(ms, 0.0, 1) for batch in batch_sizes} for name, ms in timed[-1].items()}

    monkeypatch.setattr(latency_cost, "compare_latency", clock)
    changes = {**SHORT, "sparsity_metric": "latency", "reference_length": 16, "prune_targets": ["heads", "neurons"]}
    trainer = make_trainer(tmp_path, **changes)
    trainer.train()
    pruner = trainer.pruner
    (times,) = timed
    assert list(times) == ["dense", "half_heads", "no_heads", "half_neurons", "no_neurons"]
    assert pruner.budget.cost.total(pruner.dense_plan.counts) == pytest.approx(times["dense"] / 1000, rel=1e-6)
    assert pruner.budget.cost.total(pruner.plan.counts) <= 0.5 * pruner.budget.cost.total(pruner.dense_plan.counts)
    assert _milliseconds(trainer.model) == pytest.approx(1000 * pruner.budget.cost.total(pruner.plan.counts), rel=1e-6)


def _milliseconds(model: nn.Module) -> float:
    return 1e-6 * sum(p.numel() for name, p in model.bert.encoder.named_parameters())


def test_a_regression_with_one_label(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config("roberta", num_labels=1))
    randomise(model, seed=1)
    trainer = make_trainer(tmp_path, model, Rows(task="regression"), **SHORT)
    trainer.train()
    losses = losses_of(trainer)
    assert {step for step, values in losses.items() if len(values) == 3} == set(range(3, 11))
    assert trainer.pruner.sparsity() >= 0.5
    trainer.model.eval()
    batch = {name: value for name, value in tiny_batch(trainer.model).items() if name != "labels"}
    assert logits(trainer.model, batch).shape == (4, 1)


def test_mixed_precision(tmp_path: Path) -> None:
    """The forward of model and teacher is accelerate's while training and the model's own afterwards."""
    trainer = make_trainer(tmp_path, bf16=True, **SHORT)
    trainer.between_steps._heldout_loss = lambda: 1 / trainer.state.global_step  # type: ignore[method-assign]
    trainer.train()
    losses = losses_of(trainer)
    assert {step for step, values in losses.items() if len(values) == 3} == set(range(3, 11))
    exact = make_trainer(tmp_path / "exact", **SHORT)
    exact.train()
    difference = max(abs(values[0] - losses_of(exact)[step][0]) for step, values in losses.items() if step <= 5)
    assert 0 < difference < 0.05
    assert "forward" not in vars(trainer.model) and "_original_forward" not in vars(trainer.model)
    batch = tiny_batch(trainer.model)
    assert isinstance(trainer.model(**batch, return_dict=False), tuple)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(logits(load_pruned(tmp_path / "model").eval(), batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch", "rmsprop"])
def test_other_optimizers_go_on_after_events(tmp_path: Path, optim: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where state cannot follow, the log says so once, whatever the number of events."""
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    trainer = make_trainer(tmp_path, optim=optim, **SHORT)
    trainer.train()
    assert caplog.text.count("starts afresh at each") == (1 if optim == "adafactor" else 0)
    assert trainer.pruner.sparsity() >= 0.5
    assert all(torch.isfinite(torch.tensor(values)).all() for values in losses_of(trainer).values())


@pytest.mark.parametrize("schedule", ["cosine_with_restarts", "polynomial", "constant_with_warmup", "inverse_sqrt"])
def test_every_schedule_of_steps_goes_on_as_without_events(tmp_path: Path, schedule: str) -> None:
    changes = {**SHORT, "lr_scheduler_type": schedule, "tune_after_distillation": "full"}
    rates = []
    for name, target in (("pruned", 0.5), ("plain", None)):
        trainer = make_trainer(tmp_path / name, **{**changes, "target_sparsity": target})
        trainer.train()
        rates.append([log["learning_rate"] for log in trainer.state.log_history if "loss" in log])
    assert rates[0] == rates[1] and len(rates[0]) == 12


def test_evaluation_during_training_sees_the_shape_of_the_moment(tmp_path: Path) -> None:
    options = {"eval_dataset": Rows(30)}
    trainer = make_trainer(tmp_path, options=options, eval_strategy="steps", eval_steps=2, **SHORT)
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluated) == 6
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[-1], rel=1e-5)
    untouched = make_trainer(tmp_path / "plain", **SHORT)
    untouched.train()
    assert losses_of(untouched) == losses_of(trainer)


def test_saving_the_model_by_hand_in_the_middle_of_a_run_is_an_error(tmp_path: Path) -> None:
    """It would be neither merged nor, where processes hold parts of it, whole."""

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.save_model(str(tmp_path / "early"))

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Saves())
    with pytest.raises(UserError, match=r"save_model is for after train\(\)"):
        trainer.train()
    assert not (tmp_path / "early").exists()


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    packed = torch.zeros(4, dtype=torch.uint8)
    model.bert.pooler.dense.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError, match="quantised weights, which can be neither scored nor cut"):
        make_trainer(tmp_path, model)


def test_between_observations_no_activation_is_measured(tmp_path: Path) -> None:
    own, choices = Fixed(), 0
    changes = {"pruning_start": 4, "pruning_end": 36, "num_pruning_events": 2, "mask_window": 8, "max_steps": 38}
    trainer = make_trainer(tmp_path, options={"importance": own}, distillation="none", **changes)
    assert trainer.schedule.observe_every == 2
    scores = own.scores

    def count(model: nn.Module) -> dict[str, torch.Tensor]:
        nonlocal choices
        choices += 1
        return scores(model)

    own.scores = count  # type: ignore[method-assign]
    trainer.train()
    assert own.updates == 16  # every second of the 32 steps
    assert choices == 2 * (1 + 4) + 2  # when a window opens, after each observation in it, and at the cut


def test_taps_rest_between_observations() -> None:
    model = adapted(tiny_model("bert")).train()
    rule = Salience()
    _, spaces, dense = parts(tiny_model("bert"))
    rule.attach(model, spaces, dense.counts)
    batch = tiny_batch(model)
    rule.rest(True)
    model(**batch).loss.backward()
    assert not rule._flat.any()
    rule.rest(False)
    model(**batch).loss.backward()
    assert rule._flat.any()


def test_weights_leave_the_file_they_were_read_from(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    trainer = make_trainer(tmp_path / "run", model)
    for name, parameter in trainer.model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size(), name


def test_tied_weights_stay_tied_when_they_leave_their_file() -> None:
    model = tiny_model("bert", "ForMaskedLM")
    before = {name: p.clone() for name, p in model.named_parameters()}
    runtime.own_storage(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
