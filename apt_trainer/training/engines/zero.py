"""DeepSpeed ZeRO-1 and ZeRO-2: whole parameters on every process, optimizer state in flat parts, one per process.

A group of the optimizer is one flat tensor with one step count (``flat_optimizer``), so parameters of different age
train in different groups. Uses names of DeepSpeed that are not documented (``libraries.private_names``). What differs
in ZeRO-3 is in ``training.engines.zero3``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback

from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import Use
from apt_trainer.surgery.slicing import Edits
from apt_trainer.training.engines.base import Engine, Parts, fresh_leaves
from apt_trainer.training.engines.flat_optimizer import FlatOptimizer
from apt_trainer.training.engines.state import State


class EndAtSkippedStep(TrainerCallback):
    """Ends a run whose gradients are not finite: DeepSpeed leaves such a step out and goes on without a word, where in
    other engines the loss shows it."""

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, optimizer: AcceleratedOptimizer, **kwargs: Any
    ) -> None:
        if optimizer.step_was_skipped:
            raise UserError(
                f"The gradient is not finite at step {state.global_step + 1}; nothing was saved since the last "
                "checkpoint. Lower learning_rate or full_learning_rate, or look at the data."
            )


class ZeroEngine(Engine):
    """ZeRO-1 and ZeRO-2."""

    needs: tuple[Use, ...] = ("zero", "zero12")
    one_dtype = True
    groups_by_age = True
    callbacks = (EndAtSkippedStep,)

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._engine: Any = parts.wrapped
        self._trained: dict[str, nn.Parameter] = {}

    @property
    def model(self) -> Any:
        return self._engine.module

    @cached_property
    def _optimizer(self) -> FlatOptimizer:
        return FlatOptimizer(self._engine.optimizer, self._engine.device)

    def place_student(self, model: nn.Module) -> None:
        model.to(self.parts.device)  # with DeepSpeed the Trainer leaves that to the engine

    def repair(self) -> None:
        # DeepSpeed works in a copy of the group of all processes, which has torch's own time-out.
        dist.distributed_c10d._set_pg_timeout(self.parts.timeout, self._engine.seq_data_parallel_group)

    def unwrap(self) -> Any:
        model = self.model
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            if hook is not None:
                hook.remove()
        self._engine.module_forward_pre_hook = self._engine.module_forward_post_hook = None
        model.__dict__.pop("_is_accelerate_prepared", None)
        self._trained = _trained(model)
        self._optimizer.look(self._trained)
        fresh_leaves(model, copy=True)  # the old ones are views of the flat buffer
        return model

    def export_state(self, edits: Edits) -> State:
        return self._optimizer.export_state(_trained(self.model), edits)

    def release(self) -> None:
        zero, inner = self._engine.optimizer, self._engine.basic_optimizer
        self.parts.accelerator.deepspeed_engine_wrapped = None  # or backward() would go to the old engine
        self._engine.destroy()
        self._engine.optimizer = self._engine.basic_optimizer = self._engine.client_optimizer = None
        self._engine.param_names = {}
        self._trained = {}
        del self._optimizer  # and the parameters that it has looked at
        # Frames of the training loop still refer to these: only emptied do they give their memory back.
        zero.__dict__.clear()
        inner.state.clear()
        inner.param_groups.clear()

    def import_state(self, state: State) -> None:
        """Collective; ``state`` is empty afterwards."""
        self._optimizer.import_state({id(p): name for name, p in self.model.named_parameters()}, state)
        self._engine.global_steps = self.parts.steps

    # ------------------------------------------------------------------ checkpoints

    def whole_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self._optimizer.look(_trained(self.model))
        yield from self._optimizer.whole_states()

    def import_whole(self, state: State) -> None:
        self.import_state(state)

    def finalize(self) -> Any:
        model = self.unwrap()
        self.release()
        self.parts.accelerator._models.clear()
        return model


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
