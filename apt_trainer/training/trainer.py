"""``APTTrainer``: a Hugging Face Trainer whose model changes its shape while it trains.

Data, logging, saving and processes stay Hugging Face's; scoring and cutting are the pruner's; rebuilding the engine
is ``training.reshape``'s, checkpoints are ``training.checkpoints``'. Overrides documented methods of the Trainer
and some private ones: those that prepare a run, run an epoch, read and write checkpoints and choose the best.
"""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, set_seed
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import has_length

from apt_trainer.distillation.session import SelfDistillation, split_heldout
from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import check_names
from apt_trainer.models import HIDDEN
from apt_trainer.models.labels import match_teacher
from apt_trainer.plan.limits import warn_of_collapse
from apt_trainer.plan.ranks import mean_growth
from apt_trainer.plan.schedule import Schedule, fewer_events, make_schedule
from apt_trainer.pruning.given_model import IN_USE, check_loaded
from apt_trainer.pruning.pruner import AdaptivePruner, Decision
from apt_trainer.scoring import Importance
from apt_trainer.settings.config import APTConfig, PruningArguments
from apt_trainer.settings.engines import check_launch, wants_deepspeed
from apt_trainer.settings.fsdp import wants_fsdp
from apt_trainer.settings.packages import check_packages
from apt_trainer.store.events import EVENTS_FILE, append_event, truncate_after
from apt_trainer.store.hub import check_upload
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.slicing import Edit
from apt_trainer.surgery.tuning import base_weight_names
from apt_trainer.training import reshape as runtime
from apt_trainer.training import trackers
from apt_trainer.training.calibration import CalibrationRows
from apt_trainer.training.callback import MethodCallback
from apt_trainer.training.checkpoints.best import check_candidates
from apt_trainer.training.checkpoints.resume import load_run
from apt_trainer.training.checkpoints.state import TrainingState, save_training_state
from apt_trainer.training.compiled import CompiledSteps
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.agreement import agree
from apt_trainer.training.engines.base import restore_forward
from apt_trainer.training.engines.groups import UNDECAYED, parameter_groups
from apt_trainer.training.engines.optimizer_class import check_objects, check_optimizer, check_overrides
from apt_trainer.training.engines.optimizer_file import read_optimizer, save_optimizer
from apt_trainer.training.engines.silence import naming_the_silent
from apt_trainer.training.engines.state import State
from apt_trainer.training.finished_model import FinishedModel
from apt_trainer.training.fused_head import let_copies_own
from apt_trainer.training.given_adapters import adopt
from apt_trainer.training.inside import (
    check_embeddings,
    check_inside,
    place_of_transformer,
    pooling_of,
    without_own_groups,
)
from apt_trainer.training.micro_batch import MicroBatches
from apt_trainer.training.own_metrics import left_alone
from apt_trainer.training.reference import check_reference
from apt_trainer.training.step_losses import StepLosses
from apt_trainer.training.termination import StopOnSignal
from apt_trainer.training.trainer_class import (
    arguments_class,
    by_name,
    makes_datasets,
    overrides,
    with_heldout,
    without_heldout,
)

logger = logging.getLogger(__name__)


