"""How a setting is declared, and which values the ones with a choice may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from apt_trainer.errors import unknown_choice
from apt_trainer.settings.presets import PRESETS

TASKS = (
    "classification",
    "multi_label_classification",
    "regression",
    "embedding",
    "image_classification",
    "token_classification",
    "question_answering",
    "language_modeling",
    "masked_language_modeling",
    "instruction_tuning",
    "summarization",
    "translation",
)
PRUNE_TARGETS = ("heads", "neurons", "experts", "hidden", "sublayers")
POST_NORM_POLICIES = ("remove_norm", "keep_norm")
"""The first is the default."""
SHAPES = ("free", "uniform")
"""The first is the default."""
QUANTIZE = ("int8", "int4", "llm_int8", "nf4")
BASE_QUANTIZATION = ("nf4", "int8")
TUNE_MODES = ("adapters", "adapters_and_norms", "full")


@dataclass(frozen=True)
class Rule:
    """A scoring rule: what it is, for the help, and whether it scores whole ``sublayers`` alone."""

    help: str = ""
    sublayers: bool = False

    def describe(self, name: str) -> str:
        return f"{name} ({self.help})" if self.help else name


RULES = {
    "salience": Rule("APT"),
    "magnitude": Rule(),
    "taylor": Rule(),
    "random": Rule(),
    "cosine": Rule("LLM-Drop", sublayers=True),
    "nri": Rule(
        "loss without each of them, relative to its cost; measured on calibration_samples rows at every cut, no masks",
        sublayers=True,
    ),
}
"""The first is the default. ``importance: NAME`` is the class of that name in ``scoring/NAME.py``."""

CHOICES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "preset": tuple(PRESETS),
    "sparsity_metric": ("params", "total_params", "flops", "latency", "memory"),
    "pruning_time": ("before", "early", "late", "after"),
    "post_norm_policy": POST_NORM_POLICIES,
    "shape": SHAPES,
    "sparsity_schedule": ("cubic", "linear"),
    "importance": tuple(RULES),
    "nri_cost": ("params", "latency", "memory", "none"),
    "base_quantization": BASE_QUANTIZATION,
    "rank_growth": ("salience", "uniform", "none"),
    "tune": TUNE_MODES,
    "tune_after_pruning": TUNE_MODES,
    "tune_after_distillation": TUNE_MODES,
    "distillation": ("self", "model", "none"),
    "distillation_layer_map": ("dynamic", "static", "none"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
}


def rules_help() -> str:
    """The rules in words."""
    of_units, of_sublayers = (
        ", ".join(rule.describe(name) for name, rule in RULES.items() if rule.sublayers == only)
        for only in (False, True)
    )
    return f"Scoring rule: {of_units}; for sublayers only: {of_sublayers}."


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help text; lists are copied per instance."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def check_choices(settings: Any) -> None:
    for name, allowed in CHOICES.items():
        optional = name in ("tune_after_pruning", "tune_after_distillation", "base_quantization")
        value = getattr(settings, name, allowed[0])
        if value not in allowed and not (optional and value is None):
            raise unknown_choice(name, value, allowed)
