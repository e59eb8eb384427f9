"""``post_norm_policy: keep_norm``: of a sublayer that is gone its norm stays; masks, gates, costs and files agree."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from integration.factories import (
    SHORT,
    Fixed,
    SaveAt,
    counted_block_parameters,
    losses_of,
    make_trainer,
    weights_of,
)
from texts import TOKENS, model_and_data, save_dense, word_tokenizer, words
from tiny import (
    ALL_TASKS,
    LABELS,
    LANGUAGE_MODELS,
    LAYERS,
    WIDTH,
    adapted,
    gap,
    logits,
    parts,
    random_plan,
    randomise,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import PreTrainedModel

from apt_trainer import APTTrainer, UserError, cli, load_pruned
from apt_trainer.measure import Latency, count_flops, count_parameters
from apt_trainer.models import HIDDEN, family_of
from apt_trainer.models.batch import real_tokens
from apt_trainer.plan.cost import flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning import latency_cost as latency_module
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.scoring.cosine import Cosine
from apt_trainer.scoring.sublayers.cosine import cosine_scores
from apt_trainer.scoring.sublayers.costs import Shape, block_shares, unit_costs
from apt_trainer.scoring.sublayers.drop import drop
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.settings import MethodSettings
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore

FAMILIES = ("bert", "roberta", "distilbert")
WRITES = {"attention": ("attention.output.dense", "attention.out_lin"), "mlp": ("output.dense", "ffn.lin2")}
NORMS = ("LayerNorm", "layer_norm")
SCENARIOS = {
    "attention": ((), ("layers.1.heads",)),
    "feed_forward": ((), ("layers.1.neurons",)),
    "layer_and_hidden": (("hidden",), ("layers.0.heads", "layers.1.heads", "layers.1.neurons")),
    "all_kinds": (("heads", "neurons", "hidden"), ("layers.0.heads", "layers.2.neurons")),
    "nothing_left": (("hidden",), tuple(f"layers.{i}.{kind}" for i in range(LAYERS) for kind in ("heads", "neurons"))),
}


def keeping(name: str, task: str = "ForSequenceClassification", dropout: float = 0.0) -> PreTrainedModel:
    model = tiny_model(name, task, dropout=dropout)
    family_of(model.config).set_post_norm_policy(model.config, "keep_norm")
    return model


def silenced(model: PreTrainedModel, kind: str, layer: int) -> PreTrainedModel:
    """A copy whose sublayer adds nothing to the residual stream, by weights of zero: what is left is its norm."""
    model = copy.deepcopy(model)
    path = f"{family_of(model.config).layer_paths(model)[layer]}."
    (writes,) = (model.get_submodule(path + name) for name in WRITES[kind] if name in _paths(model, path))
    for parameter in writes.parameters():
        nn.init.zeros_(parameter)
    return model


def _paths(model: nn.Module, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name, _ in model.named_modules() if name.startswith(prefix)}


def norms_in_blocks(model: PreTrainedModel) -> int:
    blocks = tuple(path + "." for path in family_of(model.config).block_modules(model))
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(blocks) and any(k in n for k in NORMS))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_the_norm_of_the_residual(name: str, kind: str) -> None:
    model = keeping(name)
    batch, units = tiny_batch(model), find_units(model)
    unit = next(u for u in units.sublayers if u.kind == kind and u.layer == 1)
    expected = logits(silenced(model, kind, 1), batch)
    with switched_off(model, units, [unit]):
        assert gap(logits(model, batch), expected) < 1e-6
        loss = exp_loss(model, units, [batch])
    other = tiny_model(name)
    drop(other, find_units(other), [unit])
    drop(model, units, [unit])
    assert gap(logits(model, batch), expected) < 1e-6 and gap(logits(other, batch), expected) > 1e-3
    assert exp_loss(model, units, [batch]) == loss
    assert count_parameters(model) == count_parameters(other) + 2 * units.spaces[-1].size


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", FAMILIES)
def test_masked_equals_cut_saved_and_loaded(name: str, scenario: str, tmp_path: Path) -> None:
    kinds, vanish = SCENARIOS[scenario]
    model = keeping(name)
    family, spaces, dense = parts(model)
    batch, plan = tiny_batch(model), random_plan(spaces, dense, 5, kinds, vanish)
    masked_too = adapted(copy.deepcopy(model), everywhere=True)
    for one in (model, masked_too):
        store = MaskStore(one, spaces, family.sublayers(one))
        store.open(dense.counts)
        store.move(dense.survivors(plan), 1.0)
        masked = logits(one, batch)
        store.close()
        apply_plan(one, family, spaces, dense, plan)
        assert gap(logits(one, batch), masked) < 2e-5
    as_pruned(model, family, plan)
    model.save_pretrained(tmp_path)
    again = load_pruned(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert again.config.apt_post_norm_policy == "keep_norm"
    assert family_of(again.config).keeps_norms(again.config)


@pytest.mark.parametrize("scenario", ["layer_and_hidden", "all_kinds", "nothing_left"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_costs_count_the_norms_that_stay(name: str, scenario: str) -> None:
    model = keeping(name, "ForTokenClassification")
    family, spaces, dense = parts(model)
    batch = {key: value for key, value in tiny_batch(model, size=3, length=7).items() if key != "labels"}
    blocks, whole = (parameter_cost(model, family, spaces, blocks_only=only) for only in (True, False))
    memory, flops = memory_cost(model, family, spaces, 0, 0), flops_cost(model, family, spaces, 3, 7)
    norms = norms_in_blocks(model)
    plan = random_plan(spaces, dense, 7, *SCENARIOS[scenario])
    counts = plan.counts
    apply_plan(model, family, spaces, dense, plan)
    paths = tuple(path + "." for path in family.block_modules(model))
    counted = sum(p.numel() for path, p in model.named_parameters() if path.startswith(paths))
    assert blocks.total(counts) == counted >= norms_in_blocks(model) > 0
    assert norms_in_blocks(model) * WIDTH == norms * counts[HIDDEN]  # narrower, and none is gone
    assert whole.total(counts) == count_parameters(model)
    assert memory.total(counts) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert flops.total(counts) + 2 * 3 * 7 * counts[HIDDEN] * LABELS == count_flops(model, batch)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_what_is_timed_and_shared_out_leaves_the_norms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keeping(name)
    family, spaces, _ = parts(model)
    timed: dict[str, int] = {}

    def compare(variants, sizes, length):  # type: ignore[no-untyped-def]
        timed.update({which: norms_in_blocks(variant) for which, variant in variants.items()})
        return {which: {sizes[0]: Latency(1.0, 0.0, 1)} for which in variants}

    monkeypatch.setattr(latency_module, "compare_latency", compare)
    latency_module.latency_cost(model, family, spaces, 1, 8)
    assert {"no_heads", "no_neurons"} < timed.keys() and set(timed.values()) == {norms_in_blocks(model)}

    units = find_units(model)
    share, costs = block_shares(model, units), unit_costs(model, units, "params", Shape())
    whole = sum(costs[unit] for unit in units.sublayers)
    assert sum(share[unit] for unit in units.sublayers) == pytest.approx(whole / (whole + norms_in_blocks(model)))


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_cosine_of_what_follows_a_sublayer_that_is_off(name: str) -> None:
    """The stream after a sublayer that is off is its norm's, so what follows has another input than without it."""
    model = keeping(name)
    batch, units = tiny_batch(model), find_units(model)
    off = [unit for unit in units.sublayers if unit.layer == 1 and unit.kind == "attention"]
    plain = silenced(model, "attention", 1)
    expected = cosine_scores(plain, units, [batch]).scores
    found = cosine_scores(model, units, [batch], off=off).scores
    assert not found.keys() & set(off)
    for unit in units.sublayers:
        if unit not in off:
            assert found[unit] == pytest.approx(expected[unit], abs=1e-6)


