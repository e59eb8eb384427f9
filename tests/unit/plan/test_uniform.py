"""Plans of equal layers: the best of all that the budget allows, by brute force; what a stock config can say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tiny import LANGUAGE_MODELS, parts, tiny_model

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN, Space
from apt_trainer.plan.cost import CostModel, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.limits import LEAST_DEPTH, Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.uniform import Layer, UniformShape
from apt_trainer.pruning.uniform_shape import uniform_shape

KINDS = ("heads", "neurons", "hidden")


def limits(targets: tuple[str, ...] = KINDS, round_to: int = 1, sublayers: bool = False, **least: int) -> Limits:
    minimum = {"heads": 0, "neurons": 0, "hidden": 1} | least
    return Limits(frozenset(targets), {"heads": 1, "neurons": round_to, "hidden": round_to}, minimum, sublayers)


def anything(heads: int, hidden: int) -> bool:
    return True


def shape_of(spaces: list[Space], allowed: Callable[[int, int], bool] = anything) -> UniformShape:
    names = {f"{space.stack}.{space.layer}": space.stack for space in spaces if space.name != HIDDEN}
    return UniformShape(
        tuple(
            Layer(stack, tuple(s.name for s in spaces if s.name != HIDDEN and f"{s.stack}.{s.layer}" == key))
            for key, stack in names.items()
        ),
        allowed,
    )


def tiny_parts(metric: str = "params", family: str = "llama") -> tuple[list[Space], PruningPlan, CostModel]:
    model = tiny_model(family, LANGUAGE_MODELS.get(family, "ForSequenceClassification"))
    table, spaces, dense = parts(model)
    if metric == "params":
        return spaces, dense, parameter_cost(model, table, spaces)
    return spaces, dense, {"flops": flops_cost, "memory": memory_cost}[metric](model, table, spaces, 4, 8)


def random_scores(spaces: list[Space], plan: PruningPlan, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = {"heads": 100.0, "neurons": 1.0, "hidden": 30.0}
    return {
        space.name: scale[space.kind] * torch.randn(plan.counts[space.name], generator=generator).exp()
        for space in spaces
    }


def steps(space: Space, left: int, limit: Limits) -> list[int]:
    """Numbers of units that may be left of ``left``."""
    if space.kind not in limit.targets:
        return [left]
    multiple = limit.round_to[space.kind]
    least = max(1, limit.minimum[space.kind])
    return [n for n in range(1, left + 1) if n == left or (n >= least and n % multiple == 0)]


def best_value(
    scores: dict[str, torch.Tensor],
    spaces: list[Space],
    current: PruningPlan,
    cost: CostModel,
    budget: float,
    limit: Limits,
    layer_sets: list[list[int]],
    allowed: Callable[[int, int], bool] = anything,
) -> float:
    """The largest sum of scores of any plan of equal layers, each tried."""
    of = {kind: next(s for s in spaces if s.kind == kind and current.counts[s.name]) for kind in KINDS}
    numbers = [steps(of[kind], current.counts[of[kind].name], limit) for kind in KINDS]
    best = -math.inf
    for layers, heads, neurons, hidden in itertools.product(layer_sets, *numbers):
        number = {"heads": heads, "neurons": neurons, "hidden": hidden}
        counts = {s.name: number[s.kind] if s.layer is None or s.layer in layers else 0 for s in spaces}
        if allowed(heads, hidden) and cost.total(counts) <= budget:
            best = max(best, kept_value(scores, counts))
    return best


def kept_value(scores: dict[str, torch.Tensor], counts: dict[str, int]) -> float:
    return sum(float(s.double().sort(descending=True).values[: counts[n]].sum()) for n, s in scores.items())


@pytest.mark.parametrize("round_to", [1, 4])
@pytest.mark.parametrize("metric", ["params", "flops", "memory"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_equal_layers_within_the_budget(seed: int, share: float, metric: str, round_to: int) -> None:
    spaces, dense, cost = tiny_parts(metric)
    limit = limits(round_to=round_to, hidden=4)
    budget, scores = share * cost.total(dense.counts), random_scores(spaces, dense, seed)
    plan = shape_of(spaces).select(scores, spaces, dense, cost, budget, limit)
    assert cost.total(plan.counts) <= budget
    for kind in KINDS:
        assert len({plan.counts[space.name] for space in spaces if space.kind == kind}) == 1
    best = best_value(scores, spaces, dense, cost, budget, limit, [[0, 1, 2]])
    assert kept_value(scores, plan.counts) == pytest.approx(best, rel=1e-12)
    for space in spaces:  # the units that stay of a space are its best
        order = scores[space.name].sort(descending=True).indices[: plan.counts[space.name]]
        assert plan.kept[space.name] == tuple(sorted(order.tolist()))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
def test_whole_layers_go_by_their_scores(share: float) -> None:
    spaces, dense, cost = tiny_parts()
    limit = limits(sublayers=True, hidden=8)
    budget, scores = share * cost.total(dense.counts), random_scores(spaces, dense, 3)
    plan = shape_of(spaces).select(scores, spaces, dense, cost, budget, limit)
    worth = [sum(float(scores[s.name].sum()) for s in spaces if s.layer == layer) for layer in range(3)]
    order = sorted(range(3), key=lambda layer: worth[layer])
    sets = [sorted(order[gone:]) for gone in range(3 - math.ceil(3 / LEAST_DEPTH) + 1)]
    best = best_value(scores, spaces, dense, cost, budget, limit, sets)
    assert kept_value(scores, plan.counts) == pytest.approx(best, rel=1e-12)
    for layer in range(3):
        assert len({plan.counts[s.name] > 0 for s in spaces if s.layer == layer}) == 1


def test_layers_alone_go_where_only_they_are_asked_for() -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, 0)
    for layer, factor in enumerate((3.0, 0.01, 2.0)):
        scores |= {s.name: scores[s.name] * factor for s in spaces if s.layer == layer}
    budget = 0.7 * cost.total(dense.counts)
    plan = shape_of(spaces).select(scores, spaces, dense, cost, budget, limits((), sublayers=True))
    assert [plan.counts[f"layers.{i}.heads"] for i in range(3)] == [4, 0, 4]
    assert [plan.counts[f"layers.{i}.neurons"] for i in range(3)] == [20, 0, 20]


def test_a_layer_that_stays_does() -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, 0)
    scores |= {s.name: scores[s.name] * 1e-3 for s in spaces if s.layer == 0}
    free = shape_of(spaces)
    tied = UniformShape(tuple(Layer(la.stack, la.spaces, stays=i == 0) for i, la in enumerate(free.layers)), anything)
    budget = 0.7 * cost.total(dense.counts)
    assert free.select(scores, spaces, dense, cost, budget, limits((), sublayers=True)).counts["layers.0.heads"] == 0
    assert tied.select(scores, spaces, dense, cost, budget, limits((), sublayers=True)).counts["layers.0.heads"] == 4


def test_two_stacks_lose_layers_each_by_itself() -> None:
    spaces, dense, cost = tiny_parts(family="t5")
    table, model = None, tiny_model("t5", "ForConditionalGeneration")
    table, _, _ = parts(model)
    shape = uniform_shape(model, table, ["neurons", "sublayers"])
    assert [layer.stays for layer in shape.layers] == [True, False, False, True, True]
    budget = 0.6 * cost.total(dense.counts)
    limit = limits(("neurons",), round_to=4, sublayers=True)
    plan = shape.select(random_scores(spaces, dense, 1), spaces, dense, cost, budget, limit)
    assert cost.total(plan.counts) <= budget
    left = {space.kind: {plan.counts[s.name] for s in spaces if s.kind == space.kind} - {0} for space in spaces}
    assert all(len(numbers) == 1 for numbers in left.values())
    assert plan.counts["encoder.0.heads"] == plan.counts["decoder.1.cross_heads"] == 4


def test_only_numbers_that_the_config_accepts_are_taken() -> None:
    """A LLaMA config wants hidden dimensions that its heads divide, whatever the size of a head."""
    model = tiny_model("llama", "ForCausalLM")
    table, spaces, dense = parts(model)
    cost = parameter_cost(model, table, spaces)
    shape = uniform_shape(model, table, ["heads", "hidden"])
    assert [heads for heads in range(1, 5) if shape.allowed(heads, 16)] == [1, 2, 4]
    scores, budget, limit = (
        random_scores(spaces, dense, 2),
        0.6 * cost.total(dense.counts),
        limits(("heads", "hidden")),
    )
    plan = shape.select(scores, spaces, dense, cost, budget, limit)
    best = best_value(scores, spaces, dense, cost, budget, limit, [[0, 1, 2]], lambda h, d: d % (2 * h) == 0)
    assert kept_value(scores, plan.counts) == pytest.approx(best, rel=1e-12)


def test_minimums_and_multiples_hold() -> None:
    spaces, dense, cost = tiny_parts()
    limit = limits(round_to=8, heads=2, neurons=9, hidden=5)
    shape, scores = shape_of(spaces), random_scores(spaces, dense, 5)
    least = shape.least(spaces, dense, cost, limit)
    assert least == {s.name: {"heads": 2, "neurons": 16, "hidden": 8}[s.kind] for s in spaces}
    assert shape.select(scores, spaces, dense, cost, cost.total(least), limit).counts == least
    with pytest.raises(UserError, match="The budget allows"):
        shape.select(scores, spaces, dense, cost, cost.total(least) - 1, limit)


def test_no_attention_and_no_feed_forward_vanishes_by_itself() -> None:
    spaces, dense, cost = tiny_parts()
    least = shape_of(spaces).least(spaces, dense, cost, limits(round_to=4))
    assert least == {s.name: {"heads": 1, "neurons": 4, "hidden": 4}[s.kind] for s in spaces}


@pytest.mark.parametrize("sublayers", [False, True])
def test_counts_only_shrink_over_events(sublayers: bool) -> None:
    spaces, current, cost = tiny_parts()
    shape, limit, total = shape_of(spaces), limits(sublayers=sublayers, hidden=4), cost.total(current.counts)
    for event, share in enumerate((0.9, 0.7, 0.5, 0.3)):
        scores = random_scores(spaces, current, event)
        new = shape.select(scores, spaces, current, cost, share * total, limit)
        current.survivors(new)  # fails where a unit comes back
        assert cost.total(new.counts) <= share * total
        current = new


def test_the_same_scores_give_the_same_plan_and_all_that_fits_stays() -> None:
    spaces, dense, cost = tiny_parts()
    shape, limit = shape_of(spaces), limits(sublayers=True)
    equal = {space.name: torch.ones(space.size) for space in spaces}
    budget = 0.5 * cost.total(dense.counts)
    assert len({shape.select(equal, spaces, dense, cost, budget, limit).digest() for _ in range(3)}) == 1
    assert shape.select(equal, spaces, dense, cost, cost.total(dense.counts), limit) == dense


def test_scores_that_are_densities_are_weighed_by_cost() -> None:
    """Equal densities: what counts is how much of the budget is used."""
    spaces, dense, cost = tiny_parts()
    scores = {space.name: torch.linspace(1, 0, space.size, dtype=torch.float64) for space in spaces}
    budget = 0.5 * cost.total(dense.counts)
    plan = shape_of(spaces).select(scores, spaces, dense, cost, budget, limits(), scores_are_densities=True)
    counts = plan.counts
    assert counts["layers.0.heads"] < 4 and counts["layers.0.neurons"] < 20 and counts[HIDDEN] < 16
    assert cost.total(counts) > 0.85 * budget


def test_scores_that_are_not_finite_are_refused() -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, 0)
    scores["layers.1.neurons"][3] = math.nan
    with pytest.raises(UserError, match=r"layers.1.neurons are not finite"):
        shape_of(spaces).select(scores, spaces, dense, cost, 0.5 * cost.total(dense.counts), limits())


def test_a_choice_among_very_many_numbers_is_made_at_once() -> None:
    """80 layers, 64 groups, 28,672 neurons and 8,192 dimensions: no number is tried unit by unit."""
    layers, sizes = 80, {"heads": 64, "neurons": 28672, "hidden": 8192}
    spaces = [Space(f"layers.{i}.{kind}", kind, sizes[kind], (), layer=i) for i in range(layers) for kind in KINDS[:2]]
    spaces.append(Space(HIDDEN, "hidden", sizes["hidden"], ()))
    cost = CostModel({s.name: {(s.name, HIDDEN): 3.0} for s in spaces[:-1]})
    dense = PruningPlan({space.name: tuple(range(space.size)) for space in spaces})
    generator = torch.Generator().manual_seed(0)
    scores = {space.name: torch.rand(space.size, generator=generator) for space in spaces}
    budget = 0.5 * cost.total(dense.counts)
    plan = shape_of(spaces).select(scores, spaces, dense, cost, budget, limits(round_to=128))
    assert cost.total(plan.counts) <= budget


# ---------------------------------------------------------------------- what a config can say

SAYS_ALL = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
SAYS_HEADS = ("gemma2", "gemma3_text")
"""Their embeddings are scaled by the hidden dimensions."""
SAYS_LAYERS = ("bert", "roberta", "xlm-roberta", "distilbert", "gpt2", "opt", "gpt_neox", "modernbert", "t5", "mt5")
"""The size of a head is the hidden dimensions over the heads, or all heads share a table."""


@pytest.mark.parametrize("family", [*SAYS_ALL, *SAYS_HEADS, *SAYS_LAYERS])
def test_which_kinds_the_config_of_a_family_can_say(family: str) -> None:
    model = tiny_model(family, LANGUAGE_MODELS.get(family, "ForSequenceClassification"))
    table, _, _ = parts(model)
    said = ["neurons", "sublayers"]
    said += ["heads"] if family in SAYS_ALL + SAYS_HEADS else []
    said += ["hidden"] if family in SAYS_ALL else []
    uniform_shape(model, table, said)
    for kind in {"heads", "hidden"} - set(said):
        name = {"heads": "heads", "hidden": "hidden dimensions"}[kind]
        with pytest.raises(UserError, match=f"config of {family} cannot say fewer {name}.*shape: free"):
            uniform_shape(model, table, ["neurons", kind])


def test_heads_scaled_by_the_number_of_their_layer_keep_their_layers() -> None:
    model = tiny_model("gpt2", "ForCausalLM", scale_attn_by_inverse_layer_idx=True)
    table, _, _ = parts(model)
    with pytest.raises(UserError, match="cannot say fewer layers"):
        uniform_shape(model, table, ["sublayers"])


def test_norms_that_stay_are_no_whole_layers() -> None:
    model = tiny_model("bert", apt_post_norm_policy="keep_norm")
    table, _, _ = parts(model)
    with pytest.raises(UserError, match="remove_norm"):
        uniform_shape(model, table, ["sublayers"])
    uniform_shape(model, table, ["neurons"])
