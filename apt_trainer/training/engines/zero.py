"""DeepSpeed ZeRO-1 and ZeRO-2: whole parameters on every process, optimizer state in flat parts, one per process.

A group of the optimizer is one flat tensor with one step count, so parameters of different age train in different
groups. Uses names of DeepSpeed that are not documented (``libraries.private_names``). What differs in ZeRO-3 is in
``training.engines.zero3``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import TrainerCallback

from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import Use
from apt_trainer.surgery.slicing import Grow, NewValues
from apt_trainer.tensors.partitioned import whole
from apt_trainer.training.engines.base import Engine, fresh_leaves
from apt_trainer.training.engines.state import MASTER, STEP, Edits, State, follow, follow_master, step_tensor


@dataclass(frozen=True)
class Shard:
    """The part of a tensor of shape ``shape`` that this process keeps while the engine is rebuilt, on the CPU; padded
    with zeros, and cut as ZeRO-3 does."""

    part: torch.Tensor
    shape: torch.Size

    @classmethod
    def of(cls, whole: torch.Tensor) -> Shard:
        """``whole`` is equal on all processes."""
        size = -(-whole.numel() // dist.get_world_size())
        flat = whole.detach().flatten()[size * dist.get_rank() :][:size]
        part = torch.zeros(size, dtype=whole.dtype)
        part[: flat.numel()] = flat
        return cls(part, whole.shape)

    def whole(self, device: torch.device) -> torch.Tensor:
        """The tensor again; all processes must ask for it."""
        parts = [torch.empty_like(self.part, device=device) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.part.to(device))
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)


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

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer)
        self._engine: Any = trainer.model_wrapped
        self._trained: dict[str, nn.Parameter] = {}
        self._moments: list[str] = []

    @property
    def model(self) -> Any:
        return self._engine.module

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def bring(self, model: nn.Module) -> None:
        model.to(self.trainer.args.device)  # with DeepSpeed the Trainer leaves that to the engine

    def check(self) -> None:
        # DeepSpeed works in a copy of the group of all processes, which has torch's own time-out.
        timeout = timedelta(seconds=self.trainer.args.ddp_timeout)
        dist.distributed_c10d._set_pg_timeout(timeout, self._engine.seq_data_parallel_group)
        self.trainer.remove_callback(EndAtSkippedStep)
        self.trainer.add_callback(EndAtSkippedStep)

    def loosen(self) -> Any:
        model = self.model
        self._unhook()
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._moments = self._moment_keys()
        fresh_leaves(model, copy=True)  # the old ones are views of the flat buffer
        return model

    def carried(self, edits: Edits) -> State:
        """Of one tensor after the other, each whole for a moment."""
        new = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        carried: State = {name: {} for name in self._trained if name in new}
        for number, members in enumerate(self._named_groups(self._trained)):
            for name, parameter in members:
                for key in self._keys_of(number, parameter) if name in new else ():
                    carried[name][key] = self._kept(number, parameter, key, edits.get(name, []), new[name])
            self._let_go(number)
        return carried

    def _kept(self, group: int, old: nn.Parameter, key: str, edits: list[Any], new: nn.Parameter) -> Any:
        if key == STEP:
            return self._steps(group)
        value = self._read(old, key)
        if key == MASTER and any(isinstance(edit, Grow | NewValues) for edit in edits):
            with whole(new) as (current,):
                return Shard.of(follow_master(value, edits, current))
        return Shard.of(follow(value, key, edits, in_place=True))

    def _let_go(self, group: int) -> None:
        """What the optimizer has kept of a group has been carried."""

    def check_optimizer(self) -> None:
        """Nothing: DeepSpeed's holds flat parts, and none that a subclass makes is let pass."""

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
        """Collective; ``state`` is empty afterwards."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        keys = {key for of_parameter in state.values() for key in of_parameter} - {MASTER}
        for numbers in self._filled_together():
            for number in numbers if keys else ():
                self._begin(number, keys, [state.get(names[id(p)], {}) for p in self._groups()[number]])
            if keys:
                self._link()
            for parameter in [p for number in numbers for p in self._groups()[number]]:
                for key, value in sorted(state.pop(names[id(parameter)], {}).items()):
                    if key != STEP:
                        self._write(parameter, value, key)
        state.clear()
        self._engine.global_steps = self.trainer.state.global_step

    # ------------------------------------------------------------------ checkpoints

    def states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._moments = self._moment_keys()
        for number, members in enumerate(self._named_groups(trained)):
            for name, parameter in members:
                state: dict[str, Any] = {}
                for key in self._keys_of(number, parameter):
                    state[key] = self._steps(number) if key == STEP else self._read(parameter, key).cpu()
                yield name, state

    def give_whole(self, state: State) -> None:
        self.give(state)

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

    def _named_groups(self, trained: Mapping[str, nn.Parameter]) -> list[list[tuple[str, nn.Parameter]]]:
        names = {id(parameter): name for name, parameter in trained.items()}
        return [[(names[id(p)], p) for p in group] for group in self._groups()]

    def _filled_together(self) -> list[range]:
        """Numbers of groups whose state is made before any of it is written to: all, for :meth:`_link` wants them."""
        return [range(len(self._groups()))]

    def _inner_state(self, group: int) -> dict[str, Any]:
        return self._zero.optimizer.state[self._flats()[group]]  # type: ignore[no-any-return]

    def _moment_keys(self) -> list[str]:
        """Names of the state tensors, ready to be read; none before the first step."""
        if not any(flat in self._zero.optimizer.state for flat in self._flats()):
            return []
        flat, state = self._flats()[0], self._inner_state(0)
        keys = sorted(key for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape)
        if keys:
            self._link()
        return keys

    def _keys_of(self, group: int, parameter: nn.Parameter) -> list[str]:
        """What there is to carry of a parameter, in the order in which all processes ask for it."""
        masters = [MASTER] if parameter.dtype != torch.float32 else []
        counts = [STEP] if self._moments and STEP in self._inner_state(group) else []
        return masters + self._moments + counts

    def _steps(self, group: int) -> int:
        return int(self._inner_state(group)[STEP])

    def _link(self) -> None:
        """Link parameters with their parts of the state anew.

        DeepSpeed does so when the first group has stepped, when those of the other groups do not exist yet.
        """
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _begin(self, group: int, keys: set[str], states: list[dict[str, Any]]) -> None:
        """Make the state of a group, which DeepSpeed would only do at its first step."""
        flat = self._flats()[group]
        steps = {int(of_parameter.get(STEP, 0)) for of_parameter in states}
        assert len(steps) == 1, f"parameters of {len(steps)} ages share a group"
        inner = self._zero.optimizer.state[flat]
        inner |= {key: torch.zeros_like(flat.data) for key in sorted(keys - {STEP})}
        if STEP in keys:
            inner[STEP] = self._step_value(steps.pop(), flat.device)

    def _step_value(self, steps: int, device: torch.device) -> Any:
        # DeepSpeed's own Adam for the CPU counts in an int, torch's in a tensor
        optimizer = self._zero.optimizer
        is_torch = type(optimizer).__module__.startswith("torch.")
        return step_tensor(steps, optimizer.param_groups[0], device) if is_torch else steps

    def _read(self, parameter: nn.Parameter, key: str) -> torch.Tensor:
        """Whole, in memory of its own."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if key == MASTER:
            return safe_get_full_fp32_param(parameter)  # type: ignore[no-any-return]
        return safe_get_full_optimizer_state(parameter, key)  # type: ignore[no-any-return]

    def _write(self, parameter: nn.Parameter, value: Shard | torch.Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        device = self._engine.device
        value = (value.whole(device) if isinstance(value, Shard) else value.to(device)).float()
        if key == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
