"""DeepSpeed ZeRO-3: each process holds a part of every parameter, and of its optimizer state.

What is whole, and when. At start each process has the whole model (and an external teacher) in host memory, as it was
loaded; for a cut before training the whole model is on the device while it is scored. From the first engine on, no
process holds more than parts. In a step, DeepSpeed makes the parameters of one module whole at a time (and what it
fetches ahead). At a change of shape the engine is left with all parameters partitioned, and each that changes is whole
on every process while it is cut, grown or merged (an adapter together with the weight it is merged into). The teacher
shares the partitions of frozen weights and has partitions of its own of the rest; the parameters of each of its
modules are whole while that runs. In a checkpoint the process that writes it collects all weights, the teacher's too,
in host memory, and a resumed run begins with both whole on each process there. After training the finished model is
whole on every process and on its device.

DeepSpeed keeps the weights that train, their gradients and each of their moments in flat buffers. At a change of shape
the first two are let go at once (weights that are offloaded, with the engine), and moments group by group. For that
groups of the optimizer are made no larger than a layer, where ``sub_group_size`` is not given; a step then takes one
small reduction per group, for the norm of the gradients. Moments of what did not change stay in their parts.

Uses names of DeepSpeed that are not documented (``libraries.private_names``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from apt_trainer.tensors import partitioned as partition
from apt_trainer.tensors.partitioned import make_whole, move_buffers, shape_of, whole
from apt_trainer.training.engines.state import MASTER, STEP
from apt_trainer.training.engines.zero import Shard, ZeroEngine


class Zero3Engine(ZeroEngine):
    """ZeRO-3."""

    needs = ("zero", "zero3")
    leaves_cycles = True

    def split(self) -> None:
        """Partition the model parameter by parameter, in the type it trains in; DeepSpeed would put the whole of it on
        the device first."""
        import deepspeed

        model, plugin = self.trainer.model, self.trainer.args.deepspeed_plugin
        dtype = torch.bfloat16 if self.trainer.args.bf16 else torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        zero = plugin.deepspeed_config["zero_optimization"]
        carried = 3 if self.trainer.args.bf16 else 2  # two moments, and values in float32
        zero.setdefault("sub_group_size", max(1, self._layer_part() // carried))
        settings = {
            "train_batch_size": dist.get_world_size(),  # asked for, not used
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {name: value for name, value in zero.items() if value != "auto"},
        }
        deepspeed.init_distributed(dist.get_backend())
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
        move_buffers(model, next(model.parameters()).device)

    def place(self, model: nn.Module) -> nn.Module:
        """In host memory, until the student is partitioned and it can be too."""
        return model

    def check(self) -> None:
        super().check()
        # Generation in an evaluation asks this for whether all processes must go on until the last one is done.
        set_hf_deepspeed_config(self.trainer.args.deepspeed_plugin.hf_ds_config)

    def settle(self) -> None:
        """Wait for parameters that were fetched ahead, and let go of them again."""
        self._coordinator()._clean_inflight_param_registry()

    def loosen(self) -> Any:
        """The model with all parameters partitioned and no hook of the engine on it."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._coordinator().release_and_reset_all(self.model)
        self._zero.parameter_offload.destroy()
        partition.strip_modules(self.model)
        FWD_MODULE_STACK.clear()
        self._forget_gradients()
        model = super().loosen()
        self._forget_weights()
        return model

    def release(self) -> None:
        dead, offload = list(self._trained.values()), self._zero.parameter_offload
        super().release()
        # Cycles through hooks in C++, which the garbage collector does not see.
        for parameter in dead:
            parameter.__dict__.clear()
        _forget_modules(offload.param_coordinator)
        offload.param_coordinator.__dict__.clear()
        offload.__dict__.clear()

    def leave(self) -> Any:
        """The plain model, whole on every process."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

        model = super().leave()
        make_whole(model)
        F.linear = getattr(Patches, "linear_bk", F.linear)  # which DeepSpeed has replaced by its own
        unset_hf_deepspeed_config()  # or models that are loaded from now on would be partitioned
        return model

    # ------------------------------------------------------------------ checkpoints

    def weights(self, model: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        """As in other engines; whole parameters in host memory, one at a time."""
        self.settle()
        yield from super().weights(model)

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        with whole(parameter) as (value,):
            return value.to("cpu", copy=True)

    # ------------------------------------------------------------------ inside

    def _coordinator(self) -> Any:
        return self._zero.parameter_offload.get_param_coordinator()

    def _layer_part(self) -> int:
        """Entries of one layer of the model at first that one process has."""
        pruner = self.trainer.pruner
        layers = len(pruner.family.block_modules(self.trainer.model))
        return int(pruner.block_cost.total(pruner.origin.plan.counts)) // (layers * dist.get_world_size())

    def _forget_gradients(self) -> None:
        """All are nought between two steps."""
        self._zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.clear()
        self._zero.grad_partitions_flat_buffer = None
        self._zero.ipg_buckets = {}
        for flat in self._flats():  # there if the optimizer is offloaded
            flat.grad = None

    def _forget_weights(self) -> None:
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


def _forget_modules(coordinator: Any) -> None:
    """Clear a cache that belongs to the class and would keep every module of every engine for good."""
    cached = getattr(type(coordinator), "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
