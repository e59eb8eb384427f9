"""What trains: adapters and task head, norms too, or every remaining base weight.

Not for optimizers or learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from apt_trainer.models import ModelFamily
from apt_trainer.plan.schedule import Schedule
from apt_trainer.settings import AdapterSettings, MethodSettings

TRANSFORM = "apt_transform"
"""Attribute of the student that holds the distillation transform while it trains."""


def set_trainable(
    model: nn.Module, family: ModelFamily, tune: str, settings: MethodSettings, norms: Sequence[str]
) -> None:
    """Mark the parameters that train under ``tune`` ("adapters", "adapters_and_norms" or "full").

    ``norms``: paths of the norms that "adapters_and_norms" trains.
    """
    heads = _below(family.trained_head(model)) if settings.details.train_head else ()
    # by identity, since a tied weight goes by the name of the head that shares it
    embeddings = {id(p) for path in family.embedding_modules(model) for p in model.get_submodule(path).parameters()}
    norm_prefixes = _below(norms) if tune == "adapters_and_norms" else ()
    for name, parameter in model.named_parameters():
        if tune == "full":
            trains = settings.tune_embeddings or id(parameter) not in embeddings
        else:
            trains = ".lora_" in name or name.startswith(norm_prefixes)
        parameter.requires_grad_(trains or name.startswith(heads) or name.startswith(TRANSFORM))


def tune_at(settings: AdapterSettings, schedule: Schedule, step: int, tune: str) -> str:
    """What trains after ``step`` completed steps, where ``tune`` did before."""
    if settings.tune_after_pruning and schedule.events and step >= schedule.end:
        tune = settings.tune_after_pruning
    ended = step >= max(schedule.distillation_end, schedule.end)
    if settings.tune_after_distillation and ended and step > 0:
        tune = settings.tune_after_distillation
    return tune


def base_weight_names(model: nn.Module, family: ModelFamily) -> set[str]:
    """Trained parameters of the pretrained model itself: neither adapter, task head nor distillation transform."""
    others = (*_below(family.trained_head(model)), TRANSFORM)
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name and not name.startswith(others)
    }


def _below(paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(path + "." for path in paths)
