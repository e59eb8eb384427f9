"""Soft masks: at zeros and ones they equal the cut, at ones nothing, and closed they leave no trace."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from tiny import (
    CASES,
    FAMILY_NAMES,
    HEAD_DIM,
    LAYERS,
    adapted,
    gap,
    hooks,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.models import HIDDEN, family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore, masked_norm
from apt_trainer.surgery.slicing import EditLog

EVERY_HEAD = tuple(f"layers.{i}.heads" for i in range(LAYERS))
EVERY_NEURON = tuple(f"layers.{i}.neurons" for i in range(LAYERS))
SCENARIOS = {
    "heads": (("heads",), ()),
    "neurons": (("neurons",), ()),
    "hidden": (("hidden",), ()),
    "all_kinds": (("heads", "neurons", "hidden"), ()),
    "attention_gone": ((), ("layers.1.heads",)),
    "mlp_gone": ((), ("layers.1.neurons",)),
    "layer_gone_and_hidden": (("hidden",), ("layers.1.heads", "layers.1.neurons")),
    "ends_gone_and_all_kinds": (("heads", "neurons", "hidden"), ("layers.0.heads", "layers.2.neurons")),
    "nothing_left": (("hidden",), EVERY_HEAD + EVERY_NEURON),
}


def open_store(model: PreTrainedModel, plan: PruningPlan, spaces: list) -> MaskStore:
    store = MaskStore(model, spaces, family_of(model.config).sublayers(model))
    store.open(plan.counts)
    return store


def masked_and_cut(model: PreTrainedModel, plan: PruningPlan, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions under binary masks, and after the cut; ``model`` holds no adapters or was adapted before."""
    family, spaces = family_of(model.config), _dense_spaces(model)
    dense = PruningPlan.dense(spaces)
    store = open_store(model, dense, spaces)
    store.move(dense.survivors(plan), 1.0)
    masked = logits(model, batch)
    store.close()
    apply_plan(model, family, spaces, dense, plan)
    return masked, logits(model, batch)


def _dense_spaces(model: PreTrainedModel) -> list:
    return family_of(model.config).spaces(model)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("name", "task"), CASES)
def test_binary_masks_equal_the_cut(name: str, task: str, scenario: str) -> None:
    kinds, vanish = SCENARIOS[scenario]
    model = tiny_model(name, task)
    _, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=11, kinds=kinds, vanish=vanish)
    assert plan != dense
    batch = tiny_batch(model)
    before = logits(model, batch)
    masked, after = masked_and_cut(model, plan, batch)
    assert gap(masked, after) <= 1e-5
    assert gap(before, after) > 1e-2


