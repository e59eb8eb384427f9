"""What a plan chosen under a budget has to satisfy, for random scores and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import LAYERS, parts, tiny_model

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, Space
from apt_trainer.plan.cost import CostModel, fitted_cost, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.selection import select

KINDS = ("heads", "neurons", "hidden")


def limits(
    targets: tuple[str, ...] = KINDS, round_to: int = 1, heads: int = 0, neurons: int = 0, hidden: int = 1
) -> Limits:
    return Limits(
        frozenset(targets),
        {"heads": 1, "neurons": round_to, "hidden": round_to},
        {"heads": heads, "neurons": neurons, "hidden": hidden},
    )


def tiny_parts(metric: str = "params") -> tuple[list[Space], PruningPlan, CostModel]:
    model = tiny_model("bert")
    family, spaces, dense = parts(model)
    if metric == "params":
        return spaces, dense, parameter_cost(model, family, spaces)
    return spaces, dense, {"flops": flops_cost, "memory": memory_cost}[metric](model, family, spaces, 4, 8)


def random_scores(spaces: list[Space], plan: PruningPlan, seed: int) -> dict[str, torch.Tensor]:
    """Heavy-tailed, of different size per kind, like a salience."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"heads": 100.0, "neurons": 1.0, "hidden": 30.0}
    return {
        space.name: scale[space.kind] * torch.randn(plan.counts[space.name], generator=generator).exp()
        for space in spaces
    }


def chunk_after(space: Space, count: int, left: int, limit: Limits) -> int:
    return min(limit.round_to[space.kind], left - count)