RUNS = {
    "sublayers": {"prune_targets": ["sublayers"], "importance": "cosine", "target_sparsity": 0.4},
    "all_kinds": {"prune_targets": ["heads", "neurons", "hidden"], "tune_after_distillation": "full"},
}


@pytest.mark.parametrize(("name", "run"), [("bert", "sublayers"), ("distilbert", "all_kinds")])
def test_a_run_saves_reloads_and_resumes(name: str, run: str, tmp_path: Path) -> None:
    def trainer(folder: str, *saved: int) -> APTTrainer:
        options: dict[str, object] = {"callbacks": [SaveAt(saved)]}
        if run == "all_kinds":
            options["importance"] = Fixed({"layers.1.heads": 1e-3, "layers.2.neurons": 1e-3})
        model = tiny_model(name, dropout=0.1)
        changes = {**SHORT, **RUNS[run], "post_norm_policy": "keep_norm"}
        return make_trainer(tmp_path / folder, model, options=options, **changes)

    whole, resumed = trainer("whole", 6), trainer("resumed")
    norms = norms_in_blocks(whole.model)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert expected.keys() == got.keys() and losses_of(resumed) == losses_of(whole)
    assert [key for key in expected if not torch.equal(expected[key], got[key])] == []

    counts = whole.pruner.plan.counts
    assert 0 in counts.values() and norms_in_blocks(whole.model) * WIDTH == norms * counts[HIDDEN]
    assert whole.pruner.block_cost.total(counts) == counted_block_parameters(whole)
    whole.model.save_pretrained(tmp_path / "small")
    again, batch = load_pruned(tmp_path / "small").eval(), tiny_batch(whole.model)
    assert torch.equal(logits(again, batch), logits(whole.model.eval(), batch))
    assert again.config.apt_post_norm_policy == "keep_norm"


