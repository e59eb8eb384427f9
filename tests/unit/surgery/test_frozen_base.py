"""Quantised layers: their values by an independent computation, at any width, in other classes, copied and moved."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from tiny import logits as logits_of
from tiny import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from apt_trainer import UserError
from apt_trainer.distillation.teacher import snapshot
from apt_trainer.models import family_of
from apt_trainer.surgery.adapters import insert_adapters
from apt_trainer.surgery.frozen_base import BYTES, base_linears, check_base, freeze_base, frozen_bytes, make_plain

FORMS = ("nf4", "int8")


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """The nearest level of each weight, times the largest of its block of 64."""
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scales).flatten()[: weight.numel()].view_as(weight)


def logits(model: Any) -> torch.Tensor:
    batch = {"input_ids": torch.arange(4, 20).view(2, 8)}
    return logits_of(model, batch | ({"labels": batch["input_ids"]} if model.config.is_encoder_decoder else {}))


def frozen(name: str = "llama", task: str = "ForCausalLM", form: str = "nf4", **sizes: Any) -> tuple[Any, Any]:
    """(a tiny model, the same quantised)"""
    plain = tiny_model(name, task, **sizes)
    model = copy.deepcopy(plain)
    freeze_base(model, family_of(model.config), form)
    return plain, model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [24, 96])  # within a block; over several
def test_values_and_gradients_at_widths_that_are_no_multiples_of_64(form: str, width: int) -> None:
    plain, model = frozen(form=form, intermediate_size=width)
    for path, layer in base_linears(plain, family_of(plain.config)):
        exact, quantised = layer.weight.detach(), model.get_submodule(path)
        weight = quantised.dequantized(torch.float32)
        if form == "nf4":
            assert (weight - nf4(exact)).abs().max() <= 0.02 * exact.abs().max()  # scales are rounded too
        else:
            # half a step, and the rounding to float16 before
            assert bool(((weight - exact).abs() <= 0.65 * exact.abs().amax(1, keepdim=True) / 127).all())
        x = torch.randn(3, 5, exact.shape[1], generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        gradients = []
        for out in (quantised(x), nn.functional.linear(x, weight, layer.bias)):
            gradients += torch.autograd.grad(out.square().sum(), x)
        assert torch.equal(quantised(x), out) and torch.allclose(*gradients, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model), logits(model.train()))


@pytest.mark.parametrize("form", FORMS)
def test_other_classes_come_back_as_they_were(form: str) -> None:
    for name, task in (("gpt2", "ForCausalLM"), ("albert", "ForSequenceClassification"), ("bert", "ForMaskedLM")):
        plain, model = frozen(name, task, form)
        kinds = {path: type(module) for path, module in plain.named_modules()}
        assert name != "gpt2" or Conv1D in kinds.values()
        before = logits(model)
        assert not torch.allclose(before, logits(plain)) and len(frozen_bytes(model)) == 3
        make_plain(model)
        assert {path: type(module) for path, module in model.named_modules()} == kinds
        assert torch.allclose(before, logits(model), atol=1e-5) and not frozen_bytes(model)


@pytest.mark.parametrize("form", FORMS)
def test_what_transformers_keeps_in_float32_stays(form: str) -> None:
    _, model = frozen("t5", "ForConditionalGeneration", form)
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wo) is nn.Linear
    assert type(model.encoder.block[0].layer[-1].DenseReluDense.wi) is not nn.Linear
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_and_a_snapshot_hold_the_same_and_memory_is_shared(form: str) -> None:
    plain = tiny_model("llama", "ForCausalLM").bfloat16()
    model = copy.deepcopy(plain)
    insert_adapters(model, ["q_proj"], 2, 4, 0.0, family_of(model.config).layer_paths(model))
    freeze_base(model, family_of(model.config), form)
    other = tiny_model("llama", "ForCausalLM").bfloat16()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-2)
    insert_adapters(other, ["q_proj"], 2, 4, 0.0, family_of(other.config).layer_paths(other))
    freeze_base(other, family_of(other.config), form)
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(logits(other), logits(model))
    teacher = snapshot(model)
    held = {p.data_ptr() for p in model.parameters() if not p.is_floating_point()}
    assert held == {p.data_ptr() for p in teacher.parameters() if not p.is_floating_point()}
    assert torch.equal(logits(teacher), logits(model))


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_those_of_the_tensors(form: str) -> None:
    plain, model = frozen(form=form, hidden_size=128, intermediate_size=256)
    weights = sum(layer.weight.numel() for _, layer in base_linears(plain, family_of(plain.config)))
    found = frozen_bytes(model)
    assert found["bytes_before"] == 4 * weights
    assert found["bytes"] == pytest.approx(BYTES[form] * weights, rel=0.05)


def test_autocast_multiplies_in_its_type() -> None:
    _, model = frozen()
    layer = model.model.layers[0].mlp.down_proj
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16


def test_a_model_with_few_linear_layers_is_refused() -> None:
    model = tiny_model("llama", "ForCausalLM")
    family = family_of(model.config)
    check_base(model, family, "nf4")
    model.model.layers[0].experts = nn.Parameter(torch.zeros(2, 100, 100))
    with pytest.raises(
        UserError, match=r"nf4 is for linear layers, but of the blocks of LlamaForCausalLM they are 32.4%"
    ):
        check_base(model, family, "nf4")
