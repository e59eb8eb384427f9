"""Models with fewer tokens: equal outputs for those that are kept, loaded again too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LANGUAGE_MODELS, VOCABULARY, logits, parts, random_plan, tiny_batch, tiny_model
from torch import nn
from transformers import AutoModelForMaskedLM, GenerationConfig

from apt_trainer import load_pruned
from apt_trainer.errors import UserError
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan
from apt_trainer.surgery.vocabulary import cut_vocabulary

ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
KEPT = [0, 1, 2, 3, *range(5, VOCABULARY, 2)]


def _batches(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch of kept tokens in their old numbers, and in their new ones."""
    batch = tiny_batch(model)
    new, old = torch.tensor(KEPT), {}
    numbers = {number: place for place, number in enumerate(KEPT)}
    renumbered = {}
    for name, value in batch.items():
        if name in ("input_ids", "decoder_input_ids"):
            old[name] = torch.where(torch.isin(value, new), value, 3)
            renumbered[name] = old[name].clone().apply_(numbers.__getitem__)
        elif name != "labels":
            old[name] = renumbered[name] = value
    if model.config.is_encoder_decoder:
        old["decoder_input_ids"], renumbered["decoder_input_ids"] = old["input_ids"], renumbered["input_ids"]
    return old, renumbered


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classifier_gives_equal_logits(name: str) -> None:
    model = tiny_model(name)
    old, new = _batches(model)
    expected = logits(model, old)
    before = sum(p.numel() for p in model.parameters())
    cut_vocabulary(model, KEPT)
    assert torch.equal(logits(model, new), expected)
    rows = VOCABULARY - len(KEPT)
    assert before - sum(p.numel() for p in model.parameters()) == rows * model.get_input_embeddings().embedding_dim
    assert model.config.vocab_size == len(KEPT)
    assert model.config.pad_token_id == KEPT.index(1) and model.get_input_embeddings().padding_idx in (1, None)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_gives_the_logits_of_what_is_kept(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(name, LANGUAGE_MODELS[name], tie_word_embeddings=tied)
    old, new = _batches(model)
    expected = logits(model, old)[..., KEPT]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # T5 ties whatever it is told
    cut_vocabulary(model, KEPT)
    assert torch.equal(logits(model, new), expected)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, new), expected)
    weights = [module.weight for module in (again.get_input_embeddings(), again.get_output_embeddings())]
    assert (weights[0] is weights[1]) == tied and len(weights[0]) == len(weights[1]) == len(KEPT)


@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_behind_a_mask_follow_with_their_bias(name: str) -> None:
    config = tiny_model(name).config
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    old, new = _batches(model)
    expected = logits(model, old)[..., KEPT]
    cut_vocabulary(model, KEPT)
    torch.testing.assert_close(logits(model, new), expected)


def test_a_pruned_model_loses_words_too(tmp_path: Path) -> None:
    small = tiny_model("llama", "ForCausalLM")
    family, spaces, dense = parts(small)
    plan = random_plan(spaces, dense, 1)
    apply_plan(small, family, spaces, dense, plan)
    as_pruned(small, family, plan)
    old, new = _batches(small)
    expected = logits(small, old)[..., KEPT]
    cut_vocabulary(small, KEPT)
    small.save_pretrained(tmp_path)
    assert torch.equal(logits(load_pruned(tmp_path), new), expected)


def test_ids_of_special_tokens_follow() -> None:
    model = tiny_model("llama", "ForCausalLM", eos_token_id=[2, 9])
    model.generation_config = GenerationConfig(
        eos_token_id=[2, 9, 4], bos_token_id=0, suppress_tokens=[4, 7], bad_words_ids=[[4], [9, 7]], pad_token_id=4
    )
    cut_vocabulary(model, KEPT)
    at = KEPT.index
    assert model.config.eos_token_id == [at(2), at(9)] and model.config.bos_token_id == 0
    found = model.generation_config
    assert found.eos_token_id == [at(2), at(9)] and found.pad_token_id is None
    assert found.suppress_tokens == [at(7)] and found.bad_words_ids == [[at(9), at(7)]]


def test_what_does_not_fit_is_said() -> None:
    model = tiny_model("llama", "ForCausalLM")
    with pytest.raises(UserError, match=f"has the token {VOCABULARY}, but the model has embeddings of {VOCABULARY} "):
        cut_vocabulary(model, [0, VOCABULARY])
    model.model.per_layer = nn.Embedding(VOCABULARY, 4)
    with pytest.raises(UserError, match=r"further embeddings of each token \(model.per_layer\)"):
        cut_vocabulary(model, KEPT)
