"""Whole attentions, feed-forwards and layers: scores against their definitions, choosing, dropping, both verbs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import invariants
import pytest
import torch
from texts import model_and_data, save_dense, tiny_llama, word_tokenizer, words
from tiny import LANGUAGE_MODELS, gap, hooks, logits, tiny_batch, tiny_model
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModelForSequenceClassification, GPTBigCodeConfig, PreTrainedModel

from apt_trainer import cli, load_pruned
from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.models.batch import of_stack, real_tokens
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring.sublayers.cosine import cosine_scores
from apt_trainer.scoring.sublayers.costs import Shape, cache_bytes, shares, unit_costs
from apt_trainer.scoring.sublayers.drop import collapse_warning, depth_warning, drop, plan_without
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Impact, Losses, impacts
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import Unit, Units, find_units
from apt_trainer.scoring.sublayers.windows import from_rows, from_text
from apt_trainer.store.saving import save_pruned
from apt_trainer.studies import lists
from apt_trainer.studies.classes import layer_classes
from apt_trainer.studies.metrics import sdr, sdr_relative
from apt_trainer.studies.select import (
    Budget,
    CosineRanker,
    ImpactRanker,
    RandomRanker,
    ReverseRanker,
    candidates_of,
    choose,
    choose_consecutive,
)

MODELS = LANGUAGE_MODELS | {
    "bert": "ForMaskedLM",
    "distilbert": "ForSequenceClassification",
    "roberta": "ForTokenClassification",
}


def model_of(name: str, **extra: object) -> PreTrainedModel:
    return tiny_model(name, MODELS[name], **extra)


def attention(*layers: int) -> tuple[Unit, ...]:
    return tuple(Unit("attention", layer) for layer in layers)


def mlp(*layers: int) -> tuple[Unit, ...]:
    return tuple(Unit("mlp", layer) for layer in layers)


# ---------------------------------------------------------------------- units


def test_units_of_a_decoder_and_of_two_stacks() -> None:
    units = find_units(model_of("llama"))
    assert units.of("joint") == attention(0, 1, 2) + mlp(0, 1, 2) and not units.protected
    assert units.parts([Unit("block", 1), Unit("mlp", 1)]) == attention(1) + mlp(1)
    two = find_units(model_of("t5"))
    assert {two.label(unit) for unit in two.protected} == {
        "encoder attention 0",
        "encoder block 0",
        "decoder attention 0",
        "decoder block 0",
        "decoder cross-attention 1",
        "decoder block 1",
    }
    with pytest.raises(UserError, match="decoder cross-attention 1 cannot be dropped"):
        two.check([Unit("cross_attention", 1)])


def test_units_of_a_pruned_model_are_those_left_under_their_old_numbers() -> None:
    model = model_of("llama")
    whole = find_units(model)
    drop(model, whole, [*attention(1), Unit("head", 0, head=1), Unit("mlp", 2)])
    units = find_units(model)
    assert units.of("attention") == tuple(unit for unit in whole.of("attention") if unit.layer != 1)
    assert [unit.head for unit in units.of("heads") if unit.layer == 0] == [0, 2, 3]
    assert units.layers("decoder") == whole.layers("decoder") and units.is_pruned and not whole.is_pruned
    for missing in (*attention(1), Unit("head", 0, head=1), Unit("mlp", 2)):
        with pytest.raises(UserError, match="does not exist: the model has"):
            units.check([missing])
    assert drop(model, units, [Unit("block", 2)]).counts["layers.2.heads"] == 0
    assert find_units(model).of("block") == whole.of("block")[:2]


# ---------------------------------------------------------------------- cosine importance

POST_NORM = {  # layer → (attention, input; its norm), (feed-forward, input; its norm), as modelling code names them
    "bert": ("bert.encoder.layer.{}", "attention.output.LayerNorm", "output.LayerNorm"),
    "roberta": ("roberta.encoder.layer.{}", "attention.output.LayerNorm", "output.LayerNorm"),
    "distilbert": ("distilbert.transformer.layer.{}", "sa_layer_norm", "output_layer_norm"),
}
MIDDLE = {  # module whose input is the residual stream between attention and feed-forward
    "llama": "model.layers.{}.post_attention_layernorm",
    "gemma2": "model.layers.{}.pre_feedforward_layernorm",
    "gemma3_text": "model.layers.{}.pre_feedforward_layernorm",
    "olmo2": "model.layers.{}.mlp",
    "gpt2": "transformer.h.{}.ln_2",
    "opt": "model.decoder.layers.{}.final_layer_norm",
    "modernbert": "model.layers.{}.mlp_norm",
    "phi3": "model.layers.{}.post_attention_layernorm",
}


def captured(model: PreTrainedModel, batch: dict, paths: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Path → (input, output) of modules, every token of every batch kept."""
    found, handles = {}, []
    for path in paths:

        def hook(module, args, kwargs, output, path=path):  # type: ignore[no-untyped-def]
            first = args[0] if args else kwargs.get("hidden_states")
            found[path] = (first, output[0] if isinstance(output, tuple) else output)

        handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def definition(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> float:
    shape = (*mask.shape, -1)
    cosines = cosine_similarity(before.reshape(shape).double(), after.reshape(shape).double(), dim=-1)
    return 1.0 - float(cosines[mask.bool()].mean())


def expected_scores(name: str, model: PreTrainedModel, batch: dict) -> dict[tuple[str, int], float]:
    """From tensors that the modelling code itself passes on, never from outputs added here (but for parallel ones)."""
    mask = batch["attention_mask"]
    found = {}
    for layer in range(3):
        if name == "gpt_neox":
            path = f"gpt_neox.layers.{layer}"
            got = captured(model, batch, [path, f"{path}.attention", f"{path}.mlp"])
            x, z = got[path]
            pairs = {"attention": (x, x + got[f"{path}.attention"][1]), "mlp": (x, x + got[f"{path}.mlp"][1])}
        elif name in POST_NORM:
            path, first, second = POST_NORM[name]
            path = path.format(layer)
            got = captured(model, batch, [path, f"{path}.{first}", f"{path}.{second}"])
            (x, z), y = got[path], got[f"{path}.{first}"][1]
            pairs = {"attention": (x, y), "mlp": (y, got[f"{path}.{second}"][1])}
        else:
            middle = MIDDLE[name].format(layer)
            path = middle.rpartition(".")[0]
            got = captured(model, batch, [path, middle])
            (x, z), y = got[path], got[middle][0]
            pairs = {"attention": (x, y), "mlp": (y, z)}
        for kind, (before, after) in (pairs | {"block": (x, z)}).items():
            found[kind, layer] = definition(before, after, mask)
    return found


@pytest.mark.parametrize("name", [*MIDDLE, *POST_NORM, "gpt_neox"])
def test_cosine_equals_its_definition(name: str) -> None:
    """Whatever the batches: padding does not count, and every token weighs the same."""
    model = model_of(name)
    batch = tiny_batch(model)
    units = find_units(model)
    expected = expected_scores(name, model, batch)
    for size in (4, 3, 1):
        parts = [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, 4, size)]
        found = cosine_scores(model, units, parts)
        assert len(found.scores) == len(expected) == 9
        for unit, score in found.scores.items():
            assert score == pytest.approx(expected[unit.kind, unit.layer], abs=1e-6), unit
    assert found.tokens == {units.stacks[0]: int(batch["attention_mask"].sum())}
    assert hooks(model) == 0 and len(set(found.scores.values())) == 9


