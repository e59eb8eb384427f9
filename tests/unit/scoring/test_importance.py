"""Scoring rules against their formulas, written out from captured tensors."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from scipy import stats
from test_taps import observe_by_hand
from tiny import (
    FAMILY_NAMES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NEURONS,
    WIDTH,
    adapted,
    hooks,
    parts,
    random_plan,
    tiny_batch,
    tiny_model,
)
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.models import HIDDEN, Space
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring import IMPORTANCES, Importance, make_importance
from apt_trainer.scoring.cosine import Cosine
from apt_trainer.scoring.kurtosis import contributions, root_kurtosis
from apt_trainer.scoring.magnitude import Magnitude
from apt_trainer.scoring.nri import Nri
from apt_trainer.scoring.random import Random
from apt_trainer.scoring.salience import OUTLIER_EVERY, Salience
from apt_trainer.scoring.taylor import Taylor
from apt_trainer.settings import CHOICES, MethodSettings, PruningSettings
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.tuning import set_trainable

VANISH = ("layers.0.heads", "layers.1.neurons")


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def places_of(space: Space) -> list[tuple[str, str]]:
    return [(space.gate, "input")] if space.gate else [(path, "output") for path in space.places]


def steps_of(model: PreTrainedModel, number: int) -> list[dict[str, torch.Tensor]]:
    """Different batches."""
    batches = []
    for step in range(number):
        batch = tiny_batch(model)
        real = batch["attention_mask"].bool()
        batch["input_ids"] = torch.where(real, (batch["input_ids"] + 3 * step) % 30 + 5, batch["input_ids"])
        batches.append(batch)
    return batches


def train(model: PreTrainedModel, rule: Importance, batches: list, scale: float = 1.0, masked: bool = True) -> None:
    for batch in batches:
        rule.set_tokens(batch["attention_mask"] if masked else None)
        (model(**batch).loss * scale).backward()
        rule.update(identity, 1)


def step_score(seen: Mapping, places: list[tuple[str, str]], units: int, mask: torch.Tensor) -> torch.Tensor:
    """Σ over places and channels of Σ|x| · Σ|g|."""
    total = torch.zeros(units)
    for place in places:
        x, g = seen[place]
        magnitude = torch.einsum("bt,btn->n", mask.float(), x.abs())
        gradient = torch.einsum("bt,btn->n", mask.float(), g.abs())
        total += (magnitude * gradient).view(units, -1).sum(1)
    return total


def assert_close(scores: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], rtol: float = 1e-4) -> None:
    assert set(scores) == set(expected)
    for name, value in scores.items():
        assert torch.allclose(value, expected[name], rtol=rtol, atol=1e-7), name


# ---------------------------------------------------------------------- salience


@pytest.mark.parametrize("trained", ["all", "adapters"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_salience_is_the_moving_average_of_sums_of_magnitudes(name: str, trained: str) -> None:
    model, decay = tiny_model(name).train(), 0.7
    family, spaces, dense = parts(model)
    if trained == "adapters":
        adapted(model)
        set_trainable(model, family, "adapters", MethodSettings(), ())
    batches = steps_of(model, 3)
    places = [place for space in spaces for place in places_of(space)]
    expected = {space.name: torch.zeros(space.size) for space in spaces}
    for batch in batches:
        seen = observe_by_hand(model, batch, places)
        for space in spaces:
            now = step_score(seen, places_of(space), space.size, batch["attention_mask"])
            expected[space.name] = decay * expected[space.name] + (1 - decay) * now
    rule = Salience(decay, outlier_term=False)
    rule.attach(model, spaces, dense.counts)
    train(model, rule, batches)
    scores = rule.scores(model)
    assert_close(scores, expected)
    assert all(value.shape == (dense.counts[key],) and (value > 0).all() for key, value in scores.items())


def test_salience_of_micro_batches_is_that_of_the_whole_batch() -> None:
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    batch, results = tiny_batch(model), []
    for size in (4, 1):
        rule = Salience(outlier_term=False)
        rule.attach(model, spaces, dense.counts)
        for start in range(0, 4, size):
            micro = {key: value[start : start + size] for key, value in batch.items()}
            rule.set_tokens(micro["attention_mask"])
            (model(**micro).loss * size / 4).backward()
        rule.update(identity, 1)
        results.append(rule.scores(model))
        rule.detach()
    assert_close(*results)


def test_salience_of_several_processes_is_that_of_their_whole_batch() -> None:
    """Each process has its share of the batch and the gradient of its own mean loss."""
    model = tiny_model("roberta").train()
    _, spaces, dense = parts(model)
    batch = tiny_batch(model)
    whole = Salience(outlier_scaling="none")
    whole.attach(model, spaces, dense.counts)
    train(model, whole, [batch])
    expected = whole.scores(model)
    whole.detach()
    halves = []
    for start in (0, 2):
        rule = Salience(outlier_scaling="none")
        rule.attach(model, spaces, dense.counts)
        part = {key: value[start : start + 2] for key, value in batch.items()}
        rule.set_tokens(part["attention_mask"])
        model(**part).loss.backward()
        rule.detach()
        halves.append(rule)
    total = halves[0]._flat + halves[1]._flat
    for rule in halves:
        rule.update(lambda tensor: total, 2)
        assert_close(rule.scores(model), expected)


def test_only_the_spaces_that_were_asked_for_are_scored() -> None:
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    for kinds in (("heads",), ("neurons", "hidden"), ("hidden",)):
        rule, before = Salience(), hooks(model)
        chosen = [space for space in spaces if space.kind in kinds]
        rule.attach(model, chosen, dense.counts)
        assert hooks(model) - before == sum(len(places_of(space)) for space in chosen)
        train(model, rule, steps_of(model, 1))
        assert set(rule.scores(model)) == {space.name for space in chosen}
        rule.detach()
        assert hooks(model) == before


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_salience_follows_a_cut_and_goes_on(name: str) -> None:
    model, decay = tiny_model(name).train(), 0.6
    family, spaces, dense = parts(model)
    rule = Salience(decay, outlier_term=False)
    rule.attach(model, spaces, dense.counts)
    train(model, rule, steps_of(model, 2))
    before = {key: value.clone() for key, value in rule.scores(model).items()}
    plan = random_plan(spaces, dense, seed=30, vanish=VANISH)
    rule.detach()
    survivors = apply_plan(model, family, spaces, dense, plan)
    batch = steps_of(model, 1)[0]
    left = [space for space in spaces if plan.counts[space.name]]
    present = {path for path, module in model.named_modules() if hasattr(module, "weight")}
    places = {space.name: [place for place in places_of(space) if place[0] in present] for space in left}
    seen = observe_by_hand(model, batch, [place for of_space in places.values() for place in of_space])
    rule.follow(survivors)
    rule.attach(model, spaces, plan.counts)
    expected = {key: value[list(plan.kept[key])] for key, value in before.items() if plan.kept[key]}
    assert_close(rule.scores(model), expected, rtol=0)
    assert not set(VANISH) & set(expected)
    train(model, rule, [batch])  # one more step, on the cut model
    for key in expected:
        now = step_score(seen, places[key], plan.counts[key], batch["attention_mask"])
        expected[key] = decay * expected[key] + (1 - decay) * now
    assert_close(rule.scores(model), expected)
    second = random_plan(spaces, plan, seed=31, vanish=(*VANISH, "layers.2.heads"))
    rule.detach()
    scores = rule.scores(model)
    rule.follow(apply_plan(model, family, spaces, plan, second))
    rule.attach(model, spaces, second.counts)
    positions = plan.survivors(second)
    for key, value in rule.scores(model).items():
        assert torch.equal(value, scores[key][positions[key]] if key in positions else scores[key])


@pytest.mark.parametrize("scaling", ["none", "mean"])
def test_outlier_term_after_a_cut_is_that_of_the_cut_model(scaling: str) -> None:
    """Mean inputs follow with their channels, so units that stay keep their term unless hidden dimensions went."""
    model = tiny_model("bert").train()
    family, spaces, dense = parts(model)
    rule = Salience(outlier_scaling=scaling)
    rule.attach(model, spaces, dense.counts)
    train(model, rule, steps_of(model, 2), scale=0.0 if scaling == "none" else 1.0)
    before = {key: value.clone() for key, value in rule.scores(model).items()}
    plan = random_plan(spaces, dense, seed=32, kinds=("heads", "neurons"))
    rule.detach()
    rule.follow(apply_plan(model, family, spaces, dense, plan))
    rule.attach(model, spaces, plan.counts)
    after = rule.scores(model)
    assert set(after) == set(plan.counts)
    if scaling == "none":
        for space in spaces[:-1]:
            assert before[space.name].any()
            assert torch.allclose(after[space.name], before[space.name][list(plan.kept[space.name])], atol=1e-5)


def test_salience_survives_its_state_dict() -> None:
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    batches = steps_of(model, 4)
    rule = Salience()
    rule.attach(model, spaces, dense.counts)
    train(model, rule, batches[:2])
    expected_now = rule.scores(model)
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    train(model, rule, batches[2:])
    expected_later = rule.scores(model)
    rule.detach()
    again = Salience()
    again.attach(model, spaces, dense.counts)
    again.load_state_dict(state)
    assert_close(again.scores(model), expected_now, rtol=0)
    train(model, again, batches[2:])
    assert_close(again.scores(model), expected_later, rtol=0)
    assert all(torch.equal(value, rule.state_dict()[key]) for key, value in again.state_dict().items())


# ---------------------------------------------------------------------- outlier term


def reference_kurtosis(values: torch.Tensor) -> torch.Tensor:
    """√max(mean z⁴ − 3, 0) with z by the unbiased deviation."""
    z = stats.zscore(values.double().numpy(), axis=-1, ddof=1)
    return torch.as_tensor((z**4).mean(-1) - 3).clamp_min(0).sqrt()


def test_root_kurtosis_is_that_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 50, generator=generator)
    values[0, 3], values[1, 7] = 9.0, -14.0
    n = values.shape[-1]
    # scipy divides by the biased variance; the unbiased one is n / (n − 1) times larger.
    biased = torch.as_tensor(stats.kurtosis(values.double().numpy(), axis=-1, fisher=True, bias=True))
    expected = ((biased + 3) * ((n - 1) / n) ** 2 - 3).clamp_min(0).sqrt()
    assert torch.allclose(root_kurtosis(values).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(reference_kurtosis(values), expected, rtol=1e-9)
    assert expected[0] > 2 and expected[1] > 3 and (expected[2:] == 0).any()
    assert root_kurtosis(values).dtype == torch.float32 and root_kurtosis(values.view(2, 3, n)).shape == (2, 3)


def test_root_kurtosis_of_constant_or_even_rows_is_0() -> None:
    assert root_kurtosis(torch.full((2, 8), 3.3)).tolist() == [0.0, 0.0]
    assert root_kurtosis(torch.linspace(-1, 1, 9)).item() == 0.0  # flatter than a normal distribution
    assert root_kurtosis(torch.zeros(3, 1)).tolist() == [0.0] * 3


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1.0, 1e4, -5.0])
def test_root_kurtosis_does_not_depend_on_the_scale(factor: float) -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(1))
    values[0] = 10
    assert root_kurtosis(values * factor).item() == pytest.approx(root_kurtosis(values).item(), rel=1e-3)


def test_contributions_with_and_without_an_adapter() -> None:
    model = adapted(tiny_model("bert"), everywhere=True)
    layer = model.get_submodule("bert.encoder.layer.0.attention.output.dense")
    mean = torch.randn(WIDTH)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = layer.base_layer.weight + layer.scaling["default"] * b @ a
    assert torch.allclose(contributions(layer, mean), weight * mean, atol=1e-5)
    assert torch.equal(contributions(layer.base_layer, mean), layer.base_layer.weight * mean)
    assert not contributions(layer, mean).requires_grad


def outlier_terms(
    model: PreTrainedModel, spaces: list[Space], dense: PruningPlan, batches: list, decay: float = 0.85
) -> dict[str, torch.Tensor]:
    """The outlier term alone: a loss of 0 has no gradients, so that the salience it is added to is 0."""
    rule = Salience(decay, outlier_scaling="none")
    rule.attach(model, spaces, dense.counts)
    train(model, rule, batches, scale=0.0)
    rule.detach()
    return rule.scores(model)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_outlier_term_by_its_formula(name: str) -> None:
    """T[i, j] = x̄[j]·W[i, j]: over a head's columns, a neuron's column, a dimension's row."""
    model, decay = tiny_model(name).train(), 0.5
    _, spaces, dense = parts(model)
    batches = steps_of(model, 2)
    places = [(space.gate, "input") for space in spaces[:-1]]
    means = {place: 0.0 for place in places}
    for batch in batches:
        seen = observe_by_hand(model, batch, places)
        for place in places:
            total = torch.einsum("bt,btn->n", batch["attention_mask"].float(), seen[place][0])
            means[place] = decay * means[place] + (1 - decay) * total
    terms = outlier_terms(model, spaces, dense, batches, decay)
    hidden = torch.zeros(WIDTH, dtype=torch.double)
    for space in spaces[:-1]:
        table = (model.get_submodule(space.gate).weight * means[space.gate, "input"]).detach()
        units = torch.stack(
            [table[:, u * space.channels : (u + 1) * space.channels].flatten() for u in range(space.size)]
        )
        assert torch.allclose(terms[space.name].double(), reference_kurtosis(units), rtol=1e-3, atol=1e-3)
        hidden += reference_kurtosis(table)
    assert torch.allclose(terms[HIDDEN].double(), hidden, rtol=1e-3, atol=1e-3)
    assert hidden.max() > 0.5


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_scores_are_salience_plus_outlier_term(name: str) -> None:
    model = tiny_model(name).train()
    _, spaces, dense = parts(model)
    batches = steps_of(model, 2)
    terms, scores = outlier_terms(model, spaces, dense, batches), []
    for outlier_term in (True, False):
        rule = Salience(outlier_term=outlier_term, outlier_scaling="none")
        rule.attach(model, spaces, dense.counts)
        train(model, rule, batches)
        scores.append(rule.scores(model))
        rule.detach()
    assert_close(scores[0], {key: scores[1][key] + terms[key] for key in terms})


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_outlier_term_of_a_head_is_its_own(name: str) -> None:
    """An outlier in the columns of one head raises the term of that head and of no other."""
    model = tiny_model(name).train()
    _, spaces, dense = parts(model)
    space = next(space for space in spaces if space.name == "layers.1.heads")
    batches = steps_of(model, 2)
    before = outlier_terms(model, spaces, dense, batches)
    for head in range(HEADS):
        weight = model.get_submodule(space.gate).weight
        columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight[3, columns] = 10.0
        after = outlier_terms(model, spaces, dense, batches)
        with torch.no_grad():
            weight.copy_(kept)
        assert after[space.name][head] > before[space.name][head] + 0.5
        others = [other for other in range(HEADS) if other != head]
        assert torch.equal(after[space.name][others], before[space.name][others])


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_outlier_term_of_a_neuron_is_the_kurtosis_of_its_weight_column(name: str) -> None:
    model = tiny_model(name).train()
    _, spaces, dense = parts(model)
    terms = outlier_terms(model, spaces, dense, steps_of(model, 2))
    for space in (space for space in spaces if space.kind == "neurons"):
        columns = model.get_submodule(space.gate).weight.detach().t()
        assert torch.allclose(terms[space.name].double(), reference_kurtosis(columns), rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("scale", [1e-3, 100.0])
def test_mean_scaling_does_not_depend_on_the_scale_of_the_loss(scale: float) -> None:
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    results = []
    for factor in (1.0, scale):
        rule = Salience(outlier_scaling="mean", outlier_weight=0.3)
        rule.attach(model, spaces, dense.counts)
        train(model, rule, steps_of(model, 2), factor)
        results.append(rule.scores(model))
        rule.detach()
    assert_close({key: value / scale for key, value in results[1].items()}, results[0], rtol=1e-3)


def test_mean_scaling_by_its_formula() -> None:
    """Per kind the added term has the shape of the outlier term, and outlier_weight times the mean of the salience."""
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    batches, scores = steps_of(model, 2), []
    for outlier_term in (True, False):
        rule = Salience(outlier_term=outlier_term, outlier_scaling="mean", outlier_weight=0.3)
        rule.attach(model, spaces, dense.counts)
        train(model, rule, batches)
        scores.append(rule.scores(model))
        rule.detach()
    terms = outlier_terms(model, spaces, dense, batches)
    for kind in ("heads", "neurons", "hidden"):
        names = [space.name for space in spaces if space.kind == kind]
        both, salience, term = (torch.cat([values[key] for key in names]) for values in (*scores, terms))
        expected = salience + 0.3 * salience.mean() * term / term.mean()
        assert torch.allclose(both, expected, rtol=1e-4)


def test_outlier_term_is_computed_anew_after_some_steps() -> None:
    model = tiny_model("bert", layers=1).train()
    _, spaces, dense = parts(model)
    rule = Salience(outlier_scaling="none")
    rule.attach(model, spaces, dense.counts)
    batches = steps_of(model, 1)
    train(model, rule, batches, scale=0.0)
    first = rule.scores(model)
    with torch.no_grad():
        model.get_submodule(spaces[1].gate).weight[0] += 5.0  # the last linear of the layer: inputs stay the same
    train(model, rule, batches * (OUTLIER_EVERY - 1), scale=0.0)
    assert_close(rule.scores(model), first, rtol=0)
    train(model, rule, batches, scale=0.0)
    anew = rule.scores(model)
    assert_close(anew, outlier_terms(model, spaces, dense, batches), rtol=1e-3)
    assert (anew["layers.0.neurons"] > first["layers.0.neurons"] + 0.5).all()


# ---------------------------------------------------------------------- baselines


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_taylor_is_the_change_of_the_loss_per_sequence(name: str) -> None:
    model, decay = tiny_model(name).train(), 0.6
    _, spaces, dense = parts(model)
    batches = steps_of(model, 3)
    places = [place for space in spaces for place in places_of(space)]
    expected = {space.name: torch.zeros(space.size) for space in spaces}
    for batch in batches:
        seen = observe_by_hand(model, batch, places)
        for space in spaces:
            now = torch.zeros(space.size)
            for place in places_of(space):
                x, g = seen[place]
                product = (x * g).view(*x.shape[:2], space.size, space.channels)
                now += product.sum((1, 3)).abs().sum(0)
            expected[space.name] = decay * expected[space.name] + (1 - decay) * now
    rule = Taylor(decay)
    rule.attach(model, spaces, dense.counts)
    train(model, rule, batches)
    assert_close(rule.scores(model), expected, rtol=1e-3)
    state = {key: value.clone() for key, value in rule.state_dict().items()}
    rule.detach()
    assert hooks(model) == 0
    again = Taylor(decay)
    again.attach(model, spaces, dense.counts)
    again.load_state_dict(state)
    assert_close(again.scores(model), rule.scores(model), rtol=0)


def test_taylor_follows_a_cut() -> None:
    model = tiny_model("distilbert").train()
    family, spaces, dense = parts(model)
    rule = Taylor()
    rule.attach(model, spaces, dense.counts)
    train(model, rule, steps_of(model, 1))
    before = rule.scores(model)
    plan = random_plan(spaces, dense, seed=33, vanish=VANISH)
    rule.detach()
    rule.follow(apply_plan(model, family, spaces, dense, plan))
    rule.attach(model, spaces, plan.counts)
    expected = {key: value[list(plan.kept[key])] for key, value in before.items() if plan.kept[key]}
    assert_close(rule.scores(model), expected, rtol=0)
    train(model, rule, steps_of(model, 1))
    assert all((value > 0).all() for value in rule.scores(model).values())


def norm_by_hand(model: PreTrainedModel, space: Space, unit: int) -> float:
    """√Σ of the squared weights (biases aside, adapters merged) that belong to one unit."""
    total = 0.0
    for part in space.slices:
        module = model.get_submodule(part.module)
        plain = getattr(module, "base_layer", module)
        weight = plain.weight.detach()
        if plain is not module:
            weight = weight + module.get_delta_weight("default").detach()
        if weight.dim() == 1:
            chosen = weight[unit]
        elif isinstance(plain, nn.Embedding):
            chosen = weight[:, unit]
        else:
            rows = slice(unit * space.channels, (unit + 1) * space.channels)
            chosen = weight[rows] if part.side == "out" else weight[:, rows]
        total += float(chosen.double().square().sum())
    return total**0.5


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_magnitude_is_the_norm_of_all_weights_of_a_unit(name: str, adapters: bool) -> None:
    model = tiny_model(name)
    _, spaces, dense = parts(model)
    if adapters:
        adapted(model, everywhere=True)
    rule = Magnitude()
    rule.attach(model, spaces, dense.counts)
    scores = rule.scores(model)
    for space in spaces:
        by_hand = torch.tensor([norm_by_hand(model, space, unit) for unit in range(space.size)])
        assert torch.allclose(scores[space.name], by_hand, rtol=1e-4)
    assert {key: len(value) for key, value in scores.items()} == {
        **{f"layers.{i}.heads": HEADS for i in range(LAYERS)},
        **{f"layers.{i}.neurons": NEURONS for i in range(LAYERS)},
        HIDDEN: WIDTH,
    }


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_magnitude_of_a_cut_model(name: str) -> None:
    model = tiny_model(name)
    family, spaces, dense = parts(model)
    before = Magnitude()
    before.attach(model, spaces, dense.counts)
    dense_scores = before.scores(model)
    plan = random_plan(spaces, dense, seed=34, kinds=("heads", "neurons"), vanish=VANISH)
    apply_plan(model, family, spaces, dense, plan)
    rule = Magnitude()
    rule.follow({})
    rule.attach(model, spaces, plan.counts)
    scores = rule.scores(model)
    assert set(scores) == {key for key, units in plan.kept.items() if units}
    for key, value in scores.items():
        if key != HIDDEN:  # hidden dimensions lose what was cut from the layers
            assert torch.allclose(value, dense_scores[key][list(plan.kept[key])], rtol=1e-5)
    assert (scores[HIDDEN] < dense_scores[HIDDEN]).all()


def test_random_scores_are_stable_over_cuts_and_differ_between_seeds() -> None:
    model = tiny_model("bert")
    family, spaces, dense = parts(model)
    rule, same, other = Random(1), Random(1), Random(2)
    for each in (rule, same, other):
        each.attach(model, spaces, dense.counts)
    first = {key: value.clone() for key, value in rule.scores(model).items()}
    assert_close(same.scores(model), first, rtol=0)
    assert not torch.equal(other.scores(model)[HIDDEN], first[HIDDEN])
    assert all(((value >= 0) & (value < 1)).all() for value in first.values()) and rule.densities
    rule.update(identity, 1)
    rule.attach(model, spaces, dense.counts)
    assert_close(rule.scores(model), first, rtol=0)
    plan = random_plan(spaces, dense, seed=35, vanish=VANISH)
    survivors = apply_plan(model, family, spaces, dense, plan)
    rule.follow(survivors)
    rule.attach(model, spaces, plan.counts)
    left = {key: value for key, value in rule.scores(model).items() if len(value)}
    assert_close(left, {key: value[list(plan.kept[key])] for key, value in first.items() if plan.kept[key]}, rtol=0)
    again = Random(7)
    again.load_state_dict(rule.state_dict())
    again.attach(model, spaces, plan.counts)
    assert_close(again.scores(model), rule.scores(model), rtol=0)


def test_random_scores_need_no_training_and_hook_nothing() -> None:
    model = tiny_model("bert")
    _, spaces, dense = parts(model)
    for rule in (Random(0), Magnitude()):
        rule.attach(model, spaces, dense.counts)
        assert hooks(model) == 0 and set(rule.scores(model)) == set(dense.counts)
        rule.detach()


RULES = {"salience": Salience, "magnitude": Magnitude, "taylor": Taylor, "random": Random, "cosine": Cosine}


def test_every_choice_makes_its_rule() -> None:
    assert set(IMPORTANCES) == set(CHOICES["importance"]) == {*RULES, "nri"}
    rule = make_importance(PruningSettings(importance="nri", nri_cost="memory"), seed=3)
    assert isinstance(rule, Nri) and rule.cost == "memory" and rule.scored == "cut" and not rule.densities


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_made_from_settings(name: str) -> None:
    settings = PruningSettings(importance=name, salience_decay=0.5, preset_overrides={"outlier_weight": 0.7})
    rule = make_importance(settings, seed=3)
    assert isinstance(rule, RULES[name])
    assert rule.scored == ("weights" if name in ("magnitude", "random") else "steps")
    assert rule.decay == 0.5 or rule.scored == "weights"
    assert getattr(rule, "outlier_weight", 0.7) == 0.7
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    rule.attach(model, spaces, dense.counts)
    train(model, rule, steps_of(model, 1))
    scores = rule.scores(model)
    assert {key: len(value) for key, value in scores.items()} == dense.counts
    assert all(torch.isfinite(value).all() and (value.std() > 0 or name == "cosine") for value in scores.values())


def test_scores_stay_finite_before_the_first_step() -> None:
    """All averages are 0 then; the mean scaling must not divide by it."""
    model = tiny_model("bert").train()
    _, spaces, dense = parts(model)
    rule = Salience(outlier_scaling="mean")
    rule.attach(model, spaces, dense.counts)
    assert all(torch.isfinite(value).all() for value in rule.scores(model).values())