@pytest.mark.parametrize("scenario", ["all_kinds", "ends_gone_and_all_kinds"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_binary_masks_equal_the_cut_with_adapters(name: str, padded: bool, attention: str, scenario: str) -> None:
    kinds, vanish = SCENARIOS[scenario]
    model = adapted(tiny_model(name, "ForTokenClassification", attn_implementation=attention), everywhere=True)
    spaces = _dense_spaces(model)
    plan = random_plan(spaces, PruningPlan.dense(spaces), seed=12, kinds=kinds, vanish=vanish)
    masked, after = masked_and_cut(model, plan, tiny_batch(model, padded))
    assert gap(masked, after) <= 1e-5


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_masked_hidden_states_are_the_cut_ones_with_zeros_between(name: str) -> None:
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=13)
    batch = tiny_batch(model)
    store = open_store(model, dense, spaces)
    store.move(dense.survivors(plan), 1.0)
    with torch.no_grad():
        masked = model(**batch, output_hidden_states=True).hidden_states
        store.close()
        apply_plan(model, family, spaces, dense, plan)
        after = model(**batch, output_hidden_states=True).hidden_states
    live = list(plan.kept[HIDDEN])
    dead = [unit for unit in dense.kept[HIDDEN] if unit not in live]
    assert len(masked) == len(after) == LAYERS + 1 and dead
    for wide, narrow in zip(masked, after, strict=True):
        assert gap(wide[..., live], narrow) <= 1e-5
        assert not wide[..., dead].any()


@pytest.mark.parametrize("scenario", ["all_kinds", "ends_gone_and_all_kinds"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradients_under_binary_masks_equal_those_of_the_cut(name: str, scenario: str) -> None:
    kinds, vanish = SCENARIOS[scenario]
    model = tiny_model(name, "ForTokenClassification")
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=14, kinds=kinds, vanish=vanish)
    batch, log = tiny_batch(model), EditLog()
    small = copy.deepcopy(model)
    apply_plan(small, family, spaces, dense, plan, log)
    small(**batch).loss.backward()
    store = open_store(model, dense, spaces)
    store.move(dense.survivors(plan), 1.0)
    model(**batch).loss.backward()
    wide = dict(model.named_parameters())
    for key, parameter in small.named_parameters():
        if parameter.grad is None:
            continue
        gradient = wide[key].grad
        for edit in log.edits.get(key, []):
            gradient = gradient.index_select(edit.dim, edit.index)
        assert gap(gradient, parameter.grad) <= 1e-5, key


@pytest.mark.parametrize(("name", "task"), CASES)
def test_masks_of_ones_change_nothing_and_close_takes_every_hook_out(name: str, task: str) -> None:
    model = tiny_model(name, task)
    _, spaces, dense = parts(model)
    batch = tiny_batch(model)
    before, hooks_before = logits(model, batch), hooks(model)
    store = open_store(model, dense, spaces)
    assert store.is_open and {name: len(value) for name, value in store.values.items()} == dense.counts
    assert hooks(model) > hooks_before
    assert gap(logits(model, batch), before) <= 1e-5
    store.move(dense.survivors(random_plan(spaces, dense, seed=1)), 0.7)
    assert gap(logits(model, batch), before) > 1e-3
    store.close()
    assert not store.is_open and hooks(model) == hooks_before
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_reopening_hooks_once(name: str) -> None:
    model = tiny_model(name)
    _, spaces, dense = parts(model)
    store = open_store(model, dense, spaces)
    number = hooks(model)
    store.move({space.name: torch.tensor([0]) for space in spaces}, 1.0)
    store.open(dense.counts)
    assert hooks(model) == number
    assert all(bool((value == 1).all()) for value in store.values.values())


@pytest.mark.parametrize("kind", ["heads", "neurons", "hidden"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_masks_in_between_are_continuous(name: str, kind: str) -> None:
    """From on to off the predictions move smoothly: they end at the cut, and no small step makes a jump."""
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=15, kinds=(kind,))
    batch, steps = tiny_batch(model), 20
    store = open_store(model, dense, spaces)
    path = [logits(model, batch)]
    for _ in range(steps):
        store.move(dense.survivors(plan), 1 / steps)
        path.append(logits(model, batch))
    store.move(dense.survivors(plan), 1e-4)  # sums of 1/steps may end a rounding error above 0
    path.append(logits(model, batch))
    store.close()
    apply_plan(model, family, spaces, dense, plan)
    whole = gap(path[0], path[-1])
    jumps = [gap(a, b) for a, b in itertools.pairwise(path)]
    assert whole > 1e-2 and max(jumps) < 0.4 * whole
    assert gap(path[-1], logits(model, batch)) <= 1e-5


@pytest.mark.parametrize("kind", ["heads", "neurons", "hidden"])
@pytest.mark.parametrize("near", [0.0, 1.0])
def test_a_change_of_the_mask_shrinks_the_change_of_the_output(kind: str, near: float) -> None:
    """Near both ends a ten times smaller change of the mask changes the output about ten times less."""
    model = tiny_model("bert")
    _, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=15, kinds=(kind,))
    batch = tiny_batch(model)

    def at(value: float) -> torch.Tensor:
        store = open_store(model, dense, spaces)
        store.move(dense.survivors(plan), 1 - value)
        output = logits(model, batch)
        store.close()
        return output

    end, direction = at(near), 1 if near == 0 else -1
    large = gap(at(near + direction * 1e-2), end)
    small = gap(at(near + direction * 1e-3), end)
    assert 0 < small < 0.2 * large


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gates_multiply_the_channels_of_their_units(name: str) -> None:
    model = tiny_model(name)
    _, spaces, dense = parts(model)
    space = next(space for space in spaces if space.name == "layers.0.heads")
    seen = []
    gate = model.get_submodule(space.gate)
    before = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    store = open_store(model, dense, spaces)
    after = gate.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    store.move({space.name: torch.tensor([0, 2, 3])}, 0.25)
    logits(model, tiny_batch(model))
    before.remove(), after.remove()
    factor = torch.tensor([1.0, 0.75, 1.0, 1.0]).repeat_interleave(HEAD_DIM)
    assert torch.allclose(seen[1], seen[0] * factor, atol=1e-7)


def test_masks_move_by_steps_and_stay_within_bounds() -> None:
    model = tiny_model("bert")
    _, spaces, dense = parts(model)
    store = open_store(model, dense, spaces)
    kept = {"layers.0.heads": torch.tensor([1])}
    store.move(kept, 0.3)
    store.move(kept, 0.3)
    assert torch.allclose(store.values["layers.0.heads"], torch.tensor([0.4, 1.0, 0.4, 0.4]))
    store.move({"layers.0.heads": torch.tensor([0, 1])}, 0.3)  # a unit recovers
    assert torch.allclose(store.values["layers.0.heads"], torch.tensor([0.7, 1.0, 0.1, 0.1]))
    store.move({}, 0.5)  # a space that is not named keeps all
    assert torch.allclose(store.values["layers.0.heads"], torch.tensor([1.0, 1.0, 0.6, 0.6]))
    store.move(kept, 1.0)
    assert store.values["layers.0.heads"].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert store.values["layers.1.heads"].tolist() == [1.0] * 4


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_masks_survive_their_state_dict(name: str) -> None:
    model = tiny_model(name)
    _, spaces, dense = parts(model)
    batch = tiny_batch(model)
    store = open_store(model, dense, spaces)
    store.move(dense.survivors(random_plan(spaces, dense, seed=16)), 0.4)
    state, expected = {key: value.clone() for key, value in store.state_dict().items()}, logits(model, batch)
    store.close()
    again = MaskStore(model, spaces, family_of(model.config).sublayers(model))
    again.load_state_dict(state)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(again.values[key], value) for key, value in state.items())
    number = hooks(model)
    again.load_state_dict({})
    assert not again.is_open and hooks(model) < number and not MaskStore(model, spaces, []).state_dict()


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_later_window_on_a_model_that_was_cut(name: str, adapters: bool) -> None:
    """Two sublayers are gone already; masks act on what is left, and the next cut equals them."""
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    gone = ("layers.0.neurons", "layers.2.heads")
    first = random_plan(spaces, dense, seed=17, vanish=gone)
    second = random_plan(spaces, first, seed=18, vanish=(*gone, "layers.1.neurons"))
    if adapters:
        adapted(model, everywhere=True)
    apply_plan(model, family, spaces, dense, first)
    batch = tiny_batch(model)
    before, hooks_before = logits(model, batch), hooks(model)
    store = open_store(model, first, spaces)
    assert not set(gone) & set(store.values)
    assert gap(logits(model, batch), before) <= 1e-5
    store.move(first.survivors(second), 1.0)
    masked = logits(model, batch)
    store.close()
    assert hooks(model) == hooks_before
    apply_plan(model, family, spaces, first, second)
    assert gap(masked, logits(model, batch)) <= 1e-5


@pytest.mark.parametrize("kinds", [("hidden",), ("heads",), ("neurons",), ("heads", "hidden"), ("heads", "neurons")])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_only_the_kinds_of_a_window_fade(name: str, kinds: tuple[str, ...]) -> None:
    """Sublayers whose kind does not fade are still there, norms included."""
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, seed=19, kinds=kinds)
    batch = tiny_batch(model)
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts, kinds)
    assert set(store.values) == {space.name for space in spaces if space.kind in kinds}
    store.move(dense.survivors(plan), 1.0)
    masked, state = logits(model, batch), {key: value.clone() for key, value in store.state_dict().items()}
    store.load_state_dict(state)
    assert torch.equal(logits(model, batch), masked)
    store.close()
    apply_plan(model, family, spaces, dense, plan)
    assert gap(masked, logits(model, batch)) <= 1e-5


def test_masked_norm_by_hand() -> None:
    norm = nn.LayerNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
        norm.bias.copy_(torch.randn(6))
    x, live = torch.randn(2, 3, 6), [0, 2, 5]
    mask = torch.zeros(6)
    mask[live] = 1
    chosen = x[..., live]
    z = (chosen - chosen.mean(-1, keepdim=True)) / (chosen.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    expected = torch.zeros_like(x)
    expected[..., live] = z * norm.weight[live] + norm.bias[live]
    assert torch.allclose(masked_norm(norm, x, mask), expected, atol=1e-6)
    assert torch.allclose(masked_norm(norm, x, torch.ones(6)), norm(x), atol=1e-6)


def test_masked_rms_norm_by_hand() -> None:
    norm = nn.RMSNorm(6, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
    x, live = torch.randn(2, 3, 6), [0, 2, 5]
    mask = torch.zeros(6)
    mask[live] = 1
    chosen = x[..., live]
    expected = torch.zeros_like(x)
    expected[..., live] = chosen / (chosen.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight[live]
    assert torch.allclose(masked_norm(norm, x, mask), expected, atol=1e-6)
    assert torch.allclose(masked_norm(norm, x, torch.ones(6)), norm(x), atol=1e-6)
