"""``APTTrainer``: a Hugging Face Trainer whose model changes its shape while it trains.

Data, logging, saving and processes stay Hugging Face's; scoring and cutting are the pruner's; rebuilding the engine
is ``training.reshape``'s, the best checkpoint ``training.best_model``'s. Overrides documented methods of the Trainer
and some private ones: those that prepare a run, run an epoch, read and write checkpoints and choose the best.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.distillation.session import SelfDistillation, split_heldout
from apt_trainer.errors import UserError
from apt_trainer.models import HIDDEN
from apt_trainer.models.batch import real_tokens
from apt_trainer.plan.limits import warn_of_collapse
from apt_trainer.plan.ranks import mean_growth
from apt_trainer.plan.schedule import Schedule, make_schedule
from apt_trainer.pruning.pruner import AdaptivePruner, Decision
from apt_trainer.scoring import Importance
from apt_trainer.scoring.calibration import Batch, shares
from apt_trainer.settings.config import APTConfig
from apt_trainer.store.events import append_event, truncate_after
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.slicing import Grow, Keep
from apt_trainer.surgery.tuning import base_weight_names
from apt_trainer.training import checkpoint
from apt_trainer.training import reshape as runtime
from apt_trainer.training.best_model import BestWithinBudget, check_candidates
from apt_trainer.training.callback import MethodCallback
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.agreement import agree
from apt_trainer.training.engines.base import restore_forward
from apt_trainer.training.engines.groups import parameter_groups
from apt_trainer.training.engines.optimizer_file import read_optimizer, save_optimizer
from apt_trainer.training.engines.silence import naming_the_silent
from apt_trainer.training.engines.state import State
from apt_trainer.training.resume import load_run
from apt_trainer.training.step_losses import StepLosses
from apt_trainer.training.termination import StopOnSignal

EVENTS_FILE = "events.jsonl"


class APTTrainer(BestWithinBudget):
    """Fine-tunes, prunes, grows adapters and distils in one run.

    Args:
        model: a plain Hugging Face model of a supported family; adapters are inserted here.
        args: :class:`APTConfig`.
        importance: a scoring rule of the user's own, instead of ``args.importance``.
        teacher: a fine-tuned model of the same task, where ``args.distillation`` is "model".
        heldout_dataset: data on which snapshots of the student are chosen as teacher. By default
            ``args.heldout_fraction`` of the training data is split off for it when needed.
        others: as ``transformers.Trainer``.

    After :meth:`train`, ``model`` is the merged and cut model: ``model.save_pretrained(path)`` and
    ``load_pruned(path)``.
    """

    args: APTConfig
    model: Any
    model_wrapped: Any
    optimizer: Any
    loss_is_scaled_for_ga = True  # by the shares of StepLosses

    def __init__(
        self,
        model: PreTrainedModel,
        args: APTConfig,
        train_dataset: Any = None,
        *,
        importance: Importance | None = None,
        teacher: PreTrainedModel | None = None,
        heldout_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if (teacher is not None) != (args.distillation == "model"):
            raise UserError(
                "A teacher model and distillation: model belong together; one was given without the other."
            )
        if hasattr(model.config, "apt_structure"):
            raise UserError("The model is a pruned one already. Start from the dense model it was made from.")
        self.pruner = AdaptivePruner(model, args, importance=importance, seed=args.seed)
        if train_dataset is not None and heldout_dataset is None:
            number = args.heldout_rows(len(train_dataset))
            train_dataset, heldout_dataset = split_heldout(train_dataset, number, args.seed)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        runtime.check_options(self)
        runtime.own_storage(model)
        self.distillation = SelfDistillation(
            args,
            self.pruner.dense_plan.counts[HIDDEN],
            args.seed,
            None if teacher is None else engine_of(self).place(teacher),
            self.accelerator.autocast,
        )
        self._teacher_shape: dict[str, Any] | None = None
        self.heldout_dataset = heldout_dataset
        self.schedule = self._make_schedule()
        self.live_dataloader: Any = None
        self.optimizer_ages: dict[str, int] = {}
        self._restored: tuple[Mapping[str, Any], dict[str, torch.Tensor]] | None = None
        self.step_losses = StepLosses(self.pruner.family, self.accelerator, args.average_tokens_across_devices)
        self._last_inputs: dict[str, Any] | None = None
        self._finished, self._stop = False, StopOnSignal()
        self.add_callback(MethodCallback(self))
        self.add_callback(self._stop)

    # ------------------------------------------------------------------ overrides of documented methods

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; afterwards the adapters are merged and ``model`` is the cut model.

        Raises :class:`~apt_trainer.training.termination.Terminated` after a SIGTERM, once a checkpoint is written.
        """
        if self._finished:
            raise UserError("This trainer has finished its run. Make a new one with a dense model to train again.")
        with naming_the_silent(self.args.ddp_timeout):
            result = super().train(*args, **kwargs)
        self._stop.leave()
        self.finish()
        return result

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """As the Trainer's: the micro-batches of a step, whose losses are weighed together."""
        batches, number = super().get_batch_samples(*args)
        self.step_losses.begin(batches, self.model)
        return batches, number

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self._last_inputs = inputs
        loss = super().training_step(self.model_wrapped, inputs, num_items_in_batch)
        self.step_losses.look_at(loss)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step, family, inputs = self.state.global_step, self.pruner.family, self._prepare_inputs(inputs)
        self.pruner.set_tokens(real_tokens(inputs, family))
        shares = self.step_losses.shares(inputs, self.model)
        mu = self.schedule.mu(step) if self.distillation.ready else 0.0
        asked = dict(inputs)
        if mu > 0.0:
            engine_of(self).settle()
            taught = self.distillation.teach(inputs)
            asked |= {"output_hidden_states": True} if self.distillation.uses_layers else {}
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        if self.compute_loss_func is None:  # else that function has divided by num_items_in_batch
            loss = shares.of_task(loss)
        if self.args.distillation != "none":
            self.step_losses.note("loss/task", loss, step)
        if mu > 0.0:
            alive = self.pruner.alive_layers()
            distance = self.distillation.loss(inputs, outputs, taught, self.model, family, alive, step, shares)
            self.step_losses.note("loss/distillation", distance, step)
            loss = mu * distance + (1 - mu) * loss
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two learning rates: ``full_learning_rate`` for base weights, ``learning_rate`` for adapters and head.

        Groups are parted by ``optimizer_ages`` too, where an engine keeps one step count per group.
        """
        if self.optimizer is None:
            module = model or self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            base = base_weight_names(module, self.pruner.family)
            rates = {True: self.args.full_learning_rate or self.args.learning_rate, False: self.args.learning_rate}
            groups = parameter_groups(module, base, self.optimizer_ages, rates, self.args.weight_decay)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_finite()
        logs |= self.step_losses.means()
        if self.pruner.settings.prunes and "loss" in logs:
            logs["pruning/sparsity"] = self.pruner.sparsity()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of the Trainer itself: a checkpoint in training form. After :meth:`train`: the merged, cut model that loads
        anywhere apt_trainer is imported. Raises :class:`UserError` when called in a run."""
        path = Path(output_dir or str(self.args.output_dir))
        self.check_finite()
        if self.is_in_train and not _internal_call:
            raise UserError("save_model is for after train(); in a run checkpoints are written by save_strategy.")
        if _internal_call:
            weights, state = engine_of(self).weights_to_save(), self.training_state()
            if self.args.should_save:
                checkpoint.save_training_state(path, weights, state)
        elif self.args.should_save:
            checkpoint.save_pruned(self.model, path, self.pruner.plan, self.processing_class)

    # ------------------------------------------------------------------ the method's own steps

    def training_state(self) -> checkpoint.TrainingState:
        """Everything beyond the student's weights, optimizer and random state that a resumed run needs; collective."""
        description, tensors = self.pruner.state()
        teacher = None if self.distillation.teacher.is_external else self.distillation.teacher.model
        weights = None if teacher is None else engine_of(self).weights_to_save(teacher)
        shape = None if teacher is None else self._teacher_shape
        return checkpoint.TrainingState(description, tensors, self.distillation.state(self.model), weights, shape)

    def check_finite(self) -> None:
        """Raise :class:`UserError` if any loss so far was not finite; waits for the device."""
        self.step_losses.check_finite(self.state.global_step)

    def before_step(self) -> None:
        """Before the first forward pass of an optimizer step."""
        engine_of(self).settle()
        self.pruner.begin(self.state.global_step)

    def after_step(self) -> None:
        """After an optimizer step, before it is logged, evaluated and saved: shape changes, then snapshots."""
        step = self.state.global_step
        self.step_losses.end()
        engine_of(self).settle()
        started, decision = time.perf_counter(), self._decide(step)
        if decision is not None:
            self._change_shape(decision, step, started)
        if self.distillation.snapshot_due(self.schedule, step):
            self._offer_snapshot(step)
        if self.distillation.transform_due(self.model, self.schedule, step):
            runtime.reshape(self, lambda: self.distillation.keep_transform(self.model, self.schedule, step))

    def prune_before_training(self, max_steps: int) -> None:
        """Score the dense model on rows of the training data and cut it, before an engine or optimizer sees it."""
        started, events = time.perf_counter(), Path(str(self.args.output_dir)) / EVENTS_FILE
        if self.is_world_process_zero():
            truncate_after(events, -1)
        engine_of(self).bring(self.model)
        self.schedule = make_schedule(self.args, max_steps)
        self.pruner.start(self.schedule, 0, self._sum_over_processes, self.args.world_size)
        with torch.random.fork_rng(devices=[]):  # the run that follows does not depend on calibration_samples
            batches = self._calibration_batches()
            self._last_inputs = next(batches)
            self.pruner.calibrate(itertools.chain([self._last_inputs], batches), self._calibration_loss)
        decision = self._decide(0)
        assert decision is not None
        self._change_shape(decision, 0, started)

    def _decide(self, step: int) -> Decision | None:
        if self.pruner.measures_impact(step):
            self.pruner.measure_impact(self._calibration_batches(), self._calibration_loss)
        decision = self.pruner.decide(step)
        if decision is not None or self.schedule.event_at(step) is not None:
            agree("what to prune", step, None if decision is None else decision.digest())
        return decision

    def _change_shape(self, decision: Decision, step: int, started: float) -> None:
        """``started``: when what led to the decision began."""
        self.check_finite()
        loss_before = self._probe_loss()
        growth = mean_growth(lora.ranks(self.model), decision.ranks)

        def change() -> runtime.Edits:
            event = self.pruner.apply(decision, step, self.distillation.teacher.parameter_ids())
            edits: dict[str, list[Keep | Grow]] = dict(event.edits)
            return edits | self.distillation.follow(self.model, event.survivors, growth)

        reshape = runtime.reshape if self.live_dataloader is not None else runtime.reshape_first
        reshape(self, change)
        seconds = time.perf_counter() - started
        losses = {"loss_before": loss_before, "loss_after": self._probe_loss()}
        warn_of_collapse(step, **losses)
        self._write_record(self.pruner.describe(step, decision.kind) | {"seconds": seconds, **losses})

    def finish(self) -> None:
        """Merge adapters and make ``model`` what ``save_pretrained`` writes and ``load_pruned`` reads."""
        self.check_finite()
        self.pruner.detach()
        self.pruner.masks.close()
        self.distillation.end(self.model)
        self.model = engine_of(self).leave()
        self.pruner.set_tune("full")
        self.load_best()
        self.model.requires_grad_(True)
        as_pruned(self.model, self.pruner.family, self.pruner.plan, self.args.remote_code)
        self.model_wrapped = self.model
        self._finished = True

    # ------------------------------------------------------------------ inside

    def _make_schedule(self) -> Schedule:
        """For the errors it raises; the loop's own number of steps replaces it in :meth:`start`."""
        if self.train_dataset is None:
            raise UserError("train_dataset is missing.")
        return check_candidates(self.args, make_schedule(self.args, self.args.total_steps(len(self.train_dataset))))

    def start(self) -> None:
        """When the loop begins, all else being restored."""
        self.schedule = make_schedule(self.args, self.state.max_steps)
        step = self.state.global_step
        self.pruner.start(self.schedule, step, self._sum_over_processes, self.args.world_size)
        if self._restored is not None:
            self.pruner.restore_scores(*self._restored)
            self._restored = None
        if self.is_world_process_zero():
            truncate_after(Path(str(self.args.output_dir)) / EVENTS_FILE, step)

    def _calibration_batches(self) -> Iterator[Batch | None]:
        """This process' share of the rows that score the model; None where its rows have run out."""
        args, data = self.args, self.train_dataset
        collate = self._get_collator_with_removed_columns(self.data_collator, "Calibration")
        size = args.calibration_batch_size or args.train_batch_size
        for rows in shares(len(data), args.calibration_samples, size, args.seed, args.process_index, args.world_size):
            yield self._prepare_inputs(collate([data[row] for row in rows])) if rows else None

    def _calibration_loss(self, batch: Batch) -> torch.Tensor:
        """Task loss of the plain model. Gradients in float16 would need the scaler of accelerate."""
        with nullcontext() if self.args.fp16 else self.accelerator.autocast():
            return super().compute_loss(self.model, dict(batch))  # type: ignore[no-any-return]

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[no-any-return]

    def _offer_snapshot(self, step: int) -> None:
        loss = self._heldout_loss()
        agree("the loss on held-out data", step, loss)
        engine_of(self).settle()
        if self.distillation.offer(self.model, loss):
            restore_forward(self.distillation.teacher.model)
            self._teacher_shape = self.pruner.state()[0]
            self._write_record(self.pruner.describe(step, "teacher") | {"heldout_loss": loss})

    def _heldout_loss(self) -> float:
        """Mean task loss of the student on the held-out data, over all processes."""
        dataloader = self.get_eval_dataloader(self.heldout_dataset)
        was_training = self.model_wrapped.training
        output = self.evaluation_loop(
            dataloader, "Choosing a teacher", prediction_loss_only=True, metric_key_prefix="heldout"
        )
        self.model_wrapped.train(was_training)
        runtime.release_memory()
        return float(output.metrics["heldout_loss"])  # type: ignore[index]

    @torch.no_grad()
    def _probe_loss(self) -> float | None:
        """Task loss on the last batch in evaluation mode, to see what a cut costs at once."""
        if self._last_inputs is None:
            return None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.eval()
        with self.compute_loss_context_manager():
            loss = super().compute_loss(model, self._prepare_inputs(dict(self._last_inputs)))
        model.train()
        return float(loss)

    def _write_record(self, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            append_event(Path(str(self.args.output_dir)) / EVENTS_FILE, record)

    # ------------------------------------------------------------------ engine and checkpoints

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        state: State = {}
        if resume_from_checkpoint is None:
            if self.pruner.settings.prunes_before:
                self.prune_before_training(max_steps)
            self.distillation.keep_transform(self.model, self.schedule, 0)
        else:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # else the loop has done so
                self._load_from_checkpoint(resume_from_checkpoint)
            state, schedule = read_optimizer(Path(resume_from_checkpoint))
            runtime.expect_state(self, state)
        engine_of(self).split()
        _, self.live_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine_of(self).check()
        self.distillation.teacher.join(self.model, engine_of(self).one_dtype)
        if resume_from_checkpoint is not None:
            engine_of(self).give_whole(state)
            runtime.set_schedule(self, schedule)
            self._load_scaler(resume_from_checkpoint)
        return runtime.LiveModel(self), self.live_dataloader

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # resumed at its end, where the loop of transformers would take one more step
            self.control.should_training_stop = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        description, tensors, self._teacher_shape = load_run(self, Path(resume_from_checkpoint))
        self._restored = description, tensors
