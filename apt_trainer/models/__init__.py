"""Model families as data. To add one: a table in its own file and one name in ``_TABLES``."""

from __future__ import annotations

from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.models.base import HIDDEN, Kind, SizeAttribute, Slice, Space, Stack, Stub, Sublayer, norm_paths
from apt_trainer.models.families.albert import ALBERT
from apt_trainer.models.families.bart import BART, BLENDERBOT_SMALL, MBART
from apt_trainer.models.families.bert import BERT, ELECTRA, REMBERT, ROBERTA, ROFORMER
from apt_trainer.models.families.bert_prenorm import ESM, MEGATRON_BERT, ROBERTA_PRELAYERNORM, XLM_ROBERTA_XL
from apt_trainer.models.families.deberta import DEBERTA
from apt_trainer.models.families.distilbert import DISTILBERT
from apt_trainer.models.families.gpt import BIOGPT, GPT2, GPT_NEOX, OPT
from apt_trainer.models.families.gte import GTE, JINA, NOMIC_BERT
from apt_trainer.models.families.llama import (
    APERTUS,
    ARCEE,
    EUROBERT,
    EXAONE4,
    GEMMA,
    GEMMA4,
    GLM,
    GLM4,
    GRANITE,
    HYPERCLOVAX,
    LLAMA,
    OLMO,
    OLMO2,
    PHI3,
    SMOLLM3,
    STABLELM,
    STARCODER2,
    VAULTGEMMA,
)
from apt_trainer.models.families.modernbert import DECODER, MODERNBERT
from apt_trainer.models.families.moe import MIXTRAL, OLMOE, QWEN3_MOE
from apt_trainer.models.families.mpnet import MPNET
from apt_trainer.models.families.parallel import COHERE, GPTJ, PHI
from apt_trainer.models.families.t5 import T5, UMT5
from apt_trainer.models.families.vit import DINOV2, SIGLIP, VIT
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable
from apt_trainer.models.nearest import nearest

_TABLES = (
    BERT,
    ROBERTA,
    ELECTRA,
    ROFORMER,
    REMBERT,
    DISTILBERT,
    MPNET,
    DEBERTA,
    ALBERT,
    XLM_ROBERTA_XL,
    ROBERTA_PRELAYERNORM,
    MEGATRON_BERT,
    ESM,
    GTE,
    NOMIC_BERT,
    JINA,
    MODERNBERT,
    DECODER,
    LLAMA,
    SMOLLM3,
    GRANITE,
    OLMO,
    STABLELM,
    ARCEE,
    APERTUS,
    STARCODER2,
    EUROBERT,
    VAULTGEMMA,
    GEMMA,
    GEMMA4,
    OLMO2,
    EXAONE4,
    PHI3,
    GLM,
    GLM4,
    HYPERCLOVAX,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    COHERE,
    PHI,
    GPTJ,
    GPT2,
    GPT_NEOX,
    OPT,
    BIOGPT,
    T5,
    UMT5,
    BART,
    BLENDERBOT_SMALL,
    MBART,
    VIT,
    DINOV2,
    SIGLIP,
)

FAMILIES: dict[str, ModelFamily] = {name: family for family in _TABLES for name in family.model_types}


def family_of(config: Any) -> ModelFamily:
    """Family for a model's ``config``; raises :class:`UserError` when there is none or the use is unsupported."""
    model_type = getattr(config, "apt_base_model_type", None) or config.model_type
    if model_type not in FAMILIES:
        found = nearest(config, _TABLES)
        like = f" Nearest is that of {', '.join(found[0].family.model_types)}: {found[0]}." if found else ""
        raise UserError(
            f"model_type {model_type!r} has no ModelFamily.{like} `apt-trainer families` lists the {len(FAMILIES)} "
            "model types that have one; apt_trainer/README.md, 'Add a model family', says how to add another."
        )
    reason = FAMILIES[model_type].unsupported(config)
    if reason is not None:
        raise UserError(f"model_type {model_type!r} cannot be used with this config: {reason}.")
    return FAMILIES[model_type]


__all__ = [
    "FAMILIES",
    "HIDDEN",
    "Head",
    "Kind",
    "ModelFamily",
    "SizeAttribute",
    "Slice",
    "Space",
    "Stack",
    "StackTable",
    "Stub",
    "Sublayer",
    "SublayerTable",
    "family_of",
    "norm_paths",
]