def test_cosine_scales_what_is_added_as_the_model_does() -> None:
    model = invariants.model_of("granite")
    batch, units = tiny_batch(model), find_units(model)
    assert model.config.residual_multiplier == 0.5
    expected = expected_scores("llama", model, batch)  # whose modules have the same names
    for unit, score in cosine_scores(model, units, [batch]).scores.items():
        assert score == pytest.approx(expected[unit.kind, unit.layer], abs=1e-6), unit


def test_cosine_of_two_stacks_counts_the_tokens_of_each() -> None:
    model = model_of("t5")
    batch, units = tiny_batch(model), find_units(model)
    masks = real_tokens(batch, units.family)
    found = cosine_scores(model, units, [batch])
    for stack, places in (("encoder", (0, 1)), ("decoder", (0, 1, 2))):
        for place in places:
            path = f"{stack}.block.1.layer.{place}"
            before, after = captured(model, batch, [path])[path]
            kind = {0: "attention", len(places) - 1: "mlp"}.get(place, "cross_attention")
            expected = definition(before, after, of_stack(masks, stack))
            assert found.scores[Unit(kind, 1, stack)] == pytest.approx(expected, abs=1e-6)


def test_parallel_residual_follows_the_config() -> None:
    model = model_of("gpt_neox", use_parallel_residual=False)
    batch = tiny_batch(model)
    path = "gpt_neox.layers.1"
    got = captured(model, batch, [path, f"{path}.post_attention_layernorm"])
    middle = got[f"{path}.post_attention_layernorm"][0]
    found = cosine_scores(model, find_units(model), [batch]).scores
    mask = batch["attention_mask"]
    assert found[Unit("attention", 1)] == pytest.approx(definition(got[path][0], middle, mask), abs=1e-6)
    assert found[Unit("mlp", 1)] == pytest.approx(definition(middle, got[path][1], mask), abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert", "gemma2", "distilbert"])
def test_cosine_without_some_units_is_that_of_the_dropped_model(name: str) -> None:
    model = model_of(name)
    batch, units = tiny_batch(model), find_units(model)
    stack = units.stacks[0]
    off = (Unit("attention", 0, stack), Unit("mlp", 1, stack))
    found = cosine_scores(model, units, [batch], off=off, similarity=True)
    assert not set(off) & found.scores.keys() and len(found.scores) == 7
    full = cosine_scores(model, units, [batch]).scores
    assert found.scores[Unit("mlp", 2, stack)] != pytest.approx(full[Unit("mlp", 2, stack)], abs=1e-4)
    small = copy.deepcopy(model)
    drop(small, units, off)
    with torch.no_grad():
        states = small(**batch, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"]
    assert found.scores[Unit("block", 1, stack)] == pytest.approx(definition(states[1], states[2], mask), abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "t5"])
def test_similarity_compares_the_inputs_of_all_layers(name: str) -> None:
    model = model_of(name)
    batch, units = tiny_batch(model), find_units(model)
    parts = [{key: value[i : i + 3] for key, value in batch.items()} for i in (0, 3)]
    found = cosine_scores(model, units, parts, similarity=True)
    stack = "encoder" if name == "t5" else "decoder"
    blocks = {"llama": "model.layers", "opt": "model.decoder.layers", "t5": "encoder.block"}[name]
    got = captured(model, batch, [f"{blocks}.{i}" for i in range(3)])
    states = [got[f"{blocks}.{i}"][0] for i in range(3)] + [got[f"{blocks}.2"][1]]
    mask = of_stack(real_tokens(batch, units.family), stack)
    for i in range(4):
        for j in range(4):
            wanted = 1.0 - definition(states[i], states[j], mask)
            assert float(found.similarity[stack][i, j]) == pytest.approx(wanted, abs=1e-6)


def test_scores_need_tokens_and_finite_streams() -> None:
    model = model_of("llama")
    batch, units = tiny_batch(model), find_units(model)
    with pytest.raises(UserError, match="no token that is not padding"):
        cosine_scores(model, units, [batch | {"attention_mask": torch.zeros_like(batch["attention_mask"])}])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match="not finite at mlp 1"):
        cosine_scores(model, units, [batch])
    assert hooks(model) == 0


def test_layer_classes() -> None:
    blocks = torch.tensor([0, 0, 1, 1, 1, 1, 2])  # inputs of six layers and the output: outputs 0 | 1 1 1 1 | 2
    alike = torch.where(blocks[:, None] == blocks[None], 1.0, 0.1)
    assert layer_classes(alike) == ([0], [1, 2, 3, 4], [5])
    assert layer_classes(torch.ones(4, 4)) == ([], [0, 1, 2], [])


# ---------------------------------------------------------------------- gates and drops


