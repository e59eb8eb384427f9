"""``torch_compile``: optimizer steps run by a compiled call of the model, whose shapes, classes and names stay.

The model is compiled in place rather than wrapped, as accelerate would, so that nothing has to look through a wrapper.
Steps in which hooks observe or fade units run eagerly: compiled code takes no notice of hooks that come and go. What
was compiled is forgotten at a change of shape. Evaluation, generation and the teacher are not compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn

from apt_trainer.errors import Retold, UserError, reason, unknown_choice


def compile_options(args: Any) -> dict[str, Any] | None:
    """Arguments of ``torch.compile`` that training arguments or the launcher ask for; None: nothing is compiled.

    Raises:
        UserError: for a back end or mode that torch or this machine does not have, or an engine that cannot.
    """
    known = [backend.value.lower() for backend in DynamoBackend]
    if args.torch_compile_backend is not None and args.torch_compile_backend.lower() not in known:
        raise unknown_choice("torch_compile_backend", args.torch_compile_backend, known)
    plugin = TorchDynamoPlugin(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
    if plugin.backend == DynamoBackend.NO:
        return None
    if plugin.use_regional_compilation:
        raise UserError("Shapes cannot change in regions that accelerate compiles. Use torch_compile: true instead.")
    if args.deepspeed_plugin is not None:
        raise UserError("torch_compile under DeepSpeed is not supported. Remove it, or train under DDP.")
    options = plugin.to_kwargs()
    _try_out(tuple(sorted(options.items())), args.device)
    return options


@cache
def _try_out(options: tuple[tuple[str, Any], ...], device: torch.device) -> None:
    """Compile and run an addition, which needs the whole chain of tools that a model needs.

    Raises:
        UserError: with what torch says.
    """
    given = dict(options)
    named = f"torch_compile with backend {given['backend']!r}, mode {given.get('mode')!r}"

    def retell(error: Exception) -> Exception:
        return UserError(f"{named} does not work on this machine: {reason(error)}. Set torch_compile: false.")

    with Retold(retell):
        torch.compile(_add, **given)(torch.ones(8, device=device))


def _add(x: torch.Tensor) -> torch.Tensor:
    return x + 1


class CompiledSteps:
    """``options``: as :func:`compile_options` gives them."""

    def __init__(self, options: dict[str, Any] | None) -> None:
        self._options = options
        self._model: nn.Module | None = None
        self._call: Any = None

    @property
    def asked(self) -> bool:
        """Whether any step is to be compiled."""
        return self._options is not None

    @contextmanager
    def running(self, model: nn.Module, observed: bool) -> Iterator[None]:
        """Within this context calls of ``model`` are compiled, unless the step is ``observed``."""
        if self._options is None or observed:
            yield
            return
        if self._model is not model:
            self._model, self._call = model, torch.compile(model.forward, **self._options)
        own = model.__dict__.get("forward")  # accelerate's, which casts
        model.forward = self._call
        try:
            yield
        finally:
            if own is None:
                del model.forward
            else:
                model.forward = own

    def forget(self) -> None:
        """After a change of shape: what was compiled is of no use any more."""
        if self._call is not None:
            torch._dynamo.reset()
            self._model = self._call = None
