"""NRI of sublayers before training: numbers and choice are those of ``apt-trainer drop``; what cannot be measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from test_calibration import FAMILIES, batches_of
from test_selection import tiny_parts
from tiny import hooks, parts, tiny_batch, tiny_model
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.plan.cost import memory_cost, parameter_cost
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.plan.selection import select
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.scoring import nri
from apt_trainer.scoring.nri import Nri
from apt_trainer.scoring.sublayers.costs import Shape, shares, unit_costs
from apt_trainer.scoring.sublayers.impact import Impact, Losses, impacts
from apt_trainer.scoring.sublayers.units import Units, find_units
from apt_trainer.settings import CHOICES, MethodSettings
from apt_trainer.studies import choices
from apt_trainer.studies.select import Budget, ImpactRanker, candidates_of, choose

SHAPE = Shape(2, 8)
SETTINGS = {"importance": "nri", "pruning_time": "before", "prune_targets": ["sublayers"], "distillation": "none"}
SETTINGS |= {"target_sparsity": 0.3, "num_pruning_events": 2, "reference_batch_size": 2, "reference_length": 8}
WHOLE = Limits(frozenset(), {"heads": 1, "neurons": 1, HIDDEN: 1}, {"heads": 0, "neurons": 0, HIDDEN: 1}, True)

Batches = Sequence[Mapping[str, torch.Tensor]]


def pruner_of(model: PreTrainedModel, **settings: object) -> AdaptivePruner:
    pruner = AdaptivePruner(model, MethodSettings(**{**SETTINGS, **settings}))  # type: ignore[arg-type]
    pruner.start(make_schedule(pruner.settings, 20))
    return pruner


def measured(pruner: AdaptivePruner, batches: Batches) -> dict[str, float]:
    """Space → NRI as the rule took it in."""
    pruner.calibrate([dict(batch) for batch in batches], lambda batch: pruner.model(**batch).loss)
    assert isinstance(pruner.importance, Nri)
    return pruner.importance._impacts


def by_drop(model: PreTrainedModel, units: Units, batches: Batches, cost: str) -> dict[str, Impact]:
    """Space → impact, as the command measures it."""
    share = shares(unit_costs(model, units, cost, SHAPE), units)
    found = impacts(Losses(model, units, batches), candidates_of(units, "joint"), (), share)
    return {units.members[one.unit][0].space: one for one in found}


# ---------------------------------------------------------------------------- what is measured


CASES = [(name, "params") for name in FAMILIES]
CASES += [(name, cost) for name in ("bert", "llama", "t5") for cost in ("memory", "none")]


@pytest.mark.parametrize(("name", "cost"), CASES)
def test_nri_is_that_of_the_command(name: str, cost: str) -> None:
    """Losses are float32 means, of 4 to 8: what they make of a perplexity is exact to about 5e-7."""
    model = tiny_model(name, FAMILIES[name])
    batches, units = batches_of(model), find_units(model)
    found = measured(pruner_of(tiny_model(name, FAMILIES[name]), nri_cost=cost), batches)
    expected = by_drop(model, units, batches, cost)
    assert set(found) == {units.members[unit][0].space for unit in units.sublayers}
    for space, one in expected.items():
        relative = found[space] / one.share if one.relative <= 0 else found[space] * one.share
        assert 1 + relative == pytest.approx(1 + one.relative, rel=1e-6), space
    staying = set(found) - set(expected)
    assert all(found[space] == math.inf for space in staying) and bool(staying) == (name in ("t5", "mt5"))


def test_seconds_are_shared_within_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nri, "Shape", partial(Shape, max_seconds=0.2))
    model = tiny_model("llama", "ForCausalLM")
    timed, plain = (
        measured(pruner_of(tiny_model("llama", "ForCausalLM"), nri_cost=c), batches_of(model))
        for c in ("latency", "none")
    )
    for kind in ("heads", "neurons"):
        shared = [
            timed[space] / value if value > 0 else value / timed[space]  # where removal helps, a share multiplies
            for space, value in plain.items()
            if space.endswith(kind)
        ]
        assert len(shared) == 3 and shared == pytest.approx([shared[0]] * 3)


def test_nothing_is_timed_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = type(tiny_model("llama", "ForCausalLM"))(tiny_model("llama", "ForCausalLM").config)
    assert set(pruner_of(model, nri_cost="latency").importance.costs.values()) == {1.0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_one_pass_per_sublayer_and_all_is_as_before(name: str) -> None:
    model = tiny_model(name, FAMILIES[name], dropout=0.5).train()
    model.get_submodule(parts(model)[0].layer_paths(model)[1]).eval()
    pruner, seen = pruner_of(model), []
    pruner.detach()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = model(**batch).loss
        seen.append(loss.requires_grad or any(m.training for m in model.modules()))
        return loss

    pruner.calibrate(batches_of(model), loss_of)
    candidates = sum(space.kind != HIDDEN and space.minimum == 0 for space in pruner.spaces)
    assert len(seen) == 3 * (1 + candidates) and not any(seen)
    after = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert before == after and hooks(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_batches_weigh_by_what_they_predict_and_those_without_do_not_count() -> None:
    """A batch whose labels are all ignored has no loss, which is not a number."""
    model = tiny_model("llama", "ForCausalLM")
    batches = batches_of(model)
    silent = {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}
    assert torch.isnan(model(**silent).loss)
    with_silent, without = (
        measured(pruner_of(tiny_model("llama", "ForCausalLM")), some) for some in ([batches[0], silent], batches[:1])
    )
    assert with_silent == without


def test_processes_sum_what_they_saw() -> None:
    """Two processes, of which the second runs out of rows, get the numbers that one gets on all rows."""
    first, second, third = batches_of(tiny_model("llama", "ForCausalLM"))
    whole = measured(pruner_of(tiny_model("llama", "ForCausalLM")), [first, second, third])
    shown: list[list[dict[str, torch.Tensor] | None]] = [[first, second], [third, None]]
    alone: list[list[torch.Tensor]] = [[], []]
    for process in (0, 1):
        pruner = pruner_of(tiny_model("llama", "ForCausalLM"))
        keep = alone[process].append
        pruner.start(pruner.schedule, 0, lambda sums, keep=keep: keep(sums.clone()) or sums, 2)  # type: ignore[arg-type, misc]
        pruner.calibrate(shown[process], lambda batch, pruner=pruner: pruner.model(**batch).loss)  # type: ignore[misc]
    assert [[tuple(sums.shape) for sums in seen] for seen in alone] == [[(2,), (6, 2)]] * 2
    found = []
    for process in (0, 1):
        pruner, other = pruner_of(tiny_model("llama", "ForCausalLM")), iter(alone[1 - process])
        pruner.start(pruner.schedule, 0, lambda sums, other=other: sums + next(other), 2)  # type: ignore[arg-type, misc]
        pruner.calibrate(shown[process], lambda batch, pruner=pruner: pruner.model(**batch).loss)  # type: ignore[misc]
        found.append(pruner.importance._impacts)  # type: ignore[attr-defined]
    assert found[0] == found[1] == pytest.approx(whole)


def test_a_loss_of_the_whole_model_that_is_not_finite_is_a_user_error() -> None:
    model = tiny_model("bert")
    losses = iter([1.0, math.nan, 1.0])
    with pytest.raises(UserError, match="loss of the model on the rows that calibration_samples draws is not"):
        pruner_of(model).calibrate(batches_of(model), lambda batch: model(**batch).loss * next(losses))


def breaking(pruner: AdaptivePruner, space: str, batch: dict[str, torch.Tensor], value: float) -> torch.Tensor:
    """The loss, ``value`` while the sublayer of ``space`` is off."""
    sublayer = next(one for one in pruner.sublayers if one.space == space)
    off = "forward" in vars(pruner.model.get_submodule(sublayer.stubs[0].module))
    loss: torch.Tensor = pruner.model(**batch).loss
    return loss * value if off else loss


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_the_model_breaks_without_stays(name: str, value: float) -> None:
    model = tiny_model(name, FAMILIES[name])
    batches = batches_of(model)
    found = measured(pruner_of(tiny_model(name, FAMILIES[name])), batches)
    first = min(found, key=found.__getitem__)
    pruner = pruner_of(model)
    pruner.calibrate(batches, lambda batch: breaking(pruner, first, batch, value))
    assert pruner.importance._impacts[first] == math.inf  # type: ignore[attr-defined]
    pruner.step(0)
    assert pruner.plan.counts[first] > 0 and pruner.sparsity() >= 0.3
    gone = {space for space, count in pruner.plan.counts.items() if count == 0}
    assert gone and gone <= found.keys() - {first}


def test_where_nothing_else_would_do_the_run_stops() -> None:
    model = tiny_model("bert")
    pruner = pruner_of(model, target_sparsity=0.66)
    names = [space.name for space in pruner.spaces if space.kind == "neurons"]
    pruner.calibrate(batches_of(model), lambda batch: sum(breaking(pruner, name, batch, math.nan) for name in names))
    with pytest.raises(UserError, match=r"without layers\.\d\.neurons.* not finite.*Lower target_sparsity"):
        pruner.step(0)


def test_scores_that_nobody_measured_are_a_user_error() -> None:
    with pytest.raises(UserError, match="NRI has not been measured.*call AdaptivePruner.calibrate before"):
        Nri().scores(tiny_model("bert"))


# ---------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("cost", "metric"), [("params", "params"), ("none", "params"), ("memory", "params"), ("params", "memory")]
)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gemma2", "t5"])
def test_the_choice_is_that_of_the_command_at_an_equal_budget(name: str, cost: str, metric: str) -> None:
    """For every number of units: budgets that just they meet."""
    model = tiny_model(name, FAMILIES[name])
    batches, units = batches_of(model), find_units(model)
    ranker = ImpactRanker(Losses(model, units, batches), shares(unit_costs(model, units, cost, SHAPE), units))
    candidates = candidates_of(units, "joint")
    family, spaces, dense = parts(model)
    counted = {
        "params": lambda: parameter_cost(model, family, spaces),
        "memory": lambda: memory_cost(model, family, spaces, 2, 8),
    }
    budget = counted[metric]()
    pruner = pruner_of(tiny_model(name, FAMILIES[name]), nri_cost=cost, sparsity_metric=metric)
    measured(pruner, batches)
    for count in range(1, len(candidates)):
        chosen = {units.members[unit][0].space for unit in choose(candidates, "joint", Budget(count), ranker).units}
        left = budget.total({space: 0 if space in chosen else size for space, size in dense.counts.items()})
        own, scores = pruner.budget, pruner.importance.scores(model)
        plan = select(scores, spaces, dense, own.cost, left * (1 + 1e-9), own.limits)
        assert {space for space, size in plan.counts.items() if size == 0} == chosen


def kept(impacts: Mapping[str, float], share: float) -> set[str]:
    """Sublayers that stay of the tiny encoder, by NRI given, at a share of its parameters."""
    spaces, dense, cost = tiny_parts()
    scored = [space for space in spaces if space.name != HIDDEN]
    rule = Nri()
    rule.attach(tiny_model("bert"), scored, dense.counts)
    total = cost.total(dense.counts)
    rule.take(impacts, {s.name: total - cost.total({**dense.counts, s.name: 0}) for s in scored})
    scores = rule.scores(tiny_model("bert"))
    assert all(bool(torch.isfinite(value).all()) and float(value.min()) >= 0 for value in scores.values())
    plan: PruningPlan = select(scores, spaces, dense, cost, share * total, WHOLE)
    return {name for name, count in plan.counts.items() if count and name != HIDDEN}


@pytest.mark.parametrize("seed", range(4))
def test_nri_is_not_divided_by_the_budget_once_more(seed: int) -> None:
    """Attentions have a third more parameters than feed-forwards here: divided again, other sublayers would go."""
    spaces, dense, cost = tiny_parts()
    total = cost.total(dense.counts)
    names = [space.name for space in spaces if space.name != HIDDEN]
    drawn = 1 + 0.2 * torch.rand(len(names), generator=torch.Generator().manual_seed(seed))
    impacts = dict(zip(names, drawn.tolist(), strict=True))
    order = sorted(names, key=impacts.__getitem__)
    for count in range(1, len(names)):
        left = cost.total({**dense.counts, **dict.fromkeys(order[:count], 0)})
        assert kept(impacts, left / total + 1e-9) == set(order[count:])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_least_first_whatever_the_sign_and_infinite_last(share: float, sign: float) -> None:
    names = [f"layers.{layer}.{kind}" for layer in range(3) for kind in ("heads", "neurons")]
    values = {name: sign * (1.0 + i) ** 3 for i, name in enumerate(names)}
    impacts = values | {names[2]: math.inf}
    left = kept(impacts, share)
    assert names[2] in left
    of_kind = [[n for n in names if n.endswith(kind) and n != names[2]] for kind in ("heads", "neurons")]
    for members in of_kind:
        order = sorted(members, key=values.__getitem__, reverse=True)
        assert [name in left for name in order] == sorted((name in left for name in order), reverse=True)


# ---------------------------------------------------------------------------- settings


def test_costs_are_those_of_the_command() -> None:
    assert CHOICES["nri_cost"] == choices.COSTS


@pytest.mark.parametrize("targets", [["heads", "sublayers"], ["neurons"], ["sublayers", "hidden"]])
def test_nri_is_for_sublayers_alone(targets: list[str]) -> None:
    with pytest.raises(UserError, match=r"importance: nri scores whole sublayers.*Set prune_targets: \[sublayers\]"):
        MethodSettings(**{**SETTINGS, "prune_targets": targets}).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("time", ["before", "early", "late", "after"])
def test_nri_is_measured_at_any_time(time: str) -> None:
    MethodSettings(**{**SETTINGS, "pruning_time": time}).check()  # type: ignore[arg-type]


def test_padding_and_its_length_change_no_number() -> None:
    model = tiny_model("llama", "ForCausalLM")
    batch = tiny_batch(model)
    wider = {"input_ids": 1, "attention_mask": 0, "labels": -100}
    padded = {name: torch.nn.functional.pad(batch[name], (0, 5), value=value) for name, value in wider.items()}
    found = [measured(pruner_of(tiny_model("llama", "ForCausalLM")), [one]) for one in (batch, padded)]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-5)
