"""Plans, slices and cuts: shapes, values, what stays tied, and what an optimizer is told."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import (
    CASES,
    FAMILY_NAMES,
    HEAD_DIM,
    LAYERS,
    WIDTH,
    adapted,
    gap,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.models import HIDDEN
from apt_trainer.models.modeling_apt import STUB_KINDS
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.cutting import apply_plan, removed_sublayers
from apt_trainer.surgery.slicing import EditLog, Grow, Keep, slice_module

VANISH = ("layers.0.heads", "layers.1.neurons")


def cut(model: PreTrainedModel, plan: PruningPlan, log: EditLog | None = None) -> PreTrainedModel:
    """Cut copy of a dense model."""
    copied = copy.deepcopy(model)
    family, spaces, dense = parts(model)
    apply_plan(copied, family, spaces, dense, plan, log)
    return copied


# ---------------------------------------------------------------------- plans


def plan_of(**kept: tuple[int, ...]) -> PruningPlan:
    return PruningPlan({name: tuple(units) for name, units in kept.items()})


def test_survivors_are_positions_in_the_current_plan() -> None:
    current, new = plan_of(a=(1, 4, 5, 9), b=(0, 2)), plan_of(a=(4, 9), b=(0, 2))
    survivors = current.survivors(new)
    assert list(survivors) == ["a"]
    assert survivors["a"].tolist() == [1, 3] and survivors["a"].dtype == torch.long


def test_survivors_of_a_space_that_vanishes_are_empty() -> None:
    survivors = plan_of(a=(1, 4)).survivors(plan_of(a=()))
    assert survivors["a"].tolist() == [] and survivors["a"].dtype == torch.long


def test_a_unit_that_is_gone_cannot_come_back() -> None:
    with pytest.raises(AssertionError, match="cannot come back"):
        plan_of(a=(1, 4)).survivors(plan_of(a=(1, 2)))


def test_narrowed_is_the_inverse_of_survivors_and_sorts() -> None:
    current = plan_of(a=(1, 4, 5, 9), b=(0, 2))
    assert current.narrowed({"a": torch.tensor([3, 0])}).kept == {"a": (1, 9), "b": (0, 2)}
    new = plan_of(a=(4, 5), b=())
    assert current.narrowed(current.survivors(new)) == new
    assert current.narrowed({}) == current


def test_survivors_compose() -> None:
    first, second, third = plan_of(a=tuple(range(8))), plan_of(a=(0, 2, 3, 6, 7)), plan_of(a=(2, 7))
    through = first.survivors(second)["a"][second.survivors(third)["a"]]
    assert torch.equal(through, first.survivors(third)["a"])


def test_plan_survives_json_and_its_digest_tells_plans_apart() -> None:
    plan = plan_of(a=(1, 4), b=())
    again = PruningPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and again.digest() == plan.digest() and again.counts == {"a": 2, "b": 0}
    assert plan_of(a=(1, 5), b=()).digest() != plan.digest()
    assert plan_of(b=(), a=(1, 4)).digest() == plan.digest()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kept": {"a": [0]}},
        {"format_version": 2, "kept": {"a": [0]}},
        {"format_version": 1},
        {"format_version": 1, "kept": ["a"]},
        {"format_version": 1, "kept": None},
        {"format_version": 1, "kept": {"a": 3}},
        {"format_version": 1, "kept": {"a": ["0"]}},
        {"format_version": 1, "kept": {"a": [0.5]}},
        {"format_version": 1, "kept": {"a": [-1]}},
        {"format_version": 1, "kept": {"a": [1, 0]}},
        {"format_version": 1, "kept": {"a": [1, 1]}},
        ["kept"],
    ],
    ids=json.dumps,
)
def test_damaged_plan_is_a_user_error(data: object) -> None:
    with pytest.raises(UserError, match="plan"):
        PruningPlan.from_json(data)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- modules


def test_slicing_a_linear_cuts_weight_bias_and_sizes() -> None:
    linear, log = nn.Linear(5, 4), EditLog()
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    slice_module(linear, "out", rows, "x", log)
    slice_module(linear, "in", columns, "x", log)
    assert torch.equal(linear.weight, weight[rows][:, columns]) and torch.equal(linear.bias, bias[rows])
    assert (linear.out_features, linear.in_features) == (2, 3)
    assert [edit.dim for edit in log.edits["x.weight"]] == [0, 1] and len(log.edits["x.bias"]) == 1


def test_slicing_a_transposed_linear() -> None:
    module = Conv1D(4, 5)  # 4 outputs, 5 inputs
    weight = module.weight.detach().clone()
    x, rows, columns = torch.randn(2, 5), torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    slice_module(module, "out", rows, "x", EditLog())
    slice_module(module, "in", columns, "x", EditLog())
    assert (module.nf, module.nx) == (2, 3)
    assert torch.allclose(module(x[:, columns]), x[:, columns] @ weight[columns][:, rows], atol=1e-6)


def test_slicing_norms_and_embeddings() -> None:
    index = torch.tensor([0, 2, 3])
    layer_norm, rms, embedding = nn.LayerNorm(5), nn.RMSNorm(5), nn.Embedding(7, 5)
    table = embedding.weight.detach().clone()
    for module in (layer_norm, rms, embedding):
        slice_module(module, "out", index, "x", EditLog())
    assert layer_norm(torch.randn(2, 3)).shape == (2, 3) and layer_norm.bias.shape == (3,)
    assert rms.weight.shape == (3,)
    assert torch.equal(embedding.weight, table[:, index]) and embedding.embedding_dim == 3


def test_unknown_module_type_is_refused() -> None:
    with pytest.raises(AssertionError, match="Conv1d cannot be sliced"):
        slice_module(nn.Conv1d(2, 2, 1), "out", torch.tensor([0]), "x", EditLog())
    with pytest.raises(AssertionError, match="only the channels that a convolution makes"):
        slice_module(nn.Conv2d(2, 2, 1), "in", torch.tensor([0]), "x", EditLog())


def test_cut_parameters_keep_requires_grad() -> None:
    linear = nn.Linear(3, 4)
    linear.weight.requires_grad_(False)
    slice_module(linear, "out", torch.tensor([1]), "x", EditLog())
    assert not linear.weight.requires_grad and linear.bias.requires_grad


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize("vanish", [(), VANISH], ids=["narrow", "vanish"])
@pytest.mark.parametrize(("name", "task"), CASES)
def test_shapes_and_attributes_follow_the_plan(name: str, task: str, vanish: tuple[str, ...]) -> None:
    model = adapted(tiny_model(name, task), everywhere=True)
    family, spaces, dense = parts(tiny_model(name, task))
    plan = random_plan(spaces, dense, seed=5, vanish=vanish)
    survivors = apply_plan(model, family, spaces, dense, plan)
    gone = {sub.space for sub in removed_sublayers(family.sublayers(model), plan)}
    assert gone == set(vanish)
    for space in spaces:
        for path, attribute, value in space.sizes(plan.kept[space.name]):
            assert getattr(model.get_submodule(path), attribute) == value
    present = dict(model.named_modules())
    for space in spaces:
        if space.name in gone:
            continue
        assert (space.name in survivors) == (plan.counts[space.name] < space.size)
        for part in space.slices:
            module = getattr(present.get(part.module), "base_layer", present.get(part.module))
            if not isinstance(module, nn.Linear):
                continue
            width = plan.counts[space.name] * sum(part.parts)
            dim = 0 if part.side == "out" else 1
            assert module.weight.shape[dim] == width
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    for sub in family.sublayers(model):
        for stub in sub.stubs:
            assert (type(model.get_submodule(stub.module)) in STUB_KINDS) == (sub.space in gone)
    assert torch.isfinite(logits(model, tiny_batch(model))).all()


@pytest.mark.parametrize(("name", "task"), CASES)
def test_cut_heads_and_neurons_equal_zeroed_output_columns(name: str, task: str) -> None:
    """An independent reference: the output projections of a dense model ignore the units that go."""
    model = tiny_model(name, task)
    _, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=6, kinds=("heads", "neurons"))
    reference = copy.deepcopy(model)
    for space in spaces[:-1]:
        lost = torch.tensor(sorted(set(range(space.size)) - set(plan.kept[space.name])), dtype=torch.long)
        columns = (lost[:, None] * space.channels + torch.arange(space.channels)).reshape(-1)
        with torch.no_grad():
            reference.get_submodule(space.gate).weight[:, columns] = 0
    batch = tiny_batch(model)
    assert gap(logits(cut(model, plan), batch), logits(reference, batch)) <= 1e-5


@pytest.mark.parametrize(("name", "task"), CASES)
def test_cut_in_steps_equals_cut_at_once(name: str, task: str) -> None:
    """Shrinking first, then two sublayers vanish, then more of what is left: bit-equal parameters and predictions."""
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    stages = [random_plan(spaces, dense, seed=7)]
    stages.append(random_plan(spaces, stages[0], seed=8, vanish=VANISH))
    stages.append(random_plan(spaces, stages[1], seed=9, vanish=VANISH))
    adapted(model, everywhere=True)
    at_once, in_steps = copy.deepcopy(model), copy.deepcopy(model)
    apply_plan(at_once, family, spaces, dense, stages[-1])
    current = dense
    for plan in stages:
        apply_plan(in_steps, family, spaces, current, plan)
        current = plan
    expected = at_once.state_dict()
    assert in_steps.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in in_steps.state_dict().items())
    batch = tiny_batch(model)
    assert torch.equal(logits(in_steps, batch), logits(at_once, batch))


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForMaskedLM"])
def test_edits_replayed_on_the_old_tensors_give_the_new_ones(name: str, task: str) -> None:
    model = adapted(tiny_model(name, task))
    old = {key: value.detach().clone() for key, value in model.named_parameters()}
    family, spaces, dense = parts(tiny_model(name, task))
    log = EditLog()
    middle = random_plan(spaces, dense, seed=7)
    apply_plan(model, family, spaces, dense, middle, log)
    apply_plan(model, family, spaces, middle, random_plan(spaces, middle, seed=8, vanish=VANISH), log)
    for key, parameter in model.named_parameters():
        value = old[key]
        for edit in log.edits.get(key, []):
            assert isinstance(edit, Keep)
            value = value.index_select(edit.dim, edit.index)
        assert torch.equal(value, parameter), key


def test_a_cut_leaves_the_old_tensors_alone() -> None:
    """A teacher may share them."""
    model = tiny_model("bert")
    shared = dict(model.named_parameters())
    before = {key: value.detach().clone() for key, value in shared.items()}
    family, spaces, dense = parts(model)
    apply_plan(model, family, spaces, dense, random_plan(spaces, dense, seed=4))
    assert all(torch.equal(shared[key], before[key]) for key in shared)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_tied_embeddings_stay_tied(name: str) -> None:
    model = tiny_model(name, "ForMaskedLM")
    family, spaces, dense = parts(model)
    middle = random_plan(spaces, dense, seed=1, kinds=("hidden",))
    final = random_plan(spaces, middle, seed=2)
    apply_plan(model, family, spaces, dense, middle)
    apply_plan(model, family, spaces, middle, final)
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert output.weight is table.weight
    assert output.bias is dict(model.named_parameters(remove_duplicate=False))[_bias_of_decoder(model)]
    assert table.weight.shape == (table.num_embeddings, final.counts[HIDDEN])
    untied = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False))
    assert untied - count_parameters(model) == table.weight.numel() + _tied_bias(model)


def _bias_of_decoder(model: nn.Module) -> str:
    return next(path for path, m in model.named_modules() if m is model.get_output_embeddings()) + ".bias"


def _tied_bias(model: nn.Module) -> int:
    """Entries of an output bias that a second name points at."""
    bias = model.get_output_embeddings().bias
    names = [key for key, p in model.named_parameters(remove_duplicate=False) if p is bias]
    return (len(names) - 1) * bias.numel()


@pytest.mark.parametrize(("name", "task"), CASES)
def test_cut_on_the_meta_device_gives_the_same_shapes(name: str, task: str) -> None:
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=3, vanish=VANISH)
    with torch.device("meta"):
        meta = type(model)(model.config)
    apply_plan(meta, family, spaces, dense, plan)
    real = {key: p.shape for key, p in cut(model, plan).named_parameters()}
    assert {key: p.shape for key, p in meta.named_parameters()} == real
    assert all(p.is_meta for p in meta.parameters())


def test_an_unchanged_plan_changes_nothing() -> None:
    model = tiny_model("distilbert")
    family, spaces, dense = parts(model)
    before, log = dict(model.named_parameters()), EditLog()
    assert apply_plan(model, family, spaces, dense, dense, log) == {}
    assert not log.edits and all(value is before[key] for key, value in model.named_parameters())


def test_survivors_of_the_hidden_space() -> None:
    model = tiny_model("bert")
    family, spaces, dense = parts(model)
    kept = dict(dense.kept) | {HIDDEN: tuple(range(0, WIDTH, 2))}
    survivors = apply_plan(model, family, spaces, dense, PruningPlan(kept))
    assert survivors[HIDDEN].tolist() == list(range(0, WIDTH, 2))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_adapters_lose_columns_of_a_and_rows_of_b(name: str) -> None:
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    adapted(model)
    reads = next(iter(family.stacks[0].sublayers[0].reads))
    path = f"{family.layer_paths(model)[1]}.{reads}"
    layer = model.get_submodule(path)
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    kept = dict(dense.kept) | {HIDDEN: (0, 3, 5, 6, 7, 9, 12), "layers.1.heads": (1, 3)}
    log = EditLog()
    apply_plan(model, family, spaces, dense, PruningPlan(kept), log)
    rows = [unit * HEAD_DIM + k for unit in (1, 3) for k in range(HEAD_DIM)]
    assert torch.equal(layer.lora_A["default"].weight, a[:, list(kept[HIDDEN])])
    assert torch.equal(layer.lora_B["default"].weight, b[rows])
    assert (layer.in_features, layer.out_features) == (7, 8)
    assert [edit.dim for edit in log.edits[f"{path}.lora_A.default.weight"]] == [1]
    assert [edit.dim for edit in log.edits[f"{path}.lora_B.default.weight"]] == [0]
    assert len(family.layer_paths(model)) == LAYERS


def test_growth_is_logged_beside_cuts() -> None:
    log = EditLog()
    log.grow("x.lora_A.default.weight", 0, 4)
    assert log.edits["x.lora_A.default.weight"] == [Grow(0, 4)]
