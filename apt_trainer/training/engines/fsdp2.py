"""FSDP2 of torch: each process holds a part of every parameter, and of its optimizer state. Experimental.

What is whole, and when. At start the model (and an external teacher) lies in a mapping of its file, where weights are
loaded in the type that they have there, of which each process reads its parts, block by block; weights that were
converted as they were loaded, or are those of a checkpoint, are whole in host memory. For a cut before training the
model is on the device as a whole. From the first engine on, a block is whole while it
runs, forwards or backwards, and all that is in no block (embeddings, last norm, head) during the whole step. At a
change of shape the model leaves FSDP2 with its parameters split as they are. One after the other, those that are
grown, merged or cut along their first dimension are whole on every process meanwhile, and their state; along other
dimensions each process cuts its own part. FSDP2 then takes over the parts. The teacher shares those of frozen weights
and has parts of its own of the rest; the parameters of each of its modules are whole while that runs. In a checkpoint
the process that writes it collects all weights, the teacher's too, in host memory, and a resumed run begins with both
whole on each process there. After training the finished model is whole on every process and on its device.

With bf16, parameters are kept and gradients summed in float32; what becomes whole for a step is bfloat16, and torch's
autocast decides by operation what computes in it, as under DDP, which leaves norms and embeddings in float32.

The Trainer and accelerate prepare the rest of it. accelerate leaves a model alone that FSDP2 holds already, but finds
the parameters of the optimizer by the addresses of their parts, which are all 0 for parts without entries; hence
:meth:`Fsdp2Engine.repair`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.modeling import get_mixed_precision_context_manager
from torch import nn

from apt_trainer.surgery.slicing import Edits, Keep, NewValues
from apt_trainer.tensors import fully_sharded
from apt_trainer.tensors.partitioned import make_whole, split_as, whole_value
from apt_trainer.training.engines.base import Engine, plain_optimizer
from apt_trainer.training.engines.state import State, follow


class Fsdp2Engine(Engine):
    """FSDP2."""

    needs = ("fsdp2",)
    splits = True

    def place_teacher(self, model: nn.Module) -> nn.Module:
        """In host memory, until the student is split and it can be too."""
        return model

    def place_student(self, model: nn.Module) -> None:
        model.to(self.parts.device)

    def wrap(self, model: nn.Module) -> None:
        """Put FSDP2 on block by block; accelerate would need the whole model for that."""
        accelerator = self.parts.accelerator
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = None  # or accelerate would look for layers by the names of their classes
        blocks = [model.get_submodule(path) for path in self.parts.family.block_modules(model)]
        mesh, policy = self._mesh(model), self._policy()
        fully_sharded.shard(model, blocks, mesh, policy, bool(plugin.reshard_after_forward))
        if policy.param_dtype is not None:
            _autocast(model, accelerator)

    def repair(self) -> None:
        """Give the optimizer the parameters that the model has."""
        held_groups, groups = plain_optimizer(self.parts).param_groups, self.parts.groups(self.model)
        for held, group in zip(held_groups, groups, strict=True):
            held["params"] = group["params"]

    def settle(self) -> None:
        """Let go of parameters that an evaluation has left whole."""
        fully_sharded.reshard(self.model)

    def unwrap(self) -> Any:
        """The model with its parameters split and no hook of FSDP2 on it."""
        self.settle()
        fully_sharded.strip(self.model)
        return super().unwrap()

    def export_state(self, edits: Edits) -> State:
        names = {name for name, _ in self.model.named_parameters()}
        state, self._state = self._state, {}
        carried: State = {}
        for name in list(state):
            of_parameter = state.pop(name)
            if name in names:
                of_edits = edits.get(name, [])
                carried[name] = {key: _followed(value, key, of_edits) for key, value in of_parameter.items()}
        return carried

    def finalize(self) -> Any:
        """The plain model, whole on every process."""
        model = self.unwrap()
        self.release()
        make_whole(model)
        self.parts.accelerator._models[:] = [model]  # or evaluation would put mixed precision on it once more
        model.__dict__.pop("_is_accelerate_prepared", None)
        return model

    # ------------------------------------------------------------------ checkpoints

    def weights(self, model: Any = None) -> Iterator[tuple[str, torch.Tensor]]:
        """As in other engines; whole parameters in host memory, one at a time."""
        self.settle()
        yield from super().weights(model)

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        return whole_value(parameter).to("cpu", copy=True)

    # ------------------------------------------------------------------ inside

    def _mesh(self, model: nn.Module) -> Any:
        """All processes in a line; the one that the parameters are split on already, if they are."""
        from torch.distributed.device_mesh import init_device_mesh

        split = next((p for p in model.parameters() if fully_sharded.is_dtensor(p)), None)
        if split is not None:
            return split.device_mesh  # type: ignore[attr-defined]
        return init_device_mesh(self.parts.device.type, (dist.get_world_size(),))

    def _policy(self) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if self.parts.accelerator.mixed_precision != "bf16":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)


def _autocast(model: nn.Module, accelerator: Any) -> None:
    """What accelerate does to a model that it prepares itself; ``restore_forward`` takes it off."""
    context = get_mixed_precision_context_manager(native_amp=True, autocast_kwargs=accelerator.autocast_handler)
    model._original_forward = model.forward
    function = convert_outputs_to_fp32(context(model.forward.__func__))  # type: ignore[attr-defined]
    model.forward = MethodType(function, model)


def _followed(value: Any, key: str, edits: list[Any]) -> Any:
    """A state tensor after ``edits``, split again; as its parameter whole for a moment where it has to be."""
    if not torch.is_tensor(value):
        return value
    for edit in edits:
        if isinstance(edit, NewValues):
            continue
        if fully_sharded.is_dtensor(value) and isinstance(edit, Keep) and edit.dim > 0:
            value = fully_sharded.cut_part(value, edit.dim, edit.index)
        else:
            value = split_as(follow(whole_value(value), key, [edit]), value)
    return value
