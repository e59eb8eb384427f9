"""The lines of a run's story, by hand."""

from __future__ import annotations

from typing import Any

from apt_trainer.report.story import BUDGETS, estimate_line, evaluation_line, event_line
from apt_trainer.settings.choices import CHOICES

DENSE = {"heads": {"0": 12, "1": 12}, "neurons": {"0": 1536, "1": 1536}, "hidden": 384}
BEFORE: dict[str, Any] = {**DENSE, "ranks": {"a": 8, "b": 8}, "tune": "adapters"}


def event(kind: str = "prune", **changes: Any) -> dict[str, Any]:
    return {**BEFORE, "step": 56, "kind": kind, "sparsity": 0.601, "dense": DENSE, **changes}


def test_a_cut_of_one_layer_names_it() -> None:
    record = event(heads={"0": 12, "1": 3}, loss_before=0.31, loss_after=0.334, ranks={"a": 8, "b": 64})
    assert event_line(record, BEFORE) == (
        "step 56 · cut 12 → 3 heads in layer 1 · 60.1 % of the block parameters gone · loss 0.31 → 0.33 · ranks 8–64"
    )


def test_a_cut_of_several_kinds_sums_and_names_the_layer_that_loses_most() -> None:
    record = event(heads={"0": 10, "1": 0}, neurons={"0": 1000, "1": 900}, hidden=320, ranks={}, tune="full")
    assert event_line(record, BEFORE, "latency") == (
        "step 56 · cut 24 → 10 heads (layer 1: 12 → 0), 3,072 → 1,900 neurons (layer 1: 1,536 → 900), "
        "384 → 320 hidden dimensions · 60.1 % of the latency gone · all weights train"
    )


def test_every_budget_has_a_name() -> None:
    assert BUDGETS.keys() == set(CHOICES["sparsity_metric"])
    assert "60.1 % of the parameters gone" in event_line(event(), BEFORE, "total_params")


def test_a_cut_of_experts_is_told() -> None:
    before = BEFORE | {"experts": {"0": 8, "1": 8}}
    record = event(experts={"0": 8, "1": 5}, dense=DENSE | {"experts": {"0": 8, "1": 8}})
    assert "cut 8 → 5 experts in layer 1" in event_line(record, before)


def test_what_is_not_there_is_not_told() -> None:
    whole = {"heads": {}, "neurons": {"0": 10}}  # of a model that loses whole layers, or has no heads of its own
    record = event("grow", ranks={"a": 16, "b": 16})
    assert event_line(record, BEFORE) == "step 56 · ranks 16"
    assert event_line(event("phase", tune="adapters_and_norms"), BEFORE) == "step 56 · adapters and norms train"
    assert "cut nothing more" in event_line(event(), BEFORE)
    line = event_line(event(**whole, dense=whole | {"hidden": 4}) | {"neurons": {}}, {**BEFORE, **whole})
    assert "10 → 0 neurons in layer 0" in line
    teacher = event("teacher", heldout_loss=1.6)
    assert event_line(teacher, BEFORE) == "step 56 · new teacher: the model as it is, loss 1.60 on held-out rows"


def test_evaluations_are_told_without_their_times() -> None:
    metrics = {
        "eval_loss": 0.5,
        "eval_accuracy": 0.9,
        "eval_runtime": 3.2,
        "eval_samples_per_second": 9.0,
        "epoch": 1.0,
    }
    assert evaluation_line(93, metrics) == "step 93 · validation data: accuracy 0.9000, loss 0.5000"
    assert (
        evaluation_line(93, {"test_f1_macro": 0.5, "test_loss": 1.0}, False)
        == "test data: f1 macro 0.5000, loss 1.0000"
    )


def test_an_estimate() -> None:
    line = estimate_line(10, 0.9, 176, cut=False, cuts_to_come=True)
    assert line == "step 10 · 0.90 s a step: about 2 min 38 s of training left, less once units are gone"
    assert estimate_line(60, 12.4, 10, cut=True, cuts_to_come=False) == (
        "step 60 · 12 s a step since the last cut: about 2 min 04 s of training left"
    )
