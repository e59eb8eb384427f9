"""What trains the model: one process, DDP, DeepSpeed ZeRO or FSDP2; a class each for what a change of shape needs.

To support another, subclass :class:`Engine` and name it below. What an engine knows of a Trainer are the
:class:`Parts` that :func:`engine_of` gives it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch

from apt_trainer.training.engines.base import Engine, Parts

__all__ = ["Engine", "Parts", "engine_name", "engine_of", "zero_stage"]


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
    args = trainer.args
    return _kind(trainer)(
        Parts(
            wrapped=trainer.model_wrapped,
            optimizer=trainer.optimizer,
            accelerator=trainer.accelerator,
            family=trainer.pruner.family,
            device=args.device,
            dtype=torch.bfloat16 if args.bf16 else torch.float32,
            steps=trainer.state.global_step,
            writes=args.should_save,
            timeout=timedelta(seconds=args.ddp_timeout),
            groups=trainer.own_optimizer.groups,
        )
    )


def _kind(trainer: Any) -> type[Engine]:
    stage = zero_stage(trainer)
    if stage == 0 and trainer.is_fsdp_enabled:
        from apt_trainer.training.engines.fsdp2 import Fsdp2Engine

        return Fsdp2Engine
    if stage == 0:
        return Engine
    if stage == 3:
        from apt_trainer.training.engines.zero3 import Zero3Engine

        return Zero3Engine
    from apt_trainer.training.engines.zero import ZeroEngine

    return ZeroEngine
