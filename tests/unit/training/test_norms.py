"""Norms that are computed anew in the backward pass: the same numbers from fewer bytes."""

import copy
import pickle

import pytest
import torch
from tiny import LANGUAGE_MODELS, WIDTH, adapted, tiny_batch, tiny_model
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.models import family_of
from apt_trainer.training import norms

IN_PYTHON = ["llama", "qwen3", "gemma2", "olmo2", "mt5"]


def norm_paths(model: PreTrainedModel) -> list[str]:
    return [path for space in family_of(model.config).spaces(model) for path in space.norms]


def half_precision(family: str) -> PreTrainedModel:
    """Only adapters train, as at the start of a run."""
    model = adapted(tiny_model(family, LANGUAGE_MODELS[family])).to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


def backward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients by name, and bytes in float32 (each memory once) that are kept for the backward pass of what
    norms see: the residual stream, or single heads of 6 dimensions."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        of_norms = tensor.shape[-1:] in ((WIDTH,), (6,)) and tensor.numel() >= 6 * inputs["input_ids"].numel()
        if tensor.dtype == torch.float32 and of_norms:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("family", IN_PYTHON)
def test_losses_and_gradients_are_equal_and_no_float32_stream_is_kept(family: str) -> None:
    model = half_precision(family)
    inputs = tiny_batch(model)
    loss, gradients, bytes_kept = backward(model, inputs)
    norms.recompute(model, norm_paths(model))
    loss_then, gradients_then, bytes_then = backward(model, inputs)
    assert torch.equal(loss, loss_then)
    assert gradients.keys() == gradients_then.keys()
    assert all(torch.equal(gradients[name], gradients_then[name]) for name in gradients)
    assert bytes_kept > 0
    assert bytes_then == 0


def test_copies_are_plain_and_independent_and_norms_become_plain_again() -> None:
    model = half_precision("llama")
    classes = [type(module) for module in model.modules()]
    norms.recompute(model, norm_paths(model))
    norms.recompute(model, norm_paths(model))  # twice is once
    assert [type(module) for module in model.modules()] != classes
    assert b"Recomputing" not in pickle.dumps(model)  # as torch.save writes a whole model
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == classes
    norm = copied.get_submodule(norm_paths(model)[0])
    with torch.no_grad():
        norm.weight.zero_()
        assert not norm(torch.ones(1, 1, WIDTH, dtype=torch.bfloat16)).any()
        assert model.get_submodule(norm_paths(model)[0]).weight.any()
    norms.plain(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("gpt2", torch.bfloat16)])
def test_norms_that_keep_their_input_alone_stay_as_they_are(family: str, dtype: torch.dtype) -> None:
    model = half_precision(family).to(dtype)
    classes = [type(module) for module in model.modules()]
    norms.recompute(model, norm_paths(model))
    assert [type(module) for module in model.modules()] == classes
