"""DeepSpeed ZeRO-1 and ZeRO-2: whole parameters on every process, optimizer state in flat parts, one per process.

A group of the optimizer is one flat tensor with one step count, so parameters of different age train in different
groups. Uses names of DeepSpeed that are not documented; checked with deepspeed 0.19.8. What differs in ZeRO-3 is in
``engines.zero3``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from apt_trainer.engines.base import Engine, fresh_leaves
from apt_trainer.engines.state import MASTER, STEP, Edits, State, follow, follow_master, step_tensor
from apt_trainer.errors import UserError
from apt_trainer.partition import whole


@dataclass(frozen=True)
class Shard:
    """The part of a tensor of shape ``shape`` that this process keeps while the engine is rebuilt, on the CPU."""

    part: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, whole: torch.Tensor) -> Shard:
        """``whole`` is equal on all processes."""
        world = dist.get_world_size()
        size = -(-whole.numel() // world)
        flat = F.pad(whole.detach().flatten(), (0, size * world - whole.numel()))
        return cls(flat.narrow(0, size * dist.get_rank(), size).cpu().clone(), whole.shape)

    def whole(self, device: torch.device) -> torch.Tensor:
        """The tensor again; all processes must ask for it."""
        parts = [torch.empty_like(self.part, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.part.to(device))
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)


OF_ENGINE = (
    "module_forward_pre_hook",
    "module_forward_post_hook",
    "basic_optimizer",
    "client_optimizer",
    "seq_data_parallel_group",
)
"""Undocumented attributes of DeepSpeed's engine that are used here."""


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

    one_dtype = True
    groups_by_age = True
    of_optimizer: tuple[str, ...] = (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "_hp_optimizer_states_linked",
        "_lazy_init_hp_params_optimizer_state",
    )
    """Undocumented attributes of DeepSpeed's optimizer that are used here."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._engine: Any = trainer.model_wrapped
        self._trained: dict[str, nn.Parameter] = {}

    @property
    def model(self) -> Any:
        return self._engine.module

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def bring(self, model: nn.Module) -> None:
        model.to(self.trainer.args.device)  # with DeepSpeed the Trainer leaves that to the engine

    def check(self) -> None:
        used = [(self._engine, name) for name in OF_ENGINE] + [(self._zero, name) for name in self.of_optimizer]
        missing = [f"{type(owner).__name__}.{name}" for owner, name in used if not hasattr(owner, name)]
        if missing:
            raise UserError(
                f"deepspeed {version('deepspeed')} has no {', '.join(missing)}, which changing shapes needs. "
                "Install deepspeed 0.19.8, or use DDP."
            )
        # DeepSpeed works in a copy of the group of all processes, which has torch's own time-out.
        timeout = timedelta(seconds=self.trainer.args.ddp_timeout)
        dist.distributed_c10d._set_pg_timeout(timeout, self._engine.seq_data_parallel_group)
        self.trainer.remove_callback(EndAtSkippedStep)
        self.trainer.add_callback(EndAtSkippedStep)

    def loosen(self) -> Any:
        model = self.model
        self._unhook()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        fresh_leaves(model, copy=True)  # the old ones are views of the flat buffer
        return model

    def carried(self, edits: Edits) -> State:
        new = dict(self.model.named_parameters())
        carried: State = {}
        for name, state in self.states():
            if name in new and new[name].requires_grad:
                carried[name] = {
                    key: self._kept(value, key, edits.get(name, []), new[name]) for key, value in state.items()
                }
        return carried

    def _kept(self, value: Any, key: str, edits: list[Any], new: nn.Parameter) -> Any:
        if not torch.is_tensor(value):
            return value
        if key != MASTER:
            return Shard.of(follow(value, key, edits))
        with whole(new) as (current,):
            return Shard.of(follow_master(value, edits, current))

    def release(self) -> None:
        zero, inner = self._zero, self._engine.basic_optimizer
        self.trainer.accelerator.deepspeed_engine_wrapped = None  # or backward() would go to the old engine
        self._engine.destroy()
        self._engine.optimizer = self._engine.basic_optimizer = self._engine.client_optimizer = None
        self._engine.param_names = {}
        self._trained = {}
        # Frames of the training loop still refer to these: only emptied do they give their memory back.
        zero.__dict__.clear()
        inner.state.clear()
        inner.param_groups.clear()
        self.trainer.deepspeed = None

    def give(self, state: State) -> None:
        """Collective: each parameter is whole for a moment."""
        device = self._engine.device
        self._fill(state, lambda value: value.whole(device))

    # ------------------------------------------------------------------ checkpoints

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        trained = self._trained or {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        groups = {id(p): number for number, group in enumerate(self._groups()) for p in group}
        keys = self._moment_keys()
        if keys:
            self._link()
        for name, parameter in trained.items():
            state: dict[str, Any] = {}
            if parameter.dtype != torch.float32:
                state[MASTER] = self._read(parameter, None)
            if keys:
                state |= {key: self._read(parameter, key) for key in keys}
                inner = self._inner_state(groups[id(parameter)])
                if STEP in inner:
                    state[STEP] = int(inner[STEP])
            yield name, state

    def give_whole(self, state: State) -> None:
        device = self._engine.device
        self._fill(state, lambda value: value.to(device))

    def leave(self) -> Any:
        model = self.loosen()
        self.release()
        self.trainer.is_deepspeed_enabled = False  # what follows is evaluation of a plain model
        self.trainer.accelerator._models.clear()
        return model

    # ------------------------------------------------------------------ inside

    def _unhook(self) -> None:
        for hook in (self._engine.module_forward_pre_hook, self._engine.module_forward_post_hook):
            if hook is not None:
                hook.remove()
        self._engine.module_forward_pre_hook = self._engine.module_forward_post_hook = None
        self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each group of the optimizer."""
        return self._zero.bit16_groups  # type: ignore[no-any-return]

    def _flats(self) -> list[torch.Tensor]:
        """This process' flat float32 part of each group."""
        return self._zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _inner_state(self, group: int) -> dict[str, Any]:
        return self._zero.optimizer.state[self._flats()[group]]  # type: ignore[no-any-return]

    def _moment_keys(self) -> list[str]:
        """Names of the state tensors; none before the first step."""
        if not any(flat in self._zero.optimizer.state for flat in self._flats()):
            return []
        flat = self._flats()[0]
        state = self._inner_state(0)
        return sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)

    def _link(self) -> None:
        """Link parameters with their parts of the state anew.

        DeepSpeed does so when the first group has stepped, when those of the other groups do not exist yet.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _fill(self, state: State, whole: Any) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        moments = sorted({key for of_parameter in state.values() for key in of_parameter} - {MASTER, STEP})
        if moments:
            self._begin(state, moments, names)
        for name, parameter in self.model.named_parameters():
            for key, value in sorted(state.get(name, {}).items()):
                if key != STEP and parameter.requires_grad:
                    self._write(parameter, whole(value).float(), None if key == MASTER else key)
        self._engine.global_steps = self.trainer.state.global_step

    def _begin(self, state: State, moments: list[str], names: dict[int, str]) -> None:
        """Make the state of every group, which DeepSpeed would only do at its first step."""
        counts = any(STEP in of_parameter for of_parameter in state.values())
        for flat, members in zip(self._flats(), self._groups(), strict=True):
            steps = {int(state.get(names[id(p)], {}).get(STEP, 0)) for p in members}
            assert len(steps) == 1, f"parameters of {len(steps)} ages share a group"
            inner = self._zero.optimizer.state[flat]
            inner |= {key: torch.zeros_like(flat.data) for key in moments}
            if counts:
                inner[STEP] = self._step_value(steps.pop(), flat.device)
        self._link()

    def _step_value(self, steps: int, device: torch.device) -> Any:
        # DeepSpeed's own Adam for the CPU counts in an int, torch's in a tensor
        optimizer = self._zero.optimizer
        is_torch = type(optimizer).__module__.startswith("torch.")
        return step_tensor(steps, optimizer.param_groups[0], device) if is_torch else steps

    def _read(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key is None:
            return safe_get_full_fp32_param(parameter).cpu()  # type: ignore[no-any-return]
        return safe_get_full_optimizer_state(parameter, key).cpu()  # type: ignore[no-any-return]

    def _write(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
