"""Options of ``TrainingArguments`` under which shapes cannot change or a model would be lost, and why.

Those that depend on an engine are in ``settings.engines`` and ``settings.fsdp``; all others work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from apt_trainer.errors import UserError

_OPTIMIZERS = ("galore", "apollo", "lomo", "adalomo", "schedule_free")
_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "lr_scheduler_type",
        _SCHEDULES.__contains__,
        "follows a metric, which a change of shape interrupts. Use one that follows the step, for example linear or "
        "cosine",
    ),
    (
        "optim",
        lambda name: name.startswith(_OPTIMIZERS),
        "steps during the backward pass, projects gradients of fixed shapes or keeps other weights than it trains, "
        "none of which survives a change of shape. Use, for example, adamw_torch, adamw_torch_fused or adafactor",
    ),
    ("enable_jit_checkpoint", bool, "saves in the middle of a step. Remove it: SIGTERM saves after a step anyway"),
    ("auto_find_batch_size", bool, "restarts training on a model that may be cut already. Switch it off"),
    (
        "use_liger_kernel",
        bool,
        "replaces modules whose shapes change, and leaves out the logits that distillation compares. Remove it",
    ),
    (
        "debug",
        lambda given: any("underflow_overflow" in str(getattr(one, "value", one)) for one in given),
        "hooks every module, and some are replaced. Remove it: a loss that is not finite ends a run by itself",
    ),
    ("parallelism_config", lambda given: given is not None, "splits single weights, whose shapes change. Remove it"),
)
"""(name, whether a value is refused, why and what to do)."""


def check_refused(args: Any) -> None:
    """Raise :class:`UserError` for the first option that is refused; ``args`` are complete."""
    for name, is_refused, why in REFUSED:
        value = getattr(args, name)
        value = getattr(value, "value", value)
        if is_refused(value):
            raise UserError(f"{name}={value!r} {why}.")
