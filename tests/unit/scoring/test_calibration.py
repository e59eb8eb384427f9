"""Scores of a dense model before it trains, against the same scores from captured tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from test_taps import observe_by_hand
from tiny import LANGUAGE_MODELS, hooks, parts, tiny_batch, tiny_model
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.models.batch import of_stack, real_tokens
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.scoring.calibration import shares
from apt_trainer.scoring.salience import Salience
from apt_trainer.scoring.taylor import Taylor
from apt_trainer.settings import MethodSettings

FAMILIES = {"bert": "ForSequenceClassification", "distilbert": "ForSequenceClassification", **LANGUAGE_MODELS}
BEFORE = {"pruning_time": "before", "distillation": "none", "target_sparsity": 0.4, "num_pruning_events": 2}
BEFORE |= {"round_to": 4, "min_hidden": 8, "lora_r": 2, "max_rank": 8}


def pruner_of(model: PreTrainedModel, importance: object = None, **settings: object) -> AdaptivePruner:
    pruner = AdaptivePruner(model, MethodSettings(**{**BEFORE, **settings}), importance=importance)  # type: ignore[arg-type]
    pruner.start(make_schedule(pruner.settings, 20))
    return pruner


def batches_of(model: PreTrainedModel, sizes: Sequence[int] = (4, 4, 2)) -> list[dict[str, torch.Tensor]]:
    """Different padded batches, the last one short."""
    batches = []
    for number, size in enumerate(sizes):
        batch = tiny_batch(model, size=size)
        moved = (batch["input_ids"] + 3 * number) % 30 + 5
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), moved, batch["input_ids"])
        batches.append(batch)
    return batches


def salience_by_hand(pruner: AdaptivePruner, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean over batches of Σ over places of (Σ|a|)·(Σ|g|), with adapters alone trained and no dropout."""
    model = pruner.model.eval()
    scores = {space.name: torch.zeros(space.size) for space in pruner.spaces}
    for batch in batches:
        for space in pruner.spaces:
            places = [(space.gate, "input")] if space.gate else [(path, "output") for path in space.places]
            for (path, _), (x, g) in observe_by_hand(model, batch, places).items():
                mask = of_stack(real_tokens(batch, pruner.family), space.stack_of(path))
                weights = mask.reshape(-1, 1).float()
                a, q = ((t.reshape(-1, t.shape[-1]).abs() * weights).sum(0) for t in (x, g))
                scores[space.name] += (a * q).view(space.size, -1).sum(1) / len(batches)
    return scores


# ---------------------------------------------------------------------------- which rows


@pytest.mark.parametrize(("rows", "number"), [(100, 24), (100, 22), (10, 256), (3, 3)])
def test_processes_share_the_rows_of_each_batch(rows: int, number: int) -> None:
    whole = shares(rows, number, 4, seed=5)
    drawn = [row for batch in whole for row in batch]
    assert len(drawn) == len(set(drawn)) == min(rows, number) and set(drawn) <= set(range(rows))
    assert all(len(batch) == 4 for batch in whole[:-1]) and 1 <= len(whole[-1]) <= 4
    first, second = (shares(rows, number, 2, 5, process, 2) for process in range(2))
    assert len(first) == len(second) == len(whole)
    for batch, *of_process in zip(whole, first, second, strict=True):
        assert sorted(batch) == sorted(row for part in of_process for row in part)
        assert max(map(len, of_process)) <= 2


def test_the_seed_draws_the_rows() -> None:
    assert shares(100, 8, 4, seed=1) == shares(100, 8, 4, seed=1) != shares(100, 8, 4, seed=2)


# ---------------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", FAMILIES)
def test_salience_is_the_mean_over_batches_of_products_of_sums(name: str) -> None:
    model = tiny_model(name, FAMILIES[name])
    pruner = pruner_of(model, outlier_term=False)
    batches = batches_of(model)
    pruner.calibrate(batches, lambda batch: model(**batch).loss)
    scores, expected = pruner.importance.scores(model), salience_by_hand(pruner, batches)
    assert scores.keys() == expected.keys()
    for space, values in scores.items():
        assert (values > 0).float().mean() > 0.9  # a neuron with a ReLU may be dead
        assert torch.allclose(values, expected[space], rtol=1e-3, atol=1e-6), space


CHECKPOINTED = [("bert", True), ("llama", True), ("gpt2", True), ("t5", True), ("bert", False), ("opt", False)]


@pytest.mark.parametrize(("name", "checkpointing"), CHECKPOINTED)
def test_dropout_and_checkpointing_change_no_score(name: str, checkpointing: bool) -> None:
    scores = []
    for dropout in (0.0, 0.5):
        model = tiny_model(name, FAMILIES[name], dropout=dropout).train()
        model.config.use_cache = False
        if checkpointing and dropout:
            model.activation_checkpointing_enable()
        pruner = pruner_of(model, outlier_term=False)
        pruner.calibrate(batches_of(model), lambda batch, model=model: model(**batch).loss)
        scores.append(pruner.importance.scores(model))
    assert all(torch.allclose(values, scores[1][space], rtol=1e-4) for space, values in scores[0].items())


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("tune", ["adapters", "full"])
def test_no_parameter_gets_a_gradient_and_all_is_as_before(name: str, tune: str) -> None:
    model = tiny_model(name, FAMILIES[name]).train()
    model.get_submodule(parts(model)[0].layer_paths(model)[1]).eval()
    pruner = pruner_of(model, tune=tune)
    pruner.detach()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    seen = []

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append([p.requires_grad or p.grad is not None for p in model.parameters()])
        return model(**batch).loss

    pruner.calibrate(batches_of(model), loss_of)
    assert len(seen) == 3 and not any(map(any, seen))
    assert [p.grad for p in model.parameters() if p.grad is not None] == []
    after = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert before == after and any(before[1]) and hooks(model) == 0


