"""Observing activations and their gradients during training, without parameter gradients or gathered weights.

A tap is an identity in the graph. It measures the activation when the forward pass runs and adds to its sums when
the backward pass arrives, so that a recomputed forward (gradient checkpointing) counts once and micro-batches add
up. The sums are plain tensors, not buffers: a distributed wrapper must not broadcast them. No host synchronisation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt_trainer.models import Stack
from apt_trainer.models.base import GateSide
from apt_trainer.models.batch import Tokens

Side = Literal[GateSide, "output"]
Measure = Literal["magnitudes", "signed", "per_sequence"]


class TapContext:
    """Shared by the taps of one observer: which tokens of the batch in flight are real, and scratch memory.

    A fresh temporary the size of an activation costs ten times the sum itself on a CPU, hence the scratch.
    """

    def __init__(self) -> None:
        self._masks: dict[Stack | None, tuple[torch.Size, torch.Tensor]] = {}
        self._scratch = torch.empty(0)
        self.resting = False
        self.passes = 0
        """How many forward passes of a tap were observed."""

    def set_tokens(self, mask: Tokens) -> None:
        """``mask``: [batch, length], 1 = real, of every stack or per stack; None = all."""
        of_stack = mask if isinstance(mask, Mapping) else {None: mask}
        self._masks = {
            stack: (one.shape, one.reshape(-1).to(torch.float32)) for stack, one in of_stack.items() if one is not None
        }

    def weights(self, x: torch.Tensor, stack: Stack) -> torch.Tensor | None:
        """[batch·length] float32 if the mask describes ``x``, else None.

        ``x`` is [batch, length, n]; [batch·length, n] in models that flatten tokens for a feed-forward.
        """
        shape, weights = self._masks.get(stack, self._masks.get(None, (None, None)))
        if weights is None or x.shape[:-1] not in (shape, weights.shape):
            return None
        return weights

    def per_sequence(self, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        """``x`` as [batch, length, n], where it is [batch·length, n] and the mask tells the batch."""
        shape, weights = self._masks.get(stack, self._masks.get(None, (None, None)))
        flat = weights is not None and x.shape[:-1] == weights.shape
        return x.view(*shape, x.shape[-1]) if flat else x  # type: ignore[misc]

    def absolute_sum(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Σ over tokens of |x|: [..., n] → [n] float32, tokens with weight 0 left out."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self._scratch.numel() < flat.numel() or self._scratch.device != flat.device:
            self._scratch = torch.empty(flat.numel(), device=flat.device)
        absolute = self._scratch[: flat.numel()].view(flat.shape)
        torch.abs(flat, out=absolute) if flat.dtype == absolute.dtype else absolute.copy_(flat).abs_()
        return absolute.sum(0) if weights is None else weights.to(flat.device) @ absolute

    def plain_sum(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Σ over tokens of x: [..., n] → [n] float32, tokens with weight 0 left out."""
        flat = x.detach().reshape(-1, x.shape[-1])
        return flat.sum(0, dtype=torch.float32) if weights is None else weights.to(flat.device) @ flat.float()


def average_in(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], share: float, observed: torch.Tensor) -> None:
    """Move the first of each of ``pairs`` by ``share`` towards the second, in place, if all ``observed`` is finite.

    An optimizer step whose float16 gradients overflow is left out likewise. Does not wait for the device.
    """
    finite = torch.isfinite(observed).all()
    for average, value in pairs:
        average.lerp_(torch.where(finite, value, average), share)


class Tap:
    """Sums over tokens of one activation with n channels, whose tokens are those of ``stack``.

    ``magnitudes``: ``sums`` is [3, n]: Σ|x|, Σ|g|, Σx. ``signed``: [1, n], Σ x·g.
    ``per_sequence``: [1, units], Σ over sequences of |Σ over tokens and channels of x·g|.

    ``side``: of the module, "output" or as a space's ``gate_side``; of an "activation" all tokens are taken to be
    real, and each to be a sequence. Of what a router has routed, x [tokens, experts] are its
    weights, 0 where it sends nothing: x·g is then what the loss gains by what an expert gives.
    """

    def __init__(
        self,
        module: nn.Module,
        side: Side,
        measure: Measure,
        sums: torch.Tensor,
        context: TapContext,
        stack: Stack = "encoder",
    ) -> None:
        self.measure, self.sums, self.context, self.stack = measure, sums, context, stack
        self._handle: RemovableHandle
        if side == "input":
            self._handle = module.register_forward_pre_hook(self._on_input)
        else:
            hooks = {"output": self._on_output, "activation": self._on_activation, "routed": self._on_routed}
            self._handle = module.register_forward_hook(hooks[side])

    def remove(self) -> None:
        self._handle.remove()

    def _on_input(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (self._pass(args[0]), *args[1:]) if self._observes(module, args[0]) else None

    def _on_output(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return self._pass(output) if self._observes(module, output) else None

    def _on_activation(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """Rows [tokens, n] as sequences of one token, which no mask of a batch is for."""
        return self._pass(output[:, None]).squeeze(1) if self._observes(module, output) else None

    def _on_routed(self, module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> Any:
        logits, weights, chosen = output
        if not self._observes(module, weights):
            return None
        spread = self._pass(torch.zeros_like(logits, dtype=weights.dtype).scatter(1, chosen, weights))
        return logits, spread.gather(1, chosen), chosen

    def _observes(self, module: nn.Module, x: torch.Tensor) -> bool:
        return not self.context.resting and module.training and torch.is_grad_enabled() and x.requires_grad

    def _pass(self, x: torch.Tensor) -> torch.Tensor:
        self.context.passes += 1
        function = _MagnitudeTap if self.measure == "magnitudes" else _ProductTap
        return function.apply(x, self)  # type: ignore[no-any-return]


class _MagnitudeTap(torch.autograd.Function):
    """Keeps only [n]-sized sums between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tap: Tap) -> torch.Tensor:
        context = tap.context
        ctx.tap, ctx.weights = tap, context.weights(x, tap.stack)
        ctx.activation = context.absolute_sum(x, ctx.weights), context.plain_sum(x, ctx.weights)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        sums = ctx.tap.sums
        magnitude, signed = ctx.activation
        sums[0].add_(magnitude)
        sums[1].add_(ctx.tap.context.absolute_sum(gradient, ctx.weights))
        sums[2].add_(signed)
        return gradient, None


class _ProductTap(torch.autograd.Function):
    """Keeps the activation itself; meant for narrow ones (ranks) or for the Taylor rule."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, tap: Tap) -> torch.Tensor:
        ctx.tap = tap
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        product = x.float() * gradient.float()
        sums = ctx.tap.sums
        if ctx.tap.measure == "signed":
            sums[0].add_(product.reshape(-1, product.shape[-1]).sum(0))
        else:
            product = ctx.tap.context.per_sequence(product, ctx.tap.stack)
            per_sequence = product.reshape(product.shape[0], -1, product.shape[-1]).sum(1)
            units = sums.shape[1]
            sums[0].add_(per_sequence.reshape(len(per_sequence), units, -1).sum(2).abs().sum(0))
        return gradient, None
