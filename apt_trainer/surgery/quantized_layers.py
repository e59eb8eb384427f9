"""Linear layers of bitsandbytes, in its own format, whose weights are dequantised for each of their two products.

The products are made here rather than by the library for two reasons. On a CPU its kernels for AVX-512 give wrong
values to rows that end within a block; and its int8 layers round inputs too, as a rule, so that what is evaluated
would be neither what trains nor what is saved. Import it late, as ``frozen_base`` does: bitsandbytes may be missing.

Source: QLoRA, https://arxiv.org/abs/2305.14314 (4-bit NormalFloat, double quantisation).
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class _Product(torch.autograd.Function):
    """x · Wᵀ + b of a frozen layer, which keeps no dequantised weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


class _Frozen(nn.Linear):
    """What both kinds share. ``plain_dtype``: of the weights before; ``transposed``: they were those of a Conv1D."""

    plain_dtype: torch.dtype
    transposed: bool

    def take(self, plain: nn.Linear | Conv1D) -> None:
        """Take the values of ``plain``, whose bias is kept as it is; moving the weight is what quantises it."""
        self.plain_dtype, self.transposed = plain.weight.dtype, isinstance(plain, Conv1D)
        values = plain.weight.detach().t() if self.transposed else plain.weight.detach()
        self.weight = self._unquantized(values.contiguous().cpu()).to(plain.weight.device)
        self.bias = plain.bias
        self.requires_grad_(False).train(plain.training)

    @abstractmethod
    def _unquantized(self, values: torch.Tensor) -> nn.Parameter:
        """``values`` [out, in] on the CPU as what becomes the quantised weight where it is moved to a device."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out, in] that it computes with."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Of the quantised weight and its scales."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def as_plain(self) -> nn.Linear | Conv1D:
        """An ordinary layer with the weights that this one computes with."""
        weight = self.dequantized(self.plain_dtype)
        with torch.device("meta"):
            plain = (
                Conv1D(self.out_features, self.in_features)
                if self.transposed
                else nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
            )
        plain.weight = nn.Parameter(weight.t().contiguous() if self.transposed else weight, requires_grad=False)
        plain.bias = self.bias
        return plain.train(self.training)


class FrozenNF4(_Frozen, bnb.nn.LinearNF4):  # type: ignore[misc]
    """Half a byte a weight, a scale of 8 bits for each 64 and one of 32 for each 256 of these."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")

    def _unquantized(self, values: torch.Tensor) -> nn.Parameter:
        # without module=self, which would keep the scales a second time
        return bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4")  # type: ignore[no-any-return]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        of_one_row = copy.copy(self.weight.quant_state)
        of_one_row.shape, of_one_row.dtype = torch.Size([self.out_features * self.in_features]), dtype
        weight: torch.Tensor = bnb.functional.dequantize_4bit(self.weight.data, of_one_row)
        return weight.view(self.out_features, self.in_features)

    @property
    def held_bytes(self) -> int:
        scales = self.weight.quant_state
        return int(self.weight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes)

    def _load_from_state_dict(
        self, state: Any, prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any, errors: list[str]
    ) -> None:
        """Scales are loaded too, which the library leaves out."""
        super()._load_from_state_dict(state, prefix, local, strict, missing, unexpected, errors)
        names = [name for name in state if name.startswith(f"{prefix}weight.")]
        if not names:
            missing.append(f"{prefix}weight.absmax")
            return
        scales = {name.removeprefix(prefix): state[name] for name in names}
        self.weight.quant_state = bnb.functional.QuantState.from_dict(scales, device=self.weight.device)
        unexpected[:] = [name for name in unexpected if name not in names]


class FrozenInt8(_Frozen, bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A byte a weight and a scale of 32 bits for each row."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, has_fp16_weights=False, device="meta")

    def _unquantized(self, values: torch.Tensor) -> nn.Parameter:
        return bnb.nn.Int8Params(values, requires_grad=False, has_fp16_weights=False)  # type: ignore[no-any-return]

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        scales = self.weight.SCB.to(self.weight.device)  # which the weight leaves behind where a model is moved
        return self.weight.data.to(dtype).mul_(scales.unsqueeze(1).mul(1.0 / 127.0))

    @property
    def held_bytes(self) -> int:
        return int(self.weight.nbytes + self.weight.SCB.nbytes)


LAYERS: dict[str, Any] = {"nf4": FrozenNF4, "int8": FrozenInt8}
"""By what ``base_quantization`` says."""