def some_units(units: Units, step: int = 2) -> list[Unit]:
    """Every second sublayer that may go, the attention of layer 0 included where it may."""
    return [unit for unit in units.sublayers if unit not in units.protected][::step]


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_gate_is_the_dropped_model(name: str) -> None:
    model = model_of(name)
    batch, units = tiny_batch(model), find_units(model)
    dense = logits(model, batch)
    off = some_units(units)
    with switched_off(model, units, off):
        gated = logits(model, batch)
        with switched_off(model, units, units.sublayers[1:2]):  # nested, the same unit or another
            pass
        assert torch.equal(logits(model, batch), gated)
    assert torch.equal(logits(model, batch), dense) and gap(gated, dense) > 1e-3
    small = copy.deepcopy(model)
    drop(small, units, off)
    assert torch.equal(logits(small, batch), gated)
    params = unit_costs(model, units, "params", Shape())
    assert count_parameters(model) - count_parameters(small) == sum(params[unit] for unit in off)
    blocks = parameter_cost(model, units.family, units.spaces).total(PruningPlan.dense(units.spaces).counts)
    assert sum(params[unit] for unit in units.sublayers) == blocks


def test_a_gate_opens_again_after_an_error() -> None:
    model = model_of("llama")
    units, before = find_units(model), logits(model, tiny_batch(model))
    with pytest.raises(RuntimeError), switched_off(model, units, attention(0)):
        raise RuntimeError
    assert torch.equal(logits(model, tiny_batch(model)), before)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_cached_generation_without_the_attention_of_layer_0(name: str) -> None:
    model = model_of(name)
    drop(model, find_units(model), [*attention(0), *mlp(1)])
    batch = {key: value.flip(1) for key, value in tiny_batch(model).items() if key != "labels"}
    wanted = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "return_dict_in_generate": True}
    wanted |= {"output_logits": True}
    cached, plain = (model.generate(**batch, **wanted, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    assert gap(torch.stack(cached.logits), torch.stack(plain.logits)) < 1e-4


@pytest.mark.parametrize("name", ["llama", "bert", "gpt_neox", "t5"])
def test_dropped_models_reload_equal(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    units, batch = find_units(model), tiny_batch(model)
    plan = drop(model, units, some_units(units, 3))
    assert save_pruned(model, tmp_path, plan) == 0.0
    again = load_pruned(tmp_path).eval()
    assert torch.equal(logits(again, batch), logits(model, batch))
    assert count_parameters(again) == count_parameters(model)


def test_whole_layers_and_bad_units() -> None:
    model = model_of("llama")
    units = find_units(model)
    assert plan_without(units, [Unit("block", 2)]) == plan_without(units, [*attention(2), *mlp(2)])
    with pytest.raises(UserError, match="attention 3 does not exist: the model has layers 0 to 2"):
        plan_without(units, attention(3))
    with pytest.raises(UserError, match="attention 1 is listed twice"):
        plan_without(units, attention(1, 1))


def test_warnings() -> None:
    units = find_units(model_of("llama"))
    assert depth_warning(units, attention(1)) is None
    assert depth_warning(units, attention(0, 1)).startswith("33% of all sublayers")
    assert collapse_warning(5.0, 50.0, "perplexity") is None
    assert "from 5 to 51, more than 10 times" in collapse_warning(5.0, 51.0, "perplexity")
    with pytest.raises(UserError, match="Without these units the perplexity is not finite"):
        collapse_warning(5.0, math.inf, "perplexity")


# ---------------------------------------------------------------------- impact


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "distilbert"])
def test_loss_is_weighted_by_tokens(name: str) -> None:
    model = model_of(name)
    batch, units = tiny_batch(model), find_units(model)
    with torch.no_grad():
        whole = math.exp(float(model(**batch).loss))
    parts = [{key: value[i : i + 3] for key, value in batch.items()} for i in (0, 3)]
    assert exp_loss(model, units, [batch]) == pytest.approx(whole, rel=1e-5)
    assert exp_loss(model, units, parts) == pytest.approx(whole, rel=1e-5)


class Table(Losses):
    """Losses made by hand: layer → loss without it; what is off together adds up."""

    def __init__(self, units: Units, harm: dict[Unit, float]) -> None:
        super().__init__(None, units, ())  # type: ignore[arg-type]
        self.harm, self.asked = harm, []

    def without(self, off):  # type: ignore[no-untyped-def]
        off = tuple(off)
        self.asked.append(off)
        return 10.0 + sum(self.harm[unit] for unit in off)

    def measure(self, sets, watch):  # type: ignore[no-untyped-def]
        pass


def test_order_of_impact_with_harm_and_without() -> None:
    """Helpful removals come first, the larger unit before the smaller; then harm per cost."""
    units = find_units(model_of("llama"))
    harm = dict(zip(attention(0, 1, 2) + mlp(0, 1, 2), (3.0, 1.0, -1.0, 4.0, -1.0, 2.0), strict=True))
    share = {unit: 0.25 if unit.kind == "mlp" else 0.1 for unit in harm}
    found = {one.unit: one for one in impacts(Table(units, harm), list(harm), (), share)}
    assert found[Unit("attention", 0)].relative == pytest.approx(0.3)
    assert found[Unit("attention", 0)].normalised == pytest.approx(3.0)
    assert found[Unit("mlp", 1)].normalised == pytest.approx(-0.025)
    order = [one.unit for one in sorted(found.values(), key=lambda one: one.order)]
    assert order == [Unit("mlp", 1), Unit("attention", 2), *mlp(2), *attention(1), *mlp(0), *attention(0)]
    by_none = sorted(impacts(Table(units, harm), list(harm), (), dict.fromkeys(harm, 1.0)), key=lambda one: one.order)
    assert [one.unit for one in by_none][2:] == [*attention(1), *mlp(2), *attention(0), *mlp(0)]
    dense, current = (
        impacts(Table(units, harm), mlp(0), attention(0), share, base)[0] for base in ("dense", "current")
    )
    assert dense.relative == pytest.approx(0.7) and current.relative == pytest.approx(4 / 13)
    assert Impact(mlp(0)[0], math.inf, math.inf, 0.1).order > dense.order


def test_progressive_choice_equals_search_by_dropping(tmp_path: Path) -> None:
    """Against models that really lost the units; a second search finds all it needs on record."""
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    recorded: dict = {}
    share = shares(unit_costs(model, units, "params", Shape()), units)
    losses = Losses(model, units, [batch], record=recorded.__setitem__)
    candidates = candidates_of(units, "joint")
    chosen = choose(candidates, "joint", Budget(count=3), ImpactRanker(losses, share), "iterative").units

    def loss_without(off: tuple[Unit, ...]) -> float:
        small = copy.deepcopy(model)
        drop(small, units, off)
        with torch.no_grad():
            return math.exp(float(small(**batch).loss))

    dropped: tuple[Unit, ...] = ()
    base = math.exp(float(model(**batch).loss.detach()))
    for _ in range(3):
        keys = {}
        for unit in candidates:
            if unit not in dropped:
                relative = (loss_without((*dropped, unit)) - base) / base
                keys[unit] = (relative > 0, relative * share[unit] if relative <= 0 else relative / share[unit])
        dropped += (min(keys, key=keys.__getitem__),)
        base = loss_without(dropped)
    assert chosen == dropped and len(recorded) == 1 + 6 + 5 + 4
    again: dict = {}
    known = Losses(None, units, (), known=recorded, record=again.__setitem__)  # type: ignore[arg-type]
    assert choose(candidates, "joint", Budget(count=3), ImpactRanker(known, share), "iterative").units == chosen
    assert not again


# ---------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "olmo2"])
def test_memory_counts_weights_and_the_cache(name: str) -> None:
    model = model_of(name)
    units, shape = find_units(model), Shape(2, 7)
    with torch.no_grad():
        ids = torch.full((2, 7), 5)
        cache = model(input_ids=ids, use_cache=True).past_key_values
    costs, params = (unit_costs(model, units, cost, shape) for cost in ("memory", "params"))
    for unit in units.sublayers:
        cached = 0
        if unit.kind == "attention":
            layer = cache.layers[unit.layer]
            cached = 4 * (layer.keys.numel() + layer.values.numel())
            assert cache_bytes(model, units, unit, shape) == cached
        assert costs[unit] == 4 * params[unit] + cached
    assert costs[Unit("block", 1)] == costs[Unit("attention", 1)] + costs[Unit("mlp", 1)]


def test_latency_is_shared_within_a_kind() -> None:
    model = model_of("llama")
    units = find_units(model)
    costs = unit_costs(model, units, "latency", Shape(1, 8, max_seconds=0.5))
    assert len({costs[unit] for unit in attention(0, 1, 2)}) == 1 and min(costs.values()) > 0
    assert sum(shares(costs, units)[unit] for unit in units.sublayers) == pytest.approx(1.0)
    assert set(unit_costs(model, units, "none", Shape()).values()) == {1.0}


# ---------------------------------------------------------------------- choosing


class Fixed:
    """Ranks by a table, and remembers what it was asked."""

    def __init__(self, table: dict[Unit, float]) -> None:
        self.table, self.asked = table, []

    def rank(self, candidates, dropped):  # type: ignore[no-untyped-def]
        from apt_trainer.studies.select import Ranked

        self.asked.append((tuple(candidates), tuple(dropped)))
        return [Ranked(unit, self.table[unit]) for unit in sorted(candidates, key=self.table.__getitem__)]


def test_joint_ranks_attentions_and_feed_forwards_in_one_list() -> None:
    """The k smallest of 2 L scores; those from L on are feed-forwards."""
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    scores = cosine_scores(model, units, [batch]).scores
    flat = torch.tensor([scores[unit] for unit in attention(0, 1, 2) + mlp(0, 1, 2)])
    chosen = choose(candidates_of(units, "joint"), "joint", Budget(count=4), CosineRanker(model, units, [batch]))
    expected = [Unit("attention" if i < 3 else "mlp", i % 3) for i in flat.argsort()[:4].tolist()]
    assert list(chosen.units) == expected and {unit.kind for unit in expected} == {"attention", "mlp"}
    assert len(chosen.steps) == 1 and len(chosen.steps[0]) == 6


def test_iterative_ranks_anew_and_never_chooses_a_unit_twice() -> None:
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    ranker = CosineRanker(model, units, [batch])
    chosen = choose(candidates_of(units, "joint"), "joint", Budget(count=6), ranker, "iterative")
    assert sorted(unit.name for unit in chosen.units) == sorted(unit.name for unit in units.sublayers)
    for step, number in zip(chosen.steps, range(6), strict=True):
        assert not set(chosen.units[:number]) & {one.unit for one in step} and step[0].unit == chosen.units[number]
    fixed = Fixed(dict(zip(attention(0, 1, 2), (2.0, 3.0, 1.0), strict=True)))
    choose(attention(0, 1, 2), "attention", Budget(count=2), fixed, "iterative")
    assert [asked[1] for asked in fixed.asked] == [(), attention(2)]


def test_consecutive_runs_are_scored_over_as_many_layers_as_go() -> None:
    """n layers from i lead from the input of i to that of i + n, not of i + n + 1."""
    alike = torch.full((6, 6), 0.1)
    alike[1, 3] = alike[3, 1] = 0.9  # layers 1 and 2
    alike[2, 5] = alike[5, 2] = 0.99  # layers 2, 3 and 4: what a window one too long would look at
    blocks = [Unit("block", layer) for layer in range(5)]
    chosen = choose_consecutive(blocks, Budget(count=2), {"decoder": alike})
    assert chosen.units == (blocks[1], blocks[2]) and len(chosen.steps) == 4
    assert choose_consecutive(blocks, Budget(count=3), {"decoder": alike}).units == tuple(blocks[2:])
    apart = [blocks[i] for i in (0, 1, 3, 4)]
    assert choose_consecutive(apart, Budget(count=2), {"decoder": alike}).units in (
        (blocks[0], blocks[1]),
        tuple(blocks[3:]),
    )
    with pytest.raises(UserError, match="No run of neighbouring layers"):
        choose_consecutive(apart, Budget(count=3), {"decoder": alike})
    half = Budget(fraction=0.4, share=dict.fromkeys(blocks, 0.2))
    assert choose_consecutive(blocks, half, {"decoder": alike}).units == (blocks[1], blocks[2])


def test_a_whole_layer_run_by_cosine_is_the_block_with_the_least_score() -> None:
    model = model_of("llama")
    units, batch = find_units(model), tiny_batch(model)
    found = cosine_scores(model, units, [batch], similarity=True)
    blocks = candidates_of(units, "consecutive")
    assert choose_consecutive(blocks, Budget(count=1), found.similarity).units == (min(blocks, key=found.scores.get),)


def test_baselines() -> None:
    units = find_units(model_of("llama"))
    joint = candidates_of(units, "joint")
    reverse = choose(joint, "joint", Budget(count=3), ReverseRanker(units)).units
    assert reverse == (Unit("mlp", 2), Unit("attention", 2), Unit("mlp", 1))
    drawn = [choose(joint, "joint", Budget(count=4), RandomRanker(seed)).units for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


def test_budgets_and_protected_layers() -> None:
    units = find_units(model_of("llama"))
    assert candidates_of(units, "attention", protect=[0, -1]) == attention(1)
    share = dict.fromkeys(attention(0, 1, 2), 0.1)
    order = Fixed(dict(zip(attention(0, 1, 2), (1.0, 2.0, 3.0), strict=True)))
    for fraction, number in ((0.1, 1), (0.11, 2), (0.3, 3)):
        chosen = choose(attention(0, 1, 2), "attention", Budget(fraction=fraction, share=share), order)
        assert chosen.units == attention(0, 1, 2)[:number]
    for budget, message in (
        (Budget(count=4), "count=4 is more than the 3 units"),
        (Budget(fraction=0.31, share=share), "all units of kind 'attention' make up 0.300"),
    ):
        with pytest.raises(UserError, match=message):
            choose(attention(0, 1, 2), "attention", budget, order)
    for values in ({}, {"count": 1, "fraction": 0.1}, {"count": 0}, {"fraction": 1.0}):
        with pytest.raises(UserError):
            Budget(**values)
    with pytest.raises(UserError, match="protect=3 is no layer"):
        candidates_of(units, "mlp", protect=[3])
    with pytest.raises(UserError, match="no unit of kind 'block'"):
        candidates_of(units, "block", protect=[0, 1, 2])
    with pytest.raises(UserError, match="Did you mean 'joint'"):
        candidates_of(units, "join")


# ---------------------------------------------------------------------- drop lists


def test_drop_lists_both_ways(tmp_path: Path) -> None:
    units = find_units(model_of("llama"))
    dropped = (Unit("mlp", 0), Unit("block", 2), Unit("attention", 1))
    data = lists.to_json(units, dropped, "llama")
    assert data["drop_attn_list"] == [1, 2] and data["drop_mlp_list"] == [0, 2]
    path = tmp_path / "list.json"
    for content, expected in (
        (data, dropped),
        ({"drop_list": data}, dropped),
        ({"drop_attn_list": [2, 0], "drop_mlp_list": [1]}, attention(2, 0) + mlp(1)),
        ({"drop_attn_list": [False, True, True]}, attention(1, 2)),
        ({"model_type": "llama", "num_hidden_layers": 3, "drop_mlp_list": [1]}, mlp(1)),
    ):
        path.write_text(json.dumps(content))
        assert lists.read(str(path), units, "llama") == expected
    two = find_units(model_of("t5"))
    data = lists.to_json(two, [Unit("mlp", 1, "encoder"), Unit("cross_attention", 0)], "t5")
    assert "drop_attn_list" not in data and lists.from_json(data, two, "t5")[1] == Unit("cross_attention", 0)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"drop_attn_list": [1]}, ["drop_attn_list=[1]", "[1, 2]"]),
        ({"drop_mlp_list": [0, 1, 2]}, ["drop_mlp_list=[0, 1, 2]", "[0, 2]"]),
        ({"drop_mlp_list": [True, False, False]}, ["drop_mlp_list=[0]", "[0, 2]"]),
        ({"units": [{"kind": "mlp", "layer": 0, "stack": "decoder"}]}, ["drop_attn_list=[1, 2]", "[]"]),
    ],
)
def test_a_list_that_was_edited_in_one_place_is_refused(changes: dict, shown: list[str], tmp_path: Path) -> None:  # type: ignore[type-arg]
    units = find_units(model_of("llama"))
    dropped = (Unit("mlp", 0), Unit("block", 2), Unit("attention", 1))
    data, path = lists.to_json(units, dropped, "llama"), tmp_path / "list.json"
    path.write_text(json.dumps(data | changes))
    with pytest.raises(UserError) as caught:
        lists.read(str(path), units, "llama")
    assert all(part in str(caught.value) for part in [str(path), "'units'", *shown])
    for same in ({"drop_attn_list": [2, 1]}, {"drop_mlp_list": [True, False, True]}, {"drop_attn_list": None}):
        path.write_text(json.dumps(data | same))
        assert lists.read(str(path), units, "llama") == dropped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"drop_attn_list": [3]}, "attention 3 does not exist"),
        ({"drop_attn_list": [-1]}, "attention -1 does not exist"),
        ({"drop_attn_list": [True] * 4}, "has 4 values, the model 3 layers"),
        ({"drop_attn_list": ["1"]}, "must be a list of layer numbers"),
        ({"drop_attn_list": []}, "lists no unit"),
        ({"drop_attn_list": [1], "model_type": "mistral"}, "of type 'mistral', this one is 'llama'"),
        ({"drop_attn_list": [1], "num_hidden_layers": 32}, "with layers {'decoder': 32}"),
        ({"format_version": 1, "layers": {"decoder": 5}, "units": []}, "with layers {'decoder': 5}"),
        ({"format_version": 2, "units": []}, "format_version=2"),
        ({"format_version": 1, "units": [{"kind": "head", "layer": 1}]}, "is no unit"),
        ({"layers": [1]}, "is no drop list"),
        ([1, 2], "is no drop list"),
    ],
)
def test_bad_drop_lists(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        lists.read(str(path), find_units(model_of("llama")), "llama")
    assert message in str(caught.value) and str(path) in str(caught.value)


# ---------------------------------------------------------------------- metrics

# base average, then (average, speed-up, printed γ) of rows of the tables of LLM-Drop
SDR_ROWS = {
    68.2: [
        (65.8, 1.11, 0.22),
        (60.7, 1.24, 0.31),
        (66.9, 1.04, 0.32),
        (61.9, 1.08, 0.79),
        (68.5, 1.05, -0.05),
        (68.1, 1.13, 0.01),
        (66.1, 1.29, 0.07),
        (64.9, 1.40, 0.08),
    ],
    70.3: [
        (67.1, 1.14, 0.23),
        (58.6, 1.32, 0.37),
        (66.9, 1.03, 1.13),
        (53.4, 1.06, 2.82),
        (69.9, 1.10, 0.04),
        (69.8, 1.23, 0.02),
        (67.3, 1.40, 0.08),
    ],
    73.9: [
        (73.8, 1.21, 0.0),
        (73.8, 1.35, 0.0),
        (71.5, 1.48, 0.05),
        (66.9, 1.62, 0.11),
        (67.7, 1.14, 0.44),
        (54.4, 1.30, 0.65),
        (49.3, 1.67, 0.37),
        (72.5, 1.05, 0.28),
        (65.9, 1.08, 1.0),
        (55.7, 1.17, 1.07),
    ],
}


@pytest.mark.parametrize(("base", "row"), [(base, row) for base, rows in SDR_ROWS.items() for row in rows])
def test_sdr_is_what_the_tables_print(base: float, row: tuple[float, float, float]) -> None:
    new, speedup, printed = row
    assert sdr(base, new, speedup) == pytest.approx(printed, abs=0.015)


def test_relative_sdr_and_no_speed_up() -> None:
    assert sdr_relative(80.0, 76.0, 1.25) == pytest.approx(5.0 / 25)
    assert sdr(80.0, 76.0, 1.004) is None and sdr_relative(80.0, 76.0, 0.996) is None
    assert sdr(80.0, 76.0, 0.9) == pytest.approx(-0.4)


# ---------------------------------------------------------------------- calibration data


def test_windows_of_text() -> None:
    model = tiny_llama()
    units, tokenizer = find_units(model), word_tokenizer()
    found = from_text(words(43), tokenizer, model, units, samples=3, length=8, batch_size=2)
    ids = torch.tensor(tokenizer(words(43), add_special_tokens=False)["input_ids"])
    rows = torch.cat([batch["input_ids"] for batch in found.batches])
    assert torch.equal(rows, ids[:40].view(5, 8)[[0, 2, 4]]) and found.rows == 3 and found.has_labels
    assert found.sha256 == from_text(words(43), tokenizer, model, units, 3, 8).sha256
    assert found.sha256 != from_text(words(43, seed=1), tokenizer, model, units, 3, 8).sha256
    for length, message in ((3, "at least 4"), (10**6, "positions of the model")):
        with pytest.raises(UserError, match=message):
            from_text(words(43), tokenizer, model, units, 3, length)
    with pytest.raises(UserError, match="7 tokens, fewer than one window of 8"):
        from_text(words(7), tokenizer, model, units, 3, 8)


def test_windows_of_other_heads() -> None:
    tokenizer = word_tokenizer()
    model = tiny_model("t5", "ForConditionalGeneration")
    (batch,) = from_text(words(20), tokenizer, model, find_units(model), 1, 9).batches
    assert batch["input_ids"].shape == (1, 4) and batch["labels"].shape == (1, 5)
    model = tiny_model("bert", "ForMaskedLM")
    with pytest.raises(UserError, match="no mask token"):
        from_text(words(20), tokenizer, model, find_units(model), 1, 8)
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    (batch,) = from_text(words(20), tokenizer, model, find_units(model), 1, 8).batches
    asked = batch["labels"] != -100
    assert asked.any() and (batch["input_ids"][asked] == tokenizer.mask_token_id).all()
    model = tiny_model("bert")
    assert not from_text(words(20), tokenizer, model, find_units(model), 1, 8).has_labels
    found = from_rows([json.dumps({"text": words(n), "label": 2}) for n in (5, 3, 6)], tokenizer, model, 2, 4)
    assert found.batches[0]["attention_mask"].sum(1).tolist() == [4, 3]
    assert found.batches[0]["labels"].tolist() == [2, 2]
    for line, message in (
        ("{", "Row 1 is not"),
        ('{"text": "a"}', "Row 1 is not"),
        ('{"text": "a", "label": 3}', "the model has 3 labels"),
        ('{"text": "a", "label": "good"}', "has the label 'good'"),
    ):
        with pytest.raises(UserError, match=message):
            from_rows([line], tokenizer, model, 1, 4)


# ---------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("dense"), words(200))


def test_analyze_stops_and_goes_on(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apt_trainer.scoring.sublayers import impact

    out = tmp_path / "out"
    words_ = ["analyze", *model_and_data(saved), "--output", str(out)]
    calls = []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return exp_loss(*args)

    monkeypatch.setattr(impact, "exp_loss", interrupted)
    assert cli.main(words_) == 130 and not (out / "scores.json").exists()
    assert cli.main(words_) == 2 and "--resume" in capsys.readouterr().err
    other = [word if word != "8" else "9" for word in words_]
    assert cli.main([*other, "--resume"]) == 2 and "another model, data or tasks" in capsys.readouterr().err
    assert cli.main([*words_, "--resume"]) == 0
    found = json.loads((out / "scores.json").read_text())
    units = len(found["units"])
    assert len(calls) == 4 + units + 1 - 3  # every unit and the dense model, once; the fourth was broken off
    monkeypatch.undo()
    assert cli.main(["analyze", *model_and_data(saved), "--output", str(tmp_path / "whole")]) == 0
    assert json.loads((tmp_path / "whole" / "scores.json").read_text()) == found
    assert (out / "scores.png").read_bytes()[:4] == b"\x89PNG" and not (out / "impact.jsonl").exists()
    table = (out / "scores.md").read_text()
    assert all(unit["name"] in table for unit in found["units"]) and table in capsys.readouterr().out
    ranks = sorted(unit["rank"] for unit in found["units"] if unit["kind"] != "block")
    assert ranks == list(range(1, len(ranks) + 1))
    assert cli.main([*words_, "--resume"]) == 2


def test_analyze_goes_on_after_a_stop_in_the_cosine_pass(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.scoring.sublayers import impact
    from apt_trainer.studies import analyze as verb

    out = tmp_path / "out"
    words_ = ["analyze", *model_and_data(saved), "--output", str(out)]
    passes = []

    def stopped(*args, **options):  # type: ignore[no-untyped-def]
        passes.append(1)
        if len(passes) == 1:
            raise KeyboardInterrupt
        return cosine_scores(*args, **options)

    def stops(*args, **options):  # type: ignore[no-untyped-def]
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "cosine_scores", stopped)
    assert cli.main(words_) == 130 and (out / "impact.jsonl").exists()
    assert cli.main(words_) == 2 and "--resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(verb, "impacts", stops)
        assert cli.main([*words_, "--resume"]) == 130 and len(passes) == 2
    with monkeypatch.context() as patch:
        patch.setattr(verb, "plot_scores", stops)
        assert cli.main([*words_, "--resume"]) == 130 and (out / "impact.jsonl").exists()
    with monkeypatch.context() as patch:
        patch.setattr(impact, "exp_loss", stops)  # all is kept
        assert cli.main([*words_, "--resume"]) == 0
    assert len(passes) == 2 and not (out / "impact.jsonl").exists()
    monkeypatch.undo()
    assert cli.main(["analyze", *model_and_data(saved), "--output", str(tmp_path / "whole")]) == 0
    for name in ("scores.json", "scores.md"):
        assert (tmp_path / "whole" / name).read_text() == (out / name).read_text()


def test_a_dense_loss_that_is_not_finite_is_told_before_the_pass(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.scoring.sublayers import impact
    from apt_trainer.studies import analyze as verb

    monkeypatch.setattr(verb, "cosine_scores", lambda *args, **options: pytest.fail("the pass ran"))
    calls = []
    monkeypatch.setattr(impact, "exp_loss", lambda *args: calls.append(1) or math.nan)
    for methods in (["nri"], ["cosine", "nri"]):
        assert cli.main(["analyze", *model_and_data(saved), "--output", str(tmp_path), "--methods", *methods]) == 2
        assert "perplexity of the full model is not finite" in capsys.readouterr().err
    drop_ = ["drop", *model_and_data(saved), "--method", "nri", "--count", "1", "--output", str(tmp_path)]
    assert cli.main(drop_) == 2 and "perplexity of the full model is not finite" in capsys.readouterr().err
    assert len(calls) == 3 and not list(tmp_path.iterdir())  # nothing that the next try would have to resume


def test_drop_end_to_end(saved: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "small"
    words_ = ["--kind", "joint", "--count", "2", "--method", "nri", "--strategy", "iterative", "--output", str(out)]
    assert cli.main(["drop", *model_and_data(saved), *words_]) == 0
    printed = capsys.readouterr()
    report = json.loads((out / "drop_report.json").read_text())
    small = load_pruned(out).eval()
    assert count_parameters(small) == report["parameters_after"] < report["parameters"]
    assert report["reload_difference"] == 0.0 and len(report["dropped"]) == 2 and len(report["steps"]) == 2
    assert "perplexity" in printed.out and report["method_name"] == "NRI (apt_trainer definition)"
    dense = tiny_llama()
    units, tokenizer = find_units(dense), word_tokenizer()
    batches = from_text(words(200), tokenizer, dense, units, 64, 8).batches
    assert report["loss_before"] == pytest.approx(exp_loss(dense, units, batches), rel=1e-6)
    assert report["loss_after"] == pytest.approx(exp_loss(small, units, batches), rel=1e-6)
    again = tmp_path / "again"
    listed = ["--drop_list", str(out / "drop_list.json"), "--output", str(again)]
    assert cli.main(["drop", "--model", str(saved / "model"), "--device", "cpu", *listed]) == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(logits(load_pruned(again).eval(), {"input_ids": ids}), logits(small, {"input_ids": ids}))
    printed = capsys.readouterr()
    assert "not measured" in printed.out and "warning: The perplexity was not measured" in printed.err


@pytest.mark.parametrize("method", ["reverse", "random"])
def test_a_drop_without_data_warns_that_nothing_was_measured(method: str, saved: Path, tmp_path: Path, capsys) -> None:
    place = ["drop", "--model", str(saved / "model"), "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main([*place, "--method", method, "--count", "1"]) == 0
    (warning,) = json.loads((tmp_path / "drop_report.json").read_text())["warnings"]
    assert warning.startswith("The perplexity was not measured") and "--data" in warning
    assert f"warning: {warning}" in capsys.readouterr().err


def test_drop_by_a_fraction_of_latency(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apt_trainer.studies import drop as verb

    seconds = {"attention": 3.0, "mlp": 1.0}  # 2 layers: 3/8 and 1/8 each; of parameters mlp is the larger

    def costs(model, units, cost, shape, heads=False):  # type: ignore[no-untyped-def]
        if cost != "latency":
            return unit_costs(model, units, cost, shape, heads)
        asked.append(shape.length)
        measured = unit_costs(model, units, cost, Shape(1, 4, max_seconds=0.1), heads)
        assert min(measured.values()) > 0
        return {unit: sum(seconds[part.kind] for part in units.parts([unit])) for unit in measured}

    monkeypatch.setattr(verb, "unit_costs", costs)
    for number, (kind, fraction, count) in enumerate((("attention", 0.3, 1), ("attention", 0.4, 2), ("mlp", 0.2, 2))):
        asked: list[int] = []
        out = tmp_path / str(number)
        words_ = ["--kind", kind, "--method", "reverse", "--fraction", str(fraction), "--fraction_of", "latency"]
        assert cli.main(["drop", *model_and_data(saved), *words_, "--output", str(out)]) == 0
        report = json.loads((out / "drop_report.json").read_text())
        assert len(report["dropped"]) == count and report["fraction_of"] == "latency" and asked == [8]
    words_ = ["--kind", "mlp", "--method", "reverse", "--fraction", "0.3", "--fraction_of", "latency"]
    assert cli.main(["drop", *model_and_data(saved), *words_, "--output", str(tmp_path / "much")]) == 2


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_labelled_rows_with_a_classification_head(name: str, tmp_path: Path, capsys) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"vocab_size": 60, "pad_token_id": 0, "num_labels": 3, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **sizes)).eval()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": words(3 + i % 4, i), "label": i % 3}) for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    place = ["--model", str(tmp_path / "model"), "--device", "cpu", "--batch_size", "4"]
    data = ["--data", str(tmp_path / "rows.jsonl")]
    out = tmp_path / "out"
    assert cli.main(["analyze", *place, *data, "--output", str(out)]) == 0
    found = json.loads((out / "scores.json").read_text())
    units = find_units(model)
    batches = from_rows(rows, word_tokenizer(), model, 64, 32, 4).batches
    assert found["loss_name"] == "exp(loss)"
    assert found["loss_dense"] == pytest.approx(exp_loss(model, units, batches), rel=1e-6)
    by_name = {row["name"]: row for row in found["units"]}
    last = Unit("mlp", 2, units.stacks[0])
    with switched_off(model, units, [last]):
        assert by_name["mlp 2"]["loss"] == pytest.approx(exp_loss(model, units, batches), rel=1e-6)
    assert by_name["mlp 2"]["cosine"] == pytest.approx(cosine_scores(model, units, batches).scores[last], abs=1e-6)

    small = tmp_path / "small"
    words_ = ["--kind", "joint", "--count", "2", "--method", "nri", "--output", str(small)]
    assert cli.main(["drop", *place, *data, *words_]) == 0
    report = json.loads((small / "drop_report.json").read_text())
    again = load_pruned(small).eval()
    assert report["loss_after"] == pytest.approx(exp_loss(again, find_units(model), batches), rel=1e-6)
    assert report["loss_name"] == "exp(loss)" and again.config.num_labels == 3 and len(report["dropped"]) == 2

    (tmp_path / "text.txt").write_text(words(60))
    capsys.readouterr()
    plain = [*place, "--data", str(tmp_path / "text.txt"), "--length", "8"]
    assert cli.main(["analyze", *plain, "--output", str(tmp_path / "no")]) == 2
    assert "no loss on plain text" in capsys.readouterr().err
    assert cli.main(["drop", *plain, "--count", "1", "--output", str(tmp_path / "unmeasured")]) == 0
    (warning,) = json.loads((tmp_path / "unmeasured" / "drop_report.json").read_text())["warnings"]
    assert "exp(loss) was not measured" in warning and ".jsonl" in warning


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_after_a_drop(form: str, tmp_path: Path) -> None:
    from apt_trainer.evaluate.quantization import quantize

    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 4}
    save_dense(tmp_path, words(200), **sizes)
    words_ = ["--kind", "joint", "--count", "2", "--output", str(tmp_path / "small")]
    assert cli.main(["drop", *model_and_data(tmp_path), *words_]) == 0
    report = json.loads((tmp_path / "small" / "drop_report.json").read_text())
    small, dense = load_pruned(tmp_path / "small").eval(), tiny_llama(**sizes)
    units = find_units(dense)
    batches = from_text(words(200), word_tokenizer(), dense, units, 64, 8).batches
    found = quantize(small, form)
    gone = {"attention": 4, "mlp": 3}  # linear layers of each
    expected = 7 * 4 - sum(gone[unit["kind"]] for unit in report["drop_list"]["units"])
    assert found.layers == expected and found.weight_bytes < found.weight_bytes_before
    loss = exp_loss(small, units, batches)
    assert loss != report["loss_after"] and loss == pytest.approx(report["loss_after"], rel=0.2)


@pytest.mark.parametrize("kind", ["attention", "mlp", "block", "consecutive"])
def test_drop_by_cosine_fraction(kind: str, saved: Path, tmp_path: Path, capsys) -> None:
    words_ = ["drop", *model_and_data(saved), "--kind", kind, "--fraction", "0.1", "--output", str(tmp_path)]
    assert cli.main(words_) == 0
    report = json.loads((tmp_path / "drop_report.json").read_text())
    assert report["block_parameter_share"] >= 0.1
    allowed = {"attention": ("attention",), "mlp": ("mlp",)}.get(kind, ("block",))
    assert {unit["kind"] for unit in report["drop_list"]["units"]} == set(allowed)
    assert ("warning: " in capsys.readouterr().err) == bool(report["warnings"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--count", "99"], "count=99 is more than the"),
        (["--fraction", "1.5"], "fraction=1.5 must lie between"),
        (["--count", "1", "--length", "5000"], "positions of the model"),
        (["--count", "1", "--data", "only three words"], "taken as the text"),
        (["--count", "1", "--data", "missing.txt"], "there is no such file"),
        (["--count", "1", "--protect", "77"], "protect=77 is no layer"),
        (["--count", "1", "--kind", "consecutive", "--method", "random"], "kind consecutive is chosen by"),
        (["--count", "1", "--kind", "consecutive", "--strategy", "iterative"], "strategy one_shot"),
        (["--drop_list", '{"model_type": "opt", "drop_mlp_list": [1]}'], "of type 'opt', this one is 'llama'"),
        (["--drop_list", '{"num_hidden_layers": 32, "drop_mlp_list": [1]}'], "with layers {'decoder': 32}"),
        (["--drop_list", '{"drop_mlp_list": [7]}'], "mlp 7 does not exist"),
    ],
)
def test_bad_input_is_told_before_weights_load(
    changes: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    if changes[0] == "--drop_list":
        (tmp_path / "list.json").write_text(changes[1])
        changes = ["--drop_list", str(tmp_path / "list.json")]
    assert cli.main(["drop", *model_and_data(saved), "--output", str(out), *changes]) == 2
    assert message in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("verb", ["analyze", "drop", "curve", "paint"])
def test_a_family_without_a_table_is_told_before_weights_load(
    verb: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=60).save_pretrained(tmp_path / "model")  # no tokenizer
    place = ["--model", str(tmp_path / "model"), "--data", str(saved / "text.txt")]
    out = tmp_path / "out"
    more = {"drop": ["--count", "1"], "curve": ["--test", str(saved / "text.txt")]}.get(verb, [])
    assert cli.main([verb, *place, "--output", str(out), *more]) == 2
    error = capsys.readouterr().err
    assert "model_type 'gpt_bigcode' has no ModelFamily. Nearest is " in error and not out.exists()


def test_a_model_that_breaks_down_is_not_written(saved: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from apt_trainer.studies import drop as verb

    values = iter([5.0, math.inf])
    monkeypatch.setattr(verb, "exp_loss", lambda *args: next(values))
    assert cli.main(["drop", *model_and_data(saved), "--count", "1", "--output", str(tmp_path / "out")]) == 2
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())
    small = tmp_path / "small"
    monkeypatch.undo()
    assert cli.main(["drop", *model_and_data(saved), "--count", "1", "--output", str(small)]) == 0
