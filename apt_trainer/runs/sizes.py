"""How large a finished model is beside its dense original and, pruned before, beside what the run began with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt_trainer.measure import count_parameters, size_on_disk
from apt_trainer.models.parts import weigh_parts
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.training.trainer import APTTrainer

Sizes = dict[str, Any]


def sizes(trainer: APTTrainer, output: Path, at_start: int, vocabulary: Mapping[str, Any]) -> Sizes:
    """Of the model that ``trainer`` has trained and ``output`` holds; all of a dense one beside it in the dense shape.

    ``at_start``: parameters when the run began. ``vocabulary``: what of the tokens went before it, if any did.
    """
    pruner, dense = trainer.pruner, dense_copy(trainer.model, "meta")
    found: Sizes = {
        "block_params_dense": int(pruner.block_cost.total(pruner.dense_plan.counts)),
        "block_params": int(pruner.block_cost.total(pruner.plan.counts)),
        "sparsity": pruner.sparsity(),
        "parts_dense": _parts(dense, trainer),
        "parts": _parts(trainer.model, trainer),
        "total_params_dense": count_parameters(dense),
        "total_params": count_parameters(trainer.model),
        "disk_bytes_dense": sum(p.numel() * p.element_size() for p in dense.parameters()),
        "disk_bytes": size_on_disk(output),
    }
    if pruner.origin.is_pruned:
        found |= {
            "block_params_start": int(pruner.block_cost.total(pruner.origin.plan.counts)),
            "total_params_start": at_start,
            "sparsity_of_start": pruner.budget.removed_of_start(pruner.plan),
        }
    return found | _vocabulary(found, vocabulary) if vocabulary else found


def _parts(model: Any, trainer: APTTrainer) -> dict[str, dict[str, int]]:
    """Parameters and bytes of blocks, embeddings, head and the rest."""
    return {part: weight._asdict() for part, weight in weigh_parts(model, trainer.pruner.family).items()}


def _vocabulary(found: Sizes, vocabulary: Mapping[str, Any]) -> Sizes:
    """``found`` with what tokens that are gone weighed in the dense model, of embeddings and head."""
    names = (("params", "parameters"), ("bytes", "bytes"))
    gone = {name: vocabulary[f"{key}_before"] - vocabulary[key] for name, key in names}
    return {
        "vocabulary": dict(vocabulary),
        "parts_dense": found["parts_dense"] | {"vocabulary": gone},
        "total_params_dense": found["total_params_dense"] + gone["params"],
        "disk_bytes_dense": found["disk_bytes_dense"] + gone["bytes"],
    }
