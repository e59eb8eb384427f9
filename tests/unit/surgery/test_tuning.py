"""What trains in each mode, by parameter."""

from __future__ import annotations

import pytest
from tiny import parts, tiny_model

from apt_trainer.settings import MethodSettings
from apt_trainer.surgery.tuning import set_trainable


@pytest.mark.parametrize("family_name", ["bert", "roberta", "xlm-roberta", "distilbert"])
@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_full_tuning_leaves_embeddings_out_unless_asked(family_name: str, task: str, embeddings: bool) -> None:
    model = tiny_model(family_name, task)
    family, spaces, _ = parts(model)
    norms = [path for space in spaces for path in space.norms]
    set_trainable(model, family, "full", MethodSettings(tune_embeddings=embeddings), norms)
    tables = {id(p) for path in family.embedding_modules(model) for p in model.get_submodule(path).parameters()}
    assert tables
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (embeddings or id(parameter) not in tables), name
