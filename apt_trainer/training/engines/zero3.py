"""DeepSpeed ZeRO-3: each process holds a part of every parameter, and of its optimizer state.

What is whole, and when. At start the model (and an external teacher) lies in a mapping of its file, where weights are
loaded in the type that they have there, which processes of one machine share; only the first one reads it, a parameter
at a time, and sends each to the others. Weights that were converted as they were loaded, or are those of a checkpoint,
are whole in host memory; and for a cut before training the whole model is on the device while it is scored. From the
first engine on, no process holds more than parts. In a step, DeepSpeed makes the parameters of one module whole at a
time (and what it fetches ahead). At a change of shape the engine is left with all parameters partitioned, and each
that changes is whole on every process while it is cut, grown or merged (an adapter together with the weight it is
merged into). The teacher shares the partitions of frozen weights and has partitions of its own of the rest; the
parameters of each of its modules are whole while that runs. In a checkpoint the process that writes it collects all
weights, the teacher's too, in host memory, and a resumed run begins with both whole on each process there. After
training the finished model is whole on every process and on its device.

DeepSpeed keeps the weights that train, their gradients and each of their moments in flat buffers. At a change of shape
the first two are let go at once (weights that are offloaded, with the engine), and moments group by group. For that
groups of the optimizer are made no larger than a layer, where ``sub_group_size`` is not given; a step then takes one
small reduction per group, for the norm of the gradients. Moments of what did not change stay in their parts.

Uses names of DeepSpeed that are not documented (``libraries.private_names``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from apt_trainer.tensors import partitioned as partition
from apt_trainer.tensors.partitioned import make_whole, move_buffers, whole
from apt_trainer.training.engines.flat_optimizer import PartitionedOptimizer
from apt_trainer.training.engines.zero import ZeroEngine


class Zero3Engine(ZeroEngine):
    """ZeRO-3."""

    needs = ("zero", "zero3")
    leaves_cycles = True
    splits = True

    @cached_property
    def _optimizer(self) -> PartitionedOptimizer:
        return PartitionedOptimizer(self._engine.optimizer, self._engine.device)

    def wrap(self, model: nn.Module) -> None:
        """Partition the model parameter by parameter, in the type it trains in; DeepSpeed would put the whole of it on
        the device first."""
        import deepspeed

        if partition.is_partitioned(next(model.parameters())):
            return
        dtype = self.parts.dtype
        zero = self._plugin.deepspeed_config["zero_optimization"]
        carried = 2 if dtype == torch.float32 else 3  # two moments, and values in float32
        zero.setdefault("sub_group_size", max(1, self._block_part(model) // carried))
        settings = {
            "train_batch_size": dist.get_world_size(),  # asked for, not used
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {name: value for name, value in zero.items() if value != "auto"},
        }
        deepspeed.init_distributed(dist.get_backend())
        first, *others = model.parameters()
        with partition.in_own_memory(first, self.parts.device, dtype):
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=settings, dtype=dtype)
        for parameter in others:
            with partition.in_own_memory(parameter, self.parts.device, dtype):
                first.convert_to_zero_parameters([parameter])
        move_buffers(model, next(model.parameters()).device)

    def place_teacher(self, model: nn.Module) -> nn.Module:
        """In host memory, until the student is partitioned and it can be too."""
        return model

    def repair(self) -> None:
        super().repair()
        # Generation in an evaluation asks this for whether all processes must go on until the last one is done.
        set_hf_deepspeed_config(self._plugin.hf_ds_config)

    def settle(self) -> None:
        """Wait for parameters that were fetched ahead, and let go of them again."""
        self._coordinator()._clean_inflight_param_registry()

    def unwrap(self) -> Any:
        """The model with all parameters partitioned and no hook of the engine on it."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self._coordinator().release_and_reset_all(self.model)
        self._engine.optimizer.parameter_offload.destroy()
        partition.strip_modules(self.model)
        FWD_MODULE_STACK.clear()
        self._optimizer.forget_gradients()
        model = super().unwrap()
        self._optimizer.forget_weights()
        return model

    def release(self) -> None:
        dead, offload = list(self._trained.values()), self._engine.optimizer.parameter_offload
        super().release()
        # Cycles through hooks in C++, which the garbage collector does not see.
        for parameter in dead:
            parameter.__dict__.clear()
        _forget_modules(offload.param_coordinator)
        offload.param_coordinator.__dict__.clear()
        offload.__dict__.clear()

    def finalize(self) -> Any:
        """The plain model, whole on every process."""
        from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

        model = super().finalize()
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

    @property
    def _plugin(self) -> Any:
        return self.parts.accelerator.state.deepspeed_plugin

    def _coordinator(self) -> Any:
        return self._engine.optimizer.parameter_offload.get_param_coordinator()

    def _block_part(self, model: nn.Module) -> int:
        """Entries of one block of ``model`` that a process has, on average, without adapters."""
        blocks = [model.get_submodule(path) for path in self.parts.family.block_modules(model)]
        named = (named for block in blocks for named in block.named_parameters() if ".lora_" not in named[0])
        return sum(parameter.numel() for _, parameter in named) // (len(blocks) * dist.get_world_size())


def _forget_modules(coordinator: Any) -> None:
    """Clear a cache that belongs to the class and would keep every module of every engine for good."""
    cached = getattr(type(coordinator), "_PartitionedParameterCoordinator__params_to_release", None)
    for cell in getattr(cached, "__closure__", None) or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
