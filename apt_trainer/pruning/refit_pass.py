"""When units go, what is left is refitted (``surgery.refit``): here, on which inputs.

What a gate reads is seen in the pass that scores the model, if there is one and its matrices fit; those of the other
gates in passes of their own, forwards only, as many matrices at a time as fit. While the model trains that is at each
cut, once its engine has let go of it: where parameters are split, those of one module are whole at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from apt_trainer.measure import evaluating
from apt_trainer.models import ModelFamily, Space
from apt_trainer.models.batch import Tokens, real_tokens
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring import Reduce
from apt_trainer.scoring.base import Batch
from apt_trainer.scoring.taps import TapContext
from apt_trainer.surgery.refit import Moments, refit
from apt_trainer.surgery.slicing import EditLog
from apt_trainer.tensors.partitioned import gathering_as_it_runs

GROUP_BYTES = 1 << 30
"""Memory that the matrices of one pass may take; a larger one has a pass of its own."""


class Rows(Protocol):
    """Rows that a model is scored or refitted on."""

    def batches(self) -> Iterable[Batch | None]:
        """This process' batches, the same at each call; None: its rows have run out, others' have not."""

    def loss_of(self, batch: Batch) -> Tensor:
        """Runs the model on a batch."""


class RefitPass:
    """``spaces``: of the dense model, whose present form is ``model``."""

    def __init__(self, model: nn.Module, family: ModelFamily, spaces: Sequence[Space]) -> None:
        self._model, self._family = model, family
        # of others, experts and what is inside of them, no one projection reads the units
        self._spaces = [space for space in spaces if space.gate is not None and space.gate_side == "input"]
        self._spaces.reverse()  # the last first: what it reads does not change when later ones have been refitted
        self._context = TapContext()
        self._context.resting = True
        self._seen: dict[str, Moments] = {}

    def set_tokens(self, tokens: Tokens) -> None:
        """Tell which tokens of the next forward pass are real."""
        self._context.set_tokens(tokens)

    @contextmanager
    def beside_scores(
        self, loss_of: Callable[[Batch], Tensor], counts: Mapping[str, int]
    ) -> Iterator[Callable[[Batch], Tensor]]:
        """Gives ``loss_of`` for the pass that scores a model of ``counts`` units per space; within it, inputs of the
        gates that could lose some are seen."""
        could = [space for space in self._spaces if counts[space.name] > 1]
        with self._watching(next(self._groups(could, counts), []), counts):
            yield lambda batch: self._look(loss_of, batch)

    def forget(self) -> None:
        """What was seen is of a model that has changed."""
        self._seen = {}

    def __call__(self, current: PruningPlan, new: PruningPlan, rows: Rows, reduce: Reduce, log: EditLog) -> list[str]:
        """Prepare the model, which has the units of ``current``, for the cut to ``new``; collective.

        Args:
            reduce: sums a tensor over processes.
            log: gets the edits.

        Returns:
            Paths of the modules whose weights were solved for.
        """
        survivors = current.survivors(new)
        shrinking = [space for space in self._spaces if space.name in survivors and new.counts[space.name] > 0]
        fresh = [space for space in shrinking if space.name not in self._seen]
        seen = [space for space in shrinking if space.name in self._seen]
        for group in [*([seen] if seen else []), *self._groups(fresh, current.counts)]:
            if group is not seen:
                self._observe(group, current.counts, rows)
            for space in group:
                found = self._seen.pop(space.name)
                for tensor in (found.gram, found.total, found.tokens):
                    tensor.copy_(reduce(tensor))
                part = next(p for p in space.slices if p.module == space.gate and p.side == "in")
                kept = part.rows(survivors[space.name], current.counts[space.name])
                refit(self._gate(space), str(space.gate), found, kept, log)
        self.forget()
        return [str(space.gate) for space in shrinking]

    # ------------------------------------------------------------------ inside

    def _gate(self, space: Space) -> nn.Module:
        return self._model.get_submodule(str(space.gate))

    def _groups(self, spaces: Sequence[Space], counts: Mapping[str, int]) -> Iterator[list[Space]]:
        group: list[Space] = []
        taken = 0
        for space in spaces:
            size = 4 * (counts[space.name] * space.channels) ** 2
            if group and taken + size > GROUP_BYTES:
                yield group
                group, taken = [], 0
            group.append(space)
            taken += size
        if group:
            yield group

    def _observe(self, spaces: Sequence[Space], counts: Mapping[str, int], rows: Rows) -> None:
        """A pass over ``rows``; all processes run as many batches, since a forward pass may be collective."""
        spare: Batch | None = None
        model = self._model
        with self._watching(spaces, counts), evaluating(model, inference=False), gathering_as_it_runs(model):
            for batch in rows.batches():
                if batch is not None:
                    self._look(rows.loss_of, batch)
                    spare = batch
                elif spare is not None:
                    rows.loss_of(spare)

    def _look(self, loss_of: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
        """Not during a backward pass, which may compute activations again."""
        self.set_tokens(real_tokens(batch, self._family))
        self._context.resting = False
        try:
            return loss_of(batch)
        finally:
            self._context.resting = True

    @contextmanager
    def _watching(self, spaces: Sequence[Space], counts: Mapping[str, int]) -> Iterator[None]:
        with ExitStack() as hooks:
            for space in spaces:
                device = next(self._gate(space).parameters()).device
                self._seen[space.name] = Moments.of(counts[space.name] * space.channels, device)
                hooks.callback(self._gate(space).register_forward_pre_hook(self._hook(space)).remove)
            yield

    def _hook(self, space: Space) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._context.resting:
                self._seen[space.name].add(args[0], self._context.weights(args[0], space.stack))

        return look
