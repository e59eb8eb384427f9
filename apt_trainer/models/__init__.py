"""Model families as data. To add one: a table in its own file and one name in ``_TABLES``."""

from __future__ import annotations

from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.models.base import HIDDEN, Kind, SizeAttribute, Slice, Space, Stack, Stub, Sublayer, norm_paths
from apt_trainer.models.families.bert import BERT, ROBERTA
from apt_trainer.models.families.distilbert import DISTILBERT
from apt_trainer.models.families.gpt import GPT2, GPT_NEOX, OPT
from apt_trainer.models.families.llama import GEMMA, LLAMA, OLMO2, PHI3, SMOLLM3
from apt_trainer.models.families.modernbert import MODERNBERT
from apt_trainer.models.families.t5 import T5
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

_TABLES = (
    BERT,
    ROBERTA,
    DISTILBERT,
    MODERNBERT,
    LLAMA,
    SMOLLM3,
    GEMMA,
    OLMO2,
    PHI3,
    GPT2,
    GPT_NEOX,
    OPT,
    T5,
)

FAMILIES: dict[str, ModelFamily] = {name: family for family in _TABLES for name in family.model_types}


def family_of(config: Any) -> ModelFamily:
    """Family for a model's ``config``; raises :class:`UserError` when there is none or the use is unsupported."""
    model_type = getattr(config, "apt_base_model_type", None) or config.model_type
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} has no ModelFamily. Supported: {', '.join(sorted(FAMILIES))}. "
            "To add one, see README, 'Add a model family'."
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
