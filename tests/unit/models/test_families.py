"""What must hold for every family, whatever its layout: one test per rule, all families in each."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import (
    ALL_TASKS,
    LANGUAGE_MODELS,
    VOCABULARY,
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
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from apt_trainer import load_pruned
from apt_trainer.distillation import snapshot
from apt_trainer.measure import count_flops, count_parameters
from apt_trainer.models import HIDDEN, Space, family_of
from apt_trainer.models.base import linear_shape
from apt_trainer.models.batch import of_stack, real_tokens
from apt_trainer.models.modeling_apt import STUB_KINDS
from apt_trainer.plan.cost import flops_cost, parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring.kurtosis import contributions
from apt_trainer.scoring.magnitude import Magnitude
from apt_trainer.scoring.salience import Salience
from apt_trainer.scoring.taylor import Taylor
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.adapters import adapters, grow_rank, merge_adapters
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore
from apt_trainer.surgery.slicing import EditLog

NAMES = tuple(LANGUAGE_MODELS)
KINDS = ("heads", "neurons", "hidden")
GONE = {"layers.0.heads", "layers.1.neurons", "layers.2.heads"}
GONE |= {"encoder.1.heads", "encoder.2.neurons", "decoder.0.neurons", "decoder.0.cross_heads", "decoder.1.heads"}


def language_model(name: str, **extra: object) -> PreTrainedModel:
    return tiny_model(name, LANGUAGE_MODELS[name], **extra)


def back_ends(name: str) -> tuple[str, ...]:
    """Attention implementations; transformers has no other for Gemma 2."""
    return ("eager",) if name == "gemma2" else ("eager", "sdpa")


def gone(spaces: list[Space]) -> tuple[str, ...]:
    """Sublayers to take away: the attention of the first layer, where it may go, and some others."""
    return tuple(space.name for space in spaces if space.name in GONE)


def a_plan(spaces: list[Space], scenario: str, seed: int = 31) -> PruningPlan:
    kinds = {"all": KINDS, "gone": KINDS, "only_gone": ()}.get(scenario, (scenario,))
    vanish = gone(spaces) if "gone" in scenario else ()
    return random_plan(spaces, PruningPlan.dense(spaces), seed, kinds, vanish)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return gap(a, b) <= 1e-5 * max(1.0, float(b.abs().max()))


def cut(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    family, spaces, dense = parts(model)
    apply_plan(copied, family, spaces, dense, plan)
    return copied


def hidden_states(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
    keys = [key for key in output if key.endswith("hidden_states")]
    return [state for key in keys for state in output[key]]


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", NAMES)
def test_every_dimension_of_a_prunable_width_is_claimed(name: str) -> None:
    """Nothing else in a tiny model is as wide as its units, so a forgotten slice shows."""
    model = language_model(name)
    _, spaces, _ = parts(model)
    claimed = {f"{part.module}/{part.side}" for space in spaces for part in space.slices}
    widths = {space.size * sum(part.parts) for space in spaces for part in space.slices}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or "relative_attention_bias" in path:
            continue
        if weight.dim() == 1 or isinstance(module, nn.Embedding):
            ends = {"out": weight.shape[-1]}
        else:
            ends = dict(zip(("out", "in"), linear_shape(module), strict=True))
        assert not {f"{path}/{side}" for side, size in ends.items() if size in widths - {VOCABULARY}} - claimed


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("scenario", ["heads", "neurons", "hidden", "all", "gone"])
@pytest.mark.parametrize("name", NAMES)
def test_binary_masks_equal_the_cut(name: str, scenario: str) -> None:
    """With adapters everywhere; hidden states are those of the cut model with zeros between."""
    model = language_model(name)
    family, spaces, dense = parts(model)
    adapted(model, everywhere=True)
    plan, batch = a_plan(spaces, scenario), tiny_batch(model)
    before = logits(model, batch)
    hidden_states(model, batch)  # hooks of transformers, which stay
    number = hooks(model)
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts)
    assert close(logits(model, batch), before)
    store.move(dense.survivors(plan), 1.0)
    masked, wide = logits(model, batch), hidden_states(model, batch)
    store.close()
    assert hooks(model) == number and torch.equal(logits(model, batch), before)
    apply_plan(model, family, spaces, dense, plan)
    after, narrow = logits(model, batch), hidden_states(model, batch)
    assert close(masked, after) and gap(before, after) > 1e-2
    live = list(plan.kept[HIDDEN])
    dead = [unit for unit in dense.kept[HIDDEN] if unit not in live]
    for ours, theirs in zip(wide, narrow, strict=True):
        assert close(ours[..., live], theirs) and not ours[..., dead].any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_under_binary_masks_equal_those_of_the_cut(name: str) -> None:
    model = language_model(name)
    family, spaces, dense = parts(model)
    plan, batch, log = a_plan(spaces, "gone"), tiny_batch(model), EditLog()
    small = copy.deepcopy(model)
    apply_plan(small, family, spaces, dense, plan, log)
    small(**batch).loss.backward()
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    model(**batch).loss.backward()
    wide = dict(model.named_parameters())
    for key, parameter in small.named_parameters():
        gradient = wide[key].grad
        for edit in log.edits.get(key, []):
            gradient = gradient.index_select(edit.dim, edit.index)
        assert parameter.grad is not None and close(gradient, parameter.grad), key


# ---------------------------------------------------------------------- cutting


@pytest.mark.parametrize("name", NAMES)
def test_cut_heads_and_neurons_equal_zeroed_output_columns(name: str) -> None:
    """An independent reference: the output projections of a dense model ignore the units that go. In double precision,
    since norms behind a sublayer raise rounding errors."""
    model = language_model(name).double()
    _, spaces, _ = parts(model)
    plan = random_plan(spaces, PruningPlan.dense(spaces), 32, ("heads", "neurons"))
    # Heads that are normalised together stay: lost ones count in the statistics of a dense model.
    whole = {space.name: tuple(range(space.size)) for space in spaces if space.norms and space.name != HIDDEN}
    plan = PruningPlan({**plan.kept, **whole})
    reference = copy.deepcopy(model)
    for space in spaces[:-1]:
        lost = torch.tensor(sorted(set(range(space.size)) - set(plan.kept[space.name])), dtype=torch.long)
        columns = (lost[:, None] * space.channels + torch.arange(space.channels)).reshape(-1)
        gate = reference.get_submodule(space.gate)
        with torch.no_grad():
            (gate.weight.t() if isinstance(gate, Conv1D) else gate.weight)[:, columns] = 0
    batch = tiny_batch(model)
    assert close(logits(cut(model, plan), batch), logits(reference, batch))
    assert gap(logits(model, batch), logits(reference, batch)) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_removed_sublayer_adds_nothing(name: str) -> None:
    """Reference: the dense model with zeros for what the sublayer writes. All of its weights are gone."""
    model = language_model(name)
    family, spaces, _ = parts(model)
    small, reference = cut(model, a_plan(spaces, "only_gone")), copy.deepcopy(model)
    for sublayer in (sub for sub in family.sublayers(model) if sub.space in GONE):
        gate = next(space.gate for space in spaces if space.name == sublayer.space)
        for parameter in reference.get_submodule(gate).parameters():
            nn.init.zeros_(parameter)
        for path in sublayer.modules:
            assert not list(small.get_submodule(path).parameters())
        assert all(type(small.get_submodule(stub.module)) in STUB_KINDS for stub in sublayer.stubs)
    batch = tiny_batch(model)
    assert close(logits(small, batch), logits(reference, batch))


@pytest.mark.parametrize(("name", "attention"), [(n, a) for n in NAMES for a in back_ends(n)])
def test_cut_in_steps_equals_cut_at_once_under_both_attention_back_ends(name: str, attention: str) -> None:
    model = language_model(name, attn_implementation=attention)
    family, spaces, dense = parts(model)
    first = random_plan(spaces, dense, 33)
    last = random_plan(spaces, first, 34, vanish=gone(spaces))
    in_steps, at_once = copy.deepcopy(model), cut(model, last)
    apply_plan(in_steps, family, spaces, dense, first)
    apply_plan(in_steps, family, spaces, first, last)
    expected = at_once.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in in_steps.state_dict().items())
    batch = tiny_batch(model)
    assert torch.equal(logits(in_steps, batch), logits(at_once, batch))
    for other in back_ends(name):
        small = cut(language_model(name, attn_implementation=other), last)
        assert small.config._attn_implementation == other
        assert close(logits(small, batch), logits(at_once, batch))


@pytest.mark.parametrize("name", NAMES)
def test_costs_equal_what_the_cut_model_has(name: str) -> None:
    model = language_model(name)
    family, spaces, dense = parts(model)
    plain = parameter_cost(model, family, spaces)
    whole = parameter_cost(model, family, spaces, blocks_only=False)
    flops = flops_cost(model, family, spaces, 3, 7)
    assert parameter_cost(adapted(copy.deepcopy(model), everywhere=True), family, spaces) == plain
    batch = {key: value for key, value in tiny_batch(model, padded=False, size=3, length=7).items()}
    batch.pop("labels")
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"]
    for scenario in ("only_gone", "gone", "all"):
        plan = a_plan(spaces, scenario)
        small = cut(model, plan)
        blocks = tuple(path + "." for path in family.block_modules(small))
        assert plain.total(plan.counts) == sum(
            p.numel() for key, p in small.named_parameters() if key.startswith(blocks)
        )
        assert whole.total(plan.counts) == count_parameters(small)
        hidden = plan.counts[HIDDEN]
        head = 2 * 3 * 7 * hidden * (VOCABULARY + (hidden if name == "modernbert" else 0))
        assert flops.total(plan.counts) + head == count_flops(small, batch)
        assert dense.counts != plan.counts


# ---------------------------------------------------------------------- adapters and teachers


@pytest.mark.parametrize("name", NAMES)
def test_growth_changes_nothing_and_merging_equals(name: str) -> None:
    model = language_model(name)
    family, spaces, dense = parts(model)
    adapted(model)
    targets = family.default_targets(model)
    assert targets and {path.rsplit(".", 1)[1] for path, _ in adapters(model)} <= {
        t.rsplit(".", 1)[-1] for t in targets
    }
    apply_plan(model, family, spaces, dense, a_plan(spaces, "all"))
    batch = tiny_batch(model)
    expected = logits(model, batch)
    for path, layer in list(adapters(model)):
        grow_rank(path, layer, 5, torch.Generator().manual_seed(0), EditLog())
    assert close(logits(model, batch), expected)
    merge_adapters(model)
    assert not list(adapters(model)) and close(logits(model, batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_stays_as_it_was_when_the_student_is_cut(name: str) -> None:
    model = language_model(name)
    family, spaces, dense = parts(model)
    first = a_plan(spaces, "all")
    apply_plan(model, family, spaces, dense, first)
    batch = tiny_batch(model)
    expected, teacher = logits(model, batch), snapshot(model)
    apply_plan(model, family, spaces, first, random_plan(spaces, first, 35, vanish=gone(spaces)))
    assert torch.equal(logits(teacher, batch), expected)
    assert gap(logits(model, batch), expected) > 1e-3


# ---------------------------------------------------------------------- scores


RULES = {
    "salience": lambda: Salience(0.0, outlier_term=False),
    "outliers": lambda: Salience(0.0, outlier_scaling="none"),
    "taylor": lambda: Taylor(0.0),
    "magnitude": Magnitude,
}


def places_of(space: Space) -> list[tuple[str, str]]:
    return [(space.gate, "input")] if space.gate else [(path, "output") for path in space.places]


def observed(model: PreTrainedModel, batch: dict, places: list[tuple[str, str]]) -> dict:
    """Activation and gradient [tokens, n] of each place, real tokens only, from one backward pass."""
    kept, handles = {}, []
    for path, side in places:

        def keep(place: tuple[str, str], x: torch.Tensor) -> None:
            x.retain_grad()
            kept[place] = x

        module = model.get_submodule(path)
        if side == "input":
            hook = module.register_forward_pre_hook(
                lambda m, args, place=(path, side), keep=keep: keep(place, args[0])
            )
        else:
            hook = module.register_forward_hook(lambda m, args, out, place=(path, side), keep=keep: keep(place, out))
        handles.append(hook)
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return kept


def per_sequence(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[batch, length, n], also where a model flattens its tokens."""
    return x.reshape(*mask.shape, x.shape[-1])


