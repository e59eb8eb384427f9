"""Single heads as units of a drop: switched off they equal the cut, and the last one takes the attention along."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from test_families import generated, same
from test_sublayers import MODELS, Table, attention, model_of
from texts import model_and_data, save_dense, tiny_llama, word_tokenizer, words
from tiny import gap, hooks, logits, tiny_batch
from transformers import PreTrainedModel

from apt_trainer import cli, load_pruned
from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.scoring.sublayers.costs import Shape, cache_bytes, shares, unit_costs
from apt_trainer.scoring.sublayers.drop import depth_share, depth_warning, drop, head_share, plan_without
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Losses, impacts
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import Unit, Units, find_units
from apt_trainer.scoring.sublayers.windows import from_text
from apt_trainer.store.saving import save_pruned
from apt_trainer.studies import lists
from apt_trainer.studies.select import Budget, ImpactRanker, RandomRanker, ReverseRanker, candidates_of, choose

TOLERANCE = 1e-5


def heads(layer: int, *numbers: int) -> tuple[Unit, ...]:
    return tuple(Unit("head", layer, "decoder", number) for number in numbers)


def some_heads(units: Units) -> tuple[Unit, ...]:
    """Every second head, and of the first attention all that may go."""
    return units.together([*units.of("heads")[::2], *units.of("heads")[1:5:2]])


def without(model: PreTrainedModel, units: Units, off: tuple[Unit, ...]) -> PreTrainedModel:
    small = copy.deepcopy(model)
    drop(small, units, off)
    return small


# ---------------------------------------------------------------------- units


def test_a_head_is_a_key_and_value_head_with_its_queries() -> None:
    model = model_of("llama")  # 8 query heads and 4 key and value heads of 6 channels
    units = find_units(model)
    assert units.of("heads") == heads(0, 0, 1, 2, 3) + heads(1, 0, 1, 2, 3) + heads(2, 0, 1, 2, 3)
    assert units.label(heads(2, 1)[0]) == "head 2.1" and heads(2, 1)[0].name == "decoder.2.head.1"
    old, new = (m.model.layers[2].self_attn for m in (model, without(model, units, heads(2, 1))))
    rows = [*range(12), *range(24, 48)]
    assert torch.equal(new.q_proj.weight, old.q_proj.weight[rows])
    assert torch.equal(new.v_proj.weight, old.v_proj.weight[[*range(6), *range(12, 24)]])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, rows])


def test_all_heads_are_the_attention() -> None:
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    every = heads(1, 3, 0, 2, 1)
    assert units.parts(every) == units.parts([*every, *attention(1)]) == attention(1)
    assert units.parts([*heads(2, 3, 0), Unit("block", 1)]) == (*attention(1), Unit("mlp", 1), *heads(2, 0, 3))
    assert plan_without(units, every) == plan_without(units, attention(1))
    known = Losses(None, units, (), known={("decoder.1.attention",): 7.0})  # type: ignore[arg-type]
    assert known.without(every) == 7.0
    with switched_off(model, units, every):
        gated = logits(model, batch)
    assert torch.equal(gated, logits(without(model, units, attention(1)), batch))


def test_units_that_cannot_go() -> None:
    units = find_units(model_of("llama"))
    for dropped, message in (
        (heads(1, 4), r"head 1\.4 does not exist: the model has heads 0 to 3 in that attention"),
        (heads(1, -1), r"head 1\.-1 does not exist"),
        (heads(3, 0), r"head 3\.0 does not exist: the model has layers 0 to 2"),
        (heads(1, 2, 2), r"head 1\.2 is listed twice"),
    ):
        with pytest.raises(UserError, match=message):
            units.check(dropped)
    two = find_units(model_of("t5"))
    first = tuple(Unit("head", 0, "encoder", number) for number in range(4))
    two.check(first[1:])
    with pytest.raises(UserError, match="encoder attention 0 cannot be dropped"):
        two.check(first)
    assert two.together(first) == first[:3] and two.free(first, first[:3]) == ()
    assert two.label(Unit("cross_head", 1, "decoder", 2)) == "decoder cross-head 1.2"


# ---------------------------------------------------------------------- switched off, cut, saved


@pytest.mark.parametrize("name", MODELS)
def test_heads_switched_off_are_the_cut_model(name: str) -> None:
    model = model_of(name)
    batch, units = tiny_batch(model), find_units(model)
    dense, off = logits(model, batch), some_heads(units)
    with switched_off(model, units, off):
        masked = logits(model, batch)
    assert torch.equal(logits(model, batch), dense) and hooks(model) == 0
    small = without(model, units, off)
    assert gap(logits(small, batch), masked) < TOLERANCE < 1e-2 < gap(masked, dense)
    costs = unit_costs(model, units, "params", Shape(), heads=True)
    assert count_parameters(model) - count_parameters(small) == sum(costs[part] for part in units.parts(off))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "olmo2", "bert", "modernbert", "t5"])
def test_models_without_heads_reload_equal(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    units, batch = find_units(model), tiny_batch(model)
    plan = drop(model, units, some_heads(units))
    assert save_pruned(model, tmp_path, plan) == 0.0
    again = load_pruned(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert count_parameters(again) == count_parameters(model)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "gemma2", "t5"])
def test_cached_generation_without_heads(name: str) -> None:
    """Some attentions lost a part of their heads, that of layer 0 (but for T5) all of them."""
    model = model_of(name)
    units = find_units(model)
    small = without(model, units, some_heads(units))
    assert same(generated(small, use_cache=True), generated(small, use_cache=False))
    with switched_off(model, units, some_heads(units)):
        assert same(generated(model, use_cache=True), generated(small, use_cache=True))


# ---------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "olmo2"])
def test_memory_of_a_head_is_its_weights_and_its_cache(name: str) -> None:
    model = model_of(name)
    units, shape = find_units(model), Shape(2, 7)
    off = heads(0, 1) + heads(2, 0, 3)
    ids = torch.full((2, 7), 5)
    small = without(model, units, off)
    with torch.no_grad():
        caches = [m(input_ids=ids, use_cache=True).past_key_values for m in (model, small)]
    sizes = [sum(4 * (one.keys.numel() + one.values.numel()) for one in cache.layers) for cache in caches]
    assert sizes[0] - sizes[1] == sum(cache_bytes(model, units, unit, shape) for unit in off)
    costs, params = (unit_costs(model, units, cost, shape, heads=True) for cost in ("memory", "params"))
    for unit in off:
        assert costs[unit] == 4 * params[unit] + cache_bytes(model, units, unit, shape)
    assert sum(costs[head] for head in heads(0, 0, 1, 2, 3)) < costs[Unit("attention", 0)]  # without its norm


def test_seconds_of_a_head_and_none() -> None:
    units = find_units(model_of("llama"))
    costs = unit_costs(model_of("llama"), units, "latency", Shape(1, 8, max_seconds=0.2), heads=True)
    assert len({costs[head] for head in units.of("heads")}) == 1 and min(costs.values()) > 0
    assert set(unit_costs(model_of("llama"), units, "none", Shape(), heads=True).values()) == {1.0}
    assert heads(0, 0)[0] not in unit_costs(model_of("llama"), units, "params", Shape())


# ---------------------------------------------------------------------- choosing


def test_impact_of_heads_is_that_of_cut_models() -> None:
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    share = shares(unit_costs(model, units, "params", Shape(), heads=True), units)
    losses = Losses(model, units, [batch])
    dropped = heads(1, 0, 1, 2)
    found = impacts(losses, heads(1, 3) + heads(2, 1), dropped, share)
    base = exp_loss(without(model, units, dropped), units, [batch])
    for one in found:
        loss = exp_loss(without(model, units, (*dropped, one.unit)), units, [batch])
        assert one.loss == pytest.approx(loss, rel=1e-5)
        assert one.relative == pytest.approx((loss - base) / base, rel=1e-3, abs=1e-5)
        wanted = one.relative * share[one.unit] if one.relative <= 0 else one.relative / share[one.unit]
        assert one.normalised == pytest.approx(wanted)
    chosen = choose(candidates_of(units, "heads"), "heads", Budget(count=12), ImpactRanker(losses, share), "iterative")
    assert set(chosen.units) == set(units.of("heads")) and len(chosen.steps) == 12


@pytest.mark.parametrize("strategy", ["one_shot", "iterative"])
def test_an_attention_that_stays_keeps_a_head(strategy: str) -> None:
    """Harm grows with the layer, so that the first attention of each stack would lose all of its heads."""
    units = find_units(model_of("t5"))
    harm = {unit: 1.0 + place for place, unit in enumerate(units.of("heads"))}
    ranker = ImpactRanker(Table(units, harm), dict.fromkeys(harm, 0.1), baseline="dense")
    budget, candidates = Budget(count=5, units=units), candidates_of(units, "heads")
    chosen = choose(candidates, "heads", budget, ranker, strategy).units
    assert chosen == tuple(unit for unit in units.of("heads") if unit != Unit("head", 0, "encoder", 3))[:5]
    units.check(chosen)
    most = len(candidates) - 3  # two self-attentions and one cross-attention
    units.check(choose(candidates, "heads", Budget(count=most, units=units), ranker, strategy).units)
    with pytest.raises(UserError, match=f"count={most + 1} is more than the {most} units of kind 'heads'"):
        choose(candidates, "heads", Budget(count=most + 1, units=units), ranker, strategy)


def test_budgets_orders_and_protected_layers() -> None:
    model = model_of("llama")
    units = find_units(model)
    share = shares(unit_costs(model, units, "params", Shape(), heads=True), units)
    assert candidates_of(units, "heads", protect=[0, -1]) == heads(1, 0, 1, 2, 3)
    every = candidates_of(units, "heads")
    reverse = choose(every, "heads", Budget(count=5), ReverseRanker(units)).units
    assert reverse == heads(2, 3, 2, 1, 0) + heads(1, 3)
    drawn = [choose(every, "heads", Budget(count=4), RandomRanker(seed)).units for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    one, whole = share[heads(0, 0)[0]], share[Unit("attention", 0)]
    assert 4 * one < whole
    for fraction, number in ((2 * one, 2), (2.01 * one, 3), (whole, 4), (1.001 * whole, 5)):
        assert len(choose(every, "heads", Budget(None, fraction, share, units), ReverseRanker(units)).units) == number
    with pytest.raises(UserError, match=f"all units of kind 'heads' make up {3 * whole:.3f}"):
        Budget(None, 0.99, share, units).check(every, "heads")


def test_depth_counts_whole_sublayers_and_heads_count_apart() -> None:
    units = find_units(model_of("llama"))
    most = heads(0, 0, 1, 2) + heads(1, 0, 1, 2)
    assert depth_share(units, most) == 0.0 and depth_warning(units, most) is None
    assert head_share(units, most) == 0.5 and head_share(units, [Unit("block", 1), *heads(2, 0)]) == 5 / 12
    assert depth_warning(units, [*most, *heads(0, 3), *heads(1, 3)]).startswith("33% of all sublayers")


# ---------------------------------------------------------------------- drop lists


def test_lists_of_heads_both_ways(tmp_path: Path) -> None:
    units, path = find_units(model_of("llama")), tmp_path / "list.json"
    for dropped in (heads(2, 1, 0), (*heads(1, 3), Unit("mlp", 0), *attention(2)), heads(1, 0, 1, 2, 3)):
        data = lists.to_json(units, dropped, "llama")
        path.write_text(json.dumps(data))
        assert lists.read(str(path), units, "llama") == dropped and data["heads"] == {"decoder": 4}
    assert data["drop_attn_list"] == [1]  # an attention as a whole, which the other lists can say
    assert "drop_attn_list" not in lists.to_json(units, heads(1, 0), "llama")
    two = find_units(model_of("t5"))
    dropped = (Unit("cross_head", 0, "decoder", 3), Unit("head", 1, "encoder", 0))
    assert lists.from_json(lists.to_json(two, dropped, "t5"), two, "t5") == dropped


HEAD = {"kind": "head", "layer": 1, "stack": "decoder"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": [HEAD | {"head": 4}]}, "head 1.4 does not exist: the model has heads 0 to 3"),
        ({"units": [HEAD]}, "is no unit"),
        ({"units": [HEAD | {"head": "1"}]}, "is no unit"),
        ({"units": [HEAD | {"kind": "mlp", "head": 1}]}, "is no unit"),
        ({"units": [HEAD | {"head": 1}], "heads": {"decoder": 8}}, "heads {'decoder': 8}, those here have"),
        ({"units": [HEAD | {"head": 1}] * 2}, "head 1.1 is listed twice"),
        ({"units": [HEAD | {"head": 1}], "model_type": "gpt2"}, "of type 'gpt2'"),
    ],
)
def test_bad_lists_of_heads(changes: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"format_version": 1} | changes))
    with pytest.raises(UserError) as caught:
        lists.read(str(path), find_units(model_of("llama")), "llama")
    assert message in str(caught.value)


# ---------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), words(60))


@pytest.mark.parametrize("amount", [("--count", "3"), ("--fraction", "0.1")])
@pytest.mark.parametrize("strategy", ["one_shot", "iterative"])
def test_drop_of_heads_end_to_end(strategy: str, amount: tuple[str, str], saved: Path, tmp_path: Path, capsys) -> None:
    out, again = tmp_path / "small", tmp_path / "again"
    words_ = ["--kind", "heads", *amount, "--method", "nri", "--strategy", strategy, "--output", str(out)]
    assert cli.main(["drop", *model_and_data(saved), *words_]) == 0
    report, printed = json.loads((out / "drop_report.json").read_text()), capsys.readouterr().out
    dense, small = tiny_llama(), load_pruned(out).eval()
    blocks = sum(count_parameters(layer) for layer in dense.model.layers)
    gone = report["parameters"] - report["parameters_after"]
    assert report["block_parameter_share"] == pytest.approx(gone / blocks) and report["reload_difference"] == 0.0
    assert report["parameters_after"] == count_parameters(small)
    assert all(label.startswith("head ") for label in report["dropped"])
    if amount[0] == "--count":
        assert len(report["dropped"]) == 3
    else:
        number = len(report["dropped"])
        assert report["block_parameter_share"] * (number - 1) / number < 0.1 <= report["block_parameter_share"]
    units, tokenizer = find_units(dense), word_tokenizer()
    batches = from_text(words(60), tokenizer, dense, units, 64, 8).batches
    assert report["loss_after"] == pytest.approx(exp_loss(small, units, batches), rel=1e-5)
    layers = small(input_ids=torch.tensor([[5]]), use_cache=True).past_key_values.layers
    after = sum(4 * (one.keys.numel() + one.values.numel()) for one in layers if one.keys.shape[-1] > 1)
    assert report["kv_bytes_per_token_after"] == after < report["kv_bytes_per_token_before"]
    assert f"{report['head_share']:.1%} of the heads" in printed
    listed = ["--drop_list", str(out / "drop_list.json"), "--output", str(again)]
    assert cli.main(["drop", "--model", str(saved / "model"), "--device", "cpu", *listed]) == 0
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(logits(load_pruned(again).eval(), ids), logits(small, ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--count", "1"], "cosine compares"),
        (["--count", "99", "--method", "nri"], "count=99 is more than the"),
        (["--fraction", "0.9", "--method", "reverse"], "all units of kind 'heads' make up"),
        (["--count", "1", "--method", "nri", "--protect", "77"], "protect=77 is no layer"),
    ],
)
def test_bad_drops_are_told_before_weights_load(
    changes: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    assert cli.main(["drop", *model_and_data(saved), "--kind", "heads", "--output", str(out), *changes]) == 2
    assert message in capsys.readouterr().err and not out.exists()


def curve(saved: Path, out: Path, *more: str) -> list[str]:
    return ["curve", *model_and_data(saved), "--test", str(saved / "text.txt"), "--output", str(out), *more]


def test_a_curve_of_heads_beside_whole_attentions(saved: Path, tmp_path: Path) -> None:
    words_ = ["--kinds", "attention", "heads", "--counts", "1", "2", "--head_counts", "1", "3"]
    words_ += ["--rankings", "cosine", "nri:memory", "nri:params:iterative", "reverse"]
    assert cli.main(curve(saved, tmp_path, *words_)) == 0
    found = json.loads((tmp_path / "curve.json").read_text())
    rows = [row for row in found["rows"] if row["kind"] == "heads"]
    assert [row["count"] for row in rows] == [1, 3] * 3 and len(found["rows"]) == 6 + 8
    dense = tiny_llama()
    units = find_units(dense)
    batches = from_text(words(60), word_tokenizer(), dense, units, 64, 8).batches
    labels = {units.label(unit): unit for unit in units.every}
    blocks = sum(count_parameters(layer) for layer in dense.model.layers)
    for row in rows:
        small = without(dense, units, tuple(labels[label] for label in row["units"]))
        assert row["loss"] == pytest.approx(math.log(exp_loss(small, units, batches)), rel=1e-5)
        assert row["parameter_share"] == pytest.approx((count_parameters(dense) - count_parameters(small)) / blocks)
    table = (tmp_path / "curve.md").read_text().split("without units of kind heads (not ranked by cosine)")[1]
    assert "nri:memory" in table and "cosine |" not in table and "of block parameters" in table
    assert cli.main([*curve(saved, tmp_path, *words_), "--resume"]) == 0
    assert json.loads((tmp_path / "curve.json").read_text()) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--kinds", "heads", "--rankings", "cosine"], "cosine compares"),
        (["--kinds", "heads", "--head_counts", "99"], "count=99 is more than the"),
        (["--kinds", "mlp", "--head_counts", "2"], "head_counts is for kind heads"),
    ],
)
def test_bad_curves_are_told_before_weights_load(
    changes: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    assert cli.main(curve(saved, out, "--counts", "1", *changes)) == 2
    assert message in capsys.readouterr().err and not out.exists()
