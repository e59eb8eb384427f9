"""Soft masks: units fade before they are cut, so that the model can adapt and a choice can be taken back.

Masks multiply the input of output projections (heads, neurons), weigh what a router sends to experts, and act inside
norms (hidden dimensions, and heads that are normalised together): a norm's statistics run over live dimensions only,
which makes a mask of zeros and ones equal the cut model exactly. What enters the residual stream without a norm is
multiplied too. Between windows nothing is hooked. Not part of the state dict of the model;
:meth:`MaskStore.state_dict` is its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt_trainer.models import Space, Sublayer
from apt_trainer.models.base import centres
from apt_trainer.models.modeling_apt import STUBS, NoOp


class MaskStore:
    """One value in [0, 1] per unit left; 1 = on.

    The master copies live on the CPU, where selections are made; hooks use copies on the model's device.
    """

    def __init__(self, model: nn.Module, spaces: Sequence[Space], sublayers: Sequence[Sublayer]) -> None:
        self._model = model
        self._spaces = {space.name: space for space in spaces}
        self._sublayers = {sublayer.space: sublayer for sublayer in sublayers}
        self._handles: list[RemovableHandle] = []
        self._values: dict[str, torch.Tensor] = {}
        self._active: dict[tuple[str, int], torch.Tensor] = {}
        self._fading: dict[str, bool] = {}

    @property
    def is_open(self) -> bool:
        return bool(self._values)

    @property
    def values(self) -> Mapping[str, torch.Tensor]:
        """Mask per space, [units left] float32 on the CPU."""
        return self._values

    def open(self, counts: Mapping[str, int], kinds: Collection[str] | None = None) -> None:
        """Start a window with every unit on; only spaces of ``kinds`` can fade, by default all."""
        self.close()
        spaces = (space for space in self._spaces.values() if kinds is None or space.kind in kinds)
        self._values = {space.name: torch.ones(counts[space.name]) for space in spaces if counts[space.name] > 0}
        self._hook()

    def close(self) -> None:
        """Take every hook out; the model is as without masks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._values, self._active = {}, {}

    @torch.no_grad()
    def move(self, positions: Mapping[str, torch.Tensor], step: float) -> None:
        """Move masks by ``step`` towards 1 for kept ``positions`` and towards 0 for the rest.

        ``positions``: space → kept units [kept]; a space that is not named keeps all. A ``step`` of 1 gives 0 and 1.
        """
        for name, value in self._values.items():
            delta = torch.full_like(value, step)
            if name in positions:
                delta.neg_()
                delta[positions[name]] = step
            value.add_(delta).clamp_(0.0, 1.0)
        self._publish()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.close()
        if state:
            self._values = {name: value.clone() for name, value in state.items()}
            self._hook()

    def _publish(self) -> None:
        for (name, width), mask in self._active.items():
            mask.copy_(self._values[name].repeat_interleave(width))
        for name, value in self._values.items():
            self._fading[name] = bool((value < 1).any())

    def _hook(self) -> None:
        present = {path: module for path, module in self._model.named_modules() if not isinstance(module, NoOp)}
        for name, value in self._values.items():
            space = self._spaces[name]
            self._fading[name] = bool((value < 1).any())
            if space.gate in present:
                self._handles.append(self._hook_gate(present[space.gate], space))
            for path in space.norms:
                if path in present:
                    mask = self._mask(name, space.width(path))
                    # First: the output it replaces is for no other hook, and ZeRO-3 lets go of weights in one.
                    self._handles.append(present[path].register_forward_hook(self._norm(name, mask), prepend=True))
            for path in space.writers:
                if path in present:
                    self._handles.append(present[path].register_forward_hook(self._writer(name, self._mask(name, 1))))
        # Last, so that they win over the hook of a norm that is bypassed itself.
        for name in self._values:
            for stub in self._sublayers[name].stubs if name in self._sublayers else ():
                if stub.masked:
                    module = self._model.get_submodule(stub.module)
                    self._handles.append(
                        module.register_forward_hook(self._bypass(name, STUBS[stub.kind](module)), with_kwargs=True)
                    )

    def _hook_gate(self, gate: nn.Module, space: Space) -> RemovableHandle:
        name, mask = space.name, self._mask(space.name, space.channels)
        if space.gate_side == "input":
            return gate.register_forward_pre_hook(self._gate(name, mask))
        if space.gate_side == "activation":
            return gate.register_forward_hook(self._writer(name, mask))
        return gate.register_forward_hook(self._router(name, mask))

    def _mask(self, name: str, width: int) -> torch.Tensor:
        """The device's copy of a mask, each value ``width`` times; it is moved in place."""
        if (name, width) not in self._active:
            device = next(self._model.parameters()).device
            self._active[name, width] = self._values[name].repeat_interleave(width).to(device)
        return self._active[name, width]

    def _gate(self, name: str, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not self._fading[name]:
                return None
            return (args[0] * mask.to(args[0].dtype), *args[1:])

        return hook

    def _router(self, name: str, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> Any:
            return routed(module, output, mask) if self._fading[name] else None

        return hook

    def _norm(self, name: str, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._fading[name]:
                return None
            return masked_norm(module, args[0], mask).to(output.dtype)

        return hook

    def _writer(self, name: str, mask: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
            return output * mask.to(output.dtype) if self._fading[name] else None

        return hook

    def _bypass(self, name: str, stub: NoOp) -> Any:
        """While every unit of a sublayer is fully off, it is skipped as it will be after the cut."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._values[name].any():
                return output
            return _nothing(output) if stub.silent else _instead(output, stub(*args, **kwargs))

        return hook


def routed(router: nn.Module, output: tuple[torch.Tensor, ...], mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What ``router`` gives with the probability of each expert times ``mask`` [experts], all of them 1 in sum again.

    With a mask of zeros and ones this equals the router without the rows of the others.
    """
    logits, scores, _ = output
    shares = torch.softmax(logits.float(), dim=-1) * mask
    top, chosen = torch.topk(shares / shares.sum(-1, keepdim=True), router.top_k, dim=-1)  # type: ignore[arg-type]
    if getattr(router, "norm_topk_prob", True):
        top = top / top.sum(-1, keepdim=True)
    return logits, top.to(scores.dtype), chosen


def _nothing(output: Any) -> Any:
    """Zeros in the shape of ``output``, whose parameters stay in the graph."""
    return (_nothing(output[0]), *output[1:]) if isinstance(output, tuple) else 0.0 * output


def _instead(output: Any, replacement: Any) -> Any:
    """``replacement`` in the place of ``output``, whose parameters stay in the graph: DDP waits for all of them."""
    if isinstance(replacement, tuple):
        return (_instead(output[0], replacement[0]), *replacement[1:])
    return replacement + 0.0 * output


def masked_norm(module: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Norm of ``x`` [..., d] with statistics weighted by ``mask`` [d], zero where the mask is zero.

    With a mask of zeros and ones this equals the norm of the selected dimensions; with ones, the plain norm.
    """
    live = mask.sum().clamp_min(1e-6)  # heads that are normalised together may all be off
    if type(module) is nn.LayerNorm:
        x32 = x.float()
        mean = (x32 * mask).sum(-1, keepdim=True) / live
        centred = x32 - mean
        variance = (centred.square() * mask).sum(-1, keepdim=True) / live
        weight = module.weight if module.weight is not None else 1.0
        bias = module.bias if module.bias is not None else 0.0
        return (centred * torch.rsqrt(variance + module.eps) * weight + bias) * mask
    if centres(module):
        return _masked_of_own_kind(module, x, mask, live)
    scale = (mask * (len(mask) / live)).sqrt()
    back = mask / scale.masked_fill(mask == 0, 1.0)
    return module.forward(x * scale.to(x.dtype)) * back.to(x.dtype)


def _masked_of_own_kind(module: nn.Module, x: torch.Tensor, mask: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The same by a norm that subtracts the mean and does not say how it uses its weights: it is called with what has
    a mean of zero and, over all dimensions, the variance that the live ones have."""
    mean = (x.float() * mask).sum(-1, keepdim=True) / live
    scale = (len(mask) / live).sqrt()
    normal = module.forward(((x.float() - mean) * mask * scale).to(x.dtype))
    bias = getattr(module, "bias", None)
    bias = torch.zeros_like(mask) if bias is None else bias
    return ((normal - bias) / scale + bias) * mask
