"""What a cut parameter is, and when the memory of the old one goes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from apt_trainer.surgery.slicing import EditLog, slice_module
from apt_trainer.tensors import partitioned as partition
from apt_trainer.tensors.partitioned import cut

ROWS, COLUMNS = 2 * partition._ROWS + 5, 7


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (COLUMNS, ROWS), (ROWS,), (COLUMNS, 3, ROWS)])
def test_moving_together_is_selecting_without_memory_for_a_second_matrix(shape: tuple[int, ...]) -> None:
    for dim, size in enumerate(shape):
        for index in (torch.arange(size), torch.arange(0, size, 3), torch.arange(size)[-2:]):
            value = torch.randn(shape)
            expected = value.index_select(dim, index)
            result = partition.cut_in_place(value, dim, index)
            assert torch.equal(result, expected) and result.is_contiguous()
            assert result.data_ptr() == value.data_ptr()


def test_units_out_of_order_are_not_moved_together() -> None:
    with pytest.raises(AssertionError, match="order"):
        partition.cut_in_place(torch.randn(4), 0, torch.tensor([2, 1]))


@pytest.fixture
def parameter() -> Iterator[nn.Parameter]:
    """Split by FSDP2, in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    yield nn.Parameter(distribute_tensor(torch.randn(ROWS, COLUMNS), mesh, [Shard(0)]), requires_grad=False)
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_split_parameter_stays_split(parameter: nn.Parameter, dim: int) -> None:
    index, whole = torch.tensor([1, 3, 6]), parameter.full_tensor().clone()  # type: ignore[operator]
    new = cut(parameter, dim, index, shared=False)
    assert torch.equal(new.full_tensor(), whole.index_select(dim, index))  # type: ignore[operator]
    assert torch.equal(parameter.full_tensor(), whole)  # type: ignore[operator]
    assert (new.device_mesh, new.placements) == (parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
    assert new.shape == whole.index_select(dim, index).shape and not new.requires_grad
    assert new.to_local().is_contiguous()  # type: ignore[operator]


def test_only_tied_weights_outlive_their_cut() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5), "alone": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    tied, alone = weakref.ref(model["head"].weight), weakref.ref(model["alone"].weight)
    log = EditLog()
    log.expect_ties(model)
    index = torch.tensor([0, 2, 3])
    slice_module(model["alone"], "in", index, "alone", log)
    assert alone() is None
    first = weakref.ref(model["alone"].weight)
    slice_module(model["alone"], "out", index, "alone", log)
    assert first() is None and model["alone"].weight.shape == (3, 3)
    slice_module(model["embedding"], "out", index, "embedding", log)
    assert tied() is not None
    slice_module(model["head"], "in", index, "head", log)
    assert model["head"].weight is model["embedding"].weight and model["head"].weight.shape == (5, 3)
    del log
    assert tied() is None
