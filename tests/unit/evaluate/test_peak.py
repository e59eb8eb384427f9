"""Peak memory of running a model in a process of its own: weights once, and what is computed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import BertConfig, BertForSequenceClassification

from apt_trainer.evaluate.compare import measure_memory
from apt_trainer.models import family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.settings import ModelSettings
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

HIDDEN, NEURONS, KEPT, VOCABULARY = 256, 4096, 1024, 30_000
ROWS, LENGTH = 16, 64
SLACK = 6e6  # hidden states of 1 MB each, buffers of matrix products, pages of code


def save_pruned(folder: Path) -> None:
    """A model with 30 MB of embeddings, most of them read in a batch, and without most of its neurons."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=NEURONS,
        max_position_embeddings=LENGTH,
    )
    model = BertForSequenceClassification(config)
    family = family_of(config)
    spaces = family.spaces(model)
    dense = PruningPlan.dense(spaces)
    plan = PruningPlan(dense.kept | {space.name: tuple(range(KEPT)) for space in spaces if space.kind == "neurons"})
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    model.save_pretrained(folder)


@pytest.mark.slow
def test_a_saved_model_and_a_dense_shape_count_alike(tmp_path: Path) -> None:
    save_pruned(tmp_path)
    found = measure_memory(ModelSettings(str(tmp_path)), ROWS, LENGTH, 1, "cpu")
    fewer = (NEURONS - KEPT) * (2 * HIDDEN + 1) * 4
    assert found["dense"]["weight_bytes"] == found["pruned"]["weight_bytes"] + fewer
    for name, neurons in (("dense", NEURONS), ("pruned", KEPT)):
        before_and_after_the_activation = 2 * ROWS * LENGTH * neurons * 4
        computed = found[name]["peak_bytes"] - found[name]["weight_bytes"]
        assert computed == pytest.approx(before_and_after_the_activation + SLACK / 2, abs=SLACK / 2), name
