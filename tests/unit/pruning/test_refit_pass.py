"""Weights that are solved for anew at a cut: against an independent least squares, and where nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import LANGUAGE_MODELS, adapted, gap, hooks, logits, parts, random_plan, tiny_batch, tiny_model
from transformers import PreTrainedModel

from apt_trainer.models import HIDDEN, ModelFamily, Space
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning import refit_pass
from apt_trainer.pruning.refit_pass import RefitPass
from apt_trainer.scoring.base import Batch
from apt_trainer.scoring.calibration import calibrate
from apt_trainer.scoring.salience import Salience
from apt_trainer.surgery import refit as refit_module
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.refit import DAMPING
from apt_trainer.surgery.slicing import EditLog, NewValues

MODELS = [("bert", "ForSequenceClassification"), ("distilbert", "ForTokenClassification"), *LANGUAGE_MODELS.items()]


@dataclass
class Given:
    """Batches of one process, and the model that runs them."""

    model: PreTrainedModel
    given: Sequence[Batch | None]
    passes: int = 0

    def batches(self) -> Sequence[Batch | None]:
        return self.given

    def loss_of(self, batch: Batch) -> torch.Tensor:
        self.passes += 1
        return self.model(**batch).loss


def refit(
    model: PreTrainedModel,
    family: ModelFamily,
    spaces: Sequence[Space],
    dense: PruningPlan,
    plan: PruningPlan,
    batches: Sequence[Batch | None],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> list[str]:
    return RefitPass(model, family, spaces)(dense, plan, Given(model, batches), reduce, EditLog())


def inputs_of(model: PreTrainedModel, space: Space, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters the gate of ``space`` at real tokens of the encoder, or of a decoder alone: [tokens, n]."""
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(str(space.gate)).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1])[batch["attention_mask"].bool().reshape(-1)]


def weight_of(model: PreTrainedModel, space: Space) -> torch.Tensor:
    """[out, in] of the gate, adapters included."""
    gate = model.get_submodule(str(space.gate))
    base = gate.base_layer if isinstance(gate, LoraLayer) else gate
    added = gate.get_delta_weight("default") if isinstance(gate, LoraLayer) else 0.0
    weight = (base.weight + added).detach()
    return weight if isinstance(base, torch.nn.Linear) else weight.T


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_equals_an_independent_least_squares(family: str, task: str) -> None:
    """Damping as added rows, a bias as an added column of ones: solved by numpy without normal equations."""
    model = adapted(tiny_model(family, task), everywhere=True)
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 7, kinds=("heads", "neurons"))
    batches = [tiny_batch(model), tiny_batch(model, size=3)]
    before = {space.name: weight_of(model, space) for space in spaces if space.gate}
    biases = {name: _bias(model, name, spaces) for name in before}
    seen = {
        space.name: torch.cat([inputs_of(model, space, batch) for batch in batches]).double().numpy()
        for space in spaces
        if space.gate and space.stack == table.stacks[0].stack
    }
    solved = refit(model, table, spaces, dense, plan, batches)
    survivors = dense.survivors(plan)
    assert set(solved) == {s.gate for s in spaces if s.gate and s.name in survivors and plan.counts[s.name]}
    for space in spaces:
        if space.gate not in solved or space.name not in seen:
            continue
        part = next(p for p in space.slices if p.module == space.gate and p.side == "in")
        kept = part.rows(survivors[space.name], space.size).numpy()
        x, w = seen[space.name], before[space.name].double().numpy()
        bias = biases[space.name]
        target, read = x @ w.T, x[:, kept]
        centred = x - x.mean(0) if bias is not None else x
        damping = np.sqrt(DAMPING * (centred**2).sum(0).mean())
        if bias is not None:
            target, read = target - target.mean(0), read - read.mean(0)
        rows = np.concatenate([read, damping * np.eye(len(kept))])
        wanted = np.linalg.lstsq(rows, np.concatenate([target, damping * w[:, kept].T]), rcond=None)[0].T
        after = weight_of(model, space).double().numpy()
        assert np.abs(after[:, kept] - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())
        if bias is not None:
            error = x[:, kept] @ after[:, kept].T + _bias(model, space.name, spaces).numpy() - x @ w.T - bias.numpy()
            assert np.abs(error.mean(0)).max() < 1e-4, "the bias takes the mean of what went"


def _bias(model: PreTrainedModel, name: str, spaces: list[Space]) -> torch.Tensor | None:
    gate = model.get_submodule(str(next(s for s in spaces if s.name == name).gate))
    base = gate.base_layer if isinstance(gate, LoraLayer) else gate
    return None if base.bias is None else base.bias.detach().double().clone()


