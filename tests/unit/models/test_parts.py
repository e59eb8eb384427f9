"""What the parts of a model weigh, against sums over its real modules."""

from __future__ import annotations

from tiny import tiny_model
from torch import nn

from apt_trainer.models import family_of
from apt_trainer.models.parts import weigh_parts


def _sum(*modules: nn.Module) -> tuple[int, int]:
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def test_parts_of_a_decoder_with_and_without_a_head_of_its_own() -> None:
    for tied in (False, True):
        model = tiny_model("llama", "ForCausalLM", tie_word_embeddings=tied).bfloat16()
        inner, none = model.model, (0, 0)
        assert weigh_parts(model, family_of(model.config)) == {
            "blocks": _sum(inner.layers),
            "embeddings": _sum(inner.embed_tokens),
            "head": none if tied else _sum(model.lm_head),
            "rest": _sum(inner.norm),
        }


def test_parts_of_a_classifier_and_of_two_stacks() -> None:
    model = tiny_model("bert", "ForSequenceClassification")
    tables = model.bert.embeddings
    assert weigh_parts(model, family_of(model.config)) == {
        "blocks": _sum(model.bert.encoder.layer),
        "embeddings": _sum(tables.word_embeddings, tables.position_embeddings, tables.token_type_embeddings),
        "head": _sum(model.classifier),
        "rest": _sum(tables.LayerNorm, model.bert.pooler),
    }
    seq2seq = tiny_model("t5", "ForConditionalGeneration")  # always tied
    parts = weigh_parts(seq2seq, family_of(seq2seq.config))
    assert parts["head"] == (0, 0)
    assert parts["blocks"] == _sum(seq2seq.encoder.block, seq2seq.decoder.block)
    assert sum(weight.params for weight in parts.values()) == seq2seq.num_parameters()
