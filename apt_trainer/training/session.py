"""The method in a training loop of one's own: one process, plain PyTorch, no Trainer.

The pruner and the distillation are those of the Trainers (``pruning.pruner``, ``distillation.session``); what is here
is what their engines and callbacks do otherwise. Not for several processes, nor for resuming: take a Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from apt_trainer.distillation.session import SelfDistillation
from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.models.batch import real_tokens
from apt_trainer.plan.ranks import mean_growth
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner, Decision
from apt_trainer.settings import MethodSettings
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.saving import save_pruned
from apt_trainer.surgery import adapters as lora
from apt_trainer.training.engines.state import Edits, carry, collect, restore

Batch = Mapping[str, Any]


class PruningSession:
    """Prunes ``model``, grows its adapters and distils while a loop of the user's own trains it.

    ``loss`` of a batch is what is called ``backward`` on, once or several times; ``step`` then does the rest of an
    optimizer step: ``optimizer.step()``, the change of shape where one is due, and ``optimizer.zero_grad()``. The
    optimizer stays the same object, so that a schedule of learning rates goes on; parameters that begin to train join
    its first group.

    Args:
        model: A plain Hugging Face model on its device, dense or pruned before; adapters are inserted here.
        settings: Of the method.
        steps: How many the loop is going to take.
        make_optimizer: From the parameters that train to an optimizer of torch.
        heldout: Batches on which snapshots are chosen as teacher, where ``settings.distillation`` is "self".
        teacher: The teacher, where it is "model".
        calibration: Batches that the model is scored on, where ``settings.pruning_time`` is "before": it is then cut
            here; and on which weights are refitted at cuts, which they are not without.
        seed: Of what is drawn.

    Attributes:
        model: As it is at the time. After :meth:`finish`, or :meth:`save`, merged and of its final class.
        optimizer: What ``make_optimizer`` made.
        done: Steps taken.

    Raises:
        UserError: the settings do not fit the model, the number of steps, or what is given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: MethodSettings,
        steps: int,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        *,
        heldout: Iterable[Batch] = (),
        teacher: PreTrainedModel | None = None,
        calibration: Iterable[Batch] = (),
        seed: int = 0,
    ) -> None:
        self._check(settings, heldout, teacher, calibration)
        self.model, self.done, self._heldout = model, 0, list(heldout)
        self._rows = _Rows(model, list(calibration))
        self.pruner = AdaptivePruner(model, settings, seed=seed)
        if self.pruner.scores_at_cuts:
            raise UserError("importance: nri scores whole data sets, which a session has none of. Take a Trainer.")
        self.schedule = make_schedule(settings, steps)
        self.distillation = SelfDistillation(settings, self.pruner.plan.counts[HIDDEN], seed, teacher)
        self.pruner.start(self.schedule)
        self._optimizer: torch.optim.Optimizer | None = None
        if settings.prunes_before:
            self.pruner.calibrate(self._rows.batches(), self._rows.loss_of)
            decision = self.pruner.decide(0)
            if decision is not None:
                self._apply(decision)
        self.distillation.keep_transform(model, self.schedule, 0)
        self._optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        model.train()
        self.pruner.begin(0)

    @staticmethod
    def _check(
        settings: MethodSettings, heldout: Iterable[Batch], teacher: PreTrainedModel | None, rows: Iterable[Batch]
    ) -> None:
        if settings.prunes and settings.distillation == "self" and not heldout:
            raise UserError("distillation: self chooses its teacher on held-out batches. Give heldout.")
        if (settings.distillation == "model") != (teacher is not None):
            raise UserError("teacher and distillation: model belong together; one was given without the other.")
        if settings.prunes_before and not rows:
            raise UserError("pruning_time: before scores the model on batches. Give calibration.")
        if settings.refit and settings.prunes and not rows:
            raise UserError("refit: true solves for weights on batches. Give calibration, or leave refit out.")

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None
        return self._optimizer

    # ------------------------------------------------------------------ one step

    def loss(self, batch: Batch) -> torch.Tensor:
        """Scalar to call ``backward`` on: the model's own loss of ``batch``, which has labels, mixed with the distance
        to the teacher while there is one."""
        mu = self.schedule.mu(self.done) if self.distillation.ready else 0.0
        family = self.pruner.family
        self.pruner.set_tokens(real_tokens(batch, family))
        taught = self.distillation.teach(batch) if mu > 0 else None
        outputs = self.model(**batch, output_hidden_states=mu > 0 and self.distillation.uses_layers, return_dict=True)
        if taught is None:
            return outputs.loss  # type: ignore[no-any-return]
        alive = self.pruner.plan.alive_layers(self.pruner.sublayers)
        distance = self.distillation.loss(batch, outputs, taught, self.model, family, alive, self.done)
        return mu * distance + (1 - mu) * outputs.loss  # type: ignore[no-any-return]

    def step(self) -> dict[str, Any] | None:
        """Finish an optimizer step, whose gradients are there; what has changed of the model, as ``events.jsonl`` of a
        run tells it, or None.

        Raises:
            UserError: the loop takes more steps than it said.
        """
        if self.done >= self.schedule.total:
            raise UserError(f"The session is for {self.schedule.total} steps, and these are done. Call finish().")
        self.pruner.observe()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        record = None
        decision = self.pruner.decide(self.done)
        if decision is not None:
            self._change(lambda: self._apply(decision))
            record = self.pruner.describe(self.done, decision.kind)
        if self.distillation.snapshot_due(self.schedule, self.done):
            self.distillation.offer(self.model, self._heldout_loss())
        if self.distillation.transform_due(self.model, self.schedule, self.done):
            self._change(lambda: self.distillation.keep_transform(self.model, self.schedule, self.done))
        self.pruner.begin(self.done)
        return record

    # ------------------------------------------------------------------ the end

    def finish(self) -> PreTrainedModel:
        """The merged and cut model, of a class that ``save_pretrained`` writes and ``load_pruned`` reads."""
        if self._optimizer is not None:
            self.pruner.detach()
            self.pruner.masks.close()
            self.distillation.end(self.model)
            self.pruner.set_tune("full")
            self.model.requires_grad_(True)
            as_pruned(self.model, self.pruner.family, self.pruner.plan)
            self._optimizer = None
        return self.model.eval()

    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """:meth:`finish`, and write the model, its plan and ``tokenizer`` to ``path``; checks that it loads."""
        save_pruned(self.finish(), Path(path), self.pruner.plan, tokenizer, self.pruner.origin.plan)

    # ------------------------------------------------------------------ inside

    def _apply(self, decision: Decision) -> Edits:
        growth = mean_growth(lora.ranks(self.model), decision.ranks)
        rows = self._rows if self._rows.given else None
        event = self.pruner.apply(decision, self.done, self.distillation.teacher.parameter_ids(), rows)
        return dict(event.edits) | self.distillation.follow(self.model, event.survivors, growth)

    def _change(self, change: Callable[[], Edits]) -> None:
        """Let ``change`` edit the model, and the optimizer's state and groups follow."""
        optimizer, model = self.optimizer, self.model
        groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
        placed = {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}
        state = collect(model, optimizer)
        state = carry(state, change())
        optimizer.state.clear()
        for group in optimizer.param_groups:
            group["params"] = []
        for name, parameter in model.named_parameters():
            parameter.grad = None
            if parameter.requires_grad:
                optimizer.param_groups[placed.get(name, 0)]["params"].append(parameter)
        restore(model, optimizer, state)

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        """Mean loss of the student over the held-out batches."""
        self.model.eval()
        losses = torch.stack([self.model(**batch).loss.float() for batch in self._heldout])
        self.model.train()
        return float(losses.mean())


class _Rows:
    """Batches that score or refit ``model``, as the pruner asks for them."""

    def __init__(self, model: PreTrainedModel, given: list[Batch]) -> None:
        self.model, self.given = model, given

    def batches(self) -> list[dict[str, Any]]:
        return [dict(batch) for batch in self.given]

    def loss_of(self, batch: Batch) -> torch.Tensor:
        return self.model(**batch).loss  # type: ignore[no-any-return]
