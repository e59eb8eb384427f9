"""Which model types are supported and what each can lose, said by the tables themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apt_trainer.models.family import ModelFamily

_TASKS = {
    "language modelling": ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM"),
    "masked tokens": ("MASKED_LM",),
    "classes": ("SEQUENCE_CLASSIFICATION",),
    "images": ("IMAGE_CLASSIFICATION",),
    "tokens": ("TOKEN_CLASSIFICATION",),
    "answers": ("QUESTION_ANSWERING",),
}
"""Task → what transformers calls its classes."""


def overview(families: Mapping[str, ModelFamily]) -> Iterator[dict[str, str]]:
    """One row a model type, by name: ``model_type``, ``kind``, ``loses``, ``keeps``, ``heads`` and ``gguf``."""
    for model_type, family in sorted(families.items()):
        tables = [(stack.spaces, table) for stack in family.stacks for table in stack.sublayers]
        kinds = [*dict.fromkeys(table.kind for _, table in tables), *(["experts"] if family.has_experts else [])]
        stays = [f"a head in the {table.stays} {spaces}.{table.name}" for spaces, table in tables if table.stays]
        yield {
            "model_type": model_type,
            "kind": "encoder–decoder" if len(family.stacks) > 1 else family.stacks[0].stack,
            "loses": ", ".join([*kinds, "hidden", "attentions", "feed-forwards"]),
            "keeps": ", ".join(stays),
            "heads": ", ".join(task for task in _TASKS if _has_head(model_type, family, task)),
            "gguf": "yes" if model_type in family.gguf else "",
        }


def _has_head(model_type: str, family: ModelFamily, task: str) -> bool:
    """Whether transformers has a class of ``task`` for ``model_type`` whose head is described."""
    from transformers.models.auto import modeling_auto

    found = (getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").get(model_type) for name in _TASKS[task])
    names = (name for entry in found for name in (entry if isinstance(entry, tuple) else (entry,)))
    return any(isinstance(name, str) and name.endswith(tuple(family.heads)) for name in names)
