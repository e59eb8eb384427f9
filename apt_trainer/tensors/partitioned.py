"""Parameters of which each process holds a part (DeepSpeed ZeRO-3, FSDP2), and the same calls for ordinary ones.

The method asks here for values and sizes instead of reading ``parameter.shape`` or ``parameter.data``: of a parameter
that ZeRO-3 partitions they are those of an empty tensor, and one that FSDP2 splits cannot meet ordinary ones.
All calls but questions of size and :func:`cut_in_place` are collective: every process must make them in the same
order. Knows names of DeepSpeed that are not documented (checked with 0.19.8) but does not import it; what torch makes
of FSDP2 is in ``fully_sharded``. Not for moments of the optimizer (``training.engines``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt_trainer.tensors.fully_sharded import cut_part, is_dtensor, part_of, whole_of
from apt_trainer.tensors.mapped import let_go_of_pages

_ROWS = 64
"""How many rows of a matrix are copied at once where it is cut in its own memory."""


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether this process holds a part of ``parameter``; also true while it is gathered for a moment."""
    return hasattr(parameter, "ds_id") or is_dtensor(parameter)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)


def numel_of(parameter: nn.Parameter) -> int:
    """Number of entries of the whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@contextmanager
def whole(*parameters: nn.Parameter) -> Iterator[list[torch.Tensor]]:
    """Gives the whole values of ``parameters``, to be read within it and not written to; collective.

    Not for values that a backward pass needs.
    """
    with _gathered(parameters):
        yield [whole_value(parameter) for parameter in parameters]


@contextmanager
def whole_modules(*modules: nn.Module) -> Iterator[None]:
    """Within it, all parameters that ``modules`` have themselves hold their whole values; as :func:`whole`."""
    places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
    dtensors = [place for place in places if is_dtensor(place[2])]
    for module, name, parameter in dtensors:
        module._parameters[name] = nn.Parameter(whole_of(parameter), requires_grad=False)
    try:
        with _gathered([parameter for _, _, parameter in places]):
            yield
    finally:
        for module, name, parameter in dtensors:
            module._parameters[name] = parameter


def whole_value(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 has split; itself, without gradient, where it is an ordinary one."""
    return whole_of(tensor) if is_dtensor(tensor) else tensor.detach()


def split_as(value: torch.Tensor, example: torch.Tensor) -> torch.Tensor:
    """``value``, equal on all processes, split where FSDP2 has split ``example``; else itself."""
    return part_of(value, example) if is_dtensor(example) else value