@pytest.mark.parametrize("rule", ["salience", "taylor"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_from_taps_equal_explicit_sums(name: str, rule: str) -> None:
    """(Σ|A|)(Σ|G|) over the real tokens of the place's own stack; Taylor: Σ over sequences of |Σ A·G|."""
    model = language_model(name)
    family, spaces, dense = parts(model)
    apply_plan(model, family, spaces, dense, a_plan(spaces, "gone"))
    counts = a_plan(spaces, "gone").counts
    model.train()
    batch = tiny_batch(model)
    tokens = real_tokens(batch, family)
    places = {space.name: [p for p in places_of(space) if p[0] in _weighted(model)] for space in spaces}
    kept = observed(model, batch, [place for of_space in places.values() for place in of_space])
    importance = RULES[rule]()
    importance.attach(model, spaces, counts)
    importance.set_tokens(tokens)
    model(**batch).loss.backward()
    importance.update(lambda tensor: tensor, 1)
    scores = importance.scores(model)
    assert set(scores) == {name for name, number in counts.items() if number}
    for space in (space for space in spaces if space.name in scores):
        expected = torch.zeros(counts[space.name])
        for place in places[space.name]:
            mask = of_stack(tokens, space.stack_of(place[0])).float()
            x, g = (per_sequence(t.detach(), mask) for t in (kept[place], kept[place].grad))
            if rule == "salience":
                sums = [torch.einsum("bt,btn->n", mask, t.abs()) for t in (x, g)]
                expected += (sums[0] * sums[1]).view(len(expected), -1).sum(1)
            else:
                expected += (x * g).sum(1).view(len(x), len(expected), -1).sum(2).abs().sum(0)
        assert torch.allclose(scores[space.name], expected, rtol=1e-4, atol=1e-7), space.name
    importance.detach()


def _weighted(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if hasattr(module, "weight")}


@pytest.mark.parametrize("name", NAMES)
def test_kurtosis_and_magnitude_read_the_rows_of_each_unit(name: str) -> None:
    """Against a loop over units, adapters included."""
    model = adapted(language_model(name), everywhere=True)
    family, spaces, dense = parts(language_model(name))
    importance = Magnitude()
    importance.attach(model, spaces, dense.counts)
    scores = importance.scores(model)
    for space in spaces[:-1]:
        expected = torch.zeros(space.size)
        for part in space.slices:
            weight = full_weight(model.get_submodule(part.module))
            for unit in range(space.size):
                rows = part.rows(torch.tensor([unit]), space.size)
                values = weight[rows] if part.side == "out" else weight[:, rows]
                expected[unit] += values.square().sum()
        assert torch.allclose(scores[space.name], expected.sqrt(), rtol=1e-4), space.name
        mean_input = torch.randn(space.size * space.channels)
        gate = model.get_submodule(space.gate)
        assert torch.allclose(contributions(gate, mean_input), full_weight(gate) * mean_input, rtol=1e-4, atol=1e-6)
    rule = RULES["outliers"]()
    rule.attach(model.train(), spaces, dense.counts)
    batch = tiny_batch(model)
    rule.set_tokens(real_tokens(batch, family))
    model(**batch).loss.backward()
    rule.update(lambda tensor: tensor, 1)
    assert all(bool(torch.isfinite(value).all()) for value in rule.scores(model).values())
    rule.detach()


def full_weight(module: nn.Module) -> torch.Tensor:
    """[out, in] (or [out] of a norm) with the adapter added."""
    plain = getattr(module, "base_layer", module)
    weight = plain.weight.detach()
    if module is not plain:
        weight = weight + module.get_delta_weight("default").detach()
    return weight.t() if type(plain).__name__ == "Conv1D" else weight


# ---------------------------------------------------------------------- saving and loading


def pruned_copy(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    small = cut(model, plan)
    as_pruned(small, family_of(model.config), plan)
    return small.eval()


@pytest.mark.parametrize("scenario", ["only_gone", "gone", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_models_load_with_equal_logits(name: str, scenario: str, tmp_path: Path) -> None:
    model = language_model(name)
    _, spaces, _ = parts(model)
    small, batch = pruned_copy(model, a_plan(spaces, scenario)), tiny_batch(model)
    expected = logits(cut(model, a_plan(spaces, scenario)), batch)
    assert torch.equal(logits(small, batch), expected)
    small.save_pretrained(tmp_path)
    again = load_pruned(tmp_path).eval()
    assert torch.equal(logits(again, batch), expected) and type(again) is type(small)
    assert count_parameters(again) == count_parameters(small)
    assert torch.equal(logits(ALL_TASKS[LANGUAGE_MODELS[name]].from_pretrained(tmp_path).eval(), batch), expected)
    assert type(again.config).model_type == f"apt_{name}" and f"apt_{name}" not in CONFIG_MAPPING_NAMES
    for other in back_ends(name):
        again.set_attn_implementation(other)
        assert close(logits(again, batch), expected)


# ---------------------------------------------------------------------- generation


DECODING = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 5}}
STATIC = {"cache_implementation": "static", "disable_compile": True}
GENERATES = tuple(name for name, task in LANGUAGE_MODELS.items() if task != "ForMaskedLM")


def generated(model: PreTrainedModel, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """(new tokens, logits of each step) for padded prompts; a decoder's are padded on the left."""
    batch = tiny_batch(model)
    batch.pop("labels")
    if not model.config.is_encoder_decoder:
        batch = {key: value.flip(1) for key, value in batch.items()}
    torch.manual_seed(5)
    length = {"min_new_tokens": 8, "max_new_tokens": 8}
    wanted = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **length, **options}
    output = model.generate(**batch, **wanted)
    return output.sequences[:, -8:], torch.stack(output.logits)


def same(ours: tuple[torch.Tensor, torch.Tensor], theirs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return torch.equal(ours[0], theirs[0]) and close(ours[1], theirs[1])


@pytest.mark.parametrize("scenario", ["only_gone", "gone"])
@pytest.mark.parametrize("name", GENERATES)
def test_saved_models_generate_with_every_cache_and_decoding(name: str, scenario: str, tmp_path: Path) -> None:
    """Also where the first layer, by whose cache transformers tells the length, has no attention any more."""
    model = language_model(name)
    _, spaces, _ = parts(model)
    small = pruned_copy(model, a_plan(spaces, scenario))
    small.save_pretrained(tmp_path)
    loaded = load_pruned(tmp_path).eval()
    found = {}
    for decoding, options in DECODING.items():
        plain = generated(loaded, use_cache=False, **options)
        assert same(generated(loaded, use_cache=True, **options), plain), decoding
        assert same(generated(loaded, **STATIC, **options), plain), decoding
        assert torch.equal(generated(small, use_cache=False, **options)[0], plain[0]), decoding
        found[decoding] = plain[0]
    assert not torch.equal(found["greedy"], found["sampling"])


@pytest.mark.parametrize("name", GENERATES)
def test_generation_under_masks_equals_that_of_the_cut(name: str) -> None:
    model = language_model(name)
    family, spaces, dense = parts(model)
    plan = a_plan(spaces, "gone")
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    masked = generated(model)
    store.close()
    assert same(masked, generated(cut(model, plan)))
