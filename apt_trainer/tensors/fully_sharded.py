"""What torch's FSDP2 (``fully_shard``) makes of a model, and how it comes off again, for which torch has no call.

Parameters that it holds are DTensors split along their first dimension; they stay so when it is taken off. Knows
torch only: not the method, an engine or the moments of an optimizer. All calls that read or make whole values are
collective. Uses names of torch that are not documented (``libraries.private_names``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apt_trainer.tensors.mapped import let_go_of_pages

_ON_MODULES = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_METHODS = ("generate",)
"""Methods that the Trainer registers as forward methods, which leaves a wrapper on the instance."""


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of ``tensor``; ``torch.distributed.tensor`` takes a second to import."""
    return hasattr(tensor, "full_tensor")


def whole_of(tensor: Any) -> torch.Tensor:
    """The whole of a DTensor, without gradient; it can share memory with it where there is one process."""
    return tensor.detach().full_tensor()  # type: ignore[no-any-return]


def part_of(value: torch.Tensor, like: Any) -> torch.Tensor:
    """``value``, equal on all processes, split as the DTensor ``like`` is; its memory is not used."""
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(like.device).contiguous()
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def cut_part(tensor: Any, dim: int, index: torch.Tensor) -> torch.Tensor:
    """A DTensor without all but ``index`` along ``dim``, which is not split: each process cuts its own part."""
    from torch.distributed.tensor import DTensor

    local = tensor.detach().to_local().index_select(dim, index.to(tensor.device))
    shape = torch.Size(len(index) if number == dim else size for number, size in enumerate(tensor.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride
    )


def is_held(model: nn.Module) -> bool:
    """Whether FSDP2 holds ``model``."""
    return hasattr(model, _ON_MODULES[0])


def reshard(model: nn.Module) -> None:
    """Let go of whatever FSDP2 has made whole; an evaluation leaves the root so."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(model: nn.Module, blocks: Sequence[nn.Module], mesh: Any, policy: Any, reshard_after_forward: bool) -> None:
    """Put FSDP2 on ``model``: each of ``blocks`` is whole for its own passes, all else for the whole step.

    Parameters may be ordinary ones, equal on all processes, or DTensors split on ``mesh``. These stay the objects that
    they are, and nothing is gathered: as in a model made on the meta device, FSDP2 sees their shapes, and takes the
    parts that it finds when it runs first.
    """
    from torch.distributed.fsdp import fully_shard

    done: set[int] = set()
    for unit in (*blocks, model):
        modules = [module for module in unit.modules() if id(module) not in done]
        done.update(map(id, modules))
        places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        parts = _make_plain(places, policy.param_dtype is not None)
        after_forward = {} if unit is model else {"reshard_after_forward": reshard_after_forward}
        fully_shard(unit, mesh=mesh, mp_policy=policy, **after_forward)
        for module, name, part in parts:
            module._parameters[name] = part
        for _, _, old in places:
            if not is_dtensor(old):
                let_go_of_pages(old.data)


_Place = tuple[nn.Module, str, nn.Parameter]


def _make_plain(places: list[_Place], in_float32: bool) -> list[_Place]:
    """Put ordinary parameters in ``places``, of DTensors the shape alone; returns where these belong afterwards. With
    ``in_float32`` what trains has that type."""
    parts: list[_Place] = []
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # what is kept, and what FSDP2 gets to see
    for module, name, old in places:
        if id(old) not in made:
            dtype = torch.float32 if in_float32 and old.requires_grad else old.dtype
            kept = old if old.dtype == dtype else nn.Parameter(old.detach().to(dtype), old.requires_grad)
            shape = torch.empty(old.shape, dtype=dtype, device="meta")
            seen = shape if is_dtensor(old) else kept.detach().contiguous()
            made[id(old)] = kept, nn.Parameter(seen, old.requires_grad)
        kept, module._parameters[name] = made[id(old)]
        if is_dtensor(old):
            parts.append((module, name, kept))
    return parts


def strip(model: nn.Module) -> None:
    """Take FSDP2 off ``model``, whose parameters stay the DTensors that they are; :func:`reshard` comes first."""
    from torch.distributed._composable_state import _module_state_mapping

    for state in _states(model):
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        for group in _groups(state):
            saving, loading = (
                group._module_to_pre_save_state_dict_hook_handle,
                group._module_to_pre_load_state_dict_hook_handle,
            )
            for handle in (*saving.values(), *loading.values()):
                handle.remove()
            for parameter in group.fsdp_params:
                parameter._post_load_hook_handle.remove()
            group.fsdp_params.clear()  # they lie in cycles, and each refers to the parts of its parameter
    for module in model.modules():
        _take_off(module)
        _module_state_mapping.pop(module, None)


@contextmanager
def plain_modules(model: nn.Module) -> Iterator[None]:
    """Within it, the modules of ``model`` are of their own classes and bear no sign of FSDP2, so that they can be
    copied; its hooks are still there."""
    taken = [(module, type(module), _take_off(module)) for module in model.modules()] if is_held(model) else []
    try:
        yield
    finally:
        for module, own_class, attributes in taken:
            module.__class__ = own_class
            module.__dict__.update(attributes)


def _states(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    return [fully_shard.state(module) for module in model.modules() if isinstance(module, FSDPModule)]  # type: ignore[attr-defined]


def _groups(state: Any) -> list[Any]:
    """Of its parameters; none where a unit has none. Torch before 2.12 has one group per state."""
    groups = getattr(state, "_fsdp_param_groups", None)
    one = None if groups is not None else getattr(state, "_fsdp_param_group", None)
    return list(groups or ()) if one is None else [one]


def _take_off(module: nn.Module) -> dict[str, Any]:
    """Give ``module`` its own class; returns the attributes that FSDP2 and the Trainer had put on it."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed.fsdp import FSDPModule

    names: tuple[str, ...] = _ON_MODULES
    if isinstance(module, FSDPModule):
        classes = type(module).__mro__
        module.__class__ = classes[classes.index(FSDPModule) + 1]
        names = (*names, STATE_KEY, REGISTRY_KEY, *_METHODS)
    return {name: module.__dict__.pop(name) for name in names if name in module.__dict__}
