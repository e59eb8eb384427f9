"""Adapters: insertion, growth that changes no output, merging, how salient one is, and who grows by how much."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import (
    CASES,
    FAMILY_NAMES,
    LANGUAGE_MODELS,
    LAYERS,
    NEURONS,
    WIDTH,
    adapted,
    gap,
    hooks,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.plan.ranks import AdapterSize, allocate
from apt_trainer.scoring.rank_score import RankScore
from apt_trainer.surgery.adapters import (
    ADAPTER,
    adapter_parameters,
    adapters,
    grow_rank,
    insert_adapters,
    merge_adapters,
    ranks,
)
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.slicing import EditLog, Grow


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grow_all(model: PreTrainedModel, extra: int, log: EditLog | None = None) -> None:
    drawn = generator()
    for index, (path, layer) in enumerate(adapters(model)):
        grow_rank(path, layer, layer.r[ADAPTER] + extra + index, drawn, log or EditLog())


# ---------------------------------------------------------------------- insertion


@pytest.mark.parametrize(("name", "task"), CASES)
def test_insertion_adapts_the_targets_and_freezes_the_rest(name: str, task: str) -> None:
    model = tiny_model(name, task)
    family, _, _ = parts(model)
    before, batch = logits(model, tiny_batch(model)), tiny_batch(model)
    paths, class_name = {path for path, _ in model.named_modules()}, type(model)
    insert_adapters(model, family.default_targets(model), 4, 8, 0.0, family.layer_paths(model))
    assert type(model) is class_name and paths <= {path for path, _ in model.named_modules()}
    found = dict(adapters(model))
    assert len(found) == 3 * LAYERS and set(ranks(model).values()) == {4}
    assert all(path.endswith(family.adapter_targets) for path in found)
    assert all(layer.scaling[ADAPTER] == 2.0 for layer in found.values())
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {
        f"{path}.lora_{factor}.{ADAPTER}.weight" for path in found for factor in "AB"
    }
    assert adapter_parameters(model) == LAYERS * 4 * (2 * (WIDTH + WIDTH) + (WIDTH + NEURONS))
    assert torch.equal(logits(model, batch), before)  # B starts at 0


def test_targets_outside_the_layers_are_left_alone() -> None:
    model = tiny_model("roberta")
    family, _, _ = parts(model)
    insert_adapters(model, ["dense"], 2, 4, 0.0, family.layer_paths(model))
    assert len(ranks(model)) == 3 * LAYERS and not isinstance(model.classifier.dense, LoraLayer)


def test_a_base_model_can_be_adapted() -> None:
    model = tiny_model("bert").bert
    family, _, _ = parts(model)
    insert_adapters(model, family.default_targets(model), 2, 4, 0.0, family.layer_paths(model))
    assert len(ranks(model)) == 3 * LAYERS


@pytest.mark.parametrize("target", ["q_proj", "LayerNorm", "embeddings", "uery"])
def test_a_target_that_is_no_linear_of_a_layer_is_a_user_error(target: str) -> None:
    model = tiny_model("bert")
    family, _, _ = parts(model)
    with pytest.raises(UserError, match=f"lora_target_modules names '{target}'.*Names there: .*query") as error:
        insert_adapters(model, ["query", target], 2, 4, 0.0, family.layer_paths(model))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert "word_embeddings" not in str(error.value)


def test_under_autocast_adapters_keep_no_copy_of_their_input() -> None:
    """Same numbers as PEFT's way, and nothing of the size of the input is kept for the backward pass but the input."""
    layer = nn.Module()
    layer.block = nn.Module()
    layer.block.linear = nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)
    insert_adapters(layer, ["linear"], 4, 8, 0.0, ["block"])
    adapter = layer.block.linear
    nn.init.normal_(adapter.lora_B["default"].weight)
    x = torch.randn(256, 64, dtype=torch.bfloat16)

    def run() -> tuple[Tensor, list[Tensor | None], int]:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == x.numel():
                saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            output = adapter(x)
        saved.pop(x.untyped_storage().data_ptr(), None)
        layer.zero_grad()
        output.float().square().sum().backward()
        return output, [p.grad for p in layer.parameters()], sum(saved.values())

    output, gradients, copies = run()
    del adapter._cast_input_dtype  # as PEFT has it
    as_peft, peft_gradients, peft_copies = run()
    assert (copies, peft_copies) == (0, x.nbytes)
    assert torch.equal(output, as_peft)
    for one, other in zip(gradients, peft_gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_adapters_of_half_precision_weights_are_float32() -> None:
    """Or an update of a thousandth would be lost in bfloat16."""
    model = adapted(tiny_model("llama", LANGUAGE_MODELS["llama"]).bfloat16())
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    batch = tiny_batch(model)
    grown = copy.deepcopy(model)
    grow_all(grown, 2)
    assert logits(model, batch).dtype == torch.bfloat16
    assert torch.equal(logits(model, batch), logits(grown, batch))
    merge_adapters(grown)
    assert {p.dtype for p in grown.parameters()} == {torch.bfloat16}


# ---------------------------------------------------------------------- growth


@pytest.mark.parametrize(("name", "task"), CASES)
def test_growth_changes_no_output_and_keeps_the_scaling(name: str, task: str) -> None:
    """In double precision, where another order of summation does not show."""
    model = adapted(tiny_model(name, task), rank=3).double()
    batch = tiny_batch(model)
    before, number = logits(model, batch), adapter_parameters(model)
    scaling = {path: layer.scaling[ADAPTER] for path, layer in adapters(model)}
    grow_all(model, extra=2)
    assert gap(logits(model, batch), before) <= 1e-12
    added = 0
    for index, (path, layer) in enumerate(adapters(model)):
        rank = 3 + 2 + index
        a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
        assert ranks(model)[path] == rank == a.out_features == b.in_features
        assert a.weight.shape == (rank, layer.in_features) and b.weight.shape == (layer.out_features, rank)
        assert layer.scaling[ADAPTER] == scaling[path] == layer.lora_alpha[ADAPTER] / rank == 2.0
        assert a.weight.requires_grad and b.weight.requires_grad
        added += (2 + index) * (layer.in_features + layer.out_features)
    assert adapter_parameters(model) == number + added


def test_growth_appends_and_is_the_same_in_every_process() -> None:
    models = [adapted(tiny_model("bert")) for _ in range(2)]
    path, layer = next(adapters(models[0]))
    old_a, old_b = layer.lora_A[ADAPTER].weight.detach().clone(), layer.lora_B[ADAPTER].weight.detach().clone()
    log = EditLog()
    for model in models:
        grow_rank(path, model.get_submodule(path), 200, generator(7), log)
    a, b = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
    assert torch.equal(a[:3], old_a) and torch.equal(b[:, :3], old_b) and not b[:, 3:].any()
    bound = WIDTH**-0.5
    assert a[3:].abs().max() <= bound and a[3:].abs().max() > 0.98 * bound
    assert float(a[3:].std()) == pytest.approx(bound / 3**0.5, rel=0.05) and abs(float(a[3:].mean())) < 0.02
    assert torch.equal(a, models[1].get_submodule(path).lora_A[ADAPTER].weight)
    assert log.edits[f"{path}.lora_A.{ADAPTER}.weight"] == [Grow(0, 197)] * 2
    assert log.edits[f"{path}.lora_B.{ADAPTER}.weight"] == [Grow(1, 197)] * 2


def test_new_ranks_learn() -> None:
    model = adapted(tiny_model("bert")).train()
    grow_all(model, extra=2)
    model(**tiny_batch(model)).loss.backward()
    for _, layer in adapters(model):
        assert layer.lora_B[ADAPTER].weight.grad[:, 3:].abs().sum(0).min() > 0
        assert not layer.lora_A[ADAPTER].weight.grad[3:].any()  # B is still 0


def test_a_rank_cannot_shrink() -> None:
    path, layer = next(adapters(adapted(tiny_model("bert"))))
    with pytest.raises(AssertionError, match="rank 3 cannot grow to 3"):
        grow_rank(path, layer, 3, generator(), EditLog())


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize(("name", "task"), CASES)
def test_merging_changes_no_output(name: str, task: str) -> None:
    """Also after growth and a cut."""
    model = tiny_model(name, task).double()
    family, spaces, dense = parts(model)
    adapted(model)
    grow_all(model, extra=1)
    apply_plan(model, family, spaces, dense, random_plan(spaces, dense, seed=40, vanish=("layers.1.heads",)))
    batch = tiny_batch(model)
    before, base = logits(model, batch), {id(p): p.detach().clone() for p in model.parameters()}
    shared = {path: layer.get_base_layer().weight for path, layer in adapters(model)}
    merge_adapters(model)
    assert not list(adapters(model)) and ranks(model) == {} and adapter_parameters(model) == 0
    assert gap(logits(model, batch), before) <= 1e-12
    for path, weight in shared.items():
        merged = model.get_submodule(path)
        assert type(merged) is nn.Linear and merged.weight is not weight and not merged.weight.requires_grad
        assert torch.equal(weight, base[id(weight)]) and not torch.equal(merged.weight, weight)


def test_merging_by_hand() -> None:
    model = adapted(tiny_model("distilbert"), rank=2)
    expected = {}
    for path, layer in adapters(model):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        expected[path] = layer.base_layer.weight + layer.lora_alpha[ADAPTER] / 2 * b @ a
    merge_adapters(model)
    for path, weight in expected.items():
        assert torch.allclose(model.get_submodule(path).weight, weight, atol=1e-6)


# ---------------------------------------------------------------------- rank score


def explicit(model: nn.Module, factor: str, absolute: bool = False) -> dict[str, torch.Tensor]:
    """Per rank, from parameter gradients: |Σ W·∂L/∂W|, or Σ|W·∂L/∂W|."""
    result = {}
    for path, layer in adapters(model):
        weight = getattr(layer, f"lora_{factor}")[ADAPTER].weight
        product = weight.detach().double() * weight.grad.double()
        dim = 1 if factor == "A" else 0
        result[path] = product.abs().sum(dim) if absolute else product.sum(dim).abs()
    return result


@pytest.mark.parametrize("setup", ["plain", "micro_batches", "dropout", "checkpointing", "reentrant"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_signed_score_equals_parameter_gradients_by_either_factor(name: str, setup: str) -> None:
    model = adapted(tiny_model(name, dropout=0.1 if setup == "dropout" else 0.0)).train()
    if setup in ("checkpointing", "reentrant"):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": setup == "reentrant"})
    grow_all(model, extra=1)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B[ADAPTER].weight.add_(0.1)
    score = RankScore(decay=0.6)
    score.attach(model)
    batch = tiny_batch(model)
    rows = [slice(0, 2), slice(2, 4)] if setup == "micro_batches" else [slice(0, 4)]
    for part in rows:
        (model(**{key: value[part] for key, value in batch.items()}).loss / len(rows)).backward()
    score.update(lambda tensor: tensor, 1)
    by_a, by_b = explicit(model, "A"), explicit(model, "B")
    state = score.state_dict()
    assert set(state) == set(by_a) == set(ranks(model))
    for path, value in state.items():
        assert torch.allclose(by_a[path], by_b[path], rtol=1e-3, atol=1e-7)
        assert torch.allclose(value.double() / 0.4, by_a[path], rtol=1e-3, atol=1e-7)
        assert score.scores()[path] == pytest.approx(0.4 * float(by_a[path].mean()), rel=1e-3)
        assert value.any()


def test_absolute_score_is_the_formula_of_the_paper() -> None:
    model = adapted(tiny_model("bert")).train()
    score = RankScore(decay=0.6, absolute=True)
    score.attach(model)
    assert hooks(model) == 0
    batch, expected = tiny_batch(model), {}
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        score.update(lambda tensor: tensor, 1)
        for path, value in explicit(model, "B", absolute=True).items():
            expected[path] = 0.6 * expected.get(path, 0) + 0.4 * value
    for path, value in score.state_dict().items():
        assert torch.allclose(value.double(), expected[path], rtol=1e-4)
        assert score.scores()[path] == pytest.approx(float(expected[path].mean()), rel=1e-4)
    signed = explicit(model, "B")
    assert all((explicit(model, "B", absolute=True)[path] >= signed[path] - 1e-9).all() for path in signed)


def test_absolute_score_of_an_adapter_without_gradient_is_0() -> None:
    model = adapted(tiny_model("bert"))
    score = RankScore(absolute=True)
    score.attach(model)
    score.update(lambda tensor: tensor, 1)
    assert set(score.scores().values()) == {0.0}


@pytest.mark.parametrize("absolute", [False, True])
def test_rank_score_averages_over_steps_and_starts_anew_when_attached(absolute: bool) -> None:
    model = adapted(tiny_model("distilbert")).train()
    score, batch = RankScore(decay=0.5, absolute=absolute), tiny_batch(model)
    score.attach(model)
    values = []
    for _ in range(3):
        model.zero_grad()
        model(**batch).loss.backward()
        score.update(lambda tensor: tensor, 1)
        values.append(score.scores())
    for path, first in values[0].items():  # the same step three times: v/2, 3v/4, 7v/8
        assert values[1][path] == pytest.approx(1.5 * first, rel=1e-4)
        assert values[2][path] == pytest.approx(1.75 * first, rel=1e-4)
    state = {key: value.clone() for key, value in score.state_dict().items()}
    score.attach(model)
    assert set(score.scores().values()) == {0.0} and hooks(model) == (0 if absolute else len(state))
    score.load_state_dict(state)
    assert score.scores() == values[2]
    score.detach()
    assert hooks(model) == 0 and score.scores() == {}
    score.update(lambda tensor: tensor, 1)


def test_signed_score_of_several_processes_is_that_of_the_mean_gradient() -> None:
    model = adapted(tiny_model("bert")).train()
    batch, flats, scores = tiny_batch(model), [], []
    for _ in range(2):
        for rows in (slice(0, 2), slice(2, 4)):
            score = RankScore()
            score.attach(model)
            model(**{key: value[rows] for key, value in batch.items()}).loss.backward()

            def collect(flat: torch.Tensor) -> torch.Tensor:
                flats.append(flat.clone())
                return flats[0] + flats[1] if len(flats) > 2 else flat

            score.update(collect, 2)
            scores.append(score.scores())
            score.detach()
    model.zero_grad()
    model(**batch).loss.backward()
    expected = explicit(model, "A")
    for path, value in scores[2].items():
        assert value == scores[3][path] == pytest.approx(0.15 * float(expected[path].mean()), rel=1e-3)


def test_rank_score_of_a_model_without_adapters_is_empty() -> None:
    score = RankScore()
    score.attach(tiny_model("bert"))
    score.update(lambda tensor: tensor, 1)
    assert score.scores() == {} and score.state_dict() == {}


# ---------------------------------------------------------------------- allocation

SIZES = [AdapterSize("a", 8, 100), AdapterSize("b", 8, 200), AdapterSize("c", 4, 100), AdapterSize("d", 2, 300)]
CURRENT = 8 * 100 + 8 * 200 + 4 * 100 + 2 * 300  # 3400
SALIENT = {"a": 0.1, "b": 4.0, "c": 0.3, "d": 2.0}


def test_fill_budget_gives_the_top_half_the_whole_increase() -> None:
    """b and d are on top, with 2200 parameters; 3400 more make the rate 1 + 3400 / 2200 = 2.545."""
    assert allocate(SIZES, SALIENT, 2 * CURRENT, 64) == {"b": 20, "d": 5}
    assert allocate(SIZES, SALIENT, CURRENT + 2200, 64) == {"b": 16, "d": 4}


def test_paper_rule_multiplies_the_top_half_by_the_budget() -> None:
    assert allocate(SIZES, SALIENT, 1.5 * CURRENT, 64, rule="paper") == {"b": 12, "d": 3}
    assert allocate(SIZES, SALIENT, 1.4 * CURRENT, 64, rule="paper") == {"b": 11}  # 2.8 is rounded down to 2


def test_uniform_growth_multiplies_all() -> None:
    for rule in ("fill_budget", "paper"):
        grown = allocate(SIZES, {}, 1.5 * CURRENT, 64, growth="uniform", rule=rule)
        assert grown == {"a": 12, "b": 12, "c": 6, "d": 3}


def test_no_growth() -> None:
    assert allocate(SIZES, SALIENT, 4 * CURRENT, 64, growth="none") == {}
    assert allocate([], {}, 100, 64) == {}


@pytest.mark.parametrize("budget", [0, CURRENT - 1, CURRENT])
@pytest.mark.parametrize("growth", ["salience", "uniform"])
@pytest.mark.parametrize("rule", ["fill_budget", "paper"])
def test_ranks_never_shrink(budget: float, growth: str, rule: str) -> None:
    assert allocate(SIZES, SALIENT, budget, 64, growth, rule) == {}


def test_full_adapters_leave_their_place_in_the_top_half() -> None:
    """b is at the largest rank: of the others the best ⌊4 / 2⌋ grow, by 1 + 1000 / (600 + 400) = 2; 8 is the most."""
    assert allocate(SIZES, SALIENT | {"a": 0.01}, CURRENT + 1000, 8) == {"d": 4, "c": 8}
    assert allocate(SIZES, SALIENT | {"a": 0.01}, CURRENT + 3000, 8) == {"d": 8, "c": 8}
    assert allocate(SIZES, SALIENT, 100 * CURRENT, 8) == {"c": 8, "d": 8}
    assert allocate([AdapterSize("a", 8, 100)], {"a": 1.0}, 10_000, 8) == {}


def test_a_single_adapter_grows() -> None:
    assert allocate([AdapterSize("a", 8, 100)], {"a": 0.0}, 1600, 64) == {"a": 16}


def test_an_odd_number_of_adapters_rounds_the_half_down() -> None:
    sizes = [AdapterSize(key, 4, 10) for key in "abcde"]
    assert set(allocate(sizes, dict(zip("abcde", (1, 5, 3, 4, 2), strict=True)), 400, 64)) == {"b", "d"}


@pytest.mark.parametrize(("rank", "extra"), [(3, 4), (6, 8), (9, 12), (11, 14), (13, 2)])
def test_an_increase_of_whole_ranks_is_not_lost_to_rounding(rank: int, extra: int) -> None:
    assert allocate([AdapterSize("a", rank, 777)], {"a": 1.0}, (rank + extra) * 777, 64) == {"a": rank + extra}


@pytest.mark.parametrize("rule", ["fill_budget", "paper"])
@pytest.mark.parametrize("growth", ["salience", "uniform"])
@pytest.mark.parametrize("seed", range(10))
def test_bounds_of_random_allocations(seed: int, growth: str, rule: str) -> None:
    drawn = generator(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=drawn))

    sizes = [AdapterSize(f"{i}", number(1, 60), number(20, 900)) for i in range(number(2, 15))]
    importance = {size.path: float(torch.rand((), generator=drawn)) for size in sizes}
    current = sum(size.parameters for size in sizes)
    budget = current * (1 + 3 * float(torch.rand((), generator=drawn)))
    grown = allocate(sizes, importance, budget, 64, growth, rule)
    by_path = {size.path: size for size in sizes}
    assert all(by_path[path].rank < rank <= 64 for path, rank in grown.items())
    total = sum(grown.get(size.path, size.rank) * size.width for size in sizes)
    assert total <= budget + 1e-6
    if growth == "salience":
        free = sorted((s for s in sizes if s.rank < 64), key=lambda s: -importance[s.path])
        top = {size.path for size in free[: max(1, len(sizes) // 2)]}
        assert set(grown) <= top
        if rule == "fill_budget" and 64 not in grown.values():
            # Only what rounding takes from each is left over.
            assert total > budget - sum(by_path[path].width for path in top)


def test_growth_to_the_budget_on_a_model() -> None:
    """From rank 3 to four times the parameters in two events, on a model: never above the budget, and close to it."""
    model = adapted(tiny_model("bert"))
    start = adapter_parameters(model)
    for share in (0.5, 1.0):
        budget = start * (1 + 3 * share)
        sizes = [
            AdapterSize(path, layer.r[ADAPTER], layer.in_features + layer.out_features)
            for path, layer in adapters(model)
        ]
        new = allocate(sizes, {size.path: float(sum(map(ord, size.path)) % 17) for size in sizes}, budget, 64)
        drawn, before = generator(), copy.deepcopy(ranks(model))
        for path, layer in adapters(model):
            if path in new:
                grow_rank(path, layer, new[path], drawn, EditLog())
        assert budget - 8 * (WIDTH + NEURONS) <= adapter_parameters(model) <= budget
        assert all(ranks(model)[path] >= rank for path, rank in before.items())