@contextmanager
def _gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it, what ZeRO-3 partitions is whole in its place; what is whole already stays so."""
    wanted: dict[int, Any] = {id(p): p for p in parameters if _status(p) == "NOT_AVAILABLE"}
    gathered = list(wanted.values())
    if gathered:
        gathered[0].all_gather(param_list=gathered)
    try:
        yield
    finally:
        if gathered:
            gathered[0].partition(param_list=gathered, has_been_updated=False)


def parameter_like(old: nn.Parameter, value: torch.Tensor, requires_grad: bool | None = None) -> nn.Parameter:
    """New parameter with ``value``, partitioned where ``old`` is, and then at once; collective.

    ``value``: whole, and equal on all processes; its memory is not used where the result is partitioned.
    """
    new = nn.Parameter(split_as(value.detach(), old), old.requires_grad if requires_grad is None else requires_grad)
    if hasattr(old, "ds_id"):
        new = nn.Parameter(new.detach().clone(memory_format=torch.contiguous_format), new.requires_grad)
        old.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
    return new


def cut(old: nn.Parameter, dim: int, index: torch.Tensor, shared: bool) -> nn.Parameter:
    """``old`` without all but ``index`` (increasing) along ``dim``, split as it is; collective.

    FSDP2 splits the first dimension, so that along others each process cuts its own part. What ZeRO-3 gathers is cut
    in the memory it was gathered in, so that there are never two whole matrices.
    ``shared``: ``old`` goes on to be used elsewhere. If not, ZeRO-3's part of it is freed before there is a new one.
    That takes more than to drop the reference: DeepSpeed puts functions on a parameter that refer back to it, and its
    engine refers to it too. Parameters of other kinds go when nothing refers to them any longer.
    """
    if is_dtensor(old) and dim > 0:
        return nn.Parameter(cut_part(old, dim, index), old.requires_grad)
    if not hasattr(old, "ds_id"):
        with whole(old) as (value,):
            return parameter_like(old, value.index_select(dim, index.to(value.device)))
    was_whole, part = _status(old) == "AVAILABLE", old.ds_tensor.untyped_storage()  # type: ignore[attr-defined]
    with whole(old) as (value,):
        is_copy = not was_whole and value.untyped_storage().data_ptr() != part.data_ptr()  # not so in one process
        value = cut_in_place(value if is_copy else value.clone(), dim, index.to(value.device))
    if not shared:
        del old.ds_tensor, part  # type: ignore[attr-defined]
    new = nn.Parameter(value, old.requires_grad)
    old.convert_to_zero_parameters([new])  # type: ignore[attr-defined]
    return new


def cut_in_place(value: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """``value.index_select(dim, index)`` in the memory of ``value``, which is contiguous and is lost: ``index``
    increases, so that what stays only moves forwards."""
    assert bool((index.diff() > 0).all()), "units keep their order"
    shape = [len(index) if number == dim else size for number, size in enumerate(value.shape)]
    result = value.view(-1)[: math.prod(shape)].view(shape)
    for start in range(0, shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        result[rows] = value[index[rows]] if dim == 0 else value[rows].index_select(dim, index)
    return result


def copy_of(parameter: nn.Parameter, requires_grad: bool) -> nn.Parameter:
    """Copy with memory of its own, partitioned where ``parameter`` is; it is whole for a moment. Collective."""
    if not hasattr(parameter, "ds_id"):
        return nn.Parameter(parameter.detach().clone(), requires_grad)
    with whole(parameter) as (value,):
        return parameter_like(parameter, value, requires_grad)


def partition_all(model: nn.Module, example: nn.Parameter) -> None:
    """Partition what is whole in ``model`` as ``example`` is, one parameter after the other, and put its buffers on
    the same device; collective."""
    if is_dtensor(example):
        _replace(model, lambda p: p if is_dtensor(p) else parameter_like(example, p.detach(), p.requires_grad))
    else:
        for parameter in model.parameters():
            if not is_partitioned(parameter):
                with in_own_memory(parameter, example.device, parameter.dtype):
                    example.convert_to_zero_parameters([parameter])  # type: ignore[attr-defined]
    move_buffers(model, example.device)


@contextmanager
def in_own_memory(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Within it ``parameter``, which DeepSpeed is about to partition, has memory of its own for a moment. DeepSpeed
    sends what the first process has to the others, which need not read theirs."""
    value = parameter.data
    if torch.distributed.get_rank() == 0:
        parameter.data = value.to(device, dtype, copy=True)
    else:
        parameter.data = torch.empty_like(value, device=device, dtype=dtype)
    yield
    let_go_of_pages(value)


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """Give ``model`` ordinary parameters again, one after the other; collective."""

    def ordinary(parameter: nn.Parameter) -> nn.Parameter:
        with whole(parameter) as (value,):
            return nn.Parameter(value.clone(), parameter.requires_grad)

    _replace(model, ordinary)


def _replace(model: nn.Module, new: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Put ``new`` of each parameter in its place; what is tied stays tied."""
    done: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one keeps its id from being reused
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in done:
                    done[id(parameter)] = parameter, new(parameter)
                module._parameters[name] = done[id(parameter)][1]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Put all buffers on ``device``; they are never partitioned."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def gather_while_it_runs(model: nn.Module) -> list[RemovableHandle]:
    """Hooks that make the parameters of each module whole for its forward pass alone, for a model that no engine
    holds, where it has no backward pass; put on once."""
    split = (m for m in model.modules() if any(p is not None and is_partitioned(p) for p in m._parameters.values()))
    return [handle for module in split for handle in _Gathering(module).handles]


@contextmanager
def gathering_as_it_runs(model: nn.Module) -> Iterator[None]:
    """Within it, as :func:`gather_while_it_runs`."""
    handles = gather_while_it_runs(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Gathering:
    """The hooks of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._open: list[Any] = []
        self.handles = module.register_forward_pre_hook(self._gather), module.register_forward_hook(self._release)

    def _gather(self, module: nn.Module, args: Any) -> None:
        context = whole_modules(module)
        context.__enter__()
        self._open.append(context)

    def _release(self, module: nn.Module, args: Any, output: Any) -> None:
        self._open.pop().__exit__(None, None, None)


# ------------------------------------------------------------------ what DeepSpeed leaves on modules

_ON_MODULES = (
    "_original_parameters",
    "_external_params",
    "all_parameters",
    "applied_pre_backward_ref_cnt",
    "ds_external_parameters",
    "ds_grads_remaining",
    "ds_id",
    "ds_inflight_param_registry",
    "ds_model_granularity",
    "ds_recompute_parameters",
    "post_bwd_fn",
    "pre_bwd_fn",
)


def strip_modules(model: nn.Module) -> None:
    """Take off what an engine of ZeRO-3 left on modules besides its hooks; parameters stay partitioned.

    A new engine would go on with the functions of the old one, and a copy with those of its original.
    """
    for module in model.modules():
        if type(module._parameters).__name__ == "ZeROOrderedDict":
            module._parameters = dict(module._parameters.items())
        for name in _ON_MODULES:
            module.__dict__.pop(name, None)


def _status(parameter: nn.Parameter) -> str:
    status = getattr(parameter, "ds_status", None)
    return "AVAILABLE" if status is None else str(status.name)
