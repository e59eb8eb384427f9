"""The residual stream before and after each sublayer, and how far it turns there: 1 − cos(X, Y) (LLM-Drop, eq. 1–6).

Where all sublayers of a layer read its input (parallel residual), X is that input and Y = X + output, by what factor
the config adds it; in a post-norm model Y is the stream after the norm. Not for averaging or choosing:
``scoring.cosine`` does so while a model trains, ``scoring.sublayers.cosine`` for one that does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt_trainer.models import ModelFamily, Stack, Sublayer

Tell = Callable[[Sublayer, torch.Tensor, torch.Tensor], None]
"""Takes a sublayer, X and Y, both [batch, length, hidden] and without a gradient."""


class ResidualStream:
    """Hooks that ``tell`` of each of ``sublayers`` whenever it runs while ``active``.

    All sublayers that add to the stream have to be among them, or the stream before later ones of their layer is
    another. ``blocks``: path of every layer and the stack that it is in.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        blocks: Iterable[tuple[str, Stack]],
        sublayers: Iterable[Sublayer],
        tell: Tell,
        active: Callable[[], bool] = lambda: True,
    ) -> None:
        config: Any = model.config
        self._post_norm, self._parallel = family.post_norm, family.parallel(config)
        self._multiplier = family.residual_multiplier(config)
        self._tell, self._active = tell, active
        self._stream: dict[Stack, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        for path, stack in blocks:
            enter = partial(self._enter, stack)
            self._handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
        for sublayer in sublayers:
            leave = partial(self._leave, sublayer)
            self._handles.append(model.get_submodule(sublayer.output).register_forward_hook(leave))

    def remove(self) -> None:
        """Take the hooks out and let go of what was seen."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stream.clear()

    def _enter(self, stack: Stack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._active():
            self._stream[stack] = (args[0] if args else kwargs["hidden_states"]).detach()

    @torch.no_grad()
    def _leave(self, sublayer: Sublayer, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not self._active():
            return
        before = self._stream[sublayer.stack]
        output = output.detach().reshape(before.shape)  # OPT runs its feed-forward on [tokens, hidden]
        after = output if self._post_norm else before + self._multiplier * output
        if not self._parallel:
            self._stream[sublayer.stack] = after
        self._tell(sublayer, before, after)


def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """cos(X, Y) of each token: twice [batch, length, hidden] → [batch, length] float32."""
    return nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