def test_what_others_can_say_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neuron that another one doubles may go without a trace."""
    monkeypatch.setattr(refit_module, "DAMPING", 1e-9)
    model = tiny_model("llama", "ForCausalLM")
    table, spaces, dense = parts(model)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[3] = linear.weight[8]
    kept = {s.name: tuple(i for i in range(s.size) if s.kind != "neurons" or i != 3) for s in spaces}
    plan, batch = PruningPlan(kept), tiny_batch(model)
    expected = logits(model, batch)
    cut = copy.deepcopy(model)
    apply_plan(cut, table, spaces, dense, plan)
    refit(model, table, spaces, dense, plan, [batch])
    apply_plan(model, table, spaces, dense, plan)
    assert gap(logits(model, batch), expected) < 1e-3 < 0.1 * gap(logits(cut, batch), expected)


def test_matrices_that_do_not_fit_together_have_passes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", "ForCausalLM")
    table, spaces, dense = parts(model)
    plan, batch = random_plan(spaces, dense, 7, kinds=("heads", "neurons")), tiny_batch(model)
    other = copy.deepcopy(model)
    refit(model, table, spaces, dense, plan, [batch])
    monkeypatch.setattr(refit_pass, "GROUP_BYTES", 1)
    rows = Given(other, [batch])
    solved = RefitPass(other, table, spaces)(dense, plan, rows, lambda tensor: tensor, EditLog())
    assert rows.passes == len(solved) > 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_shares_of_processes_add_up() -> None:
    """Two processes with half of the rows each, whose sums are exchanged, solve for what one does with all."""
    model = tiny_model("bert", "ForSequenceClassification")
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 7, kinds=("heads", "neurons"))
    batch = tiny_batch(model)
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    sums: list[torch.Tensor] = []
    first, second, whole = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    refit(second, table, spaces, dense, plan, [halves[1]], lambda t: sums.append(t.clone()) or t)  # type: ignore[func-returns-value]
    taken = iter(sums)
    refit(first, table, spaces, dense, plan, [halves[0], None], lambda t: t + next(taken))
    refit(whole, table, spaces, dense, plan, [batch])
    for a, b in zip(first.parameters(), whole.parameters(), strict=True):
        assert gap(a.detach(), b.detach()) < 1e-3


def test_nothing_else_changes() -> None:
    model = tiny_model("llama", "ForCausalLM")
    table, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 7, kinds=("heads", "neurons", "hidden"), vanish=("layers.1.heads",))
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    solved = refit(model, table, spaces, dense, plan, [tiny_batch(model)])
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == set(solved) and model.training
    assert HIDDEN not in solved and not any("layers.1.self_attn" in path for path in solved)


@pytest.mark.parametrize(("family", "task"), [MODELS[0], ("llama", "ForCausalLM"), ("t5", "ForConditionalGeneration")])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_pass_that_scores_shows_what_a_pass_of_its_own_would(family: str, task: str, checkpointing: bool) -> None:
    model = tiny_model(family, task)
    table, spaces, dense = parts(model)
    plan, batches = random_plan(spaces, dense, 7, kinds=("heads", "neurons")), [tiny_batch(model), None]
    other = copy.deepcopy(model)
    solved = refit(other, table, spaces, dense, plan, batches)
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows, importance, beside = Given(model, batches), Salience(), RefitPass(model, table, spaces)
    bare = hooks(model)
    importance.attach(model, spaces, dense.counts)
    with beside.beside_scores(rows.loss_of, dense.counts) as loss_of:
        calibrate(model, table, spaces, importance, batches, loss_of, lambda tensor: tensor, 1)
    importance.detach()
    assert beside(dense, plan, rows, lambda tensor: tensor, EditLog()) == solved
    assert rows.passes == 1 and hooks(model) == bare
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_what_is_solved_for_is_logged_and_a_sharer_keeps_the_old_values() -> None:
    model = tiny_model("bert")
    table, spaces, dense = parts(model)
    plan, log = random_plan(spaces, dense, 7, kinds=("neurons",)), EditLog()
    shared = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in shared.items()}
    solved = RefitPass(model, table, spaces)(dense, plan, Given(model, [tiny_batch(model)]), lambda t: t, log)
    assert log.edits == {f"{path}.{name}": [NewValues()] for path in solved for name in ("weight", "bias")}
    assert all(torch.equal(value, before[name]) for name, value in shared.items())
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == set(log.edits)
