"""Mixtures of experts: what goes with an expert, what it is worth, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import invariants
import pytest
import torch
from integration.factories import SHORT, Recorder, Rows, events_of, make_trainer, watch
from tiny import logits, parts, tiny_batch
from torch import nn

from apt_trainer import AdaptivePruner, APTConfig, UserError, load_pruned
from apt_trainer.measure import count_flops
from apt_trainer.models import family_of
from apt_trainer.plan.cost import flops_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring import make_importance
from apt_trainer.scoring.taps import Tap, TapContext
from apt_trainer.scoring.taylor import Taylor
from apt_trainer.store.export import target_of
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

TYPES = ("mixtral", "olmoe", "qwen3_moe")
KEPT = {"layers.0.experts": (0, 3), "layers.1.experts": (1, 2, 4), "layers.1.neurons": (0, 1, 2, 5, 6, 7, 8, 19)}


def smaller(model: Any) -> tuple[Any, PruningPlan]:
    """Without some experts, and without neurons of all experts of a layer."""
    family, spaces, dense = parts(model)
    plan, small = PruningPlan({**dense.kept, **KEPT}), copy.deepcopy(model)
    apply_plan(small, family, spaces, dense, plan)
    return small, plan


@pytest.mark.parametrize("model_type", TYPES)
def test_an_expert_goes_with_its_row_of_the_router_and_tokens_go_to_the_others(model_type: str) -> None:
    """Reference: the dense model whose router cannot choose the others, and whose experts ignore the neurons."""
    model = invariants.model_of(model_type)
    small, plan = smaller(model)
    gone = {0: [1, 2, 4], 1: [0, 3], 2: []}
    with torch.no_grad():
        for layer, experts in gone.items():
            block = model.model.layers[layer].mlp
            if layer == 1:
                lost = sorted(set(range(20)) - set(KEPT["layers.1.neurons"]))
                block.experts.down_proj[:, :, lost] = 0
            never = torch.zeros(5).index_fill_(0, torch.tensor(experts, dtype=torch.long), -1e9)
            block.gate.forward = _with(block.gate, never)
    batch = tiny_batch(model)
    assert invariants.close(logits(small, batch), logits(model, batch))
    assert small.model.layers[0].mlp.gate.weight.shape[0] == small.model.layers[0].mlp.experts.num_experts == 2
    assert small.model.layers[1].mlp.experts.gate_up_proj.shape == (3, 16, model.config.hidden_size)
    assert plan.counts["layers.2.experts"] == 5


def _with(router: Any, never: torch.Tensor) -> Any:
    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = nn.functional.linear(hidden, router.weight) + never
        weights, chosen = found.softmax(-1).topk(router.top_k)
        weights = weights / weights.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else weights
        return found, weights, chosen

    return forward


def test_scores_are_what_the_loss_gains_by_an_expert_and_by_a_neuron() -> None:
    """The loss is linear in what each of them gives: its gradient is Σ weight · gradient of what reads it."""
    model = invariants.model_of("mixtral").train()
    _, spaces, dense = parts(model)
    batch = tiny_batch(model, padded=False, size=1)
    rule = Taylor(decay=0.0)
    rule.attach(model, [space for space in spaces if space.kind == "experts"], dense.counts)
    rule.set_tokens(batch["attention_mask"])
    block = model.model.layers[1].mlp.experts
    sums = torch.zeros(1, 20)
    tap = Tap(block.act_fn, "activation", "signed", sums, TapContext())
    model(**batch).loss.backward()
    rule.update(lambda tensor: tensor, 1)
    products = block.down_proj * block.down_proj.grad
    assert invariants.close(rule.scores(model)["layers.1.experts"], products.sum((1, 2)).abs())
    assert invariants.close(sums[0], products.sum((0, 1)))
    tap.remove()
    rule.detach()


@pytest.mark.parametrize("importance", ["salience", "magnitude"])
def test_every_rule_scores_every_unit(importance: str, tmp_path: Path) -> None:
    model = invariants.model_of("qwen3_moe").train()
    _, spaces, dense = parts(model)
    rule = make_importance(APTConfig(str(tmp_path), use_cpu=True, importance=importance), 0)
    rule.attach(model, spaces, dense.counts)
    model(**tiny_batch(model)).loss.backward()
    rule.update(lambda tensor: tensor, 1)
    for name, values in rule.scores(model).items():
        assert values.shape == (dense.counts[name],) and bool((values > 0).any()), name
    if importance == "magnitude":
        experts = model.model.layers[0].mlp
        whole = [experts.gate.weight[2], experts.experts.gate_up_proj[2], experts.experts.down_proj[2]]
        expected = sum(weight.square().sum() for weight in whole).sqrt()
        assert invariants.close(rule.scores(model)["layers.0.experts"][2], expected)
    rule.detach()


def test_costs_count_the_experts_that_a_token_uses() -> None:
    """With fewer experts there are fewer parameters, and as many operations but for the router's."""
    model = invariants.model_of("olmoe")
    family, spaces, dense = parts(model)
    cost = flops_cost(model, family, spaces, 1, 7)
    small, plan = smaller(model)
    batch = {name: value for name, value in tiny_batch(model, padded=False, size=1).items() if name != "labels"}
    assert count_flops(model, batch) - count_flops(small, batch) == cost.total(dense.counts) - cost.total(plan.counts)
    only = dense.counts | {name: 2 for name in dense.counts if name.endswith("experts")}
    lost = cost.total(dense.counts) - cost.total(only)
    assert lost == 3 * 3 * 2 * 7 * model.config.hidden_size  # rows of three routers