def test_the_outlier_term_keeps_its_share_whatever_the_number_of_batches() -> None:
    """As in the official code, which sums both over batches."""
    model = tiny_model("llama", "ForCausalLM")
    batch = batches_of(model, (4,))
    scores = []
    for number in (1, 5):
        pruner = pruner_of(tiny_model("llama", "ForCausalLM"), preset="official")
        pruner.calibrate(batch * number, lambda batch, pruner=pruner: pruner.model(**batch).loss)
        scores.append(pruner.importance.scores(pruner.model))
    assert all(torch.allclose(values, scores[1][space], rtol=1e-4) for space, values in scores[0].items())


def test_an_average_keeps_the_decay_it_was_made_with() -> None:
    for rule in (Salience(0.7), Taylor(0.7)):
        pruner = pruner_of(tiny_model("bert"), rule)
        pruner.calibrate(batches_of(pruner.model), lambda batch, pruner=pruner: pruner.model(**batch).loss)
        assert rule.decay == 0.7


def test_taylor_is_a_mean_over_rows() -> None:
    """Those of a short last batch count as much as others."""
    model, found = tiny_model("bert"), []
    batches = batches_of(model)
    for some in (batches, *([batch] for batch in batches)):
        pruner = pruner_of(tiny_model("bert"), importance=Taylor(0.85))
        pruner.calibrate(some, lambda batch, pruner=pruner: pruner.model(**batch).loss)
        found.append(pruner.importance.scores(pruner.model))
    for space, values in found[0].items():
        mean = sum(size * part[space] for size, part in zip((4, 4, 2), found[1:], strict=True)) / 10
        assert torch.allclose(values, mean, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_taylor_scores_do_not_depend_on_batches_and_processes(name: str) -> None:
    """In llama rows have labels of different number."""
    rows = [batch for size in (1,) * 5 for batch in batches_of(tiny_model(name, FAMILIES[name]), (3,))]
    whole = {key: torch.cat([row[key] for row in rows])[:7] for key in rows[0]}
    if name == "llama":
        whole["labels"] = whole["labels"].clone()
        whole["labels"][::2, 3:] = -100
    found = []
    for sizes in ([7], [3, 4], [1, 6], [2, 2, 2, 1]):
        pruner = pruner_of(tiny_model(name, FAMILIES[name]), importance=Taylor(0.85))
        parts_of = [
            dict(zip(whole, part, strict=True)) for part in zip(*(v.split(sizes) for v in whole.values()), strict=True)
        ]
        pruner.calibrate(parts_of, lambda batch, pruner=pruner: pruner.model(**batch).loss)
        found.append(pruner.importance.scores(pruner.model))
    for scores in found[1:]:
        assert all(torch.allclose(values, scores[space], rtol=1e-3) for space, values in found[0].items())


def test_a_process_without_rows_takes_part_in_the_reduction() -> None:
    model, calls = tiny_model("bert"), []
    pruner = pruner_of(model, outlier_term=False)
    pruner.start(pruner.schedule, 0, lambda tensor: calls.append(len(tensor.shape)) or 2 * tensor, 2)
    first, second, _ = batches_of(model)
    pruner.calibrate([first, second, None], lambda batch: model(**batch).loss)
    assert calls == [0, 1, 0, 1, 0, 1, 0]  # labels and an update, three times, and the loss
    expected = salience_by_hand(pruner, [first, second])
    for space, values in pruner.importance.scores(model).items():
        assert torch.allclose(values, expected[space] * 2 / 3 * 2, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_user_error(bad: float) -> None:
    model = tiny_model("bert")
    pruner = pruner_of(model)
    losses = iter([1.0, bad, 1.0])
    with pytest.raises(UserError, match="loss of the model on the rows that calibration_samples draws is not"):
        pruner.calibrate(batches_of(model), lambda batch: model(**batch).loss * next(losses))


# ---------------------------------------------------------------------------- a plain loop


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_a_plain_loop_cuts_at_step_0_and_grows_ranks_after_it(name: str) -> None:
    model = tiny_model(name, FAMILIES[name])
    pruner = pruner_of(model, pruning_end=6)
    pruner.calibrate(batches_of(model), lambda batch: model(**batch).loss)
    cut = pruner.step(0)
    assert cut is not None and cut.kind == "prune" and pruner.sparsity() >= 0.4
    plan, kinds = pruner.plan, {}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    for step in range(1, 9):
        pruner.begin(step - 1)
        for batch in batches_of(model, (4,)):
            pruner.set_tokens(batch["attention_mask"])
            model(**batch).loss.backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        event = pruner.step(step)
        if event is not None:
            kinds[step] = event.kind
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        assert not pruner.masks.is_open and pruner.plan is plan
    assert kinds == {3: "grow", 6: "grow"}
    assert hooks(model) == 0 and HIDDEN in plan.counts
    budget = 4 * pruner.growth.parameters_at_start
    ranks = pruner.describe(8, "")["ranks"]
    assert max(ranks.values()) > 2
    widths = pruner.growth.widths(plan)
    assert sum(rank * widths[path] for path, rank in ranks.items()) <= budget
