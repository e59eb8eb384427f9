"""What trains the model: one process, DDP, DeepSpeed ZeRO or FSDP2; a class each for what a change of shape needs.

To support another, subclass :class:`Engine` and name it in :func:`engine_of`. Not for deciding what changes.
"""

from __future__ import annotations

from typing import Any

from apt_trainer.training.engines.base import Engine

__all__ = ["Engine", "engine_name", "engine_of", "zero_stage"]


def zero_stage(trainer: Any) -> int:
    """Stage of ZeRO that ``trainer`` was started with; 0 without DeepSpeed."""
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage) if trainer.is_deepspeed_enabled else 0


def engine_name(trainer: Any) -> str:
    """What ``trainer`` was started with: "one process", "ddp", "zero1" to "zero3" or "fsdp2"."""
    stage = zero_stage(trainer)
    if stage or trainer.is_fsdp_enabled:
        return f"zero{stage}" if stage else "fsdp2"
    return "ddp" if trainer.args.world_size > 1 else "one process"


def engine_of(trainer: Any) -> Engine:
    """The engine that ``trainer`` has at this moment."""
    stage = zero_stage(trainer)
    if stage == 0 and trainer.is_fsdp_enabled:
        from apt_trainer.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(trainer)
    if stage == 0:
        return Engine(trainer)
    if stage == 3:
        from apt_trainer.training.engines.zero3 import Zero3Engine

        return Zero3Engine(trainer)
    from apt_trainer.training.engines.zero import ZeroEngine

    return ZeroEngine(trainer)