def test_a_run_prunes_experts_and_moments_follow(tmp_path: Path) -> None:
    model = invariants.model_of("mixtral")
    before, after = Recorder(range(1, 12)), Recorder(range(1, 12))
    changes: dict[str, Any] = {**SHORT, "prune_targets": ["experts"], "target_sparsity": 0.3, "tune": "full"}
    trainer = make_trainer(tmp_path, model, Rows(48, "text"), {"callbacks": [before]}, **changes, round_to=8)
    events = watch(trainer, before, after)
    trainer.train()
    cut = [event for event in events if event.survivors]
    assert cut
    for event in cut:
        for name, kept in event.survivors.items():
            layer = f"model.layers.{name.split('.')[1]}.mlp"
            for path in (f"{layer}.gate.weight", f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj"):
                for key in ("exp_avg", "exp_avg_sq"):
                    old, new = (r.at[event.step].moments[path][key] for r in (before, after))
                    assert torch.equal(new, old.index_select(0, kept)) and old.abs().sum() > 0
    left = [count for name, count in trainer.pruner.plan.counts.items() if name.endswith("experts")]
    assert min(left) >= 2 and sum(left) < 15 and trainer.pruner.sparsity() >= 0.3
    record = events_of(tmp_path, "prune")[-1]
    assert list(record["experts"].values()) == left and record["dense"]["experts"] == {"0": 5, "1": 5, "2": 5}
    trainer.save_model(str(tmp_path / "saved"))
    again, batch = load_pruned(tmp_path / "saved").eval(), tiny_batch(model)
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))
    assert again.generate(batch["input_ids"][:1, :3], max_new_tokens=3).shape == (1, 6)
    pruner = AdaptivePruner(again, APTConfig(str(tmp_path), use_cpu=True, target_sparsity=None))
    assert pruner.plan == trainer.pruner.plan


def test_a_feed_forward_takes_its_experts_along(tmp_path: Path) -> None:
    model = invariants.model_of("qwen3_moe")
    family, spaces, dense = parts(model)
    plan = PruningPlan({**dense.kept, "layers.1.neurons": (), "layers.0.experts": (1, 2)})
    small = copy.deepcopy(model)
    apply_plan(small, family, spaces, dense, plan)
    as_pruned(small, family, plan)
    assert not list(small.model.layers[1].mlp.parameters())
    assert plan.by_kind(spaces)["experts"] == {"0": 2, "1": 0, "2": 5}
    small.eval().save_pretrained(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(logits(load_pruned(tmp_path).eval(), batch), logits(small, batch))


@pytest.mark.parametrize(
    ("model_type", "of_config", "changes", "said"),
    [
        ("bert", {}, {"prune_targets": ["experts"]}, "names experts, and the model has none"),
        ("mixtral", {}, {"round_to": 4}, "multiples of 8"),
        ("mixtral", {}, {"shape": "uniform"}, "not for a mixture of experts"),
        ("mixtral", {"output_router_logits": True}, {}, "output_router_logits: false"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, {}, "experts in every layer"),
    ],
)
def test_what_cannot_work_is_refused(
    model_type: str, of_config: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = invariants.model_of(model_type, **of_config)
    with pytest.raises(UserError, match=said):
        AdaptivePruner(model, APTConfig(str(tmp_path), use_cpu=True, min_hidden=8, **changes))


def test_experts_are_not_exported_to_other_run_times() -> None:
    model = invariants.model_of("olmoe")
    for form in ("onnx", "openvino", "gguf"):
        with pytest.raises(UserError):
            target_of(form).refuse(model, None, None)
    assert family_of(model.config).default_targets(model) == ("q_proj", "v_proj")
