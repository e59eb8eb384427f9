"""``APTTrainer``: a Hugging Face Trainer whose model changes its shape while it trains.

The seam to Hugging Face's Trainer, whose data, logging, saving and processes stay its own. What the method does is
elsewhere: in a micro-batch ``micro_batch``, between two steps ``between_steps``, to the engine ``reshape``; the
optimizer is made in ``own_optimizer``, rows are scored in ``calibration``, checkpoints are those of ``checkpoints``.
Overrides documented methods of the Trainer and some private ones: those that prepare a run, run an epoch, read and
write checkpoints and choose the best.
"""

from __future__ import annotations

import copy
import logging
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
from apt_trainer.plan.schedule import Schedule, make_schedule
from apt_trainer.pruning.given_model import IN_USE, check_loaded
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.scoring import Importance
from apt_trainer.settings import DataSettings
from apt_trainer.settings.config import APTConfig, PruningArguments
from apt_trainer.settings.engines import check_launch, wants_deepspeed
from apt_trainer.settings.fsdp import wants_fsdp
from apt_trainer.settings.packages import check_packages
from apt_trainer.store.hub import check_upload
from apt_trainer.training import positions, trackers
from apt_trainer.training import reshape as runtime
from apt_trainer.training.between_steps import BetweenSteps
from apt_trainer.training.calibration import CalibrationRows
from apt_trainer.training.callback import MethodCallback
from apt_trainer.training.checkpoints.best import check_candidates
from apt_trainer.training.checkpoints.resume import load_run
from apt_trainer.training.checkpoints.state import TrainingState, save_training_state
from apt_trainer.training.compiled import CompiledSteps
from apt_trainer.training.early_stopping import EarlyStopping
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.groups import UNDECAYED
from apt_trainer.training.engines.optimizer_class import check_objects
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
    what_is_compared,
)
from apt_trainer.training.micro_batch import MicroBatches
from apt_trainer.training.own_optimizer import OwnOptimizer
from apt_trainer.training.progress import use_run_progress
from apt_trainer.training.raw_data import prepared
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
        tokenizer = given.get("processing_class")
        self.place = place_of_transformer(model)
        inner: Any = model.get_submodule(self.place)
        if given.get("peft_config") is not None:
            settings = self.args = adopt(given.pop("peft_config"), settings, inner)
        check_inside(model, self.place, settings)
        self._label_order = None
        if teacher is not None:
            teacher = teacher.get_submodule(place_of_transformer(teacher))  # type: ignore[assignment]
            self._label_order = match_teacher(inner, teacher, tokenizer)
            check_embeddings(inner, teacher, settings)
        self._given = importance, teacher
        if self.place and inner.base_model is inner:
            settings = self.args = copy.copy(settings)
            settings.ddp_find_unused_parameters = True  # what is round a transformer may leave its pooler out
        self.pruner = self._make_pruner(model)
        self.heldout_dataset = self._make_trainer(model, settings, given, heldout_dataset)
        self.model_init, self.optimizer_cls_and_kwargs = model_init, optimizer
        self.own_optimizer = OwnOptimizer(self, optimizer)
        runtime.check_options(self)
        self.own_optimizer.check(PruningMixin, model)
        self.compiled = CompiledSteps(runtime.take_compiling(self))
        self._set_up()
        self.micro_batches, self._stop = MicroBatches(self), StopOnSignal()
        self.calibration = CalibrationRows(self)
        self._tracked: str | None = None
        self._add_callbacks()
        left_out = what_is_compared(model, self.place, settings)
        if left_out is not None and self.is_world_process_zero():
            logger.warning(left_out)

    def _add_callbacks(self) -> None:
        use_run_progress(self)
        self.add_callback(MethodCallback(self))
        self.add_callback(self._stop)
        self.early_stopping = EarlyStopping(self)
        if self.args.early_stopping_patience is not None:
            self.add_callback(self.early_stopping)

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
        if self.uploads_after_training:
            self.upload_if_asked()
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """That of ``training.own_optimizer``, unless the Trainer's class has its own."""
        if overrides(self.trainer_class, "create_optimizer"):
            return super().create_optimizer()
        if self.optimizer is None:
            self.optimizer = self.own_optimizer.make(model or self.model)
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
        shape = None if teacher is None else self.between_steps.teacher_shape
        return TrainingState(description, tensors, self.distillation.state(self.transformer), weights, shape)

    # ------------------------------------------------------------------ inside

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
        if not engine_of(self).splits:
            runtime.own_storage(self.model)
        positions.make_exact(self.model)
        self.distillation = SelfDistillation(
            args,
            self.pruner.plan.counts[HIDDEN],
            args.seed,
            None if teacher is None else engine_of(self).place_teacher(teacher),
            self.accelerator.autocast,
            self._label_order,
            getattr(self, "pooling", None) or pooling_of(self.model, self.place),
            layers=not self.place,
        )
        self.between_steps = BetweenSteps(self)
        self.schedule = self._make_schedule()
        self.live_dataloader: Any = None
        self.own_optimizer.ages = {}
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
        """For the errors it raises; the loop's own number of steps replaces it when it begins."""
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
                self.between_steps.prune_before_training(max_steps)
            self.distillation.keep_transform(self.transformer, self.schedule, 0)
        else:
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # else the loop has done so
                self._load_from_checkpoint(resume_from_checkpoint)
            state, schedule = read_optimizer(Path(resume_from_checkpoint))
            runtime.expect_state(self, state)
        engine_of(self).wrap(self.model)
        _, self.live_dataloader = super()._prepare_for_training(max_steps, train_dataloader, None)
        runtime.begin(self)
        self.distillation.teacher.join(self.transformer, engine_of(self).one_dtype)
        if resume_from_checkpoint is not None:
            engine_of(self).import_whole(state)
            runtime.set_schedule(self, schedule)
            self._load_scaler(resume_from_checkpoint)
        return runtime.LiveModel(self), self.live_dataloader

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps and not self.early_stopping.is_met(self.state):
            with self.micro_batches.wrapped():
                super()._run_epoch(**kwargs)
        else:  # resumed at its end, where the loop of transformers would take one more step
            self.control.should_training_stop = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer(self, Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._begun = True
        description, tensors, self.between_steps.teacher_shape = load_run(self, Path(resume_from_checkpoint))
        self.between_steps.expect_scores(description, tensors)


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
        data: what the rows of the data sets hold, as in a recipe (``task``, ``text_column``, ``template``,
            ``max_length`` …), where they are not tokenised: texts with labels, prompts, or conversations
            (``messages``). What it needs beside is made: labels, batches, metrics, a validation set.
        others: as those of :class:`PruningMixin` and of ``transformers.Seq2SeqTrainer``.
    """

    Config = APTConfig
    trainer_class = Seq2SeqTrainer

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: APTConfig | None = None,
        train_dataset: Any = None,
        *,
        data: DataSettings | None = None,
        **kwargs: Any,
    ) -> None:
        if data is not None:
            if model is None:
                raise UserError("data is for a model, whose config says how it reads texts. Give model.")
            args = self._check_arguments(args, model)
            given = prepared(data, model, args, {"train_dataset": train_dataset, **kwargs})
            args, train_dataset, kwargs = given.pop("args"), given.pop("train_dataset"), given
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
