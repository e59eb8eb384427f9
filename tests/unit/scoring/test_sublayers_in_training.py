"""Whole sublayers as a target of pruning: what is chosen, and the cosine importance that a training model gets."""

from __future__ import annotations

import pytest
import torch
from test_selection import random_scores, tiny_parts
from tiny import LANGUAGE_MODELS, hooks, parts, tiny_batch, tiny_model

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.models.batch import real_tokens
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.selection import select
from apt_trainer.scoring.calibration import calibrate
from apt_trainer.scoring.cosine import Cosine
from apt_trainer.scoring.sublayers.cosine import cosine_scores
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.settings import MethodSettings

ROUND = {"heads": 1, "neurons": 4, HIDDEN: 4}


def _limits(*targets: str, heads: int = 0, neurons: int = 0) -> Limits:
    return Limits(frozenset(targets), ROUND, {"heads": heads, "neurons": neurons, HIDDEN: 4}, sublayers=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_alone_each_goes_or_stays_and_no_more_would_fit(seed: int, share: float) -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, seed)
    budget = share * cost.total(dense.counts)
    counts = select(scores, spaces, dense, cost, budget, _limits()).counts
    assert counts[HIDDEN] == dense.counts[HIDDEN] and cost.total(counts) <= budget
    for space in spaces:
        assert counts[space.name] in (0, space.size)
        assert counts[space.name] or cost.total(counts | {space.name: space.size}) > budget


def test_alone_the_least_score_per_parameter_goes_first() -> None:
    spaces, dense, cost = tiny_parts()
    scores = {space.name: torch.ones(space.size) for space in spaces}
    scores["layers.2.heads"] *= 0.01
    scores["layers.0.neurons"] *= 0.02
    total = cost.total(dense.counts)
    counts = select(scores, spaces, dense, cost, 0.9 * total, _limits()).counts
    assert [name for name, count in counts.items() if count == 0] == ["layers.2.heads"]
    two = total - cost.total({**dense.counts, "layers.2.heads": 0}) + 1
    counts = select(scores, spaces, dense, cost, total - two, _limits()).counts
    assert sorted(name for name, count in counts.items() if count == 0) == ["layers.0.neurons", "layers.2.heads"]


@pytest.mark.parametrize("seed", range(4))
def test_joined_a_minimum_holds_or_the_whole_goes(seed: int) -> None:
    spaces, dense, cost = tiny_parts()
    scores = random_scores(spaces, dense, seed)
    budget = 0.4 * cost.total(dense.counts)
    counts = select(scores, spaces, dense, cost, budget, _limits("heads", "neurons", heads=2, neurons=10)).counts
    assert cost.total(counts) <= budget
    for space in spaces:
        if space.kind != HIDDEN:
            least = 2 if space.kind == "heads" else 12  # 10 rounded up
            assert counts[space.name] == 0 or least <= counts[space.name] <= space.size


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "llama", "gemma2", "gpt2", "gpt_neox", "opt", "t5", "modernbert"]
)
def test_cosine_importance_is_that_of_the_frozen_model(name: str) -> None:
    model = tiny_model(name, LANGUAGE_MODELS.get(name, "ForSequenceClassification")).train()
    batch = tiny_batch(model)
    family, spaces, dense = parts(model)
    rule = Cosine(decay=0.0)
    rule.attach(model, [space for space in spaces if space.name != HIDDEN], dense.counts)
    rule.set_tokens(real_tokens(batch, family))
    model(**batch)
    rule.update(lambda tensor: tensor, 1)
    found = {space: float(scores.sum()) for space, scores in rule.scores(model).items()}
    before = dict(rule.state_dict())
    rule.rest(True)
    rule.set_tokens(real_tokens(batch, family))
    model(**batch)
    assert all(float(value) == 0 for sums in rule._sums.values() for value in sums)
    rule.detach()
    assert hooks(model) == 0 and before.keys() == found.keys()
    units = find_units(model)
    expected = cosine_scores(model, units, [batch]).scores
    assert len(found) == len(units.sublayers)
    for unit in units.sublayers:
        assert found[units.members[unit][0].space] == pytest.approx(expected[unit], abs=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5"])
def test_cosine_counts_each_batch_of_training_once(name: str, reentrant: bool) -> None:
    """Neither layers that are computed again for the backward pass nor an evaluation change the scores."""
    found = []
    for disturbed in (False, True):
        model = tiny_model(name, LANGUAGE_MODELS.get(name, "ForSequenceClassification")).train()
        model.enable_input_require_grads()
        if disturbed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        family, spaces, dense = parts(model)
        rule = Cosine(decay=0.0)
        rule.attach(model, [space for space in spaces if space.name != HIDDEN], dense.counts)
        for size in (2, 4):
            batch = tiny_batch(model, size=size)
            rule.set_tokens(real_tokens(batch, family))
            model(**batch).loss.backward()
            if disturbed:
                with torch.no_grad():
                    model.eval()(**tiny_batch(model, size=3))
                model.train()
        rule.update(lambda tensor: tensor, 1)
        found.append({space: scores.sum() for space, scores in rule.scores(model).items()})
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_cosine_before_training_is_that_of_the_frozen_model(name: str, checkpointing: bool) -> None:
    model = tiny_model(name, LANGUAGE_MODELS.get(name, "ForSequenceClassification"), dropout=0.1).train()
    batch, (family, spaces, dense) = tiny_batch(model), parts(model)
    expected = cosine_scores(model.eval(), find_units(model), [batch]).scores
    if checkpointing:
        model.train().activation_checkpointing_enable()
    rule, spaces = Cosine(), [space for space in spaces if space.name != HIDDEN]
    rule.attach(model, spaces, dense.counts)
    calibrate(model, family, spaces, rule, [batch], lambda batch: model(**batch).loss, lambda tensor: tensor, 1)
    found = {space: float(scores.sum()) for space, scores in rule.scores(model).items()}
    units = find_units(model)
    for unit in units.sublayers:
        assert found[units.members[unit][0].space] == pytest.approx(expected[unit], abs=1e-6)


def test_cosine_observes_a_loop_that_tells_no_tokens() -> None:
    """As in one that does, where all tokens are real."""
    found = []
    for told in (False, True):
        model = tiny_model("bert").train()
        batch, (_, spaces, dense) = tiny_batch(model, padded=False), parts(model)
        rule = Cosine()
        rule.attach(model, [space for space in spaces if space.name != HIDDEN], dense.counts)
        for _ in range(2):
            if told:
                rule.set_tokens(batch.get("attention_mask"))
            model(**batch).loss.backward()
            rule.update(lambda tensor: tensor, 1)
        found.append({space: scores.sum() for space, scores in rule.scores(model).items()})
    torch.testing.assert_close(found[1], found[0])
    assert all(score > 0 for score in found[0].values())


def test_cosine_is_for_sublayers_alone() -> None:
    with pytest.raises(UserError, match=r"Set prune_targets: \[sublayers\]"):
        MethodSettings(importance="cosine", target_sparsity=0.5, prune_targets=["heads", "sublayers"]).check()
