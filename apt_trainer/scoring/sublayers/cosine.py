"""Cosine importance (LLM-Drop, eq. 1–6): how far a unit turns the residual stream; and how alike the layers are.

The score of a unit is 1 − mean over real tokens of cos(X, Y), X and Y the residual stream before and after it
(``scoring.stream``). All units are scored in one pass, in which only sums are kept. Not for choosing units
(``select``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from apt_trainer.errors import UserError
from apt_trainer.measure import evaluating
from apt_trainer.models import Stack, Sublayer
from apt_trainer.models.batch import Tokens, of_stack, real_tokens
from apt_trainer.scoring.stream import ResidualStream, cosines
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.units import Unit, Units

Batch = Mapping[str, torch.Tensor]
Watch = Callable[[Sequence[Any], str], Iterable[Any]]
"""Goes through the items, showing progress under a name."""


def unwatched(items: Sequence[Any], name: str) -> Iterable[Any]:
    """The :data:`Watch` that shows nothing."""
    return items


@dataclass(frozen=True)
class CosineScores:
    """``scores``: 0 (changes nothing) to 2 per unit that was on. ``similarity`` per stack: [layers + 1, layers + 1]
    mean cosine between the inputs of two layers, the last being the output of the last layer; empty when not asked
    for. ``tokens``: real tokens per stack."""

    scores: dict[Unit, float]
    similarity: dict[Stack, torch.Tensor]
    tokens: dict[Stack, int]


def cosine_scores(
    model: nn.Module,
    units: Units,
    batches: Sequence[Batch],
    off: Iterable[Unit] = (),
    similarity: bool = False,
    watch: Watch = unwatched,
) -> CosineScores:
    """Score every unit of ``model`` but those ``off`` on ``batches``.

    Args:
        model: On any device; it gets its training flags back.
        units: Its units.
        batches: Inputs of the model, padded anywhere, of any size.
        off: Units that are switched off meanwhile.
        similarity: Compare all layers too; the hidden states of one batch are then held for all layers at once.
        watch: Shows progress.

    Raises:
        UserError: no real token, or a score that is not finite.
    """
    parts = set(units.parts(off))
    observer = _Observer(units, parts, similarity)
    device = next(model.parameters()).device
    with switched_off(model, units, parts), evaluating(model):
        observer.attach(model)
        try:
            for batch in watch(batches, "cosine"):
                inputs = {name: value.to(device) for name, value in batch.items()}
                observer.tokens = real_tokens(inputs, units.family)
                run_without_predictions(model, units, inputs)
        finally:
            observer.detach()
    return observer.result()


def run_without_predictions(model: Any, units: Units, inputs: Mapping[str, torch.Tensor]) -> None:
    """A forward pass through the layers; of a language model without its head, whose logits nobody reads."""
    if units.family.head(model).next_token:
        model.base_model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False)
    else:
        model(**inputs)


class _Observer:
    """Sums of cosines, and of the residual stream no more than the layer at hand."""

    def __init__(self, units: Units, off: set[Unit], similarity: bool) -> None:
        self.tokens: Tokens = None
        self._units, self._off, self._similarity = units, off, similarity
        self._sums: dict[Unit, torch.Tensor] = {}
        self._counts: dict[Unit, float | torch.Tensor] = {}
        self._grams: dict[Stack, torch.Tensor] = {}
        self._gram_counts: dict[Stack, float | torch.Tensor] = {}
        self._states: list[torch.Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._start = torch.empty(0)
        self._unit_of: dict[str, Unit] = {}
        self._stream: ResidualStream | None = None

    def attach(self, model: nn.Module) -> None:
        units, family = self._units, self._units.family
        for path in units.blocks.values():
            block = model.get_submodule(path)
            self._handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
        # of a sublayer that is gone its norm may still be on the way, of one that is off in a post-norm model too
        sublayers = list(units.gone) if family.keeps_norms(model.config) else []
        for unit in units.sublayers:
            (sublayer,) = units.members[unit]
            if unit not in self._off:
                self._unit_of[sublayer.output] = unit
            if unit not in self._off or family.post_norm:
                sublayers.append(sublayer)
        blocks = [(path, unit.stack) for unit, path in units.blocks.items()]
        self._stream = ResidualStream(model, family, blocks, sublayers, self._take)
        for unit, path in units.blocks.items():
            block = model.get_submodule(path)
            self._handles.append(block.register_forward_hook(partial(self._leave, unit)))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._stream is not None:
            self._stream.remove()
        self._states = []
        self._start = torch.empty(0)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._start = args[0] if args else kwargs["hidden_states"]

    def _take(self, sublayer: Sublayer, before: torch.Tensor, after: torch.Tensor) -> None:
        if sublayer.output in self._unit_of:
            self._add(self._unit_of[sublayer.output], before, after)

    def _leave(self, unit: Unit, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        if unit in self._units.members and not self._off.issuperset(self._units.parts([unit])):
            self._add(unit, self._start, after)
        if self._similarity:
            self._states.append(self._unit_vectors(self._start, unit.stack))
            if unit.layer == self._units.layers(unit.stack) - 1:
                self._states.append(self._unit_vectors(after, unit.stack))
                self._compare(unit.stack)

    def _add(self, unit: Unit, before: torch.Tensor, after: torch.Tensor) -> None:
        values = cosines(before, after).double()
        mask = of_stack(self.tokens, unit.stack)
        if mask is not None:
            values = torch.where(mask.bool(), values, 0.0)
        count = float(values.numel()) if mask is None else mask.bool().sum().double()
        self._sums[unit] = self._sums.get(unit, 0.0) + values.sum()
        self._counts[unit] = self._counts.get(unit, 0.0) + count

    def _unit_vectors(self, states: torch.Tensor, stack: Stack) -> torch.Tensor:
        """[1, real tokens · hidden]: each token's state at length 1."""
        mask = of_stack(self.tokens, stack)
        real = states.flatten(0, 1) if mask is None else states[mask.bool()]
        return nn.functional.normalize(real.float(), dim=-1, eps=1e-8).reshape(1, -1)

    def _compare(self, stack: Stack) -> None:
        vectors, self._states = torch.cat(self._states), []
        mask = of_stack(self.tokens, stack)
        hidden = self._start.shape[-1]
        self._grams[stack] = self._grams.get(stack, 0.0) + (vectors @ vectors.T).double()
        count = vectors.shape[1] // hidden if mask is None else mask.bool().sum().double()
        self._gram_counts[stack] = self._gram_counts.get(stack, 0.0) + count

    def result(self) -> CosineScores:
        tokens = {unit.stack: int(count) for unit, count in self._counts.items()}
        if not tokens or not all(tokens.values()):
            raise UserError("The calibration data hold no token that is not padding. Give more text.")
        scores = {unit: 1.0 - float(total / self._counts[unit]) for unit, total in self._sums.items()}
        scores = {unit: scores[unit] for unit in self._units.members if unit in scores}
        broken = [self._units.label(unit) for unit, score in scores.items() if not -1.0 < score < 3.0]
        if broken:
            raise UserError(
                f"The residual stream is not finite at {broken[0]}. Load the model in float32 or bfloat16; if that "
                "does not help, its weights are damaged."
            )
        similarity = {stack: (gram / self._gram_counts[stack]).cpu() for stack, gram in self._grams.items()}
        return CosineScores(scores, similarity, tokens)
