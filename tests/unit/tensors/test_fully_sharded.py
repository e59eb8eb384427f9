"""FSDP2 put on a model and taken off again, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from apt_trainer.distillation.teacher import snapshot
from apt_trainer.tensors import fully_sharded
from apt_trainer.tensors.fully_sharded import is_dtensor
from apt_trainer.tensors.partitioned import make_whole, parameter_like, shape_of, whole, whole_modules


class Tied(nn.Module):
    """Two blocks; the head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)) for _ in range(2))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[0].requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.tensor([[0, 1, 4]])


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def held(group: None) -> tuple[Tied, Tied]:
    """(a model that FSDP2 holds, its plain original)."""
    torch.manual_seed(0)
    plain = Tied()
    model = copy.deepcopy(plain)
    fully_sharded.shard(model, list(model.blocks), init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(), True)
    return model, plain


def test_nothing_stays_when_it_is_taken_off(held: tuple[Tied, Tied]) -> None:
    model, plain = held
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 3
    model(IDS).sum().backward()
    with torch.no_grad():
        model(IDS)
    assert not is_dtensor(model.head.weight)  # an evaluation leaves what is in no block whole
    fully_sharded.reshard(model)
    fully_sharded.strip(model)

    assert not fully_sharded.is_held(model)
    assert all(is_dtensor(parameter) for parameter in model.parameters())
    assert model.head.weight is model.embedding.weight
    for ours, theirs in zip(model.modules(), plain.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert not any(value for name, value in ours.__dict__.items() if name.endswith("_hooks"))
    make_whole(model)
    assert model.head.weight is model.embedding.weight
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS), plain(IDS))


def test_put_on_a_second_time_it_gives_the_same_gradients(held: tuple[Tied, Tied]) -> None:
    model, plain = held
    mesh = model.head.weight.device_mesh
    model(IDS).square().sum().backward()
    fully_sharded.reshard(model)
    fully_sharded.strip(model)
    model.zero_grad()
    old = dict(model.named_parameters())
    parts = {name: parameter.to_local().data_ptr() for name, parameter in old.items()}
    fully_sharded.shard(model, list(model.blocks), mesh, MixedPrecisionPolicy(), True)
    for module in (model, plain):
        module(IDS).square().sum().backward()
    fully_sharded.reshard(model)
    assert all(parameter is old[name] for name, parameter in model.named_parameters())
    assert parts == {name: parameter.to_local().data_ptr() for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        gradient = model.get_parameter(name).grad
        assert (gradient is None) == (parameter.grad is None)
        assert gradient is None or torch.equal(gradient.full_tensor(), parameter.grad)


def test_a_snapshot_shares_frozen_parts_and_bears_no_sign_of_fsdp2(held: tuple[Tied, Tied]) -> None:
    model, plain = held
    expected = model(IDS)
    fully_sharded.reshard(model)
    teacher = snapshot(model)
    assert not fully_sharded.is_held(teacher) and fully_sharded.is_held(model)
    assert [type(module) for module in teacher.modules()] == [type(module) for module in plain.modules()]
    ours, theirs = dict(model.named_parameters()), dict(teacher.named_parameters())
    assert {name for name in ours if ours[name] is theirs[name]} == {n for n in ours if n.startswith("blocks.0")}
    assert torch.equal(teacher(IDS), expected)
    assert all(is_dtensor(parameter) for parameter in teacher.parameters())
    assert torch.equal(model(IDS), expected)


def test_parts_can_be_read_and_replaced(held: tuple[Tied, Tied]) -> None:
    model, plain = held
    old, expected = model.blocks[1][0].weight, plain.blocks[1][0].weight
    with whole(old) as (value,):
        assert torch.equal(value, expected) and not is_dtensor(value)
        new = parameter_like(old, value[:3])
    assert is_dtensor(new) and new.requires_grad and shape_of(new) == (3, 3)
    assert new.to_local().untyped_storage().data_ptr() != old.to_local().untyped_storage().data_ptr()
    assert torch.equal(new.full_tensor(), expected[:3])
    layer = model.blocks[1][0]
    with whole_modules(layer):
        assert torch.equal(layer.weight, expected) and not is_dtensor(layer.bias)
    assert layer.weight is old
