"""What one family or a few have that the others have not: task heads, tied weights, private sizes, shared biases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import invariants
import pytest
import torch
from test_families import a_plan, close, cut, generated, language_model, pruned_copy, same
from tiny import (
    ALL_TASKS,
    LANGUAGE_MODELS,
    LAYERS,
    gap,
    logits,
    parts,
    random_plan,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoModel, GPT2DoubleHeadsModel, PreTrainedModel, T5EncoderModel

from apt_trainer import UserError, load_pruned
from apt_trainer.distillation import layer_outputs
from apt_trainer.distillation.teacher import Teacher
from apt_trainer.measure import Latency, count_parameters, example_inputs
from apt_trainer.models import FAMILIES, HIDDEN, Space, family_of
from apt_trainer.models.batch import of_stack, predicted_tokens, real_tokens
from apt_trainer.models.modeling_apt import BiasOfKeptHeads, ConfigView, ZeroAttention, get_size, set_size
from apt_trainer.models.slots import layer_list_path
from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.selection import select
from apt_trainer.pruning import latency_cost as latency_module
from apt_trainer.store.saving import reload_difference
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.masks import MaskStore

OTHER_HEADS = [
    (name, task)
    for name, own in LANGUAGE_MODELS.items()
    for task, auto in ALL_TASKS.items()
    if task != own and type(tiny_config(name)) in auto._model_mapping
]


def test_every_head_of_a_language_model_is_built() -> None:
    assert len(OTHER_HEADS) == 38
    heads = {(name, ending) for name, family in FAMILIES.items() if name in LANGUAGE_MODELS for ending in family.heads}
    built = {(name, type(tiny_model(name, task)).__name__) for name, task in (*LANGUAGE_MODELS.items(), *OTHER_HEADS)}
    assert all(any(n == name and cls.endswith(ending) for n, cls in built) for name, ending in heads - MISSING)


MISSING = {
    ("gemma2", "ForQuestionAnswering"),
    ("gemma3_text", "ForTokenClassification"),
    ("gemma3_text", "ForQuestionAnswering"),
    ("olmo2", "ForTokenClassification"),
    ("olmo2", "ForQuestionAnswering"),
    ("phi3", "ForQuestionAnswering"),
}
"""Heads of a shared table that transformers has no class for."""


@pytest.mark.parametrize(("name", "task"), OTHER_HEADS)
def test_task_heads_are_masked_cut_counted_and_saved(name: str, task: str, tmp_path: Path) -> None:
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    trained = family.trained_head(model)
    assert trained and all(list(model.get_submodule(path).parameters()) for path in trained)
    plan, batch = a_plan(spaces, "gone"), tiny_batch(model)
    cost = parameter_cost(model, family, spaces, blocks_only=False)
    store = MaskStore(model, spaces, family.sublayers(model))
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    masked = logits(model, batch)
    store.close()
    small = pruned_copy(model, plan)
    after = logits(small, batch)
    assert close(masked, after) and gap(logits(model, batch), after) > 1e-3
    assert cost.total(plan.counts) == count_parameters(small)
    small.save_pretrained(tmp_path)
    assert reload_difference(small, tmp_path) < 1e-6
    assert close(logits(load_pruned(tmp_path).eval(), batch), after)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_base_model_without_a_head_is_supported(name: str) -> None:
    model = AutoModel.from_config(tiny_config(name))
    family, spaces, dense = parts(model)
    assert family.trained_head(model) == () and dense.counts[HIDDEN] == 16
    apply_plan(model, family, spaces, dense, a_plan(spaces, "gone"))
    ids = tiny_batch(model)["input_ids"]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    assert model(input_ids=ids, **more).last_hidden_state.shape[-1] == a_plan(spaces, "gone").counts[HIDDEN]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "setting", "sentence"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=True"),
        ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim"),
    ],
)
def test_configs_outside_a_table_are_refused(name: str, setting: dict[str, Any], sentence: str) -> None:
    family_of(tiny_config(name))
    with pytest.raises(UserError, match=sentence):
        family_of(tiny_config(name, **setting))


def test_a_head_that_is_not_described_is_refused() -> None:
    with pytest.raises(UserError, match="GPT2DoubleHeadsModel has a task head that is not described"):
        parts(GPT2DoubleHeadsModel(tiny_config("gpt2")))


# ---------------------------------------------------------------------- units and names


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_a_unit_is_a_key_and_value_head_with_its_query_heads(name: str) -> None:
    _, spaces, _ = parts(language_model(name))
    space = next(space for space in spaces if space.name == "layers.1.heads")
    assert (space.size, space.channels, space.stack) == (4, 12, "decoder")
    widths = {part.module.rsplit(".", 1)[1]: part.parts for part in space.slices}
    separate = {"q_proj": (12,), "k_proj": (6,), "v_proj": (6,), "o_proj": (12,)}
    assert widths == ({"qkv_proj": (12, 6, 6), "o_proj": (12,)} if name == "phi3" else separate)


def test_names_stacks_and_minimums_of_a_model_with_two_stacks() -> None:
    _, spaces, dense = parts(language_model("t5"))
    expected = [f"encoder.{i}.{kind}" for i in range(LAYERS) for kind in ("heads", "neurons")]
    expected += [f"decoder.{i}.{kind}" for i in range(LAYERS - 1) for kind in ("heads", "cross_heads", "neurons")]
    assert list(dense.counts) == [*expected, HIDDEN]
    assert {space.name for space in spaces if space.minimum} == {
        "encoder.0.heads",
        "decoder.0.heads",
        f"decoder.{LAYERS - 2}.cross_heads",
    }
    assert all(space.stack == space.name.split(".")[0] for space in spaces[:-1])
    hidden = spaces[-1]
    assert len(hidden.places) == 2 * LAYERS + 3 * (LAYERS - 1)
    assert all(hidden.stack_of(path) == path.split(".")[0] for path in hidden.places)
    labels = [space.label for space in spaces[:-1]]
    assert labels[:2] == ["encoder.0", "encoder.0"] and labels[6:9] == ["decoder.0", "decoder.0.cross", "decoder.0"]
    assert [space.label for space in parts(language_model("llama"))[1][:3]] == ["0", "0", "1"]


def test_selection_keeps_what_must_stay() -> None:
    """The worst scores of all, and no limit of the settings."""
    model = language_model("t5")
    family, spaces, dense = parts(model)
    kinds = ("heads", "neurons", HIDDEN)
    limits = Limits(frozenset(kinds), dict.fromkeys(kinds, 1), dict.fromkeys(kinds, 0) | {HIDDEN: 4})
    scores = {space.name: torch.full((space.size,), 0.0 if space.kind == "heads" else 1.0) for space in spaces}
    cost = parameter_cost(model, family, spaces)
    plan = select(scores, spaces, dense, cost, 0.15 * cost.total(dense.counts), limits)
    left = {name for name, number in plan.counts.items() if "heads" in name and number}
    assert left == {"encoder.0.heads", "decoder.0.heads", f"decoder.{LAYERS - 2}.cross_heads"}
    apply_plan(model, family, spaces, dense, plan)
    assert torch.isfinite(logits(model, tiny_batch(model))).all()


def test_latency_is_fitted_without_what_must_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("t5", layers=2)
    family, spaces, dense = parts(model)

    def timed(models: dict, batch_sizes: list[int], length: int) -> dict:
        result = {}
        for key, variant in models.items():
            model_batch = example_inputs(variant, 1, length)
            assert variant(**model_batch).logits.shape[1] == length
            ms = 0.0
            for space in spaces[:-1]:
                gate = dict(variant.named_modules()).get(space.gate)
                units = 0 if gate is None else gate.weight.shape[1] // space.channels
                ms += 2.0 * units + (3.0 if units and not space.minimum else 0.0)
            result[key] = {4: Latency(ms, 0.0, 10)}
        return result

    monkeypatch.setattr(latency_module, "compare_latency", timed)
    cost = latency_module.latency_cost(model, family, spaces, 4, 6)
    removable = sum(not space.minimum for space in spaces[:-1])
    units = sum(space.size for space in spaces[:-1])
    assert cost.total(dense.counts) == pytest.approx(1e-3 * (2 * units + 3 * removable))
    assert cost.marginal("decoder.0.heads", dense.counts) == pytest.approx(2e-3)


# ---------------------------------------------------------------------- sizes that modules keep


def test_a_view_changes_one_value_for_one_module() -> None:
    model = language_model("phi3")
    _, spaces, dense = parts(model)
    kept = dict(dense.kept) | {"layers.1.heads": (1, 3)}
    small = cut(model, PruningPlan(kept))
    layers = small.model.layers
    assert isinstance(layers[1].self_attn.config, ConfigView)
    assert layers[0].self_attn.config is small.config and small.config.num_attention_heads == 8
    assert get_size(layers[1].self_attn, "config.num_attention_heads") == 4
    assert layers[1].self_attn.num_key_value_heads == 2
    again = copy.deepcopy(small)
    again.set_attn_implementation("eager")
    view = again.model.layers[1].self_attn.config
    assert view.shared is again.config and view._attn_implementation == "eager"
    assert small.config._attn_implementation == "sdpa" and get_size(model, "nothing") is None
    set_size(again.model.layers[1].self_attn, "config.num_attention_heads", 2)
    assert get_size(layers[1].self_attn, "config.num_attention_heads") == 4
    with pytest.raises(AttributeError):
        view.nothing_of_the_kind  # noqa: B018
    assert spaces[0].attributes


def test_an_unchanged_plan_leaves_classes_and_configs_alone() -> None:
    for name in ("phi3", "t5"):
        model = language_model(name)
        family, spaces, dense = parts(model)
        apply_plan(model, family, spaces, dense, dense)
        modules = list(model.modules())
        assert not any(isinstance(module, BiasOfKeptHeads) for module in modules)
        assert not any(isinstance(getattr(module, "config", None), ConfigView) for module in modules)


def test_a_removed_attention_fills_its_slot_of_the_cache() -> None:
    model = language_model("llama")
    _, spaces, _ = parts(model)
    small = pruned_copy(model, a_plan(spaces, "only_gone"))
    stub = small.model.layers[2].self_attn
    assert isinstance(stub, ZeroAttention) and stub.layer_idx == 2
    cache = small(input_ids=torch.arange(4, 9)[None], use_cache=True).past_key_values
    assert [layer.keys.shape for layer in cache.layers] == [(1, 1, 5, 1), (1, 4, 5, 6), (1, 1, 5, 1)]
    assert cache.get_seq_length() == 5


# ---------------------------------------------------------------------- weights shared between modules


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "t5", "mt5", "modernbert"])
def test_tied_embeddings_are_cut_once_and_stay_tied(name: str, tmp_path: Path) -> None:
    model = language_model(name, tie_word_embeddings=True)
    _, spaces, _ = parts(model)
    small = pruned_copy(model, a_plan(spaces, "all"))
    small.save_pretrained(tmp_path)
    for candidate in (small, load_pruned(tmp_path)):
        table = candidate.get_input_embeddings()
        tied = [m for m in candidate.modules() if m._parameters.get("weight") is table.weight]
        assert candidate.get_output_embeddings() in tied
        assert len(tied) == (4 if name in ("t5", "mt5") else 2)
        width = a_plan(spaces, "all").counts[HIDDEN]
        assert all(m.weight.shape == (40, width) for m in tied)
        assert all(m.embedding_dim == width for m in tied if isinstance(m, nn.Embedding))


@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_untied_output_weights_are_cut_and_saved_beside_the_embeddings(name: str, tmp_path: Path) -> None:
    """For T5 transformers sets tie_word_embeddings whatever the weights: those of T5 1.1 differ and are not scaled."""
    model = language_model(name, tie_word_embeddings=False)
    torch.manual_seed(1)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    family, spaces, _ = parts(model)
    plan, batch = a_plan(spaces, "all"), tiny_batch(model)
    small = pruned_copy(model, plan)
    cost = parameter_cost(model, family, spaces, blocks_only=False)
    assert cost.total(plan.counts) == count_parameters(small)
    small.save_pretrained(tmp_path)
    again = load_pruned(tmp_path).eval()
    assert again.lm_head.weight is not again.get_input_embeddings().weight
    assert torch.equal(logits(again, batch), logits(small, batch))
    if name == "t5":
        assert not small.config.scale_decoder_outputs and not again.config.scale_decoder_outputs


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_scales_of_gemma_come_from_the_dense_width(name: str) -> None:
    model = language_model(name)
    _, spaces, _ = parts(model)
    small = pruned_copy(model, a_plan(spaces, "hidden"))
    ids, live = torch.arange(4, 9)[None], list(a_plan(spaces, "hidden").kept[HIDDEN])
    with torch.no_grad():
        assert torch.equal(small.model.embed_tokens(ids), model.model.embed_tokens(ids)[..., live])
    assert float(small.model.embed_tokens.embed_scale) == 4.0


def test_gpt_neox_with_one_sublayer_after_the_other() -> None:
    model = language_model("gpt_neox", use_parallel_residual=False)
    _, spaces, dense = parts(model)
    store = MaskStore(model, spaces, family_of(model.config).sublayers(model))
    plan, batch = a_plan(spaces, "gone"), tiny_batch(model)
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    masked = logits(model, batch)
    store.close()
    assert close(masked, logits(cut(model, plan), batch))
    assert gap(logits(model, batch), logits(language_model("gpt_neox"), batch)) > 1e-2


def test_norms_over_all_heads_are_cut_with_them() -> None:
    model = language_model("olmo2")
    _, spaces, dense = parts(model)
    small = cut(model, PruningPlan(dict(dense.kept) | {"layers.1.heads": (0, 3)}))
    attention, dense_attention = small.model.layers[1].self_attn, model.model.layers[1].self_attn
    rows = [*range(12), *range(36, 48)]
    assert torch.equal(attention.q_norm.weight, dense_attention.q_norm.weight[rows])
    assert torch.equal(attention.k_norm.weight, dense_attention.k_norm.weight[[*range(6), *range(18, 24)]])


def test_norms_without_weights(tmp_path: Path) -> None:
    model = language_model("opt", layer_norm_elementwise_affine=False)
    _, spaces, dense = parts(model)
    store = MaskStore(model, spaces, family_of(model.config).sublayers(model))
    plan, batch = a_plan(spaces, "gone"), tiny_batch(model)
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    masked = logits(model, batch)
    store.close()
    small = pruned_copy(model, plan)
    assert close(masked, logits(small, batch))
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path).eval(), batch), logits(small, batch))


# ---------------------------------------------------------------------- the position bias of T5


def biases(model: PreTrainedModel, batch: dict) -> list[torch.Tensor]:
    """Position bias that each self-attention of the decoder hands on."""
    seen: list[torch.Tensor] = []
    handles = [
        block.layer[0].register_forward_hook(lambda module, args, output: seen.append(output[1].detach()))
        for block in model.decoder.block
    ]
    model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def test_the_bias_of_all_heads_is_handed_on_and_its_table_stays_whole() -> None:
    model = language_model("t5")
    _, spaces, dense = parts(model)
    kept = dict(dense.kept) | {"decoder.0.heads": (3,), "decoder.1.heads": (0, 2)}
    small, batch = cut(model, PruningPlan(kept)), tiny_batch(model)
    attentions = [block.layer[0].SelfAttention for block in small.decoder.block]
    assert [a.kept_heads for a in attentions] == [(3,), (0, 2)] and [a.n_heads for a in attentions] == [1, 2]
    assert attentions[0].relative_attention_bias.weight.shape[1] == 4
    ours, theirs = biases(small, batch), biases(model, batch)
    assert len(ours) == 2 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    small.train()
    small(**batch).loss.backward()
    gradient = attentions[0].relative_attention_bias.weight.grad
    assert gradient.abs().sum(0).bool().tolist() == [True, False, True, True]  # what some layer still reads


def test_a_cut_of_a_cut_names_heads_of_the_dense_model() -> None:
    model = language_model("t5")
    family, spaces, dense = parts(model)
    first = PruningPlan(dict(dense.kept) | {"decoder.1.heads": (0, 2, 3)})
    second = PruningPlan(dict(dense.kept) | {"decoder.1.heads": (2, 3)})
    in_steps, batch = copy.deepcopy(model), tiny_batch(model)
    apply_plan(in_steps, family, spaces, dense, first)
    apply_plan(in_steps, family, spaces, first, second)
    assert in_steps.decoder.block[1].layer[0].SelfAttention.kept_heads == (2, 3)
    assert torch.equal(logits(in_steps, batch), logits(cut(model, second), batch))


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_cached_generation_where_every_layer_lost_other_heads(name: str) -> None:
    """The bias of a new token depends on how many were seen, which the first layer must tell all others."""
    model = language_model(name, layers=4)
    _, spaces, dense = parts(model)
    kept = dict(dense.kept) | {"decoder.0.heads": (3,), "decoder.1.heads": (0, 2), "decoder.2.heads": (1, 2, 3)}
    small = pruned_copy(model, PruningPlan(kept | {"decoder.1.cross_heads": (2,)}))
    expected = generated(small, use_cache=False)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}):
        alone = expected if "num_beams" not in options else generated(small, use_cache=False, **options)
        assert same(generated(small, **options), alone)


def test_layers_without_cross_attention_may_come_first() -> None:
    """The first cross-attention makes the (empty) bias of all others in a dense model."""
    model = language_model("t5", layers=4)
    _, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 3, vanish=("decoder.0.cross_heads", "decoder.1.heads"))
    small, batch = pruned_copy(model, plan), tiny_batch(model)
    store = MaskStore(model, spaces, family_of(model.config).sublayers(model))
    store.open(dense.counts)
    store.move(dense.survivors(plan), 1.0)
    assert close(logits(model, batch), logits(small, batch))


# ---------------------------------------------------------------------- which tokens count


def test_real_tokens_per_stack() -> None:
    model = language_model("t5")
    family, batch = family_of(model.config), tiny_batch(model)
    tokens = real_tokens(batch, family)
    assert of_stack(tokens, "encoder") is batch["attention_mask"]
    counted = batch["labels"] != -100
    assert torch.equal(of_stack(tokens, "decoder"), counted) and not counted.all()
    assert torch.equal(predicted_tokens(batch, family, model), counted)
    answers = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert of_stack(real_tokens(answers, family), "decoder") is batch["attention_mask"]
    one = torch.ones(4, 3)
    assert of_stack(real_tokens(answers | {"decoder_attention_mask": one}, family), "decoder") is one
    classes = answers | {"labels": torch.zeros(4, dtype=torch.long)}
    assert of_stack(real_tokens(classes, family), "decoder") is batch["attention_mask"]


def test_predictions_of_a_causal_model_count_where_the_next_label_does() -> None:
    model = language_model("llama")
    family, batch = family_of(model.config), tiny_batch(model)
    batch["labels"][0, :3] = -100  # a prompt
    assert real_tokens(batch, family) is batch["attention_mask"]
    counted = predicted_tokens(batch, family, model)
    losses = torch.zeros(batch["labels"].shape, dtype=torch.bool)
    for t in range(batch["labels"].shape[1] - 1):
        losses[:, t] = batch["labels"][:, t + 1] != -100
    assert torch.equal(counted, losses) and not counted[:, -1].any() and counted[0, 2] and not counted[0, 1]
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    assert predicted_tokens(unlabelled, family, model) is batch["attention_mask"]
    classifier = tiny_model("llama", "ForSequenceClassification")
    assert predicted_tokens(tiny_batch(classifier), family, classifier) is not None


def test_a_teacher_with_a_decoder_makes_its_inputs_of_the_labels() -> None:
    model = language_model("t5")
    teacher, batch = Teacher(16), tiny_batch(model)
    teacher.offer(model, 1.0)
    output = teacher.forward(batch, output_hidden_states=True)
    assert torch.equal(output.logits, logits(model, batch))
    assert len(layer_outputs(output, "encoder")) == LAYERS and len(layer_outputs(output, "decoder")) == LAYERS - 1
    assert layer_outputs(output, "encoder")[0].shape[1] == 7 and layer_outputs(output, "decoder")[0].shape[1] == 5
    given = {**batch, "decoder_input_ids": model._shift_right(batch["labels"])}
    assert teacher.forward(given).loss is None and torch.equal(teacher.forward(given).logits, output.logits)


def test_an_encoder_alone() -> None:
    model = T5EncoderModel(tiny_config("t5"))
    _, spaces, dense = parts(model)
    assert {space.name.split(".")[0] for space in spaces} == {"encoder", HIDDEN}
    assert isinstance(spaces[0], Space) and dense.counts["encoder.0.heads"] == 4


# ---------------------------------------------------------------------- DeBERTa and ALBERT


@pytest.mark.parametrize(
    "changes",
    [{"share_att_key": False}, {"share_att_key": False, "pos_att_type": ["c2p"]}, {"relative_attention": False}],
)
def test_flops_of_deberta_count_its_positions(changes: dict[str, Any]) -> None:
    model = invariants.model_of("deberta-v2", **changes)
    invariants.every_width_is_claimed(model)
    invariants.masks_equal_the_cut(model, gone=True)
    invariants.costs_are_real(model)


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("deberta-v2", {"conv_kernel_size": 3}, "without a convolution"),
        ("deberta-v2", {"norm_rel_ebd": "none"}, "norm_rel_ebd: layer_norm"),
        ("albert", {"num_hidden_groups": 3}, "one layer for all runs"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=False"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
    ],
)
def test_what_a_table_does_not_describe_is_refused(model_type: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        family_of(invariants.config_of(model_type, **changes))


def test_a_layer_that_runs_many_times_is_one_space() -> None:
    model = invariants.model_of("albert")
    family, spaces, _ = parts(model)
    assert [space.name for space in spaces] == ["layers.0.heads", "layers.0.neurons", HIDDEN]
    assert family.repeats(model.config) == LAYERS
    with pytest.raises(UserError, match="runs one layer many times"):
        layer_list_path(model, family)
