"""State of DeepSpeed's optimizers by parameter, read out of and written into their flat parts.

A group of the optimizer is one flat tensor with one step count, of which each process has a part. Uses names of
DeepSpeed that are not documented (``libraries.private_names``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from apt_trainer.surgery.slicing import Grow, NewValues
from apt_trainer.tensors.partitioned import shape_of, whole
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


class FlatOptimizer:
    """That of ZeRO-1 and ZeRO-2. ``zero``: DeepSpeed's; ``device``: where parameters are."""

    def __init__(self, zero: Any, device: torch.device) -> None:
        self._zero, self._device = zero, device
        self._trained: Mapping[str, nn.Parameter] = {}
        self._moments: list[str] = []

    def look(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Before its state is read: the parameters that it holds, by name."""
        self._trained, self._moments = trained, self._moment_keys()

    def whole_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Whole state of one parameter after the other, on the CPU; collective."""
        for number, members in enumerate(self._named_groups()):
            for name, parameter in members:
                state: dict[str, Any] = {}
                for key in self._keys_of(number, parameter):
                    state[key] = self._steps(number) if key == STEP else self._read(parameter, key).cpu()
                yield name, state

    def export_state(self, new: Mapping[str, nn.Parameter], edits: Edits) -> State:
        """State after ``edits``, of those that train afterwards (``new``); of one tensor after the other, each whole
        for a moment. Collective."""
        carried: State = {name: {} for name in self._trained if name in new}
        for number, members in enumerate(self._named_groups()):
            for name, parameter in members:
                for key in self._keys_of(number, parameter) if name in new else ():
                    carried[name][key] = self._kept(number, parameter, key, edits.get(name, []), new[name])
            self._let_go(number)
        return carried

    def import_state(self, names: Mapping[int, str], state: State) -> None:
        """Put ``state`` in, by the ``names`` of parameters' ids; it is empty afterwards. Collective."""
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

    # ------------------------------------------------------------------ inside

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

    def _groups(self) -> list[list[nn.Parameter]]:
        """Parameters of each group of the optimizer."""
        return self._zero.bit16_groups  # type: ignore[no-any-return]

    def _flats(self) -> list[torch.Tensor]:
        """This process' flat float32 part of each group."""
        return self._zero.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    def _named_groups(self) -> list[list[tuple[str, nn.Parameter]]]:
        names = {id(parameter): name for name, parameter in self._trained.items()}
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

        value = (value.whole(self._device) if isinstance(value, Shard) else value.to(self._device)).float()
        if key == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)


class PartitionedOptimizer(FlatOptimizer):
    """That of ZeRO-3, whose parameters are partitioned too."""

    def forget_gradients(self) -> None:
        """All are nought between two steps."""
        self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        self._zero.grad_partitions_flat_buffer = None
        self._zero.ipg_buckets = {}
        for flat in self._flats():  # there if the optimizer is offloaded
            flat.grad = None

    def forget_weights(self) -> None:
        """Those that train, of which the model has copies now; not the float32 ones beside half-precision ones."""
        self._zero.fp16_partitioned_groups.clear()
        self._zero.fp16_partitioned_groups_flat.clear()
        self._zero.lp_param_buffer = None
        for parameter in self._trained.values():
            parameter.ds_tensor.data = parameter.ds_tensor.data[:0].clone()  # type: ignore[attr-defined]
        for flat, members in zip(self._flats(), self._groups(), strict=True):
            if members[0].dtype == torch.float32:
                flat.data = flat.data[:0].clone()

    def _kept(self, group: int, old: nn.Parameter, key: str, edits: list[Any], new: nn.Parameter) -> Any:
        if edits or key == STEP:
            return super()._kept(group, old, key, edits, new)
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        part = safe_get_local_fp32_param(old) if key == MASTER else safe_get_local_optimizer_state(old, key)
        return Shard(part.detach().to("cpu", copy=True), shape_of(old))

    def _let_go(self, group: int) -> None:
        flat = self._flats()[group]
        flat.data = flat.data[:0].clone()
        self._inner_state(group).clear()

    def _filled_together(self) -> list[range]:
        return [range(number, number + 1) for number in range(len(self._groups()))]

    def _groups(self) -> list[list[nn.Parameter]]:
        return self._zero.fp16_groups  # type: ignore[no-any-return]

    def _flats(self) -> list[torch.Tensor]:
        return self._zero.fp32_partitioned_groups_flat  # type: ignore[no-any-return]

    def _link(self) -> None:
        """Nothing to link: parameters are found by their number."""

    def _write(self, parameter: nn.Parameter, value: Shard | torch.Tensor, key: str) -> None:
        # DeepSpeed's setters of whole values leave out the padding of sizes that processes do not divide.
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        part = (value if isinstance(value, Shard) else Shard.of(value)).part.float()
        assert part.numel() == parameter.ds_tensor.numel(), "partitioned in another way"  # type: ignore[attr-defined]
        if key == MASTER:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