@pytest.mark.parametrize("round_to", [1, 4, 5])
@pytest.mark.parametrize("metric", ["params", "flops", "memory"])
@pytest.mark.parametrize("share", [0.15, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("seed", [0, 1])
def test_plan_fits_the_budget_and_nothing_more_would(seed: int, share: float, metric: str, round_to: int) -> None:
    spaces, dense, cost = tiny_parts(metric)
    limit = limits(round_to=round_to, hidden=4)
    fixed = cost.total({space.name: 5 if space.name == HIDDEN else 0 for space in spaces})
    budget = fixed + share * (cost.total(dense.counts) - fixed)
    scores = random_scores(spaces, dense, seed)
    plan = select(scores, spaces, dense, cost, budget, limit)
    assert cost.total(plan.counts) <= budget
    for space in spaces:
        count, left = plan.counts[space.name], space.size
        assert count == left or count % limit.round_to[space.kind] == 0
        if count < left:
            more = plan.counts | {space.name: count + chunk_after(space, count, left, limit)}
            assert cost.total(more) > budget, space.name
        # What stays of a space are its best units.
        order = scores[space.name].sort(descending=True).indices[:count]
        assert plan.kept[space.name] == tuple(sorted(order.tolist()))


@pytest.mark.parametrize("seed", range(6))
def test_at_least_the_salience_of_the_longest_prefix_is_kept(seed: int) -> None:
    """The rule of the paper, written out unit by unit, is never better."""
    spaces, dense, cost = tiny_parts()
    budget, scores = 0.4 * cost.total(dense.counts), random_scores(spaces, dense, seed)
    plan = select(scores, spaces, dense, cost, budget, limits())
    counts = {space.name: 1 if space.name == HIDDEN else 0 for space in spaces}
    prefix = float(scores[HIDDEN].max())
    units = []
    for space in spaces:
        unit_cost = cost.marginal(space.name, dense.counts)
        ordered = scores[space.name].double().sort(descending=True).values.tolist()
        units += [(value / unit_cost, space.name, value) for value in ordered[counts[space.name] :]]
    for _, name, value in sorted(units, key=lambda unit: -unit[0]):
        counts[name] += 1
        if cost.total(counts) > budget:
            break
        prefix += value
    kept = sum(float(scores[name][list(units)].double().sum()) for name, units in plan.kept.items() if units)
    assert kept >= prefix * (1 - 1e-6)


def flat(spaces: list[Space], per_unit: dict[str, float]) -> CostModel:
    """Every unit of a space costs the same; nothing is fixed."""
    return CostModel({None: {(space.name,): per_unit[space.kind] for space in spaces}})


def hand_made() -> tuple[list[Space], PruningPlan]:
    spaces = [
        Space("layers.0.heads", "heads", 3, ()),
        Space("layers.0.neurons", "neurons", 4, ()),
        Space(HIDDEN, "hidden", 2, ()),
    ]
    return spaces, PruningPlan.dense(spaces)


def hand_scores() -> dict[str, torch.Tensor]:
    return {
        "layers.0.heads": torch.tensor([5.0, 20.0, 9.0]),  # cost 10: densities 0.5, 2, 0.9
        "layers.0.neurons": torch.tensor([0.7, 3.0, 0.6, 1.0]),  # cost 1
        HIDDEN: torch.tensor([4.0, 100.0]),  # cost 20: 0.2, 5
    }


@pytest.mark.parametrize(
    ("budget", "heads", "neurons", "hidden"),
    [
        (20, (), (), (1,)),
        (21, (), (1,), (1,)),
        (31, (1,), (1,), (1,)),
        (32, (1,), (1, 3), (1,)),
        (42, (1, 2), (1, 3), (1,)),
        (43, (1, 2), (0, 1, 3), (1,)),
        (44, (1, 2), (0, 1, 2, 3), (1,)),
        (54, (0, 1, 2), (0, 1, 2, 3), (1,)),
        (74, (0, 1, 2), (0, 1, 2, 3), (0, 1)),
    ],
)
def test_ranking_by_score_per_cost_by_hand(
    budget: int, heads: tuple[int, ...], neurons: tuple[int, ...], hidden: tuple[int, ...]
) -> None:
    spaces, dense = hand_made()
    cost = flat(spaces, {"heads": 10, "neurons": 1, "hidden": 20})
    plan = select(hand_scores(), spaces, dense, cost, budget, limits())
    assert plan.kept == {"layers.0.heads": heads, "layers.0.neurons": neurons, HIDDEN: hidden}


@pytest.mark.parametrize(
    ("best_neuron", "heads", "neurons"), [(3.0, (), (0, 1, 2, 3)), (0.5, (1,), ())], ids=["neurons", "head"]
)
def test_rest_of_the_budget_is_filled_with_what_is_worth_more(
    best_neuron: float, heads: tuple[int, ...], neurons: tuple[int, ...]
) -> None:
    """Of 30 the hidden dimension and the best neuron take 21; the next in order, a head of 10 with score 3, no longer
    fits. Three more neurons do; the head would need the place of all four."""
    spaces, dense = hand_made()
    scores = hand_scores()
    scores["layers.0.heads"] = torch.tensor([2.0, 3.0, 1.5])
    scores["layers.0.neurons"] = torch.tensor([0.01, best_neuron, 0.01, 0.29])
    plan = select(scores, spaces, dense, flat(spaces, {"heads": 10, "neurons": 1, "hidden": 20}), 30, limits())
    assert plan.kept == {"layers.0.heads": heads, "layers.0.neurons": neurons, HIDDEN: (1,)}


def test_densities_are_ranked_as_they_are() -> None:
    spaces, dense = hand_made()
    cost = flat(spaces, {"heads": 10, "neurons": 1, "hidden": 20})
    plan = select(hand_scores(), spaces, dense, cost, 54, limits(), scores_are_densities=True)
    # 100 and 20, 9, 5 rank first; then hidden dimension 0 (4) no longer fits, the neurons do.
    assert plan.kept == {"layers.0.heads": (0, 1, 2), "layers.0.neurons": (0, 1, 2, 3), HIDDEN: (1,)}
    by_cost = select(hand_scores(), spaces, dense, cost, 43, limits())
    as_they_are = select(hand_scores(), spaces, dense, cost, 43, limits(), scores_are_densities=True)
    assert by_cost.kept["layers.0.neurons"] == (0, 1, 3) == as_they_are.kept["layers.0.neurons"]
    swapped = hand_scores() | {"layers.0.neurons": torch.tensor([6.0, 6.0, 6.0, 6.0])}
    ranked = select(swapped, spaces, dense, cost, 30, limits(hidden=0), scores_are_densities=True)
    assert ranked.kept[HIDDEN] == (1,) and ranked.kept["layers.0.heads"] == (1,)
    per_cost = select(swapped, spaces, dense, cost, 30, limits(hidden=0))
    assert per_cost.kept["layers.0.neurons"] == (0, 1, 2, 3)


def test_a_sublayer_that_costs_nothing_stays() -> None:
    """As a latency that is lost in noise makes it; the budget is met by the other kind."""
    spaces, dense = hand_made()
    cost = fitted_cost(spaces, {"layers.0.heads": 0.0, "layers.0.neurons": 1.0}, dict.fromkeys(dense.kept, 0.0))
    plan = select(
        hand_scores(),
        spaces,
        dense,
        cost,
        1.0,
        Limits(
            frozenset(),
            {"heads": 1, "neurons": 1, "hidden": 1},
            {"heads": 0, "neurons": 0, "hidden": 1},
            sublayers=True,
        ),
    )
    assert plan.kept["layers.0.heads"] == (0, 1, 2) and plan.kept["layers.0.neurons"] == ()


@pytest.mark.parametrize("share", [0.3, 0.6])
@pytest.mark.parametrize(
    "targets", [("heads",), ("neurons",), ("hidden",), ("heads", "neurons"), ("neurons", "hidden")]
)
def test_only_targets_lose_units_and_need_scores(targets: tuple[str, ...], share: float) -> None:
    spaces, dense, cost = tiny_parts()
    limit = limits(targets, hidden=2)
    least = {s.name: (2 if s.name == HIDDEN else 0) if s.kind in targets else s.size for s in spaces}
    budget = cost.total(least) + share * (cost.total(dense.counts) - cost.total(least))
    scores = {s.name: torch.rand(s.size) for s in spaces if s.kind in targets}
    plan = select(scores, spaces, dense, cost, budget, limit)
    assert cost.total(plan.counts) <= budget
    for space in spaces:
        if space.kind not in targets:
            assert plan.counts[space.name] == space.size
    assert any(plan.counts[s.name] < s.size for s in spaces if s.kind in targets)


def test_minimums_are_kept_and_rounded_up() -> None:
    spaces, dense, cost = tiny_parts()
    limit = limits(round_to=4, heads=2, neurons=5, hidden=6)
    scores = random_scores(spaces, dense, 3)
    scores["layers.1.neurons"] = scores["layers.1.neurons"] * 1e-9
    scores["layers.2.heads"] = scores["layers.2.heads"] * 1e-9
    least = {"heads": 2, "neurons": 8, "hidden": 8}
    floor = cost.total({space.name: least[space.kind] for space in spaces})
    tight = select(scores, spaces, dense, cost, floor, limit)
    assert tight.counts == {space.name: least[space.kind] for space in spaces}
    wider = select(scores, spaces, dense, cost, 1.6 * floor, limit)
    assert all(wider.counts[space.name] >= least[space.kind] for space in spaces)
    assert wider.counts["layers.1.neurons"] == 8 and wider.counts["layers.2.heads"] == 2
    with pytest.raises(UserError):
        select(scores, spaces, dense, cost, floor - 1, limit)


def test_a_minimum_above_what_is_left_keeps_what_is_left() -> None:
    spaces, dense, cost = tiny_parts()
    kept = dict(dense.kept) | {"layers.0.heads": (2,), "layers.1.neurons": (0, 5, 6)}
    current = PruningPlan(kept)
    scores = {name: torch.rand(count) for name, count in current.counts.items()}
    plan = select(scores, spaces, current, cost, 0.6 * cost.total(dense.counts), limits(heads=2, neurons=8, hidden=4))
    assert plan.kept["layers.0.heads"] == (2,) and plan.kept["layers.1.neurons"] == (0, 5, 6)


def test_units_that_are_gone_never_come_back() -> None:
    spaces, current, cost = tiny_parts()
    total = cost.total(current.counts)
    for event, share in enumerate((0.8, 0.6, 0.45, 0.44, 0.3)):
        scores = random_scores(spaces, current, seed=10 + event)
        plan = select(scores, spaces, current, cost, share * total, limits(hidden=2))
        assert cost.total(plan.counts) <= share * total
        for name, units in plan.kept.items():
            assert set(units) <= set(current.kept[name])
        current.survivors(plan)  # raises for a unit that is gone
        current = plan
    assert current.counts[HIDDEN] <= 16 and cost.total(current.counts) > 0.2 * total


def test_the_whole_budget_keeps_everything() -> None:
    spaces, dense, cost = tiny_parts()
    assert select(random_scores(spaces, dense, 0), spaces, dense, cost, cost.total(dense.counts), limits()) == dense


@pytest.mark.parametrize("round_to", [1, 4])
def test_ties_go_to_the_first_units_each_time(round_to: int) -> None:
    spaces, dense, cost = tiny_parts()
    scores = {space.name: torch.ones(space.size) for space in spaces}
    budget = 0.5 * cost.total(dense.counts)
    plans = [select(scores, spaces, dense, cost, budget, limits(round_to=round_to)) for _ in range(3)]
    assert len({plan.digest() for plan in plans}) == 1
    assert all(units == tuple(range(len(units))) for units in plans[0].kept.values())
    # Neurons are cheapest; of equal ones those of the first layers stay.
    counts = [plans[0].counts[f"layers.{i}.heads"] for i in range(LAYERS)]
    assert counts == sorted(counts, reverse=True)


def test_impossible_budget_names_what_to_change() -> None:
    spaces, dense, cost = tiny_parts()
    limit = limits(("neurons",))
    scores = random_scores(spaces, dense, 0)
    with pytest.raises(UserError, match="allows a cost of 50.*Lower target_sparsity, widen prune_targets") as error:
        select(scores, spaces, dense, cost, 50, limit)
    least = cost.total({s.name: 0 if s.kind == "neurons" else s.size for s in spaces})
    assert f"{least:,.0f}" in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("minimum", [0, 3])
@pytest.mark.parametrize("name", ["layers.1.heads", "layers.2.neurons", HIDDEN])
def test_scores_that_are_not_finite_are_a_user_error(name: str, minimum: int, value: float) -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, 0)
    scores[name][1] = value
    with pytest.raises(UserError, match=f"{name} are not finite"):
        select(
            scores,
            spaces,
            dense,
            cost,
            0.5 * cost.total(dense.counts),
            limits(heads=minimum, neurons=minimum, hidden=3),
        )


def test_scores_in_double_precision_give_the_same_plan() -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, 5)
    budget = 0.5 * cost.total(dense.counts)
    double = {name: value.double() for name, value in scores.items()}
    expected = select(scores, spaces, dense, cost, budget, limits())
    assert select(double, spaces, dense, cost, budget, limits()) == expected