class PruningMixin(FinishedModel):
    """The method as the part of a class that stands before a Trainer: see :func:`~apt_trainer.with_pruning`.

    Args:
        importance: a scoring rule of the user's own, instead of ``args.importance``.
        teacher: a fine-tuned model of the same task, where ``args.distillation`` is "model". Without logits, as of an
            embedding model, embeddings are compared with the teacher's.
        heldout_dataset: data on which snapshots of the student are chosen as teacher. By default
            ``args.heldout_fraction`` of the training data is split off for it when needed.
        class_weights: what each label counts in the loss (:class:`~apt_trainer.models.class_weights.ClassWeights`).
        optimizer_cls_and_kwargs: class and options of the optimizer, instead of ``args.optim``; a new one is made
            after each change of shape, to which the state is carried.
        peft_config: a ``LoraConfig``, whose adapters are those that grow.
        others: as those of the Trainer, but for ``optimizers``: made for the parameters of the dense model, they
            are refused. ``model`` is a Hugging Face model of a supported family, pruned before or not; adapters are
            inserted here. Or ``model_init``, which gives such a model to each call of :meth:`train`.

    A subclass may override ``compute_loss``, ``training_step`` and ``get_batch_samples``: see
    :mod:`~apt_trainer.training.micro_batch`. After :meth:`train`, ``model`` is the merged and cut model:
    ``model.save_pretrained(path)`` and ``load_pruned(path)``.
    """

    Config: type[PruningArguments]
    """Class of the settings: those of the Trainer joined with those of the method."""

    trainer_class: type[Trainer]
    """The Trainer that the method was put before."""

    args: Any
    train_dataset: Any
    eval_dataset: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    last_inputs: dict[str, Any] | None  # of a micro-batch

    def __init__(
        self,
        *args: Any,
        importance: Importance | None = None,
        teacher: PreTrainedModel | None = None,
        heldout_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        given = by_name(self.trainer_class, args) | kwargs
        model, model_init = given.pop("model", None), given.pop("model_init", None)
        optimizer = given.pop("optimizer_cls_and_kwargs", None)
        settings = self._check_arguments(given.pop("args", None), model)
        check_objects(given.pop("optimizers", None))
        if (model is None) == (model_init is None):
            raise UserError("Give either a model or model_init, a function that makes one.")
        self.args, self.model_init = settings, model_init
        if model is None:
            set_seed(settings.seed)
            model = self.call_model_init()
        if teacher is not None and teacher is model:
            raise UserError("teacher is the model itself, which trains. Load the teacher as a model of its own.")
        if (teacher is not None) != (settings.distillation == "model"):
            raise UserError(
                "A teacher model and distillation: model belong together; one was given without the other."
            )
        check_names("training")
        check_upload(settings)
        check_reference(model, settings, self.trainer_class, given)
        self.place = place_of_transformer(model)
        inner: Any = model.get_submodule(self.place)
        if given.get("peft_config") is not None:
            settings = self.args = adopt(given.pop("peft_config"), settings, inner)
        check_inside(model, self.place, settings)
        self._label_order = None
        if teacher is not None:
            teacher = teacher.get_submodule(place_of_transformer(teacher))  # type: ignore[assignment]
            self._label_order = match_teacher(inner, teacher)
            check_embeddings(inner, teacher, settings)
        self._given = importance, teacher
        if self.place and inner.base_model is inner:
            settings = self.args = copy.copy(settings)
            settings.ddp_find_unused_parameters = True  # what is round a transformer may leave its pooler out
        self.pruner = self._make_pruner(model)
        self.heldout_dataset = self._make_trainer(model, settings, given, heldout_dataset)
        self.model_init, self.optimizer_cls_and_kwargs = model_init, optimizer
        runtime.check_options(self)
        check_overrides(self, PruningMixin)
        check_optimizer(settings, optimizer, self._optimizer, model)
        self.compiled = CompiledSteps(runtime.take_compiling(self))
        self._set_up()
        self.micro_batches, self._stop = MicroBatches(self), StopOnSignal()
        self.calibration = CalibrationRows(self)
        self._tracked: str | None = None
        self.add_callback(MethodCallback(self))
        self.add_callback(self._stop)

    def _make_trainer(self, model: Any, args: Any, given: dict[str, Any], heldout: Any) -> Any:
        """What ``__init__`` of the Trainer does; returns the data held out, as the Trainer makes and reads data."""
        splits = given.get("train_dataset") is not None and heldout is None
        adds = heldout is not None and makes_datasets(self.trainer_class)
        if splits:
            _check_splitting(given["train_dataset"], args)
        if adds:
            given["eval_dataset"] = with_heldout(given.get("eval_dataset"), heldout)
        super().__init__(model=model, args=args, **given)
        let_copies_own(self.model)
        if splits:
            self.train_dataset, heldout = _split_heldout(self.train_dataset, args)
        elif adds:
            self.eval_dataset, heldout = without_heldout(self.eval_dataset)
        return heldout

    def _check_arguments(self, args: Any, model: Any) -> Any:
        """``args``; raises :class:`UserError` where they, or the libraries and processes they ask for, do not fit."""
        if not (isinstance(args, PruningArguments) and isinstance(args, arguments_class(self.trainer_class))):
            name, theirs = self.Config.__name__, arguments_class(self.trainer_class).__name__
            config = name if name == "APTConfig" else f"{type(self).__name__}.Config"
            article = "an" if config.startswith("A") else "a"
            raise UserError(f"args is {type(args).__name__}. Give {article} {config}, which has all of {theirs} too.")
        if isinstance(model, str):
            raise UserError(f"model is a name, {model!r}. Give the model itself: AutoModelFor….from_pretrained(name).")
        check_packages(vars(args))
        check_launch(args)
        return args

    # ------------------------------------------------------------------ overrides of documented methods

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer.train``; afterwards the adapters are merged and ``model`` is the cut model.

        Raises :class:`~apt_trainer.training.termination.Terminated` after a SIGTERM, once a checkpoint is written.
        """
        split = wants_deepspeed(self.args) or wants_fsdp(self.args)
        if self._begun and (self.model_init is None or split):
            done = "has finished its run" if self._finished else "was interrupted, and its model is as it was left"
            raise UserError(
                f"This trainer {done}. Make a new one to train again; an interrupted run goes on "
                "there with train(resume_from_checkpoint=True)."
            )
        with self.keeping_what_is_trained(), naming_the_silent(self.args.ddp_timeout):
            if not self._finished:  # else a model of the same kind was saved before
                self.rehearse()
            result = super().train(*args, **kwargs)
        self._stop.leave()
        if not self.schedule.meets_budget(self.state.global_step):
            self._tell(
                f"Training ended at step {self.state.global_step} of {self.state.max_steps}, before the last units go "
                f"at step {self.schedule.end}: {self.pruner.sparsity():.1%} is removed, not what was asked for."
            )
        if self.is_world_process_zero():
            self._tracked = trackers.mlflow_run(self.callback_handler.callbacks)
        self.finish()
        self.upload_if_asked()
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Two learning rates: ``full_learning_rate`` for base weights, ``learning_rate`` for adapters and head.

        Groups are parted by ``optimizer_ages`` too, where an engine keeps one step count per group.
        """
        if overrides(self.trainer_class, "create_optimizer"):
            return super().create_optimizer()
        if self.optimizer is None:
            args, module, given = self.args, model or self.model, self.optimizer_cls_and_kwargs
            cls, options = given or self._optimizer(args, module)
            rate = options.get("lr", args.learning_rate)
            decay = {"weight_decay": args.weight_decay, **(given[1] if given else {})}["weight_decay"]
            rates = {True: args.full_learning_rate or rate, False: rate}
            inner = module.get_submodule(self.place)
            base = {self._prefix + name for name in base_weight_names(inner, self.pruner.family)}
            decayed = set(self.get_decay_parameter_names(module))
            groups = parameter_groups(module, base, self.optimizer_ages, rates, decay, decayed)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All parameters but biases and those of norms, unless the Trainer's class says otherwise."""
        if overrides(self.trainer_class, "get_decay_parameter_names"):
            return super().get_decay_parameter_names(model)  # type: ignore[no-any-return]
        return get_parameter_names(model, [nn.LayerNorm], UNDECAYED)  # type: ignore[no-any-return]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the parts of the loss and the sparsity. No name has a "/": for trackers that keep
        names as paths, "loss" and "task_loss" would be a file and a folder."""
        self.check_finite()
        logs |= self.step_losses.means()
        if self.pruner.settings.prunes and "loss" in logs:
            logs["sparsity"] = self.pruner.sparsity()
        with trackers.reopened(self._tracked):
            super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not _internal_call:
            super().save_model(output_dir)
            return
        self.check_finite()
        weights, state = engine_of(self).weights_to_save(), self.training_state()
        if self.args.should_save:
            save_training_state(Path(output_dir or str(self.args.output_dir)), weights, state)

    # ------------------------------------------------------------------ the method's own steps

    def training_state(self) -> TrainingState:
        """Everything beyond the student's weights, optimizer and random state that a resumed run needs; collective."""
        description, tensors = self.pruner.state()
        teacher = None if self.distillation.teacher.is_external else self.distillation.teacher.model
        weights = None if teacher is None else engine_of(self).weights_to_save(teacher)
        shape = None if teacher is None else self._teacher_shape
        told = self.distillation.state(self.transformer)
        return TrainingState(description, tensors, told, weights, shape)

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
        if self.distillation.transform_due(self.transformer, self.schedule, step):
            runtime.reshape(self, lambda: self.distillation.keep_transform(self.transformer, self.schedule, step))

    def prune_before_training(self, max_steps: int) -> None:
        """Score the dense model on rows of the training data and cut it, before an engine or optimizer sees it."""
        started, events = time.perf_counter(), Path(str(self.args.output_dir)) / EVENTS_FILE
        if self.is_world_process_zero():
            truncate_after(events, -1)
        engine_of(self).bring(self.model)
        self.schedule = make_schedule(self.args, max_steps)
        self.pruner.start(self.schedule, 0, self._sum_over_processes, self.args.world_size)
        with self.calibration.apart():
            batches = self.calibration.batches()
            self.last_inputs = next(batches)
            self.pruner.calibrate(itertools.chain([self.last_inputs], batches), self.calibration.loss_of)
        decision = self._decide(0)
        assert decision is not None
        self._change_shape(decision, 0, started)

    def _decide(self, step: int) -> Decision | None:
        if self.pruner.measures_impact(step):
            with self.calibration.apart():
                self.pruner.measure_impact(self.calibration.batches(), self.calibration.loss_of)
        decision = self.pruner.decide(step)
        if decision is not None or self.schedule.event_at(step) is not None:
            agree("what to prune", step, None if decision is None else decision.digest())
        return decision

    def _change_shape(self, decision: Decision, step: int, started: float) -> None:
        """``started``: when what led to the decision began."""
        self.check_finite()
        loss_before = self._probe_loss()
        growth = mean_growth(lora.ranks(self.transformer), decision.ranks)

        def change() -> runtime.Edits:
            with self.calibration.apart():
                event = self.pruner.apply(decision, step, self.distillation.teacher.parameter_ids(), self.calibration)
            edits: dict[str, list[Edit]] = {self._prefix + name: of for name, of in event.edits.items()}
            return edits | self.distillation.follow(self.transformer, event.survivors, growth)

        reshape = runtime.reshape if self.live_dataloader is not None else runtime.reshape_first
        reshape(self, change)
        seconds = time.perf_counter() - started
        losses = {"loss_before": loss_before, "loss_after": self._probe_loss()}
        warn_of_collapse(step, **losses)
        self._write_record(self.pruner.describe(step, decision.kind) | {"seconds": seconds, **losses})

    # ------------------------------------------------------------------ inside

    @property
    def _prefix(self) -> str:
        """Of the names that parameters of the transformer have in the whole model."""
        return f"{self.place}." if self.place else ""

    def _optimizer(self, args: Any, model: nn.Module) -> Any:
        """Class and options of the optimizer, of which the groups are made here."""
        cls, options = self.get_optimizer_cls_and_kwargs(args, model)
        return (cls, without_own_groups(options, model)) if self.place else (cls, options)

    def _make_pruner(self, model: PreTrainedModel) -> AdaptivePruner:
        model = model.get_submodule(self.place)
        check_loaded(model)
        importance = copy.deepcopy(self._given[0]) if self.model_init is not None else self._given[0]
        args = self.args
        pruner = AdaptivePruner(model, args, importance=importance, seed=args.seed, timed_on=args.device)
        setattr(model, IN_USE, True)
        return pruner

    def _set_up(self) -> None:
        """All that belongs to one run of ``model``, whose pruner is made."""
        args, teacher = self.args, self._given[1]
        runtime.own_storage(self.model)
        self.distillation = SelfDistillation(
            args,
            self.pruner.plan.counts[HIDDEN],
            args.seed,
            None if teacher is None else engine_of(self).place(teacher),
            self.accelerator.autocast,
            self._label_order,
            getattr(self, "pooling", None) or pooling_of(self.model, self.place),
            layers=not self.place,
        )
        self._teacher_shape: dict[str, Any] | None = None
        self.schedule = self._make_schedule()
        self.live_dataloader: Any = None
        self.optimizer_ages: dict[str, int] = {}
        self._restored: tuple[Mapping[str, Any], dict[str, torch.Tensor]] | None = None
        self.pruner.importance.class_weights = self.class_weights
        together = args.average_tokens_across_devices
        self.step_losses = StepLosses(self.pruner.family, self.accelerator, together, self.class_weights)
        self.last_inputs = None
        self._begun = self._finished = self._prepares_again = False

    def _hp_search_setup(self, trial: Any) -> None:
        """As the Trainer's, which has made a model with ``model_init`` by now and sets what the trial asks for."""
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            self.args.check()
            self.pruner = self._make_pruner(self.model)
            self._set_up()

    def _make_schedule(self) -> Schedule:
        """For the errors it raises; the loop's own number of steps replaces it in :meth:`start`."""
        if self.train_dataset is None:
            raise UserError("train_dataset is missing.")
        takes_rows = self.args.prunes_before or self.pruner.scores_at_cuts or self.args.refits
        if isinstance(self.train_dataset, Mapping) and takes_rows:
            raise UserError(
                "train_dataset holds several data sets, but units are scored on rows of one (pruning_time: before, "
                "importance: nri, or refit). Give one, for example datasets.concatenate_datasets, or prune early."
            )
        return check_candidates(self.args, make_schedule(self.args, self._steps_to_come()))

    def _steps_to_come(self) -> int:
        own_loader = overrides(type(self), "get_train_dataloader")
        streams = isinstance(self.train_dataset, IterableDataset)
        if not (own_loader or streams):
            return self.args.total_steps(len(self.train_dataset))
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def start(self) -> None:
        """When the loop begins, all else being restored."""
        self.schedule = make_schedule(self.args, self.state.max_steps)
        step = self.state.global_step
        self.pruner.start(self.schedule, step, self._sum_over_processes, self.args.world_size)
        if self._restored is not None:
            self.pruner.restore_scores(*self._restored)
            self._restored = None
        if self.is_world_process_zero():
            fewer = fewer_events(self.args, self.schedule)
            if fewer is not None:
                logger.warning(fewer)
            truncate_after(Path(str(self.args.output_dir)) / EVENTS_FILE, step)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum")  # type: ignore[no-any-return]

    def _offer_snapshot(self, step: int) -> None:
        loss = self._heldout_loss()
        agree("the loss on held-out data", step, loss)
        engine_of(self).settle()
        if self.distillation.offer(self.transformer, loss):
            restore_forward(self.distillation.teacher.model)
            self._teacher_shape = self.pruner.state()[0]
            self._write_record(self.pruner.describe(step, "teacher") | {"heldout_loss": loss})

    def _heldout_loss(self) -> float:
        """Mean task loss of the student on the held-out data, over all processes."""
        dataloader = self.get_eval_dataloader(self.heldout_dataset)
        was_training = self.model_wrapped.training
        with left_alone(self):
            output = self.evaluation_loop(
                dataloader, "Choosing a teacher", prediction_loss_only=True, metric_key_prefix="heldout"
            )
        self.model_wrapped.train(was_training)
        runtime.release_memory()
        return float(output.metrics["heldout_loss"])  # type: ignore[index]

    @torch.no_grad()
    def _probe_loss(self) -> float | None:
        """Task loss on the last batch in evaluation mode, to see what a cut costs at once."""
        if self.last_inputs is None:
            return None
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.eval()
        with left_alone(self), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(dict(self.last_inputs)))
        model.train()
        return float(loss)

    def _write_record(self, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            append_event(Path(str(self.args.output_dir)) / EVENTS_FILE, record)

    # ------------------------------------------------------------------ engine and checkpoints

    def prepare_again(self) -> None:
        """Hugging Face's own preparation, and whatever a class of the user's adds to it, for a model of new shape."""
        self._prepares_again = True
        try:
            self._prepare_for_training(self.state.max_steps, self.live_dataloader, None)
        finally:
            self._prepares_again = False

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self._prepares_again:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._begun = True
        state: State = {}
        if resume_from_checkpoint is None:
            if self.pruner.settings.prunes_before:
                self.prune_before_training(max_steps)
            self.distillation.keep_transform(self.transformer, self.schedule, 0)
        else:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # else the loop has done so
                self._load_from_checkpoint(resume_from_checkpoint)
            state, schedule = read_optimizer(Path(resume_from_checkpoint))
            runtime.expect_state(self, state)
        engine_of(self).split()
        _, self.live_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine_of(self).check()
        engine_of(self).check_optimizer()
        self.distillation.teacher.join(self.transformer, engine_of(self).one_dtype)
        if resume_from_checkpoint is not None:
            engine_of(self).give_whole(state)
            runtime.set_schedule(self, schedule)
            self._load_scaler(resume_from_checkpoint)
        return runtime.LiveModel(self), self.live_dataloader

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            with self.micro_batches.wrapped():
                super()._run_epoch(**kwargs)
        else:  # resumed at its end, where the loop of transformers would take one more step
            self.control.should_training_stop = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._begun = True
        description, tensors, self._teacher_shape = load_run(self, Path(resume_from_checkpoint))
        self._restored = description, tensors


def _check_splitting(data: Any, args: Any) -> None:
    """Raise :class:`UserError` where rows are to be held out of ``data`` that are several, or have no length."""
    if isinstance(data, Mapping) and args.heldout_rows(1) > 0:
        raise UserError(
            "train_dataset holds several data sets, of which no rows are split off to choose the teacher on. Give "
            "heldout_dataset, or set distillation: none."
        )
    if has_length(data):
        return
    args.total_steps(None)
    if args.heldout_rows(1) > 0:
        raise UserError(
            f"train_dataset is {type(data).__name__}, of which no rows can be split off to choose the teacher on. "
            "Give heldout_dataset, or set distillation: none."
        )


def _split_heldout(data: Any, args: Any) -> tuple[Any, Any]:
    """(training data, rows held out to choose the teacher on, or None)"""
    return split_heldout(data, args.heldout_rows(len(data)), args.seed) if has_length(data) else (data, None)


class APTTrainer(PruningMixin, Seq2SeqTrainer):
    """Fine-tunes, prunes, grows adapters and distils in one run.

    Args:
        model: a plain Hugging Face model of a supported family; adapters are inserted here. Or ``model_init``, which
            gives such a model to each call of :meth:`train`.
        args: :class:`APTConfig`.
        others: as those of :class:`PruningMixin` and of ``transformers.Seq2SeqTrainer``.
    """

    Config = APTConfig
    trainer_class = Seq2SeqTrainer

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: APTConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
