"""What the method does between two optimizer steps: units go and ranks grow, and snapshots are offered as teacher.

What is decided is the pruner's, how an engine survives it is ``training.reshape``'s; here is the order of things, and
what ``events.jsonl`` says of them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from apt_trainer.plan.limits import warn_of_collapse
from apt_trainer.plan.ranks import mean_growth
from apt_trainer.plan.schedule import fewer_events, make_schedule
from apt_trainer.pruning.pruner import Decision
from apt_trainer.store.events import EVENTS_FILE, append_event, truncate_after
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.slicing import Edits
from apt_trainer.training import reshape as runtime
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.agreement import agree
from apt_trainer.training.engines.base import restore_forward
from apt_trainer.training.event_callback import tell_event
from apt_trainer.training.own_metrics import left_alone
from apt_trainer.training.progress import unseen

logger = logging.getLogger(__name__)


class BetweenSteps:
    """Of one run of ``trainer``."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._restored: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]] | None = None
        self.teacher_shape: dict[str, Any] | None = None
        """What the pruner said when the teacher was taken; None without one."""

    # ------------------------------------------------------------------ moments of the loop

    def prune_before_training(self, max_steps: int) -> None:
        """Score the dense model on rows of the training data and cut it, before an engine or optimizer sees it."""
        trainer, started = self._trainer, time.perf_counter()
        if trainer.is_world_process_zero():
            truncate_after(self._events_file, -1)
        engine_of(trainer).place_student(trainer.model)
        trainer.schedule = make_schedule(trainer.args, max_steps)
        trainer.pruner.start(trainer.schedule, 0, self._sum_over_processes, trainer.args.world_size)
        with trainer.calibration.apart():
            batches = trainer.calibration.batches()
            trainer.last_inputs = next(batches)
            trainer.pruner.calibrate(itertools.chain([trainer.last_inputs], batches), trainer.calibration.loss_of)
        decision = self._decide(0)
        assert decision is not None
        self._change_shape(decision, 0, started)

    def expect_scores(self, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Of a checkpoint, for when the loop begins: see :meth:`AdaptivePruner.state`."""
        self._restored = description, tensors

    def start(self) -> None:
        """When the loop begins, all else being restored."""
        trainer = self._trainer
        step = trainer.state.global_step
        trainer.schedule = make_schedule(trainer.args, trainer.state.max_steps)
        trainer.pruner.start(trainer.schedule, step, self._sum_over_processes, trainer.args.world_size)
        if self._restored is not None:
            trainer.pruner.restore_scores(*self._restored)
            self._restored = None
        if trainer.is_world_process_zero():
            fewer = fewer_events(trainer.args, trainer.schedule)
            if fewer is not None:
                logger.warning(fewer)
            truncate_after(self._events_file, step)

    def before_step(self) -> None:
        """Before the first forward pass of an optimizer step."""
        engine_of(self._trainer).settle()
        self._trainer.pruner.begin(self._trainer.state.global_step)

    def after_step(self) -> None:
        """After an optimizer step, before it is logged, evaluated and saved: shape changes, then snapshots."""
        trainer, distillation = self._trainer, self._trainer.distillation
        step = trainer.state.global_step
        trainer.step_losses.end()
        engine_of(trainer).settle()
        started, decision = time.perf_counter(), self._decide(step)
        if decision is not None:
            self._change_shape(decision, step, started)
        if distillation.snapshot_due(trainer.schedule, step):
            self._offer_snapshot(step)
        if distillation.transform_due(trainer.transformer, trainer.schedule, step):
            runtime.reshape(trainer, lambda: distillation.keep_transform(trainer.transformer, trainer.schedule, step))

    # ------------------------------------------------------------------ changes of shape

    def _decide(self, step: int) -> Decision | None:
        trainer, pruner = self._trainer, self._trainer.pruner
        if pruner.measures_impact(step):
            with trainer.calibration.apart():
                pruner.measure_impact(trainer.calibration.batches(), trainer.calibration.loss_of)
        decision: Decision | None = pruner.decide(step)
        if decision is not None or trainer.schedule.event_at(step) is not None:
            agree("what to prune", step, None if decision is None else decision.digest())
        return decision

    def _change_shape(self, decision: Decision, step: int, started: float) -> None:
        """``started``: when what led to the decision began."""
        trainer, distillation = self._trainer, self._trainer.distillation
        trainer.check_finite()
        loss_before, before = self._probe_loss(), self._state()
        growth = mean_growth(lora.ranks(trainer.transformer), decision.ranks)
        prefix = f"{trainer.place}." if trainer.place else ""

        def change() -> Edits:
            with trainer.calibration.apart():
                event = trainer.pruner.apply(decision, step, distillation.teacher.parameter_ids(), trainer.calibration)
            edits: Edits = {prefix + name: of for name, of in event.edits.items()}
            return edits | distillation.follow(trainer.transformer, event.survivors, growth)

        reshape = runtime.reshape if trainer.live_dataloader is not None else runtime.reshape_first
        reshape(trainer, change)
        seconds = time.perf_counter() - started
        losses = {"loss_before": loss_before, "loss_after": self._probe_loss()}
        warn_of_collapse(step, **losses)
        self._write_record(trainer.pruner.describe(step, decision.kind) | {"seconds": seconds, **losses}, before)

    @torch.no_grad()
    def _probe_loss(self) -> float | None:
        """Task loss on the last batch in evaluation mode, to see what a cut costs at once."""
        trainer = self._trainer
        if trainer.last_inputs is None:
            return None
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model.eval()
        with left_alone(trainer), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(dict(trainer.last_inputs)))
        model.train()
        return float(loss)

    # ------------------------------------------------------------------ snapshots

    def _offer_snapshot(self, step: int) -> None:
        trainer, distillation = self._trainer, self._trainer.distillation
        loss = self._heldout_loss()
        agree("the loss on held-out data", step, loss)
        engine_of(trainer).settle()
        if distillation.offer(trainer.transformer, loss):
            restore_forward(distillation.teacher.model)
            self.teacher_shape = trainer.pruner.state()[0]
            record = trainer.pruner.describe(step, "teacher") | {"heldout_loss": loss}
            self._write_record(record, self._state())

    def _heldout_loss(self) -> float:
        """Mean task loss of the student on the held-out data, over all processes."""
        trainer = self._trainer
        dataloader = trainer.get_eval_dataloader(trainer.heldout_dataset)
        was_training = trainer.model_wrapped.training
        with left_alone(trainer), unseen(trainer):
            output = trainer.evaluation_loop(
                dataloader, "Choosing a teacher", prediction_loss_only=True, metric_key_prefix="heldout"
            )
        trainer.model_wrapped.train(was_training)
        runtime.release_memory()
        return float(output.metrics["heldout_loss"])

    # ------------------------------------------------------------------ processes and records

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._trainer.accelerator.reduce(tensor, reduction="sum")  # type: ignore[no-any-return]

    @property
    def _events_file(self) -> Path:
        return Path(str(self._trainer.args.output_dir)) / EVENTS_FILE

    def _state(self) -> dict[str, Any]:
        """Sizes, ranks and what trains, as records tell them."""
        pruner = self._trainer.pruner
        return pruner.plan.by_kind(pruner.spaces) | {"ranks": lora.ranks(pruner.model), "tune": pruner.tune}

    def _write_record(self, record: dict[str, Any], before: Mapping[str, Any]) -> None:
        if self._trainer.is_world_process_zero():
            append_event(self._events_file, record)
            tell_event(self._trainer, record, before)