def test_a_pruner_sets_what_its_settings_say() -> None:
    model = keeping("bert")
    AdaptivePruner(model, MethodSettings())
    assert "apt_post_norm_policy" not in model.config.to_dict()
    pruner = AdaptivePruner(tiny_model("bert"), MethodSettings(post_norm_policy="keep_norm"))
    assert pruner.sublayers == find_units(keeping("bert")).family.sublayers(keeping("bert"))
    assert pruner.sublayers != pruner.family.sublayers(model)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_models_without_norms_after_residuals_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = ALL_TASKS[LANGUAGE_MODELS[name]].from_config(tiny_config(name))
    with pytest.raises(
        UserError, match=f"keep_norm' is for .* norm after each residual .*unlike.* {name}[,.].*Leave it out"
    ):
        AdaptivePruner(model, MethodSettings(post_norm_policy="keep_norm"))
    assert not hasattr(model.config, "apt_post_norm_policy")


def test_an_unknown_policy_is_refused_in_settings_and_in_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="post_norm_policy='keep_norms' is not known.*Did you mean 'keep_norm'"):
        MethodSettings(post_norm_policy="keep_norms").check()
    model = keeping("bert")
    units = find_units(model)
    drop(model, units, [units.sublayers[0]])
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values["apt_post_norm_policy"] == "keep_norm"
    file.write_text(json.dumps(values | {"apt_post_norm_policy": "some"}))
    with pytest.raises(UserError, match="post_norm_policy='some' is not known. Choose one of: remove_norm, keep_norm"):
        load_pruned(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense classifier, its tokenizer and rows with labels."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_model("bert", layers=2)
    model.resize_token_embeddings(len(TOKENS))
    randomise(model, seed=1)
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [json.dumps({"text": words(3 + i % 4, i), "label": i % 3}) for i in range(9)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


def _on(saved: Path, verb: str, output: Path, *more: str) -> int:
    place = ["--model", str(saved / "model"), "--data", str(saved / "rows.jsonl"), "--device", "cpu"]
    return cli.main([verb, *place, "--output", str(output), *more])


def test_the_commands_measure_and_save_by_the_policy(saved: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    keep, joint = ("--post_norm_policy", "keep_norm"), ("--kind", "joint", "--count", "1", "--method", "nri")
    assert _on(saved, "analyze", tmp_path / "scores", "--methods", "nri", *keep) == 0
    found = json.loads((tmp_path / "scores" / "scores.json").read_text())
    losses = {row["name"]: row["loss"] for row in found["units"]}
    scores = ("--scores", str(tmp_path / "scores" / "scores.json"))
    assert _on(saved, "drop", tmp_path / "small", *joint, *scores, *keep) == 0
    report = json.loads((tmp_path / "small" / "drop_report.json").read_text())
    assert found["post_norm_policy"] == report["post_norm_policy"] == "keep_norm"
    assert report["loss_after"] == pytest.approx(losses[report["dropped"][0]], rel=1e-6)
    small = load_pruned(tmp_path / "small")
    assert count_parameters(small) == report["parameters_after"]
    assert small.config.apt_post_norm_policy == "keep_norm"
    removing = {key: value for key, value in found.items() if key != "post_norm_policy"}
    (tmp_path / "scores" / "removing.json").write_text(json.dumps(removing))
    others = ("--scores", str(tmp_path / "scores" / "removing.json"))
    capsys.readouterr()
    for asked in ((*joint, *scores), (*joint, *others, *keep)):
        assert _on(saved, "drop", tmp_path / "no", *asked) == 2
        assert "of another model or other data" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_curve_by_the_policy(saved: Path, tmp_path: Path) -> None:
    words_ = ("--test", str(saved / "rows.jsonl"), "--kinds", "attention", "--rankings", "reverse", "--counts", "1")
    found = {}
    for policy in ("remove_norm", "keep_norm"):
        assert _on(saved, "curve", tmp_path / policy, *words_, "--post_norm_policy", policy) == 0
        found[policy] = json.loads((tmp_path / policy / "curve.json").read_text())
    assert (
        found["keep_norm"]["full"] == found["remove_norm"]["full"] and "post_norm_policy" not in found["remove_norm"]
    )
    (kept,), (removed,) = (found[policy]["rows"] for policy in ("keep_norm", "remove_norm"))
    assert kept["units"] == removed["units"] == ["attention 1"] and kept["loss"] != removed["loss"]
    assert kept["parameter_share"] < removed["parameter_share"]


def test_the_commands_refuse_a_model_that_is_not_post_norm(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    saved = save_dense(tmp_path, words(50))
    for verb in (["analyze"], ["drop", "--count", "1"], ["curve", "--test", str(saved / "text.txt")]):
        name, *more = verb
        options = [*model_and_data(saved), "--output", str(tmp_path / "out"), "--post_norm_policy", "keep_norm"]
        assert cli.main([name, *options, *more]) == 2
        assert "unlike llama" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["remove_norm", "keep_norm"])
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_cosine_in_training_follows_the_norm_of_a_sublayer_that_is_gone(name: str, policy: str) -> None:
    model = tiny_model(name)
    family_of(model.config).set_post_norm_policy(model.config, policy)
    batch, units = tiny_batch(model), find_units(model)
    family, spaces, dense = parts(model)
    off = [unit for unit in units.sublayers if unit.layer == 1 and unit.kind == "attention"]
    expected = cosine_scores(model, units, [batch], off=off).scores
    plan = PruningPlan({**dense.kept, "layers.1.heads": ()})
    apply_plan(model, family, spaces, dense, plan)
    rule = Cosine(decay=0.0)
    rule.attach(model, [space for space in spaces if space.name != HIDDEN], plan.counts)
    rule.set_tokens(real_tokens(batch, family))
    model(**batch)
    rule.update(lambda tensor: tensor, 1)
    found = {space: float(scores.sum()) for space, scores in rule.scores(model).items()}
    for unit in units.sublayers:
        if unit not in off:
            assert found[units.members[unit][0].space] == pytest.approx(expected[unit], abs=1e-6)
