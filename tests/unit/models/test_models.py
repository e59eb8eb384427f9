"""Family tables against the real modules of every family and task."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import (
    CASES,
    FAMILY_NAMES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    NEURONS,
    WIDTH,
    logits,
    parts,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from torch import nn
from transformers import AutoModel, AutoModelForMultipleChoice, DiffLlamaConfig, XLNetConfig

from apt_trainer.errors import UserError
from apt_trainer.models import FAMILIES, HIDDEN, Slice, family_of
from apt_trainer.models.base import base_layer, linear_shape
from apt_trainer.models.modeling_apt import (
    STUB_KINDS,
    STUBS,
    PassAttention,
    PassFirst,
    PassSecond,
    ZeroAttention,
    ZeroFeedForward,
)
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.cutting import apply_plan


@pytest.mark.parametrize(("name", "task"), CASES)
def test_spaces_have_the_sizes_of_the_config(name: str, task: str) -> None:
    _, spaces, plan = parts(tiny_model(name, task))
    expected = {HIDDEN: WIDTH}
    for layer in range(LAYERS):
        expected |= {f"layers.{layer}.heads": HEADS, f"layers.{layer}.neurons": NEURONS}
    assert plan.counts == expected
    assert spaces[-1].name == HIDDEN
    for space in spaces:
        assert space.channels == (HEAD_DIM if space.kind == "heads" else 1)
        assert (space.gate is None) == (space.name == HIDDEN)
        assert space.layer == (None if space.name == HIDDEN else int(space.name.split(".")[1]))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_path_in_a_table_exists(name: str, task: str) -> None:
    model = tiny_model(name, task)
    family, spaces, _ = parts(model)
    present = {path for path, _ in model.named_modules()}
    named = {part.module for space in spaces for part in space.slices}
    named |= {path for space in spaces for path in (*space.norms, *space.places)}
    named |= {path for sub in family.sublayers(model) for path in (*sub.modules, *(s.module for s in sub.stubs))}
    named |= set(family.trained_head(model)) | set(family.embedding_modules(model)) | set(family.block_modules(model))
    assert named <= present
    assert len(family.embedding_modules(model)) == (2 if name == "distilbert" else 3)
    # One place per norm of the encoder: after the embeddings and after each sublayer.
    assert len(spaces[-1].places) == 1 + 2 * LAYERS


INSIDE_HEADS = {"pooler.dense/out", "classifier.dense/out", "pre_classifier/out", "classifier.out_proj/in"}
"""Widths between two layers of a task head, which are no hidden dimensions of the encoder."""


@pytest.mark.parametrize(("name", "task"), CASES)
def test_every_dimension_of_a_prunable_width_is_claimed(name: str, task: str) -> None:
    """Nothing else in a tiny model is as wide as its hidden dimensions or neurons, so a forgotten slice shows."""
    model = tiny_model(name, task)
    _, spaces, _ = parts(model)
    claimed = {f"{part.module}/{part.side}" for space in spaces for part in space.slices}
    unclaimed = set()
    for path, module in model.named_modules():
        ends = {}
        if isinstance(module, nn.Linear):
            ends = {"in": module.in_features, "out": module.out_features}
        elif isinstance(module, nn.LayerNorm | nn.Embedding):
            ends = {"out": module.weight.shape[-1]}
        unclaimed |= {f"{path}/{side}" for side, size in ends.items() if size in (WIDTH, NEURONS)} - claimed
    unclaimed = {end for end in unclaimed if not end.endswith(tuple(INSIDE_HEADS))}
    reads_the_pooler = task == "ForSequenceClassification" and name in ("bert", "distilbert")
    assert unclaimed == ({"classifier/in"} if reads_the_pooler else set())


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_base_model_without_a_head_is_supported(name: str) -> None:
    model = AutoModel.from_config(tiny_config(name))
    family, spaces, plan = parts(model)
    assert family.prefix(model) == ""
    assert family.trained_head(model) == (() if name == "distilbert" else ("pooler",))
    assert plan.counts[HIDDEN] == WIDTH
    assert all(not part.module.startswith(model.base_model_prefix) for space in spaces for part in space.slices)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_task_heads_train(name: str, task: str) -> None:
    model = tiny_model(name, task)
    paths = family_of(model.config).trained_head(model)
    expected: dict[str, set[str]] = {
        "ForSequenceClassification": {"classifier"},
        "ForTokenClassification": {"classifier"},
        "ForQuestionAnswering": {"qa_outputs"},
        "ForMaskedLM": set(),
    }
    wanted = set(expected[task])
    if task == "ForSequenceClassification":
        wanted |= {"bert": {"bert.pooler"}, "distilbert": {"pre_classifier"}}.get(name, set())
    assert set(paths) == wanted


def test_an_unknown_model_type_is_told_what_sets_it_apart_from_the_nearest() -> None:
    with pytest.raises(
        UserError, match="'diffllama' has no ModelFamily. Nearest is that of llama, mistral, qwen2"
    ) as told:
        family_of(DiffLlamaConfig())
    assert "they also have self_attn." in str(told.value) and f"the {len(FAMILIES)} model types" in str(told.value)
    assert "apt_trainer/README.md, 'Add a model family'" in str(told.value)
    with pytest.raises(UserError, match="'xlnet' has no ModelFamily. Nearest is .*its layers are not at"):
        family_of(XLNetConfig())
    with pytest.raises(UserError, match="'clap' has no ModelFamily. `apt-trainer families` lists"):
        family_of(SimpleNamespace(model_type="clap"))


@pytest.mark.parametrize("setting", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(setting: str) -> None:
    config = tiny_config("bert")
    setattr(config, setting, True)
    with pytest.raises(UserError, match="encoder"):
        family_of(config)


def test_family_of_a_pruned_config_is_that_of_its_base() -> None:
    config = tiny_config("distilbert")
    config.model_type, config.apt_base_model_type = "apt_distilbert", "distilbert"
    assert family_of(config) is FAMILIES["distilbert"]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_undescribed_head_is_refused_with_the_described_ones(name: str) -> None:
    model = AutoModelForMultipleChoice.from_config(tiny_config(name))
    with pytest.raises(UserError, match=f"{type(model).__name__} has a task head.*ForTokenClassification"):
        family_of(model.config).spaces(model)


def test_rows_of_units_with_channels() -> None:
    rows = Slice("q", "out", (3,)).rows(torch.tensor([0, 2]), 4)
    assert rows.tolist() == [0, 1, 2, 6, 7, 8]


def test_rows_of_a_fused_projection_lie_in_each_part() -> None:
    rows = Slice("qkv", "out", (2, 2, 1)).rows(torch.tensor([1]), 3)
    assert rows.tolist() == [2, 3, 8, 9, 13]  # parts of 6, 6 and 3 rows


def test_linear_shape_sees_through_an_adapter() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(3, 5)

    adapter = Adapter()
    assert base_layer(adapter) is adapter.base_layer
    assert linear_shape(adapter) == linear_shape(nn.Linear(3, 5)) == (5, 3)


def test_stubs_answer_as_what_they_replace() -> None:
    hidden, residual = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert PassAttention()(hidden, None, past_key_values=None) == (hidden, None)
    zero, weights = ZeroAttention()(hidden, attention_mask=None)
    assert weights is None and torch.equal(zero, torch.zeros_like(hidden))
    assert torch.equal(ZeroFeedForward()(hidden), torch.zeros_like(hidden))
    assert PassFirst()(hidden) is hidden
    assert PassSecond()(hidden, residual) is residual
    assert {STUBS[kind] for kind in STUBS} == set(STUB_KINDS)
    assert not any(list(stub().parameters()) for stub in STUB_KINDS)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_without_any_sublayer_the_head_reads_the_embeddings(name: str, task: str) -> None:
    model = tiny_model(name, task)
    family, spaces, plan = parts(model)
    empty = PruningPlan({space.name: plan.kept[space.name] if space.name == HIDDEN else () for space in spaces})
    apply_plan(model, family, spaces, plan, empty)
    reference = tiny_model(name, task)
    for path in family.layer_paths(reference):
        reference.set_submodule(path, PassFirst())
    batch = tiny_batch(model)
    assert torch.equal(logits(model, batch), logits(reference, batch))
    assert sum(p.numel() for layer in family.layer_paths(model) for p in model.get_submodule(layer).parameters()) == 0
