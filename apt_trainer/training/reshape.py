"""Changes a model's shape in the middle of ``Trainer.train()``: takes it out of its engine, has it changed, and lets
Hugging Face prepare it again.

:func:`reshape` goes on with optimizer moments, learning-rate schedule and random state as they were. What differs
between engines is in ``training.engines``, none of which knows the Trainer. Not for deciding what changes
(``pruner``).
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import has_length

from apt_trainer.errors import UserError
from apt_trainer.libraries.private_names import check_names
from apt_trainer.settings.engines import wants_deepspeed
from apt_trainer.settings.fsdp import wants_fsdp
from apt_trainer.surgery.slicing import Edits
from apt_trainer.tensors.partitioned import shape_of
from apt_trainer.training.compiled import compile_options
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.agreement import agree
from apt_trainer.training.engines.base import plain_optimizer
from apt_trainer.training.engines.state import State, add_masters, ages
from apt_trainer.training.inside import unwrap_in_losses


class LiveModel:
    """Stands for the wrapped model in the frames of the training loop, which keep it in a local variable for the
    whole run; forwards everything to the wrapper of the moment."""

    def __init__(self, trainer: Trainer) -> None:
        self.__dict__["_trainer"] = weakref.ref(trainer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_trainer"]().model_wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_trainer"]().model_wrapped(*args, **kwargs)


def check_options(trainer: Any) -> None:
    """Raise :class:`UserError` for what a Trainer was started with, or libraries of its engine, under which shapes
    cannot change."""
    check_names(*engine_of(trainer).needs)
    passes = trainer.pruner.scores_at_cuts or trainer.args.refits
    if passes and not trainer.args.prunes_before and trainer.train_dataset is not None:
        rows = trainer.args.calibration_samples
        if has_length(trainer.train_dataset):
            rows = min(rows, len(trainer.train_dataset))
        if rows < trainer.args.world_size:
            asks = "nri" if trainer.pruner.scores_at_cuts else "refit"
            raise UserError(
                f"calibration_samples and the training data give no row to some of the {trainer.args.world_size} "
                f"processes ({rows} rows), but each takes part in what {asks} measures. Raise calibration_samples."
            )
    if wants_deepspeed(trainer.args) and not trainer.is_deepspeed_enabled:
        raise UserError(
            "DeepSpeed is asked for, but accelerate has not switched it on for these processes. Start them with "
            "apt-trainer train --accelerate_config zero2, or accelerate launch with that profile, and make "
            "TrainingArguments before any other object of accelerate."
        )
    if wants_fsdp(trainer.args) and not trainer.is_fsdp_enabled:
        raise UserError(
            "FSDP is asked for, but accelerate has not switched it on for these processes. Start them with "
            "apt-trainer train --accelerate_config fsdp2, or accelerate launch with that profile."
        )


def take_compiling(trainer: Any) -> dict[str, Any] | None:
    """What ``compiled.compile_options`` says; accelerate, which would wrap the model, compiles nothing itself."""
    options = compile_options(trainer.args)
    if options is not None and trainer.is_fsdp_enabled:
        raise UserError("torch_compile under FSDP is not supported. Remove it, or train under DDP.")
    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
    return options


def own_storage(model: nn.Module) -> None:
    """Give every parameter on the CPU memory of its own, in place.

    Weights read from a file lie in one mapping of that file, which stays in memory as a whole while any tensor of it
    lives: what a cut removes would not be given back.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def reshape(trainer: Any, change: Callable[[], Edits]) -> None:
    """Run ``change`` on the plain model between two steps and rebuild the engine round the result.

    Must be called by all processes at the same step, from ``on_step_end``: gradients are cleared then and the
    next batch is not fetched. ``change`` edits the model in place and returns what happened to each parameter.
    """
    cpu_rng = torch.random.get_rng_state()
    engine = engine_of(trainer)
    engine.settle()
    schedule = trainer.lr_scheduler.state_dict()
    model = engine.unwrap()
    edits = change()
    if engine.leaves_cycles:
        gc.collect()
    state = engine.export_state(edits)
    _agree_on_shape(trainer)
    engine.release()
    trainer.compiled.forget()
    trainer.own_optimizer.ages = ages(state) if engine.groups_by_age else {}
    del engine  # and the wrapper that it has
    _rebuild(trainer, model, schedule)
    engine_of(trainer).import_state(state)
    for attribute in ("model", "optimizer", "lr_scheduler"):
        setattr(trainer.callback_handler, attribute, getattr(trainer, attribute))
    trainer.model_wrapped.train()
    release_memory(collect=trainer.args.world_size > 1 or trainer.is_fsdp_enabled)
    torch.random.set_rng_state(cpu_rng)


def expect_state(trainer: Any, state: State) -> None:
    """Before an engine is made that will be given the ``state`` of a checkpoint."""
    trainer.own_optimizer.ages = ages(state) if engine_of(trainer).groups_by_age else {}
    if trainer.is_deepspeed_enabled and trainer.args.bf16:
        add_masters(state, trainer.model)


def reshape_first(trainer: Any, change: Callable[[], Edits]) -> None:
    """As :func:`reshape`, before training has begun: there is no engine to rebuild and no optimizer state."""
    change()
    _agree_on_shape(trainer)
    release_memory()


def release_memory(collect: bool = True) -> None:
    """Give freed memory back to the system; ``collect`` breaks reference cycles first."""
    if collect:
        gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)


def _rebuild(trainer: Any, model: nn.Module, schedule: dict[str, Any]) -> None:
    """Hugging Face's own preparation once more, with the schedule where it was."""
    accelerator = trainer.accelerator
    accelerator._models.clear()
    accelerator._optimizers.clear()
    accelerator._schedulers.clear()
    model.__dict__.pop("_is_accelerate_prepared", None)
    trainer.model = trainer.model_wrapped = model
    unwrap_in_losses(getattr(trainer, "loss", None), model)
    trainer.optimizer = trainer.lr_scheduler = trainer.deepspeed = None
    trainer._mixed_mesh_grads = None
    engine_of(trainer).wrap(model)
    trainer.prepare_again()
    engine_of(trainer).repair()
    trainer.own_optimizer.check_made()
    set_schedule(trainer, schedule)


def begin(trainer: Any) -> None:
    """Once the first engine of a run is made."""
    engine = engine_of(trainer)
    engine.repair()
    trainer.own_optimizer.check_made()
    for watcher in engine.callbacks:
        trainer.remove_callback(watcher)
        trainer.add_callback(watcher)


def finalize(trainer: Any) -> Any:
    """The plain model after training, on every process; what follows is evaluation of it."""
    model = engine_of(trainer).finalize()
    trainer.deepspeed = None
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    return model


def set_schedule(trainer: Any, schedule: Mapping[str, Any]) -> None:
    """Put a new learning-rate schedule where an old one was, and the rates with it.

    ``schedule``: its ``last_epoch`` (steps done) and ``_step_count``.
    """
    position = schedule["last_epoch"]
    trainer.lr_scheduler.last_epoch = position
    trainer.lr_scheduler._step_count = schedule["_step_count"]
    groups = plain_optimizer(trainer).param_groups
    rates = [
        base * rate(position)
        for base, rate in zip(trainer.lr_scheduler.base_lrs, trainer.lr_scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    trainer.lr_scheduler._last_lr = rates


def _agree_on_shape(trainer: Any) -> None:
    named = trainer.model.named_parameters()
    agree(
        "the pruned structure", trainer.state.global_step, [(n, tuple(shape_of(p)), p.requires_grad) for n, p in named]
    )
