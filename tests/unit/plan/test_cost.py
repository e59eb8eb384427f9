"""Costs that are computed from unit counts against what the really cut model has."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CASES, FAMILY_NAMES, HEAD_DIM, LAYERS, TASKS, adapted, parts, random_plan, tiny_batch, tiny_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from apt_trainer.measure import Latency, count_flops, count_parameters
from apt_trainer.models import HIDDEN, family_of
from apt_trainer.plan.cost import CostModel, fitted_cost, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning import latency_cost as latency_module
from apt_trainer.surgery.cutting import apply_plan

VANISH = ("layers.0.heads", "layers.2.neurons")
PLANS = {
    "dense": None,
    "narrow": (21, ()),
    "narrower": (22, ()),
    "sublayers_gone": (23, VANISH),
    "layer_gone": (24, ("layers.1.heads", "layers.1.neurons")),
    "blocks_empty": (25, tuple(f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("heads", "neurons"))),
}


def plan_named(which: str, spaces: list, dense: PruningPlan) -> PruningPlan:
    chosen = PLANS[which]
    return dense if chosen is None else random_plan(spaces, dense, seed=chosen[0], vanish=chosen[1])


def block_parameters(model: PreTrainedModel) -> int:
    """Really there, adapters aside."""
    blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    return sum(p.numel() for key, p in model.named_parameters() if key.startswith(blocks) and ".lora_" not in key)


@pytest.mark.parametrize("which", PLANS)
@pytest.mark.parametrize(("name", "task"), CASES)
def test_parameters_of_the_blocks_and_of_the_model_and_bytes(name: str, task: str, which: str) -> None:
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    blocks = parameter_cost(model, family, spaces)
    whole = parameter_cost(model, family, spaces, blocks_only=False)
    memory = memory_cost(model, family, spaces, 0, 0)  # without tokens there is no cache
    plan = plan_named(which, spaces, dense)
    apply_plan(model, family, spaces, dense, plan)
    assert blocks.total(plan.counts) == block_parameters(model)
    assert whole.total(plan.counts) == count_parameters(model)
    assert memory.total(plan.counts) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert (block_parameters(model) == 0) == (which == "blocks_empty")


@pytest.mark.parametrize("which", ["narrow", "sublayers_gone"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_adapters_are_not_counted(name: str, which: str) -> None:
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    plain = parameter_cost(model, family, spaces)
    adapted(model, everywhere=True)
    cost, plan = parameter_cost(model, family, spaces), plan_named(which, spaces, dense)
    assert cost == plain
    apply_plan(model, family, spaces, dense, plan)
    assert cost.total(plan.counts) == block_parameters(model)


@pytest.mark.parametrize(
    ("sizes", "total", "head", "neuron", "hidden"),
    [
        ({}, 85_054_464, 196_800, 1_537, 110_664),
        (
            {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
            10_646_784,
            4 * 384 * 32 + 3 * 32,
            2 * 384 + 1,
            4 * 32 * 72 + 2 * 9216 + 6 * 6,
        ),
    ],
    ids=["base", "small"],
)
def test_costs_of_full_size_models(sizes: dict[str, int], total: int, head: int, neuron: int, hidden: int) -> None:
    """C(N_h, N_f, d) = d·(4·d_h·N_h + 2·N_f + 6·L) + 3·d_h·N_h + N_f and its derivatives."""
    with torch.device("meta"):
        model = TASKS["ForSequenceClassification"].from_config(AutoConfig.for_model("roberta", **sizes))
    family, spaces, dense = parts(model)
    cost = parameter_cost(model, family, spaces)
    assert cost.total(dense.counts) == total
    assert cost.marginal("layers.0.heads", dense.counts) == head
    assert cost.marginal("layers.5.neurons", dense.counts) == neuron
    assert cost.marginal(HIDDEN, dense.counts) == hidden


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_memory_of_a_model_that_keeps_nothing_is_its_weights(name: str) -> None:
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    counts = random_plan(spaces, dense, seed=26).counts
    weights = memory_cost(model, family, spaces, 5, 9).total(counts)
    half = memory_cost(copy.deepcopy(model).bfloat16(), family, spaces, 5, 9).total(counts)
    assert half == weights / 2 == 2 * parameter_cost(model, family, spaces, blocks_only=False).total(counts)


@pytest.mark.parametrize("which", ["dense", "narrow", "sublayers_gone", "blocks_empty"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_flops_equal_the_counted_ones(name: str, which: str) -> None:
    """Exactly: besides the blocks a token classifier has one linear of known size."""
    model = tiny_model(name, "ForTokenClassification")
    family, spaces, dense = parts(model)
    batch = {key: value for key, value in tiny_batch(model, size=3, length=7).items() if key != "labels"}
    cost = flops_cost(model, family, spaces, 3, 7)
    plan = plan_named(which, spaces, dense)
    apply_plan(model, family, spaces, dense, plan)
    head = 2 * 3 * 7 * plan.counts[HIDDEN] * model.config.num_labels
    assert cost.total(plan.counts) + head == count_flops(model, batch)


def test_flops_by_hand() -> None:
    model = tiny_model("bert", layers=1)
    family, spaces, dense = parts(model)
    tokens, length, d, heads, neurons = 2 * 5, 5, 16, 4, 24
    projections = 2 * tokens * (4 * d * heads * HEAD_DIM + 2 * d * neurons)
    attention = 2 * 2 * tokens * length * heads * HEAD_DIM  # scores, and weighted values
    assert flops_cost(model, family, spaces, 2, length).total(dense.counts) == projections + attention


@pytest.mark.parametrize("kind", ["params", "flops", "memory", "model"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_marginal_cost_is_the_finite_difference(name: str, task: str, kind: str) -> None:
    """Central difference: exact for products of counts, squares included (a head that maps hidden to hidden)."""
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    cost = {
        "params": lambda: parameter_cost(model, family, spaces),
        "flops": lambda: flops_cost(model, family, spaces, 4, 8),
        "memory": lambda: memory_cost(model, family, spaces, 4, 8),
        "model": lambda: parameter_cost(model, family, spaces, blocks_only=False),
    }[kind]()
    counts = {key: max(2, number) for key, number in random_plan(spaces, dense, seed=27).counts.items()}
    counts["layers.1.neurons"] = 0
    for space in spaces:
        more, less = dict(counts), dict(counts)
        more[space.name], less[space.name] = counts[space.name] + 1, counts[space.name] - 1
        if counts[space.name] == 0:
            assert cost.marginal(space.name, counts) == 0
            continue
        difference = (cost.total(more) - cost.total(less)) / 2
        assert cost.marginal(space.name, counts) == pytest.approx(difference, rel=1e-12) and difference > 0


def test_last_unit_takes_the_fixed_part_of_its_sublayer_with_it() -> None:
    cost = CostModel({None: {("h",): 2.0}, "a": {("a", "h"): 3.0, ("h",): 5.0, (): 7.0}})
    assert cost.total({"a": 4, "h": 10}) == 2 * 10 + 3 * 4 * 10 + 5 * 10 + 7
    assert cost.total({"a": 1, "h": 10}) - cost.total({"a": 0, "h": 10}) == 30 + 50 + 7
    assert cost.marginal("a", {"a": 1, "h": 10}) == 30
    assert cost.marginal("h", {"a": 4, "h": 10}) == 2 + 12 + 5
    assert cost.marginal("h", {"a": 0, "h": 10}) == 2


def test_a_square_counts_twice_in_the_marginal() -> None:
    assert CostModel({None: {("h", "h"): 3.0}}).marginal("h", {"h": 5}) == 2 * 3 * 5


def test_weights_of_parameters() -> None:
    model = tiny_model("bert")
    family, spaces, dense = parts(model)
    norms = parameter_cost(model, family, spaces, weigh=lambda key, p: 1.0 if "LayerNorm" in key else 0.0)
    assert norms.total(dense.counts) == 2 * 2 * 16 * LAYERS
    assert norms.total(dense.counts | {"layers.0.heads": 0}) == 2 * 2 * 16 * LAYERS - 2 * 16


def test_fitted_cost_by_hand() -> None:
    _, spaces, dense = parts(tiny_model("bert", layers=1))
    cost = fitted_cost(
        spaces,
        {"layers.0.heads": 2e-3, "layers.0.neurons": 1e-4},
        {"layers.0.heads": 5e-3, "layers.0.neurons": 3e-3},
    )
    assert cost.total(dense.counts) == pytest.approx(5e-3 + 4 * 2e-3 + 3e-3 + 24 * 1e-4)
    half = dense.counts | {HIDDEN: 8}
    assert cost.total(half) == pytest.approx(cost.total(dense.counts) / 2)
    assert cost.total(half | {"layers.0.heads": 0}) == pytest.approx((3e-3 + 24e-4) / 2)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_latency_cost_recovers_a_known_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a pretended machine with constant seconds per head, neuron and sublayer the fit gives these back."""
    model = tiny_model(name)
    family, spaces, dense = parts(model)

    def units(variant: nn.Module, space: object) -> int:
        try:
            weight = variant.get_submodule(space.gate).weight
        except AttributeError:
            return 0
        return weight.shape[1] // space.channels

    def timed(models: dict, batch_sizes: list[int], length: int) -> dict:
        assert (batch_sizes, length) == ([4], 16)
        result = {}
        for key, variant in models.items():
            of_space = {space: units(variant, space) for space in spaces[:-1]}
            ms = 10.0 + sum(
                (3 + 2 * n if space.kind == "heads" else 1 + 0.5 * n) for space, n in of_space.items() if n
            )
            result[key] = {4: Latency(ms, 0.0, 10)}
        return result

    monkeypatch.setattr(latency_module, "compare_latency", timed)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cost = latency_module.latency_cost(model, family, spaces, 4, 16)
    assert cost.total(dense.counts) == pytest.approx(1e-3 * LAYERS * (3 + 2 * 4 + 1 + 0.5 * 24))
    counts = dense.counts | {"layers.0.heads": 1, "layers.1.heads": 0, "layers.2.neurons": 8}
    assert cost.total(counts) == pytest.approx(1e-3 * (5 + 11 + 3 * 1 + 0.5 * (24 + 24 + 8)))
    assert cost.marginal("layers.0.heads", dense.counts) == pytest.approx(2e-3)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
